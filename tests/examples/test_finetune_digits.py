"""The digits example: what it writes, what it prints, and how it answers bad arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from example_scripts import EXAMPLES, NO_CARD, Finished, exit_code, finished, imported, needs, start

needs("sklearn", "matplotlib", "tqdm")

SCRIPT = EXAMPLES / "finetune_digits.py"
METHODS = ["linear probe", "LoRA", "GLoRA"]
CHANCE = 0.2  # five classes, equally many scans of each


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield from imported(SCRIPT)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(SCRIPT, tmp_path_factory.mktemp("digits") / "results", "--quick")


def test_files_are_written_and_named(quick: Finished) -> None:
    for name in ("curves.png", "results.json", "glora.safetensors"):
        assert (quick.out / name).stat().st_size > 1000, name
        assert str(quick.out / name) in quick.process.stdout
    assert (quick.out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_sane(quick: Finished) -> None:
    methods = quick.results["methods"]
    assert list(methods) == METHODS
    assert quick.results["pretrained_accuracy"] > 0.7
    for row in methods.values():
        assert 0.0 <= row["accuracy_mean"] <= 1.0
        assert row["seconds_per_run"] > 0.0
        assert row["peak_memory_bytes"] > 0
        (run,) = row["runs"]
        assert len(run["steps"]) == len(run["accuracies"]) == len(run["losses"])
        assert all(0.0 <= accuracy <= 1.0 for accuracy in run["accuracies"])
    for name in ("LoRA", "GLoRA"):
        assert methods[name]["accuracy_mean"] > CHANCE + 0.2, name
        assert methods[name]["runs"][0]["losses"][-1] < methods[name]["runs"][0]["losses"][0]


def test_lora_and_glora_train_a_like_number_of_parameters(quick: Finished) -> None:
    probe, lora, glora = (quick.results["methods"][name]["trainable_parameters"] for name in METHODS)
    assert probe == 32 * 5 + 5
    assert lora == probe + 3 * 4 * (4 * (32 + 32) + 2 * (32 + 128))  # blocks, rank, linears
    assert abs(glora - lora) < 0.1 * lora


def test_merging_and_reloading(quick: Finished) -> None:
    checks = quick.results["checks"]
    assert 0.0 < checks["merge_largest_logit_change"] < 1e-4 * checks["largest_logit"]
    assert checks["unmerge_restores_base"] is True
    assert checks["reload_logits_equal"] is True
    assert checks["adapter_kib"] == pytest.approx((quick.out / "glora.safetensors").stat().st_size / 1024)


def test_output_has_the_table_and_the_progress_bar(quick: Finished) -> None:
    for heading in ("accuracy", "trainable", "seconds", "peak memory", *METHODS):
        assert heading in quick.process.stdout
    assert "pretraining" in quick.process.stderr
    assert "100%" in quick.process.stderr


def test_help_shows_arguments_and_defaults(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(script, monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for text in (
        "--model",
        "--rank",
        "--supports",
        "--device",
        "--out",
        "vector,lora,none,none,vector",
        "default: 4",
    ):
        assert text in printed


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--model", "huge"),
        ("--rank", "0"),
        ("--supports", "vector,lora"),
        ("--supports", "vector,dense,none,none,none"),
        NO_CARD,
    ],
)
def test_a_bad_argument_is_named(
    argument: str,
    value: str,
    tmp_path: Path,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert exit_code(script, monkeypatch, "--quick", "--out", str(out), argument, value) == 2
    assert f"argument {argument}:" in capsys.readouterr().err
    assert not out.exists()


def test_a_bad_argument_ends_the_process_with_code_2() -> None:
    process = start(SCRIPT, "--supports", "vector,dense,none,none,none")
    assert process.returncode == 2
    assert "argument --supports: B must be one of" in process.stderr
    assert "Traceback" not in process.stderr
