"""Planning: this thread's steps are collected, not run, for a card that need not be here."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import configs, environment


class _Plan(threading.local):
    steps: list[Any] | None = None
    arch: str = ""
    programs: int | None = None


_plan = _Plan()


@contextlib.contextmanager
def planning(arch: str, programs: int | None = None) -> Iterator[list[Any]]:
    """Inside, this thread's steps on meta tensors are collected and not run, as a card of `arch` would be given them.

    `programs`: the number of multiprocessors of the card; None: that of the largest card of its architecture.
    """
    before = _plan.steps, _plan.arch, _plan.programs
    _plan.steps, _plan.arch, _plan.programs = [], arch, programs
    try:
        yield _plan.steps
    finally:
        _plan.steps, _plan.arch, _plan.programs = before


def note(step: Any) -> bool:
    """Collect the step while planning; returns whether it was collected."""
    if _plan.steps is None:
        return False
    _plan.steps.append(step)
    return True


def is_planning() -> bool:
    """Whether this thread is planning: tensors have no values then."""
    return _plan.steps is not None


def arch_of(tensor: Tensor | QuantizedWeight) -> str:
    """The architecture that configurations are chosen for: the GPU's, the planned one, or "cpu" in the interpreter."""
    if _plan.steps is not None:
        return _plan.arch
    return environment.arch(tensor.device.index or 0) if tensor.device.type == "cuda" else "cpu"


def programs_of(tensor: Tensor, arch: str) -> int:
    """How many programs fill the card of a tensor, at one per multiprocessor."""
    if tensor.is_cuda:
        return environment.multiprocessors(tensor.device.index or 0)
    return _plan.programs or configs.programs(arch)
