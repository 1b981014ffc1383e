"""A result file as the schema wants it, for the tests to break."""

from __future__ import annotations

from typing import Any

from benchmarks import battery, schema
from benchmarks.battery import LLAMA, Entry


def row(entry: Entry, milliseconds: float = 1.0, mode: str = "graph", **changes: Any) -> dict[str, Any]:
    figures = {"median_ms": milliseconds, "p20_ms": 0.9 * milliseconds, "p80_ms": 1.1 * milliseconds}
    figures |= {"peak_bytes": 10, "saved_bytes": 4, "max_rel_err": 1e-3}
    return schema.make_row(entry, "fwd_bwd", mode, figures) | changes


def seven(
    case: str, impl: str, m: int, milliseconds: float, p: float = 0.0, mode: str = "graph"
) -> list[dict[str, Any]]:
    found = []
    for name, (n, k) in LLAMA.items():
        adapted = {} if case == battery.FROZEN else {"r": 16, "p": p}
        found.append(row(Entry(case, impl, m, n, k, layer=name, **adapted), milliseconds, mode))
    return found


def report() -> dict[str, Any]:
    return {
        "device": "NVIDIA H100 80GB HBM3",
        "driver": "580.1",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "0123456789ab",
        "date": "2026-11-22T05:42:28+00:00",
        "ceilings": {"bf16_tflops": 798.0, "copy_gbps": 3000.0},
        "unavailable": {"unsloth": "unsloth is not installed"},
        "rows": seven("frozen", "eager", 8192, 1.0) + seven("lora", "ours", 8192, 1.05),
        "models": [
            {"model": "llama-3-8b layer x1", "case": "frozen", "impl": "eager", "tokens": 8192, "median_ms": 20.0,
             "tokens_per_s": 409600.0, "peak_bytes": 1 << 30},
        ],
    }  # fmt: skip
