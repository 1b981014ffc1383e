"""Which kernels serve a 4-bit weight: those of csrc or of Triton, and from how many tokens on a dense workspace.

The two kinds have the same launchers. A measured table decides where it has an entry near the shape; without one csrc's
are taken where the extension is there, and up to `FEW_TOKENS` tokens the product that reads the codes itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from glora_kernels.four_bit import cuda
from glora_kernels.operands import Terms
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import configs, extension, tables
from glora_kernels.runtime.configs import Shape

FEW_TOKENS = configs.M_CLASSES[0]
"""Up to how many tokens the product that reads the codes is expected to beat the codes decoded once into a workspace
and the vendor's product; more it does not take. Unmeasured; counted for an H100 (3.0 TB/s, 798 TFLOP/s), in picoseconds
a weight:

- workspace: 0.56 bytes read, 2 written and 2 read again, 1.5; and one launch more.
- codes: 0.56 bytes, 0.19; about 10 instructions to decode one, 0.35; at M = 64, 128 operations at half of the peak,
  0.32. Together 0.9 if none of it hides behind another."""


def usable(route: str, arch: str) -> tuple[str, ...]:
    """Whose kernels a call may take, the one taken unmeasured first: the one that is forced, else all there are.

    Args:
        route: of the call: "cuda" or "triton" as forced, or "auto".
        arch: of the card.
    """
    if route in ("cuda", "triton"):
        return (route,)
    return ("cuda", "triton") if _available(arch) else ("triton",)


@functools.cache
def _available(arch: str) -> bool:
    """As `extension.available`, once an architecture: it takes longer than each call of a layer may."""
    return extension.available(arch)


def unmeasured(operation: str, kinds: tuple[str, ...], m: int) -> str:
    """What serves an operation of `tables.FOUR_BIT` where no table says: `kinds[0]`, or "workspace"."""
    return "workspace" if operation == "small_m" and m > FEW_TOKENS else kinds[0]


def kind(operation: str, route: str, arch: str, dtype: torch.dtype, shape: Shape) -> str:
    """ "cuda", "triton" or (of "small_m") "workspace": what serves a "dequantize" or "small_m".

    Args:
        operation: which of the two.
        route: the call's: "cuda" or "triton" as forced, or "auto".
        arch: of the card.
        dtype: of x, or of the dense weight.
        shape: of the call; M and R are 0 for "dequantize".
    """
    kinds = usable(route, arch)
    return tables.four_bit(operation, arch, dtype, shape, kinds) or unmeasured(operation, kinds, shape.m)


def dequantize_launch(weight: QuantizedWeight, out: Tensor, *, route: str, arch: str, **terms: Any) -> Any:
    """out (N,K) = W + W∘A + B of the route's kind: `four_bit.dequantize.dequantize_launch`, or `four_bit.cuda`'s."""
    n, k = weight.shape
    if kind("dequantize", route, arch, out.dtype, Shape(0, n, k, 0)) == "cuda":
        return cuda.dequantize_launch(weight, out, arch=arch, **terms)
    from glora_kernels.four_bit import dequantize

    return dequantize.dequantize_launch(weight, out, arch=arch, **terms)


def small_m(
    x: Tensor, weight: QuantizedWeight, rank: int, *, factors: torch.dtype | None = None, route: str, arch: str
) -> str | None:
    """Whose `small_m_launch` serves a call, "cuda" or "triton", or None: a dense workspace is better, or all there is.

    Where the kind that is faster or forced does not take the call, the other is not asked. `factors`: their dtype, that
    of x where it is not given.
    """
    (m, k), n = x.shape, weight.shape[0]
    if m == 0:
        return None
    m = configs.tokens(m) if m <= FEW_TOKENS else configs.m_class(m)
    chosen = kind("small_m", route, arch, x.dtype, Shape(m, n, k, rank))
    return chosen if chosen != "workspace" and serves(chosen, x, weight, rank, factors) is None else None


def small_m_launch(chosen: str, x: Tensor, weight: QuantizedWeight, y: Tensor, *terms: Terms, **others: Any) -> Any:
    """y and what belongs to it, by the kind that `small_m` has chosen: see `four_bit.small_m.small_m_launch`."""
    if chosen == "cuda":
        return cuda.small_m_launch(x, weight, y, *terms, **others)
    from glora_kernels.four_bit import small_m as few

    return few.small_m_launch(x, weight, y, *terms, **others)


def serves(
    chosen: str, x: Tensor, weight: QuantizedWeight, rank: int, factors: torch.dtype | None = None
) -> str | None:
    """Why the `small_m_launch` of a kind does not serve a call, or None where it does."""
    if chosen == "cuda":
        return cuda.serves_small_m(x, weight, rank, factors)
    from glora_kernels.four_bit import small_m as few

    return few.serves_small_m(x, weight, rank)
