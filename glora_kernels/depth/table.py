"""Pointer tables: the operands of many layers for one kernel, as 64-bit integers on the device.

This module imports no kernel. It has the layers as data, the key that groups them into launches, and the tables.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime.environment import is_capturing

Entry = Tensor | int | float | None
"""An entry before it becomes an integer: a tensor its address, an int itself, a float its fp32 bits, None 0."""


class PointerTable(NamedTuple):
    """A table (members, columns) of int64 on the device. Keep it until the launch that reads it has been issued.

    The addresses are those of `tensors`, which the table keeps alive until then. Afterwards the order of the stream
    makes it safe to free them.
    """

    entries: Tensor
    tensors: tuple[Tensor, ...]


MAX_PRODUCT_RANK = 64
"""The largest rank of A in the product variant that the merge kernel takes, which holds W·A_up in registers."""


class Layer(NamedTuple):
    """One layer's operands. `adapter` has the names of `GLoRAConfig.parameter_shapes`; scale is s.

    weight: W (N,K), whichever of its strides is 1, or in 4 bits. bias: b (N,) or None. product: A=lora is the product
    variant.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    adapter: Mapping[str, Tensor]
    scale: float = 1.0
    product: bool = False

    @property
    def dense(self) -> Tensor:
        """W of a layer whose weight is not in 4 bits."""
        assert isinstance(self.weight, Tensor)
        return self.weight

    def names(self) -> list[str]:
        """The names of the layer's tensors other than W."""
        return [*(() if self.bias is None else ("bias",)), *self.adapter]

    def tensor(self, name: str) -> Tensor:
        found = self.bias if name == "bias" else self.adapter[name]
        assert found is not None
        return found

    def shifting(self) -> Layer:
        """The layer with only the tensors that β depends on."""
        shifting = {"C", "C_up", "C_down", "D", "E"}
        return Layer(self.weight, self.bias, {name: t for name, t in self.adapter.items() if name in shifting})

    def detached(self) -> Layer:
        bias = None if self.bias is None else self.bias.detach()
        adapter = {name: tensor.detach() for name, tensor in self.adapter.items()}
        return self._replace(weight=self.weight.detach(), bias=bias, adapter=adapter)


Copy = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A weight, its copy, a bias, its copy."""


class GroupKey(NamedTuple):
    """The properties that all layers of one launch share; `transposed`: W is stored (K,N)."""

    device: torch.device
    dtype: torch.dtype
    adapter: torch.dtype
    bias: torch.dtype
    transposed: bool


class SharedProduct(NamedTuple):
    """One layer's part of a shared factor's gradient: scale·leftᵀ·drop(right), left (M,R), right (M,C) row-major.

    Both in one dtype, or left in fp32 and right in 16 bits; the same dtypes for all products of a launch.

    seed: one int64 where dropout_p > 0; it must not change before the launch.
    """

    left: Tensor
    right: Tensor
    scale: float
    dropout_p: float
    seed: Tensor | None


class SharedFactor(NamedTuple):
    """The gradient of one shared factor: memory for it, out (R,C) of any strides, and the products to be summed."""

    out: Tensor
    products: Sequence[SharedProduct]


def group_key(layer: Layer) -> GroupKey | None:
    """The key of the launch that a layer belongs to; None if the kernels over depth do not take the layer.

    They take plain tensors of one device in fp32, fp16 or bf16, a weight that has a contiguous dimension and is not in
    4 bits, and a product variant up to MAX_PRODUCT_RANK.
    """
    weight, bias = layer.weight, layer.bias
    if isinstance(weight, QuantizedWeight):
        return None
    tensors = [weight, *layer.adapter.values(), *(() if bias is None else (bias,))]
    dtypes = {torch.float32, torch.float16, torch.bfloat16}
    if any(type(t.data) is not Tensor or t.device != weight.device or t.dtype not in dtypes for t in tensors):
        return None
    if layer.product and "A_up" in layer.adapter and layer.adapter["A_up"].shape[1] > MAX_PRODUCT_RANK:
        return None
    if bias is not None and not bias.is_contiguous():
        return None
    (n, k), (stride_n, stride_k) = weight.shape, weight.stride()
    if stride_k == 1 and (stride_n >= k or n == 1):
        transposed = False
    elif stride_n == 1 and (stride_k >= n or k == 1):
        transposed = True
    else:
        return None
    adapters = {t.dtype for t in layer.adapter.values()} or {weight.dtype}
    adapter = adapters.pop() if len(adapters) == 1 else torch.float32
    return GroupKey(weight.device, weight.dtype, adapter, weight.dtype if bias is None else bias.dtype, transposed)


def pointer_table(
    rows: Sequence[Mapping[str, Entry]], columns: Sequence[str], device: torch.device
) -> PointerTable:  # fmt: skip
    """A table with one row per member, copied to the device at once. A column missing in a row is 0.

    Args:
        rows: for each member column → entry. The kernel has no other source of strides and sizes.
        columns: every column, in the order of the kernel's.
        device: where the kernel runs. On "meta" the table has a shape and no values: a plan.

    Raises:
        KeyError: an entry for an unknown column.
        RuntimeError: a CUDA graph is being captured: its replays would read addresses that are no longer there.
    """
    tensors = tuple(entry for row in rows for entry in row.values() if isinstance(entry, Tensor))
    if device.type == "meta":
        return PointerTable(torch.empty(len(rows), len(columns), dtype=torch.int64, device=device), tensors)
    position = {name: i for i, name in enumerate(columns)}
    values = []
    for row in rows:
        line = [0] * len(columns)
        for name, entry in row.items():
            line[position[name]] = _integer(entry)
        values.append(line)
    if is_capturing(device):
        raise RuntimeError(
            "work over all layers at once cannot be captured in a CUDA graph; do it outside of the graph"
        )
    host = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return PointerTable(host.to(device, non_blocking=True), tensors)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all addresses are multiples of 16 bytes, so that kernels may read and write 16 at a time."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _integer(entry: Entry) -> int:
    if entry is None:
        return 0
    if isinstance(entry, Tensor):
        return entry.data_ptr()
    if isinstance(entry, float):
        return int(struct.unpack("<i", bytes(ctypes.c_float(entry)))[0])
    return int(entry)
