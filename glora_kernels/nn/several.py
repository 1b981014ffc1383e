"""Several adapters over one base: adding, choosing and deleting them, and a batch whose examples have one each.

All adapters of a model stay where they are, whichever is in use: names of parameters, state dicts, optimizers and
averages do not change with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from glora_kernels.nn.base import M
from glora_kernels.nn.experts import keep_names
from glora_kernels.nn.frozen import check_dtype
from glora_kernels.nn.inject import (  # fmt: skip
    Config,
    ExpertRank,
    check_replaceable,
    check_trained,
    check_wrapper,
    checked_configs,
    chosen_layers,
    layer_over,
    with_expert_ranks,
)
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.mixed import BatchRows, TakesRows, refuse_inside
from glora_kernels.nn.model import clean, is_tuner, layers_of, named_layers, trained_of, unwrap
from glora_kernels.nn.named import FIRST, NONE, NamedAdapter
from glora_kernels.nn.patterns import patterns_of, some_of
from glora_kernels.nn.projections import guard
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.share import Tie, plan_sharing
from glora_kernels.nn.targets import Linear, linears, named_by, put, targets_of
from glora_kernels.nn.undo import all_or_none, finish
from glora_kernels.spec import GLoRAConfig, ShareLoRAConfig


def adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's adapters, in the order in which an index tensor of `rows` counts them.

    Raises:
        ValueError: the model has neither GLoRA layers nor accelerated layers of PEFT.

    Examples:
        >>> gk.adapters(gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"]))
        ('default',)
    """
    return _names(_taking(unwrap(model), "adapters"))


def add_adapter(
    model: M,
    name: str,
    config: Config | Mapping[str, Config | None],
    target_modules: str | Iterable[str] | None = None,
    adapter_dtype: torch.dtype | None = None,
    *,
    exclude_modules: str | Iterable[str] = (),
    target_parameters: str | Iterable[str] = (),
    expert_rank: ExpertRank = "rank",
) -> M:
    """Add a further adapter to a model with GLoRA layers: calls use it after `set_adapter`, or by `rows`.

        model = gk.inject(model, gk.GLoRAConfig.lora(rank=8))            # the first is "default"
        gk.add_adapter(model, "b", gk.GLoRAConfig(rank=16, alpha=32))    # of another form, if you like
        optimizer = torch.optim.AdamW(gk.parameter_groups(model, by_adapter=True))
        with gk.rows(model, ["default", "b", "b", None]):                # an adapter for each example
            loss = criterion(model(x), target)

    It changes nothing yet, and its parameters require a gradient. Modules trained whole (`inject(..., train=...)`) and
    biases belong to the model: all adapters have them in common. Make it before the optimizer and before wrapping.

    Args:
        model: a model with GLoRA layers; changed in place.
        name: of the new adapter.
        config: as in `inject`.
        target_modules: as in `inject`, but None means the layers that have GLoRA layers already. Layers that the first
            adapter does not adapt may be named: they become GLoRA layers without a first adapter.
        adapter_dtype, exclude_modules, target_parameters, expert_rank: as in `inject`.

    Returns:
        The model.

    Raises:
        ValueError: a name that exists or cannot be one, a model without GLoRA layers, sharded or wrapped in
            DistributedDataParallel, a configuration with tie_siblings, and the errors of `inject`. Nothing has changed.
        RuntimeError: inside `rows` or `disabled`, or a layer is merged.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=2), target_modules=["0"])
        >>> gk.adapters(gk.add_adapter(model, "b", gk.GLoRAConfig(rank=4)))
        ('default', 'b')
    """
    root = unwrap(model)
    check_new(model, name, "add_adapter")
    check_dtype("adapter_dtype", adapter_dtype)
    configs, trained = checked_configs(config), trained_of(root)
    excluded = patterns_of("exclude_modules", exclude_modules)
    parameters = patterns_of("target_parameters", target_parameters)
    targets = _adapted(root, excluded) if target_modules is None else targets_of(target_modules, parameters)
    if targets == [""]:  # the model is itself a layer
        targets = None
    chosen = chosen_layers("add_adapter", root, configs, targets, trained, excluded, True, parameters)
    chosen = with_expert_ranks(chosen, expert_rank)
    sharers = {linear: own for linear, own in chosen.items() if isinstance(own, ShareLoRAConfig)}
    sharing = plan_sharing(root, sharers, adapter_dtype)
    if sharing.siblings:
        raise ValueError(
            f"add_adapter: the configuration of {name!r} has tie_siblings=True, which only the first adapter can have; "
            "leave it out, or inject this configuration"
        )
    plan = {
        linear: (
            own.layer_config() if isinstance(own, ShareLoRAConfig) else own, adapter_dtype or linear.adapter_dtype
        )
        for linear, own in chosen.items()
    }  # fmt: skip
    with all_or_none() as undo:
        put_beside(model, name, plan, sharing.ties, undo, sharing.common)
    return model


def set_adapter(model: nn.Module, name: str) -> None:
    """Choose the adapter that calls use from now on; layers that do not have it are their base.

    It decides about calls, merging and `merge_and_unload`. Which parameters require a gradient stays as it is: those
    of adapters that no call uses get none. Layers fused as siblings, `deferred_shared_grads` and `shift_once` serve the
    first adapter; with another one each layer is a call of its own.

    Raises:
        ValueError: no GLoRA layer has an adapter of this name.
        RuntimeError: a layer is merged.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=2), target_modules=["0"])
        >>> gk.set_adapter(gk.add_adapter(model, "b", gk.GLoRAConfig(rank=4)), "b")
    """
    layers = layers_of(model, "set_adapter")
    check_known(layers, name, "set_adapter")
    if merged := [path for path, layer in layers.items() if layer.merged]:
        raise RuntimeError(f"set_adapter: {merged[0]!r} is merged; call unmerge(model) first")
    with all_or_none() as undo:
        for layer in layers.values():
            undo.callback(setattr, layer, "_active", layer._active)
            layer._active = None if name == FIRST else name


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter beside the first. Optimizers keep its parameters until they are made anew.

    A layer that had no other stays a GLoRA layer, and is its base.

    Raises:
        ValueError: there is none of this name, or it is the first, which is part of the layers.
        RuntimeError: it is active, or this is inside `rows`.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=2), target_modules=["0"])
        >>> gk.delete_adapter(gk.add_adapter(model, "b", gk.GLoRAConfig(rank=4)), "b")
        >>> gk.adapters(model)
        ('default',)
    """
    layers = layers_of(model, "delete_adapter")
    check_known(layers, name, "delete_adapter")
    if name == FIRST:
        raise ValueError(
            f"delete_adapter: {FIRST!r} is part of the layers; unload(model) takes these out, reset_adapter() of a "
            "layer makes it change nothing"
        )
    if active := [path for path, layer in layers.items() if layer._active == name]:
        raise RuntimeError(f"delete_adapter: {name!r} is active in {some_of(active)}; call set_adapter first")
    refuse_inside(layers.values(), "delete_adapter")
    finish(partial(_drop, layers.values(), name))


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None] | Tensor) -> Iterator[None]:
    """Inside, each example of a batch has the adapter that `names` gives it, in training and in inference.

        with gk.rows(model, ["b", "b", None, "default"]):
            y = model(x)                                   # x has four examples

    Every layer computes all rows in one call (`ops.multi_glora_linear`): W is read once, an adapter gets the gradient
    of its rows alone. It serves GLoRA layers and layers of PEFT that `accelerate` has taken, in training too, where
    PEFT's `adapter_names` is refused: make the adapters trainable by `model.base_model.set_adapter([...])`.

    With names, an adapter that has no example takes no part, and gets no gradient (None); with an index tensor it gets
    zeros. An index tensor may be written to inside: each call reads it anew, also in the replays of a CUDA graph, which
    know the adapters that were there when it was captured.

    With activation checkpointing call backward inside, because it runs the forward again. With DistributedDataParallel
    and FSDP2 give an index tensor: all ranks must have gradients of the same parameters.

    Args:
        model: also inside torch.compile or DistributedDataParallel.
        names: the adapter's name for each example, None for the base alone. Or a tensor of integers, places in
            `adapters(model)`, -1 for the base alone: one for each example, or for each row of x (the leading
            dimensions of every layer's input). A CUDA graph needs such a tensor on its device.

    Raises:
        ValueError: a name or a number that no adapter has; a layer called with another number of examples; a model
            without layers that take rows, or with layers of PEFT that are not accelerated, or with modules that each
            adapter of PEFT has of its own (modules_to_save).
        TypeError: names of another kind.
        RuntimeError: a layer is merged, or cannot compute one of the adapters; the message says why.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=2), target_modules=["0"])
        >>> model = gk.add_adapter(model, "b", gk.GLoRAConfig(rank=4))
        >>> with gk.rows(model, ["b", None, "default"]):
        ...     y = model(torch.randn(3, 16))
    """
    layers = _taking(unwrap(model), "rows")
    _refuse_own_modules(unwrap(model))
    known = _names(layers)
    index, present = _index(names, known)
    for path, layer in layers.items():
        if reason := layer.refusal_of_rows():
            raise RuntimeError(f"rows: {path!r} cannot take a batch of several adapters: {reason}")
    told = BatchRows(known, index, present, {id(layer): path for path, layer in layers.items()})
    before = [layer._rows for layer in layers.values()]
    try:
        for layer in layers.values():
            layer._rows = told
        yield
    finally:
        for layer, own in zip(layers.values(), before, strict=True):
            if own is None:  # not set to None: compiled code is guarded by which attributes a layer has
                vars(layer).pop("_rows", None)
            else:
                layer._rows = own


def put_beside(
    model: nn.Module,
    name: str,
    plan: Mapping[Linear, tuple[GLoRAConfig, torch.dtype]],
    ties: Iterable[Tie],
    undo: ExitStack,
    common: Mapping[str, tuple[str, ...]],
) -> None:
    """Give linear and GLoRA layers an adapter of this name; each change is preceded by a callback that reverts it.

    Args:
        plan: the configuration and dtype for each layer.
        ties: factors that several of the layers share.
        common: by path, the factors that all experts of a layer share.
    """
    root = unwrap(model)
    new = [linear for linear in plan if not isinstance(linear.module, GLoRALinear)]
    check_wrapper(model, root)
    if new:  # reading the model's code takes seconds
        check_replaceable(root, new)
    check_trained(new, trained_of(root))
    factors = {place: (tie.factors[0], tie.dtype) for tie in ties for place in tie.factors}
    made: dict[str, NamedAdapter] = {}
    held = [own for layer in named_layers(root).values() for own in layer.named().values()]
    place = 1 + max((own.place for own in held), default=0)
    undo.callback(keep_names, root)
    for linear, (config, dtype) in plan.items():
        layer = linear.module
        if not isinstance(layer, GLoRALinear):
            for parameter in layer.parameters():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
            layer = layer_over(linear, NONE, linear.adapter_dtype)
            layer.has_first = False
            put(linear, layer, undo)
        shapes = layer.shapes_of(config, common.get(linear.path, ()))
        own = {factor: factors[linear.path, factor] for factor in shapes if (linear.path, factor) in factors}
        with torch.inference_mode(False):  # it may be trained later
            made[linear.path] = adapter = NamedAdapter(
                config, shapes, layer.weight.device, dtype,
                {factor: dtype for factor, (_, dtype) in own.items()},
                {factor: made[path] for factor, ((path, _), _) in own.items() if path != linear.path},
            )  # fmt: skip
        adapter.place = place
        undo.callback(layer.drop_named, name)
        layer.add_named(name, adapter.train(layer.training))
    keep_names(root)
    guard(root, undo)


def _adapted(root: nn.Module, excluded: Iterable[str]) -> list[str]:
    """The paths of the GLoRA layers that no pattern excludes."""
    every = linears(root, adapted=True)
    out = {linear for pattern in excluded for linear in named_by(pattern, every)}
    return [item.path for item in every if isinstance(item.module, GLoRALinear) and item not in out]


def check_new(model: nn.Module, name: object, caller: str) -> None:
    """Raise an error where no adapter of this name can be added to the model's GLoRA layers."""
    if not isinstance(name, str):
        raise TypeError(f"{caller}: name must be a str, got {type(name).__name__}")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{caller}: {name!r} cannot be the name of an adapter: take one that is not empty, has no dot and is no "
            "attribute of nn.ModuleDict (keys, training, ...)"
        )
    root = unwrap(model)
    layers = layers_of(model, caller)
    if name == FIRST or name in _names(layers):
        raise ValueError(f"{caller}: the model has an adapter {name!r} already; it has {', '.join(_names(layers))}")
    refuse_sharded(root, caller, "add adapters before fully_shard")
    refuse_inside(layers.values(), caller)
    for path, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{caller}: {path!r} is merged; call unmerge(model) first")
        if layer._disabled:
            raise RuntimeError(f"{caller}() was called inside disabled(model); leave that context first")


def check_known(layers: Mapping[str, TakesRows], name: str, caller: str) -> None:
    """Raise a ValueError where none of these layers of a model has an adapter of this name."""
    known = _names(layers)
    if name not in known:
        raise ValueError(f"{caller}: the model has no adapter {name!r}; it has {', '.join(known)}")


def _drop(layers: Iterable[GLoRALinear], name: str) -> None:
    for layer in layers:
        layer.drop_named(name)


def _taking(root: nn.Module, caller: str) -> dict[str, TakesRows]:
    """The layers of a model that take rows, by path."""
    found: dict[str, TakesRows] = {}
    for path, module in root.named_modules():
        if isinstance(module, TakesRows):
            found[clean(path)] = module
        elif is_tuner(module) and "base_layer" in module._modules:
            raise ValueError(
                f"{caller}: {clean(path)!r} is a layer of PEFT ({type(module).__name__}) that is not accelerated; call "
                "accelerate(model), and acceleration(model) where that says why not"
            )
    if not found:
        raise ValueError(
            f"{caller}: the model has no GLoRA layer; call inject(model, config) first, or accelerate(model) on a "
            "model of PEFT"
        )
    return found


def _refuse_own_modules(root: nn.Module) -> None:
    """Raise a ValueError for a module of which PEFT keeps one an adapter: a call would use that of the active one."""
    for path, module in root.named_modules():
        if any((kind.__module__, kind.__name__) == _PER_ADAPTER for kind in type(module).__mro__):
            raise ValueError(
                f"rows: {clean(path)!r} is a {type(module).__name__} of PEFT (modules_to_save, trainable tokens), one "
                "module an adapter, of which a call uses one for the whole batch; give rows a part of the model "
                "without it"
            )


_PER_ADAPTER = "peft.utils.other", "AuxiliaryTrainingWrapper"


def _names(layers: Mapping[str, TakesRows]) -> tuple[str, ...]:
    places: dict[str, int] = {}
    for layer in layers.values():
        places |= layer.adapter_names()
    return tuple(sorted(places, key=places.__getitem__))


def _index(names: Sequence[str | None] | Tensor, known: tuple[str, ...]) -> tuple[Tensor, frozenset[str] | None]:
    """The places of `names` among the known ones, and which of these occur; None where only the device knows."""
    if isinstance(names, Tensor):
        if names.dtype.is_floating_point or names.dtype.is_complex or names.dtype == torch.bool or not names.ndim:
            raise TypeError(
                f"rows: names as a tensor must be one of integers with a dimension, got {names.dtype} of shape "
                f"{tuple(names.shape)}"
            )
        if names.device.type == "cpu" and bool(((names < -1) | (names >= len(known))).any()):
            wrong = names[(names < -1) | (names >= len(known))]
            raise ValueError(
                f"rows: names as a tensor must have numbers from 0 to {len(known) - 1}, the places in "
                f"adapters(model), or -1 for the base alone; got {int(wrong[0])}"
            )
        return names, None  # a copy would not see what is written to it inside
    if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
        raise TypeError(f"rows: names must be a sequence of names or a tensor, got {type(names).__name__}")
    places: dict[str | None, int] = {name: place for place, name in enumerate(known)} | {None: -1}
    if others := [name for name in names if not (name is None or isinstance(name, str))]:
        raise TypeError(
            f"rows: names must have a str or None for each example, got {others[0]!r}; places in adapters(model) are "
            "given as a tensor of integers"
        )
    if unknown := [name for name in names if name not in places]:
        raise ValueError(
            f"rows: the model has no adapter {unknown[0]!r}; accepted are {', '.join(map(repr, known))} and None for "
            "the base alone"
        )
    index = torch.tensor([places[name] for name in names], dtype=torch.int64)
    return index, frozenset(name for name in names if name is not None)
