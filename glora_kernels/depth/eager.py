"""β of one layer and its gradients in plain PyTorch, for layers that the kernels over depth do not take.

β = b + b∘D + E + W·C
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from glora_kernels.depth.table import Layer
from glora_kernels.dispatch.common import given, wide_dtype
from glora_kernels.dispatch.operator import gradients
from glora_kernels.glora import eager, wc
from glora_kernels.glora.call import C, Needs, Supports, shift
from glora_kernels.quant import QuantizedWeight


def beta(layer: Layer, product: Callable[..., Tensor] | None = None) -> Tensor:
    """β (N,) by differentiable operations; W·c is computed by `product`, by default `ops.glora_wc`."""
    c, weight = _c(layer), layer.weight
    made = None
    if any(tensor is not None for tensor in c):
        made = wc.glora_wc(weight, c.c, c_up=c.c_up, c_down=c.c_down) if product is None else product(weight, c)
    # A 4-bit W can be dequantized to any dtype, so that the adapter's dtype decides.
    exact = isinstance(weight, QuantizedWeight) and any(t.dtype == torch.float64 for t in layer.adapter.values())
    dtype = torch.float64 if exact else weight.dtype
    found = given(shift(_shifting(layer)._replace(wc=made), dtype))
    return found.to(wide_dtype(dtype)).expand(weight.shape[0])


def shifted(layer: Layer) -> Tensor:
    """β in memory of its own."""
    return beta(layer, eager.wc_forward).clone()


def shift_gradients(layer: Layer, g: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """The gradients of the named tensors from g = ∂β."""
    needs = Needs(bias="bias" in names, d="D" in names, e="E" in names)
    dbias, _, dd, de = eager.shift_gradients(g, _shifting(layer), needs)
    found: dict[str, Tensor | None] = {"bias": dbias, "D": dd, "E": de}
    flags = [name in names for name in _C]
    if any(flags):
        dc = wc.gradients(g, layer.weight, _c(layer), flags, "eager")
        found |= zip((name for name in _C if name in names), dc, strict=True)
    return {name: given(found[name]) for name in names}


def batched_shift_gradients(layer: Layer, g: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """`shift_gradients` for a batched g."""

    def forward(*tensors: Tensor) -> list[Tensor]:
        new = dict(zip(names, tensors, strict=True))
        bias = new.pop("bias", layer.bias)
        return [beta(Layer(layer.weight, bias, {**layer.adapter, **new}))]

    found = gradients(forward, [layer.tensor(name) for name in names], [True] * len(names), [g])
    return dict(zip(names, found, strict=True))


_C = ("C", "C_up", "C_down")


def _shifting(layer: Layer) -> Supports:
    return Supports(bias=layer.bias, d=layer.adapter.get("D"), e=layer.adapter.get("E"))


def _c(layer: Layer) -> C:
    return C(*map(layer.adapter.get, _C))
