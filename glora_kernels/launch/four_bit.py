"""Which kernels serve a 4-bit weight: those of csrc or of Triton, and from how many tokens on a dense workspace.

The two kinds have the same launchers. A measured table decides where it has an entry near the shape; without one csrc's
are taken where the extension is there, and up to `FEW_TOKENS` tokens the product that reads the codes itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch import cuda, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.quant import QuantizedWeight

FEW_TOKENS = 32
"""Unmeasured. Above, the codes decoded once into a workspace and the vendor's product are expected to be faster: the
note of bitsandbytes on sm_90 puts it between 16 and 64."""


def kind(operation: str, route: str, arch: str, dtype: torch.dtype, shape: Shape) -> str:
    """ "cuda" or "triton": whose "dequantize" or "small_m" a call takes.

    Args:
        operation: which of the two.
        route: the call's: "cuda" or "triton" as forced, or "auto".
        arch: of the card.
        dtype: of x, or of the dense weight.
        shape: of the call; M is 0 for "dequantize".
    """
    if route in ("cuda", "triton"):
        return route
    measured = tables.four_bit(operation, arch, dtype, shape)
    if measured in ("cuda", "triton") and (measured == "triton" or cuda.available()):
        return measured
    return "cuda" if cuda.available() else "triton"


def dequantize_launch(weight: QuantizedWeight, out: Tensor, *, route: str, arch: str, **terms: Any) -> Any:
    """out (N,K) = W + W∘A + B of the route's kind: `launch.dequantize.dequantize_launch`, or `launch.cuda`'s."""
    n, k = weight.shape
    if kind("dequantize", route, arch, out.dtype, Shape(0, n, k, 0)) == "cuda":
        return cuda.dequantize_launch(weight, out, arch=arch, **terms)
    from glora_kernels.launch import dequantize

    return dequantize.dequantize_launch(weight, out, arch=arch, **terms)


def small_m(x: Tensor, weight: QuantizedWeight, rank: int, *, route: str, arch: str) -> str | None:
    """Whose `small_m_launch` serves a call, "cuda" or "triton", or None: a dense workspace is better, or all there is.

    Where the kind that is faster or forced does not take the call, the other is not asked.
    """
    (m, k), n = x.shape, weight.shape[0]
    shape = Shape(m, n, k, rank)
    measured = tables.four_bit("small_m", arch, x.dtype, shape)
    if m == 0 or measured == "workspace" or (measured is None and m > FEW_TOKENS):
        return None
    chosen = kind("small_m", route, arch, x.dtype, shape)
    return chosen if _serves(chosen, x, weight, rank) is None else None


def small_m_launch(chosen: str, x: Tensor, weight: QuantizedWeight, y: Tensor, *, arch: str, **terms: Any) -> Any:
    """y and what belongs to it, by the kind that `small_m` has chosen."""
    if chosen == "cuda":
        return cuda.small_m_launch(x, weight, y, arch=arch, **terms)
    from glora_kernels.launch import small_m as few

    return few.small_m_launch(x, weight, y, arch=arch, **terms)


def _serves(chosen: str, x: Tensor, weight: QuantizedWeight, rank: int) -> str | None:
    if chosen == "cuda":
        return cuda.serves_small_m(x, weight, rank)
    from glora_kernels.launch import small_m as few

    return few.serves_small_m(x, weight, rank)
