"""The two large products: the output y, and the gradient of the input, each with its adapter terms fused.

Both are persistent: a grid of as many programs as the card runs at once walks the tiles, or of one program a tile.
Operands come as tensor descriptors (TMA, `TMA`) or as matrices (cp.async). The low-rank term is one more step of the
reduction, taken after the product is scaled; it is added, and the result stored, in PARTS of the tile's columns.
W is (columns of the result, depth) in both, its descriptor COLS_FIRST or the other way round.
"""

import triton
import triton.language as tl

from glora_kernels.kernels.common import (
    _add_terms,
    _column_parts,
    _columns_from,
    _dropped,
    _product,
    _read_banded,
    _read_banded_vector,
    _seed_of,
    _thin_product,
    _tile_of,
    _transposed,
    _write,
)
from glora_kernels.kernels.finish import _total
from glora_kernels.kernels.operands import Matrix


@triton.jit(do_not_specialize=["M", "P", "R"])
def _glora_fwd_kernel(
    x,
    w,
    y,
    terms,
    low_sum_ptr,
    sigma_sum_ptr,
    M,
    N,
    K,
    P,
    R,
    RANK_STEP: tl.constexpr,
    BANDS: tl.constexpr,
    TMA: tl.constexpr,
    COLS_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y[m,n] = (Σₖ x[m,k]·W[n,k])·(1+a[n]) + Σₚ P[m,p]·U[n,p] + Σᵣ h[m,r]·B_up[n,r] + σ[m]·b[n] + β[n].

    [P | h] (BANDS, M, P+R) and σ (BANDS, M) are summed over their bands; with BANDS > 1 the sums, which backward
    needs, are written by the programs of the first columns, packed. P and R are multiples of RANK_STEP.
    """
    # Told, so that factors are read 16 bytes at a time.
    P = P // RANK_STEP * RANK_STEP
    R = R // RANK_STEP * RANK_STEP
    num_i = tl.cdiv(M, BLOCK_M)
    num_j = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_i * num_j, tl.num_programs(0)):
        i, j = _tile_of(tile, num_i, num_j, GROUP)
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _product(
            acc, x, w, None, i * BLOCK_M, j * BLOCK_N, M, N, K, TMA, COLS_FIRST, NUMERICS,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sigma = None
        if terms.b is not None:
            sigma = _read_banded_vector(terms.sigma, m, M, M, BANDS)
        parts = _column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
        for q in tl.static_range(PARTS):
            n0 = j * BLOCK_N + q * (BLOCK_N // PARTS)
            n = n0 + tl.arange(0, BLOCK_N // PARTS)
            part = _add_terms(
                parts[q], terms, None, None, sigma, m, n, M, N, P, R, BANDS, NUMERICS,
                BLOCK_M, BLOCK_N // PARTS, BLOCK_R, BLOCK_R,
            )  # fmt: skip
            if TMA:
                y.store([i * BLOCK_M, n0], part.to(NUMERICS.dtype))
            else:
                _write(y, part, m, n, M, N)
        if BANDS > 1:
            if j == 0:
                if low_sum_ptr is not None:
                    for c0 in tl.range(0, P + R, BLOCK_R, num_stages=1):
                        c = c0 + tl.arange(0, BLOCK_R)
                        low = _read_banded(terms.low, m, c, M, P + R, M, BANDS)
                        _write(Matrix(low_sum_ptr, P + R, 1), low, m, c, M, P + R)
                if sigma_sum_ptr is not None:
                    tl.store(sigma_sum_ptr + m, sigma, mask=m < M)


@triton.jit(do_not_specialize=["seed", "threshold", "M", "P", "R"])
def _glora_dx_kernel(
    dy,
    w,
    dx,
    s,
    a_down,
    b_down,
    a,
    tau,
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
    RANK_STEP: tl.constexpr,
    TOTALS: tl.constexpr,
    BANDS: tl.constexpr,
    TMA: tl.constexpr,
    COLS_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dx[m,k] = Σₙ dy[m,n]·(1+a[n])·W[n,k] + Σₚ S[m,p]·A_down[p,k] + mask∘(Σᵣ S[m,P+r]·B_down[r,k])/(1-p) + τ[m].

    S (BANDS, M, P+R) and τ (BANDS, M) are summed over their bands; rows of S may be longer, with zeros. The first P
    columns of S belong to the product variant, whose input is never dropped. The last program also sums TOTALS vectors
    (N,) that the launch before left: the gradients of constants, which would otherwise take a launch of their own.
    """
    P = P // RANK_STEP * RANK_STEP
    R = R // RANK_STEP * RANK_STEP
    num_i = tl.cdiv(M, BLOCK_M)
    num_j = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_i * num_j, tl.num_programs(0)):
        i, j = _tile_of(tile, num_i, num_j, GROUP)
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        acc = _product(
            acc, dy, w, a, i * BLOCK_M, j * BLOCK_K, M, K, N, TMA, COLS_FIRST, NUMERICS,
            BLOCK_M, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        parts = _column_parts(acc, BLOCK_M, BLOCK_K, PARTS)
        for q in tl.static_range(PARTS):
            part = parts[q]
            k0 = j * BLOCK_K + q * (BLOCK_K // PARTS)
            k = k0 + tl.arange(0, BLOCK_K // PARTS)
            if a_down is not None:
                part += _thin_product(
                    s, _transposed(a_down), m, k, M, K, P, P, BANDS, NUMERICS, BLOCK_M, BLOCK_K // PARTS, BLOCK_R
                )  # fmt: skip
            if b_down is not None:
                term = _thin_product(
                    _columns_from(s, None if a_down is None else P), _transposed(b_down), m, k, M, K,
                    R, s.row if a_down is None else R, BANDS, NUMERICS, BLOCK_M, BLOCK_K // PARTS, BLOCK_R,
                )  # fmt: skip
                if seed is not None:
                    term = _dropped(term, _seed_of(seed), m, k0, threshold, inv_keep, BLOCK_M, BLOCK_K // PARTS)
                part += term
            if tau is not None:
                part += _read_banded_vector(tau, m, M, M, BANDS)[:, None]
            if TMA:
                dx.store([i * BLOCK_M, k0], part.to(NUMERICS.dtype))
            else:
                _write(dx, part, m, k, M, K)
    if TOTALS > 0:
        if tl.program_id(0) == tl.num_programs(0) - 1:
            for t in range(TOTALS):
                _total(vectors_ptr, totals_ptr, t, N, 1024)
