"""Saving and loading the adapters of a model: its state against a file's, checked before it is changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace as changed
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from glora_kernels.nn.base import Base, M, base_of, unsupported
from glora_kernels.nn.file import Adapter, LayerEntry, host_copy, read, write
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.inject import Linear, linears, refuse_4bit, replace
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import TRAINED, all_paths, clean, named_layers, unwrap
from glora_kernels.nn.ranks import mesh_of, on_first_rank, refuse_sharded, whole
from glora_kernels.nn.share import Sharing, Tie, check_devices
from glora_kernels.nn.siblings import tied_sets
from glora_kernels.nn.undo import all_or_none
from glora_kernels.spec import GLoRAConfig

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that values are cast between; any other must be the model's own."""


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters and the modules trained whole (`inject(..., train=...)`) to one safetensors file.

    The file appears complete or not at all: it is written beside its place, flushed to disk, and renamed. A
    shared factor is stored once, with the names it has. A bias of the base that was made trainable is saved too.
    Works while merged.

    Of a sharded model (FSDP2) every rank must call this: the parts are gathered, one parameter at a time, the mesh's
    first rank writes the same file as of a model in one piece, the others wait. A model that every rank has in full
    (DistributedDataParallel) is written by whoever calls: let one rank do it.

    Args:
        model: a model with GLoRA layers, also inside torch.compile, DistributedDataParallel, AveragedModel and their
            like: the file has the names of the model inside.
        path: the file; an existing one is replaced.

    Raises:
        ValueError: the model has no GLoRA layer, parameters on the meta device, or parts of parameters under the
            first FSDP.
        FileNotFoundError: the directory does not exist.
        RuntimeError: the model is sharded, and the first rank failed.

    Warns:
        UserWarning: other parameters require a gradient as well; they are not saved.
    """
    root = unwrap(model)
    layers, trained = named_layers(root), _trained(root)
    if not layers:
        raise ValueError("save_adapter: the model has no GLoRA layer; call inject(model, config) first")
    mesh = mesh_of(root)
    target = on_first_rank(mesh, "save_adapter", lambda: _target(path))
    entries = {name: _entry(layer) for name, layer in layers.items()}
    state = _state(layers, entries) | _trained_state(trained)
    _warn_unsaved(root, layers, entries, state)
    for path, entry in entries.items():
        for name, shape in _shapes(path, entry).items():
            if (found := tuple(state[name].shape)) != shape:
                raise ValueError(
                    f"save_adapter: {name!r} has shape {found} in place of {shape}, as a part of a sharded parameter "
                    "has; under the first FSDP, save inside FullyShardedDataParallel.summon_full_params(model)"
                )
    if meta := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"save_adapter: {meta[0]!r} is on the meta device and has no values")
    tied = _ties(state)
    tensors = {}
    for name, tensor in state.items():
        if name not in tied:
            gathered = whole(tensor)
            if target is not None:
                tensors[name] = host_copy(gathered)
    adapter = Adapter(entries, sorted(trained), tied, tensors, tied_sets(layers))
    on_first_rank(mesh, "save_adapter", lambda: None if target is None else write(adapter, target))


@overload
def load_adapter(model: nn.Linear | QuantizedLinear, path: str | os.PathLike[str]) -> GLoRALinear: ...
@overload
def load_adapter(model: M, path: str | os.PathLike[str]) -> M: ...
def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load what `save_adapter` wrote. A plain model is injected first, exactly as the saved one was.

    An injected model must have the file's layers with the file's configurations (dropout may differ), the
    same modules trained whole, and share the factors that the file's model shared. Values are cast to the dtype
    of the model's parameters. In a plain model that is the base's, but fp32 over a 16-bit base unless they were saved
    in its very dtype: loading rounds nothing. Where it fails, at whatever point, the model is as before.

    Args:
        model: the plain or injected model; changed in place.
        path: the file.

    Returns:
        The model; where it is itself a linear layer, the GLoRALinear in its place.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, altered, no adapter or of a newer format, or it does not fit the
            model (a value beyond the model's dtype does not); the message names the first differences. Or the model
            is sharded already.
        RuntimeError: a layer of the model is merged.
    """
    refuse_sharded(unwrap(model), "load_adapter", "load the adapter before fully_shard")
    adapter = read(Path(path))
    where = f"load_adapter: {str(path)!r}"
    layers = named_layers(unwrap(model))
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"load_adapter: {merged[0]!r} is merged; call unmerge(model) first")
    for name, layer in layers.items():
        layer.check_intact(f"load_adapter: {name!r}")
    if layers:
        _check_layers(layers, adapter.layers, where)
    with all_or_none() as undo:
        if not layers:
            model = _inject(model, adapter, where, undo)
            layers = named_layers(unwrap(model))
        state = _state(layers, adapter.layers) | _trained_state(_trained(unwrap(model)))
        _check_injected(unwrap(model), adapter, state, where)
        values = {name: _cast(where, name, value, state[name].dtype) for name, value in adapter.values().items()}
        with torch.no_grad():
            for name, tensor in state.items():
                undo.callback(_put, tensor, host_copy(tensor))
                tensor.copy_(values[name])
        for name, layer in layers.items():
            if layer.bias is not None and adapter.layers[name].train_bias:
                undo.callback(layer.bias.requires_grad_, layer.bias.requires_grad)
                layer.bias.requires_grad_(True)
    return model


@torch.no_grad()
def _put(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)


def _cast(where: str, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a file in the dtype that the model has them in; none may become infinite."""
    cast = values.to(dtype)
    if values.is_floating_point() and (cast.isinf() & ~values.isinf()).any():
        raise ValueError(
            f"{where} holds {name!r} in {values.dtype} with values beyond {dtype}, in which the model has it"
        )
    return cast


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save_adapter: the directory {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"save_adapter: {str(target)!r} is a directory; give the name of a file")
    return target


def _inject(model: nn.Module, adapter: Adapter, where: str, undo: ExitStack) -> nn.Module:
    """Give a plain model the file's layers, once everything about the two was found to fit."""
    root = unwrap(model)
    found = {path: linear for linear in linears(root) for path in linear.paths}
    modules = dict(all_paths(root))
    values = adapter.values()
    plan: list[tuple[Linear, GLoRAConfig, torch.dtype | None]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    bases: dict[str, Base] = {}
    biases: dict[str, Tensor] = {}
    shared = {*adapter.tied, *adapter.tied.values()}
    alone: list[Tie] = []  # factors in fp32 beside others in the dtype of the base
    for path, entry in adapter.layers.items():
        if path not in found:
            has = f"a {type(modules[path]).__name__}" if path in modules else "no module"
            raise ValueError(f"{where} adapts a linear layer {path!r}, where the model has {has}")
        if path != (first := found[path].paths[0]):
            raise ValueError(f"{where} adapts {path!r}, which in the model is one module with {first!r}")
        module = found[path].module
        if reason := unsupported(module):
            raise ValueError(f"{where} adapts {path!r}, which cannot be replaced: {reason}")
        base = base_of(module)
        if base is None or base.weight.is_meta:
            raise ValueError(f"{where}: the weight of {path!r} is on the meta device; load the base model first")
        (out_features, in_features), bias = base.shape, base.bias
        fitting = changed(entry, in_features=in_features, out_features=out_features, bias=bias is not None)
        _check_entry(where, path, entry, fitting)
        expected = _shapes(path, entry)
        shapes |= expected
        names = entry.config.parameter_shapes(in_features, out_features, entry.bias)
        own = [name for name in names if (full := _join(path, name)) in values and full not in shared]
        wide = [name for name in own if _dtype(values[_join(path, name)], base) != base.dtype]
        every = bool(wide) and wide == own
        plan.append((found[path], entry.config, torch.float32 if every else base.dtype))
        alone += [] if every else [Tie(((path, name),), torch.float32) for name in wide]
        bases[path] = base
        if entry.train_bias and bias is not None:
            biases[_join(path, "bias")] = bias
    if absent := sorted(set(adapter.train) - set(modules)):
        raise ValueError(f"{where} trains the module {absent[0]!r}, which the model does not have")
    trained = {path: modules[path] for path in adapter.train}
    for path, module in trained.items():
        refuse_4bit(path, module)
    kept = _trained_state(trained) | biases  # what the model has and shares already
    shapes |= {name: tuple(tensor.shape) for name, tensor in kept.items()}
    _check_values(where, shapes, values, kept)
    for name, first in adapter.tied.items():
        if (name in kept) != (first in kept):
            raise ValueError(f"{where} ties {name!r} to {first!r}, an adapter to a module trained whole")
    _check_ties(where, {name: first for name, first in adapter.tied.items() if name in kept}, _ties(kept))
    ties = {name: first for name, first in adapter.tied.items() if name not in kept}
    # Modules that were trained in fp32 inside a 16-bit model are so again.
    kept_fp32 = {name for name, value in values.items() if value.dtype == torch.float32}
    widened = [m for path, m in trained.items() if not kept_fp32.isdisjoint(_trained_state({path: m}))]
    sharing = Sharing(_planned_ties(ties, values, bases) + alone, adapter.siblings)
    return replace(model, plan, trained, sharing, undo, widened)


def _planned_ties(tied: Mapping[str, str], values: Mapping[str, Tensor], bases: Mapping[str, Base]) -> list[Tie]:
    """The ties of a file's adapters, which a plain model does not have yet; `bases` by path."""
    groups: dict[str, list[str]] = {}
    for name, first in tied.items():
        groups.setdefault(first, [first]).append(name)
    ties = []
    for first, names in groups.items():
        factors = tuple((path, own) for path, _, own in (name.rpartition(".") for name in names))
        check_devices(factors, {path: base.weight.device for path, base in bases.items()})
        ties.append(Tie(factors, _dtype(values[first], bases[factors[0][0]])))
    return ties


def _dtype(saved: Tensor, base: Base) -> torch.dtype:
    """Of an adapter that is made for a saved one: the base's, but over 16 bits fp32 where that would round."""
    return torch.float32 if base.dtype.itemsize == 2 and saved.dtype != base.dtype else base.dtype


def _check_layers(layers: Mapping[str, GLoRALinear], entries: Mapping[str, LayerEntry], where: str) -> None:
    _same_names(where, "adapts the layers", set(entries), set(layers))
    for path, layer in layers.items():
        _check_entry(where, path, entries[path], _entry(layer))


def _check_injected(root: nn.Module, adapter: Adapter, state: Mapping[str, Tensor], where: str) -> None:
    _same_names(where, "trains the modules", set(adapter.train), set(_trained(root)))
    _check_values(where, {name: tuple(tensor.shape) for name, tensor in state.items()}, adapter.values(), state)
    _check_ties(where, adapter.tied, _ties(state))
    _check_siblings(where, adapter.siblings, tied_sets(named_layers(root)))


def _check_entry(where: str, path: str, given: LayerEntry, own: LayerEntry) -> None:
    """The file's entry for a layer against the model's: everything but dropout and train_bias."""
    have, want = given.config.to_dict(), own.config.to_dict()
    have |= {"in_features": given.in_features, "out_features": given.out_features, "bias": given.bias}
    want |= {"in_features": own.in_features, "out_features": own.out_features, "bias": own.bias}
    if differing := [key for key in have if key != "dropout" and have[key] != want[key]]:
        first = ", ".join(f"{key}={have[key]!r} (the model: {want[key]!r})" for key in differing[:4])
        raise ValueError(
            f"{where} does not fit the layer {path!r}: it has {first}. Load it into the plain base model, which gets "
            f"its adapters from the file, or inject the configuration of the file: {given.config}"
        )


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
        own = state[name].dtype if name in state else torch.float32
        if (given := values[name].dtype) != own and not (given in _FLOATS and own in _FLOATS):
            raise ValueError(f"{where} holds {name!r} in {given}; the model takes {own}")
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{where}: {name!r} is on the meta device in the model; load the base model first")


def _check_ties(where: str, given: Mapping[str, str], own: Mapping[str, str]) -> None:
    if differing := sorted(given.items() ^ own.items()):
        name, first = differing[0]
        has, lacks = ("the file", "the model") if (name, first) in given.items() else ("the model", "the file")
        reason = "one value cannot stand for several"
        if (saved := _shared_names(given)) != (here := _shared_names(own)):
            reason = f"the file shares {saved} of its layers, the model {here}, and {reason}"
        raise ValueError(
            f"{where} does not fit the model: {has} shares {name!r} with {first!r}, {lacks} does not; {reason}"
        )


def _check_siblings(where: str, given: list[list[str]], own: list[list[str]]) -> None:
    if differing := sorted({tuple(sorted(group)) for group in given} ^ {tuple(sorted(group)) for group in own}):
        has, lacks = ("the model", "the file") if list(differing[0]) in map(sorted, own) else ("the file", "the model")
        raise ValueError(
            f"{where} does not fit the model: {has} ties {list(differing[0])} as siblings, with one dropout mask, "
            f"{lacks} does not"
        )


def _shared_names(tied: Mapping[str, str]) -> str:
    return " and ".join(sorted({first.rpartition(".")[2] for first in tied.values()})) or "nothing"


def _same_names(where: str, what: str, given: set[str], own: set[str]) -> None:
    if given == own:
        return
    parts = []
    if more := sorted(given - own):
        parts.append(f"{more[:4]}{' ...' if len(more) > 4 else ''}, which the model lacks")
    if less := sorted(own - given):
        parts.append(f"not {less[:4]}{' ...' if len(less) > 4 else ''}, which the model has")
    raise ValueError(f"{where} {what} {'; and '.join(parts)}")


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
    saved |= {id(p) for layer in layers.values() if not layer.is_intact for p in layer.parameters()}  # by their product
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
