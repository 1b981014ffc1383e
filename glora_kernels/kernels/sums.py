"""After y: one read of dy and one of x, for everything else that backward sums.

A sum that several programs contribute to goes to partial sums. Those that the next kernel reads anyway (S and τ, in
`bands` of the reduction) it adds itself; the others are added by `finish._finish_kernel`.
"""

import triton
import triton.language as tl

from glora_kernels.kernels.common import (
    _dot,
    _dropped,
    _load,
    _load_banded,
    _load_banded_vector,
    _load_shift,
    _load_vector,
    _low_rank,
    _round,
    _seed,
    _store,
)
from glora_kernels.reference import recovery

_SUM, _SQUARES = tl.constexpr(recovery.SUM), tl.constexpr(recovery.SQUARES)


@triton.jit(do_not_specialize=["band_width"])
def _dy_kernel(
    dy_ptr,
    stride_dym,
    stride_dyn,
    y_ptr,
    stride_ym,
    stride_yn,
    u_ptr,
    stride_un,
    stride_ur,
    up_ptr,
    stride_upn,
    stride_upr,
    b_ptr,
    stride_b,
    bias_ptr,
    stride_bias,
    wc_ptr,
    d_ptr,
    stride_d,
    e_ptr,
    stride_e,
    h_ptr,
    stride_hm,
    stride_hr,
    sigma_ptr,
    s_ptr,
    stride_sb,
    stride_sm,
    stride_sr,
    tau_ptr,
    stride_tau,
    part_ptr,
    stride_part,
    stride_pc,
    M,
    N,
    P,
    R,
    band_width,
    scale,
    HAS_S: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WC: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_E: tl.constexpr,
    HAS_TAU: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    HAS_Y: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One read of dy for all that is made from it: S and τ along N, the gradients' sums along M.

    Over a band of N: S[band,m] = [Σₙ dy·U | s·Σₙ dy·B_up] (P+R) and τ[band,m] = Σₙ dy·b[n]. Over the rows of program
    i: part[i,·,n] is, as far as present, Σₘ dy, Σₘ σ[m]·dy and what dA is recovered from, then Σₘ h[m,c]·dy[m,n] for
    c < P+R. dA: with q = dy∘(y - h·B_upᵀ - σ·b - β), Σₘ q, and where y holds more than Z also Σₘ(p - 1.5|q|) and
    Σₘ(p² - 2q²), by which `finish._finish_kernel` judges it; p = |dy|·(the largest of what q was found through).
    """
    MIXED: tl.constexpr = HAS_UP or HAS_B or HAS_BIAS or HAS_WC or HAS_E
    i = tl.program_id(0)
    band = tl.program_id(1)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    p = tl.arange(0, BLOCK_P)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_H)
    # Sᵀ and not S: 16 rows of the rank keep the product on mma.sync, which takes what dy was loaded for elsewhere.
    u_acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    tau = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_FACTOR or HAS_G or HAS_SIGMA or HAS_Y:
        part_ptr += tl.cast(i, tl.int64) * stride_part
    if HAS_FACTOR:
        h = _load(h_ptr, c, m, stride_hr, stride_hm, P + R, M).to(FACTOR_DTYPE)
    if HAS_SIGMA:
        sigma = _load_vector(sigma_ptr, m, 1, M)
    elif HAS_Y and HAS_B:
        sigma = _load_vector(sigma_ptr, m, 1, M)
    first = band * band_width
    for n0 in range(first, tl.minimum(first + band_width, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        dy = _load(dy_ptr, m, n, stride_dym, stride_dyn, M, N)
        if HAS_S:
            if HAS_U:
                factor = _load(u_ptr, p, n, stride_ur, stride_un, P, N).to(FACTOR_DTYPE)
                u_acc = _dot(factor, dy.T, u_acc, FACTOR_PRECISION, UPCAST)
            if HAS_UP:
                factor = _load(up_ptr, r, n, stride_upr, stride_upn, R, N).to(FACTOR_DTYPE)
                up_acc = _dot(factor, dy.T, up_acc, FACTOR_PRECISION, UPCAST)
        if HAS_TAU:
            tau += tl.sum(dy.to(tl.float32) * _load_vector(b_ptr, n, stride_b, N)[None, :], 1)
        if HAS_FACTOR:
            value = _dot(h, dy, tl.zeros((BLOCK_H, BLOCK_N), tl.float32), FACTOR_PRECISION, UPCAST)
            after = tl.cast(stride_pc, tl.int64) * (HAS_G + HAS_SIGMA + HAS_Y * (1 + 2 * MIXED))
            _store(part_ptr + after, value, c, n, stride_pc, 1, P + R, N)
        if HAS_G or HAS_SIGMA or HAS_Y:
            row = part_ptr + n.to(tl.int64)
        if HAS_G:
            tl.store(row, tl.sum(dy.to(tl.float32), 0), mask=n < N)
            row += stride_pc
        if HAS_SIGMA:
            tl.store(row, tl.sum(dy.to(tl.float32) * sigma[:, None], 0), mask=n < N)
            row += stride_pc
        if HAS_Y:
            y = _load(y_ptr, m, n, stride_ym, stride_yn, M, N)
            value = y.to(tl.float32)
            if MIXED:
                largest = tl.abs(value)
                if HAS_UP:
                    value -= _low_rank(
                        h_ptr, 0, stride_hm, stride_hr, up_ptr, stride_upn, stride_upr, m, n, M, N, R, 1,
                        FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_N, 16,
                    )  # fmt: skip
                if HAS_B:
                    value -= sigma[:, None] * _load_vector(b_ptr, n, stride_b, N)[None, :]
                largest = tl.maximum(largest, tl.abs(value))
                if HAS_BIAS or HAS_WC or HAS_E:
                    value -= _load_shift(
                        bias_ptr, stride_bias, wc_ptr, d_ptr, stride_d, e_ptr, stride_e, n, N,
                        HAS_BIAS, HAS_WC, HAS_D, HAS_E,
                    )[None, :]  # fmt: skip
                q_value = dy.to(tl.float32) * value
                p_value = tl.abs(dy.to(tl.float32)) * largest
                tl.store(row, tl.sum(q_value, 0), mask=n < N)
                row += stride_pc
                tl.store(row, tl.sum(p_value - _SUM * tl.abs(q_value), 0), mask=n < N)
                row += stride_pc
                tl.store(row, tl.sum(p_value * p_value - _SQUARES * (q_value * q_value), 0), mask=n < N)
            else:
                tl.store(row, tl.sum(dy.to(tl.float32) * value, 0), mask=n < N)
    if HAS_S:
        s_ptr += tl.cast(band, tl.int64) * stride_sb
        if HAS_U:
            _store(s_ptr, u_acc, p, m, stride_sr, stride_sm, P, M)
        if HAS_UP:
            _store(s_ptr + P * stride_sr, up_acc * scale, r, m, stride_sr, stride_sm, R, M)
    if HAS_TAU:
        tl.store(tau_ptr + tl.cast(band, tl.int64) * stride_tau + m, tau, mask=m < M)


@triton.jit(do_not_specialize=["seed", "threshold", "rows_per_split"])
def _x_kernel(
    x_ptr,
    stride_xm,
    stride_xk,
    s_ptr,
    stride_sb,
    stride_sm,
    stride_sr,
    tau_ptr,
    stride_tau,
    a_down_ptr,
    stride_adr,
    stride_adk,
    b_down_ptr,
    stride_bdr,
    stride_bdk,
    dx_ptr,
    stride_dxm,
    stride_dxk,
    part_ptr,
    stride_part,
    stride_pc,
    seed,
    M,
    K,
    P,
    R,
    rows_per_split,
    threshold,
    inv_keep,
    HAS_P: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    WRITE_DX: tl.constexpr,
    HAS_DOWN_P: tl.constexpr,
    HAS_DOWN_V: tl.constexpr,
    HAS_TAU: tl.constexpr,
    BANDS: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One read of x for the gradients that multiply it: part[split,c,k] = Σₘ S[m,c]·x[m,k], x dropped for c ≥ P.

    With WRITE_DX also dx[m,k] = Σₚ S·A_down + mask∘(Σᵣ S·B_down)/(1-p) + τ[m], for the vendor's product to be added to.
    """
    split = tl.program_id(1)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    p = tl.arange(0, BLOCK_P)
    r = tl.arange(0, BLOCK_R)
    p_acc = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    v_acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        if HAS_P or HAS_V:
            x = _load(x_ptr, m, k, stride_xm, stride_xk, last, K)
        if HAS_P:
            s = _load_banded(s_ptr, stride_sb, p, m, stride_sr, stride_sm, P, last, BANDS)
            p_acc = _dot(s.to(FACTOR_DTYPE), x, p_acc, FACTOR_PRECISION, UPCAST)
        if HAS_V:
            if HAS_DROPOUT:
                x = _dropped(x, _seed(seed, SEED_IS_POINTER), m, k0, threshold, 1.0, BLOCK_M, BLOCK_K)
            s = _load_banded(s_ptr + P * stride_sr, stride_sb, r, m, stride_sr, stride_sm, R, last, BANDS)
            v_acc = _dot(s.to(FACTOR_DTYPE), x, v_acc, FACTOR_PRECISION, UPCAST)
        if WRITE_DX:
            term = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            if HAS_DOWN_V:
                term = _low_rank(
                    s_ptr + P * stride_sr, stride_sb, stride_sm, stride_sr, b_down_ptr, stride_bdk, stride_bdr,
                    m, k, last, K, R, BANDS, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K, BLOCK_R,
                )  # fmt: skip
                if HAS_DROPOUT:
                    term = _dropped(term, _seed(seed, SEED_IS_POINTER), m, k0, threshold, inv_keep, BLOCK_M, BLOCK_K)
            if HAS_DOWN_P:
                term += _low_rank(
                    s_ptr, stride_sb, stride_sm, stride_sr, a_down_ptr, stride_adk, stride_adr,
                    m, k, last, K, P, BANDS, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K, BLOCK_P,
                )  # fmt: skip
            if HAS_TAU:
                term += _load_banded_vector(tau_ptr, stride_tau, m, last, BANDS)[:, None]
            _store(dx_ptr, _round(term, m, k, dx_ptr.dtype.element_ty), m, k, stride_dxm, stride_dxk, last, K)
    if HAS_P or HAS_V:
        part_ptr += tl.cast(split, tl.int64) * stride_part
    if HAS_P:
        _store(part_ptr, p_acc, p, k, stride_pc, 1, P, K)
    if HAS_V:
        row = part_ptr
        if HAS_P:
            row += tl.cast(P, tl.int64) * stride_pc
        _store(row, v_acc * inv_keep, r, k, stride_pc, 1, R, K)
