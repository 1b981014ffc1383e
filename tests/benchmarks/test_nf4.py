"""Layers over a 4-bit base: contestants, steps of generation, dequantizing, memory, targets, files."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rows
import torch

from benchmarks import (
    assemble,
    battery,
    decode,
    dequantizing,
    devices,
    floor,
    nf4,
    nf4_memory,
    nf4_text,
    peers,
    plots,
    quantized_peers,
    readme,
    report,
    runner,
    schema,
    sections,
    stage,
    surroundings,
    targets,
)
from benchmarks.battery import MLP, QFROZEN, QGLORA, QLORA, QLORA_LORA, QVECTORS, DecodeEntry, Entry
from benchmarks.cases import Contestant, Problem
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.store import Store
from glora_kernels.quant import dequantize
from glora_kernels.runtime import environment

RATES = Ceilings(0.1, 10.0)
TRAIN, ONE, FEW = battery.nf4_groups("tiny")
NO_BNB = not importlib.util.find_spec("bitsandbytes")
NO_PEFT = not importlib.util.find_spec("peft")
needs_bnb = pytest.mark.skipif(NO_BNB, reason="bitsandbytes is not installed")


class Quiet(Device):
    """A CPU whose ceilings are known and whose regions are short."""

    region_s = 0.0

    def ceilings(self) -> Ceilings:
        return RATES


@pytest.fixture(scope="module")
def section() -> dict[str, Any]:
    """What a CPU measures, on layers of hardly any size."""
    patch = pytest.MonkeyPatch()
    patch.setattr(devices, "get", lambda kind: Quiet())
    try:
        return nf4.measure(rounds=2, scale="tiny")
    finally:
        patch.undo()


def new_store(folder: Path) -> Store:
    return Store(folder / "tiny.stage.jsonl", surroundings.header(Quiet(), "tiny"))


def made(section: dict[str, Any], entry: Entry, direction: str) -> dict[str, Any] | None:
    wanted = {"case": entry.case, "impl": entry.impl, "m": entry.m, "pass": direction}
    found = [x for x in section["rows"] if all(x["row"][name] == value for name, value in wanted.items())]
    assert len(found) <= 1
    return found[0] if found else None


def test_every_contestant_is_right_and_gets_its_rows(section: dict[str, Any]) -> None:
    for group in (TRAIN, ONE, FEW):
        for entry, direction, _ in group.row_keys():
            line = made(section, entry, direction)
            missing = entry.case == QVECTORS or (NO_PEFT and entry.impl == "peft") or (NO_BNB and entry.impl != "ours")
            if line is None:
                assert missing
                assert entry.case != "frozen"
                continue
            schema.check_row(line["row"])
            assert line["row"]["max_rel_err"] < 1e-5
            assert line["detail"]["over_frozen"] > 0
            assert nf4_text.is_decode(line) == isinstance(entry, DecodeEntry)
    ours = made(section, Entry(QLORA, "ours", 8, 64, 64), "fwd_bwd")
    assert ours is not None
    assert ours["row"]["saved_bytes"] == 8 * 4 * 4  # h: no weight


@needs_bnb
def test_what_is_left_out_says_why(section: dict[str, Any]) -> None:
    left_out = section["left_out"]
    assert "no code book" in left_out["gemlite"]
    if not NO_PEFT:
        reason = next(why for what, why in left_out.items() if what.startswith(QVECTORS))
        assert "GLoRA does not support" in reason
    eager = made(section, Entry(QLORA, "eager", 8, 64, 64), "fwd_bwd")
    assert eager is not None
    assert eager["row"]["saved_bytes"] == 64 * 64 * 4 + 8 * 4 * 4  # autograd keeps the dense weight


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    values = runner.make_values(TRAIN, Quiet())
    problem = values.of(Entry(QLORA, "bnb", 8, 64, 64, 4, 0.0, dtype="fp32"))  # type: ignore[arg-type,union-attr]
    assert isinstance(problem, Problem)
    with pytest.raises(peers.Unavailable, match="bitsandbytes"):
        quantized_peers.linear4bit(problem)
    for impl, case, reason in (("lorafusion", QLORA, "no layer"), ("unsloth", QGLORA, "timed as LoRA")):
        entry = Entry(case, impl, 8, 64, 64, 4, 0.0, dtype="fp32")
        with pytest.raises(peers.Unavailable, match=reason):
            quantized_peers.build(entry, problem)


@pytest.mark.parametrize("impl", ["ours", "bnb"])
def test_a_wrong_contestant_is_refused(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if impl == "bnb" and NO_BNB:
        pytest.skip("bitsandbytes is not installed")
    entry = next(entry for entry in ONE.entries if entry.case == QLORA and entry.impl == impl)
    values = runner.make_values(ONE, Quiet())
    runner.check_entry(entry, values)
    build = peers.build

    def wrong(entry: Entry, problem: Problem) -> Contestant:
        found = build(entry, problem)
        right = found.forward
        return replace(found, forward=lambda x: right(x) + 1e-4)

    monkeypatch.setattr(decode.peers, "build", wrong)
    with pytest.raises(AssertionError, match="y is off by"):
        runner.check_entry(entry, values)


def test_a_step_of_generation_reads_another_weight_each_time() -> None:
    """More copies than the cache holds, none of them shared, no graph kept, and a time a step."""

    class Card(Quiet):
        most_layers = 64
        cache_bytes = 5000

    for case in ("frozen", QFROZEN, QLORA):
        entry = next(e for e in ONE.entries if e.case == case and e.impl in ("ours", "eager"))
        values = runner.make_values(ONE, Card())
        found = runner.check_entry(entry, values)
        steps = runner.steps(found.contestant, values, "fwd")
        stored = 64 * 64 * 4 if case == "frozen" else 64 * 64 // 2 + 64 + 4 + 4 * 256 + 4
        assert len(steps) == max(2, -(-10000 // stored))
        assert not any(step().requires_grad for step in steps)  # type: ignore[attr-defined]
        problems = values.copies(entry)  # type: ignore[union-attr]
        bases = [p.weight if p.base is None else p.base.weight for p in problems]
        assert len({base.data_ptr() for base in bases}) == len(bases) == len(steps)


def test_ratios_are_of_steps_not_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contestant that goes through more copies than the frozen layer takes longer a run, not a step."""

    class Card(Quiet):
        most_layers = 64
        cache_bytes = 5000

        def interleaved(self, calls: Any, rounds: int) -> dict[str, list[float]]:
            return {key: [float(2 if "frozen|eager" in key and "nf4" not in key else 4)] for key in calls}

    store = new_store(tmp_path)
    runner.run_group(replace(ONE, entries=ONE.entries[:2]), Card(), RATES, store, 1, lambda text: None)
    frozen, ours = store.of("row")
    assert (frozen["detail"]["input_sets"], ours["detail"]["input_sets"]) == (2, 4)
    assert frozen["row"]["median_ms"] == ours["row"]["median_ms"] == 1e3
    assert ours["detail"]["over_frozen"] == 1.0
    assert ours["detail"]["weight_gbps"] == pytest.approx(floor.packed_bytes(64, 64) / 1e9)
    assert frozen["detail"]["weight_of_copy"] == pytest.approx(64 * 64 * 4 / 1e9 / RATES.gbps)


def test_the_expression_that_is_compiled_is_the_codec() -> None:
    values = runner.make_values(TRAIN, Quiet())
    problem = values.of(Entry(QLORA, "compile", 8, 64, 64, 4, 0.0, dtype="fp32"))  # type: ignore[union-attr]
    weight = problem.base.base_weight()  # type: ignore[union-attr]
    for dtype in (torch.float32, torch.bfloat16):
        found = quantized_peers.decoded(*quantized_peers.codec_tensors(weight, dtype))
        assert torch.equal(found, dequantize(weight, dtype))


def test_the_compiled_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    quantized_peers._compiled_function.cache_clear()
    values = runner.make_values(TRAIN, Quiet())
    for case in (QLORA, QGLORA):
        found = runner.check_entry(Entry(case, "compile", 8, 64, 64, 4, 0.0, dtype="fp32"), values)
        assert found.max_rel_err < 1e-5
    assert compiled == [{"fullgraph": True, "dynamic": False}] * 2
    quantized_peers._compiled_function.cache_clear()


def test_dequantizing_is_checked(section: dict[str, Any]) -> None:
    part = section["parts"]["dequantize"]
    found = {(row["form"], row["backend"]) for row in part["rows"]}
    assert {(form, "eager") for form in dequantizing.FORMS} <= found
    assert ("plain", "bnb") in found or NO_BNB
    row = part["rows"][0]
    assert row["of_copy"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6 / RATES.gbps)
    assert row["bytes"] == 64 * 64 // 2 + 64 + 4 + 4 * 256 + 4 + 64 * 64 * 4
    assert {"cuda", "triton"} <= {what.split("(")[1][:-1] for what in part["left_out"]}
    (weight,), (out,) = ([some[0]] for some in dequantizing._copies(64, 64, torch.float32, Quiet()))
    adapter = dequantizing.adapter_of("low-rank", 64, 64, dequantizing.SIZES["tiny"], Quiet())
    right = dequantizing.step("eager", weight, out, adapter)
    dequantizing.check(right, weight, out, adapter)

    def wrong() -> None:
        right()
        out[3, 5] += 1e-4

    with pytest.raises(AssertionError, match="is off by"):
        dequantizing.check(wrong, weight, out, adapter)
    with pytest.raises(AssertionError, match="bit for bit"):
        dequantizing.check(wrong, weight, out, {})


def test_a_backend_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be captured loses that mode alone, and a contestant of the memory its rows."""

    class Card(Quiet):
        modes = ("eager", "graph")

        def prepare(self, steps: Any, mode: str) -> Any:
            if mode == "graph" and "bitsandbytes" in steps[0].__qualname__:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().prepare(steps, mode)

    sizes = replace(dequantizing.SIZES["tiny"], shapes={"16x64": (16, 64)})
    found = dequantizing.measure(sizes, Card(), RATES, 2, lambda text: None)
    modes = {(row["backend"], row["mode"]) for row in found["rows"] if row["form"] == "plain"}
    assert modes >= {("eager", "eager"), ("eager", "graph")}
    if not NO_BNB:
        assert ("bnb", "eager") in modes
        assert ("bnb", "graph") not in modes
        assert "capturing" in found["left_out"]["dequantizing, plain (bnb), graph"]
    monkeypatch.setattr(nf4_memory, "CONTESTANTS", ((QLORA, "ours"), (QVECTORS, "peft")))
    memory = nf4_memory.measure(nf4_memory.SIZES["tiny"], Quiet(), lambda text: None)
    assert {row["impl"] for row in memory["rows"]} == {"ours"}
    assert "memory, nf4-glora:vector,vector,none,none,none (peft)" in memory["left_out"]


@pytest.mark.skipif(not environment.interpreting(), reason="CPU tensors need the interpreter")
def test_dequantizing_by_triton() -> None:
    """On a card this is what runs; here through the interpreter."""
    (weight, *_), (out, *_) = dequantizing._copies(16, 32, torch.float32, Quiet())
    for form in ("plain", "vectors"):
        adapter = dequantizing.adapter_of(form, 16, 32, dequantizing.SIZES["tiny"], Quiet())
        call = dequantizing.step("triton", weight, out, adapter)
        assert dequantizing.check(call, weight, out, adapter) < 1e-6


def test_one_workspace_however_many_layers(section: dict[str, Any]) -> None:
    found = {(r["case"], r["impl"], r["layers"]): r for r in section["parts"]["memory"]["rows"]}
    for case in (QLORA, QGLORA, QLORA_LORA):
        one, two = found[case, "ours", 1], found[case, "ours", 2]
        assert one["workspace_bytes"] == two["workspace_bytes"] == 64 * 64 * 4
        assert two["adapter_bytes"] == 2 * one["adapter_bytes"]
        assert two["base_bytes"] == 2 * one["base_bytes"]
        assert one["saved_bytes"] < 8 * 64 * 4 < 64 * 64 * 4  # neither the weight nor another x
        assert one["peak_bytes"] > one["saved_bytes"]
    assert found[battery.LORA, "ours", 2]["workspace_bytes"] == 0
    assert found[battery.LORA, "ours", 2]["base_bytes"] == 2 * 64 * 64 * 4
    if not NO_BNB:
        assert found[QLORA, "eager", 2]["saved_bytes"] > 2 * 64 * 64 * 4


def test_the_peak_of_a_step_is_seen() -> None:
    def step() -> object:
        first = torch.ones(1 << 16)
        second = first + first
        del first
        return second.add_(1.0)

    assert nf4_memory.peak_bytes(step, Quiet()) == 2 << 18


def few(impl: str, milliseconds: float, m: int = 1) -> list[dict[str, Any]]:
    found = []
    for name in MLP:
        row = rows.row(Entry(QLORA, impl, m, *battery.LLAMA[name], 16, 0.0, name), milliseconds)
        found.append(row | {"pass": "fwd"})
    return found


def test_the_targets_of_a_4_bit_base() -> None:
    empty = targets.nf4_rows([], None, None)
    assert [line["target"] for line in empty if line["target"]] == ["≤ 1.12", "≤ 1.20", "≥ 0.75", "≥ 1.3"] + [
        "≥ 0.90"
    ] * 6
    assert [line["floor"] for line in empty[:4]] == ["1.074", "1.195", "1.14", "1.351"]
    assert not any(line["measured, eager"] + line["measured, CUDA graph"] for line in empty)
    made = rows.seven("frozen", "eager", 8192, 1.0) + rows.seven(QLORA, "ours", 8192, 1.2)
    assert targets.over_frozen(made, QLORA, "ours", 8192, "graph") == pytest.approx(1.2)
    for row in made:
        row |= {"over": 1.1} if row["case"] == QLORA else {}  # of the same rounds: it counts
    made += few("ours", 0.0125) + few("bnb", 0.02)
    parts = {"dequantize": {"rows": [
        {"form": "plain", "backend": "cuda", "mode": "graph", "of_copy": share} for share in (0.95, 0.91)
    ]}}  # fmt: skip
    lines = {line["4-bit base, r = 16"]: line["measured, CUDA graph"] for line in targets.nf4_rows(made, 3000.0, parts)}
    found = [value for value in lines.values() if value]
    assert found == ["1.100", f"{14336 * 4096 / 2 / 0.0125e6 / 3000:.2f}", "1.60", "0.91"]
    assert targets.decode_share(made[:-6], 3000.0, 1, "graph") is None


def test_the_stages_hold_the_targets() -> None:
    stages = {one.name: one for one in battery.gpu_stages()}
    assert set(nf4.STAGES) <= set(stages)
    assert stages["nf4-parts"].once in stage.ONCE
    every = {
        (e.case, e.impl, e.m, e.layer, direction)
        for name in nf4.STAGES
        for group in stages[name].groups
        for e, direction, _ in group.row_keys()
    }
    for layer in battery.LLAMA:
        for m in (8192, 2048):
            for case, impl in ((QLORA, "ours"), (QGLORA, "ours"), (QLORA, "bnb"), ("frozen", "eager")):
                assert {(case, impl, m, layer, direction) for direction in battery.PASSES} <= every
        for m in battery.FEW:
            for impl in ("ours", "bnb", "eager"):
                assert (QLORA, impl, m, layer, "fwd") in every
    others = {entry.impl for group in stages["nf4-others"].groups for entry in group.entries}
    assert {"unsloth", "compile"} <= others


def test_a_stage_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its groups, then its note; what is there is not measured again, and the report has all of it."""
    few = replace(ONE, entries=ONE.entries[:2])
    one = battery.Stage("nf4", "t", (few,), once="nf4")
    calls: list[str] = []
    monkeypatch.setitem(stage.ONCE, "nf4", lambda *given: calls.append(given[0]) or {"error": "none"})
    store = new_store(tmp_path)
    assert stage.run(one, "tiny", Quiet(), store, 0.0, 2, lambda text: None) == stage.OUT_OF_TIME
    assert not stage.complete(one, store, "tiny")
    assert stage.run(one, "tiny", Quiet(), new_store(tmp_path), 1.0, 2, lambda text: None) == stage.DONE
    count = len(new_store(tmp_path).lines)
    store = new_store(tmp_path)
    assert stage.complete(one, store, "tiny")
    assert stage.run(one, "tiny", Quiet(), store, 1.0, 2, lambda text: None) == stage.DONE
    assert len(new_store(tmp_path).lines) == count
    assert calls == ["tiny"]
    result = assemble.result(store)
    schema.check_report(result | {"unavailable": result["unavailable"] | battery.NO_LAYER})
    assert assemble.detail(store)["nf4"] == {"error": "none"}
    text = "\n".join(assemble.battery_lines(store))
    assert "## A 4-bit base" in text
    assert "dequantize: none" in text


def test_a_part_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nf4_memory, "measure", lambda *given: {"rows": []})
    monkeypatch.setattr(dequantizing, "measure", fails)
    found = nf4.measure_parts("tiny", Quiet(), RATES, 2, lambda text: None)
    assert found == {"dequantize": {"error": "OutOfMemoryError: CUDA out of memory"}, "memory": {"rows": []}}


def test_tables_picture_and_files(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"M=8: forward", "M=8: forward + backward"} < set(nf4_text.training_table(section["rows"])[0])
    assert {"M=1", "M=3"} < set(nf4_text.decode_table(section["rows"])[0])
    (tmp_path / "cpu.json").write_text(json.dumps({"sections": {}}))
    (tmp_path / "cpu.md").write_text("# Measured on a CPU\n\n## Every layer\n\ntable\n")
    monkeypatch.setattr(nf4, "measure", lambda rounds: section)
    monkeypatch.setattr(sys, "argv", ["nf4", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path)])
    nf4.main()
    assert "LoRA: here" in capsys.readouterr().out
    text = (tmp_path / "cpu.md").read_text()
    assert text.index(f"## {sections.SECTIONS['nf4'][0]}") < text.index("## Every layer")
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "cpu_nf4.png").stat().st_size > 1000
        titles = plots.draw_all(section["rows"], [], RATES, tmp_path, "tiny", section["parts"])
        assert "tiny_nf4.png" in titles
        assert "tiny_saved.png" not in titles  # of layers on a dense base
    shown = readme._nf4(tmp_path, section)
    assert "LoRA: here" in shown
    assert "workspace" in shown
    assert readme._nf4(tmp_path, None) == ""


def test_the_readme_takes_the_ratio_of_the_same_rounds(tmp_path: Path) -> None:
    entries = [Entry(QLORA, "ours", 8192, n, k, 16, 0.0, name) for name, (n, k) in battery.LLAMA.items()]
    keys = [battery.row_key(entry, "fwd_bwd", "graph") for entry in entries]
    result = rows.report() | {"rows": rows.seven("frozen", "eager", 8192, 1.0) + rows.seven(QLORA, "ours", 8192, 9.0)}
    detail = {"header": {}, "rows": [{"key": key, "over_frozen": 1.111} for key in keys], "nf4": None}
    (tmp_path / "h100.json").write_text(json.dumps(result))
    (tmp_path / "h100_detail.json").write_text(json.dumps(detail))
    text = readme.gpu_text(tmp_path)
    assert "1.111" in text
    assert "9.000" not in text


def test_a_card_runs_its_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Card(Quiet):
        kind = "cuda"

    seen: list[list[str]] = []
    monkeypatch.setattr(devices, "get", lambda kind: Card())
    monkeypatch.setattr(report, "main", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["nf4", "--out", str(tmp_path), "--minutes", "9"])
    nf4.main()
    assert seen[0][-6:] == ["--stages", *nf4.STAGES, "--minutes", "9.0"]
