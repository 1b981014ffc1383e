"""After y: one read of dy and one of x, for everything else that backward sums.

A sum that several programs contribute to goes to partial sums, which `finish._finish_kernel` adds up. The read of x
adds the bands of S itself.
"""

import triton
import triton.language as tl

from glora_kernels.kernels.common import (
    _beta,
    _columns_from,
    _dot_thin,
    _dropped,
    _read,
    _read_banded,
    _read_banded_vector,
    _read_vector,
    _round,
    _seed_of,
    _store,
    _thin_product,
    _transposed,
    _write,
)
from glora_kernels.kernels.operands import Matrix, Vector
from glora_kernels.reference import recovery

_SUM, _SQUARES = tl.constexpr(recovery.SUM), tl.constexpr(recovery.SQUARES)
_LINE = tl.constexpr(16)


@triton.jit
def _padded(size):
    """Numbers in a row of S, or in one of τ: whole lines, for loads of 16 bytes at any rank and any M."""
    return tl.cdiv(size, _LINE) * _LINE


@triton.jit
def _without_terms(
    y, h, terms, sigma, m, n, M, N, R, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(y - h·upᵀ - σ·bᵀ - β, the largest of |y| and what is left before β): what is Z∘(1+a) of a tile of y."""
    largest = tl.abs(y)
    if terms.up is not None:
        y -= _thin_product(h, Matrix(terms.up, R, 1), m, n, M, N, R, R, 1, NUMERICS, BLOCK_M, BLOCK_N, 16)
    if terms.b is not None:
        y -= sigma[:, None] * _read_vector(terms.b, n, N)[None, :]
    largest = tl.maximum(largest, tl.abs(y))
    if terms.shift.bias is not None or terms.shift.e is not None or terms.shift.wc is not None:
        y -= _beta(terms.shift, n, N)[None, :]
    return y, largest


@triton.jit(do_not_specialize=["M", "P", "R", "band_width"])
def _dy_kernel(
    dy,
    y,
    terms,
    s,
    tau,
    factor,
    columns,
    M,
    N,
    P,
    R,
    band_width,
    scale,
    NUMERICS: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One read of dy for all that is made from it: S and τ along N, the gradients' sums along M.

    Over a band of N: s[band,m] = [Σₙ dy·U | scale·Σₙ dy·up] (P+R) and tau[band,m] = Σₙ dy·b[n]. Over the rows of
    program i: factor[i,c,n] = Σₘ [P|h][m,c]·dy[m,n], and of `Columns` g, sigma and q as far as present. q: Σₘ q with
    q = dy∘(y - h·upᵀ - σ·b - β), and where y holds more than Z the judges Σₘ(p - 1.5|q|) and Σₘ(p² - 2q²), with
    p = |dy|·(the largest of what q was found through). `band_width` is a multiple of BLOCK_N, P and R of RANK_STEP.
    """
    # The columns of a large S by programs of their own, beside each other in time to share dy in the L2.
    across = tl.maximum(tl.maximum(tl.cdiv(P, BLOCK_P), tl.cdiv(R, BLOCK_R)), 1)
    i = tl.program_id(0) // across
    rank_block = tl.program_id(0) % across
    band = tl.program_id(1)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    p = rank_block * BLOCK_P + tl.arange(0, BLOCK_P)
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_H)
    # What they are, written so that the compiler sees of what they are multiples.
    P = P // RANK_STEP * RANK_STEP
    R = R // RANK_STEP * RANK_STEP
    # Sᵀ and not S: 16 rows of the rank keep the product on mma.sync, which takes what dy was loaded for elsewhere.
    u_acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    tau_acc = tl.zeros((BLOCK_M,), tl.float32)
    low = None
    if terms.low is not None:
        low = Matrix(terms.low, P + R, 1)
    if factor is not None:
        h = _read(_transposed(low), c, m, P + R, M).to(NUMERICS.factor_dtype)
    sigma = None
    if terms.sigma is not None:
        sigma = _read_vector(terms.sigma, m, M)
    # Told, so that dy is read 16 bytes at a time.
    first = tl.multiple_of(band * band_width, 16)
    for n0 in range(first, tl.minimum(first + band_width, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        value = _read(dy, m, n, M, N)
        if s is not None:
            if terms.u is not None:
                u = _read(_transposed(Matrix(terms.u, P, 1)), p, n, P, N).to(NUMERICS.factor_dtype)
                u_acc = _dot_thin(u, value.T, u_acc, NUMERICS)
            if terms.up is not None:
                up = _read(_transposed(Matrix(terms.up, R, 1)), r, n, R, N).to(NUMERICS.factor_dtype)
                up_acc = _dot_thin(up, value.T, up_acc, NUMERICS)
        if tau is not None:
            tau_acc += tl.sum(value.to(tl.float32) * _read_vector(terms.b, n, N)[None, :], 1)
        if factor is not None:
            zeros = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
            part = _dot_thin(h, value, zeros, NUMERICS)
            _store(factor.ptr + tl.cast(i, tl.int64) * factor.step, part, c, n, factor.row, 1, P + R, N)
        if rank_block == 0:
            at = n
            if columns.end is not None:
                at += tl.cast(i, tl.int64) * columns.step
            if columns.g is not None:
                tl.store(columns.g + at, tl.sum(value.to(tl.float32), 0), mask=n < N)
            if columns.sigma is not None:
                tl.store(columns.sigma + at, tl.sum(value.to(tl.float32) * sigma[:, None], 0), mask=n < N)  # type: ignore[index]
            if columns.q is not None:
                rest = _read(y, m, n, M, N).to(tl.float32)
                if columns.judges is not None:
                    rest, largest = _without_terms(rest, low, terms, sigma, m, n, M, N, R, NUMERICS, BLOCK_M, BLOCK_N)
                    p_value = tl.abs(value.to(tl.float32)) * largest
                    q_value = value.to(tl.float32) * rest
                    tl.store(columns.judges + at, tl.sum(p_value - _SUM * tl.abs(q_value), 0), mask=n < N)
                    squares = tl.sum(p_value * p_value - _SQUARES * (q_value * q_value), 0)
                    tl.store(columns.judges + columns.end + at, squares, mask=n < N)
                tl.store(columns.q + at, tl.sum(value.to(tl.float32) * rest, 0), mask=n < N)
    if s is not None:
        width = _padded(P + R)
        s += tl.cast(band, tl.int64) * M * width
        if terms.u is not None:
            _store(s, u_acc, p, m, 1, width, P, M)
            s += P
        if terms.up is not None:  # and zeros to the end of the row
            _store(s, up_acc * scale, r, m, 1, width, width - P, M)
    if tau is not None:
        tl.store(tau + tl.cast(band, tl.int64) * _padded(M) + m, tau_acc, mask=(m < M) & (rank_block == 0))


@triton.jit(do_not_specialize=["seed", "threshold", "M", "P", "R"])
def _x_kernel(
    x,
    s,
    tau,
    a_down,
    b_down,
    dx,
    p_part,
    v_part,
    seed,
    M,
    K,
    P,
    R,
    threshold,
    inv_keep,
    BANDS: tl.constexpr,
    NUMERICS: tl.constexpr,
    P_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One read of x for the gradients that multiply it, by splits of the rows; x dropped for columns of S from P on.

    p_part[split] = S[:, :P]ᵀ·x (P,K), v_part[split] = S[:, P:]ᵀ·drop(x)/(1-p) (R,K). With `dx` also
    dx[m,k] = Σₚ S·a_down + mask∘(Σᵣ S·b_down)/(1-p) + τ[m], for the vendor's product to be added to.
    """
    P = P // P_STEP * P_STEP  # what it is: for the compiler, a multiple of P_STEP
    split = tl.program_id(1)
    across = tl.cdiv(K, BLOCK_K)
    rank_block = tl.program_id(0) // across  # the columns of a large S by programs of their own
    k0 = tl.program_id(0) % across * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    p = rank_block * BLOCK_P + tl.arange(0, BLOCK_P)
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    p_acc = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    v_acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    rows = tl.cdiv(tl.cdiv(M, tl.num_programs(1)), BLOCK_M) * BLOCK_M
    for m0 in range(split * rows, tl.minimum((split + 1) * rows, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        if p_part is not None or v_part is not None:
            block = _read(x, m, k, M, K)
        if p_part is not None:
            s_block = _read_banded(s, p, m, s.row, M, M, BANDS, True).to(NUMERICS.factor_dtype)
            p_acc = _dot_thin(s_block, block, p_acc, NUMERICS)
        if v_part is not None:
            if seed is not None:
                block = _dropped(block, _seed_of(seed), m, k0, threshold, 1.0, BLOCK_M, BLOCK_K)
            # Whole rows of S, whose length is known to be a multiple of 16 where R is not.
            s_block = _read_banded(_columns_from(s, P), r, m, s.row - P, M, M, BANDS, True).to(NUMERICS.factor_dtype)
            v_acc = _dot_thin(s_block, block, v_acc, NUMERICS)
        if dx is not None:
            if rank_block == 0:
                term = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                if b_down is not None:
                    term = _thin_product(
                        _columns_from(s, P), _transposed(b_down), m, k, M, K, R, s.row if a_down is None else R, BANDS,
                        NUMERICS, BLOCK_M, BLOCK_K, BLOCK_R,
                    )  # fmt: skip
                    if seed is not None:
                        term = _dropped(term, _seed_of(seed), m, k0, threshold, inv_keep, BLOCK_M, BLOCK_K)
                if a_down is not None:
                    term += _thin_product(
                        s, _transposed(a_down), m, k, M, K, P, P, BANDS, NUMERICS, BLOCK_M, BLOCK_K, BLOCK_P
                    )
                if tau is not None:
                    term += _read_banded_vector(Vector(tau, 1), m, M, _padded(M), BANDS)[:, None]
                _write(dx, _round(term, m, k, dx.ptr.dtype.element_ty), m, k, M, K)
    if p_part is not None:
        _store(p_part + tl.cast(split, tl.int64) * P * K, p_acc, p, k, K, 1, P, K)
    if v_part is not None:
        _store(v_part + tl.cast(split, tl.int64) * R * K, v_acc * inv_keep, r, k, K, 1, R, K)
