"""What every kernel shares: the product, the order of tiles, random numbers by position."""

import triton
import triton.language as tl

from glora_kernels.reference import random as stream

_PHILOX_ROUNDS = tl.constexpr(stream.PHILOX_ROUNDS)
_DITHER_ROW = tl.constexpr(stream.DITHER_ROW)
_DITHER_COL = tl.constexpr(stream.DITHER_COL)


@triton.jit
def _dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + left·right in fp32. UPCAST is for the interpreter, whose bfloat16 product is wrong.

    PRECISION "halves" multiplies fp32 by 16 bits, or by fp32, on the matrix unit: an operand is the sum of two halves
    in bfloat16, which has the range of fp32 (exact for fp16; 2⁻¹⁷ of an fp32 number is lost), and what both low halves
    give together is left out. Beside bfloat16, whose low half is zero, these are two products, else three.
    """
    if PRECISION == "halves":
        left_high = left.to(tl.bfloat16)
        right_high = right.to(tl.bfloat16)
        acc = _plain_dot(left_high, right_high, acc, "ieee", UPCAST)
        if left.dtype != tl.bfloat16:
            low = (left.to(tl.float32) - left_high.to(tl.float32)).to(tl.bfloat16)
            acc = _plain_dot(low, right_high, acc, "ieee", UPCAST)
        if right.dtype != tl.bfloat16:
            low = (right.to(tl.float32) - right_high.to(tl.float32)).to(tl.bfloat16)
            acc = _plain_dot(left_high, low, acc, "ieee", UPCAST)
        return acc
    else:
        return _plain_dot(left, right, acc, PRECISION, UPCAST)


@triton.jit
def _plain_dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _pick(values, g):
    """values[g] of a tuple, with g known at run time only."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(g == i, values[i], value)
    return value


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
def _vector_sum(part_ptr, stride_part, index, size, splits):
    """Σ_split part[split, index] in fp32."""
    total = tl.zeros_like(index).to(tl.float32)
    for split in range(splits):
        total += _load_vector(part_ptr + tl.cast(split, tl.int64) * stride_part, index, 1, size)
    return total


@triton.jit
def _load_shift(
    bias_ptr,
    stride_bias,
    wc_ptr,
    d_ptr,
    stride_d,
    e_ptr,
    stride_e,
    n,
    N,
    HAS_BIAS: tl.constexpr,
    HAS_WC: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_E: tl.constexpr,
):
    """β[n] = b[n]·(1+d[n]) + e[n] + wc[n] in fp32, of the terms there are."""
    beta = tl.zeros_like(n).to(tl.float32)
    if HAS_BIAS:
        beta += _load_vector(bias_ptr, n, stride_bias, N)
        if HAS_D:
            beta += beta * _load_vector(d_ptr, n, stride_d, N)
    if HAS_E:
        beta += _load_vector(e_ptr, n, stride_e, N)
    if HAS_WC:
        beta += _load_vector(wc_ptr, n, 1, N)
    return beta


@triton.jit
def _seed(seed, IS_POINTER: tl.constexpr):
    """The key of the dropout mask: a number from the host, or behind a pointer where a graph must redraw it."""
    if IS_POINTER:
        return tl.load(seed)
    else:
        return seed


@triton.jit
def _load_banded(ptr, stride_band, rows, cols, stride_row, stride_col, num_rows, num_cols, BANDS: tl.constexpr):
    """Σ_band ptr[band, rows, cols] in fp32: what several programs computed of one thin product, in a fixed order."""
    value = _load(ptr, rows, cols, stride_row, stride_col, num_rows, num_cols).to(tl.float32)
    for band in tl.static_range(1, BANDS):
        part = ptr + tl.cast(stride_band, tl.int64) * band
        value += _load(part, rows, cols, stride_row, stride_col, num_rows, num_cols).to(tl.float32)
    return value


@triton.jit
def _load_banded_vector(ptr, stride_band, index, size, BANDS: tl.constexpr):
    """Σ_band ptr[band, index] in fp32."""
    value = _load_vector(ptr, index, 1, size)
    for band in tl.static_range(1, BANDS):
        value += _load_vector(ptr + tl.cast(stride_band, tl.int64) * band, index, 1, size)
    return value


@triton.jit
def _low_rank(
    left_ptr,
    stride_left_band,
    stride_left_row,
    stride_left_r,
    right_ptr,
    stride_right_row,
    stride_right_r,
    rows,
    cols,
    num_rows,
    num_cols,
    R,
    BANDS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Σ_{r < R} left[i, r]·right[j, r], (ROWS, COLS), multiplied in DTYPE and added in fp32.

    From zeros, for the caller to add: one accumulator for this and a large product makes ptxas serialize the wgmma of
    that product (C7511).
    """
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        left = _load_banded(
            left_ptr, stride_left_band, rows, r, stride_left_row, stride_left_r, num_rows, R, BANDS
        )  # fmt: skip
        right = _load(right_ptr, r, cols, stride_right_r, stride_right_row, R, num_cols)
        acc = _dot(left.to(DTYPE), right.to(DTYPE), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _column_parts(tile, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """A tile as PARTS (1, 2 or 4) tiles of neighbouring columns, so that what is added to it needs few registers."""
    if PARTS == 1:
        return (tile,)
    else:
        left, right = tl.reshape(tile, (ROWS, 2, COLS // 2)).permute(0, 2, 1).split()
        if PARTS == 2:
            return (left, right)
        else:
            a, b = tl.reshape(left, (ROWS, 2, COLS // 4)).permute(0, 2, 1).split()
            c, d = tl.reshape(right, (ROWS, 2, COLS // 4)).permute(0, 2, 1).split()
            return (a, b, c, d)


@triton.jit
def _product_tile(
    acc,
    left,
    stride_left_row,
    stride_left_depth,
    right,
    stride_right_depth,
    stride_right_col,
    scale_ptr,
    stride_scale,
    row,
    col,
    num_rows,
    num_cols,
    depth,
    HAS_SCALE: tl.constexpr,
    TMA: tl.constexpr,
    RIGHT_IS_COLS_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """acc + the (ROWS, COLS) tile at (row, col) of (left∘(1+scale))·right, scale along the reduction.

    With TMA, left and right are tensor descriptors, `right` stored (cols, depth) or (depth, cols); without, they are
    pointers, read by cp.async.
    """
    i = row + tl.arange(0, ROWS)
    j = col + tl.arange(0, COLS)
    for d0 in range(0, depth, DEPTH):
        d = d0 + tl.arange(0, DEPTH)
        if TMA:
            x = left.load([row, d0])
        else:
            x = _load(left, i, d, stride_left_row, stride_left_depth, num_rows, depth)
        if HAS_SCALE:
            scale = 1.0 + _load_vector(scale_ptr, d, stride_scale, depth)[None, :]
            # Rounding x·(1+a) to nearest would give x again where a is small.
            x = _round(x.to(tl.float32) * scale, i, d, DTYPE)
        if TMA:
            if RIGHT_IS_COLS_FIRST:
                w = right.load([col, d0]).T
            else:
                w = right.load([d0, col])
        else:
            w = _load(right, d, j, stride_right_depth, stride_right_col, depth, num_cols).to(DTYPE)
        acc = _dot(x, w, acc, PRECISION, UPCAST)
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
