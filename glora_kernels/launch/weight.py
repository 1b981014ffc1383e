"""The launchers around the weight, dense or in 4 bits: the gradient of A = lora, and W·c. They allocate nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.weight import _c_grad_kernel, _hadamard_grad_kernel, _wc_grad_kernel, _wc_kernel
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.dequantize import weight_operands
from glora_kernels.launch.glora import GROUP
from glora_kernels.launch.plan import (
    NO_DROPOUT,
    Dropout,
    Launch,
    arithmetic,
    halves,
    matrix,
    numerics,
    options,
    pair,
    vector,
)
from glora_kernels.launch.sizes import rows
from glora_kernels.quant import QuantizedWeight


def hadamard_grad_config(
    shape: Shape, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> dict[str, int]:
    """The configuration of `hadamard_grad_launch`: see `hadamard_grad_tiles`."""
    config = tables.choose("hadamard_grad", arch, dtype, shape._replace(m=configs.m_class(shape.m)))
    wide = dtype.itemsize == 2 and factors == torch.float32
    return configs.fitted("hadamard_grad", config, arch, dtype, shape.r, halves=wide, aligned=shape.k % 16 == 0)


def hadamard_grad_tiles(
    shape: Shape, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> tuple[int, int]:
    """How many partial sums `hadamard_grad_launch` writes: (n-tiles for ddown, k-tiles for dup).

    `factors`: the dtype they are multiplied in, that of x where it is not given.
    """
    config = hadamard_grad_config(shape, dtype, arch, factors)
    return cdiv(shape.n, config["rows"]), cdiv(shape.k, config["cols"])


class HadamardGrad(NamedTuple):
    """What `hadamard_grad_launch` fills, as far as given: dup (k-tiles,N,R), ddown (n-tiles,R,K), weff (N,K), db_down.

    dup = H·A_downᵀ and ddown = A_upᵀ·H are partial sums; weff = W∘(1 + A_up·A_down); db_down (r,K) = Σ Sᵀ·drop(x).
    """

    dup: Tensor | None = None
    ddown: Tensor | None = None
    weff: Tensor | None = None
    db_down: Tensor | None = None


def hadamard_grad_launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    a_up: Tensor,
    a_down: Tensor,
    out: HadamardGrad,
    *,
    s: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    factors: torch.dtype | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """`out` from H = (dyᵀx)∘W and, for its db_down, S (bands,M,r); dropout is that of x in db_down.

    H, S and the factors are multiplied in the dtype of x, or of `factors` where that is wider.
    """
    m, n, k = rows(dy), dy.shape[1], x.shape[1]
    rank = a_up.shape[1]
    b_rank = 0 if out.db_down is None else out.db_down.shape[0]
    how = numerics(x.dtype, factors)
    config = config or hadamard_grad_config(Shape(m, n, k, rank), x.dtype, arch, factors)
    step = 16 if halves(how) else 64  # of the rank: what does not spill
    args = {
        "dy": matrix(dy), "x": matrix(x), **weight_operands(weight), "pair": pair(a_up, a_down),
        **out._asdict(), "s": None if out.db_down is None else matrix(s),
        "M": m, "N": n, "K": k, "R": rank, "B_RANK": b_rank,
        **dropout.arguments(out.db_down),
        "BANDS": 1 if s is None else s.shape[0], "NUMERICS": how,
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"], "BLOCK_M": config["depth"],
        "BLOCK_R": configs.block_r(rank, step), "BLOCK_B": configs.block_r(max(1, b_rank)), "GROUP": GROUP,
    }  # fmt: skip
    tiles = (cdiv(n, config["rows"]) + (out.db_down is not None)) * cdiv(k, config["cols"])
    return Launch(_hadamard_grad_kernel, (tiles,), args, options(config, args))


def wc_launch(
    weight: Tensor | QuantizedWeight,
    c: Tensor | None,
    c_up: Tensor | None,
    c_down: Tensor | None,
    wc: Tensor,
    *,
    arch: str,
) -> Launch:
    """wc (N,) = W·c, c (K,) given or C_up (K,R)·C_down (R,1)."""
    n, k = weight.shape
    rank = 0 if c_up is None else c_up.shape[1]
    config = tables.choose("weight", arch, weight.dtype, Shape(0, n, k, rank))
    args = {
        **weight_operands(weight), "c": vector(c), "pair": pair(c_up, c_down), "wc": wc,
        "N": n, "K": k, "R": rank, "UPCAST": arithmetic(weight.dtype)["UPCAST"],
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"], "BLOCK_R": configs.block_r(max(1, rank)),
    }  # fmt: skip
    return Launch(_wc_kernel, (cdiv(n, config["rows"]),), args, options(config, args))


def wc_grad_splits(weight: Tensor | QuantizedWeight, arch: str) -> int:
    """How many partial sums over N `wc_grad_launch` writes."""
    n, k = weight.shape
    config = tables.choose("weight", arch, weight.dtype, Shape(0, n, k, 0))
    return configs.row_splits(n, cdiv(k, config["cols"]), config["rows"])


def wc_grad_launch(weight: Tensor | QuantizedWeight, g: Tensor, part: Tensor, *, arch: str) -> Launch:
    """part (splits,K): Wᵀg by rows of W."""
    n, k = weight.shape
    config = tables.choose("weight", arch, weight.dtype, Shape(0, n, k, 0))
    splits = part.shape[0]
    args = {
        **weight_operands(weight), "g": vector(g), "part": part,
        "N": n, "K": k, "rows_per_split": cdiv(cdiv(n, splits), config["rows"]) * config["rows"],
        "UPCAST": arithmetic(weight.dtype)["UPCAST"], "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
    }  # fmt: skip
    return Launch(_wc_grad_kernel, (cdiv(k, config["cols"]), splits), args, options(config, args))


def c_grad_launch(
    part: Tensor,
    *,
    c_up: Tensor | None,
    c_down: Tensor | None,
    dc: Tensor | None,
    dc_up: Tensor | None,
    dc_down: Tensor | None,
    arch: str,
) -> Launch:
    """dc (K,) = Σ part, or dC_up (K,R) = dc·C_downᵀ and dC_down (R,1) = C_upᵀ·dc."""
    splits, k = part.shape
    rank = 0 if c_up is None else c_up.shape[1]
    config = tables.choose("weight", arch, part.dtype, Shape(0, 0, k, rank))
    args = {
        "part": part, "pair": pair(c_up, c_down), "dc": dc, "dc_up": dc_up, "dc_down": dc_down,
        "K": k, "R": rank, "splits": splits, "BLOCK_K": config["cols"], "BLOCK_R": configs.block_r(max(1, rank)),
    }  # fmt: skip
    return Launch(_c_grad_kernel, (cdiv(k, config["cols"]) + (dc_down is not None),), args, options(config, args))
