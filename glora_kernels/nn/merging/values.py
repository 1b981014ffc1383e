"""Merged values: the weight and the bias of a frozen layer with adapters merged into them.

    W_eff = W + Σᵢ (W∘Aᵢ + sᵢ·Bᵢ),   b_eff = b + Σᵢ (b∘Dᵢ + Eᵢ + W·Cᵢ)

over the adapters i: the one of a GLoRALinear, or several of a PEFT layer. They are computed in fp32 (float64 for a
float64 base) from the unmerged base, and rounded once. A weight or bias that several PEFT layers have in common (tied
weights) gets the sum of the changes of all their adapters, as with PEFT's own methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.dispatch.common import wide_dtype, without_autocast
from glora_kernels.nn.base import conv1d_class
from glora_kernels.nn.frozen import FrozenBase, QuantizedLinear
from glora_kernels.nn.merging.rounding import MergeReport, rounded
from glora_kernels.nn.ties import overlaps, same_place
from glora_kernels.quant import QuantizedWeight, QuantState, dequantize
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.reference import effective_bias, effective_weight
from glora_kernels.spec import GLoRAConfig


class Kept(NamedTuple):
    """The values of a layer's `weight`, `bias` and `quant_state` at some time: merged, or before merging."""

    weight: Tensor
    bias: Tensor | None
    quant_state: QuantState | None = None

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or inf; 4-bit codes count as finite."""
        tensors = (t for t in (self.weight, self.bias) if t is not None and t.is_floating_point())
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def writable(base: Any) -> Any:
    """The base itself, or for a `Linear4bit` our `QuantizedLinear` on its memory."""
    return QuantizedLinear.from_linear4bit(base) if is_linear4bit(base) else base


def check_writable(base: Any) -> None:
    """Raise a ValueError where merged values cannot be written.

    A weight in 8 bits, as diffusers' layerwise casting keeps it, would round them away. Of a `Linear4bit` whose absmax
    is not in fp32 we read a copy, so that writes are lost.
    """
    dtype = base.weight.dtype
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise ValueError(f"merge: the weight is kept in {dtype} (layerwise casting); merge before that is enabled")
    layer = writable(base)
    if layer is base:
        return
    state = base.weight.quant_state
    theirs = [state.absmax, *([state.state2.absmax, state.state2.code, state.offset] if state.nested else [])]
    ours = layer.quant_state.tensors()
    if any(not isinstance(t, Tensor) or t.data_ptr() != o.data_ptr() for t, o in zip(theirs, ours, strict=True)):
        raise ValueError("merge: the absmax or offset of this Linear4bit is not in fp32, and cannot be written to")


def keep(base: Any) -> Kept:
    """A copy of the values of a linear layer, dense or 4-bit, in host memory."""
    layer = writable(base)
    bias, state = layer.bias, getattr(layer, "quant_state", None)
    return Kept(
        layer.weight.detach().to("cpu", copy=True),
        None if bias is None else bias.detach().to("cpu", copy=True),
        None if state is None else state.copied("cpu"),
    )


@torch.no_grad()
def write(base: Any, values: Kept) -> None:
    """Write values into the parameters of a layer, in place; its bias is made or removed as needed. May be done twice.

    `copy_` raises the version counter, so a later backward through the old weight fails instead of being wrong.
    """
    layer = writable(base)
    layer.weight.copy_(values.weight)
    if values.quant_state is not None:
        layer.quant_state = layer.quant_state.written(values.quant_state)
    if values.bias is None:
        base.bias = None
    elif base.bias is None:
        base.bias = nn.Parameter(values.bias.to(layer.weight.device, copy=True), requires_grad=False)
    else:
        layer.bias.copy_(values.bias)


class ToMerge(NamedTuple):
    """A frozen layer, its values without any adapter, and the adapters to merge: (supports by name, configuration)."""

    base: Any
    original: Kept
    adapters: Sequence[tuple[Mapping[str, Tensor], GLoRAConfig]]

    def rows(self, stored: Tensor) -> Tensor:
        """A dense weight from its stored order to (N, K), or back."""
        is_transposed = (
            self.base._transposed if isinstance(self.base, FrozenBase) else conv1d_class(self.base) is not None
        )
        return stored.t() if is_transposed else stored

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (N, K) on the layer's device, in fp32 (or float64); a 4-bit weight is dequantized to `dtype`.

        That of a convolution is (N, channels, *kernel).
        """
        weight, _, state = self.original
        device = self.base.weight.device
        if state is not None:
            return dequantize(QuantizedWeight(weight.to(device), state.to(device)), dtype)
        return self.rows(weight).to(device, wide_dtype(weight.dtype))


@torch.no_grad()
def merged(
    own: ToMerge, others: Sequence[ToMerge] = (), *, dense: bool = False, dtype: torch.dtype | None = None
) -> tuple[Kept, MergeReport | None]:
    """Compute the values of a layer with its adapters merged, on its device, in its order of storage; change nothing.

    A weight or bias that other layers have too gets the sum of the changes of all their adapters. A 4-bit weight that
    no adapter changes keeps its codes and its absmax.

    Args:
        own: the layer; there may be no adapters.
        others: merged layers that have their weight or their bias in the same memory.
        dense: for a 4-bit base, return W_eff dense, not rounded to 4 bits.
        dtype: of dense values; None: that of the base.

    Returns:
        The values; and where they were rounded to 4 bits, the report.

    Raises:
        ValueError: W_eff of a 4-bit base holds NaN, inf or numbers beyond the dtype that it was quantized from.
    """
    weight, bias, state = own.original
    layer = writable(own.base)
    base_dtype = layer.base_dtype if isinstance(layer, FrozenBase) else weight.dtype
    w = own.dense(wide_dtype(base_dtype) if dense else torch.float32)
    w_eff, b_eff = _effective(own, w, others)
    if b_eff is not None:
        b_eff = b_eff.to(dtype or (base_dtype if bias is None else bias.dtype))
    if state is None or dense:
        return Kept(own.rows(w_eff.to(dtype or base_dtype)), b_eff), None
    codes, report = rounded(QuantizedWeight(weight.to(w.device), state.to(w.device)), w, w_eff)
    return Kept(codes.packed.view(weight.shape), b_eff, codes.state), report


def _effective(own: ToMerge, w: Tensor, others: Sequence[ToMerge]) -> tuple[Tensor, Tensor | None]:
    """W_eff and b_eff in the dtype of `w`; `w` itself, and b in this dtype, where no adapter changes them."""
    bias = own.original.bias
    b = None if bias is None else bias.to(w.device, w.dtype)
    weights = [own, *(other for other in others if same_place(own.base.weight, other.base.weight))]
    biases = [own, *(other for other in others if same_bias(own.base, other.base))]
    with without_autocast(w.device.type):
        # Each adapter is applied to the base, not to the result of the others.
        w_eff = _together(w, (effective_weight(w, *adapter) for layer in weights for adapter in _adapters(layer)))
        b_eff = _together(
            b,
            (
                effective_bias(w if layer is own else layer.dense(), b, *adapter)
                for layer in biases
                for adapter in _adapters(layer)
            ),
        )
    assert w_eff is not None
    return w_eff, b_eff


def _adapters(layer: ToMerge) -> Iterable[tuple[Mapping[str, Tensor], GLoRAConfig]]:
    device = layer.base.weight.device
    for supports, config in layer.adapters:
        yield {name: tensor.detach().to(device) for name, tensor in supports.items()}, config


def _together(base: Tensor | None, changed: Iterable[Tensor | None]) -> Tensor | None:
    """base + Σᵢ (changedᵢ − base)."""
    total = base
    for one in changed:
        if one is None or one is base:
            continue
        if total is None or total is base:
            total = one
        else:
            total = total + (one if base is None else one - base)
    return total


def same_bias(base: Any, other: Any) -> bool:
    return base.bias is not None and other.bias is not None and same_place(base.bias, other.bias)


def is_tied(base: Any, other: Any) -> bool:
    """Whether two bases have their weight or bias in the same memory; a ValueError where tensors overlap partly."""
    if base is other:
        return True
    pairs = [pair for pair in product(_held(base), _held(other)) if overlaps(*pair)]
    if not all(same_place(*pair) for pair in pairs):
        raise ValueError(
            "merge: the weight or bias of this layer overlaps with that of another layer, which is merged, without "
            "being the same tensor; unmerge that first"
        )
    return bool(pairs)


def _held(base: Any) -> list[Tensor]:
    return [tensor for tensor in (base.weight, base.bias) if tensor is not None]


def without_adapters(base: Any, now: Kept, others: Sequence[ToMerge]) -> Kept:
    """The unmerged values of a base that is not merged itself, but whose memory other layers may have merged into."""
    weight, bias, state = now
    for other in others:
        if same_place(base.weight, other.base.weight):
            weight, state = other.original.weight, other.original.quant_state
        if same_bias(base, other.base):
            bias = other.original.bias
    return Kept(weight, bias, state)


def check_finite(own: ToMerge, values: Kept) -> None:
    """Raise a ValueError where merged values hold NaN or inf (fp16 overflows) in rows where W and b are finite."""
    if values.is_finite:
        return
    rows = torch.isfinite(own.dense()).flatten(1).all(1)
    if own.original.bias is not None:
        rows = rows & torch.isfinite(own.original.bias.to(rows.device))
    weight = own.rows(values.weight) if values.weight.is_floating_point() else None
    for name, tensor in (("weight", weight), ("bias", values.bias)):
        if tensor is None:
            continue
        broken = ~torch.isfinite(tensor) & rows.view(-1, *[1] * (tensor.ndim - 1))
        if bool(broken.any()):
            raise ValueError(
                f"the merged {name} holds NaN, inf or numbers beyond {tensor.dtype} in {int(broken.sum())} places, "
                "and the base does not"
            )
