"""Device functions that decode a 4-bit weight to the same bits as `quant.codec`; below them, its kernel arguments."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glora_kernels.operands import Codes, Matrix, Nested
from glora_kernels.quant import QuantizedWeight
from glora_kernels.quant.codes import FP4, NF4
from glora_kernels.runtime.launch import matrix

_NF4 = tl.constexpr(NF4)
_FP4 = tl.constexpr(FP4)


@triton.jit
def _levels(KIND: tl.constexpr):
    """(16,) fp32: the level of each code of "nf4" or "fp4"."""
    tl.static_assert(KIND == "nf4" or KIND == "fp4", "KIND is nf4 or fp4")
    LEVELS: tl.constexpr = _NF4 if KIND == "nf4" else _FP4
    number = tl.arange(0, 16)
    level = tl.full((16,), LEVELS[0], tl.float32)
    for i in tl.static_range(1, 16):
        level = tl.where(number == i, LEVELS[i], level)
    return level


@triton.jit
def _decode(nibble, KIND: tl.constexpr):
    """The fp32 level of each 4-bit number, int32 of any shape.

    One shared-memory load an element (16 words, no bank conflict): half the instructions of a tree of 15 selections.
    """
    flat = tl.gather(_levels(KIND), tl.reshape(nibble, (nibble.numel,)), 0)
    return tl.reshape(flat, nibble.shape)


@triton.jit
def _absmax(codes, spans, block, mask):
    """The absmax of a block in fp32; `block` is counted from the end of `spans` whole spans (see `_weight_tile`)."""
    if codes.nested is None:
        return tl.load(codes.absmax + spans + block, mask=mask, other=0)
    else:
        value = tl.load(codes.absmax + spans * codes.nested.block + block, mask=mask, other=0)
        code = tl.load(codes.nested.code + value.to(tl.int32), mask=mask, other=0.0)
        scale = tl.load(codes.nested.absmax + spans + block // codes.nested.block, mask=mask, other=0.0)
        # Two roundings, as in bitsandbytes: a product written as an fma cannot be fused with the sum that follows.
        return tl.fma(code, scale, 0.0) + tl.load(codes.nested.offset)


@triton.jit
def _nearest(value, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 → DTYPE, to nearest even. UPCAST is for the interpreter, whose cast to bfloat16 truncates."""
    if UPCAST and tl.bfloat16 == DTYPE:
        raw = value.to(tl.int32, bitcast=True)
        value = ((raw + 0x7FFF + ((raw >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def _as_stored(value, codes, UPCAST: tl.constexpr):
    """fp32 rounded to the dtype that the weight was quantized from, in fp32."""
    if codes.dtype == "float32":
        return value
    elif codes.dtype == "float16":
        return _nearest(value, tl.float16, UPCAST).to(tl.float32)
    else:
        return _nearest(value, tl.bfloat16, UPCAST).to(tl.float32)


@triton.jit
def _weight_tile(codes, first_n, first_k, N, K, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """W[first_n + 0…BLOCK_N, first_k + 0…BLOCK_K), rounded to its dtype, in fp32; zeros outside (N, K).

    codes.words: K and first_k are multiples of 8 and the packed weight starts at a multiple of 4 bytes; eight
    neighbours of a row are then read as one word, with one absmax. Otherwise every element reads its byte and absmax.
    """
    # A span: the fewest codes that take up a whole number of entries of absmax, and of nested absmax.
    SPAN: tl.constexpr = codes.block if codes.nested is None else codes.block * codes.nested.block
    first = tl.cast(first_n, tl.int64) * K + first_k
    # Counted from the last whole span before the tile, positions fit in 32 bits while BLOCK_N·K is under 2^30.
    # Unsigned, so that a division by a power of two is a shift.
    spans = first // SPAN
    packed_ptr = codes.packed + spans * (SPAN // 2)
    i = tl.arange(0, BLOCK_N)[:, None]
    row = (first - spans * SPAN).to(tl.uint32) + (i * K).to(tl.uint32)
    if codes.words:
        j = tl.arange(0, BLOCK_K // 8)[None, :] * 8
        mask = (first_n + i < N) & (first_k + j < K)
        place = row + j.to(tl.uint32)
        word = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + place // 8, mask=mask, other=0)
        level = _decode(_unpack(word), codes.kind)
        w = tl.reshape(level * _absmax(codes, spans, place // codes.block, mask)[:, :, None], (BLOCK_N, BLOCK_K))
    else:
        j = tl.arange(0, BLOCK_K)[None, :]
        mask = (first_n + i < N) & (first_k + j < K)
        place = row + j.to(tl.uint32)
        byte = tl.load(packed_ptr + place // 2, mask=mask, other=0).to(tl.int32)
        level = _decode((byte >> (4 - 4 * (place % 2)).to(tl.int32)) & 15, codes.kind)
        w = level * _absmax(codes, spans, place // codes.block, mask)
    return _as_stored(w, codes, UPCAST)


@triton.jit
def _unpack(word):
    """The eight codes of each little-endian word of a block (rows, words), in the order of their elements.

    Shape (rows, words, 8). Made by joins, so that a thread holds what it unpacks.
    """
    half = tl.join(word, word >> 16)
    byte = tl.join(half, half >> 8)
    code = tl.join(byte >> 4, byte) & 15
    return tl.reshape(code, (word.shape[0], word.shape[1], 8))


@triton.jit
def _shifts(COUNT: tl.constexpr):
    """The shifts that extract the COUNT nibbles of a byte or little-endian word in element order: high nibble first."""
    i = tl.arange(0, COUNT)
    return (i // 2) * 8 + 4 - (i % 2) * 4


WORD_CODES = 8
"""How many codes a 32-bit word holds."""


def codes(weight: QuantizedWeight, words: bool = False) -> Codes:
    """The `Codes` of a weight, for a kernel; `words`: whether it may read whole words of codes."""
    state, nested = weight.state, weight.state.nested
    constants = (_constant(state.quant_type), _constant(state.blocksize), _constant(weight.dtype), _constant(words))
    more = None
    if nested is not None:
        more = Nested(nested.absmax, nested.code, nested.offset, _constant(nested.blocksize))
    return Codes(weight.packed, state.absmax, more, *constants)


def weight_operands(weight: Tensor | QuantizedWeight) -> dict[str, Matrix | Codes | None]:
    """A dense or 4-bit weight as the arguments of `glora.weight._read_weight`."""
    if isinstance(weight, Tensor):
        return {"w": matrix(weight), "codes": None}
    return {"w": None, "codes": codes(weight, reads_words(weight, weight.shape[1]))}


@functools.cache
def _constant(value: str | int | torch.dtype) -> Any:
    """A constexpr inside a structure of operands."""
    return tl.constexpr(str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value)


def reads_words(weight: QuantizedWeight, codes: int) -> bool:
    """Whether runs of this many codes can be read as whole, aligned 32-bit words."""
    return codes % WORD_CODES == 0 and weight.packed.data_ptr() % 4 == 0
