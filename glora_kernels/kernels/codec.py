"""4-bit weights on the device: levels, absmax, and a tile of W out of packed codes, bit for bit `quant.codec`."""

import triton
import triton.language as tl

from glora_kernels.quant import codes

_NF4 = tl.constexpr(codes.NF4)
_FP4 = tl.constexpr(codes.FP4)


@triton.jit
def _levels(CODE: tl.constexpr):
    """(16,) fp32: the level of each code of "nf4" or "fp4"."""
    tl.static_assert(CODE == "nf4" or CODE == "fp4", "CODE is nf4 or fp4")
    LEVELS: tl.constexpr = _NF4 if CODE == "nf4" else _FP4
    number = tl.arange(0, 16)
    level = tl.full((16,), LEVELS[0], tl.float32)
    for i in tl.static_range(1, 16):
        level = tl.where(number == i, LEVELS[i], level)
    return level


@triton.jit
def _decode(nibble, CODE: tl.constexpr):
    """The fp32 level of each 4-bit number, int32 of any shape.

    One shared-memory load an element (16 words, no bank conflict): half the instructions of a tree of 15 selections.
    """
    flat = tl.gather(_levels(CODE), tl.reshape(nibble, (nibble.numel,)), 0)
    return tl.reshape(flat, nibble.shape)


@triton.jit
def _absmax(
    absmax_ptr,
    block,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    mask,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
):
    """absmax[block] in fp32, or code[absmax[block]]·nested_absmax[block // NESTED_BLOCKSIZE] + offset where nested."""
    value = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        code = tl.load(nested_code_ptr + value.to(tl.int32), mask=mask, other=0.0)
        scale = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        # Two roundings, as bitsandbytes takes them: no compiler may merge a product written as fma with a sum.
        value = tl.fma(code, scale, 0.0) + tl.load(offset_ptr)
    return value


@triton.jit
def _nearest(value, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 → DTYPE, to nearest even. UPCAST is for the interpreter, whose cast to bfloat16 truncates."""
    if UPCAST and DTYPE == tl.bfloat16:
        raw = value.to(tl.int32, bitcast=True)
        value = ((raw + 0x7FFF + ((raw >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def _weight_tile(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    first_n,
    first_k,
    N,
    K,
    CODE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W[first_n + 0…BLOCK_N, first_k + 0…BLOCK_K), rounded to W_DTYPE, in fp32; zeros outside (N, K).

    WORDS: K and first_k are multiples of 8 and the packed weight starts at a multiple of 4 bytes; eight neighbours of a
    row are then read as one word, with one absmax. Without, every element reads its byte and absmax.
    """
    SPAN: tl.constexpr = BLOCKSIZE * NESTED_BLOCKSIZE if NESTED else BLOCKSIZE
    first = tl.cast(first_n, tl.int64) * K + first_k
    # From the last whole span before the tile on, positions take 32 bits while BLOCK_N·K is under 2^30. Unsigned, so
    # that a division by a power of two is a shift.
    spans = first // SPAN
    packed_ptr += spans * (SPAN // 2)
    absmax_ptr += spans * (SPAN // BLOCKSIZE)
    if NESTED:
        nested_absmax_ptr += spans
    i = tl.arange(0, BLOCK_N)[:, None]
    row = (first - spans * SPAN).to(tl.uint32) + (i * K).to(tl.uint32)
    if WORDS:
        j = tl.arange(0, BLOCK_K // 8)[None, :] * 8
        mask = (first_n + i < N) & (first_k + j < K)
        place = row + j.to(tl.uint32)
        word = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + place // 8, mask=mask, other=0)
        absmax = _absmax(
            absmax_ptr, place // BLOCKSIZE, nested_absmax_ptr, nested_code_ptr, offset_ptr, mask, NESTED,
            NESTED_BLOCKSIZE,
        )  # fmt: skip
        level = _decode(_unpack(word), CODE)
        w = tl.reshape(level * absmax[:, :, None], (BLOCK_N, BLOCK_K))
    else:
        j = tl.arange(0, BLOCK_K)[None, :]
        mask = (first_n + i < N) & (first_k + j < K)
        place = row + j.to(tl.uint32)
        byte = tl.load(packed_ptr + place // 2, mask=mask, other=0).to(tl.int32)
        absmax = _absmax(
            absmax_ptr, place // BLOCKSIZE, nested_absmax_ptr, nested_code_ptr, offset_ptr, mask, NESTED,
            NESTED_BLOCKSIZE,
        )  # fmt: skip
        w = _decode((byte >> (4 - 4 * (place % 2)).to(tl.int32)) & 15, CODE) * absmax
    return _nearest(w, W_DTYPE, UPCAST).to(tl.float32)


@triton.jit
def _unpack(word):
    """The eight codes of each little-endian word of a block (rows, words), in the order of their elements.

    By joins, so that a thread holds what it unpacks: (rows, words, 8).
    """
    half = tl.join(word, word >> 16)
    byte = tl.join(half, half >> 8)
    code = tl.join(byte >> 4, byte) & 15
    return tl.reshape(code, (word.shape[0], word.shape[1], 8))


@triton.jit
def _shifts(COUNT: tl.constexpr):
    """Where the COUNT nibbles of a byte or a little-endian word begin, in the order of their elements: high first."""
    i = tl.arange(0, COUNT)
    return (i // 2) * 8 + 4 - (i % 2) * 4
