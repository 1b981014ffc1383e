"""What a GLoRA layer can stand in for: which modules are linear layers, what makes one unfit, what it is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.nn.frozen import DTYPES, QuantizedLinear, dtype_name
from glora_kernels.quant import QuantState
from glora_kernels.quant.bnb import is_linear4bit, linear4bit_class, refusal
from glora_kernels.spec import GLoRAConfig

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Base(NamedTuple):
    """What a linear layer is made of: `weight` as stored, of shape (N, K), (K, N) where transposed, or packed."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool = False
    quant_state: QuantState | None = None
    compute_dtype: torch.dtype | None = None


def base_of(linear: nn.Module) -> Base | None:
    """The parts of a linear layer that `unsupported` has nothing against; None where its weight is missing."""
    bias = linear._parameters.get("bias")
    if isinstance(linear, QuantizedLinear) or is_linear4bit(linear):
        quantized = linear if isinstance(linear, QuantizedLinear) else QuantizedLinear.from_linear4bit(linear)
        state = quantized.quant_state
        assert state is not None
        dtype = quantized.base_dtype
        return Base(quantized.weight, bias, state.shape, dtype, False, state, quantized.compute_dtype)
    weight, transposed = linear._parameters["weight"], is_conv1d(linear)
    if weight is None:
        return None
    n, k = weight.shape[::-1] if transposed else weight.shape
    return Base(weight, bias, (n, k), weight.dtype, transposed)


def is_linear(module: object) -> bool:
    """Whether the module is an `nn.Linear`, a transformers `Conv1D`, derived from one, or a `QuantizedLinear`."""
    return isinstance(module, (nn.Linear, QuantizedLinear)) or is_conv1d(module)


def unsupported(linear: nn.Module) -> str | None:
    """Why a linear layer cannot be replaced by a GLoRALinear, or None where it can."""
    kind: Any = type(linear)
    plain: Any = conv1d_class(linear) or nn.Linear
    if four_bits := is_linear4bit(linear):
        plain = linear4bit_class(linear)
    elif isinstance(linear, QuantizedLinear):
        plain, four_bits = QuantizedLinear, True
    if isinstance(linear, nn.modules.lazy.LazyModuleMixin):
        return "its sizes are not known yet; run the model once first"
    if hasattr(linear, "parametrizations"):
        return "it is parametrized; use torch.nn.utils.parametrize.remove_parametrizations first"
    if kind.forward is not plain.forward or "forward" in vars(linear):
        return f"its forward is not that of {plain.__name__}, and would be lost"
    if any(getattr(linear, hooks) for hooks in _HOOKS):
        return "it has forward or backward hooks, which would be lost; remove them and register them afterwards"
    extra = [*(set(linear._parameters) - {"weight", "bias"}), *linear._buffers, *linear._modules]
    if extra:
        return f"it holds more than a weight and a bias: {sorted(extra)}"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own"
    if is_linear4bit(linear) and (reason := refusal(linear)):
        return reason
    for name, tensor in linear._parameters.items():
        if tensor is not None and type(tensor.data) is not Tensor and not (four_bits and name == "weight"):
            return f"its {name} is a {type(tensor.data).__name__}, not a plain tensor"
    if not four_bits and weight.dtype not in DTYPES:
        return f"its weight is {dtype_name(weight.dtype)}; accepted: {', '.join(map(dtype_name, DTYPES))}"
    return None


def check_config(config: object) -> None:
    if not isinstance(config, GLoRAConfig):
        raise TypeError(f"config must be a GLoRAConfig, got {type(config).__name__}")


def is_conv1d(module: object) -> bool:
    return conv1d_class(module) is not None


def conv1d_class(module: object) -> type | None:
    """The Conv1D of transformers in the module's ancestry, by name: importing transformers takes seconds."""
    for kind in type(module).__mro__:
        if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            return kind
    return None
