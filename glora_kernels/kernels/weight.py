"""What touches the weight beside the large products: W_eff, the gradient of A through G∘W, and W·c in β."""

import triton
import triton.language as tl

from glora_kernels.kernels.common import _dot, _load, _load_vector, _round, _store


@triton.jit
def _weff_kernel(
    w_ptr,
    stride_wn,
    stride_wk,
    up_ptr,
    stride_un,
    stride_ur,
    down_ptr,
    stride_dr,
    stride_dk,
    out_ptr,
    stride_on,
    stride_ok,
    N,
    K,
    R,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """W_eff[n,k] = W[n,k]·(1 + Σᵣ A_up[n,r]·A_down[r,k]), in fp32, rounded with the dither."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    a = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
        r = r0 + tl.arange(0, BLOCK_R)
        up = _load(up_ptr, n, r, stride_un, stride_ur, N, R).to(tl.float32)
        down = _load(down_ptr, r, k, stride_dr, stride_dk, R, K).to(tl.float32)
        a = _dot(up, down, a, PRECISION, UPCAST)
    w = _load(w_ptr, n, k, stride_wn, stride_wk, N, K).to(tl.float32)
    _store(out_ptr, _round(w + w * a, n, k, out_ptr.dtype.element_ty), n, k, stride_on, stride_ok, N, K)


@triton.jit
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
    up_ptr,
    stride_un,
    stride_ur,
    down_ptr,
    stride_dr,
    stride_dk,
    dup_ptr,
    stride_dup_part,
    stride_dup_n,
    stride_dup_r,
    ddown_ptr,
    stride_ddown_part,
    stride_ddown_r,
    stride_ddown_k,
    marked_ptr,
    M,
    N,
    K,
    R,
    HAS_DUP: tl.constexpr,
    HAS_DDOWN: tl.constexpr,
    MARKED_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """H = (Σₘ dy[m,n]·x[m,k])·W[n,k] in registers; dup[k-tile,n,r] = Σₖ H·A_down, ddown[n-tile,r,k] = Σₙ A_up·H.

    With MARKED_ROWS it gives dup[k-tile,n,0] = Σₖ H[n,k] = Σₘ dy∘Z instead, and only for tiles with a marked row;
    the others exit, and what their rows hold is not defined.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if MARKED_ROWS:
        if tl.max(tl.load(marked_ptr + n, mask=n < N, other=0).to(tl.int32), 0) == 0:
            return
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        dy = _load(dy_ptr, n, m, stride_dyn, stride_dym, N, M)
        x = _load(x_ptr, m, k, stride_xm, stride_xk, M, K)
        acc = _dot(dy, x, acc, PRECISION, UPCAST)
    acc *= _load(w_ptr, n, k, stride_wn, stride_wk, N, K).to(tl.float32)
    if MARKED_ROWS:
        rows = dup_ptr + tl.program_id(1).to(tl.int64) * stride_dup_part + n.to(tl.int64) * stride_dup_n
        tl.store(rows, tl.sum(acc, 1), mask=n < N)
    else:
        h = acc.to(x_ptr.dtype.element_ty)
        if HAS_DUP:
            part = dup_ptr + tl.program_id(1).to(tl.int64) * stride_dup_part
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                down = _load(down_ptr, k, r, stride_dk, stride_dr, K, R).to(h.dtype)
                value = _dot(h, down, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), PRECISION, UPCAST)
                _store(part, value, n, r, stride_dup_n, stride_dup_r, N, R)
        if HAS_DDOWN:
            part = ddown_ptr + tl.program_id(0).to(tl.int64) * stride_ddown_part
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                up = _load(up_ptr, r, n, stride_ur, stride_un, R, N).to(h.dtype)
                value = _dot(up, h, tl.zeros((BLOCK_R, BLOCK_K), tl.float32), PRECISION, UPCAST)
                _store(part, value, r, k, stride_ddown_r, stride_ddown_k, R, K)


@triton.jit
def _beta_kernel(
    w_ptr,
    stride_wn,
    stride_wk,
    bias_ptr,
    stride_bias,
    c_ptr,
    stride_c,
    d_ptr,
    stride_d,
    e_ptr,
    stride_e,
    beta_ptr,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """β[n] = b[n]·(1+d[n]) + e[n] + Σₖ W[n,k]·c[k]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    beta = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_C:
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w = _load(w_ptr, n, k, stride_wn, stride_wk, N, K).to(tl.float32)
            beta += tl.sum(w * _load_vector(c_ptr, k, stride_c, K)[None, :], 1)
    if HAS_BIAS:
        bias = _load_vector(bias_ptr, n, stride_bias, N)
        if HAS_D:
            bias += bias * _load_vector(d_ptr, n, stride_d, N)
        beta += bias
    if HAS_E:
        beta += _load_vector(e_ptr, n, stride_e, N)
    tl.store(beta_ptr + n, beta.to(beta_ptr.dtype.element_ty), mask=n < N)
