"""What a GLoRA layer can stand in for: which modules are linear layers, what makes one unfit, what it is made of."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from glora_kernels.nn.frozen import DTYPES, QuantizedLinear, dtype_name
from glora_kernels.quant import QuantState
from glora_kernels.quant.bnb import is_linear4bit, linear4bit_class, refusal
from glora_kernels.spec import GLoRAConfig

M = TypeVar("M", bound=nn.Module)
"""A user's own class, which what changes a model in place returns."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


HOOKS = (
    *_HOOKS,
    "_is_full_backward_hook",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
"""Where a module keeps its hooks on calls, and what it knows about them."""


class Base(NamedTuple):
    """What a linear layer is made of: `weight` as stored, of shape (N, K), (K, N) where transposed, or packed."""

    weight: Tensor
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
    if "forward" in vars(linear) or not (
        kind.forward is plain.forward or (plain is nn.Linear and is_linear_anew(linear))
    ):
        return f"its forward is not that of {plain.__name__}, and would be lost"
    if any(getattr(linear, hooks) for hooks in _HOOKS):
        return "it has forward or backward hooks, which would be lost; remove them and register them afterwards"
    extra = [*(set(linear._parameters) - {"weight", "bias"}), *linear._buffers, *linear._modules]
    if extra:
        return f"it holds more than a weight and a bias: {sorted(extra)}"
    weight: Any = linear.weight if isinstance(linear, QuantizedLinear) else linear._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own"
    if is_linear4bit(linear) and (reason := refusal(linear)):
        return reason
    for name, tensor in linear._parameters.items():
        if (
            tensor is not None
            and type(tensor.data) not in (Tensor, FakeTensor)
            and not (four_bits and name == "weight")
        ):
            return f"its {name} is a {type(tensor.data).__name__}, not a plain tensor"
    if not four_bits and weight.dtype not in DTYPES:
        return f"its weight is {dtype_name(weight.dtype)}; accepted: {', '.join(map(dtype_name, DTYPES))}"
    return None


_PROBE = (3, 5)
"""N and K of the layer on which a forward is tried."""


def is_linear_anew(linear: nn.Module) -> bool:
    """Whether a class derived from `nn.Linear` writes the same mathematics anew, as transformers' `FalconLinear` does.

    Its forward is tried on a layer of few and random weights, in training and in eval mode: y and the gradients must be
    those of `nn.Linear`. Public attributes of its own, which the forward may read, make it another layer.
    """
    if not isinstance(linear, nn.Linear) or any(name[0] != "_" and name not in _OWN for name in vars(linear)):
        return False
    probe, (n, k), rng = copy.copy(linear), _PROBE, torch.get_rng_state()
    probe.out_features, probe.in_features = n, k
    with torch.inference_mode(False), torch.enable_grad():
        drawn = torch.randn(9, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
        weight, rows = drawn[:n].requires_grad_(), drawn[n : n + 4]
        bias = None if linear._parameters.get("bias") is None else drawn[-1, :n].detach().requires_grad_()
        probe.__dict__ |= {"weight": weight, "bias": bias, "_parameters": {}}
        for x in (rows[0], rows, rows.view(2, 2, k), 1e6 * rows):  # large ones, that some clamp
            for probe.training in (True, False):
                leaves = [tensor for tensor in (x.detach().requires_grad_(), weight, bias) if tensor is not None]
                expected = nn.functional.linear(leaves[0], weight, bias)
                try:
                    y = type(linear).forward(probe, leaves[0])
                    gradients = torch.autograd.grad(y, leaves, expected.detach())
                except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
                    return False
                finally:
                    torch.set_rng_state(rng)
                wanted = torch.autograd.grad(expected, leaves, expected.detach())
                for got, right in zip((y, *gradients), (expected, *wanted), strict=True):
                    if (got.shape, got.dtype) != (right.shape, right.dtype) or not torch.allclose(
                        got, right, 1e-9, 1e-9
                    ):
                        return False
    return True


_OWN = vars(nn.Linear(1, 1, device="meta"))


def shell(linear: nn.Module) -> nn.Module:
    """The module without its tensors: of its class, with its attributes."""
    made = copy.copy(linear)
    kept = {name: value for name, value in vars(linear).items() if not isinstance(value, (Tensor, QuantState))}
    made.__dict__ = kept | {"_parameters": dict.fromkeys(linear._parameters)}
    return made


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
