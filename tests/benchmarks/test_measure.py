"""Contestants and the engine on a CPU with tiny shapes: right, wrong, interrupted, resumed, out of time, lost."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made
import pytest
import torch
from made import RATES, STAGES, Quiet

import glora_kernels as gk
from benchmarks import bench_merging, bench_models, bench_quantized, cases, devices, measure, peers, problems, schema
from benchmarks.cases import FULL, GROUP_IMPLS, QFROZEN, QGLORA, QLORA, QVECTORS, VECTOR_LORA, Entry, Group
from benchmarks.problems import Contestant, Problem, Values
from glora_kernels.glora import op as glora
from glora_kernels.quant import codec, dequantize
from glora_kernels.runtime import environment
from glora_kernels.tools import timing

TARGET = STAGES["target"].groups[0]
QKV, GATE_UP = STAGES["groups"].groups
TRAIN, ONE, THREE = STAGES["nf4"].groups
MISSING = set(peers.unavailable())


class Small(Quiet):
    """A device whose cache holds next to nothing."""

    most_layers = 64
    cache_bytes = 5000


def spoilt(monkeypatch: pytest.MonkeyPatch, which: str, add: float = 1e-3) -> None:
    """Contestants by this implementation, or of this case, that are off by a little."""
    build = peers.build

    def wrong(problem: Problem) -> Contestant:
        entry, found = problem.entry, build(problem)
        right = found.forward
        off = lambda x: [y + add for y in right(x)] if entry.widths and not found.joined else right(x) + add  # noqa: E731
        return replace(found, forward=off) if which in (entry.impl, entry.case) and not entry.frozen else found

    monkeypatch.setattr(peers, "build", wrong)


@pytest.mark.parametrize(("stage", "group"), [("groups", QKV), ("groups", GATE_UP), ("nf4", TRAIN), ("nf4", THREE)])
def test_every_contestant_is_right_and_gets_its_rows(tmp_path: Path, stage: str, group: Group) -> None:
    store = made.measured(tmp_path, group, stage)
    left_out = {line["key"] for line in store.of("error")}
    keys = {cases.row_key(*row): row for row in group.rows()}
    assert set(store.settled()) == set(keys)
    refused = {entry.impl for key, (entry, _, _) in keys.items() if key in left_out and entry.case != QVECTORS}
    assert refused <= {*MISSING, *(["eager"] if "bnb" in MISSING else [])}
    for line in store.of("row"):
        schema.check_row(line["row"])
        assert line["row"]["max_rel_err"] < 1e-5
        assert line["detail"]["over_frozen"] > 0
        assert keys[line["key"]][0].reference <= (line["detail"]["over_frozen"] == 1.0)
    saved = {(line["row"]["case"], line["row"]["impl"]): line["row"]["saved_bytes"] for line in store.of("row")}
    if group in (QKV, GATE_UP):
        ours = next(entry for entry in group.entries if entry.impl == "ours")
        members = len(ours.widths)
        h = members * 8 * 4 * 4  # of each member, whoever computes it; grouped_mm keeps where the groups end as well
        assert {saved.get((ours.case, impl), h) for impl in GROUP_IMPLS} == {h, h + members * (4 + 4)}
    if group is TRAIN:
        assert saved[QLORA, "ours"] == 8 * 4 * 4  # h: no weight
        assert "bnb" in MISSING or saved[QLORA, "eager"] == 64 * 64 * 4 + 8 * 4 * 4  # autograd keeps the dense weight
        reasons = [line["reason"] for line in store.of("error") if line["what"].startswith(QVECTORS)]
        assert MISSING & {"bnb", "peft"} or "GLoRA does not support" in reasons[0]


@pytest.mark.parametrize(("group", "impl"), [(QKV, "ours"), (QKV, "concat"), (QKV, "grouped_mm"), (TRAIN, "ours"),
                                             (ONE, "ours"), (ONE, "bnb"), (TARGET, VECTOR_LORA)])  # fmt: skip
def test_a_wrong_contestant_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: Group, impl: str
) -> None:
    if impl in MISSING:
        pytest.skip(f"{impl} is not installed")
    spoilt(monkeypatch, impl)
    store = made.measured(tmp_path, group)
    wrong = [entry for entry in group.entries if impl in (entry.impl, entry.case) and not entry.frozen]
    rows = {line["key"] for line in store.of("row")}
    for entry in wrong:
        keys = {cases.row_key(*row) for row in group.rows() if row[0] == entry}
        assert not keys & rows
        assert all("y is off by" in store.settled()[key]["reason"] or entry.case == QVECTORS for key in keys)
    assert len(rows) >= len(group.passes)  # the others go on


def test_a_wrong_gradient_is_refused() -> None:
    """One member's factor changed in the contestant alone: gradients are compared member by member."""
    values = Values(QKV.entries, Quiet())
    for impl in ("ours", "concat"):
        entry = next(entry for entry in QKV.entries if entry.impl == impl and not entry.frozen)
        problem = values.of(entry)
        contestant = peers.build(problem)
        problems.check(contestant, problem)
        with torch.no_grad():
            next(iter(contestant.params.values()))[-1] += 1e-3
        with pytest.raises(AssertionError, match=f"lora:qkv \\({impl}\\).* is off by"):
            problems.check(contestant, problem)


def test_what_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = peers.build

    def fails(problem: Any) -> Contestant:
        if problem.entry.case == FULL:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nsome")
        return build(problem)

    monkeypatch.setattr(peers, "build", fails)
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    bench = made.bench(tmp_path)
    for group in (TARGET, QKV):
        bench.group(STAGES["target"], group)
    reasons = {line["what"].split(" (")[0]: line["reason"] for line in bench.store.of("error")}
    assert reasons[FULL].startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate some")
    assert "has no torch.nn.functional.grouped_mm" in reasons["lora:qkv"]
    assert bench.note("part", lambda: fails(SimpleNamespace(entry=replace(TARGET.entries[0], case=FULL))))[
        "error"
    ].startswith("OutOf")  # type: ignore[arg-type,return-value]
    assert "OutOfMemoryError" in bench.note("part", dict)["error"]  # settled: it is not tried again


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Bench, "_time", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # what a kill leaves: a group begun and not ended
        made.measured(tmp_path, TARGET)
    monkeypatch.undo()
    assert not made.bench(tmp_path).store.of("row")
    frozen = replace(TARGET, entries=TARGET.entries[:1])
    made.measured(tmp_path, frozen)
    store = made.measured(tmp_path, TARGET)  # a forgotten row is timed beside its frozen layer
    count = len(store.lines)
    keys = [line["key"] for line in store.of("row")]
    assert len(keys) == len(set(keys)) == len(list(TARGET.rows()))
    assert all(line["detail"]["over_frozen"] > 0 for line in store.of("row"))
    assert len(made.measured(tmp_path, TARGET).lines) == count  # nothing was measured twice
    with pytest.raises(measure.OutOfTime):
        made.bench(tmp_path, minutes=-1.0).group(STAGES["by-m"], STAGES["by-m"].groups[0])


@pytest.mark.parametrize(
    ("group", "entry"),
    [(TARGET, next(e for e in TARGET.entries if e.case == FULL)), (QKV, next(e for e in QKV.entries if e.r))],
)
def test_a_forgotten_row_is_timed_again_beside_its_frozen_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: Group, entry: Entry
) -> None:
    made.measured(tmp_path, group)
    before = made.forget(tmp_path, entry.key)
    device, timed = Quiet(), []
    times = device.times
    monkeypatch.setattr(device, "times", lambda calls, *given: timed.append(set(calls)) or times(calls, *given))
    after = made.measured(tmp_path, group, device=device).of("row")
    frozen = {one.key for one in group.entries if one.frozen}
    assert timed == [frozen | {entry.key}] * len(group.passes)  # and nothing else
    assert after[: len(before)] == before  # of the frozen layer the first figures stand
    assert [line["key"] for line in after[len(before) :]] == [cases.row_key(*r) for r in group.rows() if r[0] == entry]
    assert all(line["detail"]["over_frozen"] > 0 for line in after)


def test_what_never_ends_is_left_out(tmp_path: Path) -> None:
    bench = made.bench(tmp_path)
    for _ in range(2):
        assert not bench.left_out("part", ())
        bench.store.add("begin", key="part")
        bench.store.add("begin", key=TARGET.key)
    assert bench.note("part", dict) == {"error": measure.NO_END}
    bench.group(STAGES["target"], TARGET)
    assert {line["reason"] for line in bench.store.of("error")} == {measure.NO_END}
    assert set(bench.store.settled()) == {cases.row_key(*row) for row in TARGET.rows()}


def test_a_lost_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Quiet):
        def healthy(self) -> bool:
            return False

    def lost(problem: Problem) -> Contestant:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(peers, "build", lost)
    bench = made.bench(tmp_path, Dead())
    with pytest.raises(measure.DeviceLost):
        bench.group(STAGES["target"], TARGET)
    (error,) = bench.store.of("error")
    assert "illegal memory access" in error["reason"]


def test_dropout_of_ours_is_checked_under_its_own_mask() -> None:
    entry = Entry("lora", "ours", 16, 24, 16, 2, 0.5, dtype="fp32")
    values = Values([entry], Quiet())
    found = measure.check_entry(entry, values)
    assert found.max_rel_err < 1e-5
    with pytest.raises(AssertionError, match="is off by"):
        problems.check(found.contestant, values.of(entry))  # without the mask it is another function


def test_a_step_of_generation_reads_another_weight_each_time() -> None:
    """More copies than the cache holds, none of them shared, no graph kept."""
    for case in ("frozen", QFROZEN, QLORA):
        entry = next(e for e in ONE.entries if e.case == case and e.impl in ("ours", "eager"))
        values = Values(ONE.entries, Small())
        steps = measure.steps(measure.check_entry(entry, values), values, "fwd")
        stored = 64 * 64 * 4 if case == "frozen" else 64 * 64 // 2 + 64 + 4 + 4 * 256 + 4
        assert len(steps) == max(2, -(-10000 // stored))
        assert not any(step().requires_grad for step in steps)  # type: ignore[attr-defined]
        copies = values.copies(entry)
        bases: list[Any] = [p.weight if p.base is None else p.base.weight for p in copies]
        assert len({base.data_ptr() for base in bases}) == len(bases) == len(steps)


def test_the_compiled_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expression that is compiled is the codec."""
    options: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **given: options.append(given) or function)
    peers.compiled.cache_clear()
    values = Values(TRAIN.entries, Quiet())
    for case in (QLORA, QGLORA):
        entry = Entry(case, "compile", 8, 64, 64, 4, 0.0, dtype="fp32")
        assert measure.check_entry(entry, values).max_rel_err < 1e-5
    peers.compiled.cache_clear()
    assert options == [{"fullgraph": True, "dynamic": False}] * 2
    weight = values.of(entry).base.base_weight()  # type: ignore[union-attr,operator]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(peers.decoded(*peers.codec_tensors(weight, dtype)), dequantize(weight, dtype))


def test_dequantizing(tmp_path: Path) -> None:
    """Each backend is checked; one that cannot be captured loses that mode alone."""

    class Card(Quiet):
        @property
        def timers(self) -> Any:  # type: ignore[override]
            return dict.fromkeys(("eager", "graph"), timing.clock_timer)

        def ready(self, steps: Any, mode: str) -> None:
            if mode == "graph" and "eager" not in steps[0].__qualname__:
                raise RuntimeError("operation not permitted when stream is capturing")

    sizes = bench_quantized.SIZES["tiny"]
    part = bench_quantized.dequantizing(sizes, made.bench(tmp_path, Card()))
    found = {(row["form"], row["backend"], row["mode"]) for row in part["rows"]}
    assert {(form, "eager", mode) for form in bench_quantized.FORMS for mode in ("eager", "graph")} <= found
    if "bnb" not in MISSING:
        assert ("plain", "bnb", "eager") in found
        assert "capturing" in part["left_out"]["dequantizing, plain (bnb), graph"]
    row = part["rows"][0]
    assert row["bytes"] == 64 * 64 // 2 + 64 + 4 + 4 * 256 + 4 + 64 * 64 * 4
    assert row["of_copy"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6 / RATES.gbps)
    (weight, *_), (out, *_) = bench_quantized.copies(64, 64, torch.float32, Quiet())
    adapter = bench_quantized.adapter_of("low-rank", 64, 64, sizes, Quiet())
    right = bench_quantized.step("eager", weight, out, adapter)

    def wrong() -> None:
        right()
        out[3, 5] += 1e-4

    for given, message in ((adapter, "is off by"), ({}, "bit for bit")):
        with pytest.raises(AssertionError, match=message):
            bench_quantized.check(wrong, weight, out, given)


@pytest.mark.skipif(not environment.interpreting(), reason="CPU tensors need the interpreter")
def test_the_kernels_that_are_timed(tmp_path: Path) -> None:
    """On a card this is what runs; here through the interpreter."""
    (weight, *_), (out, *_) = bench_quantized.copies(16, 32, torch.float32, Quiet())
    for form in ("plain", "vectors"):
        adapter = bench_quantized.adapter_of(form, 16, 32, bench_quantized.SIZES["tiny"], Quiet())
        assert bench_quantized.check(bench_quantized.step("triton", weight, out, adapter), weight, out, adapter) < 1e-6
    with gk.backend("triton"):
        dims = bench_models.DIMS["tiny"]
        kernel = bench_merging.merging(dims, 1, made.bench(tmp_path))["kernel"]
    shapes = [tuple(p.shape) for p in bench_models.DecoderLayer(dims).parameters() if p.ndim == 2]
    assert kernel["bytes"] == 4 * sum(2 * n * k + dims.rank * (n + k) for n, k in shapes)
    assert kernel["of_copy"] == pytest.approx(kernel["bytes"] / kernel["median_s"] / 1e9 / RATES.gbps)


def test_one_workspace_however_many_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_native", lambda weight: None)  # whose memory would be its own
    part = bench_quantized.memory(bench_quantized.SIZES["tiny"], made.bench(tmp_path))
    found = {(row["case"], row["impl"], row["layers"]): row for row in part["rows"]}
    for case in (QLORA, QGLORA, cases.QLORA_LORA):
        one, two = found[case, "ours", 1], found[case, "ours", 2]
        assert one["workspace_bytes"] == two["workspace_bytes"] == 64 * 64 * 4
        assert (two["adapter_bytes"], two["base_bytes"]) == (2 * one["adapter_bytes"], 2 * one["base_bytes"])
        assert one["saved_bytes"] < 8 * 64 * 4 < 64 * 64 * 4  # neither the weight nor another x
        assert one["peak_bytes"] > one["saved_bytes"]
    assert found[cases.LORA, "ours", 2]["workspace_bytes"] == 0
    assert found[cases.LORA, "ours", 2]["base_bytes"] == 2 * 64 * 64 * 4
    assert "bnb" in MISSING or found[QLORA, "eager", 2]["saved_bytes"] > 2 * 64 * 64 * 4


def test_merging_is_checked_and_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dims = bench_models.DIMS["tiny"]
    found = bench_merging.merging(dims, 2, made.bench(tmp_path))
    assert (found["layers"], found["linears"], found["kernel"]) == (2, 14, None)
    assert 0 < found["max_rel_err"] < 1e-6
    assert all(found["whole"][f"{name}_s"] > 0 for name in ("merge", "unmerge", "copy"))
    base = bench_models.make_base(dims, 2, torch.device("cpu"))
    model = bench_models.adapt(base, bench_models.Which(cases.LORA, "ours"), dims).model
    layers = bench_merging.adapted(model)

    def wrong() -> None:
        gk.merge(model)
        with torch.no_grad():
            layers[3].weight[0, 0] += 1e-3

    with pytest.raises(AssertionError, match="merged weight 3: the weight is off"):
        bench_merging.check(layers, [layer.weight.clone() for layer in layers], wrong)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24 << 30, 24 << 30))
    card: Any = SimpleNamespace(kind="cuda")
    assert bench_merging.fitting(bench_models.DIMS["cuda"], 32, card) == 16  # a card too small gets fewer


def test_the_peak_of_a_step_is_seen() -> None:
    def step() -> object:
        first = torch.ones(1 << 16)
        second = first + first
        del first
        return second.add_(1.0)

    assert Quiet().peak_bytes(step) == 2 << 18


def test_a_graph_is_tried_alone_and_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up before a capture draws dropout keys where the capture will: nothing is compiled during it."""
    log: list[str] = []
    properties = SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=132, total_memory=1, major=9, minor=0)
    fakes: dict[str, Any] = {"init": lambda: None, "current_device": lambda: 0, "synchronize": lambda: None,
                             "get_device_properties": lambda device: properties}  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "graph_timer", lambda steps, rounds: log.append("capture") or [[1.0]])
    device = devices.Cuda()
    device.ready([lambda: log.append("card" if glora._Seeds.on_device else "host")], "graph")
    assert log == ["host", "card", "capture"]
    assert (device.sets(134 << 20), device.sets(5 << 20), device.sets(1)) == (2, 20, device.most_sets)
    assert device.details()["multiprocessors"] == 132


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_events_of_a_card_give_seconds_a_step(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """A stand-in for torch.cuda whose clock is moved by what runs, in milliseconds as events have them; what is
    captured runs at the replay."""
    now, captured = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Graph:
        def replay(self) -> None:
            now[0] += sum(self.steps)

    @contextlib.contextmanager
    def capture(graph: Any, stream: Any) -> Iterator[None]:
        captured.append(graph)
        graph.steps = []
        yield
        captured.pop()

    def takes(milliseconds: float) -> devices.Step:
        def step() -> None:
            if captured:
                captured[-1].steps.append(milliseconds)
            else:
                now[0] += milliseconds

        return step

    properties, stream = SimpleNamespace(L2_cache_size=0), SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"init": lambda: None, "current_device": lambda: 0, "get_device_properties": lambda device: properties,
             "synchronize": lambda: None, "Stream": lambda: stream, "current_stream": lambda: stream, "Event": Event,
             "stream": lambda given: contextlib.nullcontext(), "CUDAGraph": Graph, "graph": capture}  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    calls = {"one": [takes(250.0)], "three": [takes(500.0), takes(1000.0), takes(1500.0)]}
    times = devices.Cuda().times(calls, mode, 3)
    assert times == {"one": [pytest.approx(0.25)] * 3, "three": [pytest.approx(1.0)] * 3}


def test_short_steps_are_repeated_and_rounds_interleaved() -> None:
    class Device(Quiet):
        region_s = 10.0

    log: list[str] = []
    times = Device().times({"a": [lambda: log.append("a")], "b": [lambda: log.append("b")]}, "eager", 3)
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert "".join(log) == "ab" + "".join(100 * name for name in "baabbaab")  # a try, a warm-up, three rounds


def test_no_card_is_an_error_with_a_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.get("auto").kind == "cpu"
    with pytest.raises(SystemExit, match="2"):
        devices.get("cuda")
    assert "sees no CUDA device" in capsys.readouterr().err


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    values = Values(TRAIN.entries, Quiet())
    entry = Entry(QLORA, "bnb", 8, 64, 64, 4, 0.0, dtype="fp32")
    with pytest.raises(peers.Unavailable, match="not installed"):
        peers.build(values.of(entry))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for impl, case, reason in (("lorafusion", QLORA, "no layer"), ("unsloth", QGLORA, "timed as LoRA")):
        entry = Entry(case, impl, 8, 64, 64, 4, 0.0, dtype="fp32")
        with pytest.raises(peers.Unavailable, match=reason):
            peers.build(values.of(entry))
