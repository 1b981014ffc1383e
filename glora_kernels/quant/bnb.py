"""Conversion from and to bitsandbytes' `Params4bit`, `QuantState` and `Linear4bit` without a copy; tested with 0.50.

Reading them does not import bitsandbytes; making them does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glora_kernels.modes import ordinary
from glora_kernels.quant.codes import QUANT_TYPES, codebook
from glora_kernels.quant.weight import NestedState, QuantizedWeight, QuantState
from glora_kernels.spec import check_choice

REPACKED = (
    "bitsandbytes has repacked it for inference on this CPU (quant_state.packing_format_for_cpu), which rounded its "
    "absmax to bfloat16 for good; load the model again and adapt it before its first forward in eval mode"
)
UNQUANTIZED = "it is not quantized yet; bitsandbytes does that when it is moved to a device: call .to(device) first"

_REPACKS, _HELD = "support_avx512bf16_for_cpu", None
"""The attribute that lets a `Linear4bit` repack its codes, and the value that `keep_codes` sets in place of True."""


def linear4bit_class(module: object) -> Any:
    """The bitsandbytes class `Linear4bit` that the module derives from, or None."""
    named = (kind for kind in type(module).__mro__ if kind.__name__ == "Linear4bit")
    return next((kind for kind in named if kind.__module__.split(".")[0] == "bitsandbytes"), None)


def is_linear4bit(module: object) -> bool:
    return linear4bit_class(module) is not None


def refusal(linear: Any) -> str | None:
    """The reason why the weight of a `Linear4bit` cannot be used, or None."""
    state = _state(linear)
    if state is None:
        return UNQUANTIZED
    return REPACKED if getattr(state, "packing_format_for_cpu", False) else None


def keep_codes(module: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking the codes of all `Linear4bit` layers in a module (which may be one itself).

    On a CPU with AVX512 bf16, the first forward in eval mode repacks them and rounds absmax for good, and repacked
    layers pass no gradient back. `free_codes` allows it again.
    """
    for part in module.modules():
        if getattr(part, _REPACKS, False) and is_linear4bit(part):
            setattr(part, _REPACKS, _HELD)


def free_codes(module: torch.nn.Module) -> None:
    """Undo `keep_codes`."""
    for part in module.modules():
        if getattr(part, _REPACKS, False) is _HELD and is_linear4bit(part):
            setattr(part, _REPACKS, True)


def from_linear4bit(linear: Any) -> QuantizedWeight:
    """The weight of a `Linear4bit`, on the same memory; a ValueError where it is not quantized, or was repacked."""
    if reason := refusal(linear):
        raise ValueError(f"this Linear4bit cannot be taken: {reason}")
    weight = from_state(linear.weight.data, _state(linear))
    if weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(
            f"the quant_state of this Linear4bit has shape {tuple(weight.shape)}, the layer "
            f"({linear.out_features}, {linear.in_features})"
        )
    return weight


def from_params4bit(parameter: Any) -> QuantizedWeight:
    """The weight of a `Params4bit`, on the same memory."""
    if getattr(parameter, "quant_state", None) is None:
        raise ValueError(f"this Params4bit cannot be taken: {UNQUANTIZED}")
    return from_state(parameter.data, parameter.quant_state)


@torch.inference_mode(False)  # the result may be kept and used in training
def from_state(packed: Tensor, state: Any) -> QuantizedWeight:
    """The weight made of packed codes and a bitsandbytes `QuantState`, on the same memory.

    Raises:
        ValueError: the state is of another type or shape, was repacked for CPU inference, or does not fit the codes.
        TypeError: a tensor of another dtype.
    """
    if not hasattr(state, "quant_type"):
        raise TypeError(f"state must be a bitsandbytes QuantState, got {type(state).__name__}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(f"this QuantState cannot be taken: {REPACKED}")
    check_choice("quant_type", state.quant_type, QUANT_TYPES)
    shape = tuple(state.shape or ())
    if len(shape) != 2:
        raise ValueError(f"a linear layer's QuantState has two sizes; got shape {shape}")
    packed = packed_bytes(packed)
    if state.code is not None and not torch.equal(state.code.cpu(), codebook(state.quant_type, torch.device("cpu"))):
        raise ValueError(f"the code of this QuantState is not that of {state.quant_type}")
    nested = None
    if state.nested:
        inner = state.state2
        offset = torch.as_tensor(state.offset, dtype=torch.float32, device=state.absmax.device)
        nested = NestedState(inner.absmax, inner.code, inner.blocksize, offset)
    absmax = state.absmax if nested is not None else state.absmax.float()
    if not bool(torch.isfinite(absmax if nested is None else nested.absmax).all()):
        raise ValueError("the absmax of this QuantState holds NaN or inf")
    taken = QuantState(absmax, state.quant_type, state.blocksize, (shape[0], shape[1]), state.dtype, nested)
    return QuantizedWeight(ordinary(packed), taken.map(ordinary))


def packed_bytes(packed: Tensor) -> Tensor:
    """Packed codes in any form that bitsandbytes stores them in, viewed as bytes."""
    packed = packed.detach().as_subclass(Tensor)
    if not packed.is_contiguous():
        # bitsandbytes passes the transpose, (1, P), around.
        packed = packed.t()
    return packed.view(torch.uint8)  # quant_storage: another dtype for the same bytes


def to_params4bit(weight: QuantizedWeight) -> Any:
    """A `Params4bit` on the same memory; bitsandbytes must be installed."""
    from bitsandbytes.functional import QuantState as BnbState
    from bitsandbytes.nn import Params4bit

    state, nested, device = weight.state, weight.state.nested, weight.device
    inner = None
    if nested is not None:
        inner = BnbState(absmax=nested.absmax, code=nested.code, blocksize=nested.blocksize, dtype=torch.float32)
    outer = BnbState(
        absmax=state.absmax, shape=torch.Size(state.shape), code=codebook(state.quant_type, device).clone(),
        blocksize=state.blocksize, quant_type=state.quant_type, dtype=state.dtype,
        offset=None if nested is None else nested.offset, state2=inner,
    )  # fmt: skip
    return Params4bit(
        weight.packed.detach().view(-1, 1), requires_grad=False, quant_state=outer, blocksize=state.blocksize,
        compress_statistics=nested is not None, quant_type=state.quant_type, bnb_quantized=True,
    )  # fmt: skip


def to_linear4bit(weight: QuantizedWeight, bias: Tensor | None, compute_dtype: torch.dtype | None) -> Any:
    """A `Linear4bit` on the same memory, frozen; bitsandbytes must be installed."""
    from bitsandbytes.nn import Linear4bit

    n, k = weight.shape
    linear: Any = Linear4bit(
        k, n, bias=bias is not None, compute_dtype=compute_dtype, compress_statistics=weight.state.nested is not None,
        quant_type=weight.state.quant_type, device="meta",
    )  # fmt: skip
    linear.weight = to_params4bit(weight)
    linear.weight.module = linear
    linear.quant_state = linear.weight.quant_state
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _state(linear: Any) -> Any:
    state = getattr(linear.weight, "quant_state", None)
    return state if state is not None else getattr(linear, "quant_state", None)
