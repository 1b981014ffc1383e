"""The gradients of the adapters: sums over the rows of each, in a fixed order and without atomics."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.multi import plan as order
from glora_kernels.multi import table
from glora_kernels.multi.plan import Plan
from glora_kernels.multi.table import Table
from glora_kernels.operands import Matrix, Vector
from glora_kernels.runtime.launch import Launch, matrix, numerics, options, vector
from glora_kernels.runtime.recording import rows

_RANK_BLOCK = 32
"""Columns of h, or of S, by which a program multiplies dy or x: of more, ptxas serializes the wgmma (C7515)."""


class Gradients(NamedTuple):
    """Where they go, as far as wanted: (J,N) each, but of the factors all of one kind, one adapter's behind another's.

    b_up: (N,R_j) of every adapter. b_down: (R_j,K). g: Σ dy. d: g∘bias. bias: g∘(1+d_j). b: dyᵀσ. a: Σ dy∘Z.
    """

    b_up: Any = None
    b_down: Any = None
    g: Any = None
    d: Any = None
    bias: Any = None
    b: Any = None
    a: Any = None
    end: Any = None


@triton.jit
def _keep(ptr, value, index, mask):
    if ptr is not None:
        tl.store(ptr + index, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropped_sum(
    read, low_ptr, row, rows_ptr, each, seed, start, end, c0, r, M, C, width,
    BANDS: tl.constexpr, LAYOUT: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ_i S[i,r]·(mask∘x)[m,c] over the rows of an adapter, (BLOCK_R, BLOCK_C)."""
    c = c0 + tl.arange(0, BLOCK_C)
    R = table.rank(row, LAYOUT)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if LAYOUT.drops:
        key = table.key_of(row, seed)
        threshold = table.size(row, "threshold")
    for i0 in range(start, end, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        m = order.rows_at(rows_ptr, each, i, end, M)
        value = tile.read(read, m, c, M, C)
        if LAYOUT.drops:
            if threshold > 0:
                masked = i - start if seed is None else m
                value = tile.dropped(value, key, masked, c0, threshold, 1.0, BLOCK_M, BLOCK_C)
        low = tile.read_banded(Matrix(low_ptr, width, 1), r, tl.where(i < end, i, M), R, M, M, BANDS, TRANSPOSED=True)
        acc = tile.dot_thin(low.to(tile.dtype_of(NUMERICS.factor_name)), value, acc, NUMERICS)
    return acc


@triton.jit(do_not_specialize=["seed", "M", "J", "rank_blocks"])
def _multi_outer_kernel(
    dy, x, z, h_ptr, s_ptr, sigma_ptr, grads, bias, seed, table_ptr, dy_rows_ptr, x_rows_ptr, x_each, starts_ptr,
    M, N, K, J, width, rank_blocks,
    BANDS: tl.constexpr, LAYOUT: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`Gradients` of every adapter: dyᵀh and the sums of columns of dy, or of dy with Z and σ; then Sᵀx̃.

    h, σ and S are sums over BANDS, of rows sorted by adapter; the lists of rows tell where each is in dy (and Z) and x.
    """
    rank_block = tl.program_id(0) % rank_blocks
    c0 = tl.program_id(0) // rank_blocks * BLOCK_C
    row = table.row_of(table_ptr, tl.program_id(1))
    R = table.rank(row, LAYOUT)
    if (rank_block > 0) & (rank_block * BLOCK_R >= R):
        return
    start = tl.load(starts_ptr + tl.program_id(1))
    end = tl.load(starts_ptr + tl.program_id(1) + 1)
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    c = c0 + tl.arange(0, BLOCK_C)
    first_rank = table.number(row, "first_rank")
    if x is not None:
        if (tl.program_id(2) == tl.num_programs(2) - 1) & (c0 < K):
            acc = _dropped_sum(
                x, s_ptr, row, x_rows_ptr, x_each, seed, start, end, c0, r, M, K, width,
                BANDS, LAYOUT, NUMERICS, BLOCK_M, BLOCK_C, BLOCK_R,
            )  # fmt: skip
            tile.write(Matrix(grads.b_down + first_rank * K, K, 1), acc, r, c, R, K)
    if dy is not None:
        if (tl.program_id(2) == 0) & (c0 < N):
            acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
            g = tl.zeros((BLOCK_C,), tl.float32)
            db = tl.zeros((BLOCK_C,), tl.float32)
            da = tl.zeros((BLOCK_C,), tl.float32)
            for i0 in range(start, end, BLOCK_M):
                i = i0 + tl.arange(0, BLOCK_M)
                m = order.rows_at(dy_rows_ptr, None, i, end, M)
                i = tl.where(i < end, i, M)
                value = tile.read(dy, m, c, M, N)
                if grads.b_up is not None:
                    low = tile.read_banded(Matrix(h_ptr, width, 1), r, i, R, M, M, BANDS, TRANSPOSED=True)
                    acc = tile.dot_thin(low.to(tile.dtype_of(NUMERICS.factor_name)), value, acc, NUMERICS)
                wide = value.to(tl.float32)
                g += tl.sum(wide, 0)
                if grads.b is not None:
                    sigma = tile.read_banded_vector(Vector(sigma_ptr, 1), i, M, M, BANDS)
                    db += tl.sum(wide * sigma[:, None], 0)
                if grads.a is not None:
                    da += tl.sum(wide * tile.read(z, m, c, M, N).to(tl.float32), 0)
            if grads.b_up is not None:
                tile.write(Matrix(grads.b_up + first_rank * N, R, 1), acc.T, c, r, N, R)
            inside = (c < N) & (rank_block == 0)
            at = tl.program_id(1).to(tl.int64) * N + c
            _keep(grads.g, g, at, inside)
            _keep(grads.b, db, at, inside)
            _keep(grads.a, da, at, inside)
            if grads.d is not None:
                _keep(grads.d, g * tile.read_vector(bias, c, N), at, inside)
            if grads.bias is not None:
                _keep(grads.bias, g + g * table.vector(row, "d", c, N, tile.dtype_of(LAYOUT.vector)), at, inside)


def multi_outer_launch(
    grads: Gradients, adapters: Table, plan: Plan,
    *, dy: Tensor, x: Tensor | None = None, z: Tensor | None = None, h: Tensor | None = None, s: Tensor | None = None,
    sigma: Tensor | None = None, bias: Tensor | None = None, dy_rows: Tensor | None, x_rows: Tensor | None,
    x_each: int | None = None, seed: Any = None, bands: int, arch: str,
) -> Launch:  # fmt: skip
    """`grads` from dy (M,N), x (·,K), z = x·Wᵀ (M,N), and of sorted rows h, s (bands,M,width) and sigma (bands,M).

    dy_rows, x_rows: the row of each sorted one in dy and z, and in x; None: they are sorted. x_each: as in a `Side`.
    seed: as in `multi_shrink_launch`.
    """
    m, n, k = rows(dy), dy.shape[1], 0 if x is None else x.shape[1]
    with_x = grads.b_down is not None
    with_dy = any(grad is not None for name, grad in grads._asdict().items() if name not in ("b_down", "end"))
    kind = adapters.kind
    rank_blocks, block = kind.rank_blocks(_RANK_BLOCK)
    config = kind.config("multi_outer", arch, dy.dtype, (m, n, k), aligned=n % 16 == k % 16 == 0)
    args = {
        "dy": matrix(dy) if with_dy else None, "x": matrix(x) if with_x else None, "z": matrix(z), "h_ptr": h,
        "s_ptr": s, "sigma_ptr": sigma, "grads": grads, "bias": vector(bias), "seed": seed,
        "table_ptr": adapters.entries, "dy_rows_ptr": dy_rows, "x_rows_ptr": x_rows,
        "x_each": x_each, "starts_ptr": plan.starts, "M": m, "N": n, "K": k, "J": len(adapters.entries),
        "width": kind.width, "rank_blocks": rank_blocks, "BANDS": bands, "LAYOUT": kind.layout,
        "NUMERICS": numerics(dy.dtype, kind.factor),
        "BLOCK_M": config["rows"], "BLOCK_C": config["cols"], "BLOCK_R": block,
    }  # fmt: skip
    blocks = max(cdiv(n, config["cols"]) * with_dy, cdiv(k, config["cols"]) * with_x)
    grid = (blocks * rank_blocks, len(adapters.entries), with_dy + with_x)
    return Launch(_multi_outer_kernel, grid, args, options(config, args))
