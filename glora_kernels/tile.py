"""Device functions that all kernels share: products, reading and writing tiles, added terms, dropout, rounding."""

import triton
import triton.language as tl

from glora_kernels.operands import Matrix, Vector, named_dtype
from glora_kernels.reference import random as stream

_PHILOX_ROUNDS = tl.constexpr(stream.PHILOX_ROUNDS)
_DITHER_ROW = tl.constexpr(stream.DITHER_ROW)
_DITHER_COL = tl.constexpr(stream.DITHER_COL)

dtype_of = triton.constexpr_function(named_dtype)
"""The dtype of a name, in a kernel. (Of a structure that is a constant, Triton 3.8 keeps the entries alone.)"""


@triton.jit
def dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + left·right in fp32. UPCAST is for the interpreter, whose bfloat16 product is wrong.

    PRECISION "halves" multiplies an fp32 operand by an fp32 or 16-bit one on the matrix unit. Each operand is written
    as a sum of two bfloat16 halves (exact for fp16; 2⁻¹⁷ of an fp32 number is lost), and the product of the two low
    halves is left out. That takes three products, or two if one operand is bfloat16, whose low half is zero.
    """
    if PRECISION == "halves":
        left_high = left.to(tl.bfloat16)
        right_high = right.to(tl.bfloat16)
        acc = plain_dot(left_high, right_high, acc, "ieee", UPCAST)
        if left.dtype != tl.bfloat16:
            low = (left.to(tl.float32) - left_high.to(tl.float32)).to(tl.bfloat16)
            acc = plain_dot(low, right_high, acc, "ieee", UPCAST)
        if right.dtype != tl.bfloat16:
            low = (right.to(tl.float32) - right_high.to(tl.float32)).to(tl.bfloat16)
            acc = plain_dot(left_high, low, acc, "ieee", UPCAST)
        return acc
    else:
        return plain_dot(left, right, acc, PRECISION, UPCAST)


@triton.jit
def dot_wide(left, right, acc, NUMERICS: tl.constexpr):
    """acc + left·right with the precision of large products."""
    PRECISION: tl.constexpr = NUMERICS.precision
    UPCAST: tl.constexpr = NUMERICS.upcast
    return dot(left, right, acc, PRECISION, UPCAST)


@triton.jit
def dot_thin(left, right, acc, NUMERICS: tl.constexpr):
    """acc + left·right with the precision of low-rank factors."""
    PRECISION: tl.constexpr = NUMERICS.factor_precision
    UPCAST: tl.constexpr = NUMERICS.upcast
    return dot(left, right, acc, PRECISION, UPCAST)


@triton.jit
def plain_dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def place_of(pid, num_i, num_j, GROUP: tl.constexpr):
    """The (i, j) tile of a program. GROUP row tiles are walked column by column, to share operands in the L2."""
    per_group = GROUP * num_j
    first = (pid // per_group) * GROUP
    size = tl.minimum(num_i - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def read(matrix, rows, cols, num_rows, num_cols):
    """The block matrix[rows, cols] with zeros outside (num_rows, num_cols); offsets are 64-bit."""
    offsets = rows.to(tl.int64)[:, None] * matrix.row + cols.to(tl.int64)[None, :] * matrix.col
    return tl.load(matrix.ptr + offsets, mask=(rows[:, None] < num_rows) & (cols[None, :] < num_cols), other=0.0)


@triton.jit
def write(matrix, value, rows, cols, num_rows, num_cols):
    """Store the block matrix[rows, cols] in the matrix's dtype; nothing outside (num_rows, num_cols)."""
    offsets = rows.to(tl.int64)[:, None] * matrix.row + cols.to(tl.int64)[None, :] * matrix.col
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    tl.store(matrix.ptr + offsets, value.to(matrix.ptr.dtype.element_ty), mask=mask)


@triton.jit
def read_vector(vector, index, size):
    """vector[index], of a `Vector` or a `Constant`, in fp32 with zeros outside."""
    if len(vector) == 1:
        return tl.where(index < size, tl.load(vector.ptr).to(tl.float32), 0.0)
    else:
        return tl.load(vector.ptr + index.to(tl.int64) * vector.step, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def transposed(matrix):
    return Matrix(matrix.ptr, matrix.col, matrix.row)


@triton.jit
def columns_from(matrix, first):
    """The matrix without its first `first` columns; all of it if that is None."""
    if first is None:
        return matrix
    else:
        return Matrix(matrix.ptr + first * matrix.col, matrix.row, matrix.col)


@triton.jit
def band(matrix, band, M):
    """Band `band` of a matrix (bands, M, C)."""
    return Matrix(matrix.ptr + tl.cast(M, tl.int64) * matrix.row * band, matrix.row, matrix.col)


@triton.jit
def read_banded(matrix, rows, cols, num_rows, num_cols, M, BANDS: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """Σ_band matrix[band, rows, cols] of (bands, M, C) in fp32, in a fixed order.

    TRANSPOSED: the same of the transposed matrix, whose rows, cols and sizes are then given.
    """
    if TRANSPOSED:
        matrix_row = matrix.col
        matrix_col = matrix.row
    else:
        matrix_row = matrix.row
        matrix_col = matrix.col
    offsets = rows.to(tl.int64)[:, None] * matrix_row + cols.to(tl.int64)[None, :] * matrix_col
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    if BANDS == 1:
        return tl.load(matrix.ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        # One load of all bands: loaded one by one, each would be converted to the layout of a product on its own.
        band = tl.arange(0, 2 if BANDS == 2 else (4 if BANDS <= 4 else 8))[:, None, None]
        offsets = band * (tl.cast(M, tl.int64) * matrix.row) + offsets[None, :, :]
        return tl.sum(tl.load(matrix.ptr + offsets, mask=(band < BANDS) & mask[None, :, :], other=0.0), 0)


@triton.jit
def read_banded_vector(vector, index, size, M, BANDS: tl.constexpr):
    """Σ_band vector[band, index] of (bands, M) in fp32."""
    value = read_vector(Vector(vector.ptr, vector.step), index, size)
    for band in tl.static_range(1, BANDS):
        value += read_vector(Vector(vector.ptr + tl.cast(M, tl.int64) * band, vector.step), index, size)
    return value


@triton.jit
def beta(shift, n, N):
    """β[n] of a `Shift` in fp32, zeros where it has no term."""
    beta = tl.zeros_like(n).to(tl.float32)
    if shift.bias is not None:
        beta += read_vector(shift.bias, n, N)
        if shift.d is not None:
            beta += beta * read_vector(shift.d, n, N)
    if shift.e is not None:
        beta += read_vector(shift.e, n, N)
    if shift.wc is not None:
        beta += read_vector(shift.wc, n, N)
    return beta


@triton.jit
def thin_product(
    low, right, rows, cols, M, num_cols, R, width,
    BANDS: tl.constexpr, NUMERICS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ_{r < R} low[i, r]·right[j, r], (ROWS, COLS) in fp32, with the precision of factors; low (bands, M, R).

    `width` ≥ R: how far the rows of low may be read. Beyond R they meet zeros, so they must hold finite numbers. The
    caller adds the result: sharing an accumulator with a large product makes ptxas serialize its wgmma (C7511).
    """
    acc = tl.zeros((ROWS, COLS), tl.float32)
    r = tl.arange(0, BLOCK_R)
    left = read_banded(low, rows, r, M, width, M, BANDS).to(dtype_of(NUMERICS.factor_name))
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        factor = read(transposed(right), r0 + r, cols, R, num_cols).to(dtype_of(NUMERICS.factor_name))
        acc = dot_thin(left, factor, acc, NUMERICS)
        # Loaded one step ahead: a value that the loop carries reaches a wgmma through shared memory, one made in the
        # same step through registers.
        left = read_banded(low, rows, r0 + BLOCK_R + r, M, width, M, BANDS).to(dtype_of(NUMERICS.factor_name))
    return acc


@triton.jit
def times_factor(
    left, right, cols, num_cols, R,
    NUMERICS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ_r left[i, r]·right[j, r], with left (ROWS, BLOCK_R) in registers, in the factors' dtype."""
    r = tl.arange(0, BLOCK_R)
    if ROWS == 1:  # there is no matrix instruction for one row
        factor = read(right, cols, r, num_cols, R).to(tl.float32)
        return tl.sum(factor * left.to(tl.float32), 1)[None, :]
    else:
        factor = read(transposed(right), r, cols, R, num_cols).to(dtype_of(NUMERICS.factor_name))
        return dot_thin(left, factor, tl.zeros((ROWS, COLS), tl.float32), NUMERICS)


@triton.jit
def add_terms(
    tile, terms, p_low, h_low, sigma, m, n, M, N, P, R,
    BANDS: tl.constexpr, NUMERICS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The (ROWS, COLS) tile (m, n) of y = Z∘(1+a) + P·Uᵀ + h·upᵀ + σ·bᵀ + β from that of Z; absent terms are None.

    p_low, h_low and sigma: P, h and σ in registers, of BLOCK_P and BLOCK_R columns. Where None, they are read from
    `terms.low` (bands, M, P+R) and `terms.sigma` (bands, M), BLOCK_R columns at a time.
    """
    if terms.a is not None:
        tile *= 1.0 + read_vector(terms.a, n, N)[None, :]
    if terms.u is not None:
        u = Matrix(terms.u, P, 1)
        if p_low is not None:
            tile += times_factor(p_low, u, n, N, P, NUMERICS, ROWS, COLS, BLOCK_P)
        else:
            tile += thin_product(terms.low, u, m, n, M, N, P, P, BANDS, NUMERICS, ROWS, COLS, BLOCK_R)
    if terms.up is not None:
        up = Matrix(terms.up, R, 1)
        if h_low is not None:
            tile += times_factor(h_low, up, n, N, R, NUMERICS, ROWS, COLS, BLOCK_R)
        else:
            h = columns_from(terms.low, None if terms.u is None else P)
            tile += thin_product(h, up, m, n, M, N, R, R, BANDS, NUMERICS, ROWS, COLS, BLOCK_R)
    if terms.b is not None:
        if sigma is None:
            sigma = read_banded_vector(terms.sigma, m, M, M, BANDS)
        tile += sigma[:, None] * read_vector(terms.b, n, N)[None, :]
    if terms.shift.bias is not None or terms.shift.e is not None or terms.shift.wc is not None:
        tile += beta(terms.shift, n, N)[None, :]
    return tile


@triton.jit
def left_block(left, row, i, d0, d, num_rows, depth, TMA: tl.constexpr):
    """The block of rows i (from `row` on) and depths d (from d0 on) of a tensor descriptor (TMA) or a matrix."""
    if TMA:
        return left.load([row, d0])
    else:
        return read(left, i, d, num_rows, depth)


@triton.jit
def right_block(
    right, col, j, d0, d, num_cols, depth, TMA: tl.constexpr, COLS_FIRST: tl.constexpr, NUMERICS: tl.constexpr
):  # fmt: skip
    """The block of depths d (from d0 on) and columns j (from `col` on) of `right`, in the dtype of products.

    right: a matrix (cols, depth); with TMA a tensor descriptor, (cols, depth) if COLS_FIRST, else (depth, cols).
    """
    if TMA:
        if COLS_FIRST:
            return right.load([col, d0]).T
        else:
            return right.load([d0, col])
    else:
        return read(transposed(right), d, j, depth, num_cols).to(dtype_of(NUMERICS.name))


@triton.jit
def product(
    acc, left, right, scale, row, col, num_rows, num_cols, depth,
    TMA: tl.constexpr, COLS_FIRST: tl.constexpr, NUMERICS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """acc + the (ROWS, COLS) tile at (row, col) of (left∘(1+scale))·rightᵀ, scale (depth,) or None."""
    i = row + tl.arange(0, ROWS)
    j = col + tl.arange(0, COLS)
    for d0 in range(0, depth, DEPTH):
        d = d0 + tl.arange(0, DEPTH)
        x = left_block(left, row, i, d0, d, num_rows, depth, TMA)
        if scale is not None:
            # With a dither, since rounding x·(1+a) to nearest would give x again where a is small.
            x = rounded(x.to(tl.float32) * (1.0 + read_vector(scale, d, depth)[None, :]), i, d, dtype_of(NUMERICS.name))
        w = right_block(right, col, j, d0, d, num_cols, depth, TMA, COLS_FIRST, NUMERICS)
        acc = dot_wide(x, w, acc, NUMERICS)
    return acc


@triton.jit
def put(out, part, row, col, m, n, M, N, TMA: tl.constexpr, NUMERICS: tl.constexpr):
    """Store the rows m (from `row` on) and columns n (from `col` on) of a result (M, N)."""
    if TMA:
        out.store([row, col], part.to(dtype_of(NUMERICS.name)))
    else:
        write(out, part, m, n, M, N)


@triton.jit
def vector_sum(part_ptr, stride_part, index, size, splits):
    """Σ_split part[split, index] in fp32."""
    total = tl.zeros_like(index).to(tl.float32)
    for split in range(splits):
        total += read_vector(Vector(part_ptr + tl.cast(split, tl.int64) * stride_part, 1), index, size)
    return total


@triton.jit
def seed_of(seed):
    """The dropout seed: a number from the host, or loaded from memory, which lets a CUDA graph redraw it."""
    if seed.dtype.is_ptr():
        return tl.load(seed)
    else:
        return seed


@triton.jit
def column_parts(tile, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """A tile as PARTS (1, 2, 4 or 8) tiles of neighbouring columns; adding terms to each needs few registers."""
    if PARTS == 1:
        return (tile,)
    else:
        left, right = tl.reshape(tile, (ROWS, 2, COLS // 2)).permute(0, 2, 1).split()
        if PARTS == 2:
            return (left, right)
        else:
            a, b = tl.reshape(left, (ROWS, 2, COLS // 4)).permute(0, 2, 1).split()
            c, d = tl.reshape(right, (ROWS, 2, COLS // 4)).permute(0, 2, 1).split()
            if PARTS == 4:
                return (a, b, c, d)
            else:
                a0, a1 = tl.reshape(a, (ROWS, 2, COLS // 8)).permute(0, 2, 1).split()
                b0, b1 = tl.reshape(b, (ROWS, 2, COLS // 8)).permute(0, 2, 1).split()
                c0, c1 = tl.reshape(c, (ROWS, 2, COLS // 8)).permute(0, 2, 1).split()
                d0, d1 = tl.reshape(d, (ROWS, 2, COLS // 8)).permute(0, 2, 1).split()
                return (a0, a1, b0, b1, c0, c1, d0, d1)


@triton.jit
def dropped(
    x, seed, rows, first_col, threshold, inv_keep, ROWS: tl.constexpr, COLS: tl.constexpr, columns_before=None
):  # fmt: skip
    """mask∘x·inv_keep of the (ROWS, COLS) block at (rows, first_col), first_col a multiple of 8.

    columns_before: where x is a part of a matrix, how many columns of that come before it, a multiple of 8; or None.

    Philox with the counter (col // 8, row, 0, 0) gives the 16-bit numbers of eight neighbouring columns.
    """
    group = first_col // 8 + tl.arange(0, COLS // 8)
    if columns_before is not None:
        group += columns_before // 8
    c0 = tl.broadcast_to(group[None, :], (ROWS, COLS // 8))
    c1 = tl.broadcast_to(rows[:, None], (ROWS, COLS // 8))
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, c1.to(tl.int32), zero, zero, n_rounds=_PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    numbers = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, COLS))
    return tl.where(numbers.to(tl.int32) >= threshold, x.to(tl.float32) * inv_keep, 0.0).to(x.dtype)


@triton.jit
def rounded(value, rows, cols, dtype: tl.constexpr):
    """fp32 → dtype; to 16 bits with the lattice dither, which keeps the mean (see `reference.random`)."""
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


@triton.jit
def exact_dot(left, right, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + left·right: operands of one dtype as they are (16-bit products are exact in fp32), others in fp32."""
    if left.dtype != right.dtype:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return dot(left, right, acc, PRECISION, UPCAST)


@triton.jit
def factor_product(
    pair, n, k, N, K, R,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σᵣ up[n,r]·down[r,k] of a pair, accumulated in fp32 (`exact_dot`); zeros at rank 0."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        up = read(pair.up, n, r, N, R)
        acc = exact_dot(up, read(pair.down, r, k, R, K), acc, PRECISION, UPCAST)
    return acc
