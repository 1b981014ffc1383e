"""The 4-bit fine-tuning example: what it writes and prints, its memory and its checks, and its answers to bad input."""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_scripts import EXAMPLES, NO_CARD, Finished, exit_code, finished, imported, needs

import glora_kernels as gk

needs("transformers", "matplotlib", "tqdm")

SCRIPT = EXAMPLES / "finetune_qlora_text.py"
METHODS = ["QLoRA", "QShareA", "QGLoRA"]
WIDTH, HIDDEN, DEPTH, RANK = 128, 384, 2, 8
# The inputs and outputs of q, k, v, o, gate, up, down.
SHAPES = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN)] * 2 + [(HIDDEN, WIDTH)]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield from imported(SCRIPT)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(SCRIPT, tmp_path_factory.mktemp("qlora") / "results", "--smoke")


def test_files_are_written_and_named(smoke: Finished) -> None:
    for name in ("four_bit.png", "results.json", "qglora.safetensors"):
        assert (smoke.out / name).stat().st_size > 1000, name
        assert str(smoke.out / name) in smoke.process.stdout
    assert (smoke.out / "four_bit.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_of_the_base_are_those_of_the_format(smoke: Finished) -> None:
    dense, packed = smoke.results["bases"]["dense"], smoke.results["bases"]["nf4"]
    numbers = [inputs * outputs for inputs, outputs in SHAPES] * DEPTH
    assert dense["linear_layers"] == packed["linear_layers"] == len(numbers)
    assert dense["linear_weights"] == packed["linear_weights"] == sum(numbers)
    assert dense["linear_bytes"] == 4 * sum(numbers)
    # Codes, an 8-bit scale a block of 64, a 32-bit one for 256 of those, their code (256 numbers) and offset.
    layers = [n // 2 + n // 64 + 4 * math.ceil(n / 64 / 256) + 4 * 256 + 4 for n in numbers]
    assert packed["linear_bytes"] == sum(layers)
    assert packed["bits_per_weight"] == 8 * sum(layers) / sum(numbers)
    vocabulary, norms = 1024, 2 * DEPTH + 1
    assert dense["other_bytes"] == packed["other_bytes"] == 4 * WIDTH * (2 * vocabulary + norms)


def test_trainable_parameters_are_those_of_the_formulas(smoke: Finished) -> None:
    inputs, outputs = (sum(sizes) for sizes in zip(*SHAPES, strict=True))
    lora = DEPTH * RANK * (inputs + outputs)
    expected = {
        "QLoRA": lora,
        "QShareA": lora - (DEPTH - 1) * RANK * inputs,
        "QGLoRA": lora + DEPTH * (inputs + 2 * outputs),  # C; A and E
    }
    assert {name: row["trainable_parameters"] for name, row in smoke.results["methods"].items()} == expected


def test_results_are_sane(smoke: Finished) -> None:
    bases, methods = smoke.results["bases"], smoke.results["methods"]
    assert bases["dense"]["loss"] != bases["nf4"]["loss"]
    assert list(methods) == METHODS
    for name, row in methods.items():
        for base in ("dense", "nf4"):
            (run,) = row[base]["runs"]
            assert len(run["steps"]) == len(run["held_out"]) == len(run["training"])
            assert run["steps"][-1] == smoke.results["settings"]["steps"]
            assert run["held_out"][-1] == row[base]["loss_mean"] < bases[base]["loss"], name
            assert row[base]["seconds_per_step"] > 0.0
        difference = row["nf4"]["loss_mean"] - row["dense"]["loss_mean"]
        assert row["differences"] == [difference]
        assert row["difference_mean"] == difference
    assert smoke.results["reloaded_loss"] == methods["QGLoRA"]["nf4"]["loss_mean"]


def test_the_packed_base_is_what_the_peak_is_smaller_by(smoke: Finished) -> None:
    bases = smoke.results["bases"]
    saved = bases["dense"]["linear_bytes"] - bases["nf4"]["linear_bytes"]
    workspace = 4 * WIDTH * HIDDEN  # the largest weight, made dense
    for name, row in smoke.results["methods"].items():
        fewer = row["dense"]["peak_memory_bytes"] - row["nf4"]["peak_memory_bytes"]
        # NF4 holds the workspace and at most the scales of the one weight that it makes dense; where bitsandbytes
        # decodes a weight at once, into memory that is given back, the peak has neither.
        assert saved - 1.25 * workspace <= fewer <= saved, name


def test_output_has_the_table_and_the_progress_bar(smoke: Finished) -> None:
    printed = smoke.process.stdout
    rows = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    for name in METHODS:
        row = smoke.results["methods"][name]
        for text in (
            f" {row['dense']['loss_mean']:.4f} ",
            f" {row['nf4']['loss_mean']:.4f} ",
            f" {row['difference_mean']:+.4f} ",
            f"{row['trainable_parameters']:,}",
        ):
            assert text in rows[name], name
    bases = smoke.results["bases"]
    for text in (
        "loss, NF4",
        "NF4 − dense",
        "peak memory",
        "ms/step",
        f"{bases['nf4']['linear_bytes']:,} in NF4",
        "loaded into a base quantized anew, gives its loss exactly",
    ):
        assert text in printed
    assert "pretraining" in smoke.process.stderr
    assert "100%" in smoke.process.stderr


def test_the_saved_adapter_loads_into_a_packed_and_into_a_dense_model(smoke: Finished, script: ModuleType) -> None:
    for prepare in (script.quantized, lambda model: model):
        model = prepare(script.build_model(WIDTH, DEPTH, HIDDEN))
        gk.load_adapter(model, smoke.out / "qglora.safetensors")
        layers = [layer for layer in model.modules() if isinstance(layer, gk.GLoRALinear)]
        assert len(layers) == len(SHAPES) * DEPTH
        supports = {"A", "B_up", "B_down", "C", "E"}
        assert all(set(layer.adapter()) == supports for layer in layers)
        assert all(layer.B_up.abs().max() > 0 for layer in layers)


def test_a_seed_gives_both_bases_the_same_adapter(script: ModuleType) -> None:
    torch.manual_seed(0)
    dense = script.build_model(WIDTH, 1, HIDDEN).requires_grad_(False)
    tokens = torch.arange(4 * script.WINDOW) % 16
    tuning = script.FineTuning(dense, script.Corpus(tokens, tokens, tokens), Namespace(rank=2))
    for name in METHODS:
        pair = [tuning.prepare(name, base, seed=3) for base in ("dense", "nf4")]
        adapters = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in pair]
        assert adapters[0].keys() == adapters[1].keys()
        assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
        with torch.no_grad():
            change = pair[1](tokens[None, :64]).logits - tuning.bases["nf4"](tokens[None, :64]).logits
        assert not change.any()


def test_peak_memory_counts_what_lives_at_once(script: ModuleType) -> None:
    def function() -> None:
        kept = torch.empty(1000)
        for _ in range(3):
            kept = kept.clone()  # two of them at a time

    assert script.peak_of(function, torch.device("cpu")) == 2 * 4 * 1000


def test_a_changed_code_of_the_base_is_noticed(script: ModuleType) -> None:
    checks = importlib.import_module("text_study")
    torch.manual_seed(0)
    base = script.quantized(script.build_model(WIDTH, 1, HIDDEN))
    model = gk.inject(script.quantized(script.build_model(WIDTH, 1, HIDDEN)), gk.GLoRAConfig.lora(rank=2))
    with pytest.raises(RuntimeError, match=r"QLoRA: training changed the frozen model\.embed_tokens"):
        checks.check_frozen("QLoRA", model, base)
    model.load_state_dict(base.state_dict(), strict=False)
    checks.check_frozen("QLoRA", model, base)
    model.model.layers[0].mlp.up_proj.weight.view(-1)[7] ^= 1
    with pytest.raises(RuntimeError, match=r"training changed the frozen model\.layers\.0\.mlp\.up_proj\.weight"):
        checks.check_frozen("QLoRA", model, base)


def test_help_shows_arguments_and_defaults(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(script, monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for text in ("--rank", "--seeds", "--steps", "--device", "--out", "--smoke", "--sweep", "default: 50"):
        assert text in printed


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--rank", "0"),
        ("--rank", "129"),
        ("--steps", "-1"),
        ("--backend", "tpu"),
        ("--out", str(SCRIPT)),
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
    assert exit_code(script, monkeypatch, "--out", str(out), argument, value) == 2
    assert f"argument {argument}:" in capsys.readouterr().err
    assert not out.exists()
