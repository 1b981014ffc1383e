"""The other kernels that read the weight, dense or in 4 bits: the gradient of A = lora, and W·c with its gradients."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.dispatch.common import Weight
from glora_kernels.four_bit.codec import _nearest, _weight_tile, weight_operands
from glora_kernels.glora.call import C
from glora_kernels.glora.product import GROUP
from glora_kernels.operands import Matrix, Vector
from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import NO_DROPOUT, Dropout, Launch, halves, matrix, numerics, options, pair, vector
from glora_kernels.runtime.recording import rows
from glora_kernels.runtime.spills import Beside, fitted


@triton.jit
def _read_weight(
    w, codes, first_n, first_k, last_n, K,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W[first_n + 0…BLOCK_N, first_k + 0…BLOCK_K) in fp32, zeros outside (last_n, K), of a dense `w` or of `codes`."""
    if w is None:
        return _weight_tile(codes, first_n, first_k, last_n, K, UPCAST, BLOCK_N, BLOCK_K)
    else:
        n = first_n + tl.arange(0, BLOCK_N)
        k = first_k + tl.arange(0, BLOCK_K)
        return tile.read(w, n, k, last_n, K).to(tl.float32)


@triton.jit
def _weight_as(
    w, codes, first_n, first_k, N, K,
    NUMERICS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_read_weight`, with decoded values rounded like a dequantized weight, so that both give the same numbers."""
    block = _read_weight(w, codes, first_n, first_k, N, K, NUMERICS.upcast, BLOCK_N, BLOCK_K)
    if w is None:
        return _nearest(block, tile.dtype_of(NUMERICS.name), NUMERICS.upcast).to(tl.float32)
    else:
        return block


@triton.jit(do_not_specialize=["seed", "threshold", "columns_before", "M"])
def _hadamard_grad_kernel(
    dy, x, w, codes, pair, dup, ddown, weff, s, db_down, seed, M, N, K, R, B_RANK, threshold, inv_keep, columns_before,
    BANDS: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """H = (Σₘ dy[m,n]·x[m,k])·W[n,k] in registers; dup[k-tile,n,r] = Σₖ H·A_down, ddown[n-tile,r,k] = Σₙ A_up·H.

    Since the programs read every tile of W and x anyway, they can also write W_eff for dx (`weff`); with `db_down`, one
    more row of tiles, where S replaces dy, gives dB_down[r,k] = Σₘ S[m,r]·drop(x)[m,k].
    """
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    i, j = tile.place_of(tl.program_id(0), num_n + (0 if db_down is None else 1), num_k, GROUP)
    k = j * BLOCK_K + tl.arange(0, BLOCK_K)
    if db_down is not None:
        if i == num_n:
            b = tl.arange(0, BLOCK_B)
            db = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
            for m0 in range(0, M, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                x_tile = tile.read(x, m, k, M, K)
                if seed is not None:
                    x_tile = tile.dropped(
                        x_tile, tile.seed_of(seed), m, j * BLOCK_K, threshold, 1.0, BLOCK_M, BLOCK_K, columns_before
                    )  # fmt: skip
                s_tile = tile.read_banded(s, b, m, B_RANK, M, M, BANDS, TRANSPOSED=True)
                db = tile.dot_thin(s_tile.to(tile.dtype_of(NUMERICS.factor_name)), x_tile, db, NUMERICS)
            tile.write(Matrix(db_down, K, 1), db * inv_keep, b, k, B_RANK, K)
    if i < num_n:
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            dy_tile = tile.read(tile.transposed(dy), n, m, N, M)
            acc = tile.dot_wide(dy_tile, tile.read(x, m, k, M, K), acc, NUMERICS)
        w_tile = _weight_as(w, codes, i * BLOCK_N, j * BLOCK_K, N, K, NUMERICS, BLOCK_N, BLOCK_K)
        h = (acc * w_tile).to(tile.dtype_of(NUMERICS.factor_name))
        if dup is not None:
            part = dup + tl.cast(j, tl.int64) * N * R
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                down = tile.read(tile.transposed(pair.down), k, r, K, R).to(tile.dtype_of(NUMERICS.factor_name))
                value = tile.dot_thin(h, down, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), NUMERICS)
                tile.write(Matrix(part, R, 1), value, n, r, N, R)
        if ddown is not None:
            part = ddown + tl.cast(i, tl.int64) * R * K
            for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
                r = r0 + tl.arange(0, BLOCK_R)
                up = tile.read(tile.transposed(pair.up), r, n, R, N).to(tile.dtype_of(NUMERICS.factor_name))
                value = tile.dot_thin(up, h, tl.zeros((BLOCK_R, BLOCK_K), tl.float32), NUMERICS)
                tile.write(Matrix(part, K, 1), value, r, k, R, K)
        if weff is not None:
            # Read again: kept in registers until here, it would make them spill.
            w_tile = _weight_as(w, codes, i * BLOCK_N, j * BLOCK_K, N, K, NUMERICS, BLOCK_N, BLOCK_K)
            PRECISION: tl.constexpr = NUMERICS.factor_precision
            w_tile += w_tile * tile.factor_product(
                pair, n, k, N, K, R, PRECISION, NUMERICS.upcast, BLOCK_N, BLOCK_K, BLOCK_R
            )  # fmt: skip
            tile.write(Matrix(weff, K, 1), tile.rounded(w_tile, n, k, tile.dtype_of(NUMERICS.name)), n, k, N, K)


class HadamardGrad(NamedTuple):
    """Where `hadamard_grad_launch` writes; None: not wanted. dup (k-tiles,N,R), ddown (n-tiles,R,K), weff (N,K).

    dup = H·A_downᵀ and ddown = A_upᵀ·H are partial sums; weff = W∘(1 + A_up·A_down); db_down (r,K) = Σ Sᵀ·drop(x).
    """

    dup: Tensor | None = None
    ddown: Tensor | None = None
    weff: Tensor | None = None
    db_down: Tensor | None = None


def hadamard_grad_config(
    shape: Shape, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> dict[str, int]:
    """The configuration of `hadamard_grad_launch`; arguments as in `hadamard_grad_tiles`."""
    config = tables.choose("hadamard_grad", arch, dtype, shape._replace(m=configs.m_class(shape.m)))
    wide = halves(numerics(dtype, factors))
    return fitted("hadamard_grad", config, Beside(arch, dtype, shape.r, halves=wide, aligned=shape.k % 16 == 0))


def hadamard_grad_tiles(
    shape: Shape, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> tuple[int, int]:
    """How many partial sums `hadamard_grad_launch` writes: (n-tiles for ddown, k-tiles for dup).

    `factors`: the dtype of products with factors; by default that of x.
    """
    config = hadamard_grad_config(shape, dtype, arch, factors)
    return cdiv(shape.n, config["rows"]), cdiv(shape.k, config["cols"])


def hadamard_grad_launch(
    dy: Tensor, x: Tensor, weight: Weight, a_up: Tensor, a_down: Tensor, out: HadamardGrad,
    *, s: Tensor | None = None, dropout: Dropout = NO_DROPOUT, factors: torch.dtype | None = None,
    by_m: int | None = None, arch: str,
) -> Launch:  # fmt: skip
    """Fill `out` from H = (dyᵀx)∘W; its db_down from S (bands,M,r) and x with `dropout`.

    Products with H, S and factors are in the dtype of x, or of `factors` where that is wider. `by_m`: the M that the
    configuration is chosen by; None: that of x.
    """
    m, n, k = rows(dy), dy.shape[1], x.shape[1]
    rank = a_up.shape[1]
    b_rank = 0 if out.db_down is None else out.db_down.shape[0]
    how = numerics(x.dtype, factors)
    config = hadamard_grad_config(Shape(by_m or m, n, k, rank), x.dtype, arch, factors)
    step = 16 if halves(how) else 64  # of the rank: wider ones would spill
    args = {
        "dy": matrix(dy), "x": matrix(x), **weight_operands(weight), "pair": pair(a_up, a_down),
        **out._asdict(), "s": None if out.db_down is None else matrix(s),
        "M": m, "N": n, "K": k, "R": rank, "B_RANK": b_rank,
        **dropout.arguments(out.db_down),
        "BANDS": 1 if s is None else s.shape[0], "NUMERICS": how,
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"], "BLOCK_M": config["depth"],
        "BLOCK_R": configs.block_r(rank, step), "BLOCK_B": configs.block_r(b_rank), "GROUP": GROUP,
    }  # fmt: skip
    tiles = (cdiv(n, config["rows"]) + (out.db_down is not None)) * cdiv(k, config["cols"])
    return Launch(_hadamard_grad_kernel, (tiles,), args, options(config, args))


@triton.jit
def _wc_kernel(
    w, codes, c, pair, wc, N, K, R,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """wc[n] = Σₖ W[n,k]·c[k]; where c is None, c[k] = Σᵣ C_up[k,r]·C_down[r] of the pair."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if c is None:
            up = tile.read(pair.up, k, r, K, R).to(tl.float32)
            values = tl.sum(up * tile.read_vector(Vector(pair.down.ptr, pair.down.row), r, R)[None, :], 1)
        else:
            values = tile.read_vector(c, k, K)
        w_tile = _read_weight(w, codes, tl.program_id(0) * BLOCK_N, k0, N, K, UPCAST, BLOCK_N, BLOCK_K)
        total += tl.sum(w_tile * values[None, :], 1)
    tl.store(wc + n, total, mask=n < N)


def wc_launch(weight: Weight, c: C, wc: Tensor, *, arch: str) -> Launch:
    """wc (N,) = W·c, with c (K,) or C_up (K,R)·C_down (R,1)."""
    n, k = weight.shape
    rank = 0 if c.c_up is None else c.c_up.shape[1]
    config = tables.choose("weight", arch, weight.dtype, Shape(0, n, k, rank))
    args = {
        **weight_operands(weight), "c": vector(c.c), "pair": pair(c.c_up, c.c_down), "wc": wc,
        "N": n, "K": k, "R": rank, "UPCAST": environment.interpreting(),
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"], "BLOCK_R": configs.block_r(rank),
    }  # fmt: skip
    return Launch(_wc_kernel, (cdiv(n, config["rows"]),), args, options(config, args))


@triton.jit
def _wc_grad_kernel(
    w, codes, g, part, N, K, rows_per_split,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part[split,k] = Σₙ W[n,k]·g[n] over the rows n of a split."""
    first_k = tl.program_id(0) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, N)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        w_tile = _read_weight(w, codes, n0, first_k, last, K, UPCAST, BLOCK_N, BLOCK_K)
        total += tl.sum(w_tile * tile.read_vector(g, n, last)[:, None], 0)
    tl.store(part + tl.cast(split, tl.int64) * K + k, total, mask=k < K)


def wc_grad_splits(weight: Weight, arch: str) -> int:
    """How many partial sums over N `wc_grad_launch` writes."""
    n, k = weight.shape
    config = tables.choose("weight", arch, weight.dtype, Shape(0, n, k, 0))
    return configs.row_splits(n, cdiv(k, config["cols"]), config["rows"])


def wc_grad_launch(weight: Weight, g: Tensor, part: Tensor, *, arch: str) -> Launch:
    """part (splits,K): partial sums of Wᵀg over splits of the rows of W."""
    n, k = weight.shape
    config = tables.choose("weight", arch, weight.dtype, Shape(0, n, k, 0))
    splits = part.shape[0]
    args = {
        **weight_operands(weight), "g": vector(g), "part": part,
        "N": n, "K": k, "rows_per_split": cdiv(cdiv(n, splits), config["rows"]) * config["rows"],
        "UPCAST": environment.interpreting(), "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
    }  # fmt: skip
    return Launch(_wc_grad_kernel, (cdiv(k, config["cols"]), splits), args, options(config, args))


@triton.jit
def _c_grad_kernel(part, pair, dc, dc_up, dc_down, K, R, splits, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """dc[k] = Σ_split part, dC_up[k,r] = dc[k]·C_down[r]; the last program alone computes dC_down[r] = Σₖ C_up·dc."""
    i = tl.program_id(0)
    blocks = tl.cdiv(K, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    if i < blocks:
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        value = tile.vector_sum(part, K, k, K, splits)
        if dc is not None:
            tl.store(dc + k, value.to(dc.dtype.element_ty), mask=k < K)
        if dc_up is not None:
            product = value[:, None] * tile.read_vector(Vector(pair.down.ptr, pair.down.row), r, R)[None, :]
            tile.write(Matrix(dc_up, R, 1), product, k, r, K, R)
    elif dc_down is not None:
        total = tl.zeros((BLOCK_R,), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            value = tile.vector_sum(part, K, k, K, splits)
            up = tile.read(pair.up, k, r, K, R).to(tl.float32)
            total += tl.sum(up * value[:, None], 0)
        tl.store(dc_down + r, total.to(dc_down.dtype.element_ty), mask=r < R)


def c_grad_launch(part: Tensor, c: C, grads: C, *, arch: str) -> Launch:
    """dc (K,) = Σ part, or dC_up (K,R) = dc·C_downᵀ and dC_down (R,1) = C_upᵀ·dc."""
    splits, k = part.shape
    rank = 0 if c.c_up is None else c.c_up.shape[1]
    config = tables.choose("weight", arch, part.dtype, Shape(0, 0, k, rank))
    args = {
        "part": part, "pair": pair(c.c_up, c.c_down), **{f"d{name}": grad for name, grad in grads._asdict().items()},
        "K": k, "R": rank, "splits": splits, "BLOCK_K": config["cols"], "BLOCK_R": configs.block_r(rank),
    }  # fmt: skip
    return Launch(_c_grad_kernel, (cdiv(k, config["cols"]) + (grads.c_down is not None),), args, options(config, args))
