"""The path of the Triton kernels: allocates, and launches. Same signatures as `multi.eager`.

Forward: `_multi_shrink_kernel`, `_multi_expand_kernel`, the vendor's product. Backward: the same three, and
`_multi_outer_kernel`; where a vector or constant A is trained a second product, of which it needs Z. Before the first
layer that gets an assignment `_multi_plan_kernel` sorts its rows. Which adapters there are and whose a row is are data
on the device: nothing waits for the host, and no pass is planned or compiled again for other addresses, scales, keys or
rows.

Where A is lora an adapter has a weight of its own, W_eff: its rows are sorted on the host, which waits for that, and
take the launches of a single layer (`glora.triton`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Weight, given
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.glora import triton as single
from glora_kernels.glora.call import Made, Needs, Supports
from glora_kernels.glora.eager import cast_weight, small_terms
from glora_kernels.multi.adapters import Adapter, Order, Span, order_of
from glora_kernels.multi.eager import Wanted, made_wc, with_c
from glora_kernels.multi.expand import multi_expand_launch
from glora_kernels.multi.outer import Gradients, multi_outer_launch
from glora_kernels.multi.plan import Plan, plan_of
from glora_kernels.multi.shrink import Shrink, Side, multi_shrink_launch, shrink_of
from glora_kernels.multi.table import Kind, Table, table_of
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import environment, program
from glora_kernels.runtime.launch import LibraryProduct
from glora_kernels.runtime.planning import arch_of
from glora_kernels.runtime.recording import empty, rows
from glora_kernels.runtime.workspace import workspace_like


def forward(
    x: Tensor, weight: Weight, assignment: Tensor, adapters: Sequence[Adapter], kept: dict[int, Known] | None = None
) -> Tensor:
    """y (M,N). See `multi.eager.forward`.

    kept: by stream, of calls with these adapters, as long as their tensors stay where they are.
    """
    stream = environment.stream_of(x.device)
    if (
        kept is not None and stream in kept and not environment.is_capturing(x.device)
    ):  # `table_of` keeps a graph's tables alive
        table, makes_wc = kept[stream]
        wcs = made_wc(weight, adapters)[1] if makes_wc else None
        return _together(x, weight, assignment, adapters, table, wcs)
    places, wcs = made_wc(weight, adapters)
    if not any(map(_is_apart, adapters)):
        table = _table_of(adapters, x, places)
        if kept is not None and table.lasts:
            kept[stream] = Known(table, bool(places))
        return _together(x, weight, assignment, adapters, table, wcs)
    order, spans, first = _split(assignment, adapters)
    x, rest, others = order.sort(x), order.sort(assignment)[:first], _without(adapters)
    y = x.new_empty(len(x), weight.shape[0])
    y[:first] = _together(x[:first], weight, rest, others, _table_of(others, x, places), wcs)
    for j, at in spans:
        s = adapters[j].s._replace(wc=given(wcs)[places[j]]) if j in places else adapters[j].s
        y[at] = single.forward(x[at], weight, s, adapters[j].call).y
    return order.unsort(y)


class Known(NamedTuple):
    """What a set keeps of a call: the table, and whether the call makes W·c."""

    table: Table
    makes_wc: bool


def _table_of(adapters: Sequence[Adapter], x: Tensor, places: Mapping[int, int]) -> Table:
    """The table of a forward; `places` are of `made_wc`."""
    return table_of(adapters, x.dtype, x.device, [places.get(j, -1) for j in range(len(adapters))])


def _together(
    x: Tensor, weight: Weight, assignment: Tensor, adapters: Sequence[Adapter], table: Table, wcs: Tensor | None
) -> Tensor:
    """`forward` of adapters without A=lora."""
    tensors = (
        x, _dense(weight, x, adapters), table.entries, *plan_of(assignment, len(adapters)), adapters[-1].s.bias, wcs
    )  # fmt: skip
    return given(_passed("multi forward", _forward, tensors, (0, 3), (table.kind,))[0])


def _forward(tensors: Sequence[Tensor | None], kind: Kind) -> list[Tensor | None]:
    """y, of x (M,K), W (N,K), the table and the plan, the bias, and the W·c that were made (·,N)."""
    x, weight, entries, places, starts = map(given, tensors[:5])
    bias, wcs = tensors[5:]
    table, plan, layout = Table(entries, kind), Plan(places, starts), kind.layout
    how = _shrink(x, weight, kind)
    y = empty(x, rows(x), len(weight))
    low, sums = _low(x, kind, how), _sums(x, how) if layout.b else None
    if low is not None or sums is not None:
        multi_shrink_launch(table, plan, x=Side(x, places, low=low, sums=sums), how=how, arch=arch_of(x)).run()
    product = LibraryProduct(x, weight.t(), y, accumulates=not layout.a)
    if layout.a:
        product.run()
    multi_expand_launch(
        y, table, plan, low=low, sums=sums, read=layout.a, bias=bias, wcs=wcs, arch=arch_of(x)
    ).run()  # fmt: skip
    if not layout.a:
        product.run()
    return [y]


class _Asked(NamedTuple):
    """What a backward makes: dx, and which `Gradients`, in which dtypes."""

    x: bool
    dtypes: Gradients


def backward(
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Weight,
    assignment: Tensor,
    adapters: Sequence[Adapter],
    needs_x: bool,
    wanted: Sequence[Wanted],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """dx, and of each adapter the gradients of its supports and of C. See `multi.eager.backward`; y is not read.

    The gradient of the bias stands at the last adapter, summed over the rows of all but those with A=lora.
    """
    if not any(map(_is_apart, adapters)):
        dx, found = _gradients_together(dy, x, weight, assignment, adapters, needs_x, wanted)
        return dx, with_c(found, weight, adapters, wanted)
    order, spans, first = _split(assignment, adapters)
    dy, x = order.sort(dy), None if x is None else order.sort(x)
    rest = order.sort(assignment)[:first]
    dx = dy.new_empty(len(dy), weight.shape[1]) if needs_x else None
    some, found = _gradients_together(
        dy[:first], None if x is None else x[:first], weight, rest, _without(adapters), needs_x,
        [Wanted(Needs()) if _is_apart(adapter) else want for adapter, want in zip(adapters, wanted, strict=True)],
    )  # fmt: skip
    if dx is not None:
        dx[:first] = given(some)
    for j, at in spans:
        s, call, needs = adapters[j].s, adapters[j].call, wanted[j].s._replace(x=needs_x)
        if needs.wc and s.wc is None:  # of C: backward reads no more of it than its form
            s = s._replace(wc=dy.new_empty(dy.shape[1], dtype=torch.float32))
        mine = None if x is None else x[at]
        made = Made(None) if mine is None else small_terms(mine, weight, s, call)[1]
        own, *found[j] = single.backward(dy[at], mine, weight, s, made, call, needs)
        if dx is not None:
            dx[at] = given(own)
    return None if dx is None else order.unsort(dx), with_c(found, weight, adapters, wanted)


def _gradients_together(
    dy: Tensor, x: Tensor | None, weight: Weight, assignment: Tensor, adapters: Sequence[Adapter], needs_x: bool,
    wanted: Sequence[Wanted],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:  # fmt: skip
    """dx, and of each adapter without A=lora the gradients of its supports."""
    table = table_of(adapters, dy.dtype, dy.device, [-1] * len(adapters))
    asked = _Asked(needs_x, _dtypes(adapters, wanted, table.kind))
    tensors = (
        dy, x, _dense(weight, dy, adapters), table.entries, *plan_of(assignment, len(adapters)), adapters[-1].s.bias
    )  # fmt: skip
    dx, *found = _passed("multi backward", _backward, tensors, (0, 1, 4), (table.kind, asked))
    return dx, _of_each(Gradients(*found), adapters, wanted, table.kind, weight)


def _backward(tensors: Sequence[Tensor | None], kind: Kind, asked: _Asked) -> list[Tensor | None]:
    """dx and the `Gradients`, of dy (M,N), x (M,K), W (N,K), the table and the plan, and the bias."""
    x, bias = tensors[1], tensors[6]
    dy, weight, entries, places, starts = map(given, (tensors[0], *tensors[2:6]))
    table, plan, layout, arch = Table(entries, kind), Plan(places, starts), kind.layout, arch_of(dy)
    (n, k), m, dtypes = weight.shape, rows(dy), asked.dtypes
    how = _shrink(dy, weight, kind)
    h = _low(dy, kind, how) if dtypes.b_up else None
    s = _low(dy, kind, how) if asked.x or dtypes.b_down else None
    sigma = _sums(dy, how) if dtypes.b else None
    tau = _sums(dy, how) if asked.x and layout.b else None
    left = empty(dy, m, n) if asked.x and layout.a else None
    of_x = None if h is None and sigma is None else Side(given(x), places, low=h, sums=sigma)
    of_dy = None if s is None and tau is None and left is None else Side(dy, places, low=s, sums=tau, left=left)
    if of_x is not None or of_dy is not None:
        multi_shrink_launch(table, plan, x=of_x, dy=of_dy, how=how, arch=arch).run()
    dx = None
    if asked.x:
        dx = empty(dy, m, k)
        added = s is not None or tau is not None
        if added:
            multi_expand_launch(dx, table, plan, low=s, sums=tau, of_dx=True, arch=arch).run()
        LibraryProduct(dy if left is None else left, weight, dx, accumulates=added).run()
    z = None
    if dtypes.a:
        z = empty(dy, m, n)
        LibraryProduct(given(x), weight.t(), z, accumulates=False).run()
    shapes = Gradients(
        (sum(kind.ranks) * n,), (sum(kind.ranks) * k,), *[(len(kind.ranks), n)] * (len(Gradients._fields) - 3)
    )  # fmt: skip
    grads = Gradients(*[
        None if dtype is None else empty(dy, *shape, dtype=dtype)
        for dtype, shape in zip(dtypes[:-1], shapes[:-1], strict=True)
    ])  # fmt: skip
    if any(grad is not None for grad in grads):
        multi_outer_launch(
            grads, table, plan, dy=dy, x=x, z=z, h=h, s=s, sigma=sigma, bias=bias, dy_rows=places, x_rows=places,
            bands=how.bands, arch=arch,
        ).run()  # fmt: skip
    return [dx, *grads[:-1]]


def _passed(
    name: str, function: program.Pass, tensors: tuple[Tensor | None, ...], with_rows: Sequence[int], values: tuple
) -> Sequence[Tensor | None]:
    """The results of a pass, by its program where it has one."""
    first = given(tensors[0])
    operands = program.PassInputs(tensors, frozenset(with_rows), len(first), first.get_device())
    found = program.find(name, function, operands, values)
    return function(tensors, *values) if found is None else found.run(tensors, len(first))


def _is_apart(adapter: Adapter) -> bool:
    """Whether an adapter's rows take another weight than W."""
    return adapter.s.a_up is not None


def _split(assignment: Tensor, adapters: Sequence[Adapter]) -> tuple[Order, list[Span], int]:
    """The rows sorted, the spans of adapters with A=lora behind all others, and the first of their rows.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if environment.is_capturing(assignment.device):
        raise RuntimeError(
            "rows of adapters with A=lora are sorted on the host, which no CUDA graph can hold: capture "
            "multi_glora_linear with other adapters, or merge these"
        )
    order = order_of(assignment, len(adapters) - 1, lambda j, _: _is_apart(adapters[j]))
    spans = [span for span in order.spans if _is_apart(adapters[span.j])]
    return order, spans, spans[0].rows.start if spans else len(assignment)


def _without(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters, with the base alone in the place of those with A=lora, whose rows are elsewhere."""
    return [adapters[-1] if _is_apart(adapter) else adapter for adapter in adapters]


def _dense(weight: Weight, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W in the dtype of x, in the workspace where it is stored in another one or in 4 bits."""
    if not isinstance(weight, QuantizedWeight):
        return cast_weight(weight, x.dtype)
    dense = workspace_like(weight, x.dtype)
    four_bit.dequantize_launch(weight, dense, route=adapters[-1].call.route, arch=arch_of(x)).run()
    return dense


def _shrink(like: Tensor, weight: Tensor, kind: Kind) -> Shrink:
    n, k = weight.shape
    return shrink_of(rows(like), n, k, kind, like.dtype, arch_of(like))


def _low(like: Tensor, kind: Kind, how: Shrink) -> Tensor | None:
    """Memory for h, or S, where any adapter has a rank."""
    if not kind.rank:
        return None
    wide = torch.float32 if kind.factor.itemsize > like.dtype.itemsize or how.bands > 1 else like.dtype
    return empty(like, how.bands, rows(like), kind.width, dtype=wide)


def _sums(like: Tensor, how: Shrink) -> Tensor:
    """Memory for σ, or τ."""
    return empty(like, how.bands, rows(like), dtype=torch.float32)


def _dtypes(adapters: Sequence[Adapter], wanted: Sequence[Wanted], kind: Kind) -> Gradients:
    """The dtypes of what is wanted: that of the operands, or fp32 where several gradients are added up."""

    def dtype_of(own: torch.dtype, *names: str) -> torch.dtype | None:
        asked = [
            tensor
            for adapter, want in zip(adapters, wanted, strict=True)
            for name in names
            if getattr(want.s, name) and (tensor := getattr(adapter.s, name)) is not None
        ]
        is_sum = len({id(tensor) for tensor in asked}) < len(asked) or any(t.numel() == 1 for t in asked)
        return None if not asked else torch.float32 if is_sum else own

    g = dtype_of(kind.vector, "e", "wc")
    if any(want.s.wc for want in wanted):
        g = torch.float32
    return Gradients(
        dtype_of(kind.factor, "b_up"), dtype_of(kind.factor, "b_down"), g, dtype_of(kind.vector, "d"),
        torch.float32 if wanted[-1].s.bias else None, dtype_of(kind.vector, "b"), dtype_of(kind.vector, "a"),
    )  # fmt: skip


def _of_each(
    grads: Gradients, adapters: Sequence[Adapter], wanted: Sequence[Wanted], kind: Kind, weight: Weight
) -> list[list[Tensor | None]]:
    """The gradients of each adapter, in the order of `Supports`."""
    found: list[list[Tensor | None]] = [[None] * len(Supports._fields) for _ in adapters]
    for name, where in _FROM.items():
        whole = getattr(grads, where)
        asked = [j for j, want in enumerate(wanted) if getattr(want.s, name)]
        if whole is None or not asked:
            continue
        if name in ("b_up", "b_down"):
            side = weight.shape[name == "b_down"]
            each = whole.split_with_sizes([side * rank for rank in kind.ranks])
            shapes = [(side, rank) if name == "b_up" else (rank, side) for rank in kind.ranks]
            each = [part.view(shape) for part, shape in zip(each, shapes, strict=True)]
        else:
            each = whole.unbind()
        sums = None
        for j in asked:
            own = getattr(adapters[j].s, name)
            if own is not None and own.numel() == 1 and each[j].numel() > 1:
                sums = whole.sum(1, keepdim=True).unbind() if sums is None else sums
                found[j][_PLACE[name]] = sums[j]
            elif name == "wc" and wanted[j].s.e:  # autograd may keep both as they are: no two in one memory
                found[j][_PLACE[name]] = each[j].clone()
            else:
                found[j][_PLACE[name]] = each[j]
    if grads.bias is not None:
        found[-1][_PLACE["bias"]] = grads.bias.sum(0)
    return found


_PLACE = {name: place for place, name in enumerate(Supports._fields)}
_FROM = {"b_up": "b_up", "b_down": "b_down", "e": "g", "wc": "g", "d": "d", "b": "b", "a": "a"}
"""Which of the `Gradients` a support has."""
