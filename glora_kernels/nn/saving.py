"""Saving the adapters of a model, and what of a model an adapter file has."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace as changed
from pathlib import Path

from torch import Tensor, nn

from glora_kernels.nn.expert_linear import common_of
from glora_kernels.nn.file import Adapter, LayerEntry, host_copy, save_tensors, write
from glora_kernels.nn.formats.places import Prefix
from glora_kernels.nn.formats.write import plan
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import clean, join, layers_of, named_layers, trained_of, unwrap
from glora_kernels.nn.named import FIRST
from glora_kernels.nn.patterns import some_of
from glora_kernels.nn.ranks import mesh_of, on_first_rank, whole
from glora_kernels.nn.several import check_known
from glora_kernels.nn.siblings import tied_sets


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = FIRST,
    *,
    format: str | None = None,
    prefix: Prefix = None,
) -> None:
    """Write an adapter and the modules trained whole (`inject(..., train=...)`) to one safetensors file.

    The file appears complete or not at all: a temporary file is written, flushed to disk, and renamed. A shared
    factor is stored once, with all its names. A bias of the base that was made trainable is saved too.
    Works while merged.

    With a sharded model (FSDP2, tensor parallelism) every rank must call this: the parameters are gathered one at a
    time, the first rank of the mesh writes the same file as for an unsharded model, the others wait. With a model that
    every rank has in full (DistributedDataParallel) every caller writes: let one rank call.

    Args:
        model: a model with GLoRA layers. It may be wrapped (torch.compile, DistributedDataParallel, AveragedModel,
            ...); the file has the names of the model inside.
        path: the file; an existing one is replaced.
        name: of the adapter, where the model has several (`add_adapter`). The file does not say it.
        format: None: this library's own, which holds everything. Others are for the programs that read them, and hold
            low-rank adapters of linear layers and convolutions only: "lycoris" (GLoRA of the product variant,
            ΔW = s·(W·a1·a2 + b1·b2), and LoRA; for ComfyUI and LyCORIS), "kohya" (LoRA: lora_down, lora_up, alpha) and
            "peft" (LoRA: lora_A, lora_B; for diffusers and ComfyUI, which know no scale there: s is multiplied into
            lora_B). They do not say which dropout there was; a factor shared by several layers is written for each.
        prefix: with a format, what comes before a layer's path in the names of the file. None: "lycoris_",
            "lora_unet_" or "transformer.". A mapping gives the parts of a model prefixes of their own:
            {"unet": "lora_unet_", "text_encoder": "lora_te_"}.

    Raises:
        ValueError: the model has no GLoRA layer or no adapter of this name, parameters on the meta device, or parts of
            parameters under the first FSDP; or the format cannot hold a layer, which the message names.
        FileNotFoundError: the directory does not exist.
        RuntimeError: the model is sharded, and the first rank failed.

    Warns:
        UserWarning: other parameters require a gradient as well; they are not saved.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(), target_modules=["0"])
        >>> gk.save_adapter(model, "adapter.safetensors")
        >>> gk.save_adapter(model, "for-kohya.safetensors", format="kohya")
    """
    root = unwrap(model)
    layers = layers_of(model, "save_adapter")
    mesh = mesh_of(root)
    target = on_first_rank(mesh, "save_adapter", lambda: _target(path))
    check_known(layers, name, "save_adapter")
    if committed := [full for full, layer in layers.items() if layer.committed]:
        raise ValueError(
            f"save_adapter: an adapter of {committed[0]!r} was merged into its base for good (restart), and a file of "
            "the present one would leave that out; save the model's state_dict, or restart(into='chain')"
        )
    adapter = held_adapter(root, name)
    state = adapter.values()
    foreign = None
    if format is not None:
        if of_experts := [path for path, entry in adapter.layers.items() if entry.experts]:
            raise ValueError(
                f"format={format!r} has no place for {of_experts[0]!r}, a layer of experts; without format= the file "
                "has all"
            )
        inside = {join(path, own) for path, entry in adapter.layers.items() for own in entry.names}
        configs = {path: entry.config for path, entry in adapter.layers.items()}
        kernels = {path: entry.kernel for path, entry in adapter.layers.items()}
        foreign = plan(configs, state.keys() - inside, format, prefix, kernels)
    elif prefix is not None:
        raise ValueError(f"save_adapter: prefix={prefix!r} is for the names in files of another format; give format=")
    _warn_unsaved(root, layers, adapter)
    for name, entry in adapter.layers.items():
        for own, shape in entry.shapes().items():
            full = join(name, own)
            if (found := tuple(state[full].shape)) != shape:
                raise ValueError(
                    f"save_adapter: {full!r} has shape {found} in place of {shape}, as a part of a sharded parameter "
                    "has; under the first FSDP, save inside FullyShardedDataParallel.summon_full_params(model)"
                )
    if meta := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"save_adapter: {meta[0]!r} is on the meta device and has no values")
    tensors = {}
    for name, tensor in adapter.tensors.items():
        gathered = whole(tensor)
        if target is not None:
            tensors[name] = host_copy(gathered)
    adapter = changed(adapter, tensors=tensors)

    def written() -> None:
        if target is not None and foreign is not None:
            save_tensors(target, foreign.tensors(adapter.values()), foreign.header)
        elif target is not None:
            write(adapter, target)

    on_first_rank(mesh, "save_adapter", written)


def held_adapter(root: nn.Module, name: str, biases: Collection[str] | None = None) -> Adapter:
    """An adapter of a model, without copies. biases: layers whose bias counts as trained; None: ask requires_grad."""
    entries: dict[str, LayerEntry] = {}
    trained = trained_of(root)
    state: dict[str, Tensor] = {}
    layers = {path: layer for path, layer in named_layers(root).items() if name in layer.adapter_names()}
    for path, layer in layers.items():
        parameters, config = layer.saved_adapter(name)
        base_bias, bias = layer.base_bias, layer.bias
        is_trained = bias is not None and bias.requires_grad if biases is None else path in biases
        has_bias = base_bias is not None
        sizes, common = (layer.in_features, layer.out_features), common_of(parameters) if layer.experts else ()
        entries[path] = LayerEntry(
            config, *sizes, has_bias, has_bias and is_trained, layer.experts, common, layer.kernel
        )
        state |= {join(path, own): parameter for own, parameter in parameters.items()}
        if base_bias is not None and is_trained:
            state[join(path, "bias")] = base_bias
    state |= trained_state(trained)
    tied = shared_names(state)
    tensors = {full: tensor for full, tensor in state.items() if full not in tied}
    return Adapter(entries, sorted(trained), tied, tensors, tied_sets(layers) if name == FIRST else [])


def trained_state(trained: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the modules trained whole, by full name; no copies."""
    state: dict[str, Tensor] = {}
    for path, module in trained.items():
        for name, value in module.state_dict(prefix=f"{path}.", keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{name!r} is state that is no tensor, which an adapter file cannot hold")
            state[clean(name)] = value
    return state


def shared_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each further name of a tensor to the first of its names in sorted order."""
    first: dict[int, str] = {}
    tied = {}
    for name in sorted(state):
        if (known := first.setdefault(id(state[name]), name)) != name:
            tied[name] = known
    return tied


def _warn_unsaved(root: nn.Module, layers: Mapping[str, GLoRALinear], adapter: Adapter) -> None:
    saved = set(map(id, adapter.tensors.values()))
    saved |= {id(p) for layer in layers.values() if not layer.is_intact for p in layer.parameters()}  # by their product
    saved |= {id(layers[path].bias) for path, entry in adapter.layers.items() if entry.train_bias}
    saved |= {id(p) for layer in layers.values() for p in layer.all_adapters()}  # the others have files of their own
    lost = [clean(name) for name, p in root.named_parameters() if p.requires_grad and id(p) not in saved]
    if lost:
        warnings.warn(
            f"save_adapter: {some_of(lost)} require a gradient but are not "
            "saved; name their modules in inject(..., train=[...]) to have them in the adapter",
            UserWarning,
            stacklevel=3,
        )


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save_adapter: the directory {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"save_adapter: {str(target)!r} is a directory; give the name of a file")
    return target
