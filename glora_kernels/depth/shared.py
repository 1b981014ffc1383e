"""The gradients of the factors that layers share, over all of these layers in one launch."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from triton import cdiv

from glora_kernels import tile
from glora_kernels.depth import rows
from glora_kernels.depth.table import PointerTable, SharedFactor, aligned, pointer_table
from glora_kernels.operands import Matrix
from glora_kernels.reference.random import dropout_threshold
from glora_kernels.runtime import tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, halves, numerics, options, triton_dtype
from glora_kernels.runtime.spills import Beside, fitted


@triton.jit
def _shared_grad_kernel(
    factor_ptr, product_ptr,
    HAS_DROPOUT: tl.constexpr, ALIGN: tl.constexpr, OUT: tl.constexpr, NUMERICS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Σ_l scale_l·left_lᵀ·(mask∘right_l) (R,C) of every shared factor, in fp32, in the order of the table's rows."""
    factor = factor_ptr + tl.program_id(2).to(tl.int64) * rows.FACTOR_WIDTH
    R, C = rows.size(factor, "R"), rows.size(factor, "C", ALIGN)
    c0, r0 = tl.program_id(0) * BLOCK_C, tl.program_id(1) * BLOCK_R
    if (c0 >= C) | (r0 >= R):
        return
    c, r = c0 + tl.arange(0, BLOCK_C), r0 + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = rows.size(factor, "first")
    for member in range(first, first + rows.size(factor, "count")):
        row = product_ptr + tl.cast(member, tl.int64) * rows.PRODUCT_WIDTH
        left = rows.pointer(row, "left", tile.dtype_of(NUMERICS.factor_name))
        right = rows.pointer(row, "right", tile.dtype_of(NUMERICS.name), ALIGN)
        left_m, left_r = rows.number(row, "left_stride_m"), rows.number(row, "left_stride_r")
        right_m = rows.number(row, "right_stride_m", ALIGN)
        M = rows.size(row, "M")
        if HAS_DROPOUT:
            seed, seed_ptr = rows.number(row, "seed"), rows.pointer(row, "seed_address", tl.int64)
            if rows.number(row, "seed_address") != 0:
                seed = tl.load(seed_ptr)
            threshold = rows.size(row, "threshold")
        acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            x = tile.read(Matrix(right, right_m, 1), m, c, M, C)
            if HAS_DROPOUT:
                if threshold > 0:
                    x = tile.dropped(x, seed, m, c0, threshold, 1.0, BLOCK_M, BLOCK_C)
            acc = tile.dot_thin(tile.read(Matrix(left, left_r, left_m), r, m, R, M), x, acc, NUMERICS)
        total += acc * rows.real(row, "part_scale")
    out = rows.pointer(factor, "out", OUT)
    stride_r, stride_c = rows.number(factor, "stride_r"), rows.number(factor, "stride_c")
    tile.write(Matrix(out, stride_r, stride_c), total, r, c, R, C)


def shared_grad_tables(factors: Sequence[SharedFactor]) -> tuple[PointerTable, PointerTable]:
    """The two tables of `shared_grad_launch`: one row per factor, and one row per product of any factor."""
    entries: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    for out, parts in factors:
        entries.append({
            "first": len(products), "count": len(parts), "R": out.shape[0], "C": out.shape[1], "out": out,
            "stride_r": out.stride(0), "stride_c": out.stride(1),
        })  # fmt: skip
        for left, right, scale, p, seed in parts:
            on_device = seed is not None and seed.device.type != "cpu"
            products.append({
                "left": left, "left_stride_m": left.stride(0), "left_stride_r": left.stride(1),
                "right": right, "right_stride_m": right.stride(0), "M": left.shape[0], "part_scale": scale / (1.0 - p),
                "seed": None if seed is None or on_device else int(seed), "seed_address": seed if on_device else None,
                "threshold": dropout_threshold(p),
            })  # fmt: skip
    device = factors[0].out.device
    return pointer_table(entries, rows.FACTOR_COLUMNS, device), pointer_table(products, rows.PRODUCT_COLUMNS, device)


def shared_grad_launch(
    pointers: tuple[PointerTable, PointerTable], factors: Sequence[SharedFactor], *, arch: str
) -> Launch:  # fmt: skip
    """out (R,C) = Σ_l scale_l·left_lᵀ·drop(right_l) of every factor."""
    parts = [part for factor in factors for part in factor.products]
    dtype = parts[0].right.dtype
    rank, width = max(f.out.shape[0] for f in factors), max(f.out.shape[1] for f in factors)
    how = numerics(dtype, parts[0].left)
    ok = all(
        aligned(part.right) and part.right.stride(0) % 16 == 0 and part.right.shape[1] % 16 == 0 for part in parts
    )  # fmt: skip
    drops = any(part.dropout_p > 0.0 for part in parts)
    config = tables.choose("shared_grad", arch, dtype, Shape(0, 0, width, rank))
    config = fitted("shared_grad", config, Beside(arch, dtype, rank, halves=halves(how), drops=drops, aligned=ok))
    args = {
        "factor_ptr": pointers[0].entries, "product_ptr": pointers[1].entries,
        "HAS_DROPOUT": drops, "ALIGN": 16 if ok else 1,
        "OUT": triton_dtype(factors[0].out.dtype), "NUMERICS": how,
        "BLOCK_R": config["rows"], "BLOCK_C": config["cols"], "BLOCK_M": config["depth"],
    }  # fmt: skip
    grid = (cdiv(width, config["cols"]), cdiv(rank, config["rows"]), len(factors))
    return Launch(_shared_grad_kernel, grid, args, options(config, args))
