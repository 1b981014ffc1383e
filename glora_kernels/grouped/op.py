"""The grouped operator: several LoRA linear layers as one call, any operand shared.

    y_i = x_i·W_iᵀ + s_i·(x̃_i·down_iᵀ)·up_iᵀ + bias_i,   x̃ = mask·x/(1-p)

On a GPU the forward of a group is one launch (two with dropout, a large rank, or fp32 factors over 16 bits) and its
backward is four, as of one layer. It takes the place of `ops.glora_linear` where projections read one input: q, k and
v; gate and up; K and V of every decoder layer on one encoder state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch import prepared
from glora_kernels.dispatch.common import LIBRARY, autocast_dtype, cast, check_vector, given, owned, path_of, read_saved
from glora_kernels.dispatch.prepared import Prepared, Row
from glora_kernels.dispatch.ways import is_batched, is_plain, is_transformed, is_watched, rows_of
from glora_kernels.glora.composite import gradients
from glora_kernels.grouped import composite
from glora_kernels.grouped.group import ABSENT, Group, GroupNeeds, Operands, factor_dtype
from glora_kernels.runtime import routes
from glora_kernels.runtime.workspace import private_workspace, workspace_lock

MAX_MEMBERS = 64
"""The most members of one call: their addresses are arguments of one kernel."""

_LISTS = ", ".join(f"Tensor[] {name}" for name in Operands._fields)
_INDICES = "int[] x, int[] weight, int[] down, int[] up, int[] bias, int[] seed"
_VALUES = f"{_INDICES}, float[] scales, float dropout_p, str route"
LIBRARY.define(f"grouped_lora_linear({_LISTS}, {_VALUES}) -> (Tensor[], Tensor[])")
LIBRARY.define(
    f"grouped_lora_linear_backward(Tensor[] dys, {_LISTS}, Tensor[] hs, {_VALUES}, bool[] needs) -> Tensor[]"
)
_COUNT = len(Operands._fields)

Many = Sequence[Tensor | None] | Tensor | None
"""One operand of a group: one tensor for all members, or one (or None) each."""


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
    """
    members = _size(xs=xs, weights=weights, downs=downs, ups=ups, biases=biases, scales=scales, seeds=seeds)
    x_list = _each("xs", xs, members)
    nestings = _to_rows(x_list)
    flat = [*x_list, *_each("weights", weights, members), *_each("downs", downs, members), *_each("ups", ups, members),
            *_each("biases", biases, members), *_each("seeds", seeds, members)]  # fmt: skip
    s = (float(scales),) * members if isinstance(scales, (int, float)) else tuple(map(float, scales))
    ys = call(flat, layout_of(flat, dropout_p), s, dropout_p)
    return [y if nested is None else nested(y) for y, nested in zip(ys, nestings, strict=True)]


class Layout(NamedTuple):
    """Which of the members' tensors are the same, of the six fields of `Operands` in their order.

    places: of the distinct ones among all entries, member by member. sizes: how many each field has. indices: which
    of them each member has.
    """

    places: tuple[int, ...]
    sizes: tuple[int, ...]
    indices: tuple[tuple[int, ...], ...]


def layout_of(flat: Sequence[Tensor | None], dropout_p: float) -> Layout:
    """The layout of the members' tensors, field by field; of a seed only where something is dropped.

    Entries count as the same where they are one object.
    """
    members = len(flat) // _COUNT
    lists = [flat[start : start + members] for start in range(0, len(flat), members)]
    *kept, seeds = lists
    drops = [down is not None and dropout_p > 0.0 for down in lists[2]]
    kept.append([seed if drop else None for seed, drop in zip(seeds, drops, strict=True)])
    places, sizes, indices = [], [], []
    for field, entries in enumerate(kept):
        found: list[Tensor] = []
        own = []
        for member, tensor in enumerate(entries):
            if tensor is None:
                own.append(ABSENT)
                continue
            # By `is`: torch.compile would take an `id` for a constant.
            index = next((i for i, known in enumerate(found) if known is tensor), len(found))
            if index == len(found):
                found.append(tensor)
                places.append(field * members + member)
            own.append(index)
        sizes.append(len(found))
        indices.append(tuple(own))
    return Layout(tuple(places), tuple(sizes), tuple(indices))


def call(
    flat: Sequence[Tensor | None], layout: Layout, scales: tuple[float, ...], dropout_p: float
) -> Sequence[Tensor]:
    """`grouped_lora_linear` of members whose layout is known, as a group of layers knows its own; its errors.

    flat: their tensors, field by field of `Operands`.
    """
    row: list[Any] = [flat[place] for place in layout.places]
    sizes, first, members = layout.sizes, flat[0], len(scales)
    target = None if first is None else autocast_dtype(first)

    def group() -> Group:
        for i in range(members):
            x, weight, down, up, bias, seed = flat[i::members]
            _check(i, x, weight, down, up, bias, seed, first, dropout_p)
        p = dropout_p if sizes[-1] else 0.0
        values: Any = (*layout.indices, scales, p, routes.route(row[0].device.type, row[0].dtype))
        return Group(*values)

    if target is not None:
        row[: sizes[0]] = [x if x.dtype == target else x.to(target) for x in row[: sizes[0]]]
    if not row or is_transformed() or is_watched(row[0]):
        made, operands = group(), Operands(*_split(row, sizes))
        if is_transformed():
            return composite.grouped_lora_linear(operands, made)
        ys: Sequence[Tensor] = torch.ops.glora_kernels.grouped_lora_linear(*operands, *made)[0]
        return ys
    for i, x in enumerate(row[: sizes[0]]):
        if x.ndim > 2 and not x.is_contiguous():
            row[i] = x.contiguous()  # it is read as the matrix of its rows
    wanted = tuple([t.requires_grad for t in row]) if torch.is_grad_enabled() else (False,) * len(row)
    even = sizes[0] == 1 or _is_even(row[: sizes[0]])
    key = (even, layout, scales, dropout_p, target, routes.chosen(), wanted)
    found = prepared.find(
        GROUPED, row, sizes[0], key, lambda: _prepare(row, sizes, group(), wanted, even, registered=False)
    )
    return prepared.call(found, row)


def _to_rows(xs: list[Tensor | None]) -> list[Callable[[Tensor], Tensor] | None]:
    """Put the rows of every nested or sparse x in its place, and return what gives the members' y the nesting."""
    known: dict[int, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}
    found: list[Callable[[Tensor], Tensor] | None] = [None] * len(xs)
    for i, x in enumerate(xs):
        if x is not None and not is_plain(x):
            if id(x) not in known:
                known[id(x)] = rows_of(x)
            xs[i], found[i] = known[id(x)]
    return found


def _size(**operands: Any) -> int:
    """The number of members, which every operand that is a sequence must have as entries."""
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


def _check(
    i: int,
    x: Tensor | None,
    weight: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    first: Tensor | None,
    dropout_p: float,
) -> None:
    if x is None or weight is None or first is None:
        raise ValueError(f"xs[{i}] and weights[{i}] must be tensors; got None")
    if not x.is_floating_point():
        raise TypeError(f"xs[{i}] must be a floating-point tensor, got {x.dtype}")
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"xs[{i}] (..., K) and weights[{i}] (N, K) do not fit: {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    n, k = weight.shape
    if autocast_dtype(first) is None and x.dtype != weight.dtype:
        raise TypeError(f"xs[{i}] and weights[{i}] must have one dtype outside autocast; got {x.dtype}, {weight.dtype}")
    if autocast_dtype(first) is None and x.dtype != first.dtype:
        raise TypeError(f"xs[{i}] is {x.dtype} and xs[0] {first.dtype}; a group has one dtype")
    if weight.requires_grad and torch.is_grad_enabled() and not is_transformed():
        raise ValueError(f"weights[{i}] requires a gradient, but the base of a LoRA layer is frozen and gets none")
    if (down is None) != (up is None):
        raise ValueError(f"downs[{i}] and ups[{i}] come together; one of them is None")
    if down is not None and up is not None:
        fits = down.ndim == 2 and up.ndim == 2 and len(down) > 0 and down.shape[1] == k and up.shape == (n, len(down))
        if not fits:
            raise ValueError(
                f"downs[{i}] must be (R, {k}) and ups[{i}] ({n}, R) with R >= 1; "
                f"got {tuple(down.shape)} and {tuple(up.shape)}"
            )
    if bias is not None:
        check_vector(f"biases[{i}]", bias, n, constant=False)
    for name, tensor in (("xs", x), ("weights", weight), ("downs", down), ("ups", up), ("biases", bias)):
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}[{i}] is on {tensor.device} and xs[0] on {first.device}; a group has one device")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    if dropout_p and down is not None:
        if seed is None:
            raise ValueError(f"dropout_p={dropout_p} needs seeds; member {i} has none: pass dropout_seed(x.device)")
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device not in (x.device, torch.device("cpu")):
            raise ValueError(
                f"seeds[{i}] must be one int64 on the CPU or {x.device}; "
                f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            )


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class _Values(NamedTuple):
    """sizes: how many tensors each field of `Operands` has in a row (`dispatch.prepared`), in this order."""

    sizes: tuple[int, ...]
    group: Group


def _prepare(
    row: Row, sizes: tuple[int, ...], group: Group, wanted: Sequence[bool], even: bool, registered: bool = True
) -> Prepared:
    operands = _operands(row, sizes)
    x, paths = operands.xs[0], len(group.paths())
    downs = _split(wanted, sizes)[2]
    read = {x for x, down in zip(group.x, group.down, strict=True) if down != ABSENT and downs[down]}
    casts = group.route == "eager" and any(weight.dtype != x.dtype for weight in operands.weights)
    made = len(row) + group.size
    return Prepared(
        GROUPED,
        _Values(sizes, group),
        wanted,
        [*read, *range(sizes[0], len(row)), *range(made, made + paths)],
        size=made + paths,
        with_rows=[*range(sizes[0]), *range(made, made + paths)],
        outputs=group.size,
        has_kernels=group.route == "triton" and even,
        keeps=registered,
        guard=workspace_lock if x.is_cuda and casts else None,
    )


def _is_even(xs: Sequence[Tensor]) -> bool:
    """Whether all members have as many tokens, which a program of launches takes for granted."""
    return len({x.shape[:-1] for x in xs}) == 1


def _operands(row: Row, sizes: Sequence[int]) -> Operands:
    return Operands(*_split(row[: sum(sizes)], sizes))


def _forward(row: Row, values: _Values) -> list[Tensor]:
    """y of every member, of N-dimensional x; behind them the h of every path."""
    operands, group = _operands(row, values.sizes), values.group
    path = path_of("grouped", group.route)
    ys, hs = path.forward(operands._replace(xs=[_flat(x) for x in operands.xs]), group)
    shapes = [operands.xs[i].shape[:-1] for i in group.x]
    # No view: PyTorch refuses to change a view in place that came out of a Function.
    return [
        *(
            y if len(lead) == 1 else torch.ops.aten._unsafe_view(y, [*lead, y.shape[-1]])
            for y, lead in zip(ys, shapes, strict=True)
        ),
        *hs,
    ]


def _backward(dys: Sequence[Tensor], row: Row, values: _Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the wanted tensors, in their shapes and dtypes. Of an x that is not there nothing is read."""
    sizes, group = values
    path = path_of("grouped", group.route)
    operands, hs = _known(dys, row, values), list(row[sum(sizes) + group.size :])
    xs, _, downs, ups, biases, _ = _split(wanted, sizes)
    flat = operands._replace(xs=[_flat(x) for x in operands.xs])
    grads = path.backward([_flat(dy) for dy in dys], flat, hs, group, GroupNeeds(xs, downs, ups, biases))
    absent: list[Tensor | None] = [None] * len(row)
    ordered = [*grads.xs, *absent[: sizes[1]], *grads.downs, *grads.ups, *grads.biases, *absent[: sizes[5]]]
    found = zip(ordered, operands.flat(), _shapes(dys, operands, group), wanted, strict=True)
    return [
        grad if grad is None else cast(grad, tensor.dtype).view(shape) for grad, tensor, shape, want in found if want
    ]


def _known(dys: Sequence[Tensor], row: Row, values: _Values) -> Operands:
    """The operands in a row of backward. In the place of an x that was not kept is an empty one of its dtype."""
    empty = dys[0].new_empty(0)
    return _operands([empty if tensor is None else tensor for tensor in row], values.sizes)


def _elsewhere(dys: Sequence[Tensor], row: Row, values: _Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    operands, hs = _known(dys, row, values), [given(h) for h in row[sum(values.sizes) + values.group.size :]]
    run = _batched_backward if any(map(is_batched, dys)) else _operator_backward
    grads = run(dys, operands, hs, values.group, wanted)
    return [grad for grad, want in zip(grads, wanted, strict=True) if want]


GROUPED = prepared.Operation("grouped_lora_linear", _forward, _backward, _elsewhere)


def _shapes(dys: Sequence[Tensor], operands: Operands, group: Group) -> list[Sequence[int]]:
    """The shape of every tensor of `operands.flat()`; of an x by its first member, since it may not have been kept."""
    first = [group.x.index(x) for x in range(len(operands.xs))]
    xs = [(*dys[i].shape[:-1], operands.weights[group.weight[i]].shape[1]) for i in first]
    return [*xs, *(tensor.shape for tensor in operands.flat()[len(xs) :])]


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return parts


def _operator_backward(
    dys: Sequence[Tensor], operands: Operands, hs: list[Tensor], group: Group, needs: Sequence[bool]
) -> list[Tensor | None]:
    """`_backward` through the registered operator."""
    grads = torch.ops.glora_kernels.grouped_lora_linear_backward(list(dys), *operands, hs, *group, list(needs))
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _batched_backward(
    dys: Sequence[Tensor], operands: Operands, hs: list[Tensor], group: Group, needs: Sequence[bool]
) -> list[Tensor | None]:
    """`_backward` where a dy is a batch. An x that was not kept takes no part in any wanted gradient."""
    sizes, shapes = [len(tensors) for tensors in operands], _shapes(dys, operands, group)
    xs = [
        x if x.numel() else torch.zeros(shape, dtype=x.dtype, device=x.device)
        for x, shape in zip(operands.xs, shapes[: len(operands.xs)], strict=True)
    ]

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(composite.grouped_lora_linear(Operands(*_split(tensors, sizes)), group, hs))

    return gradients(forward, operands._replace(xs=xs).flat(), needs, tuple(dys))


# The registered operators: the same functions behind torch.compile's boundary. An absent result is an empty tensor.


def _op(*arguments: Any) -> Any:
    operands, group = Operands(*arguments[:_COUNT]), _hashable(Group(*arguments[_COUNT:]))
    xs = [x if x.ndim == 2 or x.is_contiguous() else x.contiguous() for x in operands.xs]
    row, sizes = operands._replace(xs=xs).flat(), tuple(len(tensors) for tensors in operands)

    def make() -> Prepared:
        return _prepare(row, sizes, group, (False,) * len(row), even)

    even = _is_even(xs)

    with private_workspace():  # a graph that PyTorch captures must own all memory it writes
        results = prepared.find(GROUPED, row, sizes[0], (even, sizes, group), make).forward(row)
    return results[: group.size], results[group.size :]


def _hashable(group: Group) -> Group:
    values: Any = (tuple(value) if isinstance(value, list) else value for value in group)
    return Group(*values)


def _fake(*arguments: Any) -> Any:
    operands, group = Operands(*arguments[:_COUNT]), Group(*arguments[_COUNT:])
    ys = [
        operands.xs[x].new_empty(*operands.xs[x].shape[:-1], operands.weights[w].shape[0])
        for x, w in zip(group.x, group.weight, strict=True)
    ]
    hs = [
        operands.xs[x].new_empty(
            math.prod(operands.xs[x].shape[:-1]), operands.downs[down].shape[0], dtype=factor_dtype(operands)
        )
        for x, down, _, _ in group.paths()
    ]
    return ys, hs


def _op_backward(dys: list[Tensor], *arguments: Any) -> Any:
    operands, hs = Operands(*arguments[:_COUNT]), arguments[_COUNT]
    *values, needs = arguments[_COUNT + 1 :]
    group, sizes = _hashable(Group(*values)), tuple(len(tensors) for tensors in operands)
    row = [*operands.flat(), *[None] * group.size, *hs]
    with private_workspace():
        found = _prepare(operands.flat(), sizes, group, needs, _is_even(dys))
        grads = iter(found.backward(dys, [row[i] for i in found.saved]))
    return list(owned([given(next(grads)) if need else dys[0].new_empty(0) for need in needs]))


def _fake_backward(dys: list[Tensor], *arguments: Any) -> Any:
    operands, needs = Operands(*arguments[:_COUNT]), arguments[-1]
    shapes = _shapes(dys, operands, Group(*arguments[_COUNT + 1 : -1]))
    return [
        dys[0].new_empty(shape, dtype=tensor.dtype) if need else dys[0].new_empty(0)
        for tensor, shape, need in zip(operands.flat(), shapes, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, hs = output
    ctx.mark_non_differentiable(*hs)
    operands, group = Operands(*inputs[:_COUNT]), _hashable(Group(*inputs[_COUNT:]))
    sizes = tuple(len(tensors) for tensors in operands)
    wanted = list(ctx.needs_input_grad[: sum(sizes)])  # flat here, while backward sees lists of them
    row = operands.flat()
    ctx.prepared = _prepare(row, sizes, group, wanted, even=False)  # for what it says of the tensors alone
    everything = (*row, *[None] * group.size, *hs)
    ctx.save_for_backward(*[everything[i] for i in ctx.prepared.saved])


def _op_autograd(ctx: Any, dys: list[Tensor], dhs: Any) -> tuple[Any, ...]:
    found: Prepared = ctx.prepared
    row = found.placed(read_saved(ctx))
    grads = iter(_elsewhere(dys, row, found.values, found.wanted))
    flat = [next(grads) if want else None for want in found.wanted]
    return *_split(flat, found.values.sizes), *(None for _ in Group._fields)


def _op_autocast(xs: list[Tensor], *rest: Any) -> Any:
    target = autocast_dtype(xs[0])
    with torch.autocast(xs[0].device.type, enabled=False):
        return torch.ops.glora_kernels.grouped_lora_linear(
            xs if target is None else [x.to(target) for x in xs], *rest
        )  # fmt: skip


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("grouped_lora_linear", _op, _device)
    LIBRARY.impl("grouped_lora_linear_backward", _op_backward, _device)
    LIBRARY.impl("grouped_lora_linear", _op_autocast, f"Autocast{_device}")
torch.library.register_fake("glora_kernels::grouped_lora_linear", _fake, lib=LIBRARY)
torch.library.register_fake("glora_kernels::grouped_lora_linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd(
    "glora_kernels::grouped_lora_linear", _op_autograd, setup_context=_setup_context, lib=LIBRARY
)
