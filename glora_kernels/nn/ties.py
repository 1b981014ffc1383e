"""Finding tensors that share memory: tied parameters, two parameters on one storage, views."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from glora_kernels.nn.frozen import FrozenBase


def owned(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module itself owns, by name: parameters, buffers, the codes and absmax of a 4-bit weight."""
    tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    if isinstance(module, FrozenBase) and module.quant_state is not None:
        tensors |= {"weight": module.weight, "weight.absmax": module.quant_state.absmax}
    return ((name, tensor) for name, tensor in tensors.items() if tensor is not None)


def memory(tensor: Tensor) -> object:
    """A key that is equal for all tensors on one storage; a tensor without memory (meta) has a key of its own."""
    pointer = tensor.untyped_storage().data_ptr()
    return (tensor.device, pointer) if pointer else id(tensor)


def same_place(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same memory, shape, strides and dtype."""
    if memory(left) != memory(right) or left.dtype != right.dtype:
        return False
    places = ((t.storage_offset(), t.shape, t.stride()) for t in (left, right))
    return next(places) == next(places)


def overlaps(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have any memory in common."""
    if memory(left) != memory(right):
        return False
    if left is right or same_place(left, right):
        return True
    (a, b), (c, d) = _bytes(left), _bytes(right)
    if b <= c or d <= a:
        return False
    if all(tensor.numel() == _span(tensor) for tensor in (left, right)):
        return True
    # One or both have gaps (slices of columns): compare byte by byte.
    first = min(a, c)
    marked = torch.zeros(max(b, d) - first, dtype=torch.bool)
    _view(marked, left, a - first).fill_(True)
    return bool(_view(marked, right, c - first).any())


def _span(tensor: Tensor) -> int:
    """The number of elements from the first to the last in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _bytes(tensor: Tensor) -> tuple[int, int]:
    first = int(tensor.storage_offset()) * tensor.itemsize
    return first, first + (_span(tensor) * tensor.itemsize if tensor.numel() else 0)


def _view(marked: Tensor, tensor: Tensor, offset: int) -> Tensor:
    sizes = (*tensor.shape, tensor.itemsize)
    return marked.as_strided(sizes, (*(stride * tensor.itemsize for stride in tensor.stride()), 1), offset)
