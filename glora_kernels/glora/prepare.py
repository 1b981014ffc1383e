"""Before the large product of forward: P, h and σ from x, U or W_eff from W. On the library route, the terms of y.

h and σ may be partial sums over bands of K, which `_glora_fwd_kernel` adds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.operands import Matrix, Pair, Terms
from glora_kernels.runtime import configs, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import (
    NO_DROPOUT,
    Dropout,
    Launch,
    factor_depth,
    halves,
    matrix,
    numerics,
    options,
    terms_of,
    vector,
)
from glora_kernels.runtime.recording import rows
from glora_kernels.runtime.spills import Beside, fitted

MAX_BANDS = 4
"""With more bands the epilogue of the large product would spill registers."""


@triton.jit
def _into_rank(
    x, a_down, b_down, seed, m, M, first_k, last_k, P, R, scale, threshold, inv_keep, columns_before,
    WITH_SUM: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(x·A_downᵀ, s·drop(x)·B_downᵀ, Σₖ x) of the rows m over first_k ≤ k < last_k, first_k a multiple of 8."""
    p_acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    h_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    p = tl.arange(0, BLOCK_P)
    r = tl.arange(0, BLOCK_R)
    for k0 in range(first_k, last_k, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        block = tile.read(x, m, k, M, last_k)
        if WITH_SUM:
            total += tl.sum(block.to(tl.float32), 1)
        if a_down is not None:
            factor = tile.read(tile.transposed(a_down), k, p, last_k, P).to(tile.dtype_of(NUMERICS.factor_name))
            p_acc = tile.dot_thin(block, factor, p_acc, NUMERICS)
        if b_down is not None:
            if seed is not None:
                block = tile.dropped(
                    block, tile.seed_of(seed), m, k0, threshold, 1.0, BLOCK_M, BLOCK_K, columns_before
                )  # fmt: skip
            factor = tile.read(tile.transposed(b_down), k, r, last_k, R).to(tile.dtype_of(NUMERICS.factor_name))
            h_acc = tile.dot_thin(block, factor, h_acc, NUMERICS)
    return p_acc, h_acc * (scale * inv_keep), total + 0.0  # one use of a loop's sum: Triton 3.7 asserts it in a pass


@triton.jit
def _write_low(low, p_acc, h_acc, a_down, b_down, m, M, P, R, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr):
    """low[m] = [P | h], each if its factor is given."""
    if a_down is not None:
        tile.write(low, p_acc, m, tl.arange(0, BLOCK_P), M, P)
    if b_down is not None:
        tile.write(tile.columns_from(low, None if a_down is None else P), h_acc, m, tl.arange(0, BLOCK_R), M, R)


@triton.jit(do_not_specialize=["seed", "threshold", "columns_before", "row_programs", "M", "P", "R"])
def _prepare_kernel(
    x, w, a_up, a_down, b_down, a, low, sigma_ptr, u_ptr, weff_ptr, seed, M, N, K, P, R, row_programs, scale, threshold,
    inv_keep, columns_before,
    NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_WN: tl.constexpr, BLOCK_WK: tl.constexpr,
):  # fmt: skip
    """Everything that y needs before its large product, in one launch: the first programs read x, the others W.

    From x, for each band of K: low[band] = [x·A_downᵀ | s·drop(x)·B_downᵀ] (M, P+R) and σ[band] = Σₖ x. From W:
    U = W·A_up (N, P) in the product variant, or W_eff = W∘(1 + A) with A = A_up·A_down or a vector.
    """
    pid = tl.program_id(0)
    if low is not None or sigma_ptr is not None:
        if pid < row_programs:
            row_blocks = tl.cdiv(M, BLOCK_M)
            band = pid // row_blocks
            m = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
            # A band is a multiple of BLOCK_K, so that x is read 16 bytes at a time.
            width = tl.cdiv(K, (row_programs // row_blocks) * BLOCK_K) * BLOCK_K
            first = band * width
            p_down = None if u_ptr is None else a_down
            p_acc, h_acc, total = _into_rank(
                x, p_down, b_down, seed, m, M, first, tl.minimum(first + width, K),
                P, R, scale, threshold, inv_keep, columns_before, sigma_ptr is not None, NUMERICS,
                BLOCK_M, BLOCK_K, BLOCK_P, BLOCK_R,
            )  # fmt: skip
            if low is not None:
                _write_low(tile.band(low, band, M), p_acc, h_acc, p_down, b_down, m, M, P, R, BLOCK_P, BLOCK_R)
            if sigma_ptr is not None:
                tl.store(sigma_ptr + tl.cast(band, tl.int64) * M + m, total, mask=m < M)
    if u_ptr is not None or weff_ptr is not None:
        if pid >= row_programs:
            t = pid - row_programs
            if u_ptr is not None:
                n = t * BLOCK_WN + tl.arange(0, BLOCK_WN)
                p = tl.arange(0, BLOCK_P)
                u = tl.zeros((BLOCK_WN, BLOCK_P), tl.float32)
                for k0 in range(0, K, BLOCK_WK):
                    k = k0 + tl.arange(0, BLOCK_WK)
                    block = tile.read(w, n, k, N, K).to(x.ptr.dtype.element_ty)
                    factor = tile.read(a_up, k, p, K, P).to(tile.dtype_of(NUMERICS.factor_name))
                    u = tile.dot_thin(block, factor, u, NUMERICS)
                tile.write(Matrix(u_ptr, P, 1), u, n, p, N, P)
            else:
                across = tl.cdiv(K, BLOCK_WK)
                n = (t // across) * BLOCK_WN + tl.arange(0, BLOCK_WN)
                k = (t % across) * BLOCK_WK + tl.arange(0, BLOCK_WK)
                block = tile.read(w, n, k, N, K).to(tl.float32)
                if a is not None:
                    block += block * tile.read_vector(a, n, N)[:, None]
                else:
                    PRECISION: tl.constexpr = NUMERICS.factor_precision
                    UPCAST: tl.constexpr = NUMERICS.upcast
                    block += block * tile.factor_product(
                        Pair(a_up, a_down), n, k, N, K, P, PRECISION, UPCAST, BLOCK_WN, BLOCK_WK, BLOCK_A
                    )  # fmt: skip
                tile.write(Matrix(weff_ptr, K, 1), tile.rounded(block, n, k, weff_ptr.dtype.element_ty), n, k, N, K)


class BeforeProduct(NamedTuple):
    """Where `prepare_launch` writes; None: not wanted. low = [P | h] (bands,M,P+R), σ (bands,M), U (N,P), W_eff (N,K).

    All contiguous, but the rows of `low` may be longer than P+R.
    """

    low: Tensor | None = None
    sigma: Tensor | None = None
    u: Tensor | None = None
    weff: Tensor | None = None


def prepare_bands(shape: Shape, dtype: torch.dtype, arch: str) -> int:
    """The number of bands of K, over which h and σ are partial sums. Few, since each tile of y reads all of them."""
    config = tables.choose("prepare", arch, dtype, shape)
    return min(MAX_BANDS, configs.bands(arch, shape.m, config["rows"], shape.k, config["depth"])[0])


def prepare_launch(
    x: Tensor, weight: Tensor, out: BeforeProduct,
    *, a_up: Tensor | None = None, a_down: Tensor | None = None, b_down: Tensor | None = None, a: Tensor | None = None,
    scale: float = 1.0, dropout: Dropout = NO_DROPOUT, by_m: int | None = None, arch: str,
) -> Launch:  # fmt: skip
    """low (bands,M,P+R) = [x·a_downᵀ | s·drop(x)·b_downᵀ], σ (bands,M) = Σₖ x; U (N,P) = W·a_up or W_eff (N,K).

    W_eff is W∘(1 + a_up·a_down), or W∘(1+a) where `a` is given; then a_up and a_down take no part in `low`. `by_m`: the
    M that the configuration is chosen by; None: that of x.
    """
    m, (n, k) = rows(x), weight.shape  # x is read only for low and σ
    a_into_low = a_down is not None and out.u is not None
    p, r = (0 if t is None else t.shape[0] for t in (a_down, b_down))
    shape = Shape(by_m or configs.m_class(m), n, k, max(p if a_into_low else 0, r))
    config = tables.choose("prepare", arch, x.dtype, shape)
    numbers = numerics(x.dtype, a_up, a_down, b_down)
    beside = Beside(arch, x.dtype, r, halves=halves(numbers), drops=dropout.p > 0.0)
    config = fitted("prepare", config, beside)
    around = tables.choose("weight", arch, x.dtype, shape._replace(r=p))
    bands = next((t.shape[0] for t in (out.low, out.sigma) if t is not None), 0)
    row_programs = cdiv(m, config["rows"]) * bands
    weight_programs = 0 if out.u is None and out.weff is None else cdiv(n, around["rows"])
    if out.weff is not None:
        weight_programs *= cdiv(k, around["cols"])
    args = {
        "x": matrix(x), "w": matrix(weight), "a_up": matrix(a_up), "a_down": matrix(a_down), "b_down": matrix(b_down),
        "a": vector(a), "low": matrix(out.low), "sigma_ptr": out.sigma, "u_ptr": out.u, "weff_ptr": out.weff,
        # P is the rank of A, also where W_eff is built and `low` has no columns of A.
        "M": m, "N": n, "K": k, "P": p, "R": r, "row_programs": row_programs, "scale": float(scale),
        **dropout.arguments(b_down),
        "NUMERICS": numbers,
        "BLOCK_M": config["rows"], "BLOCK_K": factor_depth(config, numbers),
        "BLOCK_P": configs.block_r(p) if a_into_low else 16,
        "BLOCK_R": configs.block_r(r), "BLOCK_A": configs.block_r(p, 64),
        "BLOCK_WN": around["rows"], "BLOCK_WK": around["cols"],
    }  # fmt: skip
    return Launch(_prepare_kernel, (row_programs + weight_programs,), args, options(config, args))


@triton.jit(do_not_specialize=["seed", "threshold", "columns_before", "M", "P", "R"])
def _added_terms_kernel(
    x, a_down, b_down, y, terms, seed, M, N, K, P, R, scale, threshold, inv_keep, columns_before,
    READ_Z: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = [Z∘(1+a)] + P·Uᵀ + h·B_upᵀ + σ·b + β where the vendor's GEMM computes Z; writes [P | h] and σ too.

    With READ_Z, y holds Z already, which is scaled; without, y receives only the terms, and the GEMM adds Z to them.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_acc, h_acc, sigma = _into_rank(
        x, a_down, b_down, seed, m, M, 0, K, P, R, scale, threshold, inv_keep, columns_before, terms.b is not None,
        NUMERICS, BLOCK_M, BLOCK_K, BLOCK_P, BLOCK_R,
    )  # fmt: skip
    if terms.low is not None:
        _write_low(terms.low, p_acc, h_acc, a_down, b_down, m, M, P, R, BLOCK_P, BLOCK_R)
    if terms.b is not None:
        tl.store(terms.sigma.ptr + m, sigma, mask=m < M)
    p_low = p_acc.to(tile.dtype_of(NUMERICS.factor_name))
    h_low = h_acc.to(tile.dtype_of(NUMERICS.factor_name))
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if READ_Z:
            acc = tile.read(y, m, n, M, N).to(tl.float32)
        acc = tile.add_terms(
            acc, terms, p_low, h_low, sigma, m, n, M, N, P, R, 1, NUMERICS, BLOCK_M, BLOCK_N, BLOCK_P, BLOCK_R
        )  # fmt: skip
        # Z was rounded before, or y is rounded before Z is added: rounding to nearest would lose a small adapter.
        tile.write(y, tile.rounded(acc, m, n, y.ptr.dtype.element_ty), m, n, M, N)


def added_terms_launch(
    x: Tensor, y: Tensor, terms: Terms,
    *, read_z: bool, a_down: Tensor | None = None, b_down: Tensor | None = None, scale: float = 1.0,
    dropout: Dropout = NO_DROPOUT, arch: str,
) -> Launch:  # fmt: skip
    """y (M,N) = [y∘(1+a) with `read_z`] + P·Uᵀ + h·upᵀ + σ·bᵀ + β in place, filling `low` (1,M,P+R) and σ (1,M)."""
    m, k, n = rows(x), x.shape[1], y.shape[1]
    p, r = (0 if t is None else t.shape[0] for t in (a_down, b_down))
    shape = Shape(configs.m_class(m), n, k, max(p, r))
    config = tables.choose("added_terms", arch, x.dtype, shape)
    numbers = numerics(x.dtype, a_down, b_down, terms.u, terms.up)
    config = fitted("added_terms", config, Beside(arch, x.dtype, halves=halves(numbers)))
    args = {
        "x": matrix(x), "a_down": matrix(a_down), "b_down": matrix(b_down), "y": matrix(y), "terms": terms_of(terms),
        "M": m, "N": n, "K": k, "P": p, "R": r, "scale": float(scale),
        **dropout.arguments(b_down),
        "READ_Z": read_z, "NUMERICS": numbers,
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"], "BLOCK_K": factor_depth(config, numbers),
        "BLOCK_P": configs.block_r(p), "BLOCK_R": configs.block_r(r),
    }  # fmt: skip
    return Launch(_added_terms_kernel, (cdiv(m, config["rows"]),), args, options(config, args))
