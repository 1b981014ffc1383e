"""One base under many adapters as an operator: the call and its checks, and what PyTorch is told of it.

    y[m] = Z[m]∘(1+a_j) + s_j·(x̃[m]·B_down,jᵀ)·B_up,jᵀ + σ[m]·b_j + β_j,   Z = xWᵀ, j = rows[m]

What it computes: `multi.eager`; the forms of one adapter: `glora.op`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Codes, Weight, cast, codes_of, flat, given, path_of, stored, unflat, weight_of
from glora_kernels.dispatch.operator import Operator
from glora_kernels.dispatch.prepared import NO_GUARD, Prepared
from glora_kernels.dispatch.signature import Row, Signature, Values, parts
from glora_kernels.dispatch.ways import is_elsewhere, is_plain, rows_of
from glora_kernels.glora import composite
from glora_kernels.glora.call import C, Needs, Supports
from glora_kernels.glora.op import Settings, checked
from glora_kernels.glora.wc import sizes
from glora_kernels.multi.adapter_set import AdapterSet, Ready, unstacked
from glora_kernels.multi.adapters import Numbers, Operands, Shared, adapters_of, order_of
from glora_kernels.multi.eager import Wanted
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import routes
from glora_kernels.runtime.direct import forms
from glora_kernels.runtime.workspace import workspace_lock


def multi_glora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    adapters: Sequence[Mapping[str, Any]] | Mapping[str, Any] | AdapterSet,
    rows: Tensor | Sequence[int],
) -> Tensor:
    """Each row of y as `glora_linear` gives it with the adapter of that row; W is read once for all of them.

    Row m of adapter j has y[m] = glora_linear(x[rows == j], weight, bias, **adapters[j]) in the place of m: the dropout
    mask of an adapter, too, is the one that its rows have alone. The gradient of x is each row's own, those of an
    adapter are sums over its rows (zero where it has none), that of a tensor that several adapters have, or of the
    bias, is the sum over them.

    Args:
        x: (..., K), as in `glora_linear`.
        weight: W (N, K), frozen, dense or in 4 bits.
        bias: of the base (N,), or None.
        adapters: J of them, each a mapping of the keyword arguments of `glora_linear` (a, a_up, ..., c, ..., e, scale,
            dropout_p, seed, variant) in any of their forms; ranks and scales may differ, a tensor may be in several.
            Or one such mapping of stacked tensors, each with J in front, where scale and dropout_p may be (J,) or a
            sequence, and `ranks` says how many ranks each adapter has of those that the stack is padded to. Or an
            `AdapterSet` of such mappings, which costs a call without gradients little of the host's time.
        rows: the adapter of each row of x: a tensor of integers of the leading shape of x, with -1 for the base
            alone; or a sequence of J integers, how many rows each adapter has, one segment after the other. The kernels
            sort a tensor of int64 once for all layers that are given it; in a CUDA graph each time, so that its replays
            may have others in its place.

    Returns:
        (..., N) in the dtype of x (of autocast where it is on).

    Raises:
        ValueError: a number in `rows` that is no adapter's (on a GPU asserted by the device, as an index of PyTorch's
            own is, in a CUDA graph too), segments that do not add up to the rows of x, and the errors of
            `glora_linear`, with the adapter's number in front.
        TypeError: rows that are no integers, an argument that `glora_linear` has not, and its errors.
        RuntimeError: a forced `backend` that cannot serve the call.

    Source: the rows' index set follows Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023; GLoRA's terms are ours.

    Examples:
        >>> from glora_kernels.ops import multi_glora_linear
        >>> x, weight = torch.randn(3, 16), torch.randn(32, 16)
        >>> adapters = [{"a": torch.randn(32)}, {"b_up": torch.randn(32, 4), "b_down": torch.randn(4, 16)}]
        >>> y = multi_glora_linear(x, weight, None, adapters, torch.tensor([0, 1, -1]))  # -1: none
        >>> torch.allclose(y[2], weight @ x[2], atol=1e-5)
        True
    """
    kept = isinstance(adapters, AdapterSet)
    chosen = adapters if isinstance(adapters, AdapterSet) else AdapterSet(
        unstacked(adapters) if isinstance(adapters, Mapping) else adapters
    )  # fmt: skip
    index = _index(rows, x, len(chosen))
    if kept and _is_simple(x) and (y := _inferred(x, weight, bias, chosen, index)) is not None:
        return y
    row, lengths = row_of(x, index, weight, bias, chosen)

    def check(row: Row) -> Values:
        own = given(row[0])
        _check(own, weight, bias, chosen)
        return values_of(weight, chosen.numbers, lengths, _route(own, weight))

    return MULTI.call(row, (chosen.numbers, lengths, codes_of(weight).form), check)[0]


def _route(x: Tensor, weight: Weight) -> str:
    return routes.route(x.device.type, x.dtype, four_bit=isinstance(weight, QuantizedWeight))


def _is_simple(x: Tensor) -> bool:
    """Whether a call is not differentiated, watched or cast, nor in `batch_invariant`, and x is contiguous rows."""
    return not (
        torch.is_grad_enabled()
        or routes.invariant()
        or is_elsewhere(x)
        or torch._C._is_any_autocast_enabled()
        or x.is_meta
        or not is_plain(x)
        or x.ndim < 2
        or not x.is_contiguous()
    )


def _inferred(x: Tensor, weight: Weight, bias: Tensor | None, chosen: AdapterSet, rows: Tensor) -> Tensor | None:
    """y of a simple call by what the set keeps of such calls; None where it can keep nothing."""

    def make() -> Ready:
        _check(x, weight, bias, chosen)
        row, lengths = row_of(x, rows, weight, bias, chosen)
        values = values_of(weight, chosen.numbers, lengths, _route(x, weight))
        found = MULTI.prepare(row, values, [False] * len(row))
        adapters = adapters_of(*MULTI.signature.read(row, values))
        return Ready(adapters, adapters[-1].call.route, found.guard or NO_GUARD, {})

    codes = codes_of(weight)
    base = forms((x, stored(weight), bias, *codes[:4]), b"\1", x.is_cuda)
    ready = chosen.ready((base, id(bias), codes.form, routes.chosen()), make)
    if ready is None:
        return None
    with ready.guard:
        y = path_of("multi", ready.route).forward(flat(x), weight, rows, ready.adapters, ready.kept)
    return unflat(y, x.shape[:-1])


def row_of(
    x: Tensor, rows: Tensor, weight: Weight, bias: Tensor | None, chosen: AdapterSet
) -> tuple[list[Any], tuple[int, ...]]:
    """The tensors of a call, and how many each field has."""
    shared = Shared([x], [rows], [stored(weight)], *([] if t is None else [t] for t in (bias, *codes_of(weight)[:4])))
    lengths = (*map(len, shared), *chosen.lengths)
    return [*(tensor for tensors in shared for tensor in tensors), *chosen.tensors], lengths


def values_of(weight: Weight, numbers: tuple[Any, ...], lengths: tuple[int, ...], route: str) -> Values:
    return Values((*numbers, route, codes_of(weight).form), lengths)


def _index(rows: Tensor | Sequence[int], x: Tensor, count: int) -> Tensor:
    """The adapter of each row of x, (M,)."""
    lead = tuple((rows_of(x)[0] if x.is_nested else x).shape[:-1])
    if isinstance(rows, Tensor):
        if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
            raise TypeError(f"rows must be numbers of adapters, a tensor of integers; got {rows.dtype}")
        if tuple(rows.shape) != lead:
            raise ValueError(f"rows must have one entry a row of x, shape {lead}; got {tuple(rows.shape)}")
        if rows.device != x.device:
            raise ValueError(f"x and rows must be on one device; got x on {x.device} and rows on {rows.device}")
        return rows if rows.ndim == 1 and rows.dtype == torch.int64 else rows.reshape(-1).to(torch.int64)
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence):
        raise TypeError(f"rows must be a tensor of integers or a sequence of lengths, got {type(rows).__name__}")
    lengths = list(rows)
    if not all(isinstance(length, int) and length >= 0 for length in lengths):
        raise TypeError(f"rows as lengths of segments must be integers >= 0; got {lengths!r}")
    if len(lengths) != count or sum(lengths) != math.prod(lead):
        raise ValueError(
            f"rows as lengths of segments must be {count} numbers, one an adapter, that add up to the "
            f"{math.prod(lead)} rows of x; got {len(lengths)} that add up to {sum(lengths)}"
        )
    return torch.arange(count, device=x.device).repeat_interleave(
        torch.tensor(lengths, device=x.device, dtype=torch.int64), output_size=math.prod(lead)
    )


def _check(x: Tensor, weight: Weight, bias: Tensor | None, chosen: AdapterSet) -> None:
    """The errors of `glora_linear`, with the adapter in front."""
    checked(x, weight, Supports(bias=bias), (), Settings())
    for j, (adapter, own) in enumerate(zip(chosen.adapters, chosen.settings, strict=True)):
        s = Supports(bias=bias, **{name: adapter.get(name) for name in Supports._fields if name != "bias"})
        cs = tuple(adapter.get(name) for name in C._fields)
        try:
            checked(x, weight, s, () if cs == (None,) * 3 else C(*cs), own)
        except (ValueError, TypeError) as error:
            raise type(error)(f"adapters[{j}]: {error}") from None


class _MultiGLoRALinear(Operator):
    name = "multi_glora_linear"
    signature = Signature(Shared, Operands, Numbers)
    results = ("ys", "made")
    reads = ("made",)

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        wanted = self.graded(wanted)
        shared, operands, numbers = self.signature.read(row, values)
        weight = _weight(shared, numbers)
        flags, _, _ = _wanted(wanted, values)
        reads_x = any(any(tensors) for name, tensors in flags._asdict().items() if name not in _SHIFTS)
        reads_x |= any(numbers.matmuls)  # for U of the product variant
        keeps_y = any(flags.a) and not registered and numbers.route == "eager"  # kernels make Z again
        x = shared.x[0]
        builds = isinstance(weight, QuantizedWeight) or weight.dtype != x.dtype or bool(operands.a_up)
        builds |= bool(operands.a) and routes.is_invariant(numbers.route)
        return Prepared(
            self,
            values,
            wanted,
            [*([0] if reads_x else []), *range(1, len(row)), *([len(row)] if keeps_y else [])],
            size=len(row) + 1,
            with_rows=(0, len(row)),
            has_kernels=False,  # its passes plan their own programs, over a table of addresses (`multi.triton`)
            keeps=registered,
            guard=workspace_lock if x.is_cuda and builds else None,
        )

    def forward(self, row: Row, values: Values) -> list[Tensor]:
        shared, operands, numbers = self.signature.read(row, values)
        x = shared.x[0]
        adapters = adapters_of(shared, operands, numbers)
        y = path_of("multi", numbers.route).forward(flat(x), _weight(shared, numbers), shared.rows[0], adapters)
        return [unflat(y, x.shape[:-1])]

    def backward(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
        own = row[: len(wanted)]
        x, y = own[0], (row[len(wanted)] if len(row) > len(wanted) else None)
        shared, operands, numbers = self.signature.read(own, values)
        adapters, weight = adapters_of(shared, operands, numbers), _weight(shared, numbers)
        _, needs_x, asked = _wanted(wanted, values)
        dx, found = path_of("multi", numbers.route).backward(
            flat(dys[0]), *(None if t is None else flat(t) for t in (x, y)), weight, shared.rows[0], adapters, needs_x,
            asked,
        )  # fmt: skip
        grads: list[Tensor | None] = [None] * len(own)
        if dx is not None:
            grads[0] = dx.view(*dys[0].shape[:-1], weight.shape[1])
        for j, own_grads in enumerate(found):
            places = _places(values, numbers, j)
            for name, grad in zip((*Supports._fields, *C._fields), own_grads, strict=True):
                place = places.get(name)
                if grad is not None and place is not None and wanted[place]:
                    known = grads[place]
                    grads[place] = grad if known is None else known + grad
        # An adapter without rows has none of its own. x is not here where dx alone is made, which has its dtype.
        return [
            grad if tensor is None else torch.zeros_like(tensor) if grad is None else cast(grad, tensor.dtype)
            for grad, tensor, want in zip(grads, own, wanted, strict=True)
            if want
        ]

    def composite(self, row: Row, values: Values) -> tuple[Tensor]:
        """Each adapter a layer of its own."""
        shared, operands, numbers = self.signature.read(row, values)
        x, weight = shared.x[0], _weight(shared, numbers)
        adapters = adapters_of(shared, operands, numbers)
        order = order_of(shared.rows[0], numbers.size, lambda *_: False)
        found = []
        for span in order.spans:
            s, c, call = adapters[span.j]
            if any(t is not None for t in c):
                s = s._replace(wc=composite.glora_wc(weight, c))
            mine = slice(None) if order.places is None else order.places
            found.append(composite.glora_linear(flat(x)[mine][span.rows], weight, s, call))
        y = torch.cat(found) if found else flat(x).new_empty(0, weight.shape[0])
        if order.places is not None:
            y = y[order.places.argsort()]
        return (y.view(*x.shape[:-1], weight.shape[0]),)

    def fake(self, shared: Shared, operands: Operands, numbers: Numbers) -> tuple[list[Tensor], list[Tensor]]:
        x, n = shared.x[0], sizes(shared.weight[0].shape, numbers)[0]
        return [x.new_empty(*x.shape[:-1], n)], []

    def input_shapes(self, dys: Sequence[Tensor], shared: Shared, operands: Any, numbers: Numbers) -> list[Any]:
        return [(*dys[0].shape[:-1], sizes(shared.weight[0].shape, numbers)[1])]

    def flops(self, shared: Any, operands: Any, numbers: Numbers) -> int:
        """x·Wᵀ, and the low-rank products as if every row had the largest rank: shapes do not tell the rows of each."""
        (n, k), m = sizes(shared.weight[0], numbers), math.prod(shared.x[0][:-1])
        return 2 * m * n * k + 2 * m * (n + k) * max((up[1] for up in operands.b_up), default=0)

    def backward_flops(self, dy: Any, needs: Sequence[bool], shared: Any, operands: Any, numbers: Numbers) -> int:
        (n, k), m = sizes(shared.weight[0], numbers), math.prod(dy[0][:-1])
        rank = max((up[1] for up in operands.b_up), default=0)
        trained = any(needs[sum(map(len, shared)) :])
        return 2 * m * n * k * needs[0] + 2 * m * (n + k) * rank * (1 + trained)


def _weight(shared: Shared, numbers: Numbers) -> Weight:
    absmax, nested_absmax, nested_code, nested_offset = (tensors[0] if tensors else None for tensors in shared[4:])
    return weight_of(shared.weight[0], Codes(absmax, nested_absmax, nested_code, nested_offset, numbers.form))


def _wanted(wanted: Sequence[bool], values: Values) -> tuple[Operands, bool, list[Wanted]]:
    """The flags of every field's tensors; whether x wants a gradient; and what each adapter wants."""
    numbers = Numbers(*values.numbers)
    split = parts(wanted, values.sizes or ())
    flags = Operands(*split[len(Shared._fields) :])
    needs_x, needs_bias = split[0][0], any(split[3])
    asked = []
    for j in range(numbers.size):
        own = {name: getattr(flags, name)[place] for name, place in numbers.places_of(j).items()}
        cs = tuple(own.pop(name, False) for name in C._fields)
        own.pop("seed", None)
        needs = Needs(bias=needs_bias, **own)
        asked.append(Wanted(needs._replace(wc=needs.wc or any(cs)), cs))
    return flags, needs_x, [*asked, Wanted(Needs(bias=needs_bias))]


def _places(values: Values, numbers: Numbers, j: int) -> dict[str, int]:
    """The places in a row of the bias and of what adapter j has; the base alone is the last."""
    firsts = [0, *accumulate(values.sizes or ())]
    own = numbers.places_of(j) if j < numbers.size else {}
    of_fields = dict(zip(Operands._fields, firsts[len(Shared._fields) :], strict=False))
    return {"bias": firsts[3], **{name: of_fields[name] + place for name, place in own.items()}}


_SHIFTS = ("wc", "c", "c_up", "c_down", "d", "e", "seed")
"""What has its gradient of dy alone."""

MULTI = _MultiGLoRALinear()
MULTI.register()
