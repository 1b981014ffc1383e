"""The target table: what a layer should cost on an H100, its floor, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.battery import FEW, FULL, LLAMA, LORA, LORA_LORA, MLP, PASSES, QGLORA, QLORA, VECTOR_LORA, VECTORS
from benchmarks.floor import BYTES, packed_bytes
from benchmarks.floor import seven as least_of_seven
from benchmarks.grouped_text import PASS_NAMES, SETS
from benchmarks.nf4_text import BACKEND_NAMES, FORM_NAMES

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One line: the summed time of the seven linears, forward and backward, over the same seven frozen ("most"), or
    PEFT's sum over ours ("least").

    floor: with the digits of the specification. then: what comes after the target is met.
    """

    label: str
    case: str
    m: int
    p: float
    target: float
    floor: str = ""
    then: float | None = None
    kind: str = "most"


TARGETS = (
    Target("LoRA", LORA, 8192, 0.0, 1.08, "1.033", then=1.06),
    Target("LoRA, p = 0.1", LORA, 8192, 0.1, 1.10, "1.033", then=1.08),
    Target("GLoRA, A = vector, B = lora", VECTOR_LORA, 8192, 0.0, 1.13, "1.07"),
    Target("GLoRA, A = vector, B = lora, C = D = E = vector (bias)", FULL, 8192, 0.0, 1.18, "1.10"),
    Target("GLoRA, A = B = lora", LORA_LORA, 8192, 0.0, 1.62, "1.565"),
    Target("LoRA, M = 2048", LORA, 2048, 0.0, 1.12),
    Target("LoRA, M = 512", LORA, 512, 0.0, 1.25),
    Target("PEFT's time over ours, GLoRA, A = B = vector", VECTORS, 8192, 0.0, 2.7, kind="least"),
    Target("PEFT's time over ours, GLoRA, A = B = lora", LORA_LORA, 8192, 0.0, 2.0, kind="least"),
)
GROUP_TARGET, GROUP_M = 1.05, 8192
"""The most that siblings with LoRA may take over one product with their weights concatenated, and at which M."""
GROUP_FLOORS = {
    ("qkv", "fwd"): "1.012", ("qkv", "fwd_bwd"): "1.039", ("gate_up", "fwd"): "1.005", ("gate_up", "fwd_bwd"): "1.012",
}  # fmt: skip
"""The same ratio by `floor.floor_ms`, at the ceilings of an H100."""
LAUNCH_TARGET = 8
"""The most launches that the seven linears of a decoder layer may take forward."""
MERGE_TARGET = 0.8
"""The least share of a copy's bandwidth that merging a model must reach."""
NF4_TARGETS = (
    Target("QLoRA", QLORA, 8192, 0.0, 1.12, "1.074"),
    Target("QGLoRA, A = C = E = vector, B = lora", QGLORA, 8192, 0.0, 1.20, "1.14"),
)
"""Over the frozen layers in bf16."""
DECODE_TARGET, DECODE_GAIN = 0.75, 1.3
"""At one token, on gate, up and down, low-rank path included: the least share of a copy's bandwidth, and the least by
which it should be faster than bitsandbytes' `gemm_4bit` and the low-rank path beside it."""
DEQUANTIZE_TARGET = 0.9
"""The least share of a copy's bandwidth that dequantizing alone must reach."""
SAVED = "LoRA: saved for backward beyond x and y, over R·M values"
RANK = 16


def seven(
    rows: Iterable[Row],
    case: str,
    impl: str,
    m: int,
    r: int | None,
    p: float | None,
    mode: str,
    direction: str = "fwd_bwd",
) -> float | None:
    """The summed milliseconds of the seven LLaMA-3-8B linears; None unless all seven rows are there."""
    found = _layers(rows, {"case": case, "impl": impl, "m": m, "r": r, "p": p, "mode": mode, "pass": direction})
    return None if found is None else sum(row["median_ms"] for row in found)


def frozen(rows: Iterable[Row], m: int, mode: str, direction: str = "fwd_bwd") -> float | None:
    """The same sum of the seven frozen layers."""
    return seven(rows, "frozen", "eager", m, None, None, mode, direction)


def measured(rows: Sequence[Row], target: Target, mode: str) -> float | None:
    """What was measured of a target in one mode; None where rows are missing."""
    ours = seven(rows, target.case, "ours", target.m, RANK, target.p, mode)
    if target.kind == "most":
        below, above = frozen(rows, target.m, mode), ours
    else:
        below, above = ours, seven(rows, target.case, "peft", target.m, RANK, target.p, mode)
    return None if above is None or below is None else above / below


def over_eager(rows: Sequence[Row], target: Target) -> float | None:
    """Our time over that of eager PyTorch doing the same, both in eager mode; it should never be above 1."""
    ours, eager = (seven(rows, target.case, impl, target.m, RANK, target.p, "eager") for impl in ("ours", "eager"))
    return None if ours is None or eager is None else ours / eager


def saved(rows: Sequence[Row], mode: str) -> float | None:
    """What LoRA keeps for backward beyond x, y and parameters, over the bytes of R·M values in its dtype."""
    wanted = {"case": LORA, "impl": "ours", "m": 8192, "r": RANK, "p": 0.0, "mode": mode, "pass": "fwd_bwd"}
    found = _layers(rows, wanted)
    if found is None or any(row["saved_bytes"] is None for row in found):
        return None
    return sum(row["saved_bytes"] for row in found) / sum(RANK * row["m"] * BYTES[row["dtype"]] for row in found)


def table_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table: label, floor, target, measured under a CUDA graph and in eager mode, the latter also over eager
    PyTorch; empty cells where unmeasured."""
    found = []
    for target in TARGETS:
        sign = "≤" if target.kind == "most" else "≥"
        goal = f"{sign} {target.target:.2f}" + ("" if target.then is None else f", then {target.then:.2f}")
        figures = (measured(rows, target, "graph"), measured(rows, target, "eager"), over_eager(rows, target))
        found.append(_line(target.label, target.floor, goal, *figures))
    found.append(_line(SAVED, "R·M", "", saved(rows, "graph"), saved(rows, "eager"), None))
    return found


def over_one_product(rows: Iterable[Row], siblings: str, direction: str, mode: str) -> float | None:
    """Our grouped time over that of one product with the concatenated weights; None where a row is missing."""
    wanted = {"op": "group", "m": GROUP_M, "mode": mode, "pass": direction}
    found = {
        (row["case"], row["impl"]): row for row in rows if all(row[name] == value for name, value in wanted.items())
    }
    above, below = found.get((f"lora:{siblings}", "ours")), found.get((f"frozen:{siblings}", "concat"))
    return None if above is None or below is None else above["median_ms"] / below["median_ms"]


def group_rows(rows: Sequence[Row], depth: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The table of sets, launches and merging: floor, target and what was measured; empty cells where unmeasured.

    depth: what `grouped.measure_depth` found on the device, or None.
    """
    found = []
    for siblings, shown in SETS.items():
        for direction in PASSES:
            label = f"{shown}, {PASS_NAMES[direction]}: over one product with the concatenated weights"
            figures = [_shown(over_one_product(rows, siblings, direction, mode), ".3f") for mode in ("graph", "eager")]
            found.append(_group_line(label, GROUP_FLOORS[siblings, direction], f"≤ {GROUP_TARGET:.2f}", *figures))
    depth = depth or {}
    ours = depth.get("launches", {}).get("rows", {}).get("ours", {})
    kernel = depth.get("merge", {}).get("kernel") or {}
    layers = depth.get("merge", {}).get("layers", 32)
    count, share = _shown(ours.get("on_card")), _shown(kernel.get("of_copy"), ".2f")
    found.append(_group_line("launches of seven linears, forward", "4", f"≤ {LAUNCH_TARGET}", "", count))
    merging = f"merging {layers} decoder layers, of a copy's bandwidth"
    found.append(_group_line(merging, "1", f"≥ {MERGE_TARGET:.2f}", "", share))
    return found


def over_frozen(rows: Sequence[Row], case: str, impl: str, m: int, mode: str) -> float | None:
    """The seven linears, forward and backward, over the same seven frozen.

    A row that carries its ratio of the same rounds ("over") stands for that times the frozen row: the two may have
    been measured in stages far apart.
    """
    wanted: dict[str, Any] = {"m": m, "mode": mode, "pass": "fwd_bwd"}
    above = _layers(rows, wanted | {"case": case, "impl": impl, "r": RANK, "p": 0.0})
    base = _layers(rows, wanted | {"case": "frozen", "impl": "eager"})
    if above is None or base is None:
        return None
    below = {row["layer"]: row["median_ms"] for row in base}
    times = [row["median_ms"] if row.get("over") is None else row["over"] * below[row["layer"]] for row in above]
    return sum(times) / sum(below.values())


def decode_share(rows: Sequence[Row], gbps: float | None, m: int, mode: str) -> float | None:
    """The bytes of the codes over our time with LoRA, over a copy's bandwidth: the least of gate, up and down."""
    ours = _few(rows, "ours", m, mode)
    if ours is None or gbps is None:
        return None
    return min(packed_bytes(row["n"], row["k"]) / (1e6 * row["median_ms"]) / gbps for row in ours.values())


def decode_gain(rows: Sequence[Row], m: int, mode: str) -> float | None:
    """bitsandbytes' time with LoRA beside it over ours: the least of gate, up and down."""
    ours, theirs = _few(rows, "ours", m, mode), _few(rows, "bnb", m, mode)
    if ours is None or theirs is None:
        return None
    return min(theirs[layer]["median_ms"] / ours[layer]["median_ms"] for layer in MLP)


def dequantize_share(parts: Mapping[str, Any] | None, form: str, backend: str, mode: str) -> float | None:
    """What dequantizing alone reads and writes over the time, over a copy's bandwidth: the least of the shapes."""
    rows = ((parts or {}).get("dequantize") or {}).get("rows", [])
    wanted = {"form": form, "backend": backend, "mode": mode}
    return min((r["of_copy"] for r in rows if all(r[name] == value for name, value in wanted.items())), default=None)


def nf4_rows(rows: Sequence[Row], gbps: float | None, parts: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The table of a 4-bit base: floor, target and what was measured; empty cells where unmeasured.

    Args:
        rows: of the schema; "over" beside them where it is known.
        gbps: the bandwidth of a copy.
        parts: what `nf4.measure_parts` found on the device, or None.
    """
    found = []
    for target in NF4_TARGETS:
        for m in (target.m, 2048):
            label = f"{target.label}: seven linears, forward + backward, over bf16 frozen, M = {m}"
            first = m == target.m
            goal = f"≤ {target.target:.2f}" if first else ""
            floor = target.floor if first else f"{least_of_seven(target.case, m, RANK):.3f}"
            figures = [_shown(over_frozen(rows, target.case, "ours", m, mode), ".3f") for mode in ("graph", "eager")]
            found.append(_nf4_line(label, floor, goal, *figures))
    for m in FEW:
        label, goal = f"LoRA on gate, up, down, M = {m}", f"≥ {DECODE_TARGET:.2f}" if m == 1 else ""
        figures = [_shown(decode_share(rows, gbps, m, mode), ".2f") for mode in ("graph", "eager")]
        found.append(_nf4_line(f"{label}: of a copy's bandwidth", "1", goal, *figures))
        goal = f"≥ {DECODE_GAIN:.1f}" if m == 1 else ""
        figures = [_shown(decode_gain(rows, m, mode), ".2f") for mode in ("graph", "eager")]
        found.append(_nf4_line(f"{label}: bitsandbytes' time over ours", "", goal, *figures))
    for backend in ("cuda", "triton"):
        for form, title in FORM_NAMES.items():
            label = f"dequantizing alone, {title} ({BACKEND_NAMES[backend]}): of a copy's bandwidth"
            figures = [_shown(dequantize_share(parts, form, backend, mode), ".2f") for mode in ("graph", "eager")]
            found.append(_nf4_line(label, "1", f"≥ {DEQUANTIZE_TARGET:.2f}", *figures))
    return found


def _few(rows: Iterable[Row], impl: str, m: int, mode: str) -> dict[str, Row] | None:
    wanted = {"case": QLORA, "impl": impl, "m": m, "r": RANK, "p": 0.0, "mode": mode, "pass": "fwd"}
    found = {row["layer"]: row for row in rows if all(row[name] == value for name, value in wanted.items())}
    return {layer: found[layer] for layer in MLP} if set(MLP) <= set(found) else None


def _nf4_line(label: str, floor: str, goal: str, graph: str, eager: str) -> dict[str, str]:
    line = {"4-bit base, r = 16": label, "floor": floor, "target": goal}
    return line | {"measured, CUDA graph": graph, "measured, eager": eager}


def _group_line(label: str, floor: str, goal: str, graph: str, eager: str) -> dict[str, str]:
    line = {"LoRA, r = 16": label, "floor": floor, "target": goal}
    return line | {"measured, CUDA graph": graph, "measured, eager": eager}


def _shown(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def _line(
    label: str, floor: str, goal: str, graph: float | None, eager: float | None, over: float | None
) -> dict[str, str]:
    line = {"seven linears, forward + backward, over frozen": label, "floor": floor, "target": goal}
    figures = {"measured, CUDA graph": graph, "measured, eager": eager, "ours over eager PyTorch (≤ 1)": over}
    return line | {name: "" if value is None else f"{value:.3f}" for name, value in figures.items()}


def _layers(rows: Iterable[Row], wanted: Row) -> list[Row] | None:
    """The rows of the seven linears that have the wanted values; None unless all seven are there."""
    found = {
        row["layer"]: row
        for row in rows
        if row["layer"] is not None and all(row[name] == value for name, value in wanted.items())
    }
    return list(found.values()) if set(found) == set(LLAMA) else None
