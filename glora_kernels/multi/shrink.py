"""The low-rank inputs of both passes: one read of x, of dy, or of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import cdiv

from glora_kernels import tile
from glora_kernels.multi import plan as order
from glora_kernels.multi import table
from glora_kernels.multi.plan import Plan
from glora_kernels.multi.table import Kind, Table
from glora_kernels.operands import Matrix
from glora_kernels.runtime import configs
from glora_kernels.runtime.launch import Launch, matrix, numerics, options
from glora_kernels.runtime.recording import rows


class Side(NamedTuple):
    """A matrix (·, depth) that is read, and what is made of it, sorted by adapter.

    rows: of the matrix, that of each sorted row, (M,); None: they are sorted. each: how many of them one row of the
    matrix stands for, if not one.

    low: (bands, M, width), x̃·B_downᵀ or dy·B_up of each row's adapter, times s/(1-p). sums: (bands, M), Σₖ x or dy·b.
    left: (M, depth), dy∘(1+a), in the order of dy. A band is `band_width` of the depth.
    """

    read: Any
    rows: Any = None
    each: Any = None
    low: Any = None
    sums: Any = None
    left: Any = None
    depth: Any = None
    band_width: Any = None
    end: None = None


@triton.jit
def _side(
    side, row, i, own, end, rank_block, seed, M, width,
    OF_DY: tl.constexpr, LAYOUT: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One band of a `Side`, of the rows of one adapter that stand at i among the sorted ones."""
    band = tl.program_id(1)
    m = order.rows_at(side.rows, side.each, i, end, M)
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    R = table.rank(row, LAYOUT)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    if LAYOUT.drops and not OF_DY:
        key = table.key_of(row, seed)
        masked = own if seed is None else m
        threshold = table.size(row, "threshold")
    first = tl.multiple_of(band * side.band_width, 16)
    for d0 in range(first, tl.minimum(first + side.band_width, side.depth), BLOCK_K):
        d = d0 + tl.arange(0, BLOCK_K)
        value = tile.read(side.read, m, d, M, side.depth)
        if side.sums is not None:
            wide = value.to(tl.float32)
            if OF_DY:
                wide *= table.vector(row, "b", d, side.depth, tile.dtype_of(LAYOUT.vector))[None, :]
            sums += tl.sum(wide, 1)
        if side.left is not None:
            if rank_block == 0:
                scale = 1.0 + table.vector(row, "a", d, side.depth, tile.dtype_of(LAYOUT.vector))
                scaled = tile.rounded(value.to(tl.float32) * scale[None, :], m, d, tile.dtype_of(NUMERICS.name))
                tile.write(side.left, scaled, m, d, M, side.depth)
        if side.low is not None:
            if OF_DY:
                factor = tile.read(table.b_up(row, LAYOUT), d, r, side.depth, R)
            else:
                if LAYOUT.drops:
                    if threshold > 0:
                        value = tile.dropped(value, key, masked, d0, threshold, 1.0, BLOCK_M, BLOCK_K)
                factor = tile.read(tile.transposed(table.b_down(row, LAYOUT)), d, r, side.depth, R)
            acc = tile.dot_thin(value, factor.to(tile.dtype_of(NUMERICS.factor_name)), acc, NUMERICS)
    behind = tl.cast(band, tl.int64) * M
    if side.low is not None:
        tile.write(Matrix(side.low + behind * width, width, 1), acc * table.scale(row), i, r, end, width)
    if side.sums is not None:
        if rank_block == 0:
            tl.store(side.sums + behind + i, sums, mask=i < end)


@triton.jit(do_not_specialize=["seed", "M", "J", "rank_blocks"])
def _multi_shrink_kernel(
    x, dy, seed, table_ptr, starts_ptr, M, J, width, rank_blocks,
    LAYOUT: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[i] = s_j/(1-p_j)·(mask∘x[m])·B_down,jᵀ and σ[i] = Σₖ x[m,k]; S[i] = s_j/(1-p_j)·dy[m]·B_up,j, τ[i] = dy[m]·b_j.

    And dy∘(1+a_j). Of sorted rows i = 0 …, m the row of each in x or dy, j its adapter; `x` and `dy` are a `Side` each,
    without `read` where absent. A mask is that of the row's number among those of its adapter, or with one `seed` of
    all of the row m.
    """
    rank_block = tl.program_id(0) % rank_blocks
    adapter, start, first, end = order.tile_of(starts_ptr, tl.program_id(0) // rank_blocks, J, BLOCK_M)
    row = table.row_of(table_ptr, adapter)
    if (first >= end) | ((rank_block > 0) & (rank_block * BLOCK_R >= table.size(row, "rank"))):
        return
    i = first + tl.arange(0, BLOCK_M)
    if x.read is not None:
        if tl.program_id(2) == 0:
            _side(
                x, row, i, i - start, end, rank_block, seed, M, width,
                False, LAYOUT, NUMERICS, BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip
    if dy.read is not None:
        if tl.program_id(2) == tl.num_programs(2) - 1:
            _side(
                dy, row, i, i - start, end, rank_block, seed, M, width,
                True, LAYOUT, NUMERICS, BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip


class Shrink(NamedTuple):
    """How `multi_shrink_launch` reads: who allocates for it has to know the bands."""

    config: dict[str, int]
    bands: int


def shrink_of(m: int, n: int, k: int, kind: Kind, dtype: torch.dtype, arch: str) -> Shrink:
    """The configuration of a call, and over how many bands its sums are spread."""
    config = kind.config("multi_shrink", arch, dtype, (m, n, k), aligned=n % 16 == k % 16 == 0)
    return Shrink(config, configs.bands(arch, configs.m_class(m), config["rows"], max(n, k), config["cols"])[0])


def multi_shrink_launch(
    adapters: Table, plan: Plan,
    *, x: Side | None = None, dy: Side | None = None, seed: Any = None, m: int | None = None, how: Shrink,
    arch: str,
) -> Launch:  # fmt: skip
    """What the memory of the sides is for, over `how.bands` bands; their matrices are tensors.

    seed: of all adapters (`Dropout.key`), or None, if each has its own. m: M, where no matrix has as many rows.
    """
    config, read = how.config, next(side for side in (x, dy) if side is not None).read
    m, count, kind = rows(read) if m is None else m, len(adapters.entries), adapters.kind
    rank_blocks, block = kind.rank_blocks(configs.RANK_BLOCK)
    args = {
        "x": _operand(x, how), "dy": _operand(dy, how), "seed": seed, "table_ptr": adapters.entries,
        "starts_ptr": plan.starts, "M": m, "J": count, "width": kind.width, "rank_blocks": rank_blocks,
        "LAYOUT": kind.layout, "NUMERICS": numerics(read.dtype, kind.factor),
        "BLOCK_M": config["rows"], "BLOCK_K": config["cols"], "BLOCK_R": block,
    }  # fmt: skip
    programs = order.tiles(m, count, config["rows"]) * rank_blocks
    grid = (programs, how.bands, 1 if x is None or dy is None else 2)
    return Launch(_multi_shrink_kernel, grid, args, options(config, args))


def _operand(side: Side | None, how: Shrink) -> Side:
    if side is None:  # told by an entry: Triton 3.6 cannot compare a structure that holds a None (`operands.Terms`)
        return Side(None)
    depth, step = side.read.shape[1], how.config["cols"]
    width = cdiv(cdiv(depth, how.bands), step) * step
    return side._replace(read=matrix(side.read), left=matrix(side.left), depth=depth, band_width=width)
