"""Linear layers and sets of them: forward, forward and backward, a step of generation; dense and over 4 bits.

    pytest benchmarks --stage target
    pytest benchmarks -k "lora and 8192"
    pytest benchmarks --benchmark-autosave, then --benchmark-compare

A contestant is compared with float64 before it is timed; what cannot be built here is skipped with the reason; no speed
is asserted. pytest-benchmark is told the times the device took, in the rounds it shared with the frozen layer: as its
rounds it shows p20, median and p80.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Entry, Group, Stage, row_key
from benchmarks.measure import Bench


class Clock:
    """Time as the device took it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK)
def test_layer(
    benchmark: Any,
    request: pytest.FixtureRequest,
    bench: Bench,
    stage: Stage,
    group: Group,
    row: tuple[Entry, str, str],
) -> None:
    if row_key(*row) not in bench.store.settled():
        params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        bench.group(stage, group, {row_key(*one["row"]) for one in params if one.get("group") is group})
    line = bench.store.settled()[row_key(*row)]
    if line["kind"] == "error":
        pytest.skip(line["reason"])
    if benchmark is None:
        return
    entry, direction, mode = row
    benchmark.group = f"{entry.op} {direction} {mode}, {entry.layer or ''} {entry.n}x{entry.k} M={entry.m}"
    benchmark.extra_info.update(line["row"], **line["detail"])
    seconds = iter([1e-3 * line["row"][name] for name in ("p20_ms", "median_ms", "p80_ms")])
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(seconds),), {}), rounds=3)
