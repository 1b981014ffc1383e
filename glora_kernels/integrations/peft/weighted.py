"""A new adapter that is the weighted sum of others: ΔW = Σ_i w_i·ΔW_i, and so for the bias. Every support is linear.

The ranks add up, and the scale of the new adapter is 1 (`nn.adapted.weighted_sum`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from glora_kernels.integrations.peft.layer import AdaptedLinear
from glora_kernels.nn.adapted import weighted_sum

_MAY_DIFFER = (
    "r", "alpha", "dropout", "init", "inference_mode", "revision", "base_model_name_or_path", "runtime_config",
)  # fmt: skip


def weighted_config(configs: Sequence[Any], names: Sequence[str]) -> Any:
    """The configuration of the sum.

    Raises:
        ValueError: configurations that differ in more than the rank, the scale and what is for training, or that set
            `patterns`, `modules_to_save` or `bias`.
    """
    first = configs[0]
    for config, name in zip(configs, names, strict=True):
        for unwanted, none in (("patterns", None), ("modules_to_save", None), ("bias", "none")):
            if (given := getattr(config, unwanted, none)) != none:
                raise ValueError(f"add_weighted_adapter: {name!r} has {unwanted}={given!r}, which cannot be added up")
        ours, theirs = config.to_dict(), first.to_dict()
        different = [key for key in theirs if key not in _MAY_DIFFER and ours.get(key) != theirs[key]]
        if type(config) is not type(first) or different:
            what = ", ".join(f"{key} ({theirs[key]!r} and {ours.get(key)!r})" for key in different) or "their methods"
            raise ValueError(
                f"add_weighted_adapter: {names[0]!r} and {name!r} differ in {what}; r and alpha may differ"
            )
    return replace(first, r=sum(config.r for config in configs), alpha=None, inference_mode=False)


@torch.no_grad()
def write_weighted(layer: AdaptedLinear, names: Sequence[str], weights: Sequence[float], name: str) -> None:
    """The sum into the parameters that the new adapter of a layer owns, computed in float64 and rounded once."""
    sources = []
    for source in names:
        operands = layer.adapters[source].operands()
        tensors = {own: None if tensor is None else tensor.double() for own, tensor in operands.tensors.items()}
        sources.append(operands._replace(tensors=tensors))
    summed: dict[str, Any] = weighted_sum(sources, weights)
    for own, parameter in layer.adapters[name].named_parameters():
        parameter.copy_(summed[own])
