"""What PEFT's layers and ours have in common: a frozen base that another module owns, and an adapter's tensors on it.

    y = x (W + W∘A + s·B)ᵀ + b∘(1+D) + E + W·C

A layer of PEFT keeps its base in `base_layer`. Here is what such a base is made of (`frozen_base`), the tensors of an
adapter by name (`Operands`), the sum of several adapters (`total`), and the call itself (`adapted_linear`). Whatever
the operators cannot take is a string: the reason, in words for a summary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.dispatch.common import Weight
from glora_kernels.dispatch.ways import is_plain as is_strided
from glora_kernels.dispatch.ways import is_transformed
from glora_kernels.glora.op import dropout_seed
from glora_kernels.nn.base import conv1d_class, is_linear_anew
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.warmup import Form
from glora_kernels.ops import glora_linear, glora_wc
from glora_kernels.quant import QuantizedWeight
from glora_kernels.quant.bnb import REPACKED, from_linear4bit, is_linear4bit, keep_codes, linear4bit_class, refusal
from glora_kernels.runtime.configs import MAX_RANK

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
"""The types of a tensor that is what it looks like; a part of a sharded one has another."""
IN_A_TRAINED_UNIT = "in_a_trained_unit"
"""Of a base that FSDP (the first) gathers together with trained parameters: its weight then is a view, which needs
gradients because they do."""
_EXPECTED = frozenset({*PLAIN, float, str, type(None)})  # of the values of an adapter: looked up faster than compared
_PARALLEL = ("_hf_tp_plan", "_hf_device_mesh")  # what transformers writes on a tensor-parallel module


class Frozen(NamedTuple):
    """A base of shape (N, K). `compute_dtype`: what x is cast to over 4 bits, and y back from; None: x decides."""

    weight: Weight
    bias: Tensor | None
    compute_dtype: torch.dtype | None = None


class Operands(NamedTuple):
    """The tensors of one adapter in the names and shapes of `glora_linear` and `glora_wc`; an absent one is None.

    scale: s, a number or a tensor of one (under torch.compile, where a number would be a constant). dropout_p: of the
    B path; already 0 outside training.
    """

    a: Tensor | None = None
    a_up: Tensor | None = None
    a_down: Tensor | None = None
    b: Tensor | None = None
    b_up: Tensor | None = None
    b_down: Tensor | None = None
    c: Tensor | None = None
    c_up: Tensor | None = None
    c_down: Tensor | None = None
    d: Tensor | None = None
    e: Tensor | None = None
    scale: float | Tensor = 1.0
    dropout_p: float = 0.0
    variant: str = "hadamard"


_NOTHING_ADDED: dict[str, Any] = dict.fromkeys(("b", "b_up", "b_down", "c", "c_up", "c_down", "d", "e")) | {
    "dropout_p": 0.0,
    "scale": 1.0,
}
_TENSORS = Operands._fields.index("scale")


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in vars(module) and has_other_forward(module))
    )


def has_other_forward(module: nn.Module) -> bool:
    """Whether the forward of a module was replaced by another than its class's, which taking hooks off puts back."""
    forward = vars(module).get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward and getattr(forward, "__self__", None) is module
    return forward is not None and not own


def tensor_of(module: nn.Module, name: str) -> Any:
    """What the module's forward reads under this name: a parameter, or what stands in its place.

    That is a buffer, or the copy that a replica of `nn.DataParallel` has as a plain attribute; None where the module
    has nothing of the name. The parameter is asked for first because `nn.Module.__getattr__` is slow.
    """
    found = module._parameters.get(name)
    return getattr(module, name, None) if found is None else found


def frozen_base(base: nn.Module, kept: dict[str, Any], x: Tensor | None = None) -> Frozen | str:
    """What the base of a layer is made of, or why the operators cannot take it.

    Args:
        base: an `nn.Linear`, a transformers `Conv1D`, a bitsandbytes `Linear4bit` or a `QuantizedLinear`.
        kept: what is known of the base from call to call: the 4-bit weight of a `Linear4bit`, whose reading asks the
            device; `IN_A_TRAINED_UNIT`.
        x: what the layer is called with; a `Linear4bit` takes the dtype it computes in from its first one.
    """
    if not is_plain(base):
        return HOOKED
    attributes = vars(base)
    if any(attributes.get(name) is not None for name in _PARALLEL):
        return TENSOR_PARALLEL
    if "base_layer" in base._modules:
        return NESTED
    if "parametrizations" in base._modules:
        return PARAMETRIZED
    kind = type(base)
    plain: Any = nn.Linear if kind is nn.Linear or _is_linear_anew(base, kept) else conv1d_class(base)
    if plain is None and not isinstance(base, QuantizedLinear) and not is_linear4bit(base):
        return f"its base is a {kind.__name__}"
    weight = tensor_of(base, "weight")
    if weight is not None and weight.is_meta:
        return ON_META
    if plain is not None:
        if plain is not nn.Linear and kind.forward is not plain.forward:
            return f"{kind.__name__} has a forward of its own"
        if type(weight) not in PLAIN:
            return SHARDED
        if weight.requires_grad:
            if not weight.is_leaf:
                kept[IN_A_TRAINED_UNIT] = True
            # Without gradients as well: reentrant checkpoints run forward so, and again with them.
            if weight.is_leaf or torch.is_grad_enabled():
                return TRAINED_BASE
        return Frozen(weight if plain is nn.Linear else weight.t(), tensor_of(base, "bias"))
    if isinstance(base, QuantizedLinear):
        return Frozen(base.base_weight(), base.bias, base.compute_dtype)
    return _linear4bit(base, kept, x)


def read_base(base: nn.Module) -> dict[str, Any]:
    """What `frozen_base` keeps of a base, read now: torch.compile cannot trace the reading of a 4-bit state."""
    kept: dict[str, Any] = {}
    frozen_base(base, kept)
    return kept


def before_its_own_forward(base: nn.Module, differentiated: Iterable[Any]) -> None:
    """What there is to do before a base is called by its own forward, in eval mode as in training.

    Args:
        base: of an adapted layer.
        differentiated: what the call may be asked the gradient of: x, the parameters of the adapters.

    Raises:
        RuntimeError: bitsandbytes has repacked the base, and a gradient is wanted, which would be wrong.
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
    """The operands of the sum of several adapters on one base, or why one call cannot take it.

    Factors are put side by side: Σ Up_i·Down_i = [Up_1 … Up_n]·[Down_1; …; Down_n].
    """
    if len(adapters) == 1:
        return adapters[0]
    if any(adapter.dropout_p for adapter in adapters):
        return SEVERAL_DROPOUTS
    variant = adapters[0].variant
    if any(adapter.variant != variant for adapter in adapters):
        return TWO_FORMS
    parts: dict[str, Tensor | None] = {}
    for name in ("a", "b", "c"):
        parts[name] = _sum(adapters, name)
        ups, downs = [], []
        for adapter in adapters:
            up, down = getattr(adapter, f"{name}_up"), getattr(adapter, f"{name}_down")
            if up is not None:
                ups.append(up if name != "b" else _scaled(up, adapter.scale))
                downs.append(down)
        if parts[name] is not None and ups:
            return TWO_FORMS
        parts[f"{name}_up"] = torch.cat(ups, dim=1) if ups else None
        parts[f"{name}_down"] = torch.cat(downs, dim=0) if ups else None
    return Operands(**parts, d=_sum(adapters, "d"), e=_sum(adapters, "e"), variant=variant)  # type: ignore[arg-type]


def refusal_of_x(x: Tensor, base: Frozen, operands: Operands) -> str | None:
    """Why this x keeps a layer from the operators, or None."""
    if type(x) not in PLAIN:
        return SUBCLASS
    if not is_strided(x):
        return LAYOUT
    if not x.is_floating_point():
        return "x is not floating point"
    weight = base.weight
    if x.ndim == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return MISFIT
    if is_transformed():
        return TRANSFORMED
    if (
        isinstance(weight, Tensor)
        and x.dtype != weight.dtype
        and (x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type))
    ):
        return MIXED_DTYPES
    for value in operands:
        if type(value) not in _EXPECTED and isinstance(value, Tensor):
            return SHARDED_ADAPTER
    return RANK if is_above_rank(operands, x.is_cuda) else None


def is_wider(x: Tensor, base: Frozen, operands: Operands) -> bool:
    """Whether x and a part of its adapter are wider than what their 4-bit base computes in, and autocast is off.

    As after `prepare_model_for_kbit_training`, where a model of bfloat16 has an fp32 residual stream.
    """
    narrow = base.compute_dtype
    if narrow is None or narrow.itemsize >= x.dtype.itemsize or torch.is_autocast_enabled(x.device.type):
        return False
    parts: Any = operands[:_TENSORS]
    return any(part is not None and narrow.itemsize < part.dtype.itemsize for part in parts)


def warmup_form(layer: nn.Module, base: Frozen, operands: Operands) -> Form:
    """A layer as `warmup` runs it."""
    weight = base.weight
    is_4bit = isinstance(weight, QuantizedWeight)
    dtype = base.compute_dtype or (weight.state.dtype if isinstance(weight, QuantizedWeight) else weight.dtype)
    layout: tuple[object, ...] = (tuple(weight.shape), weight.device, dtype, base.compute_dtype)
    if isinstance(weight, QuantizedWeight):
        state = weight.state
        layout += (state.quant_type, state.blocksize, state.nested is not None)
    else:
        layout += (weight.stride(),)
    tensors = {"bias": base.bias} | operands._asdict()
    given = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    parts = ((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in given.items())
    drops, (n, k) = operands.dropout_p > 0, weight.shape
    key = (*layout, *parts, operands.variant, drops)
    return Form(
        layer, k, weight.device, dtype, is_4bit, drops, key, f"{type(layer).__name__}, {k} to {n}: {', '.join(given)}"
    )


def is_above_rank(operands: Operands, is_cuda: bool) -> bool:
    """Whether the GPU kernels would have to hold more than `MAX_RANK` rows of factors."""
    return is_cuda and sum(len(down) for down in (operands.a_down, operands.b_down) if down is not None) > MAX_RANK


def adapted_linear(x: Tensor, base: Frozen, o: Operands) -> Tensor:
    """y (..., N) of an x (..., K), in the dtype of x, under autocast in that of autocast.

    Where x is wider than what its base computes in (`is_wider`), only what multiplies W is computed there, and what
    is added to it in the dtype of x, as PEFT's layers do.

    Raises:
        The errors of `ops.glora_linear`.
    """
    if is_wider(x, base, o):
        added = o._replace(a=None, a_up=None, a_down=None)
        return _one_call(x, base, o._replace(**_NOTHING_ADDED)) + _added(x, base, added)
    return _one_call(x, base, o)


def _one_call(x: Tensor, base: Frozen, o: Operands) -> Tensor:
    weight, bias, compute_dtype = base
    dtype = None
    if compute_dtype is not None:
        x, bias, dtype = x.to(compute_dtype), None if bias is None else bias.to(compute_dtype), x.dtype
    elif bias is not None and isinstance(weight, QuantizedWeight) and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    b_up, scale = o.b_up, o.scale
    if isinstance(scale, Tensor):
        b_up, scale = None if b_up is None else _scaled(b_up, scale), 1.0
    p = o.dropout_p
    y = glora_linear(
        x,
        weight,
        bias,
        a=o.a,
        a_up=o.a_up,
        a_down=o.a_down,
        b=o.b,
        b_up=b_up,
        b_down=o.b_down,
        c=o.c,
        c_up=o.c_up,
        c_down=o.c_down,
        d=o.d,
        e=o.e,
        scale=scale,
        dropout_p=p,
        seed=dropout_seed(x.device) if p else None,
        variant=o.variant,
    )
    return y if dtype is None else y.to(dtype)


def _added(x: Tensor, base: Frozen, o: Operands) -> Tensor:
    """s·h·B_upᵀ + σ·bᵀ + bias∘d + e + W·c in the dtype of x, of PyTorch's operations."""
    dtype = x.dtype
    y = x.new_zeros(())
    if o.b_up is not None and o.b_down is not None:
        dropped = nn.functional.dropout(x, o.dropout_p)
        y = nn.functional.linear(nn.functional.linear(dropped, o.b_down.to(dtype)), o.b_up.to(dtype)) * o.scale
    if o.b is not None:
        y = y + x.sum(-1, keepdim=True) * o.b.to(dtype)
    if o.d is not None and base.bias is not None:
        y = y + (base.bias * o.d).to(dtype)
    for part in (o.e, _wc(base.weight, o)):
        y = y if part is None else y + part.to(dtype)
    return y


def _wc(weight: Weight, o: Operands) -> Tensor | None:
    return None if o.c is None and o.c_up is None else glora_wc(weight, o.c, c_up=o.c_up, c_down=o.c_down)


def _is_linear_anew(base: nn.Module, kept: dict[str, Any]) -> bool:
    """Whether the base is of a class derived from `nn.Linear` that computes the same; tried once for each layer."""
    if not isinstance(base, nn.Linear) or is_linear4bit(base):
        return False
    kind = type(base)
    if kept.get("kind") is not kind:
        kept |= {"kind": kind, "anew": kind.forward is nn.Linear.forward or is_linear_anew(base)}
    found: bool = kept["anew"]
    return found


def _linear4bit(base: Any, kept: dict[str, Any], x: Tensor | None) -> Frozen | str:
    if type(base).forward is not linear4bit_class(base).forward:
        return f"{type(base).__name__} has a forward of its own"
    parameter = base.weight
    state = getattr(parameter, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return refusal(base) or "its quant_state was lost"
    # The same parameter can be given other memory (a move to a device and back), the same state other numbers
    # (bitsandbytes' packing for inference on a CPU, and its undoing when a state dict is taken).
    device = parameter.device
    memory = None if torch.compiler.is_compiling() else (parameter.data_ptr(), state.absmax.data_ptr())
    if (
        kept.get("parameter") is not parameter
        or kept.get("state") is not state
        or kept.get("device") != device
        or (memory is not None and kept.get("memory") != memory)
    ):
        try:
            with torch.inference_mode(False):  # it outlives the call that it is first read in
                weight = _recordable(from_linear4bit(base))
        except (TypeError, ValueError) as error:
            return str(error)
        kept |= {"parameter": parameter, "state": state, "device": device, "memory": memory, "weight": weight}
    if x is not None and not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    return Frozen(kept["weight"], base.bias, base.compute_dtype)


def _recordable(weight: QuantizedWeight) -> QuantizedWeight:
    """On the same memory, without the mark of inference mode, which bitsandbytes leaves on what is merged there."""
    state, nested = weight.state, weight.state.nested
    if nested is not None:
        absmax, code, offset = map(_unmarked, (nested.absmax, nested.code, nested.offset))
        nested = replace(nested, absmax=absmax, code=code, offset=offset)
    return QuantizedWeight(_unmarked(weight.packed), replace(state, absmax=_unmarked(state.absmax), nested=nested))


def _unmarked(tensor: Tensor) -> Tensor:
    if not tensor.is_inference():
        return tensor
    place = (tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)


def _sum(adapters: Sequence[Operands], name: str) -> Tensor | None:
    """The sum of one vector over the adapters that have it."""
    vectors = [vector for vector in (getattr(adapter, name) for adapter in adapters) if vector is not None]
    return sum(vectors[1:], vectors[0]) if vectors else None


def _scaled(up: Tensor, scale: float | Tensor) -> Tensor:
    return up if isinstance(scale, float) and scale == 1.0 else up * scale
