"""The ShareLoRA study: its text, what it writes and prints, its own checks, and how it answers bad arguments."""

from __future__ import annotations

import copy
import importlib.util
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from example_scripts import EXAMPLES, NO_CARD, Finished, exit_code, finished, imported, needs
from torch import Tensor, nn

import glora_kernels as gk

needs("transformers", "matplotlib", "tqdm")

SCRIPT = EXAMPLES / "sharelora_study.py"
METHODS = ["LoRA", "ShareA", "ShareB", "ShareAB", "Share-qkv"]
WIDTH, HIDDEN, DEPTH, RANK = 96, 264, 4, 8
# The inputs (size of B_down) and outputs (size of B_up) of q, k, v, o, gate, up, down.
SHAPES = [(WIDTH, WIDTH)] * 4 + [(WIDTH, HIDDEN)] * 2 + [(HIDDEN, WIDTH)]


class Bigrams(nn.Module):
    """A model that looks at one token, and remembers what it was shown in training."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(size, size)
        nn.init.zeros_(self.table.weight)
        self.shown: list[Tensor] = []

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        if self.training:
            self.shown.append(input_ids)
        return SimpleNamespace(logits=self.table(input_ids))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    yield from imported(SCRIPT)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(SCRIPT, tmp_path_factory.mktemp("sharelora") / "results", "--quick")


def test_files_are_written_and_named(quick: Finished) -> None:
    adapters = [f"{name.lower()}.safetensors" for name in METHODS]
    for name in ("comparison.png", "spectra.png", "results.json", *adapters):
        assert (quick.out / name).stat().st_size > 1000, name
        assert str(quick.out / name) in quick.process.stdout
    for name in ("comparison.png", "spectra.png"):
        assert (quick.out / name).read_bytes().startswith(b"\x89PNG")


def test_costs_are_those_of_the_formulas(quick: Finished) -> None:
    downs, ups = (RANK * sum(sizes) for sizes in zip(*SHAPES, strict=True))
    shared_qkv = (DEPTH - 1) * 3 * RANK * WIDTH
    expected = {  # parameters, tensors
        "LoRA": (DEPTH * (downs + ups), 2 * 7 * DEPTH),
        "ShareA": (downs + DEPTH * ups, 7 + 7 * DEPTH),
        "ShareB": (DEPTH * downs + ups, 7 + 7 * DEPTH),
        "ShareAB": (downs + ups, 7 + 7),
        "Share-qkv": (DEPTH * (downs + ups) - shared_qkv, 2 * 7 * DEPTH - (DEPTH - 1) * 3),
    }
    methods = quick.results["methods"]
    assert list(methods) == METHODS
    for name, (parameters, tensors) in expected.items():
        row = methods[name]
        assert row["trainable_parameters"] == parameters, name
        assert row["optimizer_bytes"] == 2 * 4 * parameters + 4 * tensors, name  # two moments, and a step count each
        assert row["adapter_bytes"] == (quick.out / f"{name.lower()}.safetensors").stat().st_size
        assert 0 < row["adapter_bytes"] - 4 * parameters < 20_000, name  # each shared factor is stored once


def test_results_are_sane(quick: Finished) -> None:
    before = quick.results["loss_before"]
    assert before < math.log(1024)
    for name, row in quick.results["methods"].items():
        (run,) = row["runs"]
        assert len(run["steps"]) == len(run["held_out"]) == len(run["training"])
        assert run["steps"][-1] == quick.results["settings"]["steps"]
        assert run["held_out"][-1] == row["loss_mean"] < before, name
        assert row["largest_fresh_change"] == 0.0
        assert row["seconds_per_run"] > 0.0
        assert len(row["singular_values_needed_by_layer"]) == 7 * DEPTH
        needed = row["singular_values_needed_by_layer"]
        assert 1 <= min(needed) <= row["singular_values_needed_median"] <= max(needed) <= RANK
        assert row["singular_values_needed_mean"] == pytest.approx(sum(needed) / len(needed))
    assert list(quick.results["spectra"]) == ["LoRA", "ShareA"]
    for spectrum in quick.results["spectra"].values():
        values = torch.tensor(spectrum)
        assert values.shape == (7 * DEPTH, RANK)
        assert torch.equal(values, values.sort(1, descending=True).values)
        assert (values[:, 0] > 0).all()


def test_output_has_the_table_and_the_progress_bar(quick: Finished) -> None:
    headings = ("loss before", "loss after", "trainable", "optimizer, B", "adapter file, B", "seconds/run", *METHODS)
    for heading in headings:
        assert heading in quick.process.stdout
    assert "pretraining" in quick.process.stderr
    assert "100%" in quick.process.stderr


def test_a_saved_shared_adapter_has_the_measured_spectrum(quick: Finished, script: ModuleType) -> None:
    torch.manual_seed(0)
    model = gk.load_adapter(script.build_model(WIDTH, DEPTH), quick.out / "sharea.safetensors")
    layers = [module for module in model.modules() if isinstance(module, gk.GLoRALinear)]
    assert len({id(layer.B_down) for layer in layers}) == 7
    expected = []
    for layer in layers:
        update = 2.0 * layer.B_up.detach().double() @ layer.B_down.detach().double()
        expected.append(torch.linalg.eigvalsh(update.T @ update).clamp_min(0).sqrt().flip(0)[:RANK])
    measured = torch.tensor(quick.results["spectra"]["ShareA"], dtype=torch.float64)
    # The squares carry the rounding of float64, so the values carry its root.
    bound = math.sqrt(HIDDEN * torch.finfo(torch.float64).eps)
    assert ((measured - torch.stack(expected)).abs().amax(1) <= bound * measured[:, 0]).all()


def test_values_needed(script: ModuleType) -> None:
    spectrum = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])  # 9/10, then 4 and 5 of 6, then 1 of 3
    assert script.values_needed(spectrum.double()).tolist() == [1, 3, 3]


def test_text_and_vocabulary(script: ModuleType) -> None:
    text = importlib.import_module("docstring_text")
    texts = text.read_docstrings(text.NUMBERS)
    assert len(set(texts)) == len(texts) > 300
    assert "Return the sample arithmetic mean of data." in {entry.splitlines()[0] for entry in texts}
    vocabulary = text.Vocabulary(texts, 200)
    assert sorted(vocabulary.ids.values()) == list(range(1, 200))
    pieces = {number: piece for piece, number in vocabulary.ids.items()} | {text.END: "\0"}
    sample = [entry for entry in texts if entry.isascii()][:20]
    decoded = "".join(pieces[token] for token in vocabulary.encode(sample).tolist())
    assert decoded == "".join(entry + "\0" for entry in sample)
    assert vocabulary.encode(["é"]).tolist() == vocabulary.encode(["?"]).tolist()
    parts = text.Corpus.divide([f"{number}" for number in range(20)], vocabulary)
    tokens = torch.cat([parts.training, parts.validation, parts.test])
    assert torch.equal(tokens, vocabulary.encode([f"{number}" for number in range(20)]))
    assert [int((part == text.END).sum()) for part in (parts.training, parts.validation, parts.test)] == [16, 2, 2]


def test_a_missing_source_file_is_named(script: ModuleType) -> None:
    text = importlib.import_module("docstring_text")
    with pytest.raises(FileNotFoundError, match="no_such_module has no source file"):
        text.read_docstrings("bisect no_such_module")


def test_losses_of_a_model_that_knows_nothing(script: ModuleType) -> None:
    text = importlib.import_module("docstring_text")
    tokens = torch.arange(2 * script.WINDOW + 40) % 16
    # Every factor is exact or one rounding of float32 away.
    assert script.held_out_loss(Bigrams(16), tokens) == pytest.approx(math.log(16), rel=1e-6)
    assert text.entropy(torch.arange(64) % 16) == pytest.approx(math.log(16), rel=1e-14)


def test_a_seed_decides_the_windows_whatever_the_method(script: ModuleType) -> None:
    tokens = torch.arange(1000) % 16

    def windows(seed: int, learning_rate: float) -> Tensor:
        model = Bigrams(16)
        script.train(model, tokens, tokens, steps=3, batch=2, learning_rate=learning_rate, seed=seed)
        return torch.cat(model.shown)

    assert torch.equal(windows(0, 0.1), windows(0, 0.01))
    assert not torch.equal(windows(0, 0.1), windows(1, 0.1))


def test_the_study_notices_a_changed_base_and_a_wrong_file(script: ModuleType, tmp_path: Path) -> None:
    checks = importlib.import_module("text_study")
    torch.manual_seed(0)
    base = script.build_model(WIDTH, 1).requires_grad_(False)
    tokens = torch.randint(base.config.vocab_size, (9 * script.WINDOW,))
    study = script.Study(base, script.Corpus(tokens, tokens, tokens), Namespace(rank=2, steps=1))
    model = study.prepare("ShareA", 0)
    checks.check_frozen("ShareA", model, base)
    assert study.largest_change(model) == 0.0
    path = tmp_path / "adapter.safetensors"
    gk.save_adapter(model, path)
    loss = script.held_out_loss(model, tokens)
    checks.check_reload("ShareA", copy.deepcopy(base), path, tokens, loss)
    with pytest.raises(RuntimeError, match=r"ShareA: the adapter in .* gives the loss"):
        checks.check_reload("ShareA", copy.deepcopy(base), path, tokens, math.nextafter(loss, math.inf))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"ShareA: training changed the frozen model\.layers\.0\.mlp\.up_proj"):
        checks.check_frozen("ShareA", model, base)


def test_help_shows_arguments_and_defaults(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(script, monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for text in ("--rank", "--seeds", "--steps", "--device", "--out", "--quick", "--sweep", "default: 8"):
        assert text in printed


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--rank", "0"),
        ("--rank", "97"),
        ("--pretraining-steps", "0"),
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
