"""Before y: x into the rank, and what is made of W; and the terms of y beside a product of the vendor's library."""

import triton
import triton.language as tl

from glora_kernels.kernels.common import _dot, _dropped, _load, _load_shift, _load_vector, _round, _seed, _store
from glora_kernels.kernels.weight import _weff_tile


@triton.jit
def _into_rank(
    x_ptr,
    stride_xm,
    stride_xk,
    p_ptr,
    stride_pr,
    stride_pk,
    v_ptr,
    stride_vr,
    stride_vk,
    seed,
    m,
    M,
    first_k,
    last_k,
    P,
    R,
    threshold,
    HAS_P: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """(x·Pᵀ, (mask∘x)·Vᵀ, Σₖ x) of the rows m over first_k ≤ k < last_k, first_k a multiple of 8."""
    p_acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    v_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    p = tl.arange(0, BLOCK_P)
    r = tl.arange(0, BLOCK_R)
    for k0 in range(first_k, last_k, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load(x_ptr, m, k, stride_xm, stride_xk, M, last_k)
        if HAS_SUM:
            total += tl.sum(x.to(tl.float32), 1)
        if HAS_P:
            factor = _load(p_ptr, k, p, stride_pk, stride_pr, last_k, P)
            p_acc = _dot(x, factor.to(FACTOR_DTYPE), p_acc, FACTOR_PRECISION, UPCAST)
        if HAS_V:
            if HAS_DROPOUT:
                x = _dropped(x, _seed(seed, SEED_IS_POINTER), m, k0, threshold, 1.0, BLOCK_M, BLOCK_K)
            factor = _load(v_ptr, k, r, stride_vk, stride_vr, last_k, R)
            v_acc = _dot(x, factor.to(FACTOR_DTYPE), v_acc, FACTOR_PRECISION, UPCAST)
    return p_acc, v_acc, total + 0.0  # one use of a loop's sum: Triton 3.7 asserts it in a pass


@triton.jit(do_not_specialize=["seed", "threshold", "row_programs", "band_width"])
def _prepare_kernel(
    x_ptr,
    stride_xm,
    stride_xk,
    w_ptr,
    stride_wn,
    stride_wk,
    a_up_ptr,
    stride_aun,
    stride_aur,
    a_down_ptr,
    stride_adr,
    stride_adk,
    b_down_ptr,
    stride_bdr,
    stride_bdk,
    a_ptr,
    stride_a,
    h_ptr,
    stride_hb,
    stride_hm,
    stride_hr,
    sigma_ptr,
    stride_sigma,
    u_ptr,
    stride_un,
    stride_ur,
    weff_ptr,
    seed,
    M,
    N,
    K,
    P,
    R,
    row_programs,
    band_width,
    scale,
    threshold,
    inv_keep,
    HAS_ROWS: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_WEFF: tl.constexpr,
    HAS_A: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_WN: tl.constexpr,
    BLOCK_WK: tl.constexpr,
):
    """What y needs before its product, in one launch: the first programs read x, the others W.

    Of x, band by band of K: h[band] = [x·A_downᵀ | s·drop(x)·B_downᵀ] (M, P+R) and σ[band] = Σₖ x. Of W: U = W·A_up
    (N, P) in the product variant, or W_eff = W∘(1 + A) with A = A_up·A_down or a vector.
    """
    pid = tl.program_id(0)
    if HAS_ROWS:
        if pid < row_programs:
            row_blocks = tl.cdiv(M, BLOCK_M)
            band = pid // row_blocks
            m = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
            first = band * band_width
            last = tl.minimum(first + band_width, K)
            p_acc, v_acc, total = _into_rank(
                x_ptr, stride_xm, stride_xk, a_down_ptr, stride_adr, stride_adk, b_down_ptr, stride_bdr, stride_bdk,
                seed, m, M, first, last, P, R, threshold, HAS_P, HAS_V, HAS_SUM, HAS_DROPOUT,
                SEED_IS_POINTER, FACTOR_DTYPE, FACTOR_PRECISION, UPCAST, BLOCK_M, BLOCK_K, BLOCK_P, BLOCK_R,
            )  # fmt: skip
            if HAS_P or HAS_V:
                h_ptr += tl.cast(band, tl.int64) * stride_hb
            if HAS_P:
                _store(h_ptr, p_acc, m, tl.arange(0, BLOCK_P), stride_hm, stride_hr, M, P)
            if HAS_V:
                if HAS_P:
                    h_ptr += P * stride_hr
                _store(h_ptr, v_acc * (scale * inv_keep), m, tl.arange(0, BLOCK_R), stride_hm, stride_hr, M, R)
            if HAS_SUM:
                tl.store(sigma_ptr + tl.cast(band, tl.int64) * stride_sigma + m, total, mask=m < M)
    if HAS_U or HAS_WEFF:
        if pid >= row_programs:
            tile = pid - row_programs
            if HAS_U:
                n = tile * BLOCK_WN + tl.arange(0, BLOCK_WN)
                p = tl.arange(0, BLOCK_P)
                u = tl.zeros((BLOCK_WN, BLOCK_P), tl.float32)
                for k0 in range(0, K, BLOCK_WK):
                    k = k0 + tl.arange(0, BLOCK_WK)
                    w = _load(w_ptr, n, k, stride_wn, stride_wk, N, K).to(x_ptr.dtype.element_ty)
                    factor = _load(a_up_ptr, k, p, stride_aun, stride_aur, K, P).to(FACTOR_DTYPE)
                    u = _dot(w, factor, u, FACTOR_PRECISION, UPCAST)
                _store(u_ptr, u, n, p, stride_un, stride_ur, N, P)
            else:
                across = tl.cdiv(K, BLOCK_WK)
                n = (tile // across) * BLOCK_WN + tl.arange(0, BLOCK_WN)
                k = (tile % across) * BLOCK_WK + tl.arange(0, BLOCK_WK)
                w = _load(w_ptr, n, k, stride_wn, stride_wk, N, K).to(tl.float32)
                if HAS_A:
                    w += w * _load_vector(a_ptr, n, stride_a, N)[:, None]
                else:
                    w = _weff_tile(
                        w, a_up_ptr, stride_aun, stride_aur, a_down_ptr, stride_adr, stride_adk, n, k, N, K, P,
                        FACTOR_PRECISION, UPCAST, BLOCK_WN, BLOCK_WK, BLOCK_A,
                    )  # fmt: skip
                _store(weff_ptr, _round(w, n, k, weff_ptr.dtype.element_ty), n, k, K, 1, N, K)


@triton.jit(do_not_specialize=["seed", "threshold"])
def _added_terms_kernel(
    x_ptr,
    stride_xm,
    stride_xk,
    a_down_ptr,
    stride_adr,
    stride_adk,
    b_down_ptr,
    stride_bdr,
    stride_bdk,
    y_ptr,
    stride_ym,
    stride_yn,
    h_ptr,
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
    bias_ptr,
    stride_bias,
    wc_ptr,
    d_ptr,
    stride_d,
    e_ptr,
    stride_e,
    seed,
    M,
    N,
    K,
    P,
    R,
    scale,
    threshold,
    inv_keep,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WC: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_E: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SEED_IS_POINTER: tl.constexpr,
    READ_Z: tl.constexpr,
    FACTOR_DTYPE: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[m,n] = [Z·(1+a)] + P·Uᵀ + h·B_upᵀ + σ·b + β beside a product of the vendor's library, and h and σ.

    With READ_Z the product is in y already and stays, scaled; without, y is written for the product to be added to.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_acc, v_acc, sigma = _into_rank(
        x_ptr, stride_xm, stride_xk, a_down_ptr, stride_adr, stride_adk, b_down_ptr, stride_bdr, stride_bdk, seed, m,
        M, 0, K, P, R, threshold, HAS_P, HAS_V, HAS_B, HAS_DROPOUT, SEED_IS_POINTER, FACTOR_DTYPE, FACTOR_PRECISION,
        UPCAST, BLOCK_M, BLOCK_K, BLOCK_P, BLOCK_R,
    )  # fmt: skip
    p = tl.arange(0, BLOCK_P)
    r = tl.arange(0, BLOCK_R)
    v_acc *= scale * inv_keep
    if HAS_P:
        _store(h_ptr, p_acc, m, p, stride_hm, stride_hr, M, P)
    if HAS_V:
        _store(h_ptr + P * stride_hr, v_acc, m, r, stride_hm, stride_hr, M, R)
    if HAS_B:
        tl.store(sigma_ptr + m, sigma, mask=m < M)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if READ_Z:
            acc = _load(y_ptr, m, n, stride_ym, stride_yn, M, N).to(tl.float32)
        if HAS_A:
            acc *= 1.0 + _load_vector(a_ptr, n, stride_a, N)[None, :]
        if HAS_P:
            u = _load(u_ptr, p, n, stride_ur, stride_un, P, N).to(FACTOR_DTYPE)
            zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc += _dot(p_acc.to(FACTOR_DTYPE), u, zeros, FACTOR_PRECISION, UPCAST)
        if HAS_V:
            up = _load(up_ptr, r, n, stride_upr, stride_upn, R, N).to(FACTOR_DTYPE)
            zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc += _dot(v_acc.to(FACTOR_DTYPE), up, zeros, FACTOR_PRECISION, UPCAST)
        if HAS_B:
            acc += sigma[:, None] * _load_vector(b_ptr, n, stride_b, N)[None, :]
        if HAS_BIAS or HAS_WC or HAS_E:
            acc += _load_shift(
                bias_ptr, stride_bias, wc_ptr, d_ptr, stride_d, e_ptr, stride_e, n, N, HAS_BIAS, HAS_WC, HAS_D, HAS_E
            )[None, :]
        # What was rounded before, or is rounded before the product is added: to nearest would lose a small adapter.
        _store(y_ptr, _round(acc, m, n, y_ptr.dtype.element_ty), m, n, stride_ym, stride_yn, M, N)
