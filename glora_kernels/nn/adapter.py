"""Loading the adapters of a model; a file is checked against the model before the model is changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from dataclasses import replace as changed
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from glora_kernels.nn.base import M
from glora_kernels.nn.file import Adapter, LayerEntry, host_copy, read
from glora_kernels.nn.formats.places import Prefix
from glora_kernels.nn.formats.read import FLOATS, adapter_of, as_in, is_foreign
from glora_kernels.nn.frozen import QuantizedLinear
from glora_kernels.nn.inject import Planned, check_replaceable, replace
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import all_paths, join, named_layers, trained_of, unwrap
from glora_kernels.nn.named import FIRST
from glora_kernels.nn.patterns import some_of
from glora_kernels.nn.ranks import own_part, part_of, refuse_fsdp
from glora_kernels.nn.saving import held_adapter, shared_names, trained_state
from glora_kernels.nn.several import adapters, check_new, put_beside
from glora_kernels.nn.share import Sharing, Tie, check_devices
from glora_kernels.nn.targets import Linear, linears, refuse_4bit
from glora_kernels.nn.undo import all_or_none


@overload
def load_adapter(
    model: nn.Linear | QuantizedLinear | nn.Conv1d | nn.Conv2d | nn.Conv3d,
    path: str | os.PathLike[str],
    name: str = ...,
    *,
    prefix: Prefix = ...,
    rs_lora: bool | None = ...,
) -> GLoRALinear: ...
@overload
def load_adapter(
    model: M,
    path: str | os.PathLike[str],
    name: str = ...,
    *,
    prefix: Prefix = ...,
    rs_lora: bool | None = ...,
) -> M: ...
def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = FIRST,
    *,
    prefix: Prefix = None,
    rs_lora: bool | None = None,
) -> nn.Module:
    """Load a file of `save_adapter`, or of another tool. A plain model is injected first, exactly as the saved one was.

    A model with GLoRA layers gets an adapter that it does not have yet beside the others, as `add_adapter` adds it. One
    that it has gets the file's values in the same memory, so that nothing is compiled again and captured graphs use
    them. For that the file must fit: the model must have the file's layers with the file's configurations (dropout may
    differ), the same modules trained whole, and share the factors that the file's model shared. Values are cast to the
    dtype of the model's parameters. A plain model gets parameters in the dtype of the base; over a 16-bit base fp32,
    unless the values were saved in the base's dtype, so that loading rounds nothing. After an error the model is as
    before. A model that is cut by tensor parallelism takes the file too, every rank its parts: all must read it.

    Files of other tools are read by their keys: GLoRA of LyCORIS (a1, a2, b1, b2; also with the roles that earlier
    versions gave these), which is variant="matmul" with alpha_A = alpha, and LoRA by kohya's names (lora_down,
    lora_up), as LyCORIS, kohya's scripts and others write, or by PEFT's (lora_A, lora_B); of linear layers and
    convolutions. The names of layers are looked up in the model. Training continues with the steps that it would have
    had there.

    Args:
        model: the plain or injected model; changed in place.
        path: the file.
        name: of the adapter in the model.
        prefix: of a file of another tool: what comes before a layer's path in its names. None: the one known prefix
            that all of them have (lycoris_, lora_unet_, lora_te_, lora_te1_, transformer., ...). With one given, names
            with other known prefixes are those of other models, and are left out. A mapping gives the parts of a model
            prefixes of their own: {"unet": "lora_unet_", "text_encoder": "lora_te_"}.
        rs_lora: of a file of LyCORIS: whether it was trained with rs_lora, s = alpha/√R in place of alpha/R. Needed
            where the file does not say it in its metadata, as its trainers write.

    Returns:
        The model; where it is itself a linear layer or a convolution, the GLoRA layer in its place.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, altered, no adapter or of a newer format; or it is another tool's and has
            what cannot be represented (DoRA, LoHa, Tucker cores, ...), or only a part of a layer; or a model with
            several adapters has other values in the modules that the file trains whole; or it does not fit the model
            (also where a value overflows the model's dtype), and the message names the first differences; or the model
            is sharded by FSDP already.
        RuntimeError: a layer of the model is merged.

    Examples:
        >>> base = nn.Sequential(nn.Linear(16, 4))
        >>> gk.save_adapter(gk.inject(copy.deepcopy(base), gk.GLoRAConfig(), ["0"]), "adapter.safetensors")
        >>> model = gk.load_adapter(base, "adapter.safetensors")  # a plain model gets the layers of the file
        >>> model[0].config.A
        'vector'
    """
    refuse_fsdp(unwrap(model), "load_adapter", "load the adapter before fully_shard")
    where = f"load_adapter: {str(path)!r}"
    layers = named_layers(unwrap(model))
    adapter = _read(unwrap(model), layers, Path(path), where, name, prefix, rs_lora)
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
        own = held_adapter(root, name, biases)
        state = own.values()
        _check_fits(where, adapter, own, state)
        if meta := [full for full, tensor in state.items() if tensor.is_meta]:
            raise ValueError(f"{where}: {meta[0]!r} is on the meta device in the model; load the base model first")
        values = {full: _cast(where, full, value, state[full].dtype) for full, value in adapter.values().items()}
        if len(adapters(model)) > 1:
            _check_common(where, root, own, state, values)
        with torch.no_grad():
            for full, tensor in state.items():
                part = own_part(tensor)
                undo.callback(part.detach().copy_, host_copy(part))
                part.copy_(part_of(values[full], tensor))
        layers = named_layers(root)
        for path in biases:
            if (bias := layers[path].bias) is not None:
                undo.callback(bias.requires_grad_, bias.requires_grad)
                bias.requires_grad_(True)
    return model


def _read(
    root: nn.Module,
    layers: Mapping[str, GLoRALinear],
    path: Path,
    where: str,
    name: str,
    prefix: Prefix,
    rs_lora: bool | None,
) -> Adapter:
    """The adapter of a file; of another tool's, with the model's own configurations where they say the same."""
    found = read(path, is_foreign)
    if isinstance(found, Adapter):
        for argument, value in (("prefix", prefix), ("rs_lora", rs_lora)):
            if value is not None:
                raise ValueError(f"{where} is a file of this library, which {argument}={value!r} does not apply to")
        return found
    try:
        adapter = adapter_of(found, root, prefix, rs_lora)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for full, entry in adapter.layers.items():
        if full in layers and name in layers[full].adapter_names():
            own = layers[full].saved_adapter(name)[1]
            adapter.layers[full] = changed(entry, config=as_in(entry.config, own))
    return adapter


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
    common = {path: entry.common for path, entry in adapter.layers.items()}
    put_beside(model, name, plan, ties, undo, common)


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
    common = set(trained_state(trained_of(root)))
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


def _inject(model: nn.Module, adapter: Adapter, where: str, undo: ExitStack) -> nn.Module:
    """Give a plain model the file's layers, after checking that file and model fit."""
    root = unwrap(model)
    modules = dict(all_paths(root))
    found = _found(root, adapter, where)
    if absent := sorted(set(adapter.train) - set(modules)):
        raise ValueError(f"{where} trains the module {absent[0]!r}, which the model does not have")
    trained = {path: modules[path] for path in adapter.train}
    kept = trained_state(trained)  # tensors that the model has already, with their sharing
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
    fitting = Adapter(entries, adapter.train, new | shared_names(kept), {}, adapter.siblings)
    _check_fits(where, adapter, fitting, expected | kept)
    values = adapter.values()
    # Modules that were trained in fp32 inside a 16-bit model become fp32 again.
    kept_fp32 = {name for name, value in values.items() if value.dtype == torch.float32}
    widened = [m for path, m in trained.items() if not kept_fp32.isdisjoint(trained_state({path: m}))]
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
    common = {path: entry.common for path, entry in entries.items()}
    return replace(model, plan, trained, Sharing(ties, adapter.siblings, common), undo, widened)


def _found(root: nn.Module, adapter: Adapter, where: str, adapted: bool = False) -> dict[str, Linear]:
    """The layers of a model to adapt by path, and `adapted` its GLoRA layers; all of the file's are among them."""
    found = {path: linear for linear in linears(root, adapted) for path in linear.paths}
    if absent := [path for path in adapter.layers if path not in found]:
        modules = dict(all_paths(root))
        has = f"a {type(modules[absent[0]]).__name__}" if absent[0] in modules else "no module"
        kind = "convolution" if adapter.layers[absent[0]].kernel else "linear layer"
        raise ValueError(f"{where} adapts a {kind} {absent[0]!r}, where the model has {has}")
    return found


def _entry_of(where: str, path: str, entry: LayerEntry, linear: Linear) -> LayerEntry:
    """The file's entry with the sizes and bias of the model's layer; an error where that cannot be replaced."""
    if path != (first := linear.paths[0]):
        raise ValueError(f"{where} adapts {path!r}, which in the model is one module with {first!r}")
    is_adapted = isinstance(linear.module, GLoRALinear)
    if not is_adapted and (reason := linear.refusal()):
        raise ValueError(f"{where} adapts {path!r}, which cannot be replaced: {reason}")
    if linear.base.weight.is_meta:
        raise ValueError(f"{where}: the weight of {path!r} is on the meta device; load the base model first")
    n, k = linear.base.shape
    bias = linear.module.base_bias if isinstance(linear.module, GLoRALinear) else linear.base.bias
    kernel, experts = linear.base.kernel, linear.experts
    return changed(entry, in_features=k, out_features=n, bias=bias is not None, experts=experts, kernel=kernel)


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
        if value.dtype != tensor.dtype and not (value.dtype in FLOATS and tensor.dtype in FLOATS):
            raise ValueError(f"{where} holds {name!r} in {value.dtype}; the model takes {tensor.dtype}")
    _check_sharing(where, adapter, own)


def _check_entry(where: str, path: str, given: LayerEntry, own: LayerEntry) -> None:
    """Raise a ValueError where the entries of file and model differ in anything but dropout and train_bias."""
    sizes = ("in_features", "out_features", "bias", "experts", "common", "kernel")
    have, want = (asdict(of.config) | {name: getattr(of, name) for name in sizes} for of in (given, own))
    if differing := [key for key in have if key != "dropout" and have[key] != want[key]]:
        first = ", ".join(f"{key}={have[key]!r} (the model: {want[key]!r})" for key in differing[:4])
        advice = "It is an adapter of another base model"
        if {"in_features", "out_features", "bias", "kernel"}.isdisjoint(differing):
            advice = "Load it into the plain base model, which gets its adapters from the file, or inject the "
            advice += f"configuration of the file: {given.config}"
        raise ValueError(f"{where} does not fit the layer {path!r}: it has {first}. {advice}")


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
