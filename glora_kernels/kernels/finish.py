"""The end of a backward: partial sums become gradients, in one launch and a fixed order."""

import triton
import triton.language as tl

from glora_kernels.kernels.common import _dot, _load, _load_vector, _store, _vector_sum
from glora_kernels.reference import recovery

_TINY = tl.constexpr(recovery.TINY)


@triton.jit
def _sum_tile(
    part_ptr,
    stride_part,
    out_ptr,
    stride_out_i,
    stride_out_j,
    tile,
    splits,
    SIZE_I,
    SIZE_J,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """out[i,j] = Σ_split part[split,i,j] of one tile; part contiguous in (i,j)."""
    across = tl.cdiv(SIZE_J, BLOCK_J)
    i = (tile // across) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = (tile % across) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for split in range(splits):
        total += _load(part_ptr + tl.cast(split, tl.int64) * stride_part, i, j, SIZE_J, 1, SIZE_I, SIZE_J)
    _store(out_ptr, total, i, j, stride_out_i, stride_out_j, SIZE_I, SIZE_J)


@triton.jit(
    do_not_specialize=[
        "splits", "factor_splits", "first_splits", "second_splits", "column_programs", "first_programs",
        "FIRST_I", "SECOND_I",
    ]
)  # fmt: skip
def _finish_kernel(
    part_ptr,
    stride_part,
    stride_pc,
    factor_ptr,
    stride_factor_part,
    stride_factor_c,
    du_ptr,
    db_up_ptr,
    da_ptr,
    db_ptr,
    dbias_ptr,
    dwc_ptr,
    dd_ptr,
    de_ptr,
    a_ptr,
    stride_a,
    bias_ptr,
    stride_bias,
    d_ptr,
    stride_d,
    dy_ptr,
    stride_dym,
    stride_dyn,
    x_ptr,
    stride_xm,
    stride_xk,
    w_ptr,
    stride_wn,
    stride_wk,
    first_part_ptr,
    stride_first,
    first_out_ptr,
    stride_first_i,
    stride_first_j,
    second_part_ptr,
    stride_second,
    second_out_ptr,
    stride_second_i,
    stride_second_j,
    M,
    N,
    K,
    P,
    R,
    splits,
    factor_splits,
    column_programs,
    first_programs,
    first_splits,
    FIRST_I,
    FIRST_J,
    second_splits,
    SECOND_I,
    SECOND_J,
    HAS_COLUMNS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_DU: tl.constexpr,
    HAS_DB_UP: tl.constexpr,
    HAS_DA: tl.constexpr,
    HAS_DB: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
    HAS_DWC: tl.constexpr,
    HAS_DD: tl.constexpr,
    HAS_DE: tl.constexpr,
    HAS_D: tl.constexpr,
    MIXED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sums of `_dy_kernel` over its splits, as gradients, and up to two more sums of partial sums.

    factor[split,c,n] holds dyᵀ[P|h], part[split,·,n] what there is of Σ dy, dyᵀσ and the sums for dA, in this order.

    db_up = dyᵀh, db = dyᵀσ, dwc = de = g, dbias = g∘(1+d), dd = g∘bias, and for a vector or constant A
    da = Σₘ dy∘Z = Σₘ q/(1+a), q = dy∘(Z∘(1+a)) as `_dy_kernel` found it in y. With MIXED y holds more than that, and
    where that is large beside it (the last two sums are no longer ≤ 0), or 1+a is next to nothing, or y overflowed, Z
    is computed anew (the rule of `ops.recover`).
    """
    pid = tl.program_id(0)
    if HAS_COLUMNS:
        if pid < column_programs:
            n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
            if HAS_FACTOR:
                for c0 in tl.range(0, P + R, BLOCK_C, num_stages=1):
                    c = c0 + tl.arange(0, BLOCK_C)
                    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
                    for split in range(factor_splits):
                        part = factor_ptr + tl.cast(split, tl.int64) * stride_factor_part
                        total += _load(part, c, n, stride_factor_c, 1, P + R, N)
                    if HAS_DU:
                        mask = (c[:, None] < P) & (n[None, :] < N)
                        offsets = n.to(tl.int64)[None, :] * P + c[:, None]
                        tl.store(du_ptr + offsets, total.to(du_ptr.dtype.element_ty), mask=mask)
                    r = c - P
                    inside = (r[:, None] >= 0) & (r[:, None] < R) & (n[None, :] < N)
                    if HAS_DB_UP:
                        offsets = n.to(tl.int64)[None, :] * R + r[:, None]
                        tl.store(db_up_ptr + offsets, total.to(db_up_ptr.dtype.element_ty), mask=inside)
            row = part_ptr
            if HAS_G:
                g = _vector_sum(row, stride_part, n, N, splits)
                row += stride_pc
                if HAS_DWC:
                    tl.store(dwc_ptr + n, g.to(dwc_ptr.dtype.element_ty), mask=n < N)
                if HAS_DE:
                    tl.store(de_ptr + n, g.to(de_ptr.dtype.element_ty), mask=n < N)
                if HAS_DBIAS:
                    scaled = g
                    if HAS_D:
                        scaled += g * _load_vector(d_ptr, n, stride_d, N)
                    tl.store(dbias_ptr + n, scaled.to(dbias_ptr.dtype.element_ty), mask=n < N)
                if HAS_DD:
                    dd = g * _load_vector(bias_ptr, n, stride_bias, N)
                    tl.store(dd_ptr + n, dd.to(dd_ptr.dtype.element_ty), mask=n < N)
            if HAS_DB:
                db = _vector_sum(row, stride_part, n, N, splits)
                row += stride_pc
                tl.store(db_ptr + n, db.to(db_ptr.dtype.element_ty), mask=n < N)
            if HAS_DA:
                total = _vector_sum(row, stride_part, n, N, splits)
                scale = 1.0 + _load_vector(a_ptr, n, stride_a, N)
                # Written so that what is no number is computed anew.
                kept = (tl.abs(scale) >= _TINY) & (tl.abs(total) < float("inf"))
                if MIXED:
                    for _ in tl.static_range(2):
                        row += stride_pc
                        kept &= _vector_sum(row, stride_part, n, N, splits) <= 0.0
                da = total / tl.where(kept, scale, 1.0)
                if tl.min(kept.to(tl.int32), 0) == 0:
                    exact = tl.zeros((BLOCK_N,), tl.float32)
                    for m0 in range(0, M, BLOCK_M):
                        m = m0 + tl.arange(0, BLOCK_M)
                        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                        for k0 in range(0, K, BLOCK_K):
                            k = k0 + tl.arange(0, BLOCK_K)
                            x = _load(x_ptr, m, k, stride_xm, stride_xk, M, K)
                            w = _load(w_ptr, k, n, stride_wk, stride_wn, K, N).to(DTYPE)
                            z = _dot(x, w, z, PRECISION, UPCAST)
                        dy = _load(dy_ptr, m, n, stride_dym, stride_dyn, M, N).to(tl.float32)
                        exact += tl.sum(dy * z, 0)
                    da = tl.where(kept, da, exact)
                tl.store(da_ptr + n, da.to(da_ptr.dtype.element_ty), mask=n < N)
    if HAS_FIRST:
        if (pid >= column_programs) & (pid < column_programs + first_programs):
            _sum_tile(
                first_part_ptr, stride_first, first_out_ptr, stride_first_i, stride_first_j,
                pid - column_programs, first_splits, FIRST_I, FIRST_J,
                BLOCK_I, BLOCK_N,
            )  # fmt: skip
    if HAS_SECOND:
        if pid >= column_programs + first_programs:
            _sum_tile(
                second_part_ptr, stride_second, second_out_ptr, stride_second_i, stride_second_j,
                pid - column_programs - first_programs,
                second_splits, SECOND_I, SECOND_J, BLOCK_I, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _total(vectors_ptr, out_ptr, i, N, BLOCK_N: tl.constexpr):
    """out[i] = Σₙ vectors[i,n]."""
    row = vectors_ptr + tl.cast(i, tl.int64) * N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        total += tl.load(row + n, mask=n < N, other=0.0)
    tl.store(out_ptr + i, tl.sum(total, 0).to(out_ptr.dtype.element_ty))


@triton.jit
def _totals_kernel(vectors_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    """out[i] = Σₙ vectors[i,n]: the gradients of constants, one program each, where `_glora_dx_kernel` does not run."""
    _total(vectors_ptr, out_ptr, tl.program_id(0), N, BLOCK_N)
