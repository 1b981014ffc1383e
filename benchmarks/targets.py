"""The targets of a card: what a layer should cost, its floor, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.cases import (
    FEW,
    FULL,
    LORA,
    LORA_LORA,
    MLP,
    PASSES,
    QGLORA,
    QLORA,
    VECTOR_LORA,
    VECTORS,
    with_twins,
)
from benchmarks.floor import BYTES, packed_bytes
from benchmarks.floor import seven as least_of_seven
from benchmarks.results import Found, over_frozen, select

RANK, M = 16, 8192
SETS = {"qkv": "q, k, v", "gate_up": "gate, up"}
PASS_NAMES = {"fwd": "forward", "fwd_bwd": "forward + backward"}
FORM_NAMES = {"plain": "W", "vectors": "W + W∘A + B, vectors", "low-rank": "W + W∘A + B, factors"}
BACKEND_NAMES = {"cuda": "CUDA", "triton": "Triton", "bnb": "bitsandbytes", "eager": "eager PyTorch"}
FASTER = {(LORA, False): 1.0, (LORA, True): 1.0, (VECTORS, False): 1.8, (LORA_LORA, False): 1.3}
"""By case and whether there is dropout: the least by which a step should be faster after `accelerate`."""
CPU_MOST = {LORA: 1.12, VECTOR_LORA: 1.18, LORA_LORA: 1.70}
"""The most a layer should take over the frozen one on a CPU, at M=1024, N=K=2048, r=8."""
CPU_FASTER = {VECTORS: 2.2, LORA_LORA: 1.4}
"""The least by which it should be faster there than PEFT's."""

Measure = Callable[[Found, str], "float | None"]
"""What was measured in one mode; None where a row is missing."""


@dataclass(frozen=True)
class Target:
    """One line of a table. floor: with the digits of the specification. form: of the figures."""

    label: str
    floor: str
    goal: str
    measure: Measure
    form: str = ".3f"
    beside: Measure | None = None
    """Our eager mode over eager PyTorch's, where that is asked: it should never be above 1."""


def over(found: Found, mode: str, case: str, m: int = M, p: float = 0.0, impl: str = "ours", below: str = "") -> Any:
    """The seven linears, forward and backward, over the same seven frozen, or over another implementation's."""
    spreads = over_frozen(select(found["rows"], mode=mode, direction="fwd_bwd"))
    pair = [spreads.get((case, one, m, RANK, p, "llama")) for one in (impl, below) if one]
    return None if None in pair else pair[0].median / (pair[1].median if below else 1.0)  # type: ignore[union-attr]


def saved(found: Found, mode: str) -> float | None:
    """What LoRA keeps for backward beyond x, y and parameters, over the bytes of R·M values in its dtype."""
    own = select(found["rows"], case=LORA, impl="ours", m=M, r=RANK, p=0.0, mode=mode, direction="fwd_bwd")
    rows = with_twins({line["row"]["layer"]: line["row"] for line in own if line["row"]["layer"]})
    sizes = [row["saved_bytes"] for row in rows.values()]
    if len(rows) < 7 or None in sizes:
        return None
    return sum(sizes) / sum(RANK * row["m"] * BYTES[row["dtype"]] for row in rows.values())


def over_one_product(found: Found, mode: str, siblings: str, direction: str) -> float | None:
    """A set's layers with LoRA, in one launch, over one product with their weights concatenated."""
    lines = select(found["rows"], op="group", m=M, mode=mode, direction=direction)
    medians = {which[:2]: spread.median for which, spread in over_frozen(lines).items()}
    return medians.get((f"{LORA}:{siblings}", "ours"))


def launches(found: Found, mode: str) -> float | None:
    """Forward, of q/k/v and gate/up in one call each, o (which is shaped as q) and down."""
    counts = []
    for case, layer in [*((f"{LORA}:{name}", None) for name in SETS), (LORA, "q"), (LORA, "down")]:
        wanted = {"impl": "ours", "case": case, "layer": layer, "m": M, "r": RANK, "p": 0.0, "direction": "fwd_bwd"}
        own = select(found["rows"], mode=mode, **wanted) if mode == "eager" else []
        counts.append(own[0]["detail"].get("launches_fwd") if own else None)
    return None if None in counts else sum(counts)  # type: ignore[arg-type]


def merged(found: Found, mode: str) -> float | None:
    """What merging reads and writes over the time, over a copy's bandwidth."""
    kernel = found["notes"].get("merging", {}).get("kernel") or {}
    return kernel.get("of_copy") if mode == "eager" else None


def few(found: Found, mode: str, m: int, impl: str) -> dict[str, Mapping[str, Any]]:
    """The rows of gate, up and down in a step of generation of m tokens; none unless there is one of every size."""
    own = select(found["rows"], case=QLORA, impl=impl, m=m, r=RANK, p=0.0, mode=mode, direction="fwd")
    rows = with_twins({line["row"]["layer"]: line["row"] for line in own if line["row"]["layer"]})
    return {layer: rows[layer] for layer in MLP} if set(MLP) <= set(rows) else {}


def decode_share(found: Found, mode: str, m: int) -> float | None:
    """The bytes of the codes over our time with LoRA, over a copy's bandwidth: the least of gate, up and down."""
    gbps = found["notes"].get("ceilings", {}).get("gbps")
    rows = few(found, mode, m, "ours").values() if gbps else ()
    return min((packed_bytes(row["n"], row["k"]) / (1e6 * row["median_ms"]) / gbps for row in rows), default=None)


def decode_gain(found: Found, mode: str, m: int) -> float | None:
    """bitsandbytes' time with LoRA beside it over ours: the least of gate, up and down."""
    ours, theirs = few(found, mode, m, "ours"), few(found, mode, m, "bnb")
    both = ours if theirs else {}
    return min((theirs[layer]["median_ms"] / row["median_ms"] for layer, row in both.items()), default=None)


def dequantized(found: Found, mode: str, form: str, backend: str) -> float | None:
    """What dequantizing alone reads and writes over the time, over a copy's bandwidth: the least of the shapes."""
    rows = found["notes"].get("dequantizing", {}).get("rows", [])
    wanted = (form, backend, mode)
    return min((r["of_copy"] for r in rows if (r["form"], r["backend"], r["mode"]) == wanted), default=None)


def _layer(label: str, floor: str, goal: str, case: str, m: int = M, p: float = 0.0, **pair: Any) -> Target:
    beside = partial(over, case=case, m=m, p=p, below="eager")
    return Target(label, floor, goal, partial(over, case=case, m=m, p=p, **pair), beside=beside)


LAYERS = (
    _layer("LoRA", "1.033", "≤ 1.08, then 1.06", LORA),
    _layer("LoRA, p = 0.1", "1.033", "≤ 1.10, then 1.08", LORA, p=0.1),
    _layer("GLoRA, A = vector, B = lora", "1.07", "≤ 1.13", VECTOR_LORA),
    _layer("GLoRA, A = vector, B = lora, C = D = E = vector (bias)", "1.10", "≤ 1.18", FULL),
    _layer("GLoRA, A = B = lora", "1.565", "≤ 1.62", LORA_LORA),
    _layer("LoRA, M = 2048", "", "≤ 1.12", LORA, m=2048),
    _layer("LoRA, M = 512", "", "≤ 1.25", LORA, m=512),
    _layer("PEFT's time over ours, GLoRA, A = B = vector", "", "≥ 2.70", VECTORS, impl="peft", below="ours"),
    _layer("PEFT's time over ours, GLoRA, A = B = lora", "", "≥ 2.00", LORA_LORA, impl="peft", below="ours"),
    Target("LoRA: saved for backward beyond x and y, over R·M values", "R·M", "", saved),
)
"""The summed time of the seven linears, forward and backward, over the same seven frozen, or PEFT's sum over ours."""
SET_FLOORS = {("qkv", "fwd"): "1.012", ("qkv", "fwd_bwd"): "1.039", ("gate_up", "fwd"): "1.005",
              ("gate_up", "fwd_bwd"): "1.012"}  # fmt: skip
"""Over one product with the weights concatenated, by `floor.floor_ms` at the ceilings of an H100."""
SIBLINGS = (
    *(
        Target(f"{shown}, {PASS_NAMES[direction]}: over one product with the concatenated weights",
               SET_FLOORS[name, direction], "≤ 1.05", partial(over_one_product, siblings=name, direction=direction))
        for name, shown in SETS.items() for direction in PASSES
    ),
    Target("launches of seven linears, forward", "4", "≤ 8", launches, "d"),
    Target("merging 32 decoder layers, of a copy's bandwidth", "1", "≥ 0.80", merged, ".2f"),
)  # fmt: skip
_NF4 = (("QLoRA", QLORA, "1.074", "≤ 1.12"), ("QGLoRA, A = C = E = vector, B = lora", QGLORA, "1.14", "≤ 1.20"))
_FEW = (
    ("of a copy's bandwidth", "1", "≥ 0.75", decode_share),
    ("bitsandbytes' time over ours", "", "≥ 1.3", decode_gain),
)
QUANTIZED = (
    *(
        Target(f"{name}: seven linears, forward + backward, over bf16 frozen, M = {m}",
               floor if m == M else f"{least_of_seven(case, m, RANK):.3f}", goal if m == M else "",
               partial(over, case=case, m=m))
        for name, case, floor, goal in _NF4 for m in (M, 2048)
    ),
    *(
        Target(f"LoRA on gate, up, down, M = {m}: {what}", floor, goal if m == 1 else "", partial(measure, m=m), ".2f")
        for m in FEW for what, floor, goal, measure in _FEW
    ),
    *(
        Target(f"dequantizing alone, {title} ({BACKEND_NAMES[backend]}): of a copy's bandwidth", "1", "≥ 0.90",
               partial(dequantized, form=form, backend=backend), ".2f")
        for backend in ("cuda", "triton") for form, title in FORM_NAMES.items()
    ),
)  # fmt: skip


def rows(corner: str, targets: tuple[Target, ...], found: Found) -> list[dict[str, str]]:
    """A table of targets: floor, target and what was measured; empty cells where unmeasured."""
    beside, made = any(target.beside for target in targets), []
    for target in targets:
        row = {corner: target.label, "floor": target.floor, "target": target.goal}
        row["measured, CUDA graph"] = _shown(target.measure(found, "graph"), target.form)
        row["measured, eager"] = _shown(target.measure(found, "eager"), target.form)
        if beside:
            row["ours over eager PyTorch (≤ 1)"] = _shown(target.beside and target.beside(found, "eager"), target.form)
        made.append(row)
    return made


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
