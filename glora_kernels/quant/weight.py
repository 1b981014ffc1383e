"""The quantized-weight type: packed 4-bit codes and the state that turns them back into numbers.

    w[i] = code[nibble i] · absmax[i // blocksize],   i = n·K + k: blocks run over the flat tensor

absmax is stored in fp32, or with double quantization (nested) as 8-bit codes:
absmax[j] = nested.code[absmax code j] · nested.absmax[j // nested.blocksize] + nested.offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glora_kernels.quant.codes import BLOCKSIZES, QUANT_TYPES
from glora_kernels.spec import check_choice

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that a weight can be quantized from."""


@dataclass(frozen=True)
class NestedState:
    """The data that dequantize the 8-bit absmax of a double-quantized weight.

    absmax: fp32, one number for each `blocksize` blocks of the weight. code: fp32 (256,). offset: fp32, one number.
    """

    absmax: Tensor
    code: Tensor
    blocksize: int
    offset: Tensor


@dataclass(frozen=True)
class QuantState:
    """The metadata of the packed codes of a weight (N, K).

    absmax: fp32 (blocks,), or uint8 (blocks,) where nested; blocks = ⌈N·K / blocksize⌉. quant_type: "nf4" or "fp4".
    dtype: of the weight that was quantized.

    It is immutable and checked once, here; the `QuantizedWeight`s that every call makes of it do not check it again.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: an unknown type or block size, a tensor of the wrong length, or on another device.
    """

    absmax: Tensor
    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested: NestedState | None = None

    def __post_init__(self) -> None:
        nested = self.nested
        check_choice("quant_type", self.quant_type, QUANT_TYPES)
        check_blocksize(self.blocksize)
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"a quantized weight has two sizes of at least 1; got shape {tuple(self.shape)}")
        if self.dtype not in DTYPES:
            raise TypeError(f"a 4-bit weight stands for float32, bfloat16 or float16; got {self.dtype}")
        blocks = -(-self.shape[0] * self.shape[1] // self.blocksize)
        _check_tensor("absmax", self.absmax, torch.float32 if nested is None else torch.uint8, blocks, self)
        if nested is None:
            return
        if type(nested.blocksize) is not int or nested.blocksize < 1:
            raise ValueError(f"nested blocksize must be an integer of at least 1, got {nested.blocksize!r}")
        _check_tensor("nested absmax", nested.absmax, torch.float32, -(-blocks // nested.blocksize), self)
        _check_tensor("nested code", nested.code, torch.float32, 256, self)
        _check_tensor("nested offset", nested.offset, torch.float32, 1, self, any_shape=True)
        for name, tensor in (("absmax", nested.absmax), ("code", nested.code), ("offset", nested.offset)):
            if tensor.device != self.absmax.device:
                raise ValueError(f"nested {name} is on {tensor.device}, but absmax is on {self.absmax.device}")

    def to(self, device: torch.device | str) -> QuantState:
        """The state with its tensors on a device; itself where they are there already."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> QuantState:
        """The state with `change` applied to every tensor; itself where none changes."""
        mine = self.tensors()
        changed = [change(tensor) for tensor in mine]
        return self if all(a is b for a, b in zip(changed, mine, strict=True)) else self._with(changed)

    def written(self, new: QuantState) -> QuantState:
        """The state `new`, with its numbers written into the memory of this state if they fit; else in new memory.

        A holder of the addresses (a captured CUDA graph, say) then reads the new numbers.
        """
        mine, theirs = self.tensors(), new.tensors()
        if len(mine) != len(theirs) or any(a.shape != b.shape for a, b in zip(mine, theirs, strict=True)):
            return new._with([tensor.to(self.absmax.device, copy=True) for tensor in theirs])
        written = []
        for into, values in zip(mine, theirs, strict=True):
            # Equal tensors are not written, since all bitsandbytes layers share one nested code.
            written.append(into if torch.equal(into, values) else into.copy_(values))
        return new._with(written)

    def copied(self, device: torch.device | str) -> QuantState:
        """A copy of the state on a device."""
        return self.map(lambda tensor: tensor.detach().to(device, copy=True))

    def _with(self, tensors: list[Tensor]) -> QuantState:
        if self.nested is None:
            return replace(self, absmax=tensors[0])
        nested = NestedState(tensors[1], tensors[2], self.nested.blocksize, tensors[3])
        return replace(self, absmax=tensors[0], nested=nested)

    def tensors(self) -> tuple[Tensor, ...]:
        nested = self.nested
        return (self.absmax,) if nested is None else (self.absmax, nested.absmax, nested.code, nested.offset)


@dataclass(frozen=True)
class QuantizedWeight:
    """W (N, K) in 4 bits; the operators take it in place of a dense weight.

    packed: uint8, ⌈N·K / 2⌉ bytes, contiguous, in any shape; element 2i is the high nibble of byte i. The checks here
    and in the state make sure that nothing is read out of bounds.

    Raises:
        TypeError: `packed` is of another dtype.
        ValueError: `packed` has another length, is not contiguous, or is on another device than the state.
    """

    packed: Tensor
    state: QuantState

    def __post_init__(self) -> None:
        packed, state = self.packed, self.state
        _check_tensor("packed", packed, torch.uint8, (self.numel() + 1) // 2, state, any_shape=True)
        if packed.device != state.absmax.device:
            raise ValueError(f"absmax is on {state.absmax.device}, the packed weight on {packed.device}")

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.state.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.state.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_cuda(self) -> bool:
        return self.packed.is_cuda

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def is_leaf(self) -> bool:
        return True

    def numel(self) -> int:
        return self.state.shape[0] * self.state.shape[1]

    @property
    def data(self) -> Tensor:
        """The data of the codes, as `Tensor.data` has it: its type tells a plain tensor from a wrapped one."""
        return self.packed.data

    def detach(self) -> QuantizedWeight:
        return QuantizedWeight(self.packed.detach(), self.state)

    def nbytes(self) -> int:
        """The size of the codes and their metadata in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.packed, *self.state.tensors()))


def _check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, size: int, state: QuantState, any_shape: bool = False
) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.numel() != size or not tensor.is_contiguous() or (tensor.ndim != 1 and not any_shape):
        raise ValueError(
            f"{name} of a {state.quant_type} weight {state.shape[0]}x{state.shape[1]} with blocks of "
            f"{state.blocksize} must hold {size} numbers in a row; got shape {tuple(tensor.shape)}"
        )


def check_blocksize(blocksize: int) -> None:
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}; got {blocksize!r}")
