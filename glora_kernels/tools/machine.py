"""What `tune` measures on: a device and its clock, and what a launch that fails there says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from glora_kernels.runtime import environment
from glora_kernels.tools import timing


@dataclass(frozen=True)
class Machine:
    """What is measured on, and by which clock."""

    name: str
    arch: str
    device: str
    timer: timing.Timer
    l2_bytes: int = 0
    memory_bytes: int = 1 << 34
    synchronize: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.monotonic


class Failed(Exception):
    """The default itself, or everything there is to choose from, could not be measured."""


def this_gpu() -> Machine:
    """The current GPU.

    Raises:
        RuntimeError: PyTorch sees none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures on a GPU, and PyTorch sees none here")
    index = torch.cuda.current_device()
    return Machine(
        environment.device_name(index), environment.arch(index), "cuda", timing.graph_timer,
        environment.l2_bytes(index), torch.cuda.mem_get_info(index)[0], torch.cuda.synchronize,
    )  # fmt: skip


def why(error: Exception, machine: Machine) -> str:
    """One line on a launch that failed.

    Raises:
        RuntimeError: the device answers no more.
    """
    try:
        machine.synchronize()
    except Exception as broken:
        raise RuntimeError(
            "the device answers no more after a failed launch; what was measured before is in the table. Run again, "
            "with --kernels to leave out the kernel that failed"
        ) from broken
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
