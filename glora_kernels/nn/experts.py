"""The products of an experts module as layers, and the experts module that calls them.

An experts module of transformers holds the weights of its products as parameters (`gate_up_proj`, `down_proj`).
`install` puts a layer in the place of one, and the module gets a subclass of its class whose forward calls the layers;
`give_back` makes the layer's weight a parameter again. The module stays the same object, with its hooks, and loads
states with the names of parameters as before.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glora_kernels.dispatch.common import Weight
from glora_kernels.experts.groups import Groups
from glora_kernels.experts.op import expert_rows
from glora_kernels.modes import ordinary
from glora_kernels.nn import mixture
from glora_kernels.nn.adapted import Operands, adapted_linear
from glora_kernels.nn.frozen import FrozenBase, describe
from glora_kernels.quant import QuantizedWeight

_ORDER = "_glora_order"
"""The attribute of an experts module with layers: the names of its parameters, in their order before."""
_CONVERSIONS = "_weight_conversions"
"""The attribute by which `save_pretrained` of transformers renames and splits weights into their original format."""
_BEFORE = "_glora_conversions"
"""Set on a model whose experts have layers: its conversions before, in a tuple that is empty where it had none."""


class ExpertLinear(FrozenBase):
    """y[i] = x[token(i)] W_eᵀ + b_e, e the expert of row i: one product of an experts module, without an adapter.

    Args:
        weight: W (E, N, K); (E, K, N) where transposed; or in 4 bits (E·N, K). A Parameter stays the same object.
        bias: (E, N), or None.
        experts: E.
        transposed: whether a dense weight is stored as (E, K, N).
        compute_dtype: with 4 bits, the dtype that x is cast to; y is cast back. None: x stays as it is.
    """

    def __init__(
        self, weight: Weight, bias: Tensor | None, experts: int, transposed: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.experts, self._transposed, self.compute_dtype = experts, transposed, compute_dtype
        self.quant_state = None
        if isinstance(weight, QuantizedWeight):
            n, k = weight.shape[0] // experts, weight.shape[1]
            self.hold(weight)
        else:
            n, k = weight.shape[1:][::-1] if transposed else weight.shape[1:]
            self.weight = _parameter(weight)
        self.out_features, self.in_features = n, k
        self.bias = None if bias is None else _parameter(bias)

    @classmethod
    def of(cls, module: Any, name: str) -> ExpertLinear:
        """The layer of a product of an experts module, on its parameters."""
        weight = module._parameters[name]
        bias = module._parameters[mixture.bias_of(name)] if module.has_bias else None
        return cls(weight, bias, len(weight), module.is_transposed).train(module.training)

    def forward(self, x: Tensor, groups: Groups, of_tokens: bool) -> Tensor:
        """The sorted rows of y (M, N), from the tokens x (T, K) or from sorted rows (M, K)."""
        return adapted_linear(x, self.frozen(), Operands(), linear=over(groups, of_tokens))

    def extra_repr(self) -> str:
        parts = [f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"]
        parts.append(f"bias={self.bias is not None}")
        return ", ".join(parts if self.quant_state is None else [*parts, describe(self.quant_state)])


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    with torch.inference_mode(False):
        return nn.Parameter(ordinary(tensor.detach()), requires_grad=False)


def over(groups: Groups, of_tokens: bool) -> Any:
    """`expert_rows` over these groups, with the signature of `glora_linear`."""

    def linear(x: Tensor, weight: Weight, bias: Tensor | None, **adapters: Any) -> Tensor:
        return expert_rows(x, weight, bias, adapters, groups, of_tokens)

    return linear


class WithLayers:
    """A mixin for the class of an experts module of which products are layers."""

    plain: ClassVar[Any]
    """The class of the module before."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, /) -> Tensor:
        """y (T, K) of the tokens x (T, K), their experts (T, k) and the weights of these (T, k).

        Raises:
            The errors of the layers and of `expert_rows`.
        """
        return mixture.compute(self, count_of(self), x, index, weights, self._product)

    def _product(self, name: str, x: Tensor, groups: Groups, of_tokens: bool) -> Tensor:
        own: Any = self
        if name in own._modules:
            return own._modules[name](x, groups, of_tokens)
        bias = own._parameters[mixture.bias_of(name)] if own.has_bias else None
        weight = own._parameters[name]
        return expert_rows(x, weight.mT if own.is_transposed else weight, bias, None, groups, of_tokens)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        own: Any = self
        for name in layers_of(own):  # as they are named in a state without layers
            for given, here in ((name, "weight"), (mixture.bias_of(name), "bias")):
                if prefix + given in state_dict:
                    state_dict[f"{prefix}{name}.{here}"] = state_dict.pop(prefix + given)
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self.plain,), vars(self).copy()


def _empty(plain: Any) -> Any:
    kind = with_layers(plain)
    return kind.__new__(kind)


def with_layers(plain: Any) -> Any:
    """The subclass of a class of experts modules whose forward calls layers."""
    if plain not in _KINDS:
        attributes = {"plain": plain, "__module__": plain.__module__}
        _KINDS[plain] = type(f"GLoRA{plain.__name__}", (WithLayers, plain), attributes)
    return _KINDS[plain]


_KINDS: dict[Any, Any] = {}


def layers_of(module: nn.Module) -> dict[str, FrozenBase]:
    """The layers of an experts module that are in place of its parameters, by name."""
    names = (mixture.up_of(module), mixture.DOWN)
    return {name: own for name in names if isinstance(own := module._modules.get(name), FrozenBase)}


def count_of(module: Any) -> int:
    """E of an experts module with layers."""
    return next(iter(layers_of(module).values())).experts


def refusal(module: Any) -> str | None:
    """`mixture.refusal` of an experts module that may have layers already."""
    if isinstance(module, WithLayers):
        return "its forward was replaced, and would be lost" if "forward" in vars(module) else None
    return mixture.refusal(module)


def install(module: Any, name: str, layer: nn.Module, undo: ExitStack) -> None:
    """Put a layer in the place of a product of an experts module; `undo` gets a callback that reverts it."""
    _undone(module, undo)
    if not isinstance(module, WithLayers):
        vars(module)[_ORDER] = tuple(module._parameters)
        module.__class__ = with_layers(type(module))
    for own in (name, mixture.bias_of(name)):
        module._parameters.pop(own, None)
    module._modules[name] = layer


def give_back(module: Any, name: str, plain: ExpertLinear, undo: ExitStack) -> None:
    """Make the weight and bias of a dense product parameters of its experts module again, the reverse of `install`."""
    _undone(module, undo)
    del module._modules[name]
    held = {**module._parameters, name: plain.weight}
    if plain.bias is not None:
        held[mixture.bias_of(name)] = plain.bias
    order: tuple[str, ...] = vars(module)[_ORDER]
    names = [*(own for own in order if own in held), *(own for own in held if own not in order)]
    module._parameters.clear()
    module._parameters.update({own: held[own] for own in names})
    if not layers_of(module):
        del vars(module)[_ORDER]
        module.__class__ = type(module).plain


def keep_names(root: nn.Module) -> None:
    """Let `save_pretrained` of transformers write experts with layers as they are, and others as before.

    It takes every name that begins with that of an expert parameter for this parameter, and would tear a layer into the
    experts of the original format, its adapter with it. To be called after experts modules have got or lost layers.
    """
    for model in root.modules():
        if not hasattr(model, "save_pretrained"):
            continue
        own = vars(model)
        has_layers = any(isinstance(inner, WithLayers) for inner in model.modules())
        if has_layers and _BEFORE not in own:
            own[_BEFORE] = (own[_CONVERSIONS],) if _CONVERSIONS in own else ()
            own[_CONVERSIONS] = []
        elif not has_layers and _BEFORE in own:
            del own[_CONVERSIONS]
            own.update(zip((_CONVERSIONS,), own.pop(_BEFORE), strict=False))


def _undone(module: Any, undo: ExitStack) -> None:
    """Register a callback that gives the module its present class, parameters and layers again."""
    order = vars(module).get(_ORDER)
    undo.callback(_restore, module, type(module), order, dict(module._parameters), dict(module._modules))


def _restore(module: Any, kind: type, order: Any, parameters: dict[str, Any], modules: dict[str, Any]) -> None:
    module.__class__ = kind
    if order is None:
        vars(module).pop(_ORDER, None)
    else:
        vars(module)[_ORDER] = order
    for held, before in ((module._parameters, parameters), (module._modules, modules)):
        held.clear()
        held.update(before)
