"""One reused buffer a (device, stream): the only place where something of the size of a weight is ever built.

A buffer is scratch between two kernels of one call: it is never saved, and its next user overwrites it. On a
GPU the stream orders the users; on a CPU each thread has its own.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

workspace_lock = threading.RLock()
"""On a GPU, held from building something in the buffer until its reader is launched: two host threads on one
stream would otherwise launch in any order."""

_cpu = threading.local()
_cuda: dict[tuple[int, int], Tensor] = {}
_captured: list[Tensor] = []


def workspace_like(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous view of the buffer in the shape of `weight`, with whatever its last user left in it."""
    device = weight.device
    size = weight.numel() * dtype.itemsize
    if type(weight.data) is not Tensor:  # a fake or wrapped tensor must leave nothing behind in the buffer
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
    elif device.type == "cuda":
        buffer = _cuda_buffer(size, device)
    elif device.type == "cpu":
        if not hasattr(_cpu, "buffer") or _cpu.buffer.numel() < size:
            _cpu.buffer = torch.empty(size, dtype=torch.uint8)
        buffer = _cpu.buffer
    else:
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size].view(dtype).view(weight.shape)


def release() -> None:
    """Free the buffers of this process (those a CUDA graph has captured stay, for the graph still writes them)."""
    _cuda.clear()
    _cpu.__dict__.clear()


def _cuda_buffer(size: int, device: torch.device) -> Tensor:
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    buffer = _cuda.get(key)
    if buffer is None or buffer.numel() < size:
        buffer = _cuda[key] = torch.empty(size, dtype=torch.uint8, device=device)
    # A replayed graph writes to the address it captured: such a buffer must outlive a later, larger one.
    if torch.cuda.is_current_stream_capturing() and all(kept is not buffer for kept in _captured):
        _captured.append(buffer)
    return buffer
