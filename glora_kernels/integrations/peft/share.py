"""PEFT's tuner of ShareLoRA: which layers share a factor, and which of them owns it.

Of the layers that share a factor, the first in the model owns it as a parameter; the others refer to that layer's
`NamedAdapter`. The rules are those of `inject` (`nn.share`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from glora_kernels.integrations.peft.config import ShareLoRAPeftConfig
from glora_kernels.integrations.peft.layer import AdaptedLinear, ShareLoRAPeftLinear
from glora_kernels.integrations.peft.model import AdaptedModel
from glora_kernels.nn.named import NamedAdapter
from glora_kernels.nn.share import plan_sharing
from glora_kernels.nn.targets import Linear


class Factor(NamedTuple):
    """A shared factor of a layer: the path of the layer that owns it, and its dtype."""

    owner: str
    dtype: torch.dtype


class ShareLoRAPeftModel(AdaptedModel):
    """PEFT's tuner of "GKSHARELORA"; made by `get_peft_model` with a `ShareLoRAPeftConfig`.

    A layer cannot read a factor on another device. So layers on several devices that would share a factor are refused,
    and `nn.DataParallel`, whose replicas would read it from the first device, raises an error at the first call.
    """

    prefix = "gksharelora_"
    tuner_layer_cls = ShareLoRAPeftLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's method, but not from a state_dict: its keys lack layers that own no parameter."""
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

    def _shared(self, adapter_name: str, path: str) -> tuple[dict[str, NamedAdapter], dict[str, torch.dtype]]:
        owners: dict[str, NamedAdapter] = {}
        factors = self._factors.get(path, {})
        for name, factor in factors.items():
            if factor.owner != path:
                owner: Any = self.model.get_submodule(factor.owner)
                owners[name] = owner.adapters[adapter_name]
        return owners, {name: factor.dtype for name, factor in factors.items()}


@contextmanager
def _bare(model: nn.Module, targets: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, the PEFT layers among the targets are replaced by their linear base layers."""
    layers = {path: layer for path, layer in targets.items() if isinstance(layer, AdaptedLinear)}
    places = {path: (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in layers}
    try:
        for path, (parent, name) in places.items():
            parent._modules[name] = layers[path].base_layer
        yield
    finally:
        for path, (parent, name) in places.items():
            parent._modules[name] = layers[path]
