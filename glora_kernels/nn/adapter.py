"""Saving and loading the adapters of a model: its state against a file's, checked before it is changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace as changed
from pathlib import Path

import torch
from torch import Tensor, nn

from glora_kernels.nn.file import Adapter, LayerEntry, host_copy, read, write
from glora_kernels.nn.inject import TRAINED, Linear, linears, replace
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import all_paths, clean, named_layers, unwrap
from glora_kernels.spec import GLoRAConfig


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters and the modules trained whole (`inject(..., train=...)`) to one safetensors file.

    The file appears complete or not at all: it is written beside its place, flushed to disk, and renamed. A
    bias of the base that was made trainable is saved too. Works while merged.

    Args:
        model: a model with GLoRA layers, also inside torch.compile or DistributedDataParallel.
        path: the file; an existing one is replaced.

    Raises:
        ValueError: the model has no GLoRA layer, or parameters on the meta device or sharded ones.
        FileNotFoundError: the directory does not exist.

    Warns:
        UserWarning: other parameters require a gradient as well; they are not saved.
    """
    root = unwrap(model)
    layers, trained = named_layers(root), _trained(root)
    if not layers:
        raise ValueError("save_adapter: the model has no GLoRA layer; call inject(model, config) first")
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save_adapter: the directory {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"save_adapter: {str(target)!r} is a directory; give the name of a file")
    entries = {name: _entry(layer) for name, layer in layers.items()}
    state = _state(layers, entries) | _trained_state(trained)
    _warn_unsaved(root, layers, entries, state)
    tied = _ties(state)
    tensors = {name: host_copy(name, tensor) for name, tensor in state.items() if name not in tied}
    write(Adapter(entries, sorted(trained), tied, tensors), target)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load what `save_adapter` wrote. A plain model is injected first, exactly as the saved one was.

    An injected model must have the file's layers with the file's configurations (dropout may differ) and the
    same modules trained whole. Values are cast to the dtype of the model's parameters; over a plain 16-bit
    base, adapters that were saved in fp32 stay fp32. Everything is checked before anything is changed.

    Args:
        model: the plain or injected model; changed in place.
        path: the file.

    Returns:
        The model; where it is itself a linear layer, the GLoRALinear in its place.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, altered, no adapter or of a newer format, or it does not fit the
            model; the message names the first differences.
        RuntimeError: a layer of the model is merged.
    """
    adapter = read(Path(path))
    where = f"load_adapter: {str(path)!r}"
    layers = named_layers(unwrap(model))
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"load_adapter: {merged[0]!r} is merged; call unmerge(model) first")
    if not layers:
        model = _inject(model, adapter, where)
        layers = named_layers(unwrap(model))
        _tie(layers, adapter.tied)
    else:
        _check_layers(layers, adapter.layers, where)
    state = _state(layers, adapter.layers) | _trained_state(_trained(unwrap(model)))
    _check_injected(unwrap(model), adapter, state, where)
    values = adapter.values()
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(values[name])
    for name, layer in layers.items():
        if layer.bias is not None and adapter.layers[name].train_bias:
            layer.bias.requires_grad_(True)
    return model


def _inject(model: nn.Module, adapter: Adapter, where: str) -> nn.Module:
    """Give a plain model the file's layers, once everything about the two was found to fit."""
    root = unwrap(model)
    found = {path: linear for linear in linears(root) for path in linear.paths}
    modules = dict(all_paths(root))
    values = adapter.values()
    plan: list[tuple[Linear, GLoRAConfig, torch.dtype | None]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for path, entry in adapter.layers.items():
        if path not in found:
            has = f"a {type(modules[path]).__name__}" if path in modules else "no module"
            raise ValueError(f"{where} adapts a linear layer {path!r}, where the model has {has}")
        if path != (first := found[path].paths[0]):
            raise ValueError(f"{where} adapts {path!r}, which in the model is one module with {first!r}")
        module = found[path].module
        parameters = module._parameters
        weight = parameters["weight"]
        if weight is None or weight.is_meta:
            raise ValueError(f"{where}: the weight of {path!r} is on the meta device; load the base model first")
        out_features, in_features = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
        own = changed(
            entry, in_features=in_features, out_features=out_features, bias=parameters.get("bias") is not None
        )
        _check_entry(where, path, entry, own)
        expected = _shapes(path, entry)
        shapes |= expected
        # fp32 adapters over a 16-bit base were asked for when made: rounding them would lose small ones.
        wide = any(values[name].dtype == torch.float32 for name in expected if name in values)
        plan.append((found[path], entry.config, torch.float32 if wide and weight.dtype.itemsize == 2 else None))
    if absent := sorted(set(adapter.train) - set(modules)):
        raise ValueError(f"{where} trains the module {absent[0]!r}, which the model does not have")
    trained = {path: modules[path] for path in adapter.train}
    trained_state = _trained_state(trained)
    shapes |= {name: tuple(tensor.shape) for name, tensor in trained_state.items()}
    _check_values(where, shapes, values, trained_state)
    names = {name for path, entry in adapter.layers.items() for name in _shapes(path, entry)}
    for name, first in adapter.tied.items():
        if (name in names) != (first in names):
            raise ValueError(f"{where} ties {name!r} to {first!r}, an adapter to a module trained whole")
    _check_ties(where, {k: v for k, v in adapter.tied.items() if k not in names}, _ties(trained_state))
    return replace(model, plan, trained)


def _check_layers(layers: Mapping[str, GLoRALinear], entries: Mapping[str, LayerEntry], where: str) -> None:
    _same_names(where, "adapts the layers", set(entries), set(layers))
    for path, layer in layers.items():
        _check_entry(where, path, entries[path], _entry(layer))


def _check_injected(root: nn.Module, adapter: Adapter, state: Mapping[str, Tensor], where: str) -> None:
    _same_names(where, "trains the modules", set(adapter.train), set(_trained(root)))
    _check_values(where, {name: tuple(tensor.shape) for name, tensor in state.items()}, adapter.values(), state)
    _check_ties(where, adapter.tied, _ties(state))


def _check_entry(where: str, path: str, given: LayerEntry, own: LayerEntry) -> None:
    """The file's entry for a layer against the model's: everything but dropout and train_bias."""
    have, want = given.config.to_dict(), own.config.to_dict()
    have |= {"in_features": given.in_features, "out_features": given.out_features, "bias": given.bias}
    want |= {"in_features": own.in_features, "out_features": own.out_features, "bias": own.bias}
    if differing := [key for key in have if key != "dropout" and have[key] != want[key]]:
        first = ", ".join(f"{key}={have[key]!r} (the model: {want[key]!r})" for key in differing[:4])
        raise ValueError(f"{where} does not fit the layer {path!r}: it has {first}")


def _check_values(
    where: str,
    expected: Mapping[str, tuple[int, ...]],
    values: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> None:
    _same_names(where, "holds the tensors", set(values), set(expected))
    for name, shape in expected.items():
        if tuple(values[name].shape) != shape:
            raise ValueError(f"{where} holds {name!r} with shape {tuple(values[name].shape)}; the model takes {shape}")
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{where}: {name!r} is on the meta device in the model; load the base model first")


def _check_ties(where: str, given: Mapping[str, str], own: Mapping[str, str]) -> None:
    if differing := sorted(given.items() ^ own.items()):
        name, first = differing[0]
        has, lacks = ("the file", "the model") if (name, first) in given.items() else ("the model", "the file")
        raise ValueError(f"{where} does not fit the model: {has} shares {name!r} with {first!r}, {lacks} does not")


def _same_names(where: str, what: str, given: set[str], own: set[str]) -> None:
    if given == own:
        return
    parts = []
    if more := sorted(given - own):
        parts.append(f"{more[:4]}{' ...' if len(more) > 4 else ''}, which the model lacks")
    if less := sorted(own - given):
        parts.append(f"not {less[:4]}{' ...' if len(less) > 4 else ''}, which the model has")
    raise ValueError(f"{where} {what} {'; and '.join(parts)}")


def _tie(layers: Mapping[str, GLoRALinear], tied: Mapping[str, str]) -> None:
    """Make the adapters share parameters as those in the file did."""
    for name, first in tied.items():
        path, _, own = name.rpartition(".")
        source, _, other = first.rpartition(".")
        if path in layers:
            layers[path]._parameters[own] = layers[source]._parameters[other]


def _state(layers: Mapping[str, GLoRALinear], entries: Mapping[str, LayerEntry]) -> dict[str, Tensor]:
    """The tensors of the adapters by full name, with the biases that `entries` says are trained."""
    state: dict[str, Tensor] = {}
    for path, layer in layers.items():
        state |= {_join(path, name): parameter for name, parameter in layer.adapter().items()}
        bias = layer.base_bias
        if entries[path].train_bias and bias is not None:
            state[_join(path, "bias")] = bias
    return state


def _shapes(path: str, entry: LayerEntry) -> dict[str, tuple[int, ...]]:
    shapes = entry.config.parameter_shapes(entry.in_features, entry.out_features, entry.bias)
    if entry.train_bias:
        shapes["bias"] = (entry.out_features,)
    return {_join(path, name): shape for name, shape in shapes.items()}


def _entry(layer: GLoRALinear) -> LayerEntry:
    has_bias = layer.base_bias is not None
    train_bias = has_bias and layer.bias is not None and layer.bias.requires_grad
    return LayerEntry(layer.config, layer.in_features, layer.out_features, has_bias, train_bias)


def _trained(root: nn.Module) -> dict[str, nn.Module]:
    return {clean(path): module for path, module in root.named_modules() if vars(module).get(TRAINED)}


def _trained_state(trained: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the modules trained whole, by full name; no copies."""
    state: dict[str, Tensor] = {}
    for path, module in trained.items():
        for name, value in module.state_dict(prefix=f"{path}.", keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{name!r} is state that is no tensor, which an adapter file cannot hold")
            state[clean(name)] = value
    return state


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name whose tensor has another name that comes before it in sorted order → the first of them."""
    first: dict[int, str] = {}
    tied = {}
    for name in sorted(state):
        if (known := first.setdefault(id(state[name]), name)) != name:
            tied[name] = known
    return tied


def _warn_unsaved(
    root: nn.Module,
    layers: Mapping[str, GLoRALinear],
    entries: Mapping[str, LayerEntry],
    state: Mapping[str, Tensor],
) -> None:
    saved = {id(tensor) for tensor in state.values()}
    saved |= {id(layer.bias) for path, layer in layers.items() if entries[path].train_bias}
    lost = [clean(name) for name, p in root.named_parameters() if p.requires_grad and id(p) not in saved]
    if lost:
        warnings.warn(
            f"save_adapter: {lost[:4]}{' ...' if len(lost) > 4 else ''} require a gradient but are not "
            "saved; name their modules in inject(..., train=[...]) to have them in the adapter",
            UserWarning,
            stacklevel=3,
        )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
