"""Measures the choices for a user's own shapes, and writes the best to a table (`runtime.tables`).

Configurations, routes, and on request the kernels of a 4-bit weight: each is a row, written as soon as it is measured,
so that an interrupted run can be continued. A choice that fails or gives another result is discarded. A choice is
adopted only if it is faster than the default by more than noise, and no slower in the forms of the kernel that other
layers use.
"""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.progress import note, progress
from glora_kernels.runtime.tables import DEQUANTIZE, NAMED, SMALL_M, Row, Table
from glora_kernels.tools import planned, timing
from glora_kernels.tools.candidates import kept_for, options
from glora_kernels.tools.timing import Machine
from glora_kernels.tools.trials import Data, forms, sets

NOISE = 0.01
"""A choice must be faster than the baseline by more than this share."""

ROUNDS = 25
TOKENS: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
"""The M at which a forward of a few tokens is measured; each row serves M/2 to 2·M (`tables.NEAR`)."""

Task = tuple[str, Shape]


class Failed(Exception):
    """The baseline itself, or every choice, could not be measured."""


@dataclass
class Outcome:
    """The outcome of a task at a shape: its row, whether it was measured now, and why choices were discarded."""

    row: Row
    shape: Shape
    measured: bool = True
    discarded: list[str] = field(default_factory=list)

    @property
    def gain(self) -> float:
        before, after = self.row.times
        return 1.0 - after / before


@dataclass
class Result:
    """All outcomes (also of earlier runs), the tasks that failed, and those for which no time was left."""

    outcomes: list[Outcome] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def tasks(shapes: Sequence[Shape], kernels: Iterable[str], routes: bool, four_bit: bool) -> list[Task]:
    """The tasks: kernels and routes at each shape, and for each N, K and R the kernels of a 4-bit weight.

    Kernel "small_m" belongs to the latter.

    Raises:
        ValueError: a kernel is not tuned.
    """
    kernels = tuple(kernels)
    if unknown := [name for name in kernels if name not in configs.TUNED]:
        raise ValueError(f"kernels must be one of {', '.join(map(repr, configs.TUNED))}; got {unknown[0]!r}")
    found = [(kernel, shape) for shape in shapes for kernel in kernels if kernel != "small_m"]
    found += [(name, shape) for shape in shapes if routes for name in NAMED if name.startswith("route")]
    found += [(DEQUANTIZE, Shape(0, s.n, s.k, 0)) for s in shapes if four_bit]
    found += [(SMALL_M, s._replace(m=m)) for s in shapes if four_bit for m in TOKENS]
    if four_bit and "small_m" in kernels:
        found += [("small_m", kept_for("small_m", s._replace(m=m))) for s in shapes for m in TOKENS]
    return list(dict.fromkeys(found))


def tasks_of(call: Callable[[Tensor], Any], x: Tensor, arch: str, of: Sequence[Task]) -> list[Task]:
    """The choices that a call makes, with their shapes, as tasks; only of the kinds that are in the tasks `of`."""
    kinds = {what for what, _ in of}
    decided = planned.of_module(call, x, arch).decided
    return list(dict.fromkeys((one.what, one.shape) for one in decided if one.what in kinds))


def run(
    what: Sequence[Task],
    dtype: str,
    path: Path,
    *,
    machine: Machine,
    again: bool = False,
    minutes: float = float("inf"),
    show: bool = True,
) -> Result:
    """Measure each task, and write the table to `path` after each.

    Raises:
        ValueError: the dtype is unknown, or the file at `path` is not a table of this device.
    """
    if dtype not in tables.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, tables.DTYPES))}; got {dtype!r}")
    table = open_table(path, machine, again)
    result, deadline = Result(), machine.clock() + 60 * minutes
    for task, shape in progress(what, "tuning", show):
        asked = task, dtype, kept_for(task, shape)
        known = [row for row in table.rows if (row.what, row.dtype, row.shape) == asked]
        if known and not again:
            result.outcomes.append(Outcome(known[0], shape, measured=False))
            continue
        if machine.clock() >= deadline:
            result.left.append(f"{task} at {_name(shape)}")
            continue
        try:
            outcome = measure(task, shape, dtype, machine, table)
        except Failed as error:
            result.failed.append(f"{task} at {_name(shape)}: {error}")
            continue
        table = replace(table, rows=(*(row for row in table.rows if row not in known), outcome.row))
        tables.write(table, path)
        result.outcomes.append(outcome)
        if show:
            for line in (describe(outcome), *(f"  discarded: {reason}" for reason in outcome.discarded)):
                note(line)
    return result


def open_table(path: Path, machine: Machine, again: bool = False) -> Table:
    """The table to continue: the one in the file, or an empty one if there is none or another Triton made it.

    A table of another Triton version is renamed to <name>.triton-<version>.json.old and no longer used. With `again` an
    invalid file is overwritten.

    Raises:
        ValueError: the file is not a valid table, or is the table of another device.
    """
    triton, today = environment.version("triton"), datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    empty = Table(machine.name, machine.arch, environment.version("torch"), triton, today)
    if not path.is_file():
        return empty
    try:
        table = tables.read(path)
    except ValueError:
        if again:
            return empty
        raise
    if (table.device, table.arch) != (machine.name, machine.arch):
        raise ValueError(
            f"{path} is the table of {table.device} ({table.arch}), and this is {machine.name}: give --out"
        )
    if table.triton != triton:
        old = path.with_name(f"{path.stem}.triton-{table.triton}.json.old")
        os.replace(path, old)
        note(f"{path} was measured with Triton {table.triton}, here is {triton}: kept as {old.name}")
        return empty
    return replace(table, torch=empty.torch, date=empty.date)


def describe(outcome: Outcome) -> str:
    """One line: task, shape, time before and after, choice."""
    row, (before, after) = outcome.row, outcome.row.times
    head = f"{row.what:<20} {_name(outcome.shape):<24} {row.dtype}"
    gain = f"{100 * outcome.gain:5.1f}% less" if outcome.gain > 0 else "stays"
    return f"{head}  {before:9.4f} ms -> {after:9.4f} ms  {gain:<11}  {text_of(row.choice)}"


def text_of(choice: Any) -> str:
    """A choice as text."""
    return choice if isinstance(choice, str) else " ".join(f"{name}={value}" for name, value in choice.items())


def measure(what: str, shape: Shape, dtype: str, machine: Machine, table: Table) -> Outcome:
    """Find the best choice at a shape, with the table's choices for everything else.

    Raises:
        Failed: the default configuration, one of the two routes, or every choice failed.
    """
    first, *others = options(what, machine.arch, tables.DTYPES[dtype], shape)
    attempt = Attempts(what, forms(what)[0], shape, dtype, machine, table)
    fit, reasons = [], {}
    for choice in (first, *others):
        if reason := attempt.fault(choice):
            reasons[text_of(choice) if choice == first or what in NAMED else _changes(first, choice)] = reason
        else:
            fit.append(choice)
    discarded = [f"{name}: {reason}" for name, reason in reasons.items()]
    if what.startswith("route") and attempt.expected and discarded:
        raise Failed(f"the two routes differ: {next(iter(reasons.values()))}")
    if not fit or (what not in (DEQUANTIZE, SMALL_M) and fit[0] != first):
        raise Failed("; ".join(discarded))
    times = attempt.times(fit)
    medians, gains = [statistics.median(values) for values in times], [timing.ratio(v, times[0]) for v in times]
    best = 0
    for i in sorted(range(1, len(fit)), key=gains.__getitem__):
        if gains[i] >= 1 - NOISE:
            break
        if reason := _in_other_forms(attempt, first, fit[i]):
            discarded.append(f"{_changes(first, fit[i])}: {reason}")
            continue
        best = i
        break
    ms = dict(zip(fit, medians, strict=True)) if what in NAMED else {"default": medians[0], "chosen": medians[best]}
    return Outcome(Row(what, dtype, kept_for(what, shape), fit[best], ms), shape, discarded=discarded)


class Attempts:
    """Tries choices on the same layers of one form. `expected`: the results of the first choice that worked."""

    def __init__(self, what: str, form: str, shape: Shape, dtype: str, machine: Machine, table: Table) -> None:
        self.what, self.shape, self.dtype, self.machine, self.table = what, shape, dtype, machine, table
        of, make = tables.DTYPES[dtype], (what, form, shape, tables.DTYPES[dtype], machine.device, machine.arch)
        count = sets(what, shape, of, machine.l2_bytes, machine.memory_bytes)
        self.expected: dict[str, Tensor] | None = None
        self.reason, self.sets = self._tried(lambda: [Data(*make, seed) for seed in range(count)])

    def in_form(self, form: str) -> Attempts:
        return Attempts(self.what, form, self.shape, self.dtype, self.machine, self.table)

    def fault(self, choice: Any) -> str:
        """Why a choice cannot be used (an exception of the compiler counts as a reason), or ""."""
        if self.sets is None:
            return self.reason
        data = self.sets[0]
        reason, found = self._tried(lambda: data.trial(choice, self.table).results())
        if found is None:
            return reason
        reason = data.wrong(found, self.expected)
        if not reason and self.expected is None:
            self.expected = found
        return reason

    def times(self, choices: Sequence[Any]) -> list[list[float]]:
        """The milliseconds of each choice in each round."""
        trials = [[data.trial(choice, self.table) for data in self.sets or ()] for choice in choices]
        for trial in (one for of_choice in trials for one in of_choice):
            trial.run_all()
        return self.machine.timer([[trial.run for trial in of_choice] for of_choice in trials], ROUNDS)

    def _tried(self, act: Callable[[], Any]) -> tuple[str, Any]:
        """("", what `act` returns), or (why it failed, None)."""
        try:
            found = act()
            self.machine.synchronize()
        except Exception as error:
            return timing.why(error, self.machine), None
        return "", found


def _in_other_forms(timed: Attempts, first: Any, choice: Any) -> str:
    """Why a choice cannot serve the kernel's other forms (it fails, gives wrong results or is slower there), or ""."""
    for form in forms(timed.what)[1:]:
        attempt = timed.in_form(form)
        if attempt.fault(first):  # where the default fails too, nothing is lost
            continue
        reason = attempt.fault(choice)
        if not reason:
            slower = timing.ratio(*reversed(attempt.times([first, choice]))) - 1
            reason = f"{100 * slower:.1f}% slower than the default" if slower > NOISE else ""
        if reason:
            return f"in the form {form!r}: {reason}"
    return ""


def _changes(first: Any, choice: Any) -> str:
    if isinstance(choice, str):
        return choice
    return ", ".join(f"{name}={value}" for name, value in choice.items() if first.get(name) != value)


def _name(shape: Shape) -> str:
    return f"{shape.m}x{shape.n}x{shape.k} r={shape.r}"
