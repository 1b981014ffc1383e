"""Several layers in one launch: the two large products of a group of LoRA layers.

Operands come as tuples, one entry a member. By pointers, a program selects its member's entries (`_pick`), for any
number of members; through descriptors (TMA), which cannot be selected at run time, each of up to four members has its
own copy of the loop in the kernel.
"""

import triton
import triton.language as tl

from glora_kernels.kernels.common import (
    _column_parts,
    _dot,
    _dropped,
    _load,
    _load_vector,
    _low_rank,
    _pick,
    _product_tile,
    _seed,
    _store,
    _tile_of,
)


@triton.jit
def _tiles(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.cdiv(rows, ROWS) * tl.cdiv(cols, COLS)


@triton.jit
def _member_of(tile, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(g, the first tile of member g) of a tile among all members' tiles."""
    g = tile * 0
    start = tile * 0
    first = tile * 0
    for i in tl.static_range(len(rows)):
        here = tile >= first
        g = tl.where(here, i, g)
        start = tl.where(here, first, start)
        first += _tiles(rows[i], cols[i], ROWS, COLS)
    return g, start


@triton.jit
def _fwd_tile(
    tile,
    x,
    stride_x,
    w,
    stride_wn,
    stride_wk,
    y,
    down,
    up,
    bias,
    bias_size,
    h,
    leaves_h,
    M,
    N,
    K,
    R,
    scale,
    HAS_DOWN: tl.constexpr,
    DOWN_INSIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    W_IS_ROW_MAJOR: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of one member's y (M,N) = x·Wᵀ + h·upᵀ + bias; with DOWN_INSIDE h = s·x·downᵀ is made beside it."""
    i, j = _tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DOWN_INSIDE:
        # hᵀ and not h: its few rows keep it on mma.sync. Two wgmma with their own accumulators would be serialized.
        low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        n = j * BLOCK_N + tl.arange(0, BLOCK_N)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            if TMA:
                a = x.load([i * BLOCK_M, k0])
                if W_IS_ROW_MAJOR:
                    b = w.load([j * BLOCK_N, k0]).T
                else:
                    b = w.load([k0, j * BLOCK_N])
            else:
                a = _load(x, m, k, stride_x, 1, M, K)
                b = _load(w, k, n, stride_wk, stride_wn, K, N).to(DTYPE)
            factor = _load(down, k, r, 1, K, K, R).to(FACTOR_DTYPE)
            acc = _dot(a, b, acc, PRECISION, UPCAST)
            low = _dot(a, factor, low, FACTOR_PRECISION, UPCAST)
        rounded = (scale * low).to(FACTOR_DTYPE)
        if (j == 0) & (leaves_h != 0):
            _store(h, rounded, m, r, R, 1, M, R)
    else:
        acc = _product_tile(
            acc, x, stride_x, 1, w, stride_wk, stride_wn, None, 0, i * BLOCK_M, j * BLOCK_N, M, N, K,
            False, TMA, W_IS_ROW_MAJOR, DTYPE, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    parts = _column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
    for q in tl.static_range(PARTS):
        part = parts[q]
        n0 = j * BLOCK_N + q * (BLOCK_N // PARTS)
        n = n0 + tl.arange(0, BLOCK_N // PARTS)
        if DOWN_INSIDE:
            factor = _load(up, r, n, 1, R, R, N).to(FACTOR_DTYPE)
            zeros = tl.zeros((BLOCK_M, BLOCK_N // PARTS), tl.float32)
            part += _dot(rounded, factor, zeros, FACTOR_PRECISION, UPCAST)
        elif HAS_DOWN:
            part += _low_rank(
                h, 0, R, 1, up, R, 1, m, n, M, N, R, 1, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST,
                BLOCK_M, BLOCK_N // PARTS, BLOCK_R,
            )  # fmt: skip
        if HAS_BIAS:
            part += _load_vector(bias, n, 1, bias_size)[None, :]
        if TMA:
            y.store([i * BLOCK_M, n0], part.to(DTYPE))
        else:
            _store(y, part, m, n, N, 1, M, N)


@triton.jit(do_not_specialize=["tiles"])
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
    stride_xs,
    ws,
    stride_ws,
    ys,
    downs,
    ups,
    biases,
    bias_sizes,
    hs,
    leave_h,
    Ms,
    Ns,
    Ks,
    Rs,
    scales,
    tiles,
    HAS_DOWN: tl.constexpr,
    DOWN_INSIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    W_IS_ROW_MAJOR: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y_i = x_i·W_iᵀ + h_i·up_iᵀ + bias_i of every member; h_i = s_i·x_i·down_iᵀ made inside, or given.

    Absent biases have size 0 and absent low-rank pairs rank 0: what stands in for their address is never read.
    """
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        if TMA:
            first = tile * 0
            x_list = (x0, x1, x2, x3)
            w_list = (w0, w1, w2, w3)
            y_list = (y0, y1, y2, y3)
            for g in tl.static_range(len(Ns)):
                count = _tiles(Ms[g], Ns[g], BLOCK_M, BLOCK_N)
                if (tile >= first) & (tile < first + count):
                    _fwd_tile(
                        tile - first, x_list[g], 0, w_list[g], 0, 0, y_list[g],
                        downs[g] if HAS_DOWN else None, ups[g] if HAS_DOWN else None,
                        biases[g] if HAS_BIAS else None, bias_sizes[g], hs[g] if HAS_DOWN else None, leave_h[g],
                        Ms[g], Ns[g], Ks[g], Rs[g], scales[g],
                        HAS_DOWN, DOWN_INSIDE, HAS_BIAS, TMA, W_IS_ROW_MAJOR, PARTS, DTYPE, PRECISION,
                        FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP,
                    )  # fmt: skip
                first += count
        else:
            g, start = _member_of(tile, Ms, Ns, BLOCK_M, BLOCK_N)
            stride_w = _pick(stride_ws, g)
            _fwd_tile(
                tile - start, _pick(xs, g), _pick(stride_xs, g), _pick(ws, g),
                stride_w if W_IS_ROW_MAJOR else 1, 1 if W_IS_ROW_MAJOR else stride_w, _pick(ys, g),
                _pick(downs, g) if HAS_DOWN else None, _pick(ups, g) if HAS_DOWN else None,
                _pick(biases, g) if HAS_BIAS else None, _pick(bias_sizes, g), _pick(hs, g) if HAS_DOWN else None,
                _pick(leave_h, g), _pick(Ms, g), _pick(Ns, g), _pick(Ks, g), _pick(Rs, g), _pick(scales, g),
                HAS_DOWN, DOWN_INSIDE, HAS_BIAS, TMA, W_IS_ROW_MAJOR, PARTS, DTYPE, PRECISION,
                FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP,
            )  # fmt: skip


@triton.jit
def _dx_rest(
    acc,
    dx,
    first_path,
    last_path,
    ss,
    stride_sbs,
    stride_sms,
    downs,
    Rs,
    seeds,
    i,
    j,
    M,
    K,
    threshold,
    inv_keep,
    HAS_DOWN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    BANDS: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store tile (i, j) of dx = acc + Σ_t mask_t∘(S_t·down_t)/(1-p) over the paths from `first_path` to `last_path`."""
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = _column_parts(acc, BLOCK_M, BLOCK_K, PARTS)
    for q in tl.static_range(PARTS):
        part = parts[q]
        k0 = j * BLOCK_K + q * (BLOCK_K // PARTS)
        k = k0 + tl.arange(0, BLOCK_K // PARTS)
        if HAS_DOWN:
            for t in range(first_path, last_path):
                term = _low_rank(
                    _pick(ss, t), _pick(stride_sbs, t), _pick(stride_sms, t), 1, _pick(downs, t), 1, K, m, k, M, K,
                    _pick(Rs, t), BANDS, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K // PARTS, BLOCK_R,
                )  # fmt: skip
                if HAS_DROPOUT:
                    seed = _seed(_pick(seeds, t), SEED_IS_POINTER)
                    term = _dropped(term, seed, m, k0, threshold, inv_keep, BLOCK_M, BLOCK_K // PARTS)
                part += term
        if TMA:
            dx.store([i * BLOCK_M, k0], part.to(DTYPE))
        else:
            _store(dx, part, m, k, K, 1, M, K)


@triton.jit(do_not_specialize=["threshold", "tiles"])
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
    stride_dys,
    ws,
    stride_ws,
    dxs,
    Ns,
    first_members,
    Ms,
    Ks,
    first_paths,
    ss,
    stride_sbs,
    stride_sms,
    downs,
    Rs,
    seeds,
    tiles,
    threshold,
    inv_keep,
    OWNERS: tl.constexpr,
    HAS_DOWN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    BANDS: tl.constexpr,
    TMA: tl.constexpr,
    W_IS_ROW_MAJOR: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx_o (M,K) = Σ_i dy_i·W_i over the members that read x_o, + Σ_t mask_t∘(S_t·down_t)/(1-p) over its paths.

    Members and paths stand in the order of their x: those of dx_o are first_members[o] to first_members[o+1], and
    likewise of paths. OWNERS: the o of every member, which the descriptors' form needs when it is compiled.
    """
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        if TMA:
            first = tile * 0
            dy_list = (dy0, dy1, dy2, dy3)
            w_list = (w0, w1, w2, w3)
            dx_list = (dx0, dx1, dx2, dx3)
            for o in tl.static_range(len(Ms)):
                count = _tiles(Ms[o], Ks[o], BLOCK_M, BLOCK_K)
                if (tile >= first) & (tile < first + count):
                    i, j = _tile_of(tile - first, tl.cdiv(Ms[o], BLOCK_M), tl.cdiv(Ks[o], BLOCK_K), GROUP)
                    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                    for g in tl.static_range(len(Ns)):
                        if OWNERS[g] == o:
                            acc = _product_tile(
                                acc, dy_list[g], 0, 1, w_list[g], 0, 0, None, 0, i * BLOCK_M, j * BLOCK_K,
                                Ms[o], Ks[o], Ns[g], False, TMA, not W_IS_ROW_MAJOR, DTYPE, PRECISION, UPCAST,
                                BLOCK_M, BLOCK_K, BLOCK_N,
                            )  # fmt: skip
                    _dx_rest(
                        acc, dx_list[o], first_paths[o], first_paths[o + 1], ss, stride_sbs, stride_sms, downs, Rs,
                        seeds, i, j, Ms[o], Ks[o], threshold, inv_keep, HAS_DOWN, HAS_DROPOUT, SEED_IS_POINTER, BANDS,
                        TMA, PARTS, DTYPE, PRECISION, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K, BLOCK_R,
                    )  # fmt: skip
                first += count
        else:
            o, start = _member_of(tile, Ms, Ks, BLOCK_M, BLOCK_K)
            M = _pick(Ms, o)
            K = _pick(Ks, o)
            i, j = _tile_of(tile - start, tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for g in range(_pick(first_members, o), _pick(first_members, o + 1)):
                stride_w = _pick(stride_ws, g)
                acc = _product_tile(
                    acc, _pick(dys, g), _pick(stride_dys, g), 1, _pick(ws, g),
                    stride_w if W_IS_ROW_MAJOR else 1, 1 if W_IS_ROW_MAJOR else stride_w, None, 0,
                    i * BLOCK_M, j * BLOCK_K, M, K, _pick(Ns, g), False, TMA, not W_IS_ROW_MAJOR,
                    DTYPE, PRECISION, UPCAST, BLOCK_M, BLOCK_K, BLOCK_N,
                )  # fmt: skip
            _dx_rest(
                acc, _pick(dxs, o), _pick(first_paths, o), _pick(first_paths, o + 1), ss, stride_sbs, stride_sms,
                downs, Rs, seeds, i, j, M, K, threshold, inv_keep, HAS_DOWN, HAS_DROPOUT, SEED_IS_POINTER, BANDS,
                TMA, PARTS, DTYPE, PRECISION, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip
