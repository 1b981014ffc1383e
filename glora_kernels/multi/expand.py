"""What the adapters add to y and to dx, beside the product with W."""

from __future__ import annotations

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

_RANK_STEP = 16


@triton.jit
def _beta(bias, wcs, row, n, N, LAYOUT: tl.constexpr):
    """β_j[n] in fp32."""
    beta = tl.zeros_like(n).to(tl.float32)
    if bias is not None:
        beta += tile.read_vector(bias, n, N)
        if LAYOUT.d:
            beta += beta * table.vector(row, "d", n, N, tile.dtype_of(LAYOUT.vector))
    if LAYOUT.e:
        beta += table.vector(row, "e", n, N, tile.dtype_of(LAYOUT.vector))
    if LAYOUT.wc:
        beta += table.vector(row, "wc", n, N, tile.dtype_of(LAYOUT.given_wc))
    if wcs is not None:
        at = table.number(row, "wc_row")
        offsets = at * wcs.row + n.to(tl.int64) * wcs.col
        beta += tl.load(wcs.ptr + offsets, mask=(n < N) & (at >= 0), other=0.0)
    return beta


@triton.jit
def added(
    acc, low_ptr, sums_ptr, bias, wcs, row, seed, i, own, c, c0, M, C, width,
    OF_DX: tl.constexpr, BANDS: tl.constexpr, LAYOUT: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + h[i]·B_up,jᵀ + σ[i]·b_j + β_j, or OF_DX acc + mask∘(S[i]·B_down,j) + τ[i], of sorted rows i of adapter j.

    own: the rows of the mask. h, σ, S and τ are sums over BANDS, None where absent.
    """
    if low_ptr is not None:
        R = table.rank(row, LAYOUT)
        right = tile.transposed(table.b_down(row, LAYOUT)) if OF_DX else table.b_up(row, LAYOUT)
        term = tile.thin_product(
            Matrix(low_ptr, width, 1), right, i, c, M, C, R, R, BANDS, NUMERICS, BLOCK_M, BLOCK_C, BLOCK_R
        )
        if LAYOUT.drops and OF_DX:
            threshold = table.size(row, "threshold")
            if threshold > 0:
                term = tile.dropped(term, table.key_of(row, seed), own, c0, threshold, 1.0, BLOCK_M, BLOCK_C)
        acc += term
    if sums_ptr is not None:
        sums = tile.read_banded_vector(Vector(sums_ptr, 1), i, M, M, BANDS)[:, None]
        if OF_DX:
            acc += sums
        else:
            acc += sums * table.vector(row, "b", c, C, tile.dtype_of(LAYOUT.vector))[None, :]
    if not OF_DX:
        acc += _beta(bias, wcs, row, c, C, LAYOUT)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "J"])
def _multi_expand_kernel(
    out, low_ptr, sums_ptr, bias, wcs, table_ptr, places_ptr, starts_ptr, M, C, J, width,
    OF_DX: tl.constexpr, READ: tl.constexpr, BANDS: tl.constexpr, LAYOUT: tl.constexpr, NUMERICS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[m] = [y[m]∘(1+a_j)] + h[i]·B_up,jᵀ + σ[i]·b_j + β_j, or OF_DX dx[m] = mask∘(S[i]·B_down,j) + τ[i].

    Of sorted rows i, m the place of each, j its adapter. With READ the product with W is in y already; else it is to be
    added to what this writes.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    adapter, start, first, end = order.tile_of(starts_ptr, tl.program_id(0) // blocks, J, BLOCK_M)
    if first >= end:
        return
    row = table.row_of(table_ptr, adapter)
    i = first + tl.arange(0, BLOCK_M)
    m = order.rows_at(places_ptr, None, i, end, M)
    own = i - start
    i = tl.where(i < end, i, M)
    c0 = tl.program_id(0) % blocks * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if READ:
        acc = tile.read(out, m, c, M, C).to(tl.float32)
        acc *= 1.0 + table.vector(row, "a", c, C, tile.dtype_of(LAYOUT.vector))[None, :]
    acc = added(
        acc, low_ptr, sums_ptr, bias, wcs, row, None, i, own, c, c0, M, C, width,
        OF_DX, BANDS, LAYOUT, NUMERICS, BLOCK_M, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    tile.write(out, tile.rounded(acc, m, c, out.ptr.dtype.element_ty), m, c, M, C)


def multi_expand_launch(
    out: Tensor, adapters: Table, plan: Plan,
    *, low: Tensor | None, sums: Tensor | None, of_dx: bool = False, read: bool = False, bias: Tensor | None = None,
    wcs: Tensor | None = None, arch: str,
) -> Launch:  # fmt: skip
    """What is added to Z in `out` (M,N), or with `of_dx` to the product in dx (M,K), from low (bands,M,width), sums
    (bands,M).

    wcs: (·,N), the W·c that `wc_row` tells of.
    """
    m, cols = rows(out), out.shape[1]
    config = adapters.kind.config("multi_expand", arch, out.dtype, (m, cols, cols), aligned=cols % 16 == 0)
    args = {
        "out": matrix(out), "low_ptr": low, "sums_ptr": sums, "bias": vector(bias), "wcs": matrix(wcs),
        "table_ptr": adapters.entries, "places_ptr": plan.places, "starts_ptr": plan.starts,
        "M": m, "C": cols, "J": len(adapters.entries), "width": adapters.kind.width, "OF_DX": of_dx, "READ": read,
        "BANDS": next((t.shape[0] for t in (low, sums) if t is not None), 1), "LAYOUT": adapters.kind.layout,
        "NUMERICS": numerics(out.dtype, adapters.kind.factor),
        "BLOCK_M": config["rows"], "BLOCK_C": config["cols"], "BLOCK_R": _RANK_STEP,
    }  # fmt: skip
    programs = order.tiles(m, len(adapters.entries), config["rows"]) * cdiv(cols, config["cols"])
    return Launch(_multi_expand_kernel, (programs,), args, options(config, args))
