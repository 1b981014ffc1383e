"""Merging adapters into the base of a PEFT layer, and the base back as it was.

    W_eff = W + Σᵢ (W∘Aᵢ + sᵢ·Bᵢ),   b_eff = b + Σᵢ (b∘Dᵢ + Eᵢ + W·Cᵢ)

Computed in fp32 (float64 for a float64 base) from the base as it was before any merge, and rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import wide_dtype, without_autocast
from glora_kernels.integrations.peft.adapter import Adapter
from glora_kernels.nn.base import is_conv1d
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.requantize import Kept, MergeReport, check_finite, keep, rounded, write
from glora_kernels.nn.ties import overlaps, same_place
from glora_kernels.quant import QuantizedWeight, dequantize
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.reference import effective_bias, effective_weight
from glora_kernels.spec import GLoRAConfig


def kept_base(base: Any) -> Kept:
    """A copy of the base in host memory."""
    return keep(_written(base))


class Merged(NamedTuple):
    """What is merged into the base of a layer: its values without any adapter, and the adapters."""

    base: Any
    original: Kept
    adapters: Sequence[Adapter]


@torch.no_grad()
def merged(own: Merged, others: Sequence[Merged]) -> tuple[Kept, MergeReport | None]:
    """The base with adapters merged, in the form in which it is stored; nothing is changed by this.

    A weight or a bias that belongs to other layers as well holds the sum of what the adapters of all of them change, as
    with PEFT's own methods; each of them sees it.

    Args:
        own: the layer that is written to, with the adapters that it is to have from now on; there may be none.
        others: the merged layers that have their weight or their bias in the same memory (`tied`).

    Returns:
        The values, on the base's device, and over 4 bits what rounding to them has done.

    Raises:
        RuntimeError: an adapter is on the meta device.
        ValueError: over 4 bits, W_eff holds NaN, inf or what is beyond the dtype that the weight stands for.
    """
    base, original, adapters = own
    weight, bias, state = original
    device = base.weight.device
    dense = _dense(own)
    wide = None if bias is None else bias.to(device, dense.dtype)
    weights = [own, *(other for other in others if same_place(base.weight, other.base.weight))]
    biases = [own, *(other for other in others if _same_bias(base, other.base))]
    with without_autocast(dense.device.type):
        # Each adapter changes the base, not what others made of it.
        effective = _together(dense, (effective_weight(dense, *_parts(a, device)) for m in weights for a in m.adapters))
        total = _together(
            wide, (effective_bias(_dense(m), wide, *_parts(a, device)) for m in biases for a in m.adapters)
        )
    assert effective is not None
    if not adapters and effective is dense and total is wide:
        return original, None
    dtype = _computed(base) if state is not None else weight.dtype
    total = None if total is None else total.to(dtype if bias is None else bias.dtype)
    if state is not None:
        quantized = QuantizedWeight(weight.to(device), state.to(device))
        codes, report = rounded(quantized, dense, effective)
        return Kept(codes.packed.view(weight.shape), total, codes.state), report
    effective = effective.to(weight.dtype)
    return Kept(effective.t() if is_conv1d(base) else effective, total), None


def check_against_base(own: Merged, values: Kept) -> None:
    """The error of merged values that hold NaN or inf where the base does not (`check_finite`)."""
    if own.original.quant_state is None:
        weight = values.weight.t() if is_conv1d(own.base) else values.weight
        check_finite(Kept(weight, values.bias), Kept(_dense(own), own.original.bias))


def tied(base: Any, others: Iterable[Merged]) -> list[Merged]:
    """Those of the merged layers whose weight or bias is the memory of this base's.

    Raises:
        ValueError: one that has a part of it only, or has it in another order: what both would write is undefined.
    """
    found = []
    for other in others:
        if other.base is base:
            found.append(other)
            continue
        pairs = list(itertools.product(_tensors(base), _tensors(other.base)))
        if not any(overlaps(*pair) for pair in pairs):
            continue
        if not all(same_place(*pair) for pair in pairs if overlaps(*pair)):
            raise ValueError(
                "merge: the weight or bias of this layer overlaps with that of another layer, which is merged, without "
                "being the same tensor; unmerge that first"
            )
        found.append(other)
    return found


@torch.no_grad()
def put(base: Any, values: Kept) -> None:
    """Write values into the base, in place; a bias comes and goes as they have one.

    May be done twice.
    """
    layer = _written(base)
    write(layer, values)
    if layer is base:
        return
    if layer.bias is None or base.bias is None:
        base.bias = layer.bias


def finite(values: Kept) -> bool:
    """Whether values hold neither NaN nor inf; 4-bit codes never do."""
    tensors = [tensor for tensor in (values.weight, values.bias) if tensor is not None and tensor.is_floating_point()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _written(base: Any) -> Any:
    """What has weight, bias and quant_state to write to: the base, or a layer of ours on the memory of a Linear4bit."""
    return QuantizedLinear.from_linear4bit(base) if is_linear4bit(base) else base


def check_writable(base: Any) -> None:
    """from_linear4bit copies an absmax or offset in another dtype than fp32, and writing to a copy changes nothing.

    Raises:
        ValueError: a `Linear4bit` whose state is not in the memory that it is read from.
    """
    layer = _written(base)
    if layer is base:
        return
    state, mine = base.weight.quant_state, layer.quant_state
    assert mine is not None
    theirs = [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
    ours = [mine.absmax, *([mine.nested.absmax, mine.nested.offset] if mine.nested is not None else [])]
    if any(not isinstance(t, Tensor) or t.data_ptr() != o.data_ptr() for t, o in zip(theirs, ours, strict=True)):
        raise ValueError("merge: the absmax or offset of this Linear4bit is not in fp32, and cannot be written to")


def _computed(base: Any) -> torch.dtype:
    """The dtype of a new bias over 4 bits."""
    layer = _written(base)
    dtype: torch.dtype = layer.base_dtype
    return dtype


def without_adapters(base: Any, now: Kept, others: Sequence[Merged]) -> Kept:
    """The values of a base that is not merged itself, where other layers may have merged into its memory."""
    weight, bias, state = now
    for other in others:
        if same_place(base.weight, other.base.weight):
            weight, state = other.original.weight, other.original.quant_state
        if _same_bias(base, other.base):
            bias = other.original.bias
    return Kept(weight, bias, state)


def _tensors(base: Any) -> list[Tensor]:
    return [tensor for tensor in (base.weight, base.bias) if tensor is not None]


def _same_bias(base: Any, other: Any) -> bool:
    return base.bias is not None and other.bias is not None and same_place(base.bias, other.bias)


def _dense(layer: Merged) -> Tensor:
    """W (N, K) of a layer without its adapters, in the dtype that is computed in."""
    weight, _, state = layer.original
    device = layer.base.weight.device
    if state is not None:
        return dequantize(QuantizedWeight(weight.to(device), state.to(device)), torch.float32)
    stored = weight.t() if is_conv1d(layer.base) else weight
    return stored.to(device, wide_dtype(weight.dtype))


def _parts(adapter: Adapter, device: torch.device) -> tuple[dict[str, Tensor], GLoRAConfig]:
    return {name: tensor.detach().to(device) for name, tensor in adapter.tensors().items()}, adapter.config


def _together(base: Tensor | None, changed: Iterable[Tensor | None]) -> Tensor | None:
    """base + Σᵢ (changedᵢ − base)."""
    total = base
    for one in changed:
        if one is None or one is base:
            continue
        if total is base:
            total = one
        else:
            assert total is not None
            total = total + (one if base is None else one - base)
    return total
