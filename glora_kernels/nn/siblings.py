"""Siblings: layers that read one input (q, k and v; gate and up), all computed when the first of them is called.

    y_i = x (W_i + s_i·B_i)ᵀ + β_i of every member i at once,   β_i = b_i∘(1+D_i) + E_i + W_i·C_i

The layers stay where they are: names, parameters and checkpoints do not change. Each refers to its `SiblingGroup`, a
plain object. The member called first computes the outputs of all members; the other outputs wait for calls with the
same tensor object. Grouping a whole model: `nn.fuse`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glora_kernels.dispatch.prepared import Backwards, note_backwards
from glora_kernels.glora.call import Supports, shift
from glora_kernels.glora.op import dropout_seed
from glora_kernels.grouped.op import MAX_MEMBERS, Layout, layout_of
from glora_kernels.grouped.op import call as grouped_call
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.ranks import is_part
from glora_kernels.nn.waiting import Eager, Traced, may_recompute
from glora_kernels.ops import glora_wc


class SiblingGroup:
    """Layers that read one input, and the outputs that wait for their calls. Made by `install`.

    A call of one member with x (under torch.compile see `waiting.Traced`; a block is the members of one parent module):

    | case                                                        | what happens                                       |
    | an output for x waits                                       | it is returned, once                               |
    | no output for this member waits                             | one call of `ops.grouped_lora_linear` computes all |
    | an earlier member of the block was called with another      | RuntimeError: the layers do not read one input     |
    |   tensor, which still exists, in the same mode              |                                                    |
    | an output waits, otherwise (a skipped block, another mode)  | it is dropped, and the outputs are computed        |
    | a member is merged, disabled, a lone copy, a replica, has   | every member computes its own output               |
    |   backward hooks, another training mode, or parameters      |                                                    |
    |   elsewhere than x (offloaded, sharded)                     |                                                    |

    An output is for x if x is the same tensor object (held weakly), not overwritten since, the gradient and autocast
    modes and the region of activation checkpointing are the same, no parameter was changed in place, and no backward of
    the group has run since. Writes through `.data` or in inference mode are not noticed.

    All outputs come from one autograd node: one backward serves them all, and a second backward of another member's
    output alone is an error, as for the outputs of `chunk`. An output that is never fetched is kept until the next
    computation.

    Members that share one B_down within a block have one dropout mask, also when they compute alone; all others draw
    their own, in the order of the members. In training without dropout, members with one B_down are still checked to
    read one input, except under torch.compile and for layers with backward hooks, whose inputs are aliases.

    A group may span several blocks (K and V of every decoder layer): the first call computes all outputs, M·ΣN_i
    numbers, which wait for the later blocks. Where a recomputation may follow (inside an activation checkpoint; in
    training mode without gradients), and under torch.compile, each block computes only its own members, because the
    outputs of one checkpoint region must not be used in another.

    Attributes:
        names: the members' paths.
        members: the layers, in the order of the names; None where a copy of one layer came without the others.
        fused: True: the members are computed in one call; False: they only share the dropout mask.
    """

    def __init__(self, members: Mapping[str, GLoRALinear], fused: bool = True) -> None:
        self.names = tuple(members)
        self.fused = fused
        self.members: list[GLoRALinear | None] = list(members.values())
        self._prepare()

    def _prepare(self) -> None:
        parents = [name.rpartition(".")[0] for name in self.names]
        blocks = {parent: [i for i, own in enumerate(parents) if own == parent] for parent in parents}
        self._blocks = [blocks[parent] for parent in parents]  # for each member: the places of its block's members
        self._outputs, self._seeds = Eager(), Eager()
        self._traced_outputs, self._traced_seeds = Traced(), Traced()
        self._backwards = Backwards()
        self._known_layout: tuple[object, Layout] | None = None  # of the last call: (what it depends on, the layout)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: leave out waiting outputs, and members, which join the copy when they are copied."""
        return {"names": self.names, "fused": self.fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.members = [None] * len(self.names)
        self._prepare()

    def join(self, layer: GLoRALinear) -> None:
        """Take in a copied layer, if this group is the copy of its group."""
        if self.members[layer._place] is None:
            self.members[layer._place] = layer

    def dissolve(self) -> None:
        """Make every member a layer of its own again."""
        for layer in self.members:
            if layer is not None:
                layer._siblings = None

    @property
    def tied(self) -> bool:
        """Whether members of one block share a B_down, and so their dropout mask."""
        return any(len(self.tied_to(place)) > 1 for place in range(len(self.names)))

    def output(self, layer: GLoRALinear, x: Tensor) -> Tensor | None:
        """The member's output for x; None where it must compute alone.

        Raises a RuntimeError where an earlier member of its block was called with another tensor.
        """
        place = layer._place
        if self.members[place] is not layer:
            return None
        if not self.fused:
            self._check_input(layer, x)
            return None
        traced = torch.compiler.is_compiling()
        store = self._traced_outputs if traced else self._outputs
        if store.pending is not None and (y := self._take(store, place, x)) is not None:
            return y
        places = self._computed_with(layer, x)
        if not places:
            return None
        store.pending = None
        outputs = dict(zip(places, self._compute(places, x), strict=True))
        if not traced:
            note_backwards(outputs.values(), self._backwards)
        y = outputs.pop(place)
        store.leave(x, place, outputs, self.members, self._backwards)
        return y

    def _check_input(self, layer: GLoRALinear, x: Tensor) -> None:
        """Check that tied members without dropout read one input; with dropout, `seed` checks it."""
        if not layer.training or layer._dropout or layer._disabled or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling() or layer._backward_hooks or layer._backward_pre_hooks:
            return
        place = layer._place
        tied = self.tied_to(place)
        if len(tied) > 1 and self._take(self._seeds, place, x) is None:
            self._seeds.leave(x, place, {i: True for i in tied if i != place})  # no seeds: only the input is compared

    def seed(self, layer: GLoRALinear, x: Tensor) -> Tensor:
        """The dropout seed of a member that computes alone; members of a block that share a B_down get the same one.

        Raises a RuntimeError where an earlier one of these was called with another tensor.
        """
        tied = self.tied_to(layer._place)
        if len(tied) == 1:
            return dropout_seed(x.device)
        store = self._traced_seeds if torch.compiler.is_compiling() else self._seeds
        seed = self._take(store, layer._place, x)
        if seed is None:
            seed = dropout_seed(x.device)
            store.leave(x, layer._place, {i: seed for i in tied if i != layer._place})
        return seed

    def _take(self, store: Eager | Traced, place: int, x: Tensor) -> Any:
        """The value that waits for the member's call with x, or None; a value for another input or mode is dropped."""
        pending = store.pending
        if pending is None or place not in pending.values:
            return None
        if pending.is_for(x) and pending.is_current(x, place, self.members[place]):
            value = pending.values.pop(place)
            if not pending.values:
                store.pending = None
            return value
        store.pending = None
        if place > pending.computed_by and place in self._blocks[pending.computed_by] and pending.is_for_another(x):
            raise RuntimeError(self._another_input(place, pending.computed_by))
        return None

    def _another_input(self, place: int, by: int) -> str:
        but = f"but {self.names[place]!r} was called with another tensor than {self.names[by]!r}"
        if by in self.tied_to(place):
            return (
                f"{self._listed()} are tied as siblings (tie_siblings=True), which read one input, {but}; "
                "name other projections or use another configuration"
            )
        return (
            f"{self._listed()} are grouped as siblings, which read one input, {but}. If they do not read one input, "
            "take the groups apart by split_siblings(model) and give fuse_siblings the groups that do"
        )

    def _computed_with(self, layer: GLoRALinear, x: Tensor) -> Sequence[int]:
        """The places of the members to compute when `layer` is called; empty where it computes alone."""
        block = self._blocks[layer._place]
        if len(block) < len(self.names) and not may_recompute(layer):
            everyone = range(len(self.names))
            if self._can_group(everyone, layer, x):
                return everyone
        return block if len(block) > 1 and self._can_group(block, layer, x) else ()

    def _can_group(self, places: Sequence[int], layer: GLoRALinear, x: Tensor) -> bool:
        training, device = layer.training, x.device
        for place in places:
            member = self.members[place]
            if member is None or member._base is not None or member._disabled or member.training is not training:
                return False
            if member._rows is not None or member._active is not None:
                return False
            weight = member._parameters.get("weight")
            if not member.is_intact or weight is None or weight.device != device or is_part(weight):
                return False
            if member._backward_hooks or member._backward_pre_hooks:  # these see the gradient of one layer's own input
                return False
        return True

    def _compute(self, places: Sequence[int], x: Tensor) -> Sequence[Tensor]:
        members: list[Any] = [self.members[place] for place in places]
        own: list[dict[str, Any]] = [member._parameters for member in members]
        dropout_p = max([member._dropout for member in members]) if members[0].training else 0.0
        flat: list[Any] = [x] * len(members)
        flat += [p["weight"].t() if member._transposed else p["weight"] for member, p in zip(members, own, strict=True)]
        flat += [p["B_down"] for p in own]
        flat += [p["B_up"] for p in own]
        flat += [_beta(member, x) for member in members]
        flat += self._drawn(places, x) if dropout_p else [None] * len(members)
        scales = tuple([member._scale for member in members])
        return grouped_call(flat, self._layout(places, flat, dropout_p), scales, dropout_p)

    def _layout(self, places: Sequence[int], flat: Sequence[Tensor | None], dropout_p: float) -> Layout:
        """The layout of the members' tensors: which of them are one object; kept from call to call to save time."""
        if torch.compiler.is_compiling():  # it would make constants of the ids
            return layout_of(flat, dropout_p)
        # Not x, which is new in each call, nor the seeds, which are the same object where B_down is.
        same, known = (places, dropout_p > 0.0, [*map(id, flat[len(places) : -len(places)])]), self._known_layout
        if known is None or known[0] != same:
            known = self._known_layout = same, layout_of(flat, dropout_p)
        return known[1]

    def _drawn(self, places: Sequence[int], x: Tensor) -> list[Any]:
        """A dropout seed for each member, the same for those of a block that share a B_down; None without a B_down."""
        seeds: dict[int, Tensor] = {}
        for place in places:
            first = self.tied_to(place)[0]
            if first not in seeds and self._down(place) is not None:
                seeds[first] = dropout_seed(x.device)
        return [seeds.get(self.tied_to(place)[0]) for place in places]

    def tied_to(self, place: int) -> list[int]:
        """The places in the member's block that have its B_down: itself and those tied to it."""
        down = self._down(place)
        return [i for i in self._blocks[place] if i == place or (down is not None and self._down(i) is down)]

    def _down(self, place: int) -> Tensor | None:
        member = self.members[place]
        return None if member is None else member._parameters.get("B_down")

    def _listed(self) -> str:
        names = [repr(name) for name in self.names]
        return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) <= 4 else f"{', '.join(names[:4])}, ..."


def _beta(layer: GLoRALinear, x: Tensor) -> Tensor | None:
    """β = b∘(1+D) + E + W·C of one layer, (N,) or None; taken from `shift_once` where that has computed it."""
    if (beta := layer.kept_shift()) is not None:
        return beta
    p: dict[str, Any] = layer._parameters
    if p["bias"] is None and p["E"] is None and p["C"] is None and p["C_up"] is None:
        return None
    wc = None
    if p["C"] is not None or p["C_up"] is not None:
        weight = p["weight"].t() if layer._transposed else p["weight"]
        wc = glora_wc(weight, p["C"], c_up=p["C_up"], c_down=p["C_down"])
    beta = shift(Supports(bias=p["bias"], wc=wc, d=p["D"], e=p["E"]), x.dtype)
    assert beta is not None
    return beta if len(beta) == layer.out_features else beta.expand(layer.out_features)  # a constant E alone


def install(members: Mapping[str, GLoRALinear], fused: bool = True) -> SiblingGroup:
    """Group layers that read one input: from now on the one called first computes the outputs of all.

    Args:
        members: two or more layers by path, in the order of their calls. Dropout masks are drawn in this order, so
            that they are those of layers that compute alone.
        fused: False: each layer still computes alone, with any form of A, and those with one B_down have one dropout
            mask.

    Returns:
        The group, to which every member refers.

    Raises:
        TypeError: a member that is no GLoRALinear.
        ValueError: members that cannot be one group; the message names them and says why. Nothing has changed.
    """
    for path, layer in members.items():
        if not isinstance(layer, GLoRALinear):
            raise TypeError(f"install: {path!r} must be a GLoRALinear, got {type(layer).__name__}")
    grouped = [path for path, layer in members.items() if layer._siblings is not None]
    if grouped:
        raise ValueError(f"install: {grouped} are in a group of siblings already; split_siblings(model) dissolves it")
    if reason := refusal(members, fused):
        raise ValueError(f"install: {list(members)} cannot be grouped: {reason}")
    group = SiblingGroup(members, fused)
    for place, layer in enumerate(members.values()):
        layer._siblings, layer._place = group, place
    return group


def tied_sets(layers: Mapping[str, GLoRALinear]) -> list[list[str]]:
    """The sets of layers with one dropout mask, by path: members of one group and block that share a B_down."""
    sets: dict[tuple[int, int], list[str]] = {}
    for path, layer in layers.items():
        if (group := layer._siblings) is not None:
            first, *others = group.tied_to(layer._place)
            if others:
                sets.setdefault((id(group), first), []).append(path)
    return list(sets.values())


def refusal(members: Mapping[str, GLoRALinear], fused: bool = True) -> str | None:
    """The reason why layers cannot be one group of siblings; None where they can."""
    layers = list(members.values())
    if not 2 <= len(layers) <= MAX_MEMBERS:
        return f"a group has 2 to {MAX_MEMBERS} members, got {len(layers)}"
    if len({id(layer) for layer in layers}) < len(layers):
        return "one layer is there twice"
    unlike = _unlike(members, "in_features", [layer.in_features for layer in layers])
    unlike = unlike or _unlike(members, "the device", [layer.weight.device for layer in layers])
    if unlike or not fused:
        return unlike
    for path, layer in members.items():
        if layer.quant_state is not None:
            return f"{path!r} has a 4-bit base, which each layer dequantizes for itself"
        if layer.config.A != "none":
            return f"{path!r} has A={layer.config.A!r}; A must be 'none'"
        if layer.config.B not in ("lora", "none"):
            return f"{path!r} has B={layer.config.B!r}; B must be 'lora' or 'none'"
    low_rank = {path: layer for path, layer in members.items() if layer.B_down is not None}
    dtypes = [layer.B_down.dtype for layer in low_rank.values() if layer.B_down is not None]
    return (
        _unlike(members, "the dtype", [layer.weight.dtype for layer in layers])
        or _unlike(low_rank, "adapter_dtype", dtypes, "; give adapter_dtype in inject")
        or _unlike(low_rank, "dropout", [layer.config.dropout for layer in low_rank.values()])
    )


def _unlike(members: Mapping[str, GLoRALinear], what: str, values: Sequence[object], advice: str = "") -> str | None:
    """The reason for `refusal` where the members' values of one property differ, else None."""
    if len(set(values)) < 2:
        return None
    different = ", ".join(f"{value} of {path!r}" for path, value in zip(members, values, strict=True))
    return f"{what} differs: {different}{advice}"
