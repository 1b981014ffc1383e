"""Devices, rows and results for the tests, to break and to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import cases, results, schema
from benchmarks.cases import LLAMA, Entry, Group, Stage
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.measure import Bench
from benchmarks.store import Store

RATES = Ceilings(0.1, 10.0)
HEADER = {"device": "d", "commit": "c", "source": "s", "torch": "t", "triton": "r", "scale": "tiny",
          "date": "2026-11-22T05:42:28+00:00", "details": {"cores": 2}}  # fmt: skip
STAGES = {stage.name: stage for stage in cases.tiny_stages()}


class Quiet(Device):
    """A CPU whose ceilings are known and whose regions are short."""

    region_s = 0.0

    def ceilings(self) -> Ceilings:
        return RATES


def bench(folder: Path, device: Device | None = None, **options: Any) -> Bench:
    return Bench(
        device or Quiet(), "tiny", Store(folder / "tiny.stage.jsonl", HEADER), say=lambda *text, **how: None, **options
    )


def measured(folder: Path, group: Group, stage: str = "target", device: Device | None = None) -> Store:
    found = bench(folder, device)
    found.group(STAGES[stage], group)
    return found.store


def forget(folder: Path, named: str) -> list[dict[str, Any]]:
    """Delete the rows from the store whose keys have this in them; the rows that are left."""
    path = folder / "tiny.stage.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    left = [line for line in lines if line["kind"] not in ("row", "model") or named not in line["key"]]
    assert len(left) < len(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in left))
    return [line for line in left if line["kind"] in ("row", "model")]


def row(entry: Entry, milliseconds: float = 1.0, mode: str = "graph", direction: str = "fwd_bwd") -> dict[str, Any]:
    figures = {"median_ms": milliseconds, "p20_ms": 0.9 * milliseconds, "p80_ms": 1.1 * milliseconds}
    return schema.make_row(entry, direction, mode, figures | {"peak_bytes": 10, "saved_bytes": 4, "max_rel_err": 1e-3})


def seven(case: str, impl: str, m: int, milliseconds: float, p: float = 0.0, mode: str = "graph") -> list[Any]:
    adapted = {} if case == cases.FROZEN else {"r": 16, "p": p}
    entries = [Entry(case, impl, m, n, k, layer=name, **adapted) for name, (n, k) in LLAMA.items()]
    return [row(entry, milliseconds, mode) for entry in entries]


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0",
        "commit": "0123456789ab", "date": "2026-11-22T05:42:28+00:00",
        "ceilings": {"bf16_tflops": 798.0, "copy_gbps": 3000.0},
        "unavailable": {"unsloth": "unsloth is not installed"},
        "rows": list(rows) or seven("frozen", "eager", 8192, 1.0) + seven("lora", "ours", 8192, 1.05),
        "models": [{"model": "llama-3-8b x1", "case": "frozen", "impl": "eager", "tokens": 8192, "median_ms": 20.0,
                    "tokens_per_s": 409600.0, "peak_bytes": 1 << 30}],
    }  # fmt: skip


def found(*rows: dict[str, Any], **notes: Any) -> results.Found:
    whole = results.of_report(report(*rows))
    return {**whole, "notes": whole["notes"] | notes}


__all__ = ["HEADER", "RATES", "STAGES", "Quiet", "Stage", "bench", "forget", "found", "measured", "report", "row",
           "seven"]  # fmt: skip
