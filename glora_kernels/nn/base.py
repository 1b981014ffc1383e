"""The layers that a GLoRA layer can replace: which modules are linear layers, their parts, reasons to refuse one."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from glora_kernels.nn.frozen import DTYPES, FrozenBase, QuantizedLinear, dtype_name
from glora_kernels.parallel.found import found_in, is_cut
from glora_kernels.quant import QuantState
from glora_kernels.quant.bnb import is_linear4bit, linear4bit_class, refusal
from glora_kernels.spec import GLoRAConfig

M = TypeVar("M", bound=nn.Module)
"""The class of a model: a function that changes a model in place returns the same class."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
HOOKS = (
    *_HOOKS,
    "_is_full_backward_hook",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
"""The attributes in which a module keeps its hooks on calls and their flags."""


FROZEN = "_glora_frozen"
"""A module's attribute with the names of its parameters that required a gradient before the model was adapted."""


class Base(NamedTuple):
    """The parts of a layer. weight: as stored: (N, K), (K, N) where transposed, or packed. shape: (N, K).

    Of a convolution: (N, channels, *kernel), and shape: (N, channels).
    """

    weight: Tensor
    bias: nn.Parameter | None
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool = False
    quant_state: QuantState | None = None
    compute_dtype: torch.dtype | None = None
    kernel: tuple[int, ...] = ()


def base_of(linear: nn.Module) -> Base:
    """The parts of a linear layer or convolution for which `unsupported` returns None."""
    bias = linear._parameters.get("bias")
    if is_linear4bit(linear):
        linear = QuantizedLinear.from_linear4bit(linear)
    if isinstance(linear, FrozenBase):
        shape = linear.out_features, linear.in_features
        return Base(
            linear.weight, bias, shape, linear.base_dtype, linear._transposed, linear.quant_state, linear.compute_dtype,
            linear.kernel,
        )  # fmt: skip
    stored, transposed = linear._parameters["weight"], conv1d_class(linear) is not None
    if stored is None:
        raise ValueError("a linear layer without a weight cannot be adapted")
    n, k, *kernel = stored.shape[::-1] if transposed else stored.shape
    return Base(stored, bias, (n, k), stored.dtype, transposed, kernel=tuple(kernel))


def is_linear(module: object) -> bool:
    """Whether the module is a `Linear4bit`, `QuantizedLinear`, `nn.Linear`, transformers `Conv1D` or a subclass."""
    return plain_class(module) is not None


def plain_class(module: object) -> Any:
    """The base class of a linear layer: `Linear4bit`, `QuantizedLinear`, `nn.Linear` or `Conv1D`; None for others."""
    if is_linear4bit(module):
        return linear4bit_class(module)
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return nn.Linear if isinstance(module, nn.Linear) else QuantizedLinear
    return conv1d_class(module)


def convolution_class(module: object) -> Any:
    """The base class of a convolution, `nn.Conv1d` to `nn.Conv3d`; None for others, transposed ones too."""
    return next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)), None)


def computes_as(linear: nn.Module, plain: Any) -> bool:
    """Whether the class of a layer inherits the forward of its `plain_class`, or reimplements that of `nn.Linear`."""
    kind: Any = type(linear)
    inner = "_conv_forward"
    if kind.forward is plain.forward:
        return getattr(kind, inner, None) is getattr(plain, inner, None) and inner not in vars(linear)
    return plain is nn.Linear and _reimplements_linear(linear)


def unsupported(linear: nn.Module) -> str | None:
    """The reason why a linear layer or a convolution cannot be replaced by a GLoRA layer; None where it can."""
    plain, is_quantized = plain_class(linear) or convolution_class(linear), isinstance(linear, QuantizedLinear)
    four_bits = is_quantized or is_linear4bit(linear)
    if isinstance(linear, nn.modules.lazy.LazyModuleMixin):
        return "its sizes are not known yet; run the model once first"
    if hasattr(linear, "parametrizations"):
        return "it is parametrized; use torch.nn.utils.parametrize.remove_parametrizations first"
    if is_cut(linear):
        return found if isinstance(found := found_in(linear), str) else None
    if "forward" in vars(linear) and "_diffusers_hook" in vars(linear):
        return (
            "a hook of diffusers (layerwise casting, offloading) has replaced its forward; adapt the model before that"
        )
    if "forward" in vars(linear) or not computes_as(linear, plain):
        return f"its forward is not that of {plain.__name__}, and would be lost"
    if (groups := getattr(linear, "groups", 1)) != 1 and convolution_class(linear) is not None:
        return f"it is a grouped convolution (groups={groups}); accepted are convolutions with groups=1"
    if any(getattr(linear, hooks) for hooks in _HOOKS):
        return "it has forward or backward hooks, which would be lost; remove them and register them afterwards"
    extra = [*(set(linear._parameters) - {"weight", "bias"}), *linear._buffers, *linear._modules]
    if extra:
        return f"it holds more than a weight and a bias: {sorted(extra)}"
    weight: Any = linear.weight if is_quantized else linear._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own"
    if is_linear4bit(linear) and (reason := refusal(linear)):
        return reason
    for name, tensor in linear._parameters.items():
        if tensor is None or (four_bits and name == "weight"):
            continue
        if type(tensor.data) not in (Tensor, FakeTensor):
            return f"its {name} is a {type(tensor.data).__name__}, not a plain tensor"
    if not four_bits and weight.dtype not in DTYPES:
        return f"its weight is {dtype_name(weight.dtype)}; accepted: {', '.join(map(dtype_name, DTYPES))}"
    return None


_PROBE = (3, 5)
"""N and K of the small layer that `_reimplements_linear` tries a forward on."""


def _reimplements_linear(linear: nn.Module) -> bool:
    """Whether a subclass of `nn.Linear` has a forward of its own that computes the same (transformers' `FalconLinear`).

    The forward is tried on a small random weight, in training and in eval mode: y and the gradients must equal those of
    `nn.Linear`. A layer with further public attributes is refused, since the forward may read them.
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
        for x in (rows[0], rows, rows.view(2, 2, k), 1e6 * rows):  # large values too: some forwards clamp
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
    """A copy of the module without its tensors: same class, same other attributes."""
    made = copy.copy(linear)
    kept = {name: value for name, value in vars(linear).items() if not isinstance(value, (Tensor, QuantState))}
    made.__dict__ = kept | {"_parameters": dict.fromkeys(linear._parameters)}
    return made


def check_config(config: object) -> None:
    if not isinstance(config, GLoRAConfig):
        raise TypeError(f"config must be a GLoRAConfig, got {type(config).__name__}")


def conv1d_class(module: object) -> type | None:
    """The Conv1D of transformers that the module derives from, found by name: importing transformers takes seconds."""
    for kind in type(module).__mro__:
        if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            return kind
    return None
