"""Saving and loading the adapters of a model; a file is checked against the model before the model is changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace as changed
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from glora_kernels.nn.base import M, unsupported
from glora_kernels.nn.file import Adapter, LayerEntry, host_copy, read, write
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.inject import Planned, check_replaceable, replace
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import all_paths, clean, join, layers_of, named_layers, trained_of, unwrap
from glora_kernels.nn.named import FIRST
from glora_kernels.nn.patterns import some_of
from glora_kernels.nn.ranks import mesh_of, on_first_rank, refuse_sharded, whole
from glora_kernels.nn.several import adapters, check_known, check_new, put_beside
from glora_kernels.nn.share import Sharing, Tie, check_devices
from glora_kernels.nn.siblings import tied_sets
from glora_kernels.nn.targets import Linear, linears, refuse_4bit
from glora_kernels.nn.undo import all_or_none

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that loading casts between; a tensor of any other dtype must have it in the model too."""


def save_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = FIRST) -> None:
    """Write an adapter and the modules trained whole (`inject(..., train=...)`) to one safetensors file.

    The file appears complete or not at all: a temporary file is written, flushed to disk, and renamed. A shared
    factor is stored once, with all its names. A bias of the base that was made trainable is saved too.
    Works while merged.

    With a sharded model (FSDP2) every rank must call this: the parameters are gathered one at a time, the first rank
    of the mesh writes the same file as for an unsharded model, the others wait. With a model that every rank has in
    full (DistributedDataParallel) every caller writes: let one rank call.

    Args:
        model: a model with GLoRA layers. It may be wrapped (torch.compile, DistributedDataParallel, AveragedModel,
            ...); the file has the names of the model inside.
        path: the file; an existing one is replaced.
        name: of the adapter, where the model has several (`add_adapter`). The file does not say it.

    Raises:
        ValueError: the model has no GLoRA layer or no adapter of this name, parameters on the meta device, or parts of
            parameters under the first FSDP.
        FileNotFoundError: the directory does not exist.
        RuntimeError: the model is sharded, and the first rank failed.

    Warns:
        UserWarning: other parameters require a gradient as well; they are not saved.
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
    adapter = _adapter_of(root, name)
    state = adapter.values()
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
    on_first_rank(mesh, "save_adapter", lambda: None if target is None else write(adapter, target))


@overload
def load_adapter(model: nn.Linear | QuantizedLinear, path: str | os.PathLike[str], name: str = ...) -> GLoRALinear: ...
@overload
def load_adapter(model: M, path: str | os.PathLike[str], name: str = ...) -> M: ...
def load_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = FIRST) -> nn.Module:
    """Load a file of `save_adapter`. A plain model is injected first, exactly as the saved one was.

    A model with GLoRA layers gets an adapter that it does not have yet beside the others, as `add_adapter` adds it. One
    that it has gets the file's values in the same memory, so that nothing is compiled again and captured graphs use
    them. For that the file must fit: the model must have the file's layers with the file's configurations (dropout may
    differ), the same modules trained whole, and share the factors that the file's model shared. Values are cast to the
    dtype of the model's parameters. A plain model gets parameters in the dtype of the base; over a 16-bit base fp32,
    unless the values were saved in the base's dtype, so that loading rounds nothing. After an error the model is as
    before.

    Args:
        model: the plain or injected model; changed in place.
        path: the file.
        name: of the adapter in the model.

    Returns:
        The model; where it is itself a linear layer, the GLoRALinear in its place.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, altered, no adapter or of a newer format; or a model with several adapters has
            other values in the modules that the file trains whole; or it does not fit the model (also
            where a value overflows the model's dtype), and the message names the first differences; or the model is
            sharded already.
        RuntimeError: a layer of the model is merged.
    """
    refuse_sharded(unwrap(model), "load_adapter", "load the adapter before fully_shard")
    adapter = read(Path(path))
    where = f"load_adapter: {str(path)!r}"
    layers = named_layers(unwrap(model))
    if merged := [full for full, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"load_adapter: {merged[0]!r} is merged; call unmerge(model) first")
    for full, layer in layers.items():
        layer.check_intact(f"load_adapter: {full!r}")
        if (held := layer.named().get(name)) is not None:
            held.check_intact(f"load_adapter: {full!r}")
    if name != FIRST:
        adapter = _untied(adapter, where)
    with all_or_none() as undo:
        if not layers:
            if name != FIRST:
                raise ValueError(f"load_adapter: a model gets its first adapter by the name {FIRST!r}, not {name!r}")
            model = _inject(model, adapter, where, undo)
        elif name not in adapters(model):
            _add(model, adapter, where, name, undo)
        root = unwrap(model)
        biases = [path for path, entry in adapter.layers.items() if entry.train_bias]
        own = _adapter_of(root, name, biases)
        state = own.values()
        _check_fits(where, adapter, own, state)
        if meta := [full for full, tensor in state.items() if tensor.is_meta]:
            raise ValueError(f"{where}: {meta[0]!r} is on the meta device in the model; load the base model first")
        values = {full: _cast(where, full, value, state[full].dtype) for full, value in adapter.values().items()}
        if len(adapters(model)) > 1:
            _check_common(where, root, own, state, values)
        with torch.no_grad():
            for full, tensor in state.items():
                undo.callback(tensor.detach().copy_, host_copy(tensor))
                tensor.copy_(values[full])
        layers = named_layers(root)
        for path in biases:
            if (bias := layers[path].bias) is not None:
                undo.callback(bias.requires_grad_, bias.requires_grad)
                bias.requires_grad_(True)
    return model


def _add(model: nn.Module, adapter: Adapter, where: str, name: str, undo: ExitStack) -> None:
    """Give a model with GLoRA layers a further adapter in the file's layers, after checking that they fit."""
    check_new(model, name, "load_adapter")
    root = unwrap(model)
    found = _found(root, adapter, where, adapted=True)
    values = adapter.values()
    ties = _planned_ties(adapter.tied, values, found)
    tied = {place for tie in ties for place in tie.factors}
    plan = {}
    for path, entry in adapter.layers.items():
        linear = found[path]
        _check_entry(where, path, entry, _entry_of(where, path, entry, linear))
        alone = [values[join(path, own)] for own in entry.config.parameter_shapes(1, 1, entry.bias)
                 if (path, own) not in tied]  # fmt: skip
        is_wide = any(_dtype(value, linear) != linear.base.dtype for value in alone)
        plan[linear] = entry.config, linear.adapter_dtype if is_wide else linear.base.dtype
    put_beside(model, name, plan, ties, undo)


def _untied(adapter: Adapter, where: str) -> Adapter:
    """The file's adapter without its siblings, which have one dropout mask; an error where there is dropout."""
    if adapter.siblings and any(entry.config.dropout for entry in adapter.layers.values()):
        raise ValueError(
            f"{where} has siblings with one dropout mask, which only the first adapter of a model can have; load it "
            f"into a model of its own, or as its first adapter ({FIRST!r})"
        )
    return changed(adapter, siblings=[])


def _check_common(
    where: str, root: nn.Module, own: Adapter, state: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Raise a ValueError where a file differs in what all adapters of a model have in common."""
    common = set(_trained_state(trained_of(root)))
    common |= {join(path, "bias") for path, entry in own.layers.items() if entry.train_bias}
    for name in sorted(common & state.keys()):
        if not torch.equal(state[name].detach().to(values[name].device), values[name]):
            raise ValueError(
                f"{where} was trained with other values of {name!r}, which all adapters of a model have in common; "
                "load it into a model of its own"
            )


def _cast(where: str, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a file cast to the dtype of the model; an error where one overflows to infinity."""
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
    """Give a plain model the file's layers, after checking that file and model fit."""
    root = unwrap(model)
    modules = dict(all_paths(root))
    found = _found(root, adapter, where)
    if absent := sorted(set(adapter.train) - set(modules)):
        raise ValueError(f"{where} trains the module {absent[0]!r}, which the model does not have")
    trained = {path: modules[path] for path in adapter.train}
    kept = _trained_state(trained)  # tensors that the model has already, with their sharing
    expected: dict[str, Tensor] = {}
    entries: dict[str, LayerEntry] = {}
    for path, entry in adapter.layers.items():
        entries[path] = own = _entry_of(where, path, entry, found[path])
        expected |= {join(path, name): torch.empty(shape, device="meta") for name, shape in own.shapes().items()}
        if entry.train_bias and (bias := found[path].base.bias) is not None:
            kept[join(path, "bias")] = bias
    for path, module in trained.items():
        refuse_4bit(path, module)
    new = {name: first for name, first in adapter.tied.items() if kept.keys().isdisjoint((name, first))}
    fitting = Adapter(entries, adapter.train, new | _ties(kept), {}, adapter.siblings)
    _check_fits(where, adapter, fitting, expected | kept)
    values = adapter.values()
    # Modules that were trained in fp32 inside a 16-bit model become fp32 again.
    kept_fp32 = {name for name, value in values.items() if value.dtype == torch.float32}
    widened = [m for path, m in trained.items() if not kept_fp32.isdisjoint(_trained_state({path: m}))]
    ties = _planned_ties(new, values, found)
    shared = {*adapter.tied, *adapter.tied.values(), *kept}
    plan: list[Planned] = []
    for path, entry in entries.items():
        linear, dtype = found[path], found[path].base.dtype
        alone = [name for name in entry.shapes() if join(path, name) not in shared]
        wide = [name for name in alone if _dtype(values[join(path, name)], linear) != dtype]
        every = bool(wide) and wide == alone
        plan.append((linear, entry.config, torch.float32 if every else dtype))
        ties += [] if every else [Tie(((path, name),), torch.float32) for name in wide]
    check_replaceable(root, [linear for linear, _, _ in plan])
    return replace(model, plan, trained, Sharing(ties, adapter.siblings), undo, widened)


def _found(root: nn.Module, adapter: Adapter, where: str, adapted: bool = False) -> dict[str, Linear]:
    """The linear layers of a model by path, and `adapted` its GLoRA layers; all of the file's are among them."""
    found = {path: linear for linear in linears(root, adapted) for path in linear.paths}
    if absent := [path for path in adapter.layers if path not in found]:
        modules = dict(all_paths(root))
        has = f"a {type(modules[absent[0]]).__name__}" if absent[0] in modules else "no module"
        raise ValueError(f"{where} adapts a linear layer {absent[0]!r}, where the model has {has}")
    return found


def _entry_of(where: str, path: str, entry: LayerEntry, linear: Linear) -> LayerEntry:
    """The file's entry with the sizes and bias of the model's layer; an error where that cannot be replaced."""
    if path != (first := linear.paths[0]):
        raise ValueError(f"{where} adapts {path!r}, which in the model is one module with {first!r}")
    is_adapted = isinstance(linear.module, GLoRALinear)
    if not is_adapted and (reason := unsupported(linear.module)):
        raise ValueError(f"{where} adapts {path!r}, which cannot be replaced: {reason}")
    if linear.base.weight.is_meta:
        raise ValueError(f"{where}: the weight of {path!r} is on the meta device; load the base model first")
    n, k = linear.base.shape
    bias = linear.module.base_bias if isinstance(linear.module, GLoRALinear) else linear.base.bias
    return changed(entry, in_features=k, out_features=n, bias=bias is not None)


def _planned_ties(tied: Mapping[str, str], values: Mapping[str, Tensor], found: Mapping[str, Linear]) -> list[Tie]:
    """The ties that a plain model needs for a file's shared factors. found: its linear layers by path."""
    groups: dict[str, list[str]] = {}
    for name, first in tied.items():
        groups.setdefault(first, [first]).append(name)
    ties = []
    for first, names in groups.items():
        factors = tuple((path, own) for path, _, own in (name.rpartition(".") for name in names))
        check_devices(factors, found)
        ties.append(Tie(factors, _dtype(values[first], found[factors[0][0]])))
    return ties


def _dtype(saved: Tensor, linear: Linear) -> torch.dtype:
    """The dtype of a new parameter for a saved value: the base's; over a 16-bit base fp32, where that would round."""
    return saved.dtype if saved.dtype == linear.base.dtype else linear.adapter_dtype


def _check_fits(where: str, adapter: Adapter, own: Adapter, state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError where a file's adapter differs from the model's. state: the model's tensors by every name."""
    _same_names(where, "adapts the layers", adapter.layers, own.layers)
    for path, entry in own.layers.items():
        _check_entry(where, path, adapter.layers[path], entry)
    _same_names(where, "trains the modules", adapter.train, own.train)
    values = adapter.values()
    _same_names(where, "holds the tensors", values, state)
    for name, tensor in state.items():
        value = values[name]
        if value.shape != tensor.shape:
            takes = tuple(tensor.shape)
            raise ValueError(f"{where} holds {name!r} with shape {tuple(value.shape)}; the model takes {takes}")
        if value.dtype != tensor.dtype and not (value.dtype in _FLOATS and tensor.dtype in _FLOATS):
            raise ValueError(f"{where} holds {name!r} in {value.dtype}; the model takes {tensor.dtype}")
    _check_sharing(where, adapter, own)


def _check_entry(where: str, path: str, given: LayerEntry, own: LayerEntry) -> None:
    """Raise a ValueError where the entries of file and model differ in anything but dropout and train_bias."""
    sizes = ("in_features", "out_features", "bias")
    have, want = (of.config.to_dict() | {name: getattr(of, name) for name in sizes} for of in (given, own))
    if differing := [key for key in have if key != "dropout" and have[key] != want[key]]:
        first = ", ".join(f"{key}={have[key]!r} (the model: {want[key]!r})" for key in differing[:4])
        raise ValueError(
            f"{where} does not fit the layer {path!r}: it has {first}. Load it into the plain base model, which gets "
            f"its adapters from the file, or inject the configuration of the file: {given.config}"
        )


def _check_sharing(where: str, adapter: Adapter, own: Adapter) -> None:
    """Raise a ValueError where file and model do not share the same factors and the same siblings' dropout masks."""
    given, mine = (
        {f"shares {name!r} with {first!r}" for name, first in of.tied.items()}
        | {f"ties {sorted(group)} as siblings, with one dropout mask" for group in of.siblings}
        for of in (adapter, own)
    )
    if differing := sorted(given ^ mine):
        has, lacks = ("the file", "the model") if differing[0] in given else ("the model", "the file")
        saved, here = (
            " and ".join(sorted({first.rpartition(".")[2] for first in of.tied.values()})) or "nothing"
            for of in (adapter, own)
        )
        reason = f"; the file shares {saved} of its layers, the model {here}, and one value cannot stand for several"
        raise ValueError(
            f"{where} does not fit the model: {has} {differing[0]}, {lacks} does not{reason if saved != here else ''}"
        )


def _same_names(where: str, what: str, given: Iterable[str], own: Iterable[str]) -> None:
    parts = []
    if more := sorted(set(given) - set(own)):
        parts.append(f"{some_of(more)}, which the model lacks")
    if less := sorted(set(own) - set(given)):
        parts.append(f"not {some_of(less)}, which the model has")
    if parts:
        raise ValueError(f"{where} {what} {'; and '.join(parts)}")


def _adapter_of(root: nn.Module, name: str, biases: Collection[str] | None = None) -> Adapter:
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
        entries[path] = LayerEntry(config, layer.in_features, layer.out_features, has_bias, has_bias and is_trained)
        state |= {join(path, own): parameter for own, parameter in parameters.items()}
        if base_bias is not None and is_trained:
            state[join(path, "bias")] = base_bias
    state |= _trained_state(trained)
    tied = _ties(state)
    tensors = {full: tensor for full, tensor in state.items() if full not in tied}
    return Adapter(entries, sorted(trained), tied, tensors, tied_sets(layers) if name == FIRST else [])


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
