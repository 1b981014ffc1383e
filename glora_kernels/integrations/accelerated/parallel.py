"""PEFT's LoRA over a base that transformers has cut over ranks: our operators on this rank's parts.

PEFT cuts the factor that lies along the cut dimension of W, and leaves the other one a plain tensor on every rank:

    column:  lora_A whole, lora_B rows     y_p = x·W_pᵀ + s·h·B_pᵀ,   h = x̃·Aᵀ
    row:     lora_A columns, lora_B whole  y = Σ_p (x_p·W_pᵀ + s·(x̃_p·A_pᵀ)·Bᵀ) + b

The gradient of the whole factor is added up over the ranks in backward, so that `.grad` is whole, as PEFT's is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from glora_kernels.integrations import bases
from glora_kernels.nn.adapted import Frozen, Operands
from glora_kernels.parallel.layout import COLUMN, ROW
from glora_kernels.spec import GLoRAConfig

_PLANS = {"colwise": COLUMN, "rowwise": ROW}
_FACTORS = {"lora_A": "B_down", "lora_B": "B_up"}
_CUT = "cut"
"""Key of what the layer keeps: the forward of its base, and how that is cut."""


def linear(layer: Any, x: Tensor) -> Tensor | str:
    """y of this rank, as the base's own style gives it, or the reason why PEFT's forward runs."""
    found = _operands(layer)
    if isinstance(found, str):
        return found
    from torch.distributed.tensor import DTensor, Replicate, Shard

    cut, operands = found
    base = layer.base_layer
    part = Frozen(base.weight.to_local(), None)
    if reason := bases.refusal_of_x(x, part, Operands()):
        return reason
    is_row = cut.direction == ROW
    tensors = {name: t for name, t in operands.tensors.items() if t is not None}
    whole = {
        name: t if isinstance(t, DTensor) else DTensor.from_local(t, cut.mesh, (Replicate(),), run_check=False)
        for name, t in tensors.items()
    }
    config = _config(len(tensors["B_down"]), operands.scale, operands.dropout_p, "E" in tensors)
    given = DTensor.from_local(x, cut.mesh, (Shard(x.ndim - 1) if is_row else Replicate(),), run_check=False)
    y = cut.linear(given, Frozen(base.weight, bases.tensor_of(base, "bias")), config, whole, training=True)
    return (y.redistribute(placements=(Replicate(),)) if is_row else y).to_local()


def refusal(layer: Any) -> str | None:
    """The reason why PEFT's forward runs whatever x is, or None."""
    found = _operands(layer)
    return found if isinstance(found, str) else None


def _operands(layer: Any) -> tuple[Any, Operands] | str:
    """How the layer is cut, and the sum of its active adapters."""
    if torch.compiler.is_compiling():
        return bases.TENSOR_PARALLEL
    cut = _cut(layer)
    if cut is None:
        return bases.TENSOR_PARALLEL
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if not all(_is_pefts(getattr(layer, part)[name], cut, own) for part, own in _FACTORS.items()):
            return bases.HOOKED
        operands = layer.operands(name)
        if not isinstance(operands, Operands):
            return operands or bases.IDLE
        adapters.append(operands)
    total = bases.total(adapters) if adapters else bases.IDLE
    return total if isinstance(total, str) else (cut, total)


def _cut(layer: Any) -> Any:
    """The `parallel.call.Cut` of the layer's base; None where its style is not one of those that PEFT serves."""
    base = layer.base_layer
    forward = vars(base).get("forward")
    known = layer.kept.get(_CUT)
    if known is None or known[0] is not forward:
        known = layer.kept[_CUT] = forward, _found(base)
    return known[1]


def _found(base: Any) -> Any:
    from glora_kernels.parallel.call import Cut
    from glora_kernels.parallel.found import found_in, is_cut

    direction = _PLANS.get(getattr(base, "_hf_tp_plan", None) or "")
    found = found_in(base) if direction and is_cut(base) else None
    if found is None or isinstance(found, str) or found.direction != direction:
        return None
    return Cut(found.mesh, found.direction)


def _is_pefts(factor: Any, cut: Any, name: str) -> bool:
    """Whether a factor is as PEFT makes it: plain, or cut as our parameter of this name, with no hook of others."""
    from torch.distributed.tensor import DTensor, Replicate

    placement, weight = cut.placement(name, GLoRAConfig.lora()), bases.tensor_of(factor, "weight")
    if placement == Replicate():
        return bases.is_plain(factor)
    is_part = isinstance(weight, DTensor) and weight.placements == (placement,) and weight.device_mesh == cut.mesh
    return is_part and not bases.has_hooks(factor)


@lru_cache(maxsize=1024)
def _config(rank: int, scale: float, dropout: float, has_bias: bool) -> GLoRAConfig:
    """The adapter's forms: a trained bias of lora_B is E."""
    plain = GLoRAConfig.lora(rank, alpha=scale * rank, dropout=dropout)
    return replace(plain, E="vector") if has_bias else plain
