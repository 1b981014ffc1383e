"""The grouped operator: several LoRA linear layers in one call; any operand may be shared.

    y_i = x_i·W_iᵀ + s_i·(x̃_i·down_iᵀ)·up_iᵀ + bias_i,   x̃ = mask·x/(1-p)

On a GPU the forward of a group is one launch (two with dropout, a large rank, or fp32 factors over 16 bits) and its
backward is four, as for a single layer. Use it instead of `ops.glora_linear` where projections read one input: q, k
and v; gate and up; K and V of every decoder layer on one encoder state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import NoneType
from typing import Any, NamedTuple

from torch import Tensor

from glora_kernels.dispatch import checks
from glora_kernels.dispatch.common import cast, flat, given, path_of, unflat
from glora_kernels.dispatch.operator import Operator
from glora_kernels.dispatch.prepared import Prepared
from glora_kernels.dispatch.signature import Row, Signature, Values, parts
from glora_kernels.glora.call import Call, Supports
from glora_kernels.glora.composite import glora_linear
from glora_kernels.grouped.group import ABSENT, Group, Operands, Trained, factor_dtype
from glora_kernels.runtime import routes
from glora_kernels.runtime.workspace import workspace_lock

MAX_MEMBERS = 64
"""The most members of one call, since the addresses of all members are arguments of one kernel."""

Many = Sequence[Tensor | None] | Tensor | None
"""One operand of a group: one tensor for all members, or a sequence with a tensor or None for each."""


def grouped_lora_linear(
    xs: Sequence[Tensor] | Tensor,
    weights: Sequence[Tensor] | Tensor,
    downs: Many = None,
    ups: Many = None,
    biases: Many = None,
    *,
    scales: Sequence[float] | float = 1.0,
    dropout_p: float = 0.0,
    seeds: Many = None,
) -> list[Tensor]:
    """y_i = x_i·W_iᵀ + s_i·(x̃_i·down_iᵀ)·up_iᵀ + bias_i of every member i of a group, in one call.

    An operand is one tensor, which all members share, or a sequence with one entry a member. What is the same object
    is computed once and its gradient is one sum: one x has one dx = Σ_i dy_i·W_i + Σ_i mask_i∘(S_i·down_i)/(1-p) with
    S_i = s_i·dy_i·up_i; one down with one mask has one h; d_down_i = S_iᵀ·x̃_i, d_up_i = s_i·dy_iᵀ·h_i,
    d_bias_i = Σₘ dy_i.

    Args:
        xs: (..., K_i) each; also nested or sparse, as in `ops.glora_linear`.
        weights: W_i (N_i, K_i), frozen; row-major, or the transpose of such a matrix.
        downs: (R_i, K_i) or None; ranks may differ.
        ups: (N_i, R_i); there where `downs` is.
        biases: (N_i,) or None, in any floating dtype.
        scales: s_i, one for all or one each.
        dropout_p: p in [0, 1) on x in the low-rank paths.
        seeds: one int64 for all (one mask where x is one), or one each; needed where p > 0 (`glora.op.dropout_seed`).

    Returns:
        One y_i (..., N_i) a member, in the dtype of x (of autocast where it is on).

    Raises:
        ValueError: sizes, numbers of entries or devices that do not fit (the message says at which member), no member
            or more than 64, or a weight that requires grad.
        TypeError: an x that is not floating point, or whose dtype differs from its weight's outside autocast.
        RuntimeError: a forced `backend` that cannot serve the call.

    Examples:
        >>> from glora_kernels.ops import grouped_lora_linear
        >>> x, weights = torch.randn(2, 16), [torch.randn(16, 16), torch.randn(8, 16)]
        >>> downs, ups = [torch.randn(4, 16), torch.randn(4, 16)], [torch.zeros(16, 4), torch.zeros(8, 4)]
        >>> [tuple(y.shape) for y in grouped_lora_linear(x, weights, downs, ups)]
        [(2, 16), (2, 8)]
    """
    operands = {"xs": xs, "weights": weights, "downs": downs, "ups": ups, "biases": biases, "seeds": seeds}
    members = _size(**operands, scales=scales)
    entries = [entry for name, value in operands.items() for entry in _each(name, value, members)]
    for i in range(members):
        if entries[i] is None or entries[members + i] is None:
            raise ValueError(f"xs[{i}] and weights[{i}] must be tensors; got None")
    s = (float(scales),) * members if isinstance(scales, (int, float)) else tuple(map(float, scales))
    return [*call(entries, layout_of(entries, dropout_p), s, dropout_p)]


class Layout(NamedTuple):
    """Which members share tensors, for the six fields of `Operands` in their order.

    places: the indices of the distinct tensors in the list of all entries. sizes: how many distinct ones each field
    has. indices: for each field, which of its distinct tensors each member has.
    """

    places: tuple[int, ...]
    sizes: tuple[int, ...]
    indices: tuple[tuple[int, ...], ...]


def layout_of(entries: Sequence[Tensor | None], dropout_p: float) -> Layout:
    """The layout of the members' tensors, listed field by field. Seeds without dropout are ignored.

    Entries are the same only if they are one object.
    """
    members = len(entries) // len(Operands._fields)
    kept = [*entries]
    for seed, down in zip(range(-members, 0), entries[2 * members : 3 * members], strict=True):
        if down is None or not dropout_p > 0.0:
            kept[seed] = None
    places, sizes, indices = [], [], []
    for first in range(0, len(kept), members):
        found: list[Tensor | None] = []
        own = []
        for place, tensor in enumerate(kept[first : first + members], first):
            # By `is`: torch.compile would take an `id` for a constant.
            same = (i for i, known in enumerate(found) if known is tensor)
            index = ABSENT if tensor is None else next(same, len(found))
            if index == len(found):
                found.append(tensor)
                places.append(place)
            own.append(index)
        sizes.append(len(found))
        indices.append(tuple(own))
    return Layout(tuple(places), tuple(sizes), tuple(indices))


def call(
    entries: Sequence[Tensor | None], layout: Layout, scales: tuple[float, ...], dropout_p: float
) -> Sequence[Tensor]:
    """`grouped_lora_linear`, errors included, where the layout is already known, as it is to a group of layers.

    entries: the members' tensors, field by field of `Operands`.
    """

    def check(row: Row) -> Values:
        _check(row, layout, dropout_p)
        x, p = given(row[0]), dropout_p if layout.sizes[-1] else 0.0
        return Values((*layout.indices, scales, p, routes.route(x.device.type, x.dtype)), layout.sizes)

    row = [entries[place] for place in layout.places]
    return GROUPED.call(row, (layout, scales, dropout_p), check, layout.sizes[0], layout.indices[0])


def _size(**operands: Any) -> int:
    """The number of members: the length of every operand that is a sequence."""
    counts = {}
    for name, value in operands.items():
        if isinstance(value, (int, float) if name == "scales" else (Tensor, NoneType)):
            continue
        if not hasattr(value, "__len__") or isinstance(value, (str, Tensor)):
            raise TypeError(f"{name} must be one for all members or a sequence of them, got {type(value).__name__}")
        counts[name] = len(value)
    if len(set(counts.values())) > 1:
        raise ValueError(f"a group has one entry a member in every sequence; got {counts}")
    members = next(iter(counts.values()), 1)
    if not 1 <= members <= MAX_MEMBERS:
        raise ValueError(f"a group has 1 to {MAX_MEMBERS} members; got {members}")
    return members


def _each(name: str, value: Any, members: int) -> list[Tensor | None]:
    if value is None or isinstance(value, Tensor):
        return [value] * members
    entries = list(value)
    for i, entry in enumerate(entries):
        if entry is not None and not isinstance(entry, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(entry).__name__}")
    return entries


def _check(row: Row, layout: Layout, dropout_p: float) -> None:
    """Raise the errors of `grouped_lora_linear`, which name the member."""
    checks.check_dropout(dropout_p)
    distinct, first = parts(row, layout.sizes), given(row[0])
    for i, places in enumerate(zip(*layout.indices, strict=True)):
        own = [_at(tensors, place) for tensors, place in zip(distinct, places, strict=True)]
        x, weight, down, up, bias, seed = own
        names = [f"{name}[{i}]" for name in Operands._fields]
        checks.check_product(names[0], x, names[1], weight)
        if x.dtype != first.dtype:
            raise TypeError(f"{names[0]} is {x.dtype} and xs[0] {first.dtype}; a group has one dtype")
        n, k = weight.shape
        checks.check_factors((names[2], names[3]), down, up, n, k)
        if bias is not None:
            checks.check_vector(names[4], bias, n, constant=False)
        checks.check_devices(("xs[0]", first.device), zip(names[:-1], own[:-1], strict=True))
        if dropout_p and down is not None:
            if seed is None:
                raise ValueError(f"dropout_p={dropout_p} needs seeds; member {i} has none: pass dropout_seed(x.device)")
            checks.check_seed(names[5], seed, x.device)


class _GroupedLoRALinear(Operator):
    name = "grouped_lora_linear"
    signature = Signature(Operands, Group)
    results = ("ys", "hs")
    reads = ("hs",)

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        operands, group = self.signature.read(row, values)
        x, inputs = operands.xs[0], len(operands.xs)
        downs = _split(wanted, values)[2]
        read = {x for x, down in zip(group.x, group.down, strict=True) if down != ABSENT and downs[down]}
        casts = group.route != "triton" and any(weight.dtype != x.dtype for weight in operands.weights)
        made = len(row) + group.size
        hs = range(made, made + len(group.paths()))
        saved, with_rows = [*read, *range(inputs, len(row)), *hs], [*range(inputs), *hs]
        return Prepared(
            self, values, wanted, saved, size=hs.stop, with_rows=with_rows, outputs=group.size,
            has_kernels=group.route == "triton", keeps=registered,
            guard=workspace_lock if x.is_cuda and casts else None,
        )  # fmt: skip

    def forward(self, row: Row, values: Values) -> list[Tensor]:
        operands, group = self.signature.read(row, values)
        leads = [operands.xs[i].shape[:-1] for i in group.x]
        ys, hs = path_of("grouped", group.route).forward(operands._replace(xs=[flat(x) for x in operands.xs]), group)
        return [*(unflat(y, lead) for y, lead in zip(ys, leads, strict=True)), *hs]

    def backward(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
        """An x that was not saved is not read either: an empty tensor of its dtype stands in for it."""
        empty = dys[0].new_empty(0)
        operands, group = self.signature.read([empty if t is None else t for t in row[: len(wanted)]], values)
        shapes = [*self.input_shapes(dys, operands, group), *(t.shape for t in operands.flat()[len(operands.xs) :])]
        hs = list(row[len(wanted) + group.size :])
        xs, weights, downs, ups, biases, seeds = _split(wanted, values)
        operands = operands._replace(xs=[x if x is empty else flat(x) for x in operands.xs])
        path, needs = path_of("grouped", group.route), Trained(xs, downs, ups, biases)
        grads = path.backward([flat(dy) for dy in dys], operands, hs, group, needs)
        none = [None] * len(weights), [None] * len(seeds)
        ordered = [*grads.xs, *none[0], *grads.downs, *grads.ups, *grads.biases, *none[1]]
        found = zip(ordered, operands.flat(), shapes, wanted, strict=True)
        return [
            grad if grad is None else cast(grad, tensor.dtype).view(shape)
            for grad, tensor, shape, want in found
            if want
        ]

    def composite(self, row: Row, values: Values) -> tuple[Tensor, ...]:
        """Each member as a `glora_linear` of its own."""
        operands, group = self.signature.read(row, values)
        hs = row[sum(values.sizes or ()) + group.size :]

        ys = []
        for x, w, down, up, bias, seed_of, scale, path in zip(*group[:7], group.path_of(), strict=True):
            s = Supports(b_up=_at(operands.ups, up), b_down=_at(operands.downs, down), bias=_at(operands.biases, bias))
            seed = _at(operands.seeds, seed_of)
            call = Call(scale, 0.0 if seed is None else group.dropout_p, seed, False, group.route)
            ys.append(glora_linear(operands.xs[x], operands.weights[w], s, call, _at(hs, path)))
        return tuple(ys)

    def fake(self, operands: Operands, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        xs, narrow = operands.xs, factor_dtype(operands)
        ys = [
            xs[x].new_empty(*xs[x].shape[:-1], len(operands.weights[weight]))
            for x, weight in zip(group.x, group.weight, strict=True)
        ]
        hs = [
            xs[x].new_empty(math.prod(xs[x].shape[:-1]), len(operands.downs[down]), dtype=narrow)
            for x, down, _, _ in group.paths()
        ]
        return ys, hs

    def input_shapes(self, dys: Sequence[Tensor], operands: Operands, group: Group) -> list[Sequence[int]]:
        """The shape of each x, from the dy and the weight of the first member that reads it."""
        first = [group.x.index(x) for x in range(len(operands.xs))]
        return [(*dys[i].shape[:-1], operands.weights[group.weight[i]].shape[1]) for i in first]


def _at(tensors: Sequence[Any], index: int) -> Any:
    """tensors[index], or None where the member has no such operand."""
    return tensors[index] if tensors and index != ABSENT else None


def _split(flags: Sequence[bool], values: Values) -> list[list[bool]]:
    return parts(flags, values.sizes or ())


GROUPED = _GroupedLoRALinear()
GROUPED.register()
