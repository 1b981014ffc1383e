"""The sums of backward other than the large products, from one read of dy and one read of x.

They are written as partial sums: over `bands` (number, width) of N, which the readers of S and τ add, and over `splits`
of the rows, which `finish_launch` adds. The caller asks how many there are, and allocates them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.operands import NO_COLUMNS, Columns, Matrix, Parts, Terms, Vector
from glora_kernels.reference import recovery
from glora_kernels.runtime import configs, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import (
    NO_DROPOUT,
    Dropout,
    Launch,
    halves,
    matrix,
    numerics,
    options,
    rank_step,
    terms_of,
)
from glora_kernels.runtime.recording import rows
from glora_kernels.runtime.spills import Beside, fitted

_SUM, _SQUARES = tl.constexpr(recovery.SUM), tl.constexpr(recovery.SQUARES)


_LINE = tl.constexpr(16)


@triton.jit
def _padded(size):
    """The length of a row of S or τ in memory: a multiple of 16 numbers, so that loads of 16 bytes are possible."""
    return tl.cdiv(size, _LINE) * _LINE


def padded(size: int) -> int:
    """`_padded` on the host."""
    return cdiv(size, 16) * 16


@triton.jit
def _without_terms(
    y, h, terms, sigma, m, n, M, N, R,
    NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Z∘(1+a) of a tile of y: (y - h·upᵀ - σ·bᵀ - β, the largest magnitude of y and of y without its B terms)."""
    largest = tl.abs(y)
    if terms.up is not None:
        y -= tile.thin_product(h, Matrix(terms.up, R, 1), m, n, M, N, R, R, 1, NUMERICS, BLOCK_M, BLOCK_N, 16)
    if terms.b is not None:
        y -= sigma[:, None] * tile.read_vector(terms.b, n, N)[None, :]
    largest = tl.maximum(largest, tl.abs(y))
    if terms.shift.bias is not None or terms.shift.e is not None or terms.shift.wc is not None:
        y -= tile.beta(terms.shift, n, N)[None, :]
    return y, largest


@triton.jit(do_not_specialize=["M", "P", "R", "band_width"])
def _dy_kernel(
    dy, y, terms, s, tau, factor, columns, M, N, P, R, band_width, scale,
    NUMERICS: tl.constexpr, RANK_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Everything that is computed from dy, in one read of it: S and τ, sums along N, and gradients, sums along M.

    Over a band of N: s[band,m] = [Σₙ dy·U | scale·Σₙ dy·up] (P+R) and tau[band,m] = Σₙ dy·b[n]. Over the rows of
    program i: factor[i,c,n] = Σₘ [P|h][m,c]·dy[m,n], and those of g, sigma and q in `Columns` that are not None. There
    q = dy∘(y - h·upᵀ - σ·b - β); if y has more terms than Z∘(1+a), also the judges Σₘ(p - 1.5|q|) and Σₘ(p² - 2q²),
    p = |dy|·(the largest value on the way to q). `band_width` is a multiple of BLOCK_N, P and R of RANK_STEP.
    """
    # Blocks of S's columns have programs of their own, neighbours in time, so that they share dy in the L2.
    across = tl.maximum(tl.maximum(tl.cdiv(P, BLOCK_P), tl.cdiv(R, BLOCK_R)), 1)
    i = tl.program_id(0) // across
    rank_block = tl.program_id(0) % across
    band = tl.program_id(1)
    m = i * BLOCK_M + tl.arange(0, BLOCK_M)
    p = rank_block * BLOCK_P + tl.arange(0, BLOCK_P)
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_H)
    # No change: tells the compiler that they are multiples of RANK_STEP.
    P = P // RANK_STEP * RANK_STEP
    R = R // RANK_STEP * RANK_STEP
    # Sᵀ and not S: with 16 rows (of the rank) the product stays on mma.sync, which takes dy as it is in registers.
    u_acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    up_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    tau_acc = tl.zeros((BLOCK_M,), tl.float32)
    low = None
    if terms.low is not None:
        low = Matrix(terms.low, P + R, 1)
    if factor is not None:
        h = tile.read(tile.transposed(low), c, m, P + R, M).to(tile.dtype_of(NUMERICS.factor_name))
    sigma = None
    if terms.sigma is not None:
        sigma = tile.read_vector(terms.sigma, m, M)
    # Tells the compiler the divisor, so that dy is read 16 bytes at a time.
    first = tl.multiple_of(band * band_width, 16)
    for n0 in range(first, tl.minimum(first + band_width, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        value = tile.read(dy, m, n, M, N)
        if s is not None:
            if terms.u is not None:
                u = tile.read(tile.transposed(Matrix(terms.u, P, 1)), p, n, P, N).to(
                    tile.dtype_of(NUMERICS.factor_name)
                )
                u_acc = tile.dot_thin(u, value.T, u_acc, NUMERICS)
            if terms.up is not None:
                up = tile.read(tile.transposed(Matrix(terms.up, R, 1)), r, n, R, N).to(
                    tile.dtype_of(NUMERICS.factor_name)
                )
                up_acc = tile.dot_thin(up, value.T, up_acc, NUMERICS)
        if tau is not None:
            tau_acc += tl.sum(value.to(tl.float32) * tile.read_vector(terms.b, n, N)[None, :], 1)
        if factor is not None:
            zeros = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
            part = tile.dot_thin(h, value, zeros, NUMERICS)
            tile.write(Matrix(factor.ptr + tl.cast(i, tl.int64) * factor.step, factor.row, 1), part, c, n, P + R, N)
        if rank_block == 0:
            at = n
            if columns.end is not None:
                at += tl.cast(i, tl.int64) * columns.step
            if columns.g is not None:
                tl.store(columns.g + at, tl.sum(value.to(tl.float32), 0), mask=n < N)
            if columns.sigma is not None:
                tl.store(columns.sigma + at, tl.sum(value.to(tl.float32) * sigma[:, None], 0), mask=n < N)  # type: ignore[index]
            if columns.q is not None:
                rest = tile.read(y, m, n, M, N).to(tl.float32)
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
            tile.write(Matrix(s, 1, width), u_acc, p, m, P, M)
            s += P
        if terms.up is not None:  # up_acc is zero beyond R: zeros fill the padding of the row
            tile.write(Matrix(s, 1, width), up_acc * scale, r, m, width - P, M)
    if tau is not None:
        tl.store(tau + tl.cast(band, tl.int64) * _padded(M) + m, tau_acc, mask=(m < M) & (rank_block == 0))


def dy_config(
    shape: Shape, dtype: torch.dtype, arch: str, mixed: bool, pairs: bool, factors: torch.dtype, aligned: bool
) -> dict[str, int]:
    """The configuration of `dy_launch`.

    mixed: it reads y, which has more terms than Z∘(1+a). pairs: S has columns of both U and up. factors: the dtype of
    products with factors. aligned: the row stride of dy is a multiple of 16 numbers.
    """
    config = tables.choose("dy_mixed" if mixed else "dy", arch, dtype, shape)
    wide = halves(numerics(dtype, factors))
    return fitted("dy", config, Beside(arch, dtype, pairs=pairs, halves=wide, aligned=aligned, reads_y=mixed))


def dy_bands(shape: Shape, config: dict[str, int], arch: str) -> tuple[int, int]:
    """(number, width) of the bands of N over which S and τ are partial sums.

    Few, since each block of columns of x reads all of them; one where S is large.
    """
    most = 4 if shape.r <= configs.MAX_FACTOR_RANK else 1
    return configs.bands(arch, shape.m, config["rows"], shape.n, config["cols"], most)


def dy_launch(
    dy: Tensor, given: Terms,
    *, y: Tensor | None = None, s: Tensor | None = None, tau: Tensor | None = None, factor: Parts | None = None,
    columns: Columns = NO_COLUMNS, ranks: tuple[int, int], band_width: int, scale: float = 1.0,
    factors: torch.dtype | None = None, config: dict[str, int],
) -> Launch:  # fmt: skip
    """S (bands,M,padded) = [dy·U | scale·dy·up], τ (bands,padded) = dy·b, and sums over the rows of each program.

    factor (P+R,N): Σₘ [P|h]·dy. columns: vectors (N,), those of g, sigma, q and judges that are wanted; q needs y, and
    `given` then has the terms of y. Its `low` is [P | h] (M,P+R). Products with factors are in the dtype of dy, or
    of `factors` where that is wider.
    """
    m, n = rows(dy), dy.shape[1]
    p, r = ranks
    wide = numerics(dy.dtype, factors)
    args = {
        "dy": matrix(dy), "y": matrix(y), "terms": terms_of(given)._replace(low=given.low),
        "s": s, "tau": tau, "factor": factor, "columns": columns,
        "M": m, "N": n, "P": p, "R": r, "band_width": band_width, "scale": float(scale),
        "NUMERICS": wide,
        "RANK_STEP": rank_step(p, r),
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"],
        **_rank_blocks(ranks),
        "BLOCK_H": 16 if factor is None else configs.block_r(p + r),
    }  # fmt: skip
    grid = cdiv(m, config["rows"]) * _across(ranks), cdiv(n, band_width)
    return Launch(_dy_kernel, grid, args, options(config, args))


@triton.jit(do_not_specialize=["seed", "threshold", "columns_before", "M", "P", "R"])
def _x_kernel(
    x, s, tau, a_down, b_down, dx, p_part, v_part, seed, M, K, P, R, threshold, inv_keep, columns_before,
    BANDS: tl.constexpr, NUMERICS: tl.constexpr, P_STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients that are products with x, in one read of it, over splits of the rows.

    p_part[split] = S[:, :P]ᵀ·x (P,K), v_part[split] = S[:, P:]ᵀ·drop(x)/(1-p) (R,K). With `dx` also
    dx[m,k] = Σₚ S·a_down + mask∘(Σᵣ S·b_down)/(1-p) + τ[m], to which the vendor's GEMM is added later.
    """
    P = P // P_STEP * P_STEP  # no change: tells the compiler that it is a multiple of P_STEP
    split = tl.program_id(1)
    across = tl.cdiv(K, BLOCK_K)
    rank_block = tl.program_id(0) // across  # blocks of S's columns have programs of their own
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
            block = tile.read(x, m, k, M, K)
        if p_part is not None:
            s_block = tile.read_banded(s, p, m, s.row, M, M, BANDS, True).to(tile.dtype_of(NUMERICS.factor_name))
            p_acc = tile.dot_thin(s_block, block, p_acc, NUMERICS)
        if v_part is not None:
            if seed is not None:
                block = tile.dropped(
                    block, tile.seed_of(seed), m, k0, threshold, 1.0, BLOCK_M, BLOCK_K, columns_before
                )  # fmt: skip
            # Padded rows of S are read whole: the compiler knows that their length is a multiple of 16, but not of R.
            s_block = tile.read_banded(tile.columns_from(s, P), r, m, s.row - P, M, M, BANDS, True).to(
                tile.dtype_of(NUMERICS.factor_name)
            )
            v_acc = tile.dot_thin(s_block, block, v_acc, NUMERICS)
        if dx is not None:
            if rank_block == 0:
                term = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                if b_down is not None:
                    term = tile.thin_product(
                        tile.columns_from(s, P), tile.transposed(b_down), m, k, M, K, R, s.row if a_down is None else R,
                        BANDS, NUMERICS, BLOCK_M, BLOCK_K, BLOCK_R,
                    )  # fmt: skip
                    if seed is not None:
                        term = tile.dropped(
                            term, tile.seed_of(seed), m, k0, threshold, inv_keep, BLOCK_M, BLOCK_K, columns_before
                        )  # fmt: skip
                if a_down is not None:
                    term += tile.thin_product(
                        s, tile.transposed(a_down), m, k, M, K, P, P, BANDS, NUMERICS, BLOCK_M, BLOCK_K, BLOCK_P
                    )
                if tau is not None:
                    term += tile.read_banded_vector(Vector(tau, 1), m, M, _padded(M), BANDS)[:, None]
                tile.write(dx, tile.rounded(term, m, k, dx.ptr.dtype.element_ty), m, k, M, K)
    if p_part is not None:
        tile.write(Matrix(p_part + tl.cast(split, tl.int64) * P * K, K, 1), p_acc, p, k, P, K)
    if v_part is not None:
        tile.write(Matrix(v_part + tl.cast(split, tl.int64) * R * K, K, 1), v_acc * inv_keep, r, k, R, K)


def x_splits(shape: Shape, dtype: torch.dtype, arch: str) -> int:
    """How many partial sums over M `x_launch` writes."""
    config = tables.choose("x", arch, dtype, shape)
    programs = cdiv(shape.k, config["cols"]) * cdiv(max(1, shape.r), configs.RANK_BLOCK)
    return configs.row_splits(shape.m, programs, config["rows"])


def x_launch(
    x: Tensor, s: Tensor | None,
    *, ranks: tuple[int, int], splits: int, p_part: Tensor | None = None, v_part: Tensor | None = None,
    dx: Tensor | None = None, downs: tuple[Tensor | None, Tensor | None] = (None, None), tau: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT, factors: torch.dtype | None = None, shape: Shape, arch: str,
) -> Launch:  # fmt: skip
    """p_part (splits,P,K) = S[:, :P]ᵀ·x and v_part (splits,R,K) = S[:, P:]ᵀ·drop(x), S (bands,M,P+R or more).

    With `dx` (M,K) also dx = S[:, :P]·a_down + mask∘(S[:, P:]·b_down)/(1-p) + τ·1ᵀ, downs = (a_down, b_down); if no
    part is wanted, x only gives the sizes. Products are in the dtype of x, or of `factors` where that is wider.
    """
    m, k, how = rows(x), x.shape[1], numerics(x.dtype, factors)
    beside = Beside(
        arch, x.dtype, max(ranks), pairs=min(ranks) > 0, halves=halves(how), aligned=x.stride(0) % 16 == 0
    )  # fmt: skip
    config = fitted("x", tables.choose("x", arch, x.dtype, shape), beside)
    bands = s.shape[0] if s is not None else (1 if tau is None else tau.shape[0])
    args = {
        "x": matrix(x), "s": matrix(s), "tau": tau,
        "a_down": matrix(downs[0]), "b_down": matrix(downs[1]), "dx": matrix(dx),
        "p_part": p_part, "v_part": v_part,
        "M": m, "K": k, "P": ranks[0], "R": ranks[1],
        **dropout.arguments(downs[1] if v_part is None else v_part),
        "BANDS": bands, "NUMERICS": how, "P_STEP": rank_step(ranks[0], 0),
        "BLOCK_M": config["rows"], "BLOCK_K": config["cols"],
        **_rank_blocks(ranks),
    }  # fmt: skip
    return Launch(_x_kernel, (cdiv(k, config["cols"]) * _across(ranks), splits), args, options(config, args))


def _rank_blocks(ranks: tuple[int, int]) -> dict[str, int]:
    p, r = (configs.block_r(rank, configs.RANK_BLOCK) for rank in ranks)
    return {"BLOCK_P": p, "BLOCK_R": r}


def _across(ranks: tuple[int, int]) -> int:
    """How many programs share the columns of S."""
    return max(1, cdiv(max(ranks), configs.RANK_BLOCK))
