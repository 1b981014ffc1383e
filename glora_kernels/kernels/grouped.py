"""Several layers in one launch: the two large products of a group of LoRA layers.

Operands come as tuples, one entry a member. By pointers, a program selects its member's entries (`_pick`), for any
number of members; through descriptors (TMA), which cannot be selected at run time nor stand in a tuple, each of up to
four members has its own copy of the loop in the kernel, and the tuples of pointers are None.
A weight is (columns of the result, depth) in both products, its rows contiguous (COLS_FIRST) or its columns.
"""

import triton
import triton.language as tl

from glora_kernels.kernels.common import (
    _column_parts,
    _dot_thin,
    _dot_wide,
    _dropped,
    _load_vector,
    _pick,
    _product,
    _read,
    _seed_of,
    _store,
    _thin_product,
    _tile_of,
    _times_factor,
    _transposed,
)
from glora_kernels.kernels.operands import Bias, Low, Matrix, Path

_GROUP = tl.constexpr(8)
"""How many row tiles share operands in the L2 (`common._tile_of`)."""


@triton.jit
def _rows(M, Ms, g):
    """The rows of member g: M, where not every member has its own."""
    if Ms is None:
        return M
    else:
        return _pick(Ms, g)


@triton.jit
def _pick_rows(matrices, g):
    """matrices[g], of matrices whose columns are neighbours, with g known at run time only."""
    ptr = matrices[0].ptr
    row = matrices[0].row
    for i in tl.static_range(1, len(matrices)):
        ptr = tl.where(g == i, matrices[i].ptr, ptr)
        row = tl.where(g == i, matrices[i].row, row)
    return Matrix(ptr, row, 1)


@triton.jit
def _pick_weight(weights, g, COLS_FIRST: tl.constexpr):
    """weights[g] (cols, depth), of weights whose rows are all contiguous (COLS_FIRST), or all of whose columns are."""
    if COLS_FIRST:
        return _pick_rows(weights, g)
    else:
        ptr = weights[0].ptr
        col = weights[0].col
        for i in tl.static_range(1, len(weights)):
            ptr = tl.where(g == i, weights[i].ptr, ptr)
            col = tl.where(g == i, weights[i].col, col)
        return Matrix(ptr, 1, col)


@triton.jit
def _pick_low(lows, g):
    low = lows[0]
    for i in tl.static_range(1, len(lows)):
        other = lows[i]
        low = Low(
            tl.where(g == i, other.up, low.up),
            tl.where(g == i, other.h, low.h),
            tl.where(g == i, other.leaves, low.leaves),
            tl.where(g == i, other.rank, low.rank),
            tl.where(g == i, other.scale, low.scale),
        )
    return low


@triton.jit
def _pick_path(paths, t):
    path = paths[0]
    for i in tl.static_range(1, len(paths)):
        other = paths[i]
        path = Path(
            tl.where(t == i, other.s, path.s),
            tl.where(t == i, other.down, path.down),
            tl.where(t == i, other.rank, path.rank),
        )
    return path


@triton.jit
def _pick_bias(biases, g):
    bias = biases[0]
    for i in tl.static_range(1, len(biases)):
        bias = Bias(tl.where(g == i, biases[i].ptr, bias.ptr), tl.where(g == i, biases[i].size, bias.size))
    return bias


@triton.jit
def _tiles(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.cdiv(rows, ROWS) * tl.cdiv(cols, COLS)


@triton.jit
def _member_of(tile, M, Ms, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(g, the first tile of member g) of a tile among all members' tiles."""
    g = tile * 0
    start = tile * 0
    first = tile * 0
    for i in tl.static_range(len(cols)):
        here = tile >= first
        g = tl.where(here, i, g)
        start = tl.where(here, first, start)
        first += _tiles(_rows(M, Ms, i), cols[i], ROWS, COLS)
    return g, start


@triton.jit
def _fwd_tile(
    tile,
    x,
    w,
    y,
    low,
    down,
    bias,
    M,
    N,
    K,
    TMA: tl.constexpr,
    COLS_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of one member's y (M,N) = x·Wᵀ + h·upᵀ + bias; with `down`, h = s·x·downᵀ is made beside it."""
    i, j = _tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), _GROUP)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if down is None:
        acc = _product(
            acc, x, w, None, i * BLOCK_M, j * BLOCK_N, M, N, K, TMA, COLS_FIRST, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        r = tl.arange(0, BLOCK_R)
        n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            if TMA:
                a = x.load([i * BLOCK_M, k0])
                if COLS_FIRST:
                    b = w.load([j * BLOCK_N, k0]).T
                else:
                    b = w.load([k0, j * BLOCK_N])
            else:
                a = _read(x, m, k, M, K)
                b = _read(_transposed(w), k, n, K, N).to(NUMERICS.dtype)
            factor = _read(Matrix(down, 1, K), k, r, K, low.rank).to(NUMERICS.factor_dtype)
            acc = _dot_wide(a, b, acc, NUMERICS)
            h = _dot_thin(a, factor, h, NUMERICS)
        h = (low.scale * h).to(NUMERICS.factor_dtype)
        if (j == 0) & (low.leaves != 0):
            _store(low.h, h, m, r, low.rank, 1, M, low.rank)
    parts = _column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
    for q in tl.static_range(PARTS):
        part = parts[q]
        n0 = j * BLOCK_N + q * (BLOCK_N // PARTS)
        n = n0 + tl.arange(0, BLOCK_N // PARTS)
        if low is not None:
            up = Matrix(low.up, low.rank, 1)
            if down is None:
                part += _thin_product(
                    Matrix(low.h, low.rank, 1), up, m, n, M, N, low.rank, low.rank, 1, NUMERICS,
                    BLOCK_M, BLOCK_N // PARTS, 16,
                )  # fmt: skip
            else:
                part += _times_factor(h, up, n, N, low.rank, NUMERICS, BLOCK_M, BLOCK_N // PARTS, BLOCK_R)
        if bias is not None:
            part += _load_vector(bias.ptr, n, 1, bias.size)[None, :]
        if TMA:
            y.store([i * BLOCK_M, n0], part.to(NUMERICS.dtype))
        else:
            _store(y, part, m, n, N, 1, M, N)


@triton.jit(do_not_specialize=["M", "tiles"])
def _grouped_fwd_kernel(
    x0,
    x1,
    x2,
    x3,
    w0,
    w1,
    w2,
    w3,
    y0,
    y1,
    y2,
    y3,
    xs,
    ws,
    ys,
    lows,
    downs,
    biases,
    M,
    Ms,
    Ns,
    Ks,
    tiles,
    COLS_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y_i = x_i·W_iᵀ + h_i·up_iᵀ + bias_i of every member; h_i = s_i·x_i·down_iᵀ made inside, or given (downs None).

    Where some members have a bias or a low-rank pair, those that have none get one of size or rank 0, whose address
    is never read.
    """
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        if xs is None:
            first = tile * 0
            x_list = (x0, x1, x2, x3)
            w_list = (w0, w1, w2, w3)
            y_list = (y0, y1, y2, y3)
            for g in tl.static_range(len(Ns)):
                rows = _rows(M, Ms, g)
                count = _tiles(rows, Ns[g], BLOCK_M, BLOCK_N)
                if (tile >= first) & (tile < first + count):
                    _fwd_tile(
                        tile - first, x_list[g], w_list[g], y_list[g], None if lows is None else lows[g],
                        None if downs is None else downs[g], None if biases is None else biases[g],
                        rows, Ns[g], Ks[g], True, COLS_FIRST, PARTS, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
                    )  # fmt: skip
                first += count
        else:
            g, start = _member_of(tile, M, Ms, Ns, BLOCK_M, BLOCK_N)
            _fwd_tile(
                tile - start, _pick_rows(xs, g), _pick_weight(ws, g, COLS_FIRST), _pick(ys, g),
                None if lows is None else _pick_low(lows, g), None if downs is None else _pick(downs, g),
                None if biases is None else _pick_bias(biases, g),
                _rows(M, Ms, g), _pick(Ns, g), _pick(Ks, g), False, COLS_FIRST, PARTS, NUMERICS,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip


@triton.jit
def _dx_rest(
    acc,
    dx,
    paths,
    first_path,
    last_path,
    masks,
    i,
    j,
    M,
    K,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store tile (i, j) of dx = acc + Σ_t mask_t∘(S_t·down_t)/(1-p) over the paths from `first_path` to `last_path`."""
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = _column_parts(acc, BLOCK_M, BLOCK_K, PARTS)
    for q in tl.static_range(PARTS):
        part = parts[q]
        k0 = j * BLOCK_K + q * (BLOCK_K // PARTS)
        k = k0 + tl.arange(0, BLOCK_K // PARTS)
        if paths is not None:
            for t in range(first_path, last_path):
                path = _pick_path(paths, t)
                term = _thin_product(
                    Matrix(path.s, path.rank, 1), Matrix(path.down, 1, K), m, k, M, K, path.rank, path.rank, 1,
                    NUMERICS, BLOCK_M, BLOCK_K // PARTS, 16,
                )  # fmt: skip
                if masks is not None:
                    seed = _seed_of(_pick(masks.seeds, t))
                    threshold = tl.cast(masks.threshold, tl.int32)
                    term = _dropped(term, seed, m, k0, threshold, masks.inv_keep, BLOCK_M, BLOCK_K // PARTS)
                part += term
        if TMA:
            dx.store([i * BLOCK_M, k0], part.to(NUMERICS.dtype))
        else:
            _store(dx, part, m, k, K, 1, M, K)


@triton.jit(do_not_specialize=["M", "tiles"])
def _grouped_dx_kernel(
    dy0,
    dy1,
    dy2,
    dy3,
    w0,
    w1,
    w2,
    w3,
    dx0,
    dx1,
    dx2,
    dx3,
    dys,
    ws,
    dxs,
    paths,
    masks,
    M,
    Ms,
    Ns,
    Ks,
    tiles,
    FIRST_MEMBERS: tl.constexpr,
    FIRST_PATHS: tl.constexpr,
    COLS_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx_o (M,K) = Σ_i dy_i·W_i over the members that read x_o, + Σ_t mask_t∘(S_t·down_t)/(1-p) over its paths.

    Members and paths stand in the order of their x: those of dx_o are FIRST_MEMBERS[o] to FIRST_MEMBERS[o+1], and
    likewise of paths. Ms and Ks are those of the dx_o.
    """
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        if dys is None:
            first = tile * 0
            dy_list = (dy0, dy1, dy2, dy3)
            w_list = (w0, w1, w2, w3)
            dx_list = (dx0, dx1, dx2, dx3)
            for o in tl.static_range(len(Ks)):
                rows = _rows(M, Ms, o)
                count = _tiles(rows, Ks[o], BLOCK_M, BLOCK_K)
                if (tile >= first) & (tile < first + count):
                    i, j = _tile_of(tile - first, tl.cdiv(rows, BLOCK_M), tl.cdiv(Ks[o], BLOCK_K), _GROUP)
                    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                    for g in tl.static_range(len(Ns)):
                        if g >= FIRST_MEMBERS[o] and g < FIRST_MEMBERS[o + 1]:
                            acc = _product(
                                acc, dy_list[g], w_list[g], None, i * BLOCK_M, j * BLOCK_K, rows, Ks[o], Ns[g],
                                True, COLS_FIRST, NUMERICS, BLOCK_M, BLOCK_K, BLOCK_N,
                            )  # fmt: skip
                    _dx_rest(
                        acc, dx_list[o], paths, FIRST_PATHS[o], FIRST_PATHS[o + 1], masks, i, j, rows, Ks[o],
                        True, PARTS, NUMERICS, BLOCK_M, BLOCK_K,
                    )  # fmt: skip
                first += count
        else:
            o, start = _member_of(tile, M, Ms, Ks, BLOCK_M, BLOCK_K)
            rows = _rows(M, Ms, o)
            K = _pick(Ks, o)
            i, j = _tile_of(tile - start, tl.cdiv(rows, BLOCK_M), tl.cdiv(K, BLOCK_K), _GROUP)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for g in range(_pick(FIRST_MEMBERS, o), _pick(FIRST_MEMBERS, o + 1)):
                acc = _product(
                    acc, _pick_rows(dys, g), _pick_weight(ws, g, COLS_FIRST), None,
                    i * BLOCK_M, j * BLOCK_K, rows, K, _pick(Ns, g), False, COLS_FIRST, NUMERICS,
                    BLOCK_M, BLOCK_K, BLOCK_N,
                )  # fmt: skip
            _dx_rest(
                acc, _pick(dxs, o), paths, _pick(FIRST_PATHS, o), _pick(FIRST_PATHS, o + 1), masks, i, j, rows, K,
                False, PARTS, NUMERICS, BLOCK_M, BLOCK_K,
            )  # fmt: skip
