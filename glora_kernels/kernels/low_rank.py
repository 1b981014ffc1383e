"""The thin products: into the rank (h, S, P, U and the row sums) and out of the rows (the factors' gradients)."""

import triton
import triton.language as tl

from glora_kernels.kernels.common import _dot, _dropped, _load, _load_vector, _store


@triton.jit
def _project_kernel(
    x_ptr,
    stride_xm,
    stride_xk,
    v_ptr,
    stride_vr,
    stride_vk,
    out_ptr,
    stride_om,
    stride_or,
    weight_ptr,
    stride_weight,
    sum_ptr,
    seed_ptr,
    M,
    K,
    R,
    scale,
    threshold,
    inv_keep,
    HAS_FACTOR: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[m,r] = scale·Σₖ drop(x)[m,k]·V[r,k] and sum[m] = Σₖ x[m,k]·weight[k] (weight 1 where absent)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load(x_ptr, m, k, stride_xm, stride_xk, M, K)
        if HAS_SUM:
            if HAS_WEIGHT:
                total += tl.sum(x.to(tl.float32) * _load_vector(weight_ptr, k, stride_weight, K)[None, :], 1)
            else:
                total += tl.sum(x.to(tl.float32), 1)
        if HAS_FACTOR:
            if HAS_DROPOUT:
                x = _dropped(x, tl.load(seed_ptr), m, k0, threshold, inv_keep, BLOCK_M, BLOCK_K)
            v = _load(v_ptr, k, r, stride_vk, stride_vr, K, R)
            acc = _dot(x, v.to(x.dtype), acc, PRECISION, UPCAST)
    if HAS_FACTOR:
        _store(out_ptr, acc * scale, m, r, stride_om, stride_or, M, R)
    if HAS_SUM:
        if tl.program_id(1) == 0:
            tl.store(sum_ptr + m, total.to(sum_ptr.dtype.element_ty), mask=m < M)


@triton.jit
def _factor_grad_kernel(
    x_ptr,
    stride_xm,
    stride_xj,
    s_ptr,
    stride_sm,
    stride_sr,
    y_ptr,
    stride_ym,
    stride_yj,
    sigma_ptr,
    part_ptr,
    stride_part,
    stride_pc,
    stride_pj,
    seed_ptr,
    M,
    J,
    R,
    rows_per_split,
    threshold,
    inv_keep,
    HAS_FACTOR: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One read of X for everything that is summed over its rows, as partial sums over splits of the rows.

    part[split, c, j]: c < R is Σₘ S[m,c]·drop(X)[m,j]; then, as far as present, Σₘ X, Σₘ σ[m]·X, Σₘ X∘Y.
    """
    split = tl.program_id(2)
    j0 = tl.program_id(0) * BLOCK_J
    j = j0 + tl.arange(0, BLOCK_J)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_J), tl.float32)
    sum_x = tl.zeros((BLOCK_J,), tl.float32)
    sum_sigma = tl.zeros((BLOCK_J,), tl.float32)
    sum_y = tl.zeros((BLOCK_J,), tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        x = _load(x_ptr, m, j, stride_xm, stride_xj, last, J)
        if HAS_SUM:
            sum_x += tl.sum(x.to(tl.float32), 0)
        if HAS_SIGMA:
            sum_sigma += tl.sum(x.to(tl.float32) * _load_vector(sigma_ptr, m, 1, last)[:, None], 0)
        if HAS_Y:
            sum_y += tl.sum(x.to(tl.float32) * _load(y_ptr, m, j, stride_ym, stride_yj, last, J).to(tl.float32), 0)
        if HAS_FACTOR:
            if HAS_DROPOUT:
                x = _dropped(x, tl.load(seed_ptr), m, j0, threshold, inv_keep, BLOCK_M, BLOCK_J)
            s = _load(s_ptr, r, m, stride_sr, stride_sm, R, last)
            acc = _dot(s.to(x.dtype), x, acc, PRECISION, UPCAST)
    part_ptr += split.to(tl.int64) * stride_part
    if HAS_FACTOR:
        _store(part_ptr, acc, r, j, stride_pc, stride_pj, R, J)
    if tl.program_id(1) == 0:
        row = part_ptr + R * stride_pc + j.to(tl.int64) * stride_pj
        if HAS_SUM:
            tl.store(row, sum_x, mask=j < J)
            row += stride_pc
        if HAS_SIGMA:
            tl.store(row, sum_sigma, mask=j < J)
            row += stride_pc
        if HAS_Y:
            tl.store(row, sum_y, mask=j < J)
