"""Measures what serves a 4-bit weight: the kernels of csrc, those of Triton, or a dense workspace.

Only what gives the right result is timed: a dense weight is bit for bit that of `quant.dequantize`, the forward of a
few tokens no further from float64 than twice the literal formula at its dtype. What is not there or does not serve has
no time in the row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.quant import dequantize
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime import tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import FourBit, Table
from glora_kernels.tools.machine import Failed, Machine, why
from glora_kernels.tools.trials import Data

TOKENS: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
"""What a forward of a few tokens is measured at: an entry serves half as many to twice as many."""

SCALE = 2.0
"""Of the low-rank path in that forward."""

Step = Callable[[], dict[str, Tensor]]
Few = Callable[[Data], Step]
"""data → one forward over `data.codes()`: y = x·Wᵀ + h·upᵀ + bias with h = SCALE·x·b_downᵀ, of whatever is forced."""


def task_of(operation: str) -> str:
    """What an operation of `tables.FOUR_BIT` is called among all that is measured."""
    return f"4-bit {operation}"


TASKS: tuple[str, ...] = tuple(map(task_of, tables.FOUR_BIT))


def tasks(shapes: Sequence[Shape]) -> list[tuple[Shape, str]]:
    """The operations on weights of these sizes: the dense weight once a size, then the tokens; M is not theirs."""
    dense, few = TASKS
    found = [(Shape(0, s.n, s.k, 0), dense) for s in shapes]
    found += [(s._replace(m=m), few) for s in shapes for m in TOKENS]
    return list(dict.fromkeys(found))


def measure(
    task: str, shape: Shape, dtype_name: str, machine: Machine, table: Table, few: Few, rounds: int
) -> tuple[FourBit, list[str]]:
    """One row, and what was left out of it and why.

    Args:
        task: of `TASKS`.
        shape: of `tasks`.
        dtype_name: of x, or of the dense weight.
        machine: what is measured on.
        table: what was measured before, which the forward of a few tokens is given.
        few: makes that forward.
        rounds: of the clock.

    Raises:
        Failed: nothing gives a right result.
    """
    dtype = tables.DTYPES[dtype_name]
    sets = [Data(shape, dtype, machine.device, machine.arch, seed) for seed in range(_sets(shape, machine))]
    operation = next(name for name in tables.FOUR_BIT if task_of(name) == task)
    dense = operation == "dequantize"
    kinds = four_bit.usable("auto", machine.arch)
    fit: dict[str, list[Step]] = {}
    left_out = []
    for kind in kinds if dense else (*kinds, "workspace"):
        try:
            steps = _dequantize_steps(kind, sets) if dense else _small_m_steps(kind, sets, table, few)
            found = steps[0]()
            machine.synchronize()
        except Exception as error:
            reason = why(error, machine)
        else:
            reason = _wrong_dense(sets[0], found["dense"]) if dense else _wrong_forward(sets[0], found)
        if reason:
            left_out.append(f"{kind}: {reason}")
        else:
            fit[kind] = steps
    if not fit:
        raise Failed("; ".join(left_out))
    times = machine.timer(list(fit.values()), rounds)
    medians = {name: statistics.median(values) for name, values in zip(fit, times, strict=True)}
    best = min(medians, key=lambda name: medians[name])
    cuda, triton, workspace = (medians.get(name) for name in ("cuda", "triton", "workspace"))
    return FourBit(operation, dtype_name, shape, best, cuda, triton, workspace), left_out


def _dequantize_steps(kind: str, sets: list[Data]) -> list[Step]:
    first = sets[0]
    out = first.out("dense", first.shape.n, first.shape.k)  # as layers share one workspace
    out.fill_(float("nan"))

    def step_of(data: Data) -> Step:
        launch = four_bit.dequantize_launch(data.codes(), out, route=kind, arch=data.arch)

        def step() -> dict[str, Tensor]:
            launch.run()
            return {"dense": out}

        return _named(kind, step)

    return [step_of(data) for data in sets]


def _small_m_steps(kind: str, sets: list[Data], table: Table, few: Few) -> list[Step]:
    first = sets[0]
    if kind != "workspace" and (reason := four_bit.serves(kind, first["x"], first.codes(), first.shape.r)):
        raise ValueError(reason)

    def step_of(forward: Step) -> Step:
        def step() -> dict[str, Tensor]:
            with tables.using(table, small_m=kind):
                return forward()

        return _named(kind, step)

    return [step_of(few(data)) for data in sets]


def _named(kind: str, step: Step) -> Step:
    step.__name__ = kind
    return step


def _wrong_dense(data: Data, found: Tensor) -> str:
    """Where the dense weight differs from the codec's; "" where it does not."""
    expected = dequantize(data.codes(), data.dtype)
    differing = int((found != expected).sum())
    return f"{differing} of {expected.numel()} numbers are not those of quant.dequantize" if differing else ""


def _wrong_forward(data: Data, found: dict[str, Tensor]) -> str:
    """How far y or h is off; "" where neither is further than rounding explains."""
    truth, plain = _literal(data, torch.float64), _literal(data, data.dtype)
    for name, value in found.items():
        error, allowed = largest_error(value, truth[name]), allowed_error(truth[name], plain[name], data.dtype)
        if not error <= allowed:
            return f"{name} is off by {error:.1e}, allowed is {allowed:.1e}"
    return ""


def _literal(data: Data, dtype: torch.dtype) -> dict[str, Tensor]:
    x, up, down, bias = (data[name].to(dtype) for name in ("x", "up", "b_down", "bias"))
    h = SCALE * (x @ down.T)
    return {"y": x @ dequantize(data.codes(), data.dtype).to(dtype).T + h @ up.T + bias, "h": h}


def _sets(shape: Shape, machine: Machine) -> int:
    """How many weights are rotated: the codes of all together take twice the L2, as far as memory goes."""
    codes, dense = shape.n * shape.k * 0.52, 4 * shape.n * shape.k
    wanted = -(-2 * machine.l2_bytes // max(1, int(codes)))
    return max(2, min(wanted, 16, machine.memory_bytes // (2 * max(1, dense))))
