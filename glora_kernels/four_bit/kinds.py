"""Chooses the kernels for a 4-bit weight: csrc or Triton, on the codes or, with more tokens, on a dense workspace.

Both kinds have the same launchers. A measured table decides if it has an entry near the shape. Otherwise csrc is taken
if the extension is available, and for up to `cost.FEW_TOKENS` tokens the product that reads the codes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glora_kernels.four_bit import cuda
from glora_kernels.four_bit.served import why_not
from glora_kernels.operands import Terms
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import configs, extension, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import DEQUANTIZE, SMALL_M


def usable(route: str, arch: str) -> tuple[str, ...]:
    """The kinds of kernels that a call may take: the forced one, else all available, the default first.

    Args:
        route: of the call: "cuda" or "triton" as forced, or "auto".
        arch: of the card.
    """
    if route in ("cuda", "triton"):
        return (route,)
    return ("cuda", "triton") if _available(arch) else ("triton",)


@functools.cache
def _available(arch: str) -> bool:
    """`extension.available`, cached per architecture, since it is too slow for every call of a layer."""
    return extension.available(arch)


def kind(operation: str, route: str, arch: str, dtype: torch.dtype, shape: Shape) -> str:
    """Choose for an operation of a call: "cuda", "triton" or, for `tables.SMALL_M` only, "workspace".

    Args:
        operation: `tables.DEQUANTIZE` or `tables.SMALL_M`.
        route: the call's: "cuda" or "triton" as forced, or "auto".
        arch: of the card.
        dtype: of x, or of the dense weight.
        shape: of the call; M and R are 0 for a dequantization.
    """
    choice: str = tables.choose(operation, arch, dtype, shape, among=usable(route, arch))
    return choice


def dequantize_launch(weight: QuantizedWeight, out: Tensor, *, route: str, arch: str, **terms: Any) -> Any:
    """out (N,K) = W + W∘A + B: the `dequantize_launch` of `four_bit.dequantize` or of `four_bit.cuda`."""
    n, k = weight.shape
    if kind(DEQUANTIZE, route, arch, out.dtype, Shape(0, n, k, 0)) == "cuda":
        return cuda.dequantize_launch(weight, out, arch=arch, **terms)
    from glora_kernels.four_bit import dequantize

    return dequantize.dequantize_launch(weight, out, arch=arch, **terms)


def small_m(
    x: Tensor, weight: QuantizedWeight, rank: int, *, factors: torch.dtype | None = None, route: str, arch: str
) -> str | None:
    """Which `small_m_launch` computes this call from the codes, "cuda" or "triton". None: dequantize and use a GEMM.

    Only the preferred or forced kind is asked; if it refuses, None. `factors`: the dtype of products with factors, by
    default that of x.
    """
    (m, k), n = x.shape, weight.shape[0]
    if m == 0:
        return None
    chosen = kind(SMALL_M, route, arch, x.dtype, Shape(configs.representative(m), n, k, rank))
    return chosen if chosen != "workspace" and why_not(chosen, x, weight, rank, factors) is None else None


def small_m_launch(chosen: str, x: Tensor, weight: QuantizedWeight, y: Tensor, *terms: Terms, **others: Any) -> Any:
    """y, h and σ by the kind that `small_m` has chosen: see `four_bit.small_m.small_m_launch`."""
    if chosen == "cuda":
        return cuda.small_m_launch(x, weight, y, *terms, **others)
    from glora_kernels.four_bit import small_m as few

    return few.small_m_launch(x, weight, y, *terms, **others)
