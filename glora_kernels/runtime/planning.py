"""Whether this thread's steps are run, or collected for a card that need not be here; and which card that is."""

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
    """Inside, this thread's steps are collected and not run: what a card of `arch` would be given, without one.

    For meta tensors. `programs`: the multiprocessors of the card, those of the largest of its architecture where not
    given.
    """
    before = _plan.steps, _plan.arch, _plan.programs
    _plan.steps, _plan.arch, _plan.programs = [], arch, programs
    try:
        yield _plan.steps
    finally:
        _plan.steps, _plan.arch, _plan.programs = before


def note(step: Any) -> bool:
    """Whether steps are collected, as this one is then."""
    if _plan.steps is None:
        return False
    _plan.steps.append(step)
    return True


def is_planning() -> bool:
    """Whether steps are collected: what they would write has no values."""
    return _plan.steps is not None


def arch_of(tensor: Tensor | QuantizedWeight) -> str:
    """The architecture that the configurations are chosen for: a GPU's, or "cpu" in the interpreter."""
    if _plan.steps is not None:
        return _plan.arch
    return environment.arch(tensor.device.index or 0) if tensor.device.type == "cuda" else "cpu"


def programs_of(tensor: Tensor, arch: str) -> int:
    """How many programs keep the card of a tensor busy at one a multiprocessor."""
    if tensor.is_cuda:
        return environment.multiprocessors(tensor.device.index or 0)
    return _plan.programs or configs.programs(arch)
