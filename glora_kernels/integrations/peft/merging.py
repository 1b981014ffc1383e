"""Merging adapters into the base of a PEFT layer, and the base back as it was.

    W_eff = W + Σᵢ (W∘Aᵢ + sᵢ·Bᵢ),   b_eff = b + Σᵢ (b∘Dᵢ + Eᵢ + W·Cᵢ)

Computed in fp32 (float64 for a float64 base) from the base as it was before any merge, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glora_kernels.integrations.peft.adapter import Adapter
from glora_kernels.nn.base import is_conv1d
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.requantize import Kept, MergeReport, keep, rounded, write
from glora_kernels.ops.common import wide_dtype, without_autocast
from glora_kernels.quant import QuantizedWeight, dequantize
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.reference import effective_bias, effective_weight


def kept_base(base: Any) -> Kept:
    """A copy of the base in host memory."""
    return keep(_written(base))


@torch.no_grad()
def merged(base: Any, original: Kept, adapters: Sequence[Adapter]) -> tuple[Kept, MergeReport | None]:
    """The base with the adapters merged, in the form in which it is stored; nothing is changed by this.

    Args:
        base: the layer that is merged into.
        original: its values without any adapter, on any device.
        adapters: at least one.

    Returns:
        The values, on the base's device, and over 4 bits what rounding to them has done.

    Raises:
        RuntimeError: an adapter is on the meta device.
        ValueError: over 4 bits, W_eff holds NaN, inf or what is beyond the dtype that the weight stands for.
    """
    device = base.weight.device
    weight, bias, state = original
    weight, bias = weight.to(device), None if bias is None else bias.to(device)
    if state is not None:
        quantized = QuantizedWeight(weight, state.to(device))
        dense = dequantize(quantized, torch.float32)
        effective, total = _effective(dense, bias, adapters)
        codes, report = rounded(quantized, dense, effective)
        stored = codes.packed.view(weight.shape)
        return Kept(stored, _cast(total, bias, _computed(base)), codes.state), report
    transposed = is_conv1d(base)
    dense = (weight.t() if transposed else weight).to(wide_dtype(weight.dtype))
    effective, total = _effective(dense, bias, adapters)
    effective = effective.to(weight.dtype)
    return Kept(effective.t() if transposed else effective, _cast(total, bias, weight.dtype)), None


@torch.no_grad()
def put(base: Any, values: Kept) -> None:
    """Write values into the base, in place; a bias comes and goes as they have one.

    Raises:
        ValueError: a `Linear4bit` whose state is not in the memory that it is read from.
    """
    layer = _written(base)
    if layer is base:
        write(layer, values)
        return
    _check_memory(base, layer)
    write(layer, values)
    if layer.bias is None or base.bias is None:
        base.bias = layer.bias


def finite(values: Kept) -> bool:
    """Whether values hold neither NaN nor inf; 4-bit codes never do."""
    tensors = [tensor for tensor in (values.weight, values.bias) if tensor is not None and tensor.is_floating_point()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _written(base: Any) -> Any:
    """What has weight, bias and quant_state to write to: the base, or a layer of ours on the memory of a Linear4bit."""
    return QuantizedLinear.from_linear4bit(base) if is_linear4bit(base) else base


def _check_memory(base: Any, layer: QuantizedLinear) -> None:
    """from_linear4bit copies an absmax or offset in another dtype than fp32, and writing to a copy changes nothing."""
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


def _cast(total: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if total is None else total.to(dtype if bias is None else bias.dtype)


def _effective(dense: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor | None]:
    """W_eff and b_eff in the dtype of `dense`; each adapter changes the base, not what others made of it."""
    wide = None if bias is None else bias.to(dense.dtype)
    effective, total = dense, wide
    with without_autocast(dense.device.type):
        for i, adapter in enumerate(adapters):
            tensors = {name: tensor.detach().to(dense.device) for name, tensor in adapter.tensors().items()}
            changed = effective_weight(dense, tensors, adapter.config)
            shifted = effective_bias(dense, wide, tensors, adapter.config)
            if i == 0:
                effective, total = changed, shifted
                continue
            effective = effective + (changed - dense)
            if shifted is not None:
                change = shifted if wide is None else shifted - wide
                total = change if total is None else total + change
    return effective, total
