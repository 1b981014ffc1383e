"""One reused buffer per (device, stream): the only place where something of the size of a weight is built.

A buffer is scratch memory between two kernels of one call: it is never saved, and its next user overwrites it. On a
GPU the stream orders its users; on a CPU each thread has its own buffer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from glora_kernels.modes import in_a_mode, outside_modes
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime.recording import recorded

workspace_lock = threading.RLock()
"""Held, on a GPU, from building something in the buffer until its reader is launched: without it, the launches of two
host threads on one stream could interleave."""

_cuda: dict[tuple[int, int], Tensor] = {}


class _Thread(threading.local):
    buffer: Tensor | None = None
    private: int = 0


_thread = _Thread()


@contextlib.contextmanager
def private_workspace() -> Iterator[None]:
    """Inside, this thread's calls allocate fresh memory and do not use the shared GPU buffer."""
    _thread.private += 1
    try:
        yield
    finally:
        _thread.private -= 1


def is_private() -> bool:
    """Whether this thread is inside `private_workspace`."""
    return bool(_thread.private)


def workspace_like(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """A contiguous view of the buffer in the shape of `weight`. Its contents are undefined."""
    if (recording := recorded()) is not None:
        return recording.workspace(tuple(weight.shape), dtype)
    size = weight.numel() * dtype.itemsize
    if in_a_mode() or type(weight.data) is not Tensor or weight.device.type not in ("cpu", "cuda"):
        # A fake or wrapped tensor must leave nothing behind in the buffer.
        buffer = torch.empty(size, dtype=torch.uint8, device=weight.device)
    else:
        buffer = workspace(size, weight.device)
    return buffer[:size].view(dtype).view(weight.shape)


def workspace(size: int, device: torch.device) -> Tensor:
    """The buffer of a device: a tensor of at least `size` bytes."""
    if device.type == "cuda":
        return _cuda_buffer(size, device)
    if _thread.buffer is None or _thread.buffer.numel() < size:
        _thread.buffer = _lasting(size, device)
    return _thread.buffer


def release() -> None:
    """Free the GPU buffers of this process and the CPU buffer of this thread."""
    _cuda.clear()
    _thread.buffer = None


def _cuda_buffer(size: int, device: torch.device) -> Tensor:
    # A captured graph writes to the same address at every replay, so it gets memory of its own pool, which reuses it.
    if _thread.private or torch.cuda.is_current_stream_capturing():
        return torch.empty(size, dtype=torch.uint8, device=device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    buffer = _cuda.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = _cuda[key] = _lasting(size, device)
    return buffer


def _lasting(size: int, device: torch.device) -> Tensor:
    """Allocate memory that later calls can write to as well, whatever mode this call is in."""
    with outside_modes():
        return torch.empty(size, dtype=torch.uint8, device=device)
