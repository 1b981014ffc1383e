"""DoRA: a magnitude a row on what LoRA gives, as vectors and factors that the operators already take.

    y = g∘(x Wᵀ + s·h·Uᵀ) + b = x (W + W∘a + s·(g∘U)·D)ᵀ + b,   g = m / ‖W + s·U·D‖ by rows,   a = g − 1

So it is A=vector and B=lora with a and g∘U in the place of parameters. As in PEFT the norm is a constant for backward.
It is found without a dense U·D:

    ‖W + s·U·D‖² = ‖W‖² + 2s·Σ_r U∘(W·Dᵀ) + s²·Σ_r U∘(U·D·Dᵀ)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glora_kernels.dispatch.common import wide_dtype, without_autocast
from glora_kernels.nn.adapted import Frozen
from glora_kernels.ops import glora_linear
from glora_kernels.quant import QuantizedWeight, dequantize

CANCELS = 1e-3
"""Where the norm is below this share of its parts, they cancel, and the row is computed as it is written."""

CHECKED = 64
"""On a GPU, where asking how many rows cancel would wait for it: as many rows as this, those that cancel most."""


def scaled(
    base: Frozen, up: Tensor, down: Tensor, scale: float | Tensor, magnitude: Tensor, kept: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """a (N,) and g∘U (N, R).

    Args:
        base: W.
        up, down, scale: U (N, R), D (R, K) and s.
        magnitude: m (N,).
        kept: of the layer, for ‖W‖² of a 4-bit W.
    """
    with torch.no_grad(), without_autocast(up.device.type):
        norm = row_norms(base, up.detach(), down.detach(), scale, kept)
    g = magnitude.to(norm.dtype) / norm
    return g - 1, (g[:, None] * up).to(torch.promote_types(up.dtype, torch.float32))


def row_norms(base: Frozen, up: Tensor, down: Tensor, scale: float | Tensor, kept: dict[str, Any]) -> Tensor:
    """‖W + s·U·D‖ (N,), in fp32 (float64 where W or a factor is)."""
    weight = base.weight
    of_w = base.compute_dtype or weight.state.dtype if isinstance(weight, QuantizedWeight) else weight.dtype
    wide = wide_dtype(torch.promote_types(of_w, up.dtype))
    # W·Dᵀ is the frozen layer applied to the rows of D: 4-bit weights are decoded as in a call.
    wd = glora_linear(down.to(of_w), weight, None).t().to(wide)
    up, down = up.to(wide), down.to(wide)
    ww = _squares(weight, wide, kept)
    uu = scale * scale * ((up @ (down @ down.t())) * up).sum(1)
    squares = ww + 2 * scale * (up * wd).sum(1) + uu
    share = squares / (ww + uu).clamp_min(torch.finfo(wide).tiny)
    if up.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = (share < CANCELS).nonzero()[:, 0]
    else:
        rows = share.topk(min(CHECKED, len(share)), largest=False).indices
    if len(rows) and (isinstance(weight, Tensor) or up.device.type == "cpu"):
        dense = weight[rows] if isinstance(weight, Tensor) else dequantize(weight, wide)[rows]
        exact = (dense.to(wide) + scale * up[rows] @ down).square().sum(1)
        squares = squares.index_copy(0, rows, exact)
    return squares.sqrt()


def _squares(weight: Any, wide: torch.dtype, kept: dict[str, Any]) -> Tensor:
    """‖W‖² (N,). That of a 4-bit weight, which is decoded for it, is computed once for each content.

    That of a dense one is read anew in each call, as W·Dᵀ is: `weight.data.copy_(...)` changes neither its address nor
    its version, so nothing that is kept could tell.
    """
    if not isinstance(weight, QuantizedWeight):
        return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    if torch.compiler.is_compiling():
        return dequantize(weight, wide).square().sum(1)
    # The codes of a Linear4bit are made of its parameter's `.data`, which has a version of its own.
    read = (kept.get("parameter", weight.packed), *weight.state.tensors())
    key = wide, [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in read]
    if (found := kept.get("dora")) is None or found[0] != key:
        # With the weight, so that its memory is not that of another one meanwhile.
        found = kept["dora"] = key, weight, dequantize(weight, wide).square().sum(1)
    squares: Tensor = found[2]
    return squares
