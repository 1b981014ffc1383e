"""What touches the weight, dense or in 4 bits, beside the large products: W_eff, the gradient of A, and W·c in β."""

import triton
import triton.language as tl

from glora_kernels.kernels.codec import _nearest, _weight_tile
from glora_kernels.kernels.common import (
    _dot,
    _dropped,
    _load,
    _load_banded,
    _load_vector,
    _round,
    _seed,
    _store,
    _tile_of,
    _vector_sum,
)


@triton.jit
def _factor_product(
    up_ptr,
    stride_un,
    stride_ur,
    down_ptr,
    stride_dr,
    stride_dk,
    n,
    k,
    N,
    K,
    R,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Σᵣ up[n,r]·down[r,k] in fp32."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        # In the adapter's own dtype, if it has one: a product of two 16-bit numbers is exact in fp32.
        up = _load(up_ptr, n, r, stride_un, stride_ur, N, R)
        down = _load(down_ptr, r, k, stride_dr, stride_dk, R, K)
        if up.dtype != down.dtype:
            up = up.to(tl.float32)
            down = down.to(tl.float32)
        acc = _dot(up, down, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _weff_tile(
    w,
    up_ptr,
    stride_un,
    stride_ur,
    down_ptr,
    stride_dr,
    stride_dk,
    n,
    k,
    N,
    K,
    R,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """w[n,k]·(1 + Σᵣ A_up[n,r]·A_down[r,k]) of the fp32 tile w, in fp32."""
    a = _factor_product(
        up_ptr, stride_un, stride_ur, down_ptr, stride_dr, stride_dk, n, k, N, K, R, PRECISION, UPCAST, BLOCK_N,
        BLOCK_K, BLOCK_R,
    )  # fmt: skip
    return w + w * a


@triton.jit
def _read_weight(
    w_ptr,
    stride_wn,
    stride_wk,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    first_n,
    first_k,
    last_n,
    K,
    QUANTIZED: tl.constexpr,
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
    """W[first_n + 0…BLOCK_N, first_k + 0…BLOCK_K) in fp32, zeros outside (last_n, K), dense or in 4 bits."""
    if QUANTIZED:
        return _weight_tile(
            w_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, first_n, first_k, last_n, K, CODE,
            BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, W_DTYPE, WORDS, UPCAST, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        n = first_n + tl.arange(0, BLOCK_N)
        k = first_k + tl.arange(0, BLOCK_K)
        return _load(w_ptr, n, k, stride_wn, stride_wk, last_n, K).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _hadamard_grad_kernel(
    dy_ptr,
    stride_dym,
    stride_dyn,
    x_ptr,
    stride_xm,
    stride_xk,
    w_ptr,
    stride_wn,
    stride_wk,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    up_ptr,
    stride_un,
    stride_ur,
    down_ptr,
    stride_dr,
    stride_dk,
    dup_ptr,
    stride_dup_part,
    ddown_ptr,
    stride_ddown_part,
    weff_ptr,
    s_ptr,
    stride_sb,
    stride_sm,
    stride_sr,
    db_down_ptr,
    seed,
    M,
    N,
    K,
    R,
    B_RANK,
    threshold,
    inv_keep,
    HAS_DUP: tl.constexpr,
    HAS_DDOWN: tl.constexpr,
    HAS_WEFF: tl.constexpr,
    HAS_DB_DOWN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CODE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    BANDS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    GROUP: tl.constexpr,
):
    """H = (Σₘ dy[m,n]·x[m,k])·W[n,k] in registers; dup[k-tile,n,r] = Σₖ H·A_down, ddown[n-tile,r,k] = Σₙ A_up·H.

    The programs hold each tile of W and of x anyway: with `weff` they leave W_eff for dx behind, and with `db_down`
    one more row of tiles, S in the place of dy, gives dB_down[r,k] = Σₘ S[m,r]·drop(x)[m,k].
    """
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    i, j = _tile_of(tl.program_id(0), num_n + (1 if HAS_DB_DOWN else 0), num_k, GROUP)
    k = j * BLOCK_K + tl.arange(0, BLOCK_K)
    if HAS_DB_DOWN:
        if i == num_n:
            b = tl.arange(0, BLOCK_B)
            db = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
            for m0 in range(0, M, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                x = _load(x_ptr, m, k, stride_xm, stride_xk, M, K)
                if HAS_DROPOUT:
                    x = _dropped(
                        x, _seed(seed, SEED_IS_POINTER), m, j * BLOCK_K, threshold, 1.0, BLOCK_M, BLOCK_K
                    )  # fmt: skip
                s = _load_banded(s_ptr, stride_sb, b, m, stride_sr, stride_sm, B_RANK, M, BANDS)
                db = _dot(s.to(FACTOR_DTYPE), x, db, FACTOR_PRECISION, UPCAST)
            _store(db_down_ptr, db * inv_keep, b, k, K, 1, B_RANK, K)
    if i < num_n:
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            dy = _load(dy_ptr, n, m, stride_dyn, stride_dym, N, M)
            x = _load(x_ptr, m, k, stride_xm, stride_xk, M, K)
            acc = _dot(dy, x, acc, PRECISION, UPCAST)
        w = _read_weight(
            w_ptr, stride_wn, stride_wk, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, i * BLOCK_N,
            j * BLOCK_K, N, K, QUANTIZED, CODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, W_DTYPE, WORDS, UPCAST,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if QUANTIZED:  # to what the dense weight would be: both then give the same numbers
            w = _nearest(w, DTYPE, UPCAST).to(tl.float32)
        h = (acc * w).to(FACTOR_DTYPE)
        if HAS_DUP:
            part = dup_ptr + tl.cast(j, tl.int64) * stride_dup_part
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                down = _load(down_ptr, k, r, stride_dk, stride_dr, K, R).to(FACTOR_DTYPE)
                value = _dot(h, down, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), FACTOR_PRECISION, UPCAST)
                _store(part, value, n, r, R, 1, N, R)
        if HAS_DDOWN:
            part = ddown_ptr + tl.cast(i, tl.int64) * stride_ddown_part
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                up = _load(up_ptr, r, n, stride_ur, stride_un, R, N).to(FACTOR_DTYPE)
                value = _dot(up, h, tl.zeros((BLOCK_R, BLOCK_K), tl.float32), FACTOR_PRECISION, UPCAST)
                _store(part, value, r, k, K, 1, R, K)
        if HAS_WEFF:
            # Read anew: kept in registers until here, it would make them spill.
            w = _read_weight(
                w_ptr, stride_wn, stride_wk, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, i * BLOCK_N,
                j * BLOCK_K, N, K, QUANTIZED, CODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, W_DTYPE, WORDS, UPCAST,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if QUANTIZED:  # to what the dense weight would be: both then give the same numbers
                w = _nearest(w, DTYPE, UPCAST).to(tl.float32)
            w = _weff_tile(
                w, up_ptr, stride_un, stride_ur, down_ptr, stride_dr, stride_dk, n, k, N, K, R,
                FACTOR_PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            _store(weff_ptr, _round(w, n, k, DTYPE), n, k, K, 1, N, K)


@triton.jit
def _wc_kernel(
    w_ptr,
    stride_wn,
    stride_wk,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    c_ptr,
    stride_c,
    c_up_ptr,
    stride_cuk,
    stride_cur,
    c_down_ptr,
    stride_cd,
    wc_ptr,
    N,
    K,
    R,
    LOW_RANK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    CODE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """wc[n] = Σₖ W[n,k]·c[k], c given or c[k] = Σᵣ C_up[k,r]·C_down[r]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if LOW_RANK:
            up = _load(c_up_ptr, k, r, stride_cuk, stride_cur, K, R).to(tl.float32)
            c = tl.sum(up * _load_vector(c_down_ptr, r, stride_cd, R)[None, :], 1)
        else:
            c = _load_vector(c_ptr, k, stride_c, K)
        w = _read_weight(
            w_ptr, stride_wn, stride_wk, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr,
            tl.program_id(0) * BLOCK_N, k0, N, K, QUANTIZED, CODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, W_DTYPE, WORDS,
            UPCAST, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total += tl.sum(w * c[None, :], 1)
    tl.store(wc_ptr + n, total, mask=n < N)


@triton.jit
def _wc_grad_kernel(
    w_ptr,
    stride_wn,
    stride_wk,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    g_ptr,
    stride_g,
    part_ptr,
    stride_part,
    N,
    K,
    rows_per_split,
    QUANTIZED: tl.constexpr,
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
    """part[split,k] = Σₙ W[n,k]·g[n] over the rows n of a split."""
    first_k = tl.program_id(0) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        w = _read_weight(
            w_ptr, stride_wn, stride_wk, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, n0, first_k,
            last, K, QUANTIZED, CODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, W_DTYPE, WORDS, UPCAST,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total += tl.sum(w * _load_vector(g_ptr, n, stride_g, last)[:, None], 0)
    tl.store(part_ptr + tl.cast(split, tl.int64) * stride_part + k, total, mask=k < K)


@triton.jit
def _c_grad_kernel(
    part_ptr,
    stride_part,
    c_up_ptr,
    stride_cuk,
    stride_cur,
    c_down_ptr,
    stride_cd,
    dc_ptr,
    dc_up_ptr,
    dc_down_ptr,
    K,
    R,
    splits,
    HAS_DC: tl.constexpr,
    HAS_DUP: tl.constexpr,
    HAS_DDOWN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dc[k] = Σ_split part, dC_up[k,r] = dc[k]·C_down[r] and, by the last program alone, dC_down[r] = Σₖ C_up·dc."""
    i = tl.program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    if i < blocks:
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        dc = _vector_sum(part_ptr, stride_part, k, K, splits)
        if HAS_DC:
            tl.store(dc_ptr + k, dc.to(dc_ptr.dtype.element_ty), mask=k < K)
        if HAS_DUP:
            value = dc[:, None] * _load_vector(c_down_ptr, r, stride_cd, R)[None, :]
            _store(dc_up_ptr, value, k, r, R, 1, K, R)
    elif HAS_DDOWN:
        total = tl.zeros((BLOCK_R,), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            dc = _vector_sum(part_ptr, stride_part, k, K, splits)
            total += tl.sum(_load(c_up_ptr, k, r, stride_cuk, stride_cur, K, R).to(tl.float32) * dc[:, None], 0)
        tl.store(dc_down_ptr + r, total.to(dc_down_ptr.dtype.element_ty), mask=r < R)
