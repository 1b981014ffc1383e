"""PEFT's tuner of GLoRA: replacing the target modules, batches of several adapters, sums of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from glora_kernels.integrations.peft.layer import BASE, AdaptedLinear, GLoRAPeftLinear, unfit
from glora_kernels.nn.adapted import weighted_sum
from glora_kernels.nn.biases import added_biases, keep_biases, warn_of_biases
from glora_kernels.nn.door import refuse, warn_skipped
from glora_kernels.nn.named import NamedAdapter
from glora_kernels.nn.projections import guard, unguard
from glora_kernels.nn.undo import all_or_none
from glora_kernels.quant.bnb import keep_codes
from glora_kernels.spec import SCALED


class AdaptedModel(BaseTuner):
    """The base class of both tuners: every target is checked before the first is replaced."""

    tuner_layer_cls: Any
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_GLORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # PEFT calls this when the configuration's targets are set, before it replaces the first.
        if peft_config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f"bias={peft_config.bias!r} needs PEFT 0.21: older ones do not save the trained biases")
        everything = peft_config.target_modules == "all-linear"  # PEFT will replace this string by names
        targets = self._targets(peft_config, model)
        refuse(model, {p: m for p, m in targets.items() if not isinstance(m, AdaptedLinear)}, "adapted", unfit)
        self._configs = peft_config.layer_configs(targets.keys())
        self._plan(peft_config, model, targets)
        keep_codes(model)
        if everything:
            warn_skipped(type(peft_config).__name__, model, ())

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """PEFT's method; then an error stands where a module would fuse projections without their adapters."""
        super().inject_adapter(model, *args, **kwargs)
        with all_or_none() as undo:
            guard(model, undo)

    def _plan(self, config: Any, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        """Decide which factors the target layers share; by default none."""

    def _targets(self, config: Any, model: nn.Module) -> dict[str, nn.Module]:
        """The targets of a configuration, by path; a target that is adapted already is the PEFT layer."""
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
        config = self._configs[current_key]
        owners, dtypes = self._shared(adapter_name, current_key)
        layer = target if isinstance(target, AdaptedLinear) else self.tuner_layer_cls(target)
        layer.update_layer(adapter_name, config, owners, dtypes)
        if adapter_name not in self.active_adapters:
            layer.adapters[adapter_name].requires_grad_(False)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    def _shared(self, adapter_name: str, path: str) -> tuple[dict[str, NamedAdapter], dict[str, torch.dtype]]:
        """(owners, dtypes) of the layer at `path`, as `update_layer` takes them."""
        return {}, {}

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's method, with a warning where a layer gets a bias that is dropped when the model is loaded again."""
        layers, bare = self._bare()
        super().merge_adapter(*args, **kwargs)
        assert self.model is not None
        warn_of_biases("merge_adapter", added_biases(self.model, _with_bias(layers, bare)), 2)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers, bare = self._bare()  # keeps all layers alive: unmerging asks others with the same weight
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        unguard(model)
        found = added_biases(model, _with_bias(layers, bare))
        keep_biases(dict(model.named_modules()), found)
        if found.lost:
            warn_of_biases("merge_and_unload", found, 3)
        return model

    def _bare(self) -> tuple[dict[str, AdaptedLinear], list[str]]:
        """All layers by path, and the paths of those whose base has no bias."""
        layers = self._layers()
        return layers, [path for path, layer in layers.items() if layer.base_layer.bias is None]

    def _layers(self) -> dict[str, AdaptedLinear]:
        return {path: layer for path, layer in self.model.named_modules() if isinstance(layer, AdaptedLinear)}

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter that changes every layer by Σ_i w_i·ΔW_i of other adapters exactly, and its bias likewise.

        Args:
            adapters: the names of the adapters to add up.
            weights: a number for each; negative ones subtract.
            adapter_name: of the new adapter. Its r is the sum of theirs, its alpha is None.
            combination_type: "cat", PEFT's name for this sum.

        Raises:
            ValueError: adapters that do not exist; an adapter_name that exists; another combination_type; adapters of
                different forms. Nothing has changed then.
        """
        if combination_type != "cat":
            raise ValueError(
                f"combination_type must be 'cat', the exact sum, for this method; got {combination_type!r}"
            )
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters: {missing} are not among {list(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: there is an adapter {adapter_name!r} already")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"adapters and weights must be as many, one or more; got {len(adapters)} and {len(weights)}"
            )
        self.peft_config[adapter_name] = _weighted_config([self.peft_config[name] for name in adapters], adapters)
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for layer in self._layers().values():
            if adapter_name in layer.adapters:
                _write_weighted(layer, adapters, weights, adapter_name)

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> None:
        """Raise a ValueError: the method is for LoRA whose initialisation changes the base (PiSSA, OLoRA)."""
        raise ValueError(
            "subtract_mutated_init is for LoRA whose initialisation changes the base; adapters of this method never "
            "change it: save them as they are"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT leaves keys that fit no parameter of the model as they are, and would then ignore them.
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
        """Inside, every layer gets the adapter names of the rows of the batch."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {BASE}.union(*(layer.adapters for layer in self._layers().values()))
        if unknown := sorted(set(names) - known):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # Beam search repeats each row for every beam, except in the encoder, which runs first.
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


def _with_bias(layers: dict[str, AdaptedLinear], paths: list[str]) -> list[str]:
    return [path for path in paths if layers[path].base_layer.bias is not None]


def _with_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


_MAY_DIFFER = (
    "r", *SCALED, "dropout", "init", "inference_mode", "revision", "base_model_name_or_path", "runtime_config",
)  # fmt: skip


def _weighted_config(configs: Sequence[Any], names: Sequence[str]) -> Any:
    """The configuration of the sum of adapters.

    Raises a ValueError where they differ in other fields than `_MAY_DIFFER`, or have `patterns`, `modules_to_save` or
    `bias`, which cannot be added up.
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
    unscaled = dict.fromkeys(name for name in SCALED if hasattr(first, name))
    return replace(first, r=sum(config.r for config in configs), **unscaled, inference_mode=False)


@torch.no_grad()
def _write_weighted(layer: AdaptedLinear, names: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Write the sum into the parameters that the layer's new adapter owns, computed in float64 and rounded once."""
    sources = []
    for source in names:
        operands = layer.adapters[source].operands()
        tensors = {own: None if tensor is None else tensor.double() for own, tensor in operands.tensors.items()}
        sources.append(operands._replace(tensors=tensors))
    summed: dict[str, Any] = weighted_sum(sources, weights)
    for own, parameter in layer.adapters[name].named_parameters():
        parameter.copy_(summed[own])
