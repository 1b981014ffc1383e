"""The launchers of the large products: each turns tensors into one `Launch` of its kernel. They allocate nothing.

`arch` is chosen by the caller (`plan.arch_of`), so that a launch can be planned for a card that is not here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.glora import _glora_dx_kernel, _glora_fwd_kernel
from glora_kernels.launch import configs, environment, tables
from glora_kernels.launch.plan import (
    Launch,
    arithmetic,
    descriptor,
    dropout,
    factor_arithmetic,
    leading_stride,
    options,
    shift,
    strides,
    vector_stride,
)

GROUP = 8
"""Row tiles that share their columns in the L2 (`kernels.common._tile_of`)."""

RANK_STEP = 16
"""Columns of the low-rank term at a time, at any rank: more of them spill beside the product's accumulator."""


def glora_fwd_launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
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
    h_sum: Tensor | None = None,
    sigma_sum: Tensor | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """y (M,N) = (x·Wᵀ)∘(1+a) + P·Uᵀ + h·upᵀ + σ·bᵀ + bias∘(1+d) + e + wc, with h (bands,M,P+R) and σ (bands,M).

    `h_sum` (M,P+R) and `sigma_sum` (M,) receive the sums over more than one band.
    """
    (m, k), n = x.shape, weight.shape[0]
    p, r = 0 if u is None else u.shape[1], 0 if up is None else up.shape[1]
    bands = h.shape[0] if h is not None else (1 if sigma is None else sigma.shape[0])
    config = config or tables.choose("fwd", arch, x.dtype, configs.Shape(m, n, k, max(p, r)), weight.dtype)
    factors = factor_arithmetic(x.dtype, u, up)
    operands, config = _operands(x, weight, y, in_parts(config, arch, factors), arch, ("x", "w", "y"))
    rows, cols, depth, tma = config["rows"], config["cols"], config["depth"], bool(config["tma"])
    args = {
        **operands, **strides(x, "stride_xm", "stride_xk"), **strides(weight, "stride_wn", "stride_wk"),
        **strides(y, "stride_ym", "stride_yn"),
        "h_ptr": h, **strides(h, "stride_hb", "stride_hm", "stride_hr"),
        "u_ptr": u, **strides(u, "stride_un", "stride_ur"),
        "up_ptr": up, **strides(up, "stride_upn", "stride_upr"),
        "a_ptr": a, "stride_a": vector_stride(a),
        "b_ptr": b, "stride_b": vector_stride(b),
        "sigma_ptr": sigma, "stride_sigma": leading_stride(sigma),
        **shift(bias, wc, d, e),
        "h_sum_ptr": h_sum, "sigma_sum_ptr": sigma_sum,
        "M": m, "N": n, "K": k, "P": p, "R": r,
        "HAS_A": a is not None, "HAS_B": b is not None, "HAS_U": u is not None, "HAS_UP": up is not None,
        "BANDS": bands, "TMA": tma, "W_IS_ROW_MAJOR": weight.stride(1) == 1,
        "WARP_SPECIALIZE": bool(config["warp_specialize"]), "PARTS": config["parts"],
        **arithmetic(x.dtype), **factors,
        "BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": depth,
        "BLOCK_R": RANK_STEP, "GROUP": GROUP,
    }  # fmt: skip
    return Launch(_glora_fwd_kernel, product_grid(_tiles(y, config), y, config, arch), args, options(config, args))


def glora_dx_launch(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    *,
    s: Tensor | None = None,
    a_down: Tensor | None = None,
    b_down: Tensor | None = None,
    a: Tensor | None = None,
    tau: Tensor | None = None,
    vectors: Tensor | None = None,
    totals: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """dx (M,K) = (dy∘(1+a))·W + S[:, :P]·a_down + mask∘(S[:, P:]·b_down)/(1-p) + τ·1ᵀ, S (bands,M,P+R), τ (bands,M).

    `totals` (I,) receives the sums over N of `vectors` (I,N), which the launch before must have left.
    """
    (m, n), k = dy.shape, weight.shape[1]
    p, r = 0 if a_down is None else a_down.shape[0], 0 if b_down is None else b_down.shape[0]
    bands = s.shape[0] if s is not None else (1 if tau is None else tau.shape[0])
    config = config or tables.choose("dx", arch, dy.dtype, configs.Shape(m, n, k, max(p, r)), weight.dtype)
    factors = factor_arithmetic(dy.dtype, a_down, b_down)
    config = in_parts(config, arch, factors)
    if arch == "sm_100" and p and factors["FACTOR_PRECISION"] == "halves":
        config = config | {"rows": min(64, config["rows"])}  # of two pairs of factors: what does not spill
    operands, config = _operands(dy, weight.t(), dx, config, arch, ("dy", "w", "dx"))
    if arch in ("sm_80", "sm_89") and weight.dtype != dy.dtype and b_down is not None:
        config = config | {"cols": min(64, config["cols"])}  # a wider W is cast on its way: what does not spill
    rows, cols, depth, tma = config["rows"], config["cols"], config["depth"], bool(config["tma"])
    args = {
        **operands, **strides(dy, "stride_dym", "stride_dyn"), **strides(weight, "stride_wn", "stride_wk"),
        **strides(dx, "stride_dxm", "stride_dxk"),
        "s_ptr": s, **strides(s, "stride_sb", "stride_sm", "stride_sr"),
        "a_down_ptr": a_down, **strides(a_down, "stride_adr", "stride_adk"),
        "b_down_ptr": b_down, **strides(b_down, "stride_bdr", "stride_bdk"),
        "a_ptr": a, "stride_a": vector_stride(a),
        "tau_ptr": tau, "stride_tau": leading_stride(tau),
        "vectors_ptr": vectors, "totals_ptr": totals, "TOTALS": 0 if vectors is None else vectors.shape[0],
        "M": m, "N": n, "K": k, "P": p, "R": r,
        **dropout(dropout_p if b_down is not None else 0.0, seed),
        "HAS_A": a is not None, "HAS_TAU": tau is not None, "HAS_U": a_down is not None, "HAS_UP": b_down is not None,
        "BANDS": bands, "TMA": tma, "W_IS_ROW_MAJOR": weight.stride(1) == 1,
        "WARP_SPECIALIZE": bool(config["warp_specialize"]), "PARTS": config["parts"],
        **arithmetic(dy.dtype), **factors,
        "BLOCK_M": rows, "BLOCK_N": depth, "BLOCK_K": cols,
        "BLOCK_R": RANK_STEP, "GROUP": GROUP,
    }  # fmt: skip
    return Launch(_glora_dx_kernel, product_grid(_tiles(dx, config), dx, config, arch), args, options(config, args))


def in_parts(config: dict[str, int], arch: str, factors: dict[str, Any]) -> dict[str, int]:
    """A product's configuration beside its factors: halves of fp32 ones spill on sm_100 if a tile has fewer parts."""
    return config | {"parts": 4} if arch == "sm_100" and factors["FACTOR_PRECISION"] == "halves" else config


def _operands(
    left: Tensor, right: Tensor, out: Tensor, config: dict[str, int], arch: str, names: tuple[str, str, str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The matrices of left·rightᵀ, right (cols, depth) in any order, and the configuration that suits them.

    As descriptors, all of them, where the configuration wants TMA and it can read them; else as pointers, with the
    tile for those.
    """
    mixed = right.dtype != left.dtype
    if config["tma"] and not mixed:
        rows, cols, depth = config["rows"], config["cols"], config["depth"]
        row_major = right.stride(1) == 1
        found = (
            descriptor(left, rows, depth),
            descriptor(right, cols, depth) if row_major else descriptor(right.t(), depth, cols),
            descriptor(out, rows, cols // config["parts"]),
        )
        if None not in found:
            return dict(zip(names, found, strict=True)), config
    if config["tma"]:
        config = configs.large_product(arch, left.dtype, out.shape[0], out.shape[1], mixed=mixed, tma=False)
    base = right if right.stride(1) == 1 else right.t()
    return dict(zip(names, (left, base, out), strict=True)), config


def product_grid(tiles: int, out: Tensor, config: dict[str, int], arch: str) -> tuple[int]:
    """One program a tile, or where persistent one a multiprocessor of the card the tensor is on."""
    if not config["persistent"]:
        return (tiles,)
    here = environment.multiprocessors(out.device.index or 0) if out.is_cuda else configs.programs(arch)
    return (min(tiles, here),)


def _tiles(out: Tensor, config: dict[str, int]) -> int:
    return cdiv(out.shape[0], config["rows"]) * cdiv(out.shape[1], config["cols"])
