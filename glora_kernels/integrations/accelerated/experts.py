"""PEFT's LoRA over the parameters of experts (`target_parameters`), without a dense ΔW.

PEFT wraps an experts module of transformers in a `ParamWrapper` for each adapted parameter, one inside the other, and
adds s·U_e·D_e to every expert's weight in each call. Here the outermost wrapper computes the module itself, by groups
of rows (`nn.mixture`). Adapters, names and
files stay PEFT's:

    lora_A.weight (E·R, K) → D (E, R, K)          lora_B.weight (N, R·E) → U (E, N, R)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from glora_kernels.dispatch.common import autocast_dtype
from glora_kernels.dispatch.ways import is_transformed
from glora_kernels.experts.groups import Groups
from glora_kernels.experts.op import expert_rows
from glora_kernels.integrations.bases import HOOKED, IDLE, ON_META, PLAIN, SHARDED, SUBCLASS, TRANSFORMED, is_plain
from glora_kernels.nn.adapted import Frozen
from glora_kernels.nn.mixed import TakesRows
from glora_kernels.nn.mixture import DOWN, LAYOUT, PARALLEL, bias_of, compute, has_interface, up_of

OTHER_FORWARD = "experts whose forward, or whose registered implementation, is not transformers' own"
ONE = "one expert, which PEFT computes as a linear layer"
FOREIGN = "a parameter of the experts is computed by somebody's parametrization"
WITHIN = "the wrapper around it runs PEFT's forward"
TRAINED = "the experts' own weights are trained"
OTHER_PARAMETER = "a parameter of the experts that is no weight of a product"
ARGUMENTS = "it is called with other than tokens, and a weight for each of their experts"
DTYPES = "tokens, weights and autocast have different dtypes"


class Experts(TakesRows, ParamWrapper):
    """`peft.tuners.lora.ParamWrapper` around an experts module."""

    plain: ClassVar[Any] = ParamWrapper
    _glora_fallbacks: dict[str, int]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (rows := self._rows) is not None and not self.disable_adapters:
            rows.linear(self, x, Frozen(x, None))  # raises: see `refusal_of_rows`
        reason = self.standing_refusal() or _refusal_of_call(self.get_base_layer(), x, args, kwargs)
        if reason is None:
            return self._experts(x, *args, **kwargs)
        if reason != WITHIN and not torch.compiler.is_compiling():
            self._glora_fallbacks[reason] = self._glora_fallbacks.get(reason, 0) + 1
        return ParamWrapper.forward(self, x, *args, **kwargs)

    def standing_refusal(self) -> str | None:
        """The reason why PEFT's forward runs whatever the call, or None."""
        base: Any = self.get_base_layer()
        wrappers = self._wrappers()
        if not has_interface(base):
            return LAYOUT
        if not _is_of_transformers(type(base), base.config._experts_implementation):
            return OTHER_FORWARD
        if base._is_expert_parallel:
            return PARALLEL
        if is_parametrized(base):
            return WITHIN if _is_of_peft(base) else FOREIGN
        if not all(map(is_plain, (base, *list(wrappers.values())[1:]))):
            return HOOKED
        up = up_of(base)
        if not wrappers.keys() <= {up, DOWN}:
            return OTHER_PARAMETER
        weights: list[Any] = [getattr(base, up, None), getattr(base, DOWN, None)]
        if not all(isinstance(weight, Tensor) and weight.ndim == 3 for weight in weights):
            return LAYOUT
        if any(type(weight) not in PLAIN for weight in weights):
            return SHARDED
        if self.num_experts == 1:
            return ONE
        if any(weight.requires_grad for weight in weights):
            return TRAINED
        if any(weight.is_meta for weight in weights):
            return ON_META
        if any(wrapper.disable_adapters or wrapper.merged for wrapper in wrappers.values()):
            return IDLE
        return None

    def _wrappers(self) -> dict[str, Any]:
        """The wrappers around the experts module by the parameter that they adapt, this one first."""
        found: dict[str, Any] = {}
        wrapper: Any = self
        while isinstance(wrapper, ParamWrapper):
            found[wrapper.parameter_name] = wrapper
            wrapper = wrapper.base_layer
        return found

    def _experts(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        wrappers = self._wrappers()

        def product(name: str, x: Tensor, groups: Groups, of_tokens: bool) -> Tensor:
            return _linear(base, name, wrappers.get(name), x, groups, of_tokens)

        return compute(base, self.num_experts, x, index, weights, product)

    @property
    def kept(self) -> dict[str, Any]:
        return {}

    def adapter_names(self) -> Mapping[str, int]:
        return dict.fromkeys(self.lora_A, 0)

    def operands(self, name: str) -> str | None:
        return self.refusal_of_rows() if name in self.lora_A else None

    def refusal_of_rows(self) -> str:
        return "it is an experts module, whose adapters cannot differ by row"

    def accelerated(self) -> None:
        """Set up the layer after its class was changed to this one."""
        self._glora_fallbacks = {}

    def decelerated(self) -> None:
        """Clean up the layer before its class is changed back."""
        del self._glora_fallbacks

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "_glora_fallbacks": {}}  # a copy was not called yet, and is outside of `gk.rows`
        state.pop("_rows", None)
        return state


@torch.compiler.assume_constant_result
def _is_of_transformers(kind: type, implementation: str | None) -> bool:
    """Whether a call of an experts module of this class runs code of transformers: not a forward of a subclass or one
    put in its place, nor an implementation that somebody registered.
    """
    forward: Any = kind.forward  # type: ignore[attr-defined]
    scope = getattr(forward, "__globals__", {})  # of the decorator, where it made this forward
    if scope.get("__name__") != "transformers.integrations.moe":
        return False
    runs = scope["ALL_EXPERTS_FUNCTIONS"].get(implementation, forward.__wrapped__)
    return str(runs.__module__).startswith("transformers.")


def _is_of_peft(base: Any) -> bool:
    """Whether all parametrizations are those by which PEFT's forward of a wrapper adds its ΔW."""
    found = [own for chain in base.parametrizations.values() for own in chain]
    return all(type(own).__module__.startswith("peft.") for own in found)


def _refusal_of_call(base: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The reason why PEFT's forward runs in this call, or None."""
    if len(args) != 2 or kwargs or x.ndim != 2 or args[0].shape != args[1].shape:
        return ARGUMENTS
    if type(x) not in PLAIN:
        return SUBCLASS
    if is_transformed():
        return TRANSFORMED
    if x.dtype != base.down_proj.dtype or autocast_dtype(x) not in (None, x.dtype):
        return DTYPES
    return None


def _linear(base: Any, name: str, wrapper: Any, x: Tensor, groups: Groups, of_tokens: bool) -> Tensor:
    """One product of the experts with the active adapters of its wrapper."""
    weight: Tensor = getattr(base, name)
    weight = weight.transpose(1, 2) if base.is_transposed else weight
    active = [] if wrapper is None else [own for own in wrapper.active_adapters if own in wrapper.lora_A]
    pairs = [_factors(wrapper, own, weight.dtype) for own in active]
    scales = [wrapper.scaling[own] for own in active]
    adapters: dict[str, Any] = {}
    if len(pairs) == 1 and not isinstance(scales[0], Tensor):  # hot swapping makes it one
        adapters = {"b_up": pairs[0][0], "b_down": pairs[0][1], "scale": scales[0]}
    elif pairs:
        up = torch.cat([up * own for (up, _), own in zip(pairs, scales, strict=True)], 2)
        adapters = {"b_up": up, "b_down": torch.cat([down for _, down in pairs], 1)}
    bias = getattr(base, bias_of(name)) if base.has_bias else None
    return expert_rows(x, weight, bias, adapters, groups, of_tokens)


def _factors(wrapper: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U (E, N, R) and D (E, R, K) of an adapter, in the dtype of the weights, as PEFT casts them."""
    a, b, experts = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts
    down = a.reshape(experts, -1, a.shape[1])
    up = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return up.to(dtype).contiguous(), down.to(dtype)
