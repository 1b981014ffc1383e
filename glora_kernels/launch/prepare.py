"""The launchers of what comes before y (h, σ, U, W_eff), and of y's terms beside the library's product.

h and σ may be partial sums over bands of K, which the product's kernel adds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.operands import Terms
from glora_kernels.kernels.prepare import _added_terms_kernel, _prepare_kernel
from glora_kernels.launch import configs, plan, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import NO_DROPOUT, Dropout, Launch, factor_depth, halves, matrix, numerics, options
from glora_kernels.launch.sizes import rows

MAX_BANDS = 4
"""More of them take registers that the product's epilogue has not."""


class Prepared(NamedTuple):
    """What `prepare_launch` fills: low = [P | h] (bands,M,P+R), σ (bands,M), U (N,P), W_eff (N,K), contiguous.

    The rows of `low` may be longer than P+R.
    """

    low: Tensor | None = None
    sigma: Tensor | None = None
    u: Tensor | None = None
    weff: Tensor | None = None


def prepare_bands(shape: Shape, dtype: torch.dtype, arch: str) -> int:
    """The number of bands of K over which h and σ are partial sums: few, as the product's tiles all read them."""
    config = tables.choose("prepare", arch, dtype, shape)
    return min(MAX_BANDS, configs.bands(arch, shape.m, config["rows"], shape.k, config["depth"])[0])


def prepare_launch(
    x: Tensor,
    weight: Tensor,
    out: Prepared,
    *,
    a_up: Tensor | None = None,
    a_down: Tensor | None = None,
    b_down: Tensor | None = None,
    a: Tensor | None = None,
    scale: float = 1.0,
    dropout: Dropout = NO_DROPOUT,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """low (bands,M,P+R) = [x·a_downᵀ | s·drop(x)·b_downᵀ], σ (bands,M) = Σₖ x; U (N,P) = W·a_up or W_eff (N,K).

    W_eff is W∘(1 + a_up·a_down), or W∘(1+a) where `a` is given; then a_up and a_down take no part in `low`.
    """
    m, (n, k) = rows(x), weight.shape  # x is read only for low and σ
    into_p = a_down is not None and out.u is not None
    p, r = (0 if t is None else t.shape[0] for t in (a_down, b_down))
    shape = Shape(configs.m_class(m), n, k, max(p if into_p else 0, r))
    config = config or tables.choose("prepare", arch, x.dtype, shape)
    if dropout.p > 0.0 and r > 32 and x.dtype.itemsize == 2:  # a mask beside that many sums: what does not spill
        config = config | {"num_warps": 8}
    numbers = numerics(x.dtype, a_up, a_down, b_down)
    config = configs.fitted("prepare", config, arch, x.dtype, halves=halves(numbers))
    around = tables.choose("weight", arch, x.dtype, shape._replace(r=p))
    bands = next((t.shape[0] for t in (out.low, out.sigma) if t is not None), 0)
    row_programs = cdiv(m, config["rows"]) * bands
    weight_programs = 0 if out.u is None and out.weff is None else cdiv(n, around["rows"])
    if out.weff is not None:
        weight_programs *= cdiv(k, around["cols"])
    args = {
        "x": matrix(x), "w": matrix(weight), "a_up": matrix(a_up), "a_down": matrix(a_down), "b_down": matrix(b_down),
        "a": plan.vector(a), "low": matrix(out.low), "sigma_ptr": out.sigma, "u_ptr": out.u, "weff_ptr": out.weff,
        # P is also the rank of A where W_eff is built: a call has P columns of `low` or W_eff, never both.
        "M": m, "N": n, "K": k, "P": p, "R": r, "row_programs": row_programs, "scale": float(scale),
        **dropout.arguments(b_down),
        "NUMERICS": numbers,
        "BLOCK_M": config["rows"], "BLOCK_K": factor_depth(config, numbers),
        "BLOCK_P": configs.block_r(max(1, p)) if into_p else 16,
        "BLOCK_R": configs.block_r(max(1, r)), "BLOCK_A": configs.block_r(max(1, p), 64),
        "BLOCK_WN": around["rows"], "BLOCK_WK": around["cols"],
    }  # fmt: skip
    return Launch(_prepare_kernel, (row_programs + weight_programs,), args, options(config, args))


def added_terms_launch(
    x: Tensor,
    y: Tensor,
    terms: Terms,
    *,
    read_z: bool,
    a_down: Tensor | None = None,
    b_down: Tensor | None = None,
    scale: float = 1.0,
    dropout: Dropout = NO_DROPOUT,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """y (M,N) = [y∘(1+a) with `read_z`] + P·Uᵀ + h·upᵀ + σ·bᵀ + β in place, filling `low` (1,M,P+R) and σ (1,M)."""
    m, k, n = rows(x), x.shape[1], y.shape[1]
    p, r = (0 if t is None else t.shape[0] for t in (a_down, b_down))
    shape = Shape(configs.m_class(m), n, k, max(p, r))
    config = config or tables.choose("added_terms", arch, x.dtype, shape)
    numbers = numerics(x.dtype, a_down, b_down, terms.u, terms.up)
    config = configs.fitted("added_terms", config, arch, x.dtype, halves=halves(numbers))
    args = {
        "x": matrix(x), "a_down": matrix(a_down), "b_down": matrix(b_down), "y": matrix(y), "terms": plan.terms(terms),
        "M": m, "N": n, "K": k, "P": p, "R": r, "scale": float(scale),
        **dropout.arguments(b_down),
        "READ_Z": read_z, "NUMERICS": numbers,
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"], "BLOCK_K": factor_depth(config, numbers),
        "BLOCK_P": configs.block_r(max(1, p)), "BLOCK_R": configs.block_r(max(1, r)),
    }  # fmt: skip
    return Launch(_added_terms_kernel, (cdiv(m, config["rows"]),), args, options(config, args))
