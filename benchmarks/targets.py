"""The target table: what a layer should cost on an H100, its floor, and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.battery import FULL, LLAMA, LORA, LORA_LORA, VECTOR_LORA, VECTORS

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One line: the summed time of the seven linears, forward and backward, over the same seven frozen ("most"), or
    PEFT's sum over ours ("least")."""

    label: str
    case: str
    m: int
    p: float
    target: float
    floor: float | None = None
    kind: str = "most"


TARGETS = (
    Target("LoRA", LORA, 8192, 0.0, 1.08, 1.033),
    Target("LoRA, p = 0.1", LORA, 8192, 0.1, 1.10),
    Target("GLoRA, A = vector, B = lora", VECTOR_LORA, 8192, 0.0, 1.13, 1.07),
    Target("GLoRA, A = vector, B = lora, C = D = E = vector (bias)", FULL, 8192, 0.0, 1.18, 1.10),
    Target("GLoRA, A = B = lora", LORA_LORA, 8192, 0.0, 1.62, 1.565),
    Target("LoRA, M = 2048", LORA, 2048, 0.0, 1.12),
    Target("LoRA, M = 512", LORA, 512, 0.0, 1.25),
    Target("PEFT's time over ours, GLoRA, A = B = vector", VECTORS, 8192, 0.0, 2.7, kind="least"),
    Target("PEFT's time over ours, GLoRA, A = B = lora", LORA_LORA, 8192, 0.0, 2.0, kind="least"),
)
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
    wanted = {"case": case, "impl": impl, "m": m, "r": r, "p": p, "mode": mode, "pass": direction}
    found = {
        row["layer"]: row["median_ms"]
        for row in rows
        if row["layer"] is not None and all(row[name] == value for name, value in wanted.items())
    }
    return sum(found.values()) if set(found) == set(LLAMA) else None


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


def table_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table: label, target, floor, measured under a CUDA graph and in eager mode; empty cells where unmeasured."""
    found = []
    for target in TARGETS:
        sign = "≤" if target.kind == "most" else "≥"
        line: dict[str, Any] = {"seven linears, forward + backward, over frozen": target.label}
        line["floor"] = "" if target.floor is None else f"{target.floor:.3f}".rstrip("0")
        line["target"] = f"{sign} {target.target:.2f}"
        for mode, name in (("graph", "measured, CUDA graph"), ("eager", "measured, eager")):
            value = measured(rows, target, mode)
            line[name] = "" if value is None else f"{value:.3f}"
        found.append(line)
    return found
