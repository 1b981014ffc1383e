"""The operators called from a layer of PEFT, which keeps its base as a module (`base_layer`).

    y = x (W + Σᵢ (W∘Aᵢ + sᵢ·Bᵢ))ᵀ + b + Σᵢ (b∘Dᵢ + Eᵢ + W·Cᵢ)        over the active adapters i

`frozen_base` reads the base, `total` sums several adapters, `peft_linear` makes the call. Where the operators cannot
take something, functions return a string: the reason, for a summary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.dispatch.ways import is_plain as is_strided
from glora_kernels.dispatch.ways import is_transformed
from glora_kernels.nn.adapted import Frozen, Operands, adapted_linear, rows_of_examples, weighted_sum
from glora_kernels.nn.base import computes_as, convolution_class, plain_class
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.mixed import TakesRows
from glora_kernels.nn.warmup import Form, form_of
from glora_kernels.ops import glora_wc
from glora_kernels.quant.bnb import REPACKED, from_linear4bit, is_linear4bit, keep_codes, refusal
from glora_kernels.runtime.configs import MAX_RANK
from glora_kernels.runtime.planning import is_planning

IDLE = "no active adapter, merged or disabled: the base alone"
HOOKED = "a module inside it has hooks, or a forward of its own (offloading to a CPU or disk is one)"
NESTED = "its base is another adapter"
PARAMETRIZED = "its base is parametrized"
SHARDED = "the weight of its base is no plain tensor (a part of a sharded one)"
SHARDED_ADAPTER = "a parameter of its adapter is no plain tensor (a part of a sharded one)"
TENSOR_PARALLEL = "its base is tensor-parallel"
ON_META = "its weights are on the meta device"
TRAINED_BASE = "the weight of its base is trained"
MIXED_DTYPES = "x is not in the dtype of its base"
MISFIT = "x is of another size or device than its base"
SUBCLASS = "x is no plain tensor"
LAYOUT = "x is a nested or a sparse tensor"
TRANSFORMED = "inside torch.func, forward-mode differentiation or torch.jit.trace"
TWO_FORMS = "its active adapters have one support in two forms"
SEVERAL_DROPOUTS = "several active adapters with dropout: each drops elements of its own"
NARROW = "x and the adapter are wider than the dtype that its 4-bit base computes in, and autocast is off"
RANK = f"a rank above {MAX_RANK}, which the GPU kernels do not hold"

PLAIN = (nn.Parameter, Tensor)
"""The types of ordinary tensors; a part of a sharded one has another type."""
IN_A_TRAINED_UNIT = "in_a_trained_unit"
"""Key: FSDP1 has flattened the base together with trained parameters, so its weight is a view that requires a gradient
only because they do."""
_PARALLEL = ("_hf_tp_plan", "_hf_device_mesh")
"""Attributes that PEFT, or transformers, sets on a tensor-parallel module."""
Mixed = tuple[Frozen, list[Operands], Tensor, dict[str, Any]]
"""The arguments of `mixed_linear` after x."""
_CASTING = ("layerwise_casting", "peft_autocast_disable")
"""The names of diffusers' hooks for layerwise casting: on a linear layer, and on a layer of PEFT around it."""
_Layer: Any = object  # typed Any, because subclasses also derive from a class of PEFT and use its attributes


class OverBase(TakesRows, _Layer):
    """A mixin for layers of PEFT whose base our operators take; it comes before PEFT's class in the MRO."""

    cast_input_dtype_enabled = True  # diffusers' layerwise casting asks every layer of PEFT for it, and sets it
    _glora_kept: dict[str, Any]  # the cache of `frozen_base` and of `mixed_linear`

    @property
    def kept(self) -> dict[str, Any]:
        return self._glora_kept

    def parts(self, x: Tensor | None = None) -> tuple[Frozen, Operands] | str:
        """The base and the sum of the active adapters for a call with x, or the reason why there is no such call."""
        return IDLE if self._disable_adapters or self.merged_adapters else self.active_parts(x)

    def active_parts(self, x: Tensor | None = None) -> tuple[Frozen, Operands] | str:
        """`parts` as if no adapter were disabled or merged."""
        adapters = self._operands_of(self.active_adapters)
        if isinstance(adapters, str):
            return adapters
        if not adapters:
            return IDLE
        base = self.frozen(x)
        if isinstance(base, str):
            return base
        operands = total([operands for _, operands in adapters])
        return operands if isinstance(operands, str) else (base, operands)

    def mixed_parts(self, x: Tensor, names: Sequence[str]) -> Mixed | str:
        """The arguments of `mixed_linear` after x for a call whose examples have the adapters `names`.

        Or the reason why there is no such call. A name that the layer does not have means the base alone.
        """
        found = self._operands_of(sorted(set(names)))  # numbered alike in whatever order a batch has them
        if isinstance(found, str):
            return found
        base, adapters = self.frozen(x), [operands for _, operands in found]
        if isinstance(base, str):
            return base
        if reason := self.refusal_of_call(x, base, adapters):
            return reason
        places = {name: place for place, (name, _) in enumerate(found)}
        return base, adapters, rows_of_examples(tuple(places.get(name, -1) for name in names), x), self._glora_kept

    def adapter_names(self) -> dict[str, int]:
        held = (name for part in self.adapter_layer_names for name in getattr(self, part, ()))
        return dict.fromkeys(held, 0)

    def refusal_of_rows(self) -> str | None:
        return "it is merged; call unmerge_adapter() first" if self.merged_adapters else None

    def refusal_of_call(self, x: Tensor, base: Frozen, adapters: Sequence[Operands]) -> str | None:
        for operands in adapters or [Operands()]:
            if reason := refusal_of_x(x, base, operands) or (NARROW if is_wider(x, base, operands) else None):
                return reason
        return None

    def rowed(self, x: Tensor, rows: Any, *others: object) -> Tensor:
        """y of an x whose rows have the adapters that `gk.rows` tells. others: what else the layer is called with.

        Raises:
            RuntimeError: the operators do not take this call; the message says why.
        """
        if any(other is not None for other in others):
            raise RuntimeError(rows.refused(self, "it is called with more than x (adapter_names, say)"))
        base = self.frozen(x)
        if isinstance(base, str):
            raise RuntimeError(rows.refused(self, base))
        return rows.linear(self, x, base)

    def _operands_of(self, names: Iterable[str]) -> list[tuple[str, Operands]] | str:
        """Those of these adapters that the layer has, or the reason why the operators do not take one of them."""
        found = []
        for name in names:
            operands = self.operands(name)
            if isinstance(operands, str):
                return operands
            if operands is not None:
                found.append((name, operands))
        return found

    def operands(self, name: str) -> Operands | str | None:
        """The adapter of this name, or the reason why the operators do not take it; None if the layer has none."""
        raise NotImplementedError

    def frozen(self, x: Tensor | None = None) -> Frozen | str:
        """The base for a call with x, or the reason why the operators do not take it."""
        return frozen_base(self.base_layer, self._glora_kept, x)

    def warmup_form(self) -> Form | None:
        """The layer in the form that `warmup` takes; None where it is not one call of the operators."""
        found = self.parts()
        if isinstance(found, str):
            return None
        base, operands = found
        (n, k), names = base.weight.shape, [name for name, tensor in operands.tensors.items() if tensor is not None]
        names = names if base.bias is None else ["bias", *names]
        return form_of(self, base, operands, f"{type(self).__name__}, {k} to {n}: {', '.join(names)}")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._glora_kept = read_base(self.base_layer)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._glora_kept = read_base(self.base_layer)

    def __getstate__(self) -> dict[str, Any]:
        state = {**vars(self), "_glora_kept": {}}  # a copy has a base of its own, and is outside of `gk.rows`
        state.pop("_rows", None)
        return state


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module only runs the forward of its class: no hooks, no replaced forward."""
    return not (has_hooks(module) or ("forward" in vars(module) and has_other_forward(module)))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def casting_hook(module: nn.Module) -> Any:
    """diffusers' hook for layerwise casting, where nothing but it comes between a call and the class's forward.

    A linear layer with it is kept in a narrow dtype, and has `compute_dtype` for a call. On a layer of PEFT it keeps
    PEFT from casting x, which is not done here. None: there is none, or another hook beside it.
    """
    hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    forward = vars(module).get("forward")
    if len(hooks) != 1 or has_hooks(module) or not isinstance(forward, functools.partial):
        return None
    [(name, hook)] = hooks.items()
    inner = getattr(hook.fn_ref, "original_forward", None) or hook.fn_ref.forward
    is_outermost = forward.func.__module__.startswith("diffusers.") and forward.args == (module,)
    is_innermost = getattr(inner, "__func__", None) is type(module).forward
    return hook if name in _CASTING and is_outermost and is_innermost else None


def has_other_forward(module: nn.Module) -> bool:
    """Whether the module's forward was replaced. Its class's own, put back when hooks are removed, does not count."""
    forward = vars(module).get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return forward is not None and not own


def is_tensor_parallel(base: nn.Module) -> bool:
    """Whether transformers has cut the base over ranks, or PEFT has read a plan of that for it."""
    attributes = vars(base)
    return any(attributes.get(name) is not None for name in _PARALLEL)


def tensor_of(module: nn.Module, name: str) -> Any:
    """The parameter of this name, or another attribute in its place; None where the module has none.

    In its place may be a buffer, or in a replica of `nn.DataParallel` a plain attribute. The parameter is looked up
    first because `nn.Module.__getattr__` is slow.
    """
    found = module._parameters.get(name)
    return getattr(module, name, None) if found is None else found


def frozen_base(base: nn.Module, kept: dict[str, Any], x: Tensor | None = None) -> Frozen | str:
    """The weight and bias of a layer's base, or the reason why the operators cannot take it.

    Args:
        base: an `nn.Linear`, a transformers `Conv1D`, a bitsandbytes `Linear4bit` or a `QuantizedLinear`; or a
            convolution, whose weight is (N, C, *kernel).
        kept: a cache of the caller for this base: its class; the 4-bit weight of a `Linear4bit`, since reading that
            synchronizes with the device; `IN_A_TRAINED_UNIT`.
        x: the input of the layer; a `Linear4bit` sets its compute dtype from its first one.
    """
    if is_tensor_parallel(base):
        return TENSOR_PARALLEL
    casting = None
    if not is_plain(base) and (casting := casting_hook(base)) is None:
        return HOOKED
    if "base_layer" in base._modules:
        return NESTED
    if "parametrizations" in base._modules:
        return PARAMETRIZED
    kind = type(base)
    if kept.get("kind") is not kind:
        plain = plain_class(base) or convolution_class(base)
        computes = plain is not None and computes_as(base, plain)
        kept |= {"kind": kind, "plain": plain, "computes": computes, "is_4bit": is_linear4bit(base)}
    plain = kept["plain"]
    if not kept["computes"]:
        is_another = plain is None or plain is nn.Linear
        return f"its base is a {kind.__name__}" if is_another else f"{kind.__name__} has a forward of its own"
    weight = tensor_of(base, "weight")
    if weight is not None and weight.is_meta and not is_planning():  # planning needs no values
        return ON_META
    if casting is not None and (kept["is_4bit"] or isinstance(base, QuantizedLinear)):
        return HOOKED
    if isinstance(base, QuantizedLinear):
        return base.frozen()
    if kept["is_4bit"]:
        return _linear4bit(base, kept, x)
    if type(weight) not in PLAIN:
        return SHARDED
    if weight.requires_grad:
        if not weight.is_leaf:
            kept[IN_A_TRAINED_UNIT] = True
        # A trained leaf also without gradients: reentrant checkpoints run forward without them, and again with them.
        if weight.is_leaf or torch.is_grad_enabled():
            return TRAINED_BASE
    bias = tensor_of(base, "bias")
    if casting is not None:  # what its hook does for a call, on copies
        weight, bias = weight.to(casting.compute_dtype), None if bias is None else bias.to(casting.compute_dtype)
    as_stored = plain is nn.Linear or weight.ndim > 2
    return Frozen(weight if as_stored else weight.t(), bias)


def read_base(base: nn.Module) -> dict[str, Any]:
    """A filled cache for `frozen_base`; made in advance because torch.compile cannot trace reading a 4-bit state."""
    kept: dict[str, Any] = {}
    frozen_base(base, kept)
    return kept


def before_its_own_forward(base: nn.Module, differentiated: Iterable[Any]) -> None:
    """Prepare a call of the base's own forward: keep bitsandbytes from repacking it.

    Raises:
        RuntimeError: bitsandbytes has repacked the base already, and one of `differentiated` requires a gradient,
            which would be wrong.
    """
    if not is_linear4bit(base):
        return
    keep_codes(base)
    if not torch.is_grad_enabled() or refusal(base) != REPACKED:
        return
    if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in differentiated):
        raise RuntimeError(
            f"no gradient can be computed through this Linear4bit: {REPACKED}. For inference call it under "
            "torch.no_grad()"
        )


def total(adapters: Sequence[Operands]) -> Operands | str:
    """The operands of the sum of several adapters on one base, or the reason why one call cannot compute it."""
    if len(adapters) == 1:
        return adapters[0]
    if any(adapter.dropout_p for adapter in adapters):
        return SEVERAL_DROPOUTS
    if len({adapter.variant for adapter in adapters}) > 1:
        return TWO_FORMS
    tensors = weighted_sum(adapters, [1.0] * len(adapters))
    if any(tensors[name] is not None and tensors[f"{name}_up"] is not None for name in "ABC"):
        return TWO_FORMS
    return Operands(tensors, variant=adapters[0].variant)


def refusal_of_x(x: Tensor, base: Frozen, operands: Operands, channels: int = -1) -> str | None:
    """The reason why the operators cannot take this x with this base and these operands, or None.

    channels: the dimension of x that the weight multiplies.
    """
    if type(x) not in PLAIN:
        return SUBCLASS
    if not is_strided(x):
        return LAYOUT
    if not x.is_floating_point():
        return "x is not floating point"
    weight = base.weight
    if x.ndim < -channels or x.shape[channels] != weight.shape[1] or x.device != weight.device:
        return MISFIT
    if is_transformed():
        return TRANSFORMED
    if (
        isinstance(weight, Tensor)
        and x.dtype != weight.dtype
        and (x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type))
    ):
        return MIXED_DTYPES
    for tensor in operands.tensors.values():
        if tensor is not None and type(tensor) not in PLAIN:
            return SHARDED_ADAPTER
    return RANK if is_above_rank(operands, x.is_cuda) else None


def is_above_rank(operands: Operands, is_cuda: bool) -> bool:
    """Whether the ranks of A and B add up to more than `MAX_RANK`, the most that the GPU kernels take."""
    downs = (operands.tensors[name] for name in ("A_down", "B_down"))
    return is_cuda and sum(len(down) for down in downs if down is not None) > MAX_RANK


def is_wider(x: Tensor, base: Frozen, operands: Operands) -> bool:
    """Whether x and a part of the adapter are wider than the compute dtype of a 4-bit base, with autocast off.

    This is so after `prepare_model_for_kbit_training`, which gives a bfloat16 model an fp32 residual stream.
    """
    narrow = base.compute_dtype
    if narrow is None or narrow.itemsize >= x.dtype.itemsize or torch.is_autocast_enabled(x.device.type):
        return False
    return any(part is not None and narrow.itemsize < part.dtype.itemsize for part in operands.tensors.values())


def peft_linear(x: Tensor, base: Frozen, adapter: Operands) -> Tensor:
    """`adapted_linear`; where x and the adapter are wider than the base's compute dtype (`is_wider`), as PEFT does.

    Then only the product with W + W∘A is in the compute dtype, and the terms added to it are in the dtype of x.
    """
    if not is_wider(x, base, adapter):
        return adapted_linear(x, base, adapter)
    of_w = {name: tensor if name[0] == "A" else None for name, tensor in adapter.tensors.items()}
    return adapted_linear(x, base, Operands(of_w, variant=adapter.variant)) + _added(x, base, adapter)


def _added(x: Tensor, base: Frozen, adapter: Operands) -> Tensor:
    """s·h·B_upᵀ + σ·Bᵀ + b∘D + E + W·C in the dtype of x, by PyTorch's operators."""
    p, dtype = adapter.tensors, x.dtype
    y = x.new_zeros(())
    if p["B_up"] is not None and p["B_down"] is not None:
        h = nn.functional.linear(nn.functional.dropout(x, adapter.dropout_p), p["B_down"].to(dtype))
        y = nn.functional.linear(h, p["B_up"].to(dtype)) * adapter.scale
    if p["B"] is not None:
        y = y + x.sum(-1, keepdim=True) * p["B"].to(dtype)
    if p["D"] is not None and base.bias is not None:
        y = y + (base.bias * p["D"]).to(dtype)
    if p["E"] is not None:
        y = y + p["E"].to(dtype)
    if p["C"] is not None or p["C_up"] is not None:
        y = y + glora_wc(base.weight, p["C"], c_up=p["C_up"], c_down=p["C_down"]).to(dtype)
    return y


def _linear4bit(base: Any, kept: dict[str, Any], x: Tensor | None) -> Frozen | str:
    parameter = base.weight
    state = getattr(parameter, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return refusal(base) or "its quant_state was lost"
    # The memory is compared too: a parameter may get other memory (a move to a device and back), and a state other
    # numbers (bitsandbytes' packing for inference on a CPU, undone when a state dict is taken).
    device = parameter.device
    memory = None if torch.compiler.is_compiling() else (parameter.data_ptr(), state.absmax.data_ptr())
    if (
        kept.get("parameter") is not parameter
        or kept.get("state") is not state
        or kept.get("device") != device
        or (memory is not None and kept.get("memory") != memory)
    ):
        try:
            with torch.inference_mode(False):  # it is kept for later calls
                weight = from_linear4bit(base)
        except (TypeError, ValueError) as error:
            return str(error)
        kept |= {"parameter": parameter, "state": state, "device": device, "memory": memory, "weight": weight}
    if x is not None and not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return Frozen(kept["weight"], base.bias, base.compute_dtype)
