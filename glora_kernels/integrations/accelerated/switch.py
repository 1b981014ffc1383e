"""Moving a model's PEFT layers onto our operators (`accelerate`) and back (`decelerate`); a report on both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from glora_kernels.integrations.bases import IDLE, SHARDED, SHARDED_ADAPTER, casting_hook, has_other_forward
from glora_kernels.integrations.release import need_peft
from glora_kernels.nn.columns import aligned
from glora_kernels.nn.mixed import refuse_inside
from glora_kernels.nn.model import unwrap
from glora_kernels.nn.projections import guard, unguard
from glora_kernels.nn.reads import reads
from glora_kernels.nn.undo import all_or_none
from glora_kernels.quant.bnb import free_codes, keep_codes

OWN_FORWARD = "its forward was replaced, or it has accelerate's offloading hooks"
DERIVED = "a class of its own, derived from PEFT's"
NOT_YET = "accelerate() was not called since it was added, or decelerate() was"
ON_OURS = "glora_kernels"


class Pipeline(Protocol):
    """Several models by name, and whatever else they need: diffusers' `DiffusionPipeline`."""

    @property
    def components(self) -> Mapping[str, Any]: ...


P = TypeVar("P", bound=nn.Module | Pipeline)


@dataclass(frozen=True, repr=False)
class AccelerationReport:
    """How many PEFT layers of a model run on our operators, and why the others do not; print it for a table.

    Attributes:
        accelerated: the number of layers on our operators, by kind of layer ("lora.Linear").
        kept: the number of layers on PEFT's path, by (kind, reason).
        fallbacks: for layers on our operators, the number of calls in which PEFT's forward ran nevertheless, by (path
            of the layer, reason), since `accelerate` or the last `acceleration(model, reset=True)`. Calls inside a
            graph of torch.compile are not counted, and a copy of a model starts at zero.
    """

    accelerated: dict[str, int]
    kept: dict[tuple[str, str], int]
    fallbacks: dict[tuple[str, str], int] = field(default_factory=dict)

    def __repr__(self) -> str:
        rows = [("layers", "kind", "runs on", "because")]
        rows += [(str(n), kind, ON_OURS, "") for kind, n in sorted(self.accelerated.items())]
        rows += [(str(n), kind, "PEFT", reason) for (kind, reason), n in sorted(self.kept.items())]
        lines = aligned(rows, "><<<")
        if self.fallbacks:
            calls: dict[str, list[int]] = {}
            for (_, reason), n in self.fallbacks.items():
                calls.setdefault(reason, []).append(n)
            rows = [("calls", "of layers", "ran on", "because")]
            rows += [(str(sum(ns)), str(len(ns)), "PEFT", reason) for reason, ns in sorted(calls.items())]
            lines += ["single calls of layers on glora_kernels:", *aligned(rows, "><<<")]
        return "\n".join(lines)


def accelerate(model: P, *, verbose: bool = True) -> P:
    """Move the PEFT layers of a model onto our operators, in place; nothing else changes.

    Adapters stay PEFT's Parameters under the same names, so optimizers, checkpoints, `save_pretrained` and DDP work as
    before; adapters can be added, switched, disabled, merged and deleted. Each LoRA or DoRA layer over an `nn.Linear`,
    a `Conv1D` or a bitsandbytes `Linear4bit`, each GLoRA and each HiRA layer changes its class to a subclass, whose
    forward calls `ops.glora_linear` where that supports the call, and else PEFT's forward. LoRA over the parameters of
    experts (`target_parameters`, transformers' MoE models) is computed by groups of rows, without a dense ΔW for every
    expert, by PyTorch's operations; LoRA over an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` by the vendor's convolutions,
    without copies of x for dropout or for fp32 adapters. A layer whose weight other code reads without calling the
    layer is left as it is: its adapter has no effect there, which PEFT does not report, but the summary does.

    On an accelerated model it adds the layers that are new since; where there are none, nothing changes.

    Dropout masks come from another random stream than PEFT's: equal in distribution, not element by element. Two things
    that PEFT's layers allow are errors: a second derivative (`create_graph=True`), and overwriting in place the output
    of a GLoRA layer whose vector or constant A is trained.

    Args:
        model: a `PeftModel`, or any module with PEFT layers, also inside DDP or torch.compile's wrapper. Or a pipeline,
            an object with several models in a mapping `components`, as diffusers' have: all that have PEFT layers.
        verbose: print the summary (`acceleration`), on the first process only.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` is no module, and has no `components` either.
        ImportError: PEFT is missing, or older than the oldest supported release.
        ValueError: the model has no PEFT layers, or none that can be accelerated.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), LoraConfig(target_modules=["0"]))
        >>> model = gk.accelerate(model, verbose=False)
        >>> print(gk.acceleration(model))
        layers  kind         runs on        because
             1  lora.Linear  glora_kernels
    """
    root = _root(model)
    layers = _tuner_layers(root)
    if not layers:
        raise ValueError(
            "accelerate: the model has no PEFT layers; use it on the result of peft.get_peft_model, or inject() for "
            "a model without PEFT"
        )
    kinds = _kinds()
    new = {path: layer for path, layer in layers.items() if _refusal(layer, kinds) is None}
    read = _read(root, layers.values()) if new else {}
    new = {path: layer for path, layer in new.items() if layer not in read}
    again = any(map(_is_accelerated, layers.values()))
    if not new and not again and not all(map(_is_ours, layers.values())):
        raise ValueError(f"accelerate: no layer of this model can be accelerated\n{acceleration(model)}")
    with all_or_none() as undo:
        if not again:
            undo.callback(free_codes, root)
        for layer in new.values():
            undo.callback(_put_back, layer, type(layer), dict(vars(layer)))
            layer.__class__ = kinds[type(layer)]
            layer.accelerated()
        guard(root, undo)
        keep_codes(root)
    if verbose and _is_first_process():
        print(acceleration(model))
        if again and not new:
            print("accelerate: the model was accelerated already, and nothing was changed")
    return model


def decelerate(model: P) -> P:
    """Give the layers of an accelerated model their PEFT classes back, in place; parameters stay as they are.

    On a model without accelerated layers it changes nothing, and prints that.

    Args:
        model: what `accelerate` takes.

    Returns:
        The model itself.

    Raises:
        TypeError: `model` is no module, and has no `components` either.
        ValueError: it has no PEFT layers, or a layer's class or forward was changed since. The model is unchanged.
        RuntimeError: inside `rows`, which PEFT's own layers do not know.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), LoraConfig(target_modules=["0"]))
        >>> model = gk.decelerate(gk.accelerate(model, verbose=False))  # PEFT's layers again, with the same parameters
    """
    root = _root(model)
    found = _tuner_layers(root).values()
    if not found:
        raise ValueError("decelerate: the model has no PEFT layers")
    layers = [layer for layer in found if _is_accelerated(layer)]
    if not layers:
        if _is_first_process():
            print("decelerate: no layer of this model is accelerated, and nothing was changed")
        return model
    refuse_inside(layers, "decelerate")
    kinds = _kinds().values()
    if changed := [layer for layer in layers if type(layer) not in kinds]:
        raise ValueError(
            f"decelerate: the class of {len(changed)} layers was changed since (fully_shard does), "
            "and cannot be put back"
        )
    if wrapped := [layer for layer in layers if has_other_forward(layer)]:
        raise ValueError(
            f"decelerate: the forward of {len(wrapped)} layers was replaced since, by one that may call the "
            "accelerated one (accelerate's offloading hooks do); take it off first"
        )
    with all_or_none() as undo:
        undo.callback(keep_codes, root)
        for layer in layers:
            undo.callback(_put_back, layer, type(layer), dict(vars(layer)))
            layer.decelerated()
            layer.__class__ = layer.plain
        free_codes(root)
        if not any(map(_is_ours, found)):
            unguard(root)
    return model


def _put_back(layer: Any, kind: type, attributes: dict[str, Any]) -> None:
    layer.__class__ = kind
    object.__setattr__(layer, "__dict__", attributes)


def acceleration(model: nn.Module | Pipeline, *, reset: bool = False) -> AccelerationReport:
    """Report how many PEFT layers of a model run on our operators at present, and why the others do not.

    A disabled or merged layer counts as if it were enabled and unmerged. Single calls that run PEFT's forward because
    of their arguments (an x in another dtype, a batch of several adapters) are counted in `fallbacks`.

    Args:
        model: a model with PEFT layers, or a pipeline of such.
        reset: whether to set the counts of single calls to zero after the report.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), LoraConfig(target_modules=["0"]))
        >>> gk.acceleration(gk.accelerate(model, verbose=False)).accelerated
        {'lora.Linear': 1}
    """
    root = _root(model)
    layers, kinds = _tuner_layers(root), _kinds()
    left = any(_refusal(layer, kinds) is None for layer in layers.values())
    read = _read(root, layers.values()) if left else {}
    units = _sharded_units(root)
    served: Counter[str] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    fallbacks: dict[tuple[str, str], int] = {}
    for path, layer in layers.items():
        if _is_accelerated(layer):
            reason = _fallback(layer, is_gathered=f"{path}.".startswith(units))
            fallbacks |= {(path, why): n for why, n in layer._glora_fallbacks.items()}
            if reset:
                layer._glora_fallbacks.clear()
        elif _is_ours(layer):
            reason = None
        else:
            reason = _refusal(layer, kinds) or read.get(layer) or NOT_YET
        if reason is None:
            served[_kind(layer)] += 1
        else:
            kept[_kind(layer), reason] += 1
    return AccelerationReport(dict(served), dict(kept), fallbacks)


def _fallback(layer: Any, is_gathered: bool) -> str | None:
    """Why an accelerated layer runs PEFT's forward, or None. is_gathered: FSDP2 gathers its weight for a forward."""
    if has_other_forward(layer) and casting_hook(layer) is None:
        return OWN_FORWARD
    reason: str | None = layer.standing_refusal()
    return None if reason == IDLE or (reason in (SHARDED, SHARDED_ADAPTER) and is_gathered) else reason


def _kinds() -> dict[type, Any]:
    """PEFT's class → the accelerated class. Call `_tuner_layers` first: it checks PEFT's release."""
    from glora_kernels.integrations.accelerated.layers import KINDS

    return KINDS


def _root(model: object) -> nn.Module:
    """The model, or a module that holds those of a pipeline that have PEFT layers, under the names they have there."""
    if isinstance(model, nn.Module):
        return model
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(
            "model must be an nn.Module, or a pipeline that has its models in a mapping `components` (diffusers' "
            f"DiffusionPipeline), got {type(model).__name__}"
        )
    modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    return nn.ModuleDict({name: unwrap(part) for name, part in modules.items() if _tuner_layers(part)})


def _tuner_layers(root: nn.Module) -> dict[str, Any]:
    need_peft("accelerate")
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in root.named_modules() if isinstance(module, BaseTunerLayer)}


def _sharded_units(model: nn.Module) -> tuple[str, ...]:
    """The path prefixes of the modules that FSDP2 shards, and gathers before each forward."""
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.fsdp import FSDPModule

    paths = (path for path, module in model.named_modules() if isinstance(module, FSDPModule))
    return tuple(f"{path}." if path else "" for path in paths)


def _refusal(layer: Any, kinds: dict[type, Any]) -> str | None:
    """The reason why the class of a layer cannot be changed, or None."""
    if type(layer) in kinds:
        return OWN_FORWARD if has_other_forward(layer) else None
    if _is_accelerated(layer):
        return "accelerated already"
    if any(isinstance(layer, kind) for kind in kinds):
        return DERIVED
    return "not a kind that is served: linear layers, LoRA's convolutions and experts"


def _read(model: nn.Module, layers: Collection[Any]) -> dict[Any, str]:
    """The layers whose base is read by the code of a module around them, and where."""
    found = reads(unwrap(model), set(layers))  # unwrapped: a wrapper reads weights to communicate, not to compute
    bases = ((layer, found.get(layer) or found.get(layer.get_base_layer())) for layer in layers)
    return {layer: f"{read}, and misses its adapter there" for layer, read in bases if read}


def _is_accelerated(layer: Any) -> bool:
    return "_glora_fallbacks" in vars(layer)


def _is_ours(layer: Any) -> bool:
    """Whether a layer belongs to a method of `glora_kernels.integrations.peft`, which always runs on our operators."""
    return not _is_accelerated(layer) and type(layer).__module__.startswith("glora_kernels.")


def _kind(layer: Any) -> str:
    """The kind of a layer as PEFT prints it, tuner and class: "lora.Linear"."""
    kind = layer.plain if _is_accelerated(layer) else type(layer)
    parts = kind.__module__.split(".")
    tuner = parts[parts.index("tuners") + 1] if "tuners" in parts[:-1] else parts[0]
    return f"{tuner}.{kind.__name__}"


def _is_first_process() -> bool:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0
