"""Many adapters over one base in plain PyTorch: one large product for all rows whose weight is W.

The rows are sorted by adapter. All that an adapter adds to its rows is computed as `glora.eager` does for a layer of
its own, or for adapters of one form with few rows each by one operation for all (`multi.stacked`), and goes into the
one product with W.

Where A is lora the rows of an adapter have a weight of their own, W_eff = W∘(1 + A_up·A_down). For few of them it is
not built (`FEW`), and all such adapters share R more products with W:

    y = x·W_effᵀ = xWᵀ + Σ_r A_up[:,r]∘((x∘A_down[r])Wᵀ)
    dx = dy·W_eff = dy·W + Σ_r A_down[r]∘T_r,   T_r = (dy∘A_up[:,r])W
    dA_down[r] = Σₘ x∘T_r,   dA_up[:,r] = Σₘ dy∘((x∘A_down[r])Wᵀ)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Weight, cast, given, wide_dtype
from glora_kernels.glora import eager, recover
from glora_kernels.glora.call import C, Made, Needs, Supports, wc_dtype
from glora_kernels.glora.chunks import gathered, thin
from glora_kernels.multi.adapters import Adapter, Order, order_of
from glora_kernels.multi.stacked import Part, Stack, form_of

FEW = 2
"""Up to how many rows of an adapter with A=lora it has no weight of its own."""
_ROWS = 1024
"""How many rows x∘A_down[r] are multiplied at a time."""


class Wanted(NamedTuple):
    """Which gradients of one adapter are wanted: those of its supports, and those of C."""

    s: Needs
    c: Sequence[bool] = (False, False, False)


def forward(
    x: Tensor, weight: Weight, rows: Tensor, adapters: Sequence[Adapter], kept: dict[Any, Any] | None = None
) -> Tensor:
    """y (M,N).

    Args:
        x: (M,K) in the dtype of the computation.
        weight: W (N,K) in that dtype, in another one under autocast, or in 4 bits.
        rows: the adapter of each row, -1 for the last of them, which is the base alone.
        adapters: all of them.
        kept: of an `AdapterSet`, for what a path keeps of its adapters; here nothing.
    """
    order, parts = _sorted(rows, adapters, _supports(weight, adapters))
    x, dtype, wide = order.sort(x), x.dtype, wide_dtype(x.dtype)
    y = x.new_empty(len(x), weight.shape[0])
    shared = [part for part in parts if not part.own]
    alone, stacks = _stacked(shared, x)
    terms = [eager.small_terms(x[part.at], weight, part.beside, part.call)[0] for part in alone]
    if shared:
        dense = eager.cast_weight(weight, dtype)
        for part, found in zip(alone, terms, strict=True):
            # What A does not scale comes after it.
            eager.put_terms(y[part.at], x[part.at], found if part.s.a is None else eager.AddedTerms(found.beta))
        for stack in stacks:
            stack.put(y, x)
        for part, products in _by_rank(shared, lambda part: _times(x, part, given(part.s.a_down)), dense.t()):
            y[part.at] += _over_ranks(products, given(part.s.a_up).t())
        together = slice(shared[-1].at.stop)
        torch.addmm(y[together], x[together], dense.t(), out=y[together])
        for part, found in zip(alone, terms, strict=True):
            if part.s.a is not None:
                eager.scale_rows(y[part.at], 1 + part.s.a.to(wide), found)
        for stack in stacks:
            stack.finish(y, x)
    for part in parts[len(shared) :]:
        y[part.at] = eager.forward(x[part.at], weight, part.s, part.call).y
    return order.unsort(y)


def backward(
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Weight,
    rows: Tensor,
    adapters: Sequence[Adapter],
    needs_x: bool,
    wanted: Sequence[Wanted],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """dx, and of each adapter the gradients of its supports and of C, None where not wanted or without rows.

    As `glora.eager.backward` has them for a layer with the rows of that adapter alone. y is there where it was kept.
    """
    reads_y = any(want.s.a for want in wanted)  # and β, which W·c is a part of
    if reads_y and y is None:
        y = forward(given(x), weight, rows, adapters)
    supports = _supports(weight, adapters) if reads_y else [each.s for each in adapters]
    order, parts = _sorted(rows, adapters, supports, wanted)
    dy, x, y = order.sort(dy), *(None if t is None else order.sort(t) for t in (x, y))
    dx = dy.new_empty(len(dy), weight.shape[1]) if needs_x else None
    found: list[list[Tensor | None]] = [[None] * len(Supports._fields) for _ in adapters]
    shared = [part for part in parts if not part.own]
    left = torch.empty_like(dy) if any(part.s.a is not None for part in shared) else dy
    alone, stacks = _stacked(shared, dy)
    for part in (*alone, *parts[len(shared) :]):
        at, need = part.at, wanted[part.j].s._replace(x=needs_x)
        made = Made(None) if x is None else eager.small_terms(x[at], weight, part.beside, part.call)[1]
        made = made._replace(y=None if y is None else y[at])
        mine = dy[at], None if x is None else x[at], weight, part.beside, made, part.call, need
        if part.own:
            delta, *found[part.j] = eager.backward(*mine)
        else:
            delta, found[part.j] = eager.small_gradients(*mine)
            if left is not dy:
                left[at] = dy[at] if part.s.a is None else eager.scale_dy(dy[at], part.s.a)
        if dx is not None:
            dx[at] = 0.0 if delta is None else delta
    for stack in stacks:
        need = wanted[stack.parts[0].j].s._replace(x=needs_x)
        delta = _stack_gradients(stack, dy, x, y, weight, need, found)
        if left is not dy:
            left[stack.at] = stack.scaled(dy)
        if dx is not None:
            dx[stack.at] = 0.0 if delta is None else delta
    if shared:
        _shared_products(dy, x, left, dx, weight, shared, wanted, found)
    return None if dx is None else order.unsort(dx), with_c(found, weight, adapters, wanted)


def _stack_gradients(
    stack: Stack,
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Weight,
    need: Needs,
    found: list[list[Tensor | None]],
) -> Tensor | None:
    """Note the gradients of a stack's adapters; its part of dx but for the product with W."""
    delta, grads, made = stack.gradients(dy, x, need)
    if grads.bias is not None:
        found[stack.parts[0].j][_BIAS] = grads.bias
    for place, grad in enumerate(grads):
        if grad is not None and place != _BIAS:
            for part, own in zip(stack.parts, grad.unbind(), strict=True):
                found[part.j][place] = own
    if need.a:
        for i, part in enumerate(stack.parts):
            mine = Made(given(y)[part.at], *(None if t is None else t[i, : part.size] for t in (made.h, made.sigma)))
            found[part.j][_A] = recover.gradient(dy[part.at], given(x)[part.at], weight, part.beside, mine)
    return delta


def _shared_products(
    dy: Tensor,
    x: Tensor | None,
    left: Tensor,
    dx: Tensor | None,
    weight: Weight,
    shared: Sequence[Part],
    wanted: Sequence[Wanted],
    found: list[list[Tensor | None]],
) -> None:
    """The products with W itself: add that of dx to it, and note the gradients of A=lora of few rows."""
    dense, together = eager.cast_weight(weight, dy.dtype), slice(shared[-1].at.stop)
    if dx is not None:
        torch.addmm(dx[together], left[together], dense, out=dx[together])
    downs = [part for part in shared if dx is not None or wanted[part.j].s.a_down]
    for part, products in _by_rank(downs, lambda part: _times(dy, part, given(part.s.a_up).t()), dense):
        if dx is not None:
            dx[part.at] += _over_ranks(products, given(part.s.a_down))
        if wanted[part.j].s.a_down:
            found[part.j][_A_DOWN] = _over_rows(products, given(x)[part.at])
    ups = [part for part in shared if wanted[part.j].s.a_up]
    for part, products in _by_rank(ups, lambda part: _times(given(x), part, given(part.s.a_down)), dense.t()):
        found[part.j][_A_UP] = _over_rows(products, dy[part.at]).t()


def _sorted(
    rows: Tensor, adapters: Sequence[Adapter], supports: Sequence[Supports], wanted: Sequence[Wanted] | None = None
) -> tuple[Order, list[Part]]:
    """The order of the rows, and the parts: those that take W, of them those of one form together, before others."""
    places: dict[Hashable, int] = {}

    def takes_own(j: int, size: int) -> bool:
        return adapters[j].s.a_up is not None and (adapters[j].call.matmul or size > FEW)

    @functools.cache
    def place(j: int, size: int) -> tuple[bool, int]:
        form = form_of(j, adapters[j], size), None if wanted is None else wanted[j].s
        return takes_own(j, size), places.setdefault(form, len(places))

    order = order_of(rows, len(adapters) - 1, place)
    parts = []
    for span in order.spans:
        own, form = place(span.j, span.size)
        by_rank = not own and supports[span.j].a_up is not None
        parts.append(Part(span.rows, span.j, supports[span.j], adapters[span.j].call, own, by_rank, form))
    return order, parts


def _stacked(parts: Iterable[Part], like: Tensor) -> tuple[list[Part], list[Stack]]:
    """The parts that are computed alone, and the stacks of others."""
    groups = [list(group) for _, group in groupby(parts, lambda part: part.form)]
    alone = [group[0] for group in groups if len(group) == 1]
    return alone, [Stack.of(group, like) for group in groups if len(group) > 1]


def _by_rank(parts: Sequence[Part], left_of: Callable[[Part], Tensor], right: Tensor) -> Iterator[tuple[Part, Tensor]]:
    """left·right of those parts that go by rank, whose left is (rows, R, ·)."""
    waiting: list[tuple[Part, Tensor]] = []
    few = [part for part in parts if part.by_rank]
    for part in few:
        waiting.append((part, left_of(part)))
        if part is few[-1] or sum(left.shape[0] * left.shape[1] for _, left in waiting) >= _ROWS:
            products = torch.cat([left.flatten(0, 1) for _, left in waiting]) @ right
            sizes = [left.shape[0] * left.shape[1] for _, left in waiting]
            for (each, left), product in zip(waiting, products.split(sizes), strict=True):
                yield each, product.view(*left.shape[:2], -1)
            waiting.clear()


def _times(matrix: Tensor, part: Part, factors: Tensor) -> Tensor:
    """matrix[m]∘factors[r] of the rows m of a part, (rows, R, ·)."""
    return cast(matrix[part.at, None] * factors, matrix.dtype)


def _over_ranks(products: Tensor, factors: Tensor) -> Tensor:
    """Σ_r factors[r]∘products[m,r]."""
    return (products.to(wide_dtype(products.dtype)) * factors).sum(1)


def _over_rows(products: Tensor, matrix: Tensor) -> Tensor:
    """Σₘ matrix[m]∘products[m,r], (R, ·)."""
    return (products.to(wide_dtype(products.dtype)) * matrix[:, None]).sum(0)


def _supports(weight: Weight, adapters: Sequence[Adapter]) -> list[Supports]:
    """Those of each adapter, with W·c where it has C."""
    supports = [adapter.s for adapter in adapters]
    places, wcs = made_wc(weight, adapters)
    for j, place in places.items():
        supports[j] = supports[j]._replace(wc=given(wcs)[place])
    return supports


def made_wc(weight: Weight, adapters: Sequence[Adapter]) -> tuple[dict[int, int], Tensor | None]:
    """W·c of the adapters that have C (·,N), in one product, and the row of each; None where none has."""
    with_c = [j for j, adapter in enumerate(adapters) if any(t is not None for t in adapter.c)]
    if not with_c:
        return {}, None
    wide = _wide(weight, [adapters[j].c for j in with_c])
    cs = torch.stack([eager.c_vector(adapters[j].c, wide) for j in with_c])
    return {j: place for place, j in enumerate(with_c)}, thin(weight, cs, wide).t()


def with_c(
    found: list[list[Tensor | None]], weight: Weight, adapters: Sequence[Adapter], wanted: Sequence[Wanted]
) -> list[list[Tensor | None]]:
    """The gradients of each adapter's supports, behind them those of C, from that of W·c: dc = Wᵀg."""
    of_c = [j for j, want in enumerate(wanted) if any(want.c) and found[j][_WC] is not None]
    gradients: dict[int, list[Tensor | None]] = {}
    if of_c:
        wide = _wide(weight, [adapters[j].c for j in of_c])
        dcs = gathered(torch.stack([cast(given(found[j][_WC]), wide) for j in of_c], 1), weight, wide)
        gradients = {j: eager.c_gradients(dc, adapters[j].c, wanted[j].c) for j, dc in zip(of_c, dcs, strict=True)}
    return [[*grads, *gradients.get(j, [None] * 3)] for j, grads in enumerate(found)]


def _wide(weight: Weight, cs: Iterable[C]) -> torch.dtype:
    return max((wc_dtype(weight, c) for c in cs), key=lambda dtype: dtype.itemsize)


_A, _A_UP, _A_DOWN, _BIAS, _WC = (
    Supports._fields.index(name) for name in ("a", "a_up", "a_down", "bias", "wc")
)  # fmt: skip
