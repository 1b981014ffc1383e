"""Sharing: which factors of a model's layers are one parameter, making them one, and keeping them one.

A shared factor is the same `nn.Parameter` object in every layer that has it. PyTorch supports this: such a parameter
is counted, optimised, clipped and copied once, and autograd sums its gradient over the layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.nn.base import is_linear
from glora_kernels.nn.columns import aligned
from glora_kernels.nn.linear import GLoRALinear, Holders
from glora_kernels.nn.model import all_paths, clean, join, layers_of, trainable_parameters, unwrap
from glora_kernels.nn.named import FIRST
from glora_kernels.nn.names import numbered, readers, sibling_sets
from glora_kernels.nn.patterns import some_of, unmatched
from glora_kernels.nn.ranks import own_part
from glora_kernels.nn.siblings import install
from glora_kernels.nn.targets import Linear
from glora_kernels.spec import ShareLoRAConfig, projection_type, select

DECLARED = "_tied_weights_keys"
"""The attribute in which each module tells transformers' save_pretrained which of its names a checkpoint omits.

The layers declare it, not the model: `tie_weights` would tie the names declared by the model as it ties embeddings, and
resize the layer's bias to the rows of its weight, which for a Conv1D, stored as (K, N), is wrong.
"""


@dataclass(frozen=True)
class Tie:
    """One parameter of one or several layers: (path, parameter name) in each, and its dtype."""

    factors: tuple[tuple[str, str], ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Sharing:
    """The sharing between the layers of a model: the ties, and the sets of siblings with one dropout mask.

    common: for layers of experts by path, the factors that all their experts share.
    """

    ties: list[Tie]
    siblings: list[list[str]]
    common: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def plan_sharing(
    root: nn.Module, members: Mapping[Linear, ShareLoRAConfig], adapter_dtype: torch.dtype | None
) -> Sharing:
    """The sharing that the configurations of linear layers ask for; layers with equal configurations share.

    A factor is shared by the layers of one `projection_type`; in layers of experts, by all experts too. With
    `tie_siblings`, the siblings of a block share B_down as well; if it is shared over depth too, then all types that
    are siblings of each other share one.

    Where some layers of a configuration share B_down (or B_up), it has one dtype in all layers of the configuration:
    `adapter_dtype`, or fp32 over a 16-bit base. So layers that share can be computed in one call with siblings that do
    not share (because of `projections`, or as the only layer of a type).

    Warns where configurations share over depth, but none of them has two layers of one type.

    Raises:
        ValueError: a projections pattern that matches no member; tie_siblings without siblings, or with siblings by
            name that differ in in_features; a factor to be shared by layers on several devices or, without an
            `adapter_dtype`, of several dtypes; or a convolution. The message names the modules.
    """
    if convolutions := [member.path for member in members if member.is_convolution]:
        raise ValueError(
            f"{convolutions[0]!r} is a convolution, for which there is no ShareLoRAConfig; give it a GLoRAConfig "
            "(GLoRAConfig.lora(...), say), in a mapping of patterns to configurations, or leave it out"
        )
    configs: dict[ShareLoRAConfig, list[Linear]] = {}
    for member, config in members.items():
        configs.setdefault(config, []).append(member)
    ties: list[Tie] = []
    tied_sets: list[list[str]] = []
    depths = numbered(root)
    of_depth: list[tuple[str, list[Linear]]] = []
    common: dict[str, tuple[str, ...]] = {}
    for config, alike in configs.items():
        sharers = _projected(root, config, alike)
        types: dict[str, list[Linear]] = {}
        for member in sharers:
            types.setdefault(projection_type(member.path, *member.base.shape, depths), []).append(member)
        if config.shared_factors:
            of_depth += types.items()
            common |= {member.path: config.shared_factors for member in sharers if member.experts}
        siblings = _siblings(root, sharers) if config.tie_siblings else []
        tied_sets += [[member.path for member in group] for group in siblings]
        for name in ("B_down", "B_up"):
            groups = list(types.values()) if name in config.shared_factors else [[member] for member in sharers]
            if name == "B_down":
                groups = _joined(groups, siblings)
            if any(len(group) > 1 for group in groups):
                groups += [[member] for member in alike if member not in sharers]
                ties += [_tie(name, group, adapter_dtype) for group in groups]
    if of_depth and not common and all(len(alike) == 1 for _, alike in of_depth):
        warnings.warn(_nothing_shared([key for key, _ in of_depth]), stacklevel=3)
    return Sharing(ties, tied_sets, common)


def check_devices(factors: Iterable[tuple[str, str]], layers: Mapping[str, Linear]) -> None:
    """Raise a ValueError where layers that would share a factor are on different devices. layers: by path."""
    (first, name), *others = factors
    for path, _ in others:
        if (here := layers[path].base.weight.device) != (there := layers[first].base.weight.device):
            raise ValueError(
                f"{first!r} on {there} and {path!r} on {here} cannot share one {name}: a parameter has one device. Put "
                "them on one device, or let fewer layers share (projections=..., or several configurations)"
            )


def tie(layers: Mapping[str, GLoRALinear], sharing: Sharing) -> None:
    """Make the factors of each tie one parameter, that of the first layer, and give siblings one dropout mask."""
    for item in sharing.ties:
        path, name = item.factors[0]
        shared = getattr(layers[path], name)
        if shared.dtype != item.dtype:
            shared = nn.Parameter(torch.empty_like(shared, dtype=item.dtype))
            setattr(layers[path], name, shared)
            layers[path].reset_adapter()
        for other, own in item.factors[1:]:
            setattr(layers[other], own, shared)
    for group in sharing.siblings:
        install({path: layers[path] for path in group}, fused=False)


class Place(NamedTuple):
    """Where an adapter parameter occurs: the path of a layer, the layer, the parameter's name in the layer."""

    path: str
    layer: GLoRALinear
    own: str

    @property
    def name(self) -> str:
        return join(self.path, self.own)


def _shared_places(modules: Iterable[tuple[str, nn.Module]], adapter: str = FIRST) -> list[list[Place]]:
    """The places of every parameter of an adapter that occurs in several places of these modules (path, module)."""
    places: dict[Tensor, list[Place]] = {}
    for path, layer in modules:
        if isinstance(layer, GLoRALinear) and adapter in layer.adapter_names():
            for own, parameter in layer.saved_adapter(adapter)[0].items():
                places.setdefault(parameter, []).append(Place(path, layer, own))
    return [several for several in places.values() if len(several) > 1]


def _tied_places(module: nn.Module) -> list[list[Place]]:
    """`_shared_places` under every name that a `state_dict` has."""
    return _shared_places(module.named_modules(remove_duplicate=False))


def keep_tied(root: nn.Module) -> None:
    """Keep shared factors shared when PyTorch replaces parameters, and make `load_state_dict` refuse differing values.

    The check is put on every module that contains several names of one factor, because a part of a model may be loaded
    alone. All names but the first are declared to transformers, whose checkpoints hold a shared tensor once.
    """
    for first, *others in _tied_places(root):
        holders = Holders()
        for place in (first, *others):
            place.layer._holders[place.own] = holders
            holders.join(place.layer)
        for place in others:
            vars(place.layer).setdefault(DECLARED, {})[place.own] = first.name
    for module in root.modules():
        if _tied_places(module):
            module.register_load_state_dict_pre_hook(_load_tied)


def forget_tied(root: nn.Module) -> None:
    """Remove the checks of `keep_tied` from a model whose GLoRA layers are gone."""
    for module in root.modules():
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", hook) is _load_tied:
                del module._load_state_dict_pre_hooks[key]


def _load_tied(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Hook before load_state_dict: the values under the names of a shared factor must agree, or the last would win.

    A name missing in the state gets the value of the others, but strict loading reports it, as for any tied parameter.
    """
    for places in _tied_places(module):
        # Activation checkpointing's wrappers remove their own name from the keys.
        names = [(prefix + clean(place.name), prefix + place.name) for place in places]
        keys = [without if without in state_dict else name for without, name in names]
        given = [key for key in keys if isinstance(state_dict.get(key), Tensor)]
        if other := next((key for key in given if not _same(state_dict[key], state_dict[given[0]])), None):
            raise RuntimeError(
                f"load_state_dict: {given[0]!r} and {other!r} are one shared parameter of the model, but the state has "
                "different values for them: it comes from a model that does not share them, and one value cannot "
                "stand for several. Nothing of this model was loaded"
            )


def _same(left: Tensor, right: Tensor) -> bool:
    if left is right or left.is_meta or right.is_meta:
        return True
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = own_part(left.detach()), own_part(right.detach())
    return left.shape == right.shape and torch.equal(left, right.to(left.device))


@dataclass(frozen=True)
class SharedFactor:
    """One shared parameter: its name in the layers, its type's key, shape, size counted once, layers, adapter."""

    factor: str
    key: str
    shape: tuple[int, ...]
    parameters: int
    paths: tuple[str, ...]
    adapter: str = FIRST

    @property
    def uses(self) -> int:
        """The number of GLoRA layers that have it; each sibling counts."""
        return len(self.paths)


@dataclass(frozen=True, repr=False)
class SharedFactors:
    """Every shared factor of a model, and what the model trains; printed as a table.

    The table has one line for parameters that are alike, such as those of tied siblings in every block: their `count`,
    the `uses` of each, and the numbers in all of them (`parameters`).
    """

    rows: tuple[SharedFactor, ...]
    trainable: int

    @property
    def unshared(self) -> int:
        """The number of elements that would be trained if every layer had factors of its own."""
        return self.trainable + sum((row.uses - 1) * row.parameters for row in self.rows)

    def __repr__(self) -> str:
        alike: dict[tuple[str, str, int, str], list[SharedFactor]] = {}
        for row in self.rows:
            factor = row.factor if row.adapter == FIRST else f"{row.factor} of {row.adapter!r}"
            alike.setdefault((factor, str(row.shape), row.uses, row.key), []).append(row)
        cells = [("factor", "shape", "count", "uses", "parameters", "projection type")]
        for (factor, shape, uses, key), rows in alike.items():
            numbers = sum(row.parameters for row in rows)
            cells.append((factor, shape, str(len(rows)), str(uses), f"{numbers:,}", key))
        lines = aligned(cells, "<<>>><") if self.rows else ["no factor is shared"]
        lines.append(f"trainable parameters: {self.trainable:,} ({self.unshared:,} if nothing were shared)")
        return "\n".join(lines)


def shared(model: nn.Module) -> SharedFactors:
    """List which layers of a model share which factor: one row for each parameter that several layers have.

    Args:
        model: a model with GLoRA layers, also inside torch.compile or DistributedDataParallel.

    Returns:
        The rows, in the order of the model, with `factor` ("B_down", "B_up"), `key` (the `projection_type`; for tied
        siblings all of them), `shape`, `uses`, `parameters` counted once, `paths` and `adapter`; print it for a table.

    Raises:
        ValueError: the model has no GLoRA layer.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        >>> print(gk.shared(gk.inject(model, gk.ShareLoRAConfig(rank=4), target_modules=["0", "1"])))
        factor  shape    count  uses  parameters  projection type
        B_down  (4, 16)      1     2          64  # (16, 16)
        trainable parameters: 192 (256 if nothing were shared)
    """
    layers, depths = layers_of(model, "shared"), numbered(unwrap(model))
    rows = []
    for name in dict.fromkeys(name for layer in layers.values() for name in layer.adapter_names()):
        for places in _shared_places(layers.items(), name):
            parameter = places[0].layer.saved_adapter(name)[0][places[0].own]
            names = "/".join(dict.fromkeys(place.own for place in places))
            keys = [projection_type(path, layer.out_features, layer.in_features, depths) for path, layer, _ in places]
            paths = tuple(place.path for place in places)
            rows.append(SharedFactor(names, _common_key(keys), tuple(parameter.shape), parameter.numel(), paths, name))
    return SharedFactors(tuple(rows), trainable_parameters(model))


def _common_key(keys: list[str]) -> str:
    """The keys joined for display: "parent.{q (8, 8), k (4, 8)}" for several types of one parent."""
    different = list(dict.fromkeys(keys))
    split = [key.rpartition(".") for key in different]
    if len(different) == 1 or len({parent for parent, _, _ in split}) > 1:
        return " + ".join(different)
    return f"{split[0][0]}.{{{', '.join(name for _, _, name in split)}}}"


def _projected(root: nn.Module, config: ShareLoRAConfig, members: list[Linear]) -> list[Linear]:
    """The members that share: those that `config.projections` names."""
    if config.projections is None:
        return members
    adapted = {path for member in members for path in member.paths}
    every = adapted | {path for path, module in all_paths(root) if is_linear(module)}
    named: set[str] = set()
    for pattern in config.projections:
        selected = select(pattern, every)
        named |= selected
        if not selected & adapted:
            others = "; it matches only layers that this configuration does not adapt" if selected else ""
            what = f"matches no linear layer to adapt{others}"
            raise unmatched("projections", pattern, what, "linear layer", adapted)
    return [member for member in members if not named.isdisjoint(member.paths)]


def _nothing_shared(types: list[str]) -> str:
    some = ", ".join(map(repr, types[:4])) + (", ..." if len(types) > 4 else "")
    return (
        "the ShareLoRAConfig shares nothing over depth, and trains as much as with share='none': no two layers have "
        f"one projection type (the path with the numbers of the depth as #, and the shape): {some}. Layers share where "
        "their paths differ in the numbers of a list of modules, or of modules of one class that are named alike but "
        "for a number"
    )


def _siblings(root: nn.Module, members: list[Linear]) -> list[list[Linear]]:
    """The members that read the same input, block by block."""
    _check_inputs(root, members)
    owners = {path: member for member in members for path in member.paths}
    sets = [[owners[path] for path in group if path in owners] for group in sibling_sets(root)]
    sets = [group for group in sets if len(group) > 1]
    if not sets:
        names = [member.path for member in members]
        raise ValueError(
            "tie_siblings: no two of the layers that share are siblings, projections of one block that read the same "
            f"input (q, k and v; gate and up); they are {some_of(names)}"
        )
    return sets


def _check_inputs(root: nn.Module, members: list[Linear]) -> None:
    """Raise a ValueError where siblings by name differ in in_features, except in cross-attention."""
    widths = {path: member.base.shape[1] for member in members for path in member.paths}
    for found in readers(root):
        own = {path: widths[path] for path in found.paths if path in widths}
        if len(set(own.values())) > 1 and not found.is_cross:
            sizes = ", ".join(f"{path!r} has {width}" for path, width in own.items())
            raise ValueError(
                f"tie_siblings: layers with one B_down must read the same input, but in_features differ: {sizes}. "
                "Tie those that read the same (projections=..., or a configuration of its own for the others)"
            )


def _joined(groups: list[list[Linear]], siblings: list[list[Linear]]) -> list[list[Linear]]:
    """The groups, with those joined into one whose members are siblings of each other."""
    for brood in siblings:
        touched = [group for group in groups if any(member in brood for member in group)]
        place = groups.index(touched[0])
        groups = [group for group in groups if group not in touched]
        groups.insert(place, [member for group in touched for member in group])
    return groups


def _tie(name: str, members: list[Linear], adapter_dtype: torch.dtype | None) -> Tie:
    """The tie of one factor of the members; fp32 over a 16-bit base, since autograd sums its gradient in its dtype."""
    factors = tuple((member.path, name) for member in members)
    check_devices(factors, {member.path: member for member in members})
    first = members[0]
    for member in members:
        if adapter_dtype is None and member.base.dtype != first.base.dtype:
            raise ValueError(
                f"{first.path!r} with {first.base.dtype} weights and {member.path!r} with {member.base.dtype} weights "
                f"cannot share one {name}: give adapter_dtype, the dtype of all adapters, or a configuration for each "
                "dtype"
            )
    return Tie(factors, adapter_dtype or first.adapter_dtype)
