"""Timing, and how its figures are shown: interleaved rounds, medians of ratios, progress, tables.

Two things are compared by what they take in the same round, one right after the other, and the medians are
taken over the ratios of the rounds: a machine that slows down for a second slows both.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """A sample's median with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, inner: int = 1, warmup: int = 2, label: str = ""
) -> dict[str, list[float]]:
    """Seconds a call of each, one entry a round. Every round times each once, in an order that rotates."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(warmup):
            calls[name]()
    for i in progress(range(rounds), label):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            call = calls[name]
            begin = time.perf_counter()
            for _ in range(inner):
                call()
            times[name].append((time.perf_counter() - begin) / inner)
    return times


def ratio(times: Mapping[str, Sequence[float]], above: str, below: str) -> Spread:
    """How many times longer `above` takes than `below`, over the ratios of the single rounds."""
    return Spread.of([a / b for a, b in zip(times[above], times[below], strict=True)])


def progress(items: Iterable[T], label: str = "") -> Iterable[T]:
    """A progress bar on a terminal where tqdm is installed; the items themselves elsewhere."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, leave=False)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table, aligned; None is shown as a dash."""
    if not rows:
        return "(nothing)"
    lines = [[str(key) for key in rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
