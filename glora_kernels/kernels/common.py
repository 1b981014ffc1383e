"""What every kernel shares: the product, the order of tiles, random numbers by position."""

import triton
import triton.language as tl

from glora_kernels.reference import random as stream

_PHILOX_ROUNDS = tl.constexpr(stream.PHILOX_ROUNDS)
_DITHER_ROW = tl.constexpr(stream.DITHER_ROW)
_DITHER_COL = tl.constexpr(stream.DITHER_COL)


@triton.jit
def _dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + left·right in fp32. UPCAST is for the interpreter, whose bfloat16 product is wrong."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _tile_of(pid, num_i, num_j, GROUP: tl.constexpr):
    """The (i, j) tile of a program: columns of GROUP row tiles, so that neighbours share operands in the L2."""
    per_group = GROUP * num_j
    first = (pid // per_group) * GROUP
    size = tl.minimum(num_i - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def _load(ptr, rows, cols, stride_row, stride_col, num_rows, num_cols):
    """The block ptr[rows, cols] with zeros outside (num_rows, num_cols); offsets are 64-bit."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offsets, mask=(rows[:, None] < num_rows) & (cols[None, :] < num_cols), other=0.0)


@triton.jit
def _store(ptr, value, rows, cols, stride_row, stride_col, num_rows, num_cols):
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_vector(ptr, index, stride, size):
    """ptr[index] in fp32 with zeros outside; stride 0 repeats a constant."""
    return tl.load(ptr + index.to(tl.int64) * stride, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def _low_rank(
    acc,
    left_ptr,
    stride_left_row,
    stride_left_r,
    right_ptr,
    stride_right_row,
    stride_right_r,
    rows,
    cols,
    num_rows,
    num_cols,
    first_r,
    last_r,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc[i, j] + Σ_{first_r ≤ r < last_r} left[i, r]·right[j, r]."""
    for r0 in tl.range(first_r, last_r, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        left = _load(left_ptr, rows, r, stride_left_row, stride_left_r, num_rows, last_r)
        right = _load(right_ptr, r, cols, stride_right_r, stride_right_row, last_r, num_cols)
        acc = _dot(left, right.to(left.dtype), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _dropped(x, seed, rows, first_col, threshold, inv_keep, ROWS: tl.constexpr, COLS: tl.constexpr):
    """mask∘x/(1-p) of the (ROWS, COLS) block at (rows, first_col), first_col a multiple of 8.

    The counter (col // 8, row, 0, 0) yields the 16-bit numbers of eight neighbouring columns.
    """
    group = first_col // 8 + tl.arange(0, COLS // 8)
    c0 = tl.broadcast_to(group[None, :], (ROWS, COLS // 8))
    c1 = tl.broadcast_to(rows[:, None], (ROWS, COLS // 8))
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1.to(tl.int32), zero, zero, n_rounds=_PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    numbers = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLS))
    return tl.where(numbers.to(tl.int32) >= threshold, x.to(tl.float32) * inv_keep, 0.0).to(x.dtype)


@triton.jit
def _round(value, rows, cols, dtype: tl.constexpr):
    """fp32 → dtype; to 16 bits with the lattice dither, which keeps the mean (see reference.random)."""
    if dtype == tl.float32:
        return value
    else:
        DROPPED: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
        lattice = rows.to(tl.uint32)[:, None] * _DITHER_ROW + cols.to(tl.uint32)[None, :] * _DITHER_COL
        bits = (lattice >> (32 - DROPPED)).to(tl.int32)
        raw = value.to(tl.int32, bitcast=True)
        rounded = ((raw + bits) & -(1 << DROPPED)).to(tl.float32, bitcast=True)
        # An infinity or a NaN (exponent all ones) has no last place to dither.
        finite = (raw & 0x7F800000) != 0x7F800000
        return tl.where(finite, rounded, value).to(dtype)
