"""The comparison of training methods: what it writes, that its table is true, and how it answers bad arguments."""

from __future__ import annotations

import statistics

import pytest
from example_scripts import EXAMPLES, NO_CARD, Finished, exit_code, finished, imported, needs

needs("matplotlib", "pytorch_optimizer", "skdim", "tqdm", "transformers")

SCRIPT = EXAMPLES / "recipes_text.py"


@pytest.fixture(scope="module")
def script():
    yield from imported(SCRIPT)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(SCRIPT, tmp_path_factory.mktemp("recipes"), "--quick")


def test_every_method_is_run_with_as_many_parameters(ran, script):
    methods = ran.results["methods"]
    assert list(methods) == list(script.RATES)
    size = 2 * script.WIDTH * len(script.ATTENTION) * script.DEPTH  # of rank 1 everywhere
    gains = script.RANK * len(script.ATTENTION) * script.DEPTH
    for name, runs in methods.items():
        ranks = 1 if name in ("LoRA, rank 1", "XGBLoRA") else script.RANK
        assert [run["trainable"] for run in runs] == [size * ranks + (gains if name == "BeamLoRA" else 0)], name
        assert all(run["loss"] < ran.results["before"] for run in runs), name


def test_the_table_says_the_results(ran):
    text = (ran.out / "table.md").read_text()
    assert text.strip() in ran.process.stdout
    methods = ran.results["methods"]
    lora = methods["LoRA"][0]["loss"]
    for name, (run,) in methods.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        assert f"{run['trainable']:,}" in row
        assert f"{statistics.mean([run['loss']]):.4f}" in row
        if name not in ("LoRA", "LoRA, rank 1", "XGBLoRA"):
            assert f"{run['loss'] - lora:+.4f}" in row
    assert (ran.out / "recipes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("--steps", "3"), ("--seeds", "0"), ("--methods", "AdaLoRA"), ("--out", str(SCRIPT)), NO_CARD],
)
def test_bad_arguments_end_with_code_2(argument, value, script, monkeypatch):
    assert exit_code(script, monkeypatch, argument, value) == 2
