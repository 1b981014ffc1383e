"""The launchers of what comes before y (h, σ, U, W_eff), and of y's terms beside the library's product.

h and σ may be partial sums over `bands` (number, width) of K, which the product's kernel adds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.prepare import _added_terms_kernel, _prepare_kernel
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import (
    Launch,
    dropout,
    factor_arithmetic,
    factor_depth,
    leading_stride,
    options,
    shift,
    strides,
    vector_stride,
)


def prepare_bands(shape: Shape, dtype: torch.dtype, arch: str) -> tuple[int, int]:
    """(number, width) of the bands of K over which h and σ are partial sums."""
    config = tables.choose("prepare", arch, dtype, shape)
    return configs.bands(arch, shape.m, config["rows"], shape.k, config["depth"])


def prepare_launch(
    x: Tensor,
    weight: Tensor,
    *,
    a_up: Tensor | None = None,
    a_down: Tensor | None = None,
    b_down: Tensor | None = None,
    a: Tensor | None = None,
    h: Tensor | None = None,
    sigma: Tensor | None = None,
    u: Tensor | None = None,
    weff: Tensor | None = None,
    band_width: int = 0,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """h (bands,M,P+R) = [x·a_downᵀ | s·drop(x)·b_downᵀ], σ (bands,M) = Σₖ x; U (N,P) = W·a_up or W_eff (N,K).

    `weff` is W∘(1 + a_up·a_down), or W∘(1+a) where `a` is given; then a_up and a_down take no part in h.
    """
    m, (n, k) = x.shape[0], weight.shape  # x is read only for h and σ
    into_p = a_down is not None and u is not None
    p = 0 if a_down is None else a_down.shape[0]
    r = 0 if b_down is None else b_down.shape[0]
    config = config or tables.choose("prepare", arch, x.dtype, Shape(m, n, k, max(p if into_p else 0, r)))
    if dropout_p > 0.0 and r > 32 and x.dtype.itemsize == 2:  # a mask beside that many sums: what does not spill
        config = config | {"num_warps": 8}
    around = tables.choose("weight", arch, x.dtype, Shape(m, n, k, p))
    bands = h.shape[0] if h is not None else (0 if sigma is None else sigma.shape[0])
    row_programs = cdiv(m, config["rows"]) * bands
    weight_programs = cdiv(n, around["rows"]) if u is not None else 0
    if weff is not None:
        weight_programs = cdiv(n, around["rows"]) * cdiv(k, around["cols"])
    factors = factor_arithmetic(x.dtype, a_up, a_down, b_down)
    args = {
        "x_ptr": x, **strides(x, "stride_xm", "stride_xk"),
        "w_ptr": weight, **strides(weight, "stride_wn", "stride_wk"),
        "a_up_ptr": a_up, **strides(a_up, "stride_aun", "stride_aur"),
        "a_down_ptr": a_down, **strides(a_down, "stride_adr", "stride_adk"),
        "b_down_ptr": b_down, **strides(b_down, "stride_bdr", "stride_bdk"),
        "a_ptr": a, "stride_a": vector_stride(a),
        "h_ptr": h, **strides(h, "stride_hb", "stride_hm", "stride_hr"),
        "sigma_ptr": sigma, "stride_sigma": leading_stride(sigma),
        "u_ptr": u, **strides(u, "stride_un", "stride_ur"),
        "weff_ptr": weff,
        # P is also the rank of A where W_eff is built: a call has h's P columns or W_eff, never both.
        "M": m, "N": n, "K": k, "P": p, "R": r,
        "row_programs": row_programs, "band_width": band_width or k, "scale": float(scale),
        **dropout(dropout_p if b_down is not None else 0.0, seed),
        "HAS_ROWS": row_programs > 0, "HAS_P": into_p, "HAS_V": b_down is not None, "HAS_SUM": sigma is not None,
        "HAS_U": u is not None, "HAS_WEFF": weff is not None, "HAS_A": a is not None,
        **factors,
        "BLOCK_M": config["rows"], "BLOCK_K": factor_depth(config, factors),
        "BLOCK_P": configs.block_r(max(1, p)) if into_p else 16,
        "BLOCK_R": configs.block_r(max(1, r)), "BLOCK_A": configs.block_r(max(1, p), 64),
        "BLOCK_WN": around["rows"], "BLOCK_WK": around["cols"],
    }  # fmt: skip
    return Launch(_prepare_kernel, (row_programs + weight_programs,), args, options(config, args))


def added_terms_launch(
    x: Tensor,
    y: Tensor,
    *,
    read_z: bool,
    a_down: Tensor | None = None,
    b_down: Tensor | None = None,
    h: Tensor | None = None,
    u: Tensor | None = None,
    up: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    sigma: Tensor | None = None,
    bias: Tensor | None = None,
    wc: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """y (M,N) = [y∘(1+a) with `read_z`] + P·Uᵀ + h·upᵀ + σ·bᵀ + β in place, filling h (M,P+R) and σ (M,)."""
    (m, k), n = x.shape, y.shape[1]
    p, r = 0 if a_down is None else a_down.shape[0], 0 if b_down is None else b_down.shape[0]
    config = config or tables.choose("added_terms", arch, x.dtype, Shape(m, n, k, max(p, r)))
    factors = factor_arithmetic(x.dtype, a_down, b_down, u, up)
    if arch.startswith("gfx") and factors["FACTOR_PRECISION"] == "halves":
        config = config | {"cols": min(32, config["cols"])}  # what does not spill
    args = {
        "x_ptr": x, **strides(x, "stride_xm", "stride_xk"),
        "a_down_ptr": a_down, **strides(a_down, "stride_adr", "stride_adk"),
        "b_down_ptr": b_down, **strides(b_down, "stride_bdr", "stride_bdk"),
        "y_ptr": y, **strides(y, "stride_ym", "stride_yn"),
        "h_ptr": h, **strides(h, "stride_hm", "stride_hr"),
        "u_ptr": u, **strides(u, "stride_un", "stride_ur"),
        "up_ptr": up, **strides(up, "stride_upn", "stride_upr"),
        "a_ptr": a, "stride_a": vector_stride(a),
        "b_ptr": b, "stride_b": vector_stride(b),
        "sigma_ptr": sigma,
        **shift(bias, wc, d, e),
        "M": m, "N": n, "K": k, "P": p, "R": r, "scale": float(scale),
        **dropout(dropout_p if b_down is not None else 0.0, seed),
        "HAS_A": a is not None, "HAS_B": b is not None, "HAS_P": a_down is not None, "HAS_V": b_down is not None,
        "READ_Z": read_z,
        **factors,
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"], "BLOCK_K": factor_depth(config, factors),
        "BLOCK_P": configs.block_r(max(1, p)), "BLOCK_R": configs.block_r(max(1, r)),
    }  # fmt: skip
    return Launch(_added_terms_kernel, (cdiv(m, config["rows"]),), args, options(config, args))
