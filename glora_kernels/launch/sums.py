"""The launchers of backward's one read of dy and one of x. They allocate nothing, and say how large what they fill is.

Partial sums: `bands` (number, width) of a reduction that the reader adds, `splits` of rows that `finish_launch` adds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.sums import _dy_kernel, _x_kernel
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import (
    Launch,
    dropout,
    factor_arithmetic,
    leading_stride,
    options,
    shift,
    strides,
    vector_stride,
)


def dy_config(
    shape: Shape, dtype: torch.dtype, arch: str, mixed: bool = False, factors: torch.dtype | None = None
) -> dict[str, int]:
    """The configuration of `dy_launch`: see `dy_sizes`."""
    config = tables.choose("dy_mixed" if mixed else "dy", arch, dtype, shape)
    if dtype == torch.float16 and factors == torch.float32:  # halves of dy as well
        return config | {"rows": max(32, config["rows"] // 2)}
    return config


def dy_sizes(
    shape: Shape, dtype: torch.dtype, arch: str, mixed: bool = False, factors: torch.dtype | None = None
) -> tuple[int, int, int]:
    """(splits of M, bands of N, width of a band): the leading sizes of the partial sums of `dy_launch`.

    `mixed`: it is given a y that holds more than Z∘(1+a). `factors`: the dtype they are multiplied in, that of dy where
    it is not given.
    """
    config = dy_config(shape, dtype, arch, mixed, factors)
    number, width = configs.bands(arch, shape.m, config["rows"], shape.n, config["cols"])
    return cdiv(shape.m, config["rows"]), number, width


def dy_launch(
    dy: Tensor,
    *,
    y: Tensor | None = None,
    u: Tensor | None = None,
    up: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
    wc: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
    h: Tensor | None = None,
    sigma: Tensor | None = None,
    s: Tensor | None = None,
    tau: Tensor | None = None,
    part: Tensor | None = None,
    with_g: bool = False,
    with_sigma: bool = False,
    with_factor: bool = True,
    factors: torch.dtype | None = None,
    p: int,
    r: int,
    shape: Shape,
    bands: tuple[int, int],
    scale: float = 1.0,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """S (bands,M,p+r) = [dy·U | s·dy·up], τ (bands,M) = dy·b, and part (splits,C,N), C = p+r + the sums asked for.

    part[i,·] is Σₘ dy (`with_g`), Σₘ σ·dy (`with_sigma`) and where y is given the sums for dA, then Σₘ h[m,c]·dy where
    h (M,p+r) is given (and `with_factor`). For dA: Σₘ dy∘(y - rest), with rest = β + h·upᵀ + σ·bᵀ of what is given, and
    where there is any of that two more sums (`_dy_kernel`). up, u and h are multiplied in the dtype of dy, or of the
    `factors` where that is wider.
    """
    m, n = dy.shape
    mixed = y is not None and any(t is not None for t in (up, b, bias, wc, e))
    config = config or dy_config(shape, dy.dtype, arch, mixed, factors)
    args = {
        "dy_ptr": dy, **strides(dy, "stride_dym", "stride_dyn"),
        "y_ptr": y, **strides(y, "stride_ym", "stride_yn"),
        "u_ptr": u, **strides(u, "stride_un", "stride_ur"),
        "up_ptr": up, **strides(up, "stride_upn", "stride_upr"),
        "b_ptr": b, "stride_b": vector_stride(b),
        **shift(bias, wc, d, e),
        "h_ptr": h, **strides(h, "stride_hm", "stride_hr"),
        "sigma_ptr": sigma,
        "s_ptr": s, **strides(s, "stride_sb", "stride_sm", "stride_sr"),
        "tau_ptr": tau, "stride_tau": leading_stride(tau),
        "part_ptr": part,
        "stride_part": leading_stride(part), "stride_pc": 0 if part is None else part.stride(1),
        "M": m, "N": n, "P": p, "R": r, "band_width": bands[1], "scale": float(scale),
        "HAS_S": s is not None, "HAS_U": u is not None, "HAS_UP": up is not None, "HAS_B": b is not None,
        "HAS_TAU": tau is not None, "HAS_FACTOR": h is not None and with_factor, "HAS_G": with_g,
        "HAS_SIGMA": with_sigma, "HAS_Y": y is not None,
        **factor_arithmetic(dy.dtype, factors),
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"],
        "BLOCK_P": configs.block_r(max(1, p)), "BLOCK_R": configs.block_r(max(1, r)),
        "BLOCK_H": configs.block_r(max(1, p + r)),
    }  # fmt: skip
    return Launch(_dy_kernel, (cdiv(m, config["rows"]), bands[0]), args, options(config, args))


def x_splits(shape: Shape, dtype: torch.dtype, arch: str) -> int:
    """How many partial sums over M `x_launch` writes."""
    config = tables.choose("x", arch, dtype, shape)
    return configs.row_splits(shape.m, cdiv(shape.k, config["cols"]), config["rows"])


def x_launch(
    x: Tensor,
    *,
    s: Tensor | None,
    p: int,
    r: int,
    part: Tensor | None = None,
    want_p: bool = False,
    want_v: bool = False,
    dx: Tensor | None = None,
    a_down: Tensor | None = None,
    b_down: Tensor | None = None,
    tau: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    factors: torch.dtype | None = None,
    shape: Shape,
    splits: int,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """part (splits,C,K): Sᵀx of the first p columns of S (bands,M,p+r) with `want_p`, Sᵀ·drop(x) of the others.

    With `dx` (M,K) also dx = S[:, :p]·a_down + mask∘(S[:, p:]·b_down)/(1-p) + τ·1ᵀ; x only gives the sizes then, unless
    a part is wanted. S is multiplied in the dtype of x, or of the `factors` where that is wider.
    """
    m, k = x.shape
    config = config or tables.choose("x", arch, x.dtype, shape)
    bands = s.shape[0] if s is not None else (1 if tau is None else tau.shape[0])
    args = {
        "x_ptr": x, **strides(x, "stride_xm", "stride_xk"),
        "s_ptr": s, **strides(s, "stride_sb", "stride_sm", "stride_sr"),
        "tau_ptr": tau, "stride_tau": leading_stride(tau),
        "a_down_ptr": a_down, **strides(a_down, "stride_adr", "stride_adk"),
        "b_down_ptr": b_down, **strides(b_down, "stride_bdr", "stride_bdk"),
        "dx_ptr": dx, **strides(dx, "stride_dxm", "stride_dxk"),
        "part_ptr": part,
        "stride_part": leading_stride(part), "stride_pc": 0 if part is None else part.stride(1),
        "M": m, "K": k, "P": p, "R": r,
        "rows_per_split": cdiv(cdiv(m, splits), config["rows"]) * config["rows"],
        **dropout(dropout_p, seed),
        "HAS_P": want_p, "HAS_V": want_v, "WRITE_DX": dx is not None,
        "HAS_DOWN_P": a_down is not None, "HAS_DOWN_V": b_down is not None, "HAS_TAU": tau is not None,
        "BANDS": bands,
        **factor_arithmetic(x.dtype, factors),
        "BLOCK_M": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_P": configs.block_r(max(1, p)), "BLOCK_R": configs.block_r(max(1, r)),
    }  # fmt: skip
    return Launch(_x_kernel, (cdiv(k, config["cols"]), splits), args, options(config, args))
