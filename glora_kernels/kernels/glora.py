"""The two large products: the output y, and the gradient of the input, each with its adapter terms fused."""

import triton
import triton.language as tl

from glora_kernels.kernels.common import (
    _dot,
    _dropped,
    _load,
    _load_vector,
    _low_rank,
    _round,
    _store,
    _tile_of,
)


@triton.jit
def _glora_fwd_kernel(
    x_ptr,
    stride_xm,
    stride_xk,
    w_ptr,
    stride_wn,
    stride_wk,
    y_ptr,
    stride_ym,
    stride_yn,
    h_ptr,
    stride_hm,
    stride_hr,
    up_ptr,
    stride_un,
    stride_ur,
    a_ptr,
    stride_a,
    b_ptr,
    stride_b,
    sigma_ptr,
    beta_ptr,
    stride_beta,
    M,
    N,
    K,
    R,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y[m,n] = (Σₖ x[m,k]·W[n,k])·(1+a[n]) + Σᵣ h[m,r]·UP[n,r] + σ[m]·b[n] + β[n]."""
    i, j = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    n = j * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load(x_ptr, m, k, stride_xm, stride_xk, M, K)
        w = _load(w_ptr, k, n, stride_wk, stride_wn, K, N)
        acc = _dot(x, w.to(x.dtype), acc, PRECISION, UPCAST)
    if HAS_A:
        acc *= 1.0 + _load_vector(a_ptr, n, stride_a, N)[None, :]
    if HAS_LOW_RANK:
        acc = _low_rank(
            acc, h_ptr, stride_hm, stride_hr, up_ptr, stride_un, stride_ur, m, n, M, N, 0, R,
            PRECISION, UPCAST, BLOCK_R,
        )  # fmt: skip
    if HAS_B:
        acc += _load_vector(sigma_ptr, m, 1, M)[:, None] * _load_vector(b_ptr, n, stride_b, N)[None, :]
    if HAS_BETA:
        acc += _load_vector(beta_ptr, n, stride_beta, N)[None, :]
    _store(y_ptr, acc, m, n, stride_ym, stride_yn, M, N)


@triton.jit
def _glora_dx_kernel(
    dy_ptr,
    stride_dym,
    stride_dyn,
    w_ptr,
    stride_wn,
    stride_wk,
    dx_ptr,
    stride_dxm,
    stride_dxk,
    s_ptr,
    stride_sm,
    stride_sr,
    down_ptr,
    stride_dr,
    stride_dk,
    a_ptr,
    stride_a,
    tau_ptr,
    seed_ptr,
    M,
    N,
    K,
    FREE_R,
    R,
    threshold,
    inv_keep,
    HAS_A: tl.constexpr,
    HAS_TAU: tl.constexpr,
    HAS_FREE: tl.constexpr,
    HAS_LOW_RANK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx[m,k] = Σₙ dy[m,n]·(1+a[n])·W[n,k] + Σ_{r<FREE_R} S·DOWN + mask∘(Σ_{FREE_R≤r<R} S·DOWN)/(1-p) + τ[m].

    The low-rank terms below FREE_R belong to the product variant, whose input is never dropped.
    """
    i, j = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    k = j * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        dy = _load(dy_ptr, m, n, stride_dym, stride_dyn, M, N)
        if HAS_A:
            scale = 1.0 + _load_vector(a_ptr, n, stride_a, N)[None, :]
            # Rounding dy·(1+a) to nearest would give dy again where a is small.
            dy = _round(dy.to(tl.float32) * scale, m, n, dy.dtype)
        w = _load(w_ptr, n, k, stride_wn, stride_wk, N, K)
        acc = _dot(dy, w.to(dy.dtype), acc, PRECISION, UPCAST)
    if HAS_FREE:
        acc = _low_rank(
            acc, s_ptr, stride_sm, stride_sr, down_ptr, stride_dk, stride_dr, m, k, M, K, 0, FREE_R,
            PRECISION, UPCAST, BLOCK_R,
        )  # fmt: skip
    if HAS_LOW_RANK:
        if HAS_DROPOUT:
            term = _low_rank(
                tl.zeros((BLOCK_M, BLOCK_K), tl.float32), s_ptr, stride_sm, stride_sr, down_ptr, stride_dk, stride_dr,
                m, k, M, K, FREE_R, R, PRECISION, UPCAST, BLOCK_R,
            )  # fmt: skip
            acc += _dropped(term, tl.load(seed_ptr), m, j * BLOCK_K, threshold, inv_keep, BLOCK_M, BLOCK_K)
        else:
            acc = _low_rank(
                acc, s_ptr, stride_sm, stride_sr, down_ptr, stride_dk, stride_dr, m, k, M, K, FREE_R, R,
                PRECISION, UPCAST, BLOCK_R,
            )  # fmt: skip
    if HAS_TAU:
        acc += _load_vector(tau_ptr, m, 1, M)[:, None]
    _store(dx_ptr, acc, m, k, stride_dxm, stride_dxk, M, K)
