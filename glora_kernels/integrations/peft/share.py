"""PEFT's tuner of ShareLoRA: which layers share which factor, and whose parameter it is.

Of the layers that share a factor, the first of the model has it as a parameter; the others hold that layer's adapter
(`Adapter`). The rules are those of `inject` (`nn.share`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from glora_kernels.integrations.peft.adapter import Adapter
from glora_kernels.integrations.peft.config import ShareLoRAPeftConfig
from glora_kernels.integrations.peft.layer import AdaptedLinear, ShareLoRAPeftLinear
from glora_kernels.integrations.peft.model import AdaptedModel
from glora_kernels.nn.share import plan_sharing
from glora_kernels.nn.targets import Linear


class Factor(NamedTuple):
    """A factor of a layer that shares: the path of the layer that has it, and its dtype."""

    owner: str
    dtype: torch.dtype


class ShareLoRAPeftModel(AdaptedModel):
    """PEFT's tuner of "GKSHARELORA"; made by `get_peft_model` with a `ShareLoRAPeftConfig`.

    A layer of one device cannot read a factor on another, so a model spread over several devices is refused, and
    `nn.DataParallel`, whose replicas would ask the first device for it, is an error at the first call.
    """

    prefix = "gksharelora_"
    tuner_layer_cls = ShareLoRAPeftLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; not from a state_dict, in whose keys a layer that has no parameter of its own is missing."""
        if kwargs.get("state_dict") is not None:
            raise ValueError("ShareLoRA cannot be injected from a state_dict; give the configuration alone")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _plan(self, config: ShareLoRAPeftConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        shared = config.share_config()
        members = {
            Linear(m.get_base_layer() if isinstance(m, AdaptedLinear) else m, [path]): shared
            for path, m in targets.items()
        }
        with _bare(model, targets):
            ties = plan_sharing(model, members, None).ties if members else []
        factors: dict[str, dict[str, Factor]] = {}
        for tie in ties:
            owner = tie.factors[0][0]
            for path, name in tie.factors:
                factors.setdefault(path, {})[name] = Factor(owner, tie.dtype)
        self._factors = factors

    def _shared(self, adapter_name: str, path: str) -> tuple[dict[str, Adapter], dict[str, torch.dtype]]:
        owners: dict[str, Adapter] = {}
        factors = self._factors.get(path, {})
        for name, factor in factors.items():
            if factor.owner != path:
                owner: Any = self.model.get_submodule(factor.owner)
                owners[name] = owner.adapters[adapter_name]
        return owners, {name: factor.dtype for name, factor in factors.items()}


@contextmanager
def _bare(model: nn.Module, targets: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, the model has its own linear layers in the places of those that have an adapter already."""
    layers = {path: layer for path, layer in targets.items() if isinstance(layer, AdaptedLinear)}
    places = {path: (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in layers}
    try:
        for path, (parent, name) in places.items():
            parent._modules[name] = layers[path].base_layer
        yield
    finally:
        for path, (parent, name) in places.items():
            parent._modules[name] = layers[path]
