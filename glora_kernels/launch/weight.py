"""The launchers around the weight, dense or in 4 bits: the gradient of A = lora, and W·c. They allocate nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.weight import _c_grad_kernel, _hadamard_grad_kernel, _wc_grad_kernel, _wc_kernel
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.dequantize import weight_arguments
from glora_kernels.launch.glora import GROUP
from glora_kernels.launch.plan import Launch, arithmetic, dropout, factor_arithmetic, leading_stride, options, strides
from glora_kernels.quant import QuantizedWeight


def hadamard_grad_config(
    shape: Shape, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> dict[str, int]:
    """The configuration of `hadamard_grad_launch`: see `hadamard_grad_tiles`."""
    config = tables.choose("hadamard_grad", arch, dtype, shape)
    # Halves of H beside it spill where there is no wgmma, and on sm_89 take more memory than there is.
    if arch in ("sm_80", "sm_89", "sm_100") and dtype.itemsize == 2 and factors == torch.float32:
        return config | {"cols": 64}
    return config


def hadamard_grad_tiles(
    shape: Shape, dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> tuple[int, int]:
    """How many partial sums `hadamard_grad_launch` writes: (n-tiles for ddown, k-tiles for dup).

    `factors`: the dtype they are multiplied in, that of x where it is not given.
    """
    config = hadamard_grad_config(shape, dtype, arch, factors)
    return cdiv(shape.n, config["rows"]), cdiv(shape.k, config["cols"])


def hadamard_grad_launch(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    *,
    a_up: Tensor,
    a_down: Tensor,
    dup: Tensor | None = None,
    ddown: Tensor | None = None,
    weff: Tensor | None = None,
    s: Tensor | None = None,
    db_down: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    factors: torch.dtype | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """H = (dyᵀx)∘W reduced to dup (k-tiles,N,R) = H·A_downᵀ and ddown (n-tiles,R,K) = A_upᵀ·H.

    With `weff` (N,K) also W∘(1 + A_up·A_down); with `db_down` (r,K) also Σ_bands Sᵀ·drop(x), S (bands,M,r). H,
    S and the factors are multiplied in the dtype of x, or of `factors` where that is wider.
    """
    (m, n), k = dy.shape, x.shape[1]
    rank = a_up.shape[1]
    b_rank = 0 if db_down is None else db_down.shape[0]
    config = config or hadamard_grad_config(Shape(m, n, k, rank), x.dtype, arch, factors)
    products = factor_arithmetic(x.dtype, factors)
    step = 16 if products["FACTOR_PRECISION"] == "halves" else 64  # of the rank: what does not spill
    args = {
        "dy_ptr": dy, **strides(dy, "stride_dym", "stride_dyn"),
        "x_ptr": x, **strides(x, "stride_xm", "stride_xk"),
        **weight_arguments(weight),
        "up_ptr": a_up, **strides(a_up, "stride_un", "stride_ur"),
        "down_ptr": a_down, **strides(a_down, "stride_dr", "stride_dk"),
        "dup_ptr": dup, "stride_dup_part": leading_stride(dup),
        "ddown_ptr": ddown, "stride_ddown_part": leading_stride(ddown),
        "weff_ptr": weff,
        "s_ptr": s, **strides(s, "stride_sb", "stride_sm", "stride_sr"),
        "db_down_ptr": db_down,
        "M": m, "N": n, "K": k, "R": rank, "B_RANK": b_rank,
        **dropout(dropout_p if db_down is not None else 0.0, seed),
        "HAS_DUP": dup is not None, "HAS_DDOWN": ddown is not None, "HAS_WEFF": weff is not None,
        "HAS_DB_DOWN": db_down is not None, "BANDS": 1 if s is None else s.shape[0],
        **arithmetic(x.dtype), **products,
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"], "BLOCK_M": config["depth"],
        "BLOCK_R": configs.block_r(rank, step), "BLOCK_B": configs.block_r(max(1, b_rank)), "GROUP": GROUP,
    }  # fmt: skip
    tiles = (cdiv(n, config["rows"]) + (db_down is not None)) * cdiv(k, config["cols"])
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
        **weight_arguments(weight),
        "c_ptr": c, "stride_c": leading_stride(c),
        "c_up_ptr": c_up, **strides(c_up, "stride_cuk", "stride_cur"),
        "c_down_ptr": c_down, "stride_cd": leading_stride(c_down),
        "wc_ptr": wc, "N": n, "K": k, "R": rank, "LOW_RANK": c_up is not None,
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
        **weight_arguments(weight),
        "g_ptr": g, "stride_g": g.stride(0), "part_ptr": part, "stride_part": part.stride(0),
        "N": n, "K": k, "rows_per_split": cdiv(cdiv(n, splits), config["rows"]) * config["rows"],
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
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
        "part_ptr": part, "stride_part": part.stride(0),
        "c_up_ptr": c_up, **strides(c_up, "stride_cuk", "stride_cur"),
        "c_down_ptr": c_down, "stride_cd": leading_stride(c_down),
        "dc_ptr": dc, "dc_up_ptr": dc_up, "dc_down_ptr": dc_down,
        "K": k, "R": rank, "splits": splits,
        "HAS_DC": dc is not None, "HAS_DUP": dc_up is not None, "HAS_DDOWN": dc_down is not None,
        "BLOCK_K": config["cols"], "BLOCK_R": configs.block_r(max(1, rank)),
    }  # fmt: skip
    return Launch(_c_grad_kernel, (cdiv(k, config["cols"]) + (dc_down is not None),), args, options(config, args))
