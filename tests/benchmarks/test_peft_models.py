"""PEFT's models before and after `accelerate`: models, check, memory, rounds, a card's path, text and files."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    assemble,
    battery,
    devices,
    peft_models,
    peft_models_build,
    peft_models_text,
    plots,
    readme,
    report,
    schema,
    sections,
    stage,
    surroundings,
)
from benchmarks.battery import FROZEN, LORA, LORA_LORA, VECTORS
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.gpu import Cuda
from benchmarks.peft_models_text import DROPPED, HIRA
from benchmarks.store import Store

pytest.importorskip("peft")
pytest.importorskip("transformers")

TINY = peft_models_build.SIZES["tiny"]
RATES = Ceilings(0.1, 10.0)
PAIRS = [(case, impl) for case in peft_models.CASES for impl in ("peft", "ours")]


@pytest.fixture(scope="module")
def section() -> dict[str, Any]:
    """What a CPU measures, on a model of hardly any size."""
    return peft_models.measure(rounds=3, sizes=TINY)


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return peft_models_build.make_base(TINY, torch.device("cpu"))


def tokens() -> torch.Tensor:
    return torch.randint(TINY.vocab, (TINY.batch, TINY.length), generator=torch.Generator().manual_seed(1))


def by_key(section: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(peft_models_text.case_of(line["row"]), line["row"]["impl"]): line for line in section["models"]}


def test_every_model_gets_a_row_of_the_schema(section: dict[str, Any]) -> None:
    found = by_key(section)
    assert list(found) == [(FROZEN, "eager"), *PAIRS]
    assert section["left_out"] == {}
    assert section["rounds"] == 3
    for (case, impl), line in found.items():
        row, detail = line["row"], line["detail"]
        schema.check_model(row)
        assert peft_models_text.is_step(row)
        assert row["tokens_per_s"] == pytest.approx(TINY.tokens / row["median_ms"] * 1e3)
        assert row["peak_bytes"] > detail["held_bytes"] + detail["saved_bytes"]
        assert ("faster" in detail) == (impl == "ours")
        assert (0 < detail["max_rel_err"] < 1e-5) == (case != FROZEN)
    assert found[FROZEN, "eager"]["detail"]["over_frozen"] == 1.0
    assert found[LORA, "ours"]["detail"]["target"] == 1.0
    assert found[VECTORS, "ours"]["detail"]["target"] == 1.8
    assert found[HIRA, "ours"]["detail"]["target"] is None


def test_no_dense_weight_is_kept(section: dict[str, Any]) -> None:
    """PEFT's GLoRA and HiRA keep an effective weight of every layer; after accelerate none is left."""
    found = by_key(section)
    hidden, wide = TINY.hidden, TINY.intermediate
    weights = 4 * TINY.layers * (4 * hidden * hidden + 3 * hidden * wide)
    for case in peft_models.CASES:
        before, after = (found[case, impl]["detail"] for impl in ("peft", "ours"))
        assert after["dense_bytes"] == 0
        assert before["trained"] == after["trained"]
        if case in (LORA, DROPPED):
            assert before["dense_bytes"] == 0
        else:
            assert before["dense_bytes"] >= weights
            inner = 4 * TINY.layers * 7 * TINY.tokens * TINY.rank  # h of every layer
            if case == VECTORS:  # y of every layer, for dA: q, k, v and o, gate and up, down
                inner += 4 * TINY.layers * TINY.tokens * (5 * hidden + 2 * wide)
            assert after["saved_bytes"] <= before["saved_bytes"] - before["dense_bytes"] + inner


def test_before_and_after_share_the_frozen_weights_only(base: torch.nn.Module) -> None:
    plain, fast = peft_models._pair(base, LORA, TINY, tokens())
    weights = {value.data_ptr() for value in base.parameters()}
    for one in (plain, fast):
        named = dict(one.model.named_parameters())
        assert {value.data_ptr() for name, value in named.items() if not value.requires_grad} == weights
    assert list(plain.params) == list(fast.params)
    for name, value in plain.params.items():
        assert torch.equal(value, fast.params[name])
        assert value.data_ptr() != fast.params[name].data_ptr()
        assert float(value.detach().abs().min()) < float(value.detach().abs().max())  # nothing starts at zero
    before = {name: value.detach().clone() for name, value in fast.params.items()}
    fast.step()
    assert all(not torch.equal(before[name], value) for name, value in fast.params.items())
    assert all(torch.equal(before[name], value) for name, value in plain.params.items())
    assert all(value.grad is None for value in fast.params.values())


def test_the_gradient_reaches_the_embeddings_in_every_model(base: torch.nn.Module) -> None:
    frozen = peft_models._pair(base, FROZEN, TINY, tokens())[0]
    assert frozen.optimizer is None
    for one in (frozen, *peft_models._pair(base, VECTORS, TINY, tokens())):
        seen: list[torch.Tensor] = []
        handle = one.model.get_input_embeddings().register_forward_hook(lambda m, x, y, seen=seen: seen.append(y))
        one.step()
        handle.remove()
        assert seen[0].grad is not None
        assert float(seen[0].grad.abs().max()) > 0


def test_a_wrong_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case that is off, one that is not installed: the others keep their rows."""
    accelerated, configured = peft_models.accelerated, peft_models_build._peft_config

    def wrong(model: torch.nn.Module, sizes: Any) -> torch.nn.Module:
        found = accelerated(model, sizes)
        if any("glora_A" in name for name, _ in found.named_parameters()):
            for name, value in found.named_parameters():
                if "layers.0.self_attn.q_proj.glora_A" in name:
                    value.data.add_(1e-3)
        return found

    def missing(library: Any, case: str, rank: int) -> Any:
        if case == HIRA:
            raise AttributeError("module 'peft' has no attribute 'HiraConfig'")
        return configured(library, case, rank)

    monkeypatch.setattr(peft_models, "accelerated", wrong)
    monkeypatch.setattr(peft_models_build, "_peft_config", missing)
    told: list[str] = []
    found = peft_models.measure(rounds=1, sizes=TINY, say=told.append)
    assert {line["row"]["case"] for line in found["models"]} == {FROZEN, LORA}
    assert set(found["left_out"]) == {peft_models_text.LABELS[case] for case in (VECTORS, LORA_LORA, HIRA)}
    assert "is off by" in found["left_out"]["GLoRA, lora"]
    assert "HiraConfig" in found["left_out"]["HiRA"]
    assert len(told) == 3
    assert "left out: HiRA" in peft_models.show(found)


def test_layers_that_stay_with_peft_are_refused(base: torch.nn.Module) -> None:
    model = peft_models_build.peft_model(base, LORA, TINY)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.forward = lambda x: x  # a forward of its own: accelerate leaves it alone
    with pytest.raises(AssertionError, match="14 layers should run on our operators"):
        peft_models_build.accelerated(model, TINY)


def test_shapes_that_could_not_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch·length is 32.*hidden \(32\)"):
        peft_models_build.make_base(replace(TINY, batch=4), torch.device("cpu"))


def test_rounds_rotate_and_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    order: list[str] = []

    def call(name: str, seconds: float) -> Any:
        def take() -> None:
            order.append(name)
            clock[0] += seconds

        return take

    monkeypatch.setattr(peft_models, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    calls = {"a": call("a", 1.0), "b": call("b", 2.0)}
    times = peft_models.interleaved(calls, Device(), 9, end=0.0)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}  # the least there may be
    assert order == ["a", "b", "b", "a", "a", "b"]
    times = peft_models.interleaved(calls, Device(), 9, end=clock[0] + 13.0)
    assert len(times["a"]) == 4
    assert len(peft_models.interleaved(calls, Device(), 5)["b"]) == 5


class Event:
    """torch.cuda.Event over the steps that were taken."""

    taken = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.taken

    def synchronize(self) -> None:
        Event.taken += 1

    def elapsed_time(self, end: Event) -> float:
        return 8.0


class Card(Cuda):
    """The card's own methods, over tensors of a CPU."""

    def __init__(self) -> None:
        self.cache_bytes = 1 << 20

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def name(self) -> str:
        return "NVIDIA H100 80GB HBM3"

    def healthy(self) -> bool:
        return True


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    for name, fake in {
        "Event": Event,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 5000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Card()


def test_the_path_of_a_card(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, timed by events and the allocator's peak; its rows stand in the result's models and in the README."""
    half = replace(TINY, dtype="bf16")
    monkeypatch.setitem(peft_models.SIZES, "cuda", half)
    monkeypatch.setattr(surroundings, "header", lambda device, scale: {
        "device": device.name(), "driver": None, "torch": "2", "triton": "3", "commit": "c", "source": "s",
        "date": "2026-11-22T05:42:28+00:00", "scale": scale, "packages": {},
    })  # fmt: skip
    store = Store(tmp_path / "h100.stage.jsonl", surroundings.header(card, "cuda"))
    store.add("note", name="ceilings", value={"tflops": 800.0, "gbps": 3000.0})
    one = next(one for one in battery.gpu_stages() if one.name == "peft")
    assert stage.run(one, "cuda", card, store, 1.0, 2, print) == stage.DONE
    assert stage.complete(one, store, "cuda")
    found = store.note("peft")
    assert set(by_key(found)) == {(FROZEN, "eager"), *PAIRS}
    line = by_key(found)[LORA, "ours"]
    assert line["row"]["median_ms"] == pytest.approx(8.0)
    assert line["row"]["peak_bytes"] == line["detail"]["held_bytes"] + 4000
    assert line["detail"]["faster"] == 1.0
    result = assemble.result(store)
    assert result["models"] == [line["row"] for line in found["models"]]
    assert "## PEFT before and after accelerate" in "\n".join(assemble.battery_lines(store))
    (tmp_path / "h100.json").write_text(json.dumps(result))
    (tmp_path / "h100_detail.json").write_text(json.dumps(assemble.detail(store)))
    (tmp_path / "cpu.json").write_text(json.dumps({"sections": {}}))
    assert "NVIDIA H100" in readme.peft_text(tmp_path)
    assert "bf16" in readme.peft_text(tmp_path)
    assert "Decoder layers" not in readme.gpu_text(tmp_path)
    if importlib.util.find_spec("matplotlib"):
        made = report.Report(card, "cuda", tmp_path)
        monkeypatch.setattr(made, "store", lambda: store)
        monkeypatch.setattr(plots, "draw_all", lambda *given: {})
        assert list(made.pictures("h100")) == ["h100_peft.png"]


def test_a_stage_that_fails_costs_no_other(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peft_models, "measure", fails)
    found = peft_models.measure_noted("tiny", card, RATES, 2, lambda text: None)
    assert found == {"error": "OutOfMemoryError: CUDA out of memory"}
    assert peft_models.show(found) == "not measured: OutOfMemoryError: CUDA out of memory"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["peft_models", *arguments])
    peft_models.main()


def test_tables_picture_and_files(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps({"sections": {}}))
    (tmp_path / "cpu.md").write_text("# Measured on a CPU\n\n## Every layer\n\ntable\n")
    assert readme.peft_text(tmp_path).startswith("Not measured yet")
    given: list[Any] = []
    monkeypatch.setattr(peft_models, "measure", lambda *values: given.append(values) or section)
    command(monkeypatch, "--device", "cpu", "--rounds", "2", "--minutes", "3", "--out", str(tmp_path))
    assert "GLoRA, vectors" in capsys.readouterr().out
    assert given[0][:2] == (2, peft_models.SIZES["cpu"])
    assert given[0][3] == 3.0
    text = (tmp_path / "cpu.md").read_text()
    assert text.index(f"## {sections.SECTIONS['peft'][0]}") < text.index("## Every layer")
    assert json.loads((tmp_path / "cpu.json").read_text())["sections"]["peft"] == section
    shown = readme.peft_text(tmp_path)
    assert "| HiRA" in shown
    assert "≥ 1.8" in shown
    assert all(len(line) <= readme.WIDTH for line in shown.splitlines() if not line.startswith(("|", "!")))
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "cpu_peft.png").stat().st_size > 1000
        assert "cpu_peft.png" in shown


def test_a_new_folder_gets_what_was_measured(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "folder"
    (tmp_path / "file").touch()

    def measure(*values: Any) -> dict[str, Any]:
        assert folder.is_dir(), "tried before anything is measured"
        return section

    monkeypatch.setattr(peft_models, "measure", measure)
    command(monkeypatch, "--device", "cpu", "--out", str(folder))
    assert json.loads((folder / "peft.json").read_text()) == section
    assert "GLoRA, vectors" in (folder / "peft.md").read_text()
    for arguments in (["--out", str(tmp_path / "file")], ["--json", str(tmp_path)]):
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, "--device", "cpu", *arguments)


def test_another_size_is_written_nowhere(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(peft_models, "measure", lambda *values: given.append(values) or section)
    command(monkeypatch, "--device", "cpu", "--hidden", "128", "--layers", "3", "--out", str(tmp_path))
    assert given[0][1] == replace(peft_models.SIZES["cpu"], hidden=128, layers=3)
    assert "written nowhere" in capsys.readouterr().out
    command(monkeypatch, "--device", "cpu", "--json", str(tmp_path / "figures.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    monkeypatch.setattr(peft_models, "measure", lambda *values: section | {"models": []})
    with pytest.raises(SystemExit, match="1"):  # nothing is written over figures that are there
        command(monkeypatch, "--device", "cpu", "--out", str(tmp_path))


def test_a_card_runs_its_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(devices, "get", lambda kind: Card())
    monkeypatch.setattr(report, "main", lambda: seen.append(sys.argv[1:]))
    command(monkeypatch, "--out", str(tmp_path), "--rounds", "5", "--minutes", "9")
    assert seen[0][-6:] == ["--stages", "peft", "--rounds", "5", "--minutes", "9.0"]
