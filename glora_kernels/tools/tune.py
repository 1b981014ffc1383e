"""Measures launch configurations and routes for somebody's own shapes, and writes them to a table (`runtime.tables`).

Where asked, also whose kernels serve a 4-bit weight (`tools.four_bit_tune`).

`candidates` says which configurations a kernel is tried with; `run` tries them, and writes after each kernel of each
shape, so that a run that was cut short goes on where it stopped. A candidate whose result differs from the default's,
or that does not compile, is discarded; one is adopted only where it is faster by more than noise, and no slower in the
forms of the kernel that other layers use.
"""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.runtime import configs, environment, tables, workspace
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.progress import note, progress
from glora_kernels.runtime.tables import Table
from glora_kernels.tools import four_bit_tune, timing
from glora_kernels.tools.four_bit_tune import Few
from glora_kernels.tools.machine import Failed, Machine, why
from glora_kernels.tools.trials import Data, Trial, disagreement, trial

NOISE = 0.01
"""A candidate must be faster than the default by more than this share."""

ROUNDS = 25
MOST = 8
"""The most candidates of a kernel, the default among them."""

Pass = Callable[[], dict[str, Tensor]]
Passes = Callable[[Data, bool, bool], Pass]
"""(data, backward, scales) → one whole forward or backward of a layer, on whatever route is forced."""


def candidates(kernel: str, arch: str, dtype: torch.dtype, shape: Shape) -> list[dict[str, int]]:
    """The configurations a kernel is tried with, its default first: all different, valid, small enough for the card.

    Raises:
        ValueError: a kernel that is not tuned.
    """
    if kernel not in configs.TUNED:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, configs.TUNED))}; got {kernel!r}")
    default = configs.choose(kernel, arch, dtype, shape)
    limit = configs.SHARED_LIMIT.get(arch, min(configs.SHARED_LIMIT.values()))
    found = [default]
    for changes in configs.KERNELS[kernel].variations:
        changed = {name: value for name, value in changes.items() if name in default}
        if not default.get("tma", False):
            changed.pop("persistent", None)  # without TMA a persistent grid has nothing to hide its epilogue behind
            if "parts" in changed:
                changed["parts"] = default["parts"]
        config = default | changed
        fits = shared_bytes(kernel, config, dtype, shape) <= limit and _registers_fit(kernel, config, dtype)
        if config not in found and fits and tables.fault(kernel, arch, dtype, shape, config) is None:
            found.append(config)
    return found[:MOST]


def shared_bytes(kernel: str, config: dict[str, int], dtype: torch.dtype, shape: Shape) -> int:
    """About how much shared memory a program takes, from above: the operands' stages and what is passed through it."""
    size, stages, rank = dtype.itemsize, config["num_stages"], configs.block_r(max(1, shape.r))
    rows, cols, depth = config["rows"], config["cols"], config.get("depth", 0)
    if kernel in ("fwd", "dx"):
        return stages * (rows + cols) * depth * size + (rows * cols // config["parts"] * size if config["tma"] else 0)
    if kernel == "hadamard_grad":
        return stages * (rows + cols) * depth * size + rows * cols * size
    if kernel == "dy":
        return stages * (rows + rank) * cols * size + rank * rows * size
    if kernel == "x":
        return stages * rows * (cols * size + 4 * rank)
    return stages * (rows + rank) * (depth if kernel == "prepare" else max(depth, cols)) * size


def _registers_fit(kernel: str, config: dict[str, int], dtype: torch.dtype) -> bool:
    """Whether the accumulator of a large product leaves registers for the rest."""
    if kernel not in ("fwd", "dx", "hadamard_grad"):
        return True
    each = config["rows"] * config["cols"] // (32 * config["num_warps"])
    return each <= (64 if dtype == torch.float32 else 128)


@dataclass
class Outcome:
    """What became of one kernel, or of one pass's routes, at one shape. `names` and times: (default, best)."""

    what: str
    shape: Shape
    dtype: str
    default_ms: float
    best_ms: float
    best: str
    measured: bool = True
    discarded: list[str] = field(default_factory=list)

    @property
    def gain(self) -> float:
        return 1.0 - self.best_ms / self.default_ms


@dataclass
class Result:
    """All outcomes, those of an earlier run among them, what failed, and what no time was left for."""

    outcomes: list[Outcome]
    failed: list[str]
    left: list[str]


def run(
    shapes: Sequence[Shape],
    dtype: str,
    path: Path,
    *,
    machine: Machine,
    passes: Passes | None = None,
    few: Few | None = None,
    kernels: Sequence[str] = configs.TUNED,
    again: bool = False,
    minutes: float = float("inf"),
    show: bool = True,
) -> Result:
    """Measure each kernel at each shape, then the routes (where `passes` is given), and keep the table at `path`.

    Where `few` is given, then also what serves a 4-bit weight of each N, K and R, at 1 to 64 tokens.

    Raises:
        ValueError: an unknown kernel or dtype, or a file at `path` that is no table of this device.
    """
    for name, value, accepted in (*(("kernels", k, configs.TUNED) for k in kernels), ("dtype", dtype, tables.DTYPES)):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")
    table = open_table(path, machine, again)
    what: list[tuple[Shape, str]] = [(shape, kernel) for shape in shapes for kernel in kernels]
    if passes is not None:
        what += [(shape, f"route {p}{s}") for shape in shapes for p in tables.PASSES for s in ("", " scaled")]
    if few is not None:
        what += four_bit_tune.tasks(shapes)
    result, deadline = Result([], [], []), machine.clock() + 60 * minutes
    for shape, task in progress(what, "tuning", show):
        known = None if again else _known(table, task, dtype, shape)
        if known is not None:
            result.outcomes.append(replace(known, measured=False))
            continue
        if machine.clock() >= deadline:
            result.left.append(f"{task} at {_name(shape)}")
            continue
        try:
            if task.startswith("route ") and passes is not None:
                row: Any = _measure_route(task, shape, dtype, machine, table, passes)
            elif task in four_bit_tune.TASKS and few is not None:
                row = four_bit_tune.measure(task, shape, dtype, machine, table, few, ROUNDS)
            else:
                row = _measure_kernel(task, shape, dtype, machine)
        except Failed as error:
            result.failed.append(f"{task} at {_name(shape)}: {error}")
            continue
        finally:
            workspace.release()
        row, discarded = row
        table = _with(table, row)
        tables.write(table, path)
        outcome = replace(_outcome(row), discarded=discarded)
        result.outcomes.append(outcome)
        if show:
            for line in (describe(outcome), *(f"  discarded: {reason}" for reason in discarded)):
                note(line)
    return result


def open_table(path: Path, machine: Machine, again: bool = False) -> Table:
    """The table to go on with: the one in the file, or an empty one where there is none or it is of another Triton.

    What another version of Triton gave is kept beside the new table, and asked no more. With `again` a file that is
    no table is overwritten.

    Raises:
        ValueError: the file is no table, or that of another device.
    """
    triton = environment.version("triton")
    empty = Table(machine.name, machine.arch, environment.version("torch"), triton, _today())
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


def compilations(shapes: Iterable[Shape], dtype: str, arch: str, kernels: Iterable[str]) -> int:
    """About how many compilations a run takes: shapes share those of equal configurations."""
    total = 0
    for kernel in kernels:
        tried = [candidates(kernel, arch, tables.DTYPES[dtype], shape) for shape in shapes]
        different = {tuple(sorted(config.items())) for found in tried for config in found}
        others = len(configs.KERNELS[kernel].forms) - 1
        total += len(different) + 2 * others  # of the default and of the best
    return total


def describe(outcome: Outcome) -> str:
    """One line: what, where, from how long to how long."""
    head = f"{outcome.what:<20} {_name(outcome.shape):<24} {outcome.dtype}"
    gain = f"{100 * outcome.gain:5.1f}% less" if outcome.gain > 0 else "stays"
    return f"{head}  {outcome.default_ms:9.4f} ms -> {outcome.best_ms:9.4f} ms  {gain:<11}  {outcome.best}"


def _measure_kernel(kernel: str, shape: Shape, dtype_name: str, machine: Machine) -> tuple[tables.Config, list[str]]:
    dtype = tables.DTYPES[dtype_name]
    sets = [Data(shape, dtype, machine.device, machine.arch, seed) for seed in range(_sets(shape, dtype, machine))]
    default, *others = candidates(kernel, machine.arch, dtype, shape)
    timed = configs.KERNELS[kernel].forms[0]
    with tables.using(None):
        expected, reason = _attempt(kernel, timed, sets[0], default, machine)
        if expected is None:
            raise Failed(f"the default configuration failed: {reason}")
        fit, discarded = [default], []
        for config in others:
            reason = _compare(kernel, timed, sets[0], config, expected, dtype, machine)
            if reason:
                discarded.append(f"{_short(default, config)}: {reason}")
            else:
                fit.append(config)
        steps = [[trial(kernel, timed, data, config).launch.run for data in sets] for config in fit]
        times = machine.timer(steps, ROUNDS)
        milliseconds = [statistics.median(values) for values in times]
        gains = [timing.ratio(values, times[0]) for values in times]
        best = 0
        for i in sorted(range(1, len(fit)), key=lambda i: gains[i]):
            if gains[i] >= 1 - NOISE:
                break
            reason = _other_forms(kernel, sets, default, fit[i], dtype, machine)
            if not reason:
                best = i
                break
            discarded.append(f"{_short(default, fit[i])}: {reason}")
    return tables.Config(kernel, dtype_name, shape, dict(fit[best]), milliseconds[best], milliseconds[0]), discarded


def _other_forms(
    kernel: str, sets: list[Data], default: dict[str, int], config: dict[str, int], dtype: torch.dtype, machine: Machine
) -> str:
    """Why a configuration cannot serve the other forms: it fails, errs, or is slower there; "" where it can."""
    for form in configs.KERNELS[kernel].forms[1:]:
        expected, _ = _attempt(kernel, form, sets[0], default, machine)
        if expected is None:  # where the default fails too, nothing is lost
            continue
        reason = _compare(kernel, form, sets[0], config, expected, dtype, machine)
        if not reason:
            both = [[trial(kernel, form, data, c).launch.run for data in sets] for c in (default, config)]
            slower = timing.ratio(*reversed(machine.timer(both, ROUNDS))) - 1
            reason = f"{100 * slower:.1f}% slower than the default" if slower > NOISE else ""
        if reason:
            return f"in the form {form!r}: {reason}"
    return ""


def _compare(
    kernel: str,
    form: str,
    data: Data,
    config: dict[str, int],
    expected: dict[str, Tensor],
    dtype: torch.dtype,
    machine: Machine,
) -> str:
    found, reason = _attempt(kernel, form, data, config, machine)
    return reason if found is None else disagreement(found, expected, dtype, slack=4)


def _attempt(
    kernel: str, form: str, data: Data, config: dict[str, int], machine: Machine
) -> tuple[dict[str, Tensor] | None, str]:
    """The results of one launch, or None and why there are none: a compiler's refusal is an answer here."""
    try:
        found: Trial = trial(kernel, form, data, config)
        results = found.results()
        machine.synchronize()
    except Exception as error:
        return None, why(error, machine)
    return results, ""


def _measure_route(
    task: str, shape: Shape, dtype_name: str, machine: Machine, table: Table, passes: Passes
) -> tuple[tables.Route, list[str]]:
    direction, scales = task.split()[1], task.endswith("scaled")
    dtype = tables.DTYPES[dtype_name]
    sets = [Data(shape, dtype, machine.device, machine.arch, seed) for seed in range(_sets(shape, dtype, machine))]

    def on(route: str, one: Pass) -> Pass:
        def step() -> dict[str, Tensor]:
            with tables.using(table, route):
                return one()

        step.__name__ = route
        return step

    route, results = "", {}
    try:
        whole = [passes(data, direction == "dx", scales) for data in sets]
        for route in tables.ROUTES:
            results[route] = on(route, whole[0])()
            machine.synchronize()
    except Exception as error:
        raise Failed(f"{route} {why(error, machine)}".lstrip()) from error
    difference = disagreement(results["library"], results["fused"], dtype, slack=8)
    if difference:
        raise Failed(f"the two routes differ: {difference}")
    times = machine.timer([[on(route, one) for one in whole] for route in tables.ROUTES], ROUNDS)
    fused, library = (statistics.median(values) for values in times)
    best = "library" if timing.ratio(times[1], times[0]) < 1 else "fused"
    return tables.Route(direction, dtype_name, shape, scales, best, fused, library), []


def _sets(shape: Shape, dtype: torch.dtype, machine: Machine) -> int:
    """How many sets are rotated: the smallest inputs of all together take twice the L2, as far as memory goes."""
    m, n, k, _ = shape
    smallest, whole = m * min(n, k) * dtype.itemsize, 3 * (m * n + m * k + n * k) * dtype.itemsize
    wanted = -(-2 * machine.l2_bytes // max(1, smallest))
    return max(2, min(wanted, 16, machine.memory_bytes // (2 * max(1, whole))))


Entry = tables.Config | tables.Route | tables.FourBit


def _known(table: Table, task: str, dtype: str, shape: Shape) -> Outcome | None:
    rows: Iterator[Any] = iter((*table.configs, *table.routes, *table.four_bit))
    return next((_outcome(row) for row in rows if _key(row) == (task, dtype, shape)), None)


def _key(row: Entry) -> tuple[str, str, Shape]:
    if isinstance(row, tables.Config):
        return row.kernel, row.dtype, row.shape
    if isinstance(row, tables.FourBit):
        return four_bit_tune.task_of(row.operation), row.dtype, row.shape
    return f"route {row.direction}{' scaled' if row.scales else ''}", row.dtype, row.shape


def _outcome(row: Entry) -> Outcome:
    what, dtype, shape = _key(row)
    if isinstance(row, tables.Config):
        arch_free = " ".join(f"{name}={value}" for name, value in row.config.items())
        return Outcome(what, shape, dtype, row.default_ms, row.ms, arch_free)
    if isinstance(row, tables.FourBit):
        times = row.times()
        kinds = tuple(name for name in ("cuda", "triton") if name in times)
        default = four_bit.unmeasured(row.operation, kinds, shape.m) if kinds else row.choice
        return Outcome(what, shape, dtype, times.get(default, times[row.choice]), times[row.choice], row.choice)
    return Outcome(what, shape, dtype, row.fused_ms, min(row.fused_ms, row.library_ms), row.route)


def _with(table: Table, row: Entry) -> Table:
    """The table with this row in the place of an older one of the same kernel, pass or operation, dtype and shape."""
    if isinstance(row, tables.Config):
        kept = tuple(old for old in table.configs if _key(old) != _key(row))
        return replace(table, configs=(*kept, row))
    if isinstance(row, tables.FourBit):
        return replace(table, four_bit=(*(old for old in table.four_bit if _key(old) != _key(row)), row))
    return replace(table, routes=(*(old for old in table.routes if _key(old) != _key(row)), row))


def _short(default: dict[str, int], config: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items() if default.get(name) != value)


def _name(shape: Shape) -> str:
    return f"{shape.m}x{shape.n}x{shape.k} r={shape.r}"


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
