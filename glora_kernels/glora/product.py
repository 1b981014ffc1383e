"""The two large products: y in forward and dx in backward, each with its adapter terms fused.

The grid is persistent (as many programs as the card runs at once, which walk the tiles), or one program per tile.
Operands are tensor descriptors (with `TMA`) or matrices (cp.async). The low-rank term is added after the product is
scaled; it is added and the result stored in PARTS, pieces of the tile's columns. In both kernels W is (columns of the
result, depth); COLS_FIRST says that its descriptor has the columns first, else the depth.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.glora.finish import _total
from glora_kernels.operands import Matrix, Numerics, Terms
from glora_kernels.runtime import configs, tables
from glora_kernels.runtime.launch import (
    NO_DROPOUT,
    Dropout,
    Launch,
    can_describe,
    descriptor,
    halves,
    matrix,
    numerics,
    options,
    rank_step,
    sums_of,
    terms_of,
    vector,
)
from glora_kernels.runtime.planning import programs_of
from glora_kernels.runtime.recording import rows
from glora_kernels.runtime.sizes import lesser
from glora_kernels.runtime.spills import Beside, fitted

GROUP = 8
"""Row tiles that are computed together, so that they share columns of W in the L2 (`tile.place_of`)."""

MAX_DESCRIBED = 4
"""The most products of one launch with tensor descriptors: the kernel has a copy of its loop for each."""

RANK_BLOCK = 16
"""The step in which kernels walk a rank of any size: a wider one would spill registers, which hold a tile of y too."""


@triton.jit(do_not_specialize=["M", "P", "R"])
def _glora_fwd_kernel(
    x, w, y, terms, low_sum_ptr, sigma_sum_ptr, M, N, K, P, R,
    RANK_STEP: tl.constexpr, BANDS: tl.constexpr, TMA: tl.constexpr, COLS_FIRST: tl.constexpr, PARTS: tl.constexpr,
    NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """y[m,n] = (Σₖ x[m,k]·W[n,k])·(1+a[n]) + Σₚ P[m,p]·U[n,p] + Σᵣ h[m,r]·B_up[n,r] + σ[m]·b[n] + β[n].

    [P | h] (BANDS, M, P+R) and σ (BANDS, M) are summed over their bands; with BANDS > 1 the programs of the first
    columns write the sums, contiguous, for backward. P and R are multiples of RANK_STEP.
    """
    # Tells the compiler their divisor, so that factors are read 16 bytes at a time.
    P = P // RANK_STEP * RANK_STEP
    R = R // RANK_STEP * RANK_STEP
    num_i = tl.cdiv(M, BLOCK_M)
    num_j = tl.cdiv(N, BLOCK_N)
    for t in tl.range(tl.program_id(0), num_i * num_j, tl.num_programs(0)):
        i, j = tile.place_of(t, num_i, num_j, GROUP)
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = tile.product(
            acc, x, w, None, i * BLOCK_M, j * BLOCK_N, M, N, K, TMA, COLS_FIRST, NUMERICS,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sigma = None
        if terms.b is not None:
            sigma = tile.read_banded_vector(terms.sigma, m, M, M, BANDS)
        parts = tile.column_parts(acc, BLOCK_M, BLOCK_N, PARTS)
        for q in tl.static_range(PARTS):
            n0 = j * BLOCK_N + q * (BLOCK_N // PARTS)
            n = n0 + tl.arange(0, BLOCK_N // PARTS)
            part = tile.add_terms(
                parts[q], terms, None, None, sigma, m, n, M, N, P, R, BANDS, NUMERICS,
                BLOCK_M, BLOCK_N // PARTS, BLOCK_R, BLOCK_R,
            )  # fmt: skip
            tile.put(y, part, i * BLOCK_M, n0, m, n, M, N, TMA, NUMERICS)
        if BANDS > 1:
            if j == 0:
                if low_sum_ptr is not None:
                    for c0 in tl.range(0, P + R, BLOCK_R, num_stages=1):
                        c = c0 + tl.arange(0, BLOCK_R)
                        low = tile.read_banded(terms.low, m, c, M, P + R, M, BANDS)
                        tile.write(Matrix(low_sum_ptr, P + R, 1), low, m, c, M, P + R)
                if sigma_sum_ptr is not None:
                    tl.store(sigma_sum_ptr + m, sigma, mask=m < M)


def glora_fwd_launch(
    x: Tensor, weight: Tensor, y: Tensor, terms: Terms,
    *, low_sum: Tensor | None = None, sigma_sum: Tensor | None = None, by_m: int | None = None, arch: str,
) -> Launch:  # fmt: skip
    """y (M,N) = (x·Wᵀ)∘(1+a) + P·Uᵀ + h·upᵀ + σ·bᵀ + β, with `low` = [P | h] (bands,M,P+R) and σ (bands,M).

    u and up are contiguous. `low_sum` (M,P+R) and `sigma_sum` (M,) receive the sums over more than one band. `by_m`:
    the M that the configuration is chosen by; None: that of x.
    """
    m, (n, k) = rows(x), weight.shape
    p, r = (0 if t is None else t.shape[1] for t in (terms.u, terms.up))
    bands = next((t.shape[0] for t in (terms.low, terms.sigma) if t is not None), 1)
    shape = configs.Shape(by_m or configs.m_class(m), n, k, max(p, r))
    numbers, shift, cols_first = numerics(x.dtype, terms.u, terms.up), terms.shift, weight.stride(1) == 1
    config, pointers = for_operands(
        tables.choose("fwd", arch, x.dtype, shape, weight.dtype), [x], [weight], [y], cols_first, shape.m, arch
    )  # fmt: skip
    beside = Beside(
        arch, x.dtype, pairs=min(p, r) > 0, banded=bands > 1, product=p > 0, halves=halves(numbers),
        aligned=x.stride(0) % 16 == 0, pointers=pointers,
        added=any(t is not None for t in (terms.a, terms.u, terms.up, terms.b, shift.wc, shift.d, shift.e)),
    )  # fmt: skip
    config = fitted("fwd", config, beside)
    args = {
        "x": left_operand(x, config), "w": right_operand(weight, config, cols_first), "y": out_operand(y, config),
        "terms": terms_of(terms),
        "low_sum_ptr": low_sum, "sigma_sum_ptr": sigma_sum,
        "M": m, "N": n, "K": k, "P": p, "R": r,
        "RANK_STEP": rank_step(p, r), "BANDS": bands, "TMA": bool(config["tma"]),
        **tile_arguments(config, cols_first, numbers, "BLOCK_N", "BLOCK_K"),
        "BLOCK_R": RANK_BLOCK, "GROUP": GROUP,
    }  # fmt: skip
    return product_launch(_glora_fwd_kernel, [y], args, config, arch)


@triton.jit(do_not_specialize=["seed", "threshold", "columns_before", "M", "P", "R"])
def _glora_dx_kernel(
    dy, w, dx, s, a_down, b_down, a, tau, vectors_ptr, totals_ptr, seed, M, N, K, P, R, threshold, inv_keep,
    columns_before,
    RANK_STEP: tl.constexpr, TOTALS: tl.constexpr, BANDS: tl.constexpr, TMA: tl.constexpr, COLS_FIRST: tl.constexpr,
    PARTS: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx[m,k] = Σₙ dy[m,n]·(1+a[n])·W[n,k] + Σₚ S[m,p]·A_down[p,k] + mask∘(Σᵣ S[m,P+r]·B_down[r,k])/(1-p) + τ[m].

    S (BANDS, M, P+R) and τ (BANDS, M) are summed over their bands; rows of S may be padded with zeros. The first P
    columns of S belong to the product variant, which has no dropout. The last program also sums TOTALS vectors (N,)
    that the launch before wrote: the gradients of constants, which would otherwise take a launch of their own.
    """
    P = P // RANK_STEP * RANK_STEP
    R = R // RANK_STEP * RANK_STEP
    num_i = tl.cdiv(M, BLOCK_M)
    num_j = tl.cdiv(K, BLOCK_K)
    for t in tl.range(tl.program_id(0), num_i * num_j, tl.num_programs(0)):
        i, j = tile.place_of(t, num_i, num_j, GROUP)
        m = i * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        acc = tile.product(
            acc, dy, w, a, i * BLOCK_M, j * BLOCK_K, M, K, N, TMA, COLS_FIRST, NUMERICS,
            BLOCK_M, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        parts = tile.column_parts(acc, BLOCK_M, BLOCK_K, PARTS)
        for q in tl.static_range(PARTS):
            part = parts[q]
            k0 = j * BLOCK_K + q * (BLOCK_K // PARTS)
            k = k0 + tl.arange(0, BLOCK_K // PARTS)
            if a_down is not None:
                part += tile.thin_product(
                    s, tile.transposed(a_down), m, k, M, K, P, P, BANDS, NUMERICS, BLOCK_M, BLOCK_K // PARTS, BLOCK_R
                )  # fmt: skip
            if b_down is not None:
                term = tile.thin_product(
                    tile.columns_from(s, None if a_down is None else P), tile.transposed(b_down), m, k, M, K,
                    R, s.row if a_down is None else R, BANDS, NUMERICS, BLOCK_M, BLOCK_K // PARTS, BLOCK_R,
                )  # fmt: skip
                if seed is not None:
                    term = tile.dropped(
                        term, tile.seed_of(seed), m, k0, threshold, inv_keep, BLOCK_M, BLOCK_K // PARTS, columns_before
                    )  # fmt: skip
                part += term
            if tau is not None:
                part += tile.read_banded_vector(tau, m, M, M, BANDS)[:, None]
            tile.put(dx, part, i * BLOCK_M, k0, m, k, M, K, TMA, NUMERICS)
    if TOTALS > 0:
        if tl.program_id(0) == tl.num_programs(0) - 1:
            for t in range(TOTALS):
                _total(vectors_ptr, totals_ptr, t, N, 1024)


def glora_dx_launch(
    dy: Tensor, weight: Tensor, dx: Tensor,
    *, s: Tensor | None = None, a_down: Tensor | None = None, b_down: Tensor | None = None, a: Tensor | None = None,
    tau: Tensor | None = None, totals: tuple[Tensor, Tensor] | None = None, dropout: Dropout = NO_DROPOUT,
    by_m: int | None = None, arch: str,
) -> Launch:  # fmt: skip
    """dx (M,K) = (dy∘(1+a))·W + S[:, :P]·a_down + mask∘(S[:, P:]·b_down)/(1-p) + τ·1ᵀ, S (bands,M,P+R), τ (bands,M).

    `totals`: vectors (I,N), which the launch before must have written, and memory (I,) for their sums over N. `by_m`:
    the M that the configuration is chosen by; None: that of dy.
    """
    m, (n, k) = rows(dy), weight.shape
    p, r = (0 if t is None else t.shape[0] for t in (a_down, b_down))
    bands = next((t.shape[0] for t in (s, tau) if t is not None), 1)
    shape = configs.Shape(by_m or configs.m_class(m), n, k, max(p, r))
    numbers, cols_first = numerics(dy.dtype, a_down, b_down), weight.stride(0) == 1
    config, pointers = for_operands(
        tables.choose("dx", arch, dy.dtype, shape, weight.dtype), [dy], [weight.t()], [dx], cols_first, shape.m, arch
    )  # fmt: skip
    beside = Beside(
        arch, dy.dtype, pairs=min(p, r) > 0, product=p > 0, halves=halves(numbers), drops=dropout.p > 0.0,
        aligned=dy.stride(0) % 16 == 0, scaled=a is not None, pointers=pointers,
        cast=weight.dtype != dy.dtype and b_down is not None,
    )  # fmt: skip
    config = fitted("dx", config, beside)
    vectors, sums = totals or (None, None)
    args = {
        "dy": left_operand(dy, config), "w": right_operand(weight.t(), config, cols_first),
        "dx": out_operand(dx, config),
        "s": matrix(s), "a_down": matrix(a_down), "b_down": matrix(b_down), "a": vector(a), "tau": sums_of(tau),
        "vectors_ptr": vectors, "totals_ptr": sums,
        "M": m, "N": n, "K": k, "P": p, "R": r,
        **dropout.arguments(b_down),
        "RANK_STEP": rank_step(p, r) if p else 1,  # with P = 0 the padded rows of S are read whole
        "TOTALS": 0 if vectors is None else vectors.shape[0], "BANDS": bands, "TMA": bool(config["tma"]),
        **tile_arguments(config, cols_first, numbers, "BLOCK_K", "BLOCK_N"),
        "BLOCK_R": RANK_BLOCK, "GROUP": GROUP,
    }  # fmt: skip
    return product_launch(_glora_dx_kernel, [dx], args, config, arch)


def for_operands(
    config: dict[str, int], lefts: Sequence[Tensor], rights: Sequence[Tensor], outs: Sequence[Tensor],
    cols_first: bool, m: int, arch: str,
) -> tuple[dict[str, int], bool]:  # fmt: skip
    """(the configuration, or another one for pointers where TMA cannot read these operands; whether it is the latter).

    For one or several products out = left·rightᵀ, right (cols, depth). `cols_first`: the rows of right are contiguous,
    else its columns. m: the M that configurations are chosen by.
    """
    mixed = rights[0].dtype != lefts[0].dtype
    read = (*lefts, *(_stored(right, cols_first) for right in rights), *outs)
    if not config["tma"] or (not mixed and len(lefts) <= MAX_DESCRIBED and all(map(can_describe, read))):
        return config, False
    n = sum(out.shape[1] for out in outs)
    return configs.large_product(arch, lefts[0].dtype, m, n, mixed=mixed, tma=False), True


def left_operand(left: Tensor, config: dict[str, int]) -> Any:
    """The left operand (rows, depth), as a descriptor or a matrix."""
    return descriptor(left, config["rows"], config["depth"]) if config["tma"] else matrix(left)


def right_operand(right: Tensor, config: dict[str, int], cols_first: bool) -> Any:
    """The right operand (cols, depth), as a matrix, or a descriptor with its contiguous dimension last."""
    if not config["tma"]:
        return matrix(right)
    tall, wide = (config["cols"], config["depth"]) if cols_first else (config["depth"], config["cols"])
    return descriptor(_stored(right, cols_first), tall, wide)


def out_operand(out: Tensor, config: dict[str, int]) -> Any:
    """The result (rows, cols), as a matrix, or a descriptor for one part of a tile."""
    return descriptor(out, config["rows"], config["cols"] // config["parts"]) if config["tma"] else matrix(out)


def _stored(right: Tensor, cols_first: bool) -> Tensor:
    return right if cols_first else right.t()


def tile_arguments(
    config: dict[str, int], cols_first: bool, numbers: Numerics, cols: str, depth: str
) -> dict[str, Any]:  # fmt: skip
    """The constants of a large product's kernel; `cols` and `depth` are its names for these sides of the tile."""
    return {
        "COLS_FIRST": cols_first, "PARTS": config["parts"], "NUMERICS": numbers,
        "BLOCK_M": config["rows"], cols: config["cols"], depth: config["depth"],
    }  # fmt: skip


def tiles_of(outs: Sequence[Tensor], config: dict[str, int]) -> int:
    return sum(cdiv(rows(out), config["rows"]) * cdiv(out.shape[1], config["cols"]) for out in outs)


def product_launch(
    kernel: Any, outs: Sequence[Tensor], args: dict[str, Any], config: dict[str, int], arch: str
) -> Launch:  # fmt: skip
    """The launch of a large product: one program per tile, or as many as the card runs at once if persistent."""
    programs = tiles_of(outs, config)
    if config["persistent"]:
        programs = lesser(programs, programs_of(outs[0], arch))
    return Launch(kernel, (programs,), args, options(config, args))
