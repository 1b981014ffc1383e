"""The two large products: the output y, and the gradient of the input, each with its adapter terms fused.

Both are persistent: a grid of as many programs as the card runs at once walks the tiles, or of one program a tile.
Operands come through tensor descriptors (TMA, `TMA`) or by pointers (cp.async). The low-rank term is one more step of
the reduction, taken after the product is scaled; it is added, and the result stored, in PARTS of the tile's columns.
"""

import triton
import triton.language as tl

from glora_kernels.kernels.common import (
    _column_parts,
    _dropped,
    _load_banded,
    _load_banded_vector,
    _load_shift,
    _load_vector,
    _low_rank,
    _product_tile,
    _seed,
    _store,
    _tile_of,
)
from glora_kernels.kernels.finish import _total


@triton.jit
def _glora_fwd_kernel(
    x,
    stride_xm,
    stride_xk,
    w,
    stride_wn,
    stride_wk,
    y,
    stride_ym,
    stride_yn,
    h_ptr,
    stride_hb,
    stride_hm,
    stride_hr,
    u_ptr,
    stride_un,
    stride_ur,
    up_ptr,
    stride_upn,
    stride_upr,
    a_ptr,
    stride_a,
    b_ptr,
    stride_b,
    sigma_ptr,
    stride_sigma,
    bias_ptr,
    stride_bias,
    wc_ptr,
    d_ptr,
    stride_d,
    e_ptr,
    stride_e,
    h_sum_ptr,
    sigma_sum_ptr,
    M,
    N,
    K,
    P,
    R,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WC: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_E: tl.constexpr,
    BANDS: tl.constexpr,
    TMA: tl.constexpr,
    W_IS_ROW_MAJOR: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
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
    """y[m,n] = (Σₖ x[m,k]·W[n,k])·(1+a[n]) + Σₚ P[m,p]·U[n,p] + Σᵣ h[m,r]·B_up[n,r] + σ[m]·b[n] + β[n].

    [P | h] (BANDS, M, P+R) and σ (BANDS, M) are summed over their bands; with BANDS > 1 the sums, which backward
    needs, are written by the programs of the first columns.
    """
    num_i = tl.cdiv(M, BLOCK_M)
    num_j = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_i * num_j, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        i, j = _tile_of(tile, num_i, num_j, GROUP)
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = _product_tile(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            x, stride_xm, stride_xk, w, stride_wk, stride_wn, None, 0, i * BLOCK_M, j * BLOCK_N, M, N, K,
            False, TMA, W_IS_ROW_MAJOR, DTYPE, PRECISION, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = _column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
        for q in tl.static_range(PARTS):
            part = parts[q]
            n0 = j * BLOCK_N + q * (BLOCK_N // PARTS)
            n = n0 + tl.arange(0, BLOCK_N // PARTS)
            if HAS_A:
                part *= 1.0 + _load_vector(a_ptr, n, stride_a, N)[None, :]
            if HAS_U:
                part += _low_rank(
                    h_ptr, stride_hb, stride_hm, stride_hr, u_ptr, stride_un, stride_ur, m, n, M, N, P,
                    BANDS, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_N // PARTS, BLOCK_R,
                )  # fmt: skip
            if HAS_UP:
                part += _low_rank(
                    h_ptr + P * stride_hr, stride_hb, stride_hm, stride_hr, up_ptr, stride_upn, stride_upr, m, n,
                    M, N, R, BANDS, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_N // PARTS, BLOCK_R,
                )  # fmt: skip
            if HAS_B:
                sigma = _load_banded_vector(sigma_ptr, stride_sigma, m, M, BANDS)
                part += sigma[:, None] * _load_vector(b_ptr, n, stride_b, N)[None, :]
            if HAS_BIAS or HAS_WC or HAS_E:
                part += _load_shift(
                    bias_ptr, stride_bias, wc_ptr, d_ptr, stride_d, e_ptr, stride_e, n, N,
                    HAS_BIAS, HAS_WC, HAS_D, HAS_E,
                )[None, :]  # fmt: skip
            if TMA:
                y.store([i * BLOCK_M, n0], part.to(DTYPE))
            else:
                _store(y, part, m, n, stride_ym, stride_yn, M, N)
        if BANDS > 1:
            if j == 0:
                if HAS_U or HAS_UP:
                    for r0 in tl.range(0, P + R, BLOCK_R, num_stages=1):
                        r = r0 + tl.arange(0, BLOCK_R)
                        h = _load_banded(h_ptr, stride_hb, m, r, stride_hm, stride_hr, M, P + R, BANDS)
                        _store(h_sum_ptr, h, m, r, P + R, 1, M, P + R)
                if HAS_B:
                    sigma = _load_banded_vector(sigma_ptr, stride_sigma, m, M, BANDS)
                    tl.store(sigma_sum_ptr + m, sigma, mask=m < M)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _glora_dx_kernel(
    dy,
    stride_dym,
    stride_dyn,
    w,
    stride_wn,
    stride_wk,
    dx,
    stride_dxm,
    stride_dxk,
    s_ptr,
    stride_sb,
    stride_sm,
    stride_sr,
    a_down_ptr,
    stride_adr,
    stride_adk,
    b_down_ptr,
    stride_bdr,
    stride_bdk,
    a_ptr,
    stride_a,
    tau_ptr,
    stride_tau,
    vectors_ptr,
    totals_ptr,
    seed,
    M,
    N,
    K,
    P,
    R,
    threshold,
    inv_keep,
    HAS_A: tl.constexpr,
    HAS_TAU: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    TOTALS: tl.constexpr,
    BANDS: tl.constexpr,
    TMA: tl.constexpr,
    W_IS_ROW_MAJOR: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
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
    """dx[m,k] = Σₙ dy[m,n]·(1+a[n])·W[n,k] + Σₚ S[m,p]·A_down[p,k] + mask∘(Σᵣ S[m,P+r]·B_down[r,k])/(1-p) + τ[m].

    S (BANDS, M, P+R) and τ (BANDS, M) are summed over their bands. The first P columns of S belong to the product
    variant, whose input is never dropped. The last program also sums TOTALS vectors (N,) that the launch before left:
    the gradients of constants, which would otherwise take a launch of their own.
    """
    num_i = tl.cdiv(M, BLOCK_M)
    num_j = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_i * num_j, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        i, j = _tile_of(tile, num_i, num_j, GROUP)
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = _product_tile(
            tl.zeros((BLOCK_M, BLOCK_K), tl.float32),
            dy, stride_dym, stride_dyn, w, stride_wn, stride_wk, a_ptr, stride_a, i * BLOCK_M, j * BLOCK_K, M, K, N,
            HAS_A, TMA, not W_IS_ROW_MAJOR, DTYPE, PRECISION, UPCAST, BLOCK_M, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        parts = _column_parts(acc, BLOCK_M, BLOCK_K, PARTS)
        for q in tl.static_range(PARTS):
            part = parts[q]
            k0 = j * BLOCK_K + q * (BLOCK_K // PARTS)
            k = k0 + tl.arange(0, BLOCK_K // PARTS)
            if HAS_U:
                part += _low_rank(
                    s_ptr, stride_sb, stride_sm, stride_sr, a_down_ptr, stride_adk, stride_adr, m, k, M, K, P,
                    BANDS, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K // PARTS, BLOCK_R,
                )  # fmt: skip
            if HAS_UP:
                term = _low_rank(
                    s_ptr + P * stride_sr, stride_sb, stride_sm, stride_sr, b_down_ptr, stride_bdk, stride_bdr, m, k,
                    M, K, R, BANDS, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K // PARTS, BLOCK_R,
                )  # fmt: skip
                if HAS_DROPOUT:
                    term = _dropped(
                        term, _seed(seed, SEED_IS_POINTER), m, k0, threshold, inv_keep, BLOCK_M, BLOCK_K // PARTS
                    )  # fmt: skip
                part += term
            if HAS_TAU:
                part += _load_banded_vector(tau_ptr, stride_tau, m, M, BANDS)[:, None]
            if TMA:
                dx.store([i * BLOCK_M, k0], part.to(DTYPE))
            else:
                _store(dx, part, m, k, stride_dxm, stride_dxk, M, K)
    if TOTALS > 0:
        if tl.program_id(0) == tl.num_programs(0) - 1:
            for t in range(TOTALS):
                _total(vectors_ptr, totals_ptr, t, N, 1024)
