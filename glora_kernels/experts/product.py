"""The products of experts: groups of rows, each by its own weight, with everything that its adapter adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.dispatch.common import Weight
from glora_kernels.four_bit.codec import _nearest, _weight_tile, codes, reads_words
from glora_kernels.multi import plan as order
from glora_kernels.multi import table
from glora_kernels.multi.expand import added
from glora_kernels.multi.plan import Plan
from glora_kernels.multi.table import Table
from glora_kernels.operands import Matrix
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, halves, matrix, numerics, options
from glora_kernels.runtime.recording import rows
from glora_kernels.runtime.spills import Beside, fitted

_RANK_STEP = 16
_SUM_ROWS, _SUM_COLS = 4, 512


class Stack(NamedTuple):
    """Matrices one behind the other: ptr[e·step + i·row + j·col]."""

    ptr: Any
    step: Any
    row: Any
    col: Any


class Rows(NamedTuple):
    """For each sorted row its row in a matrix. list None: they are sorted. each: of how many the matrix has one."""

    list: Tensor | None = None
    each: int | None = None


SORTED = Rows()


@triton.jit
def _block(
    w, codes, expert, N, K, d0, c0,
    OF_DX: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The (BLOCK_D, BLOCK_C) block of W_eᵀ (K, N), or OF_DX W_e (N, K), from (d0, c0) on, in the dtype of products.

    `w` is tested and not `codes`, which may hold a None (`operands.Terms`).
    """
    if w is None:
        # Behind the last row of an expert come those of the next, which meet zeros of the other factor or are not kept.
        if OF_DX:
            block = _weight_tile(codes, expert * N + d0, c0, (expert + 1) * N, K, NUMERICS.upcast, BLOCK_D, BLOCK_C)
        else:
            block = _weight_tile(codes, expert * N + c0, d0, (expert + 1) * N, K, NUMERICS.upcast, BLOCK_C, BLOCK_D).T
        return _nearest(block, tile.dtype_of(NUMERICS.name), NUMERICS.upcast)
    else:
        own = Matrix(w.ptr + expert.to(tl.int64) * w.step, w.row, w.col)
        d = d0 + tl.arange(0, BLOCK_D)
        c = c0 + tl.arange(0, BLOCK_C)
        if OF_DX:
            return tile.read(own, d, c, N, K).to(tile.dtype_of(NUMERICS.name))
        else:
            return tile.read(tile.transposed(own), d, c, K, N).to(tile.dtype_of(NUMERICS.name))


@triton.jit(do_not_specialize=["seed", "M", "J"])
def _expert_product_kernel(
    out, left, w, codes, low_ptr, sums_ptr, seed, table_ptr, left_rows_ptr, left_each,
    out_rows_ptr, mask_rows_ptr, mask_each, starts_ptr,
    M, N, K, J, width,
    OF_DX: tl.constexpr, TERMS: tl.constexpr, BANDS: tl.constexpr, LAYOUT: tl.constexpr, NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = (left·W_eᵀ)∘(1+a_e) + h·B_up,eᵀ + σ·b_e + β_e, or OF_DX dx = left·W_e + mask∘(S·B_down,e) + τ, by rows.

    Of sorted rows i: the lists of rows tell where each is in `left`, in `out` and in the mask; e its expert, of which
    the last has no weight. Without TERMS the product alone.
    """
    C = K if OF_DX else N
    blocks = tl.cdiv(C, BLOCK_C)
    expert, _, first, end = order.tile_of(starts_ptr, tl.program_id(0) // blocks, J, BLOCK_M)
    if first >= end:
        return
    i = first + tl.arange(0, BLOCK_M)
    m = order.rows_at(left_rows_ptr, left_each, i, end, M)
    o = order.rows_at(out_rows_ptr, None, i, end, M)
    c0 = tl.program_id(0) % blocks * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    depth = tl.where(expert < J - 1, N if OF_DX else K, 0)
    for d0 in range(0, depth, BLOCK_D):
        value = tile.read(left, m, d0 + tl.arange(0, BLOCK_D), M, depth)
        block = _block(w, codes, expert, N, K, d0, c0, OF_DX, NUMERICS, BLOCK_D, BLOCK_C)
        acc = tile.dot_wide(value, block, acc, NUMERICS)
    if TERMS:
        row = table.row_of(table_ptr, expert)
        if LAYOUT.a and not OF_DX:
            acc *= 1.0 + table.vector(row, "a", c, C, tile.dtype_of(LAYOUT.vector))[None, :]
        masked = order.rows_at(mask_rows_ptr, mask_each, i, end, M) if LAYOUT.drops and OF_DX else i
        acc = added(
            acc, low_ptr, sums_ptr, None, None, row, seed, tl.where(i < end, i, M), masked, c, c0, M, C, width,
            OF_DX, BANDS, LAYOUT, NUMERICS, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
    tile.write(out, tile.rounded(acc, o, c, out.ptr.dtype.element_ty), o, c, M, C)


def expert_product_launch(
    out: Tensor, left: Tensor, weight: Weight, adapters: Table, plan: Plan,
    *, rows_each: int, low: Tensor | None = None, sums: Tensor | None = None, of_dx: bool = False, terms: bool = True,
    left_rows: Rows = SORTED, out_rows: Tensor | None = None, mask_rows: Rows = SORTED, seed: Any = None, arch: str,
) -> Launch:  # fmt: skip
    """out (M,N) of left (·,K), or with `of_dx` out (M,K) of left (M,N), from low (bands,M,width) and sums (bands,M).

    rows_each: of an expert (`configs.expert_rows`), what the tile is chosen by. left_rows, out_rows, mask_rows: for
    each sorted row its row there. terms False: the product alone. seed: as in `multi_shrink_launch`.
    """
    kind, count, m = adapters.kind, len(adapters.entries), rows(out)
    n, k = sizes_of(weight, count - 1)
    cols, how = (k if of_dx else n), numerics(out.dtype, kind.factor)
    chosen = tables.choose("expert_product", arch, out.dtype, Shape(rows_each, n, k, kind.rank))
    dense, coded = (weight, None) if isinstance(weight, Tensor) else (None, weight)
    beside = Beside(
        arch, out.dtype, kind.rank, halves=halves(how), drops=kind.layout.drops, aligned=n % 16 == k % 16 == 0,
        decoded=coded is not None, nested=coded is not None and coded.state.nested is not None,
        cast=dense is not None and dense.dtype != out.dtype,
    )  # fmt: skip
    config = fitted("expert_product", chosen, beside)
    args = {
        "out": matrix(out), "left": matrix(left), "w": None if dense is None else Stack(dense, *dense.stride()),
        "codes": None if coded is None else codes(coded, reads_words(coded, k)), "low_ptr": low, "sums_ptr": sums,
        "seed": seed, "table_ptr": adapters.entries, "left_rows_ptr": left_rows.list,
        "left_each": left_rows.each, "out_rows_ptr": out_rows, "mask_rows_ptr": mask_rows.list,
        "mask_each": mask_rows.each, "starts_ptr": plan.starts, "M": m, "N": n, "K": k, "J": count,
        "width": kind.width, "OF_DX": of_dx, "TERMS": terms,
        "BANDS": next((t.shape[0] for t in (low, sums) if t is not None), 1), "LAYOUT": kind.layout, "NUMERICS": how,
        "BLOCK_M": config["rows"], "BLOCK_C": config["cols"], "BLOCK_D": config["depth"], "BLOCK_R": _RANK_STEP,
    }  # fmt: skip
    programs = order.tiles(m, count, config["rows"]) * cdiv(cols, config["cols"])
    return Launch(_expert_product_kernel, (programs,), args, options(config, args))


def sizes_of(weight: Weight, experts: int) -> tuple[int, int]:
    """N and K of one expert."""
    if isinstance(weight, QuantizedWeight):
        return weight.shape[0] // experts, weight.shape[1]
    return weight.shape[1], weight.shape[2]


@triton.jit(do_not_specialize=["T"])
def _expert_sum_kernel(
    rows, out, T, K, EACH, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """out[t] = Σ_j rows[t·EACH + j], in the order of j."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for j in range(EACH):
        acc += tile.read(rows, tl.where(t < T, t * EACH + j, T * EACH), c, T * EACH, K).to(tl.float32)
    tile.write(out, tile.rounded(acc, t, c, out.ptr.dtype.element_ty), t, c, T, K)


def expert_sum_launch(summands: Tensor, out: Tensor, each: int) -> Launch:
    """out (T,K) of (T·each,K)."""
    t, k = rows(out), out.shape[1]
    args = {
        "rows": matrix(summands), "out": matrix(out), "T": t, "K": k, "EACH": each, "ROWS": _SUM_ROWS,
        "COLS": _SUM_COLS,
    }  # fmt: skip
    return Launch(_expert_sum_kernel, (cdiv(t, _SUM_ROWS), cdiv(k, _SUM_COLS)), args, {"num_warps": 4, "num_stages": 1})
