"""PEFT's tuner of GLoRA: which modules are replaced, and what a model does with a batch of several adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from glora_kernels.integrations.peft.adapter import Adapter
from glora_kernels.integrations.peft.config import GLoRAPeftConfig
from glora_kernels.integrations.peft.layer import BASE, AdaptedLinear, GLoRAPeftLinear, unfit
from glora_kernels.spec import matches


class AdaptedModel(BaseTuner):
    """What the tuners of both methods do: every target is checked first, then replaced."""

    tuner_layer_cls: Any
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # Called once the configuration knows its targets, before the first of them is replaced.
        if peft_config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f"bias={peft_config.bias!r} needs PEFT 0.21: older ones do not save the trained biases")
        targets = self._targets(peft_config, model)
        for path, module in targets.items():
            if reason := unfit(module):
                raise ValueError(f"{path!r} cannot be adapted: {reason}")
        self._plan(peft_config, model, targets)

    def _plan(self, config: Any, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        """Check a configuration against the layers that it is for."""
        raise NotImplementedError

    def _targets(self, config: Any, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that a configuration is for, by path; those that have an adapter already are the layers."""
        config = _maybe_include_all_linear_layers(config, model)
        targets: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for path, module in model.named_modules():
            if not path or path.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{path}.")
            if self._check_target_module_exists(config, path):
                targets[path] = module
        return targets

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config.layer_config(current_key)
        owners, dtypes = self._shared(adapter_name, current_key)
        layer = target if isinstance(target, AdaptedLinear) else self.tuner_layer_cls(target)
        layer.update_layer(adapter_name, config, owners, dtypes)
        if adapter_name not in self.active_adapters:
            layer.adapters[adapter_name].requires_grad_(False)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    def _shared(self, adapter_name: str, path: str) -> tuple[dict[str, Adapter], dict[str, torch.dtype]]:
        """Of a layer that is made: the owners of its shared parameters, and the dtypes of those that it owns."""
        return {}, {}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # A key that no parameter of the model has is passed on as it is, and would be ignored.
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        place = f".{cls.tuner_layer_cls.adapter_layer_names[0]}."
        if unknown := [key for key in remapped if place in key and f"{place}{adapter_name}." not in key]:
            raise ValueError(
                f"this checkpoint has {len(unknown)} parameters that the model has no place for, {unknown[0]!r} first: "
                "it comes from another configuration, or a newer version of glora_kernels"
            )
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Inside, every layer is called with the adapter of each row of the batch."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, AdaptedLinear)]
        if unknown := sorted(set(names) - {BASE}.union(*(layer.adapters for layer in layers))):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # Beam search repeats each row for the beams, but not for an encoder, which runs before it.
        repeated = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        has_encoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoding = set(self.model.get_encoder().modules()) if has_encoder else set()
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (AdaptedLinear, AuxiliaryTrainingWrapper)):
                    hook = partial(_with_names, names if module in encoding else repeated)
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


class GLoRAPeftModel(AdaptedModel):
    """PEFT's tuner of "GKGLORA"; made by `get_peft_model` with a `GLoRAPeftConfig`."""

    prefix = "gkglora_"
    tuner_layer_cls = GLoRAPeftLinear

    def _plan(self, config: GLoRAPeftConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        for pattern in (config.patterns or {}) if targets else ():
            if not any(matches(path, pattern) for path in targets):
                raise ValueError(f"patterns: {pattern!r} matches none of the {len(targets)} layers that are adapted")


def _with_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
