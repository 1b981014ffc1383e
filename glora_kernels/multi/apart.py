"""Many adapters over one base inside `batch_invariant`: each adapter as a call of `glora_linear` with its rows alone.

The rows of an adapter are a copy in memory of its own and go through the functions of that operator on the call's path,
so that y, dx and the adapter's gradients have the bits that they have alone. Forward's results are computed again in
backward.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from glora_kernels.dispatch.common import Weight, given, path_of
from glora_kernels.glora.call import C, Made, Supports
from glora_kernels.multi.adapters import Adapter, Order, order_of
from glora_kernels.multi.eager import Wanted
from glora_kernels.runtime.environment import is_capturing


def forward(x: Tensor, weight: Weight, rows: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """y (M,N). See `multi.eager.forward`."""
    order = _sorted(rows, adapters)
    x, y = order.sort(x), x.new_empty(len(x), weight.shape[0])
    for j, at in order.spans:
        adapter = adapters[j]
        y[at] = path_of("glora", adapter.call.route).forward(
            x[at].clone(), weight, _with_wc(adapter, weight), adapter.call
        ).y  # fmt: skip
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
    """dx, and of each adapter the gradients of its supports and of C. See `multi.eager.backward`; y is not read."""
    order = _sorted(rows, adapters)
    dy, x = order.sort(dy), None if x is None else order.sort(x)
    dx = dy.new_empty(len(dy), weight.shape[1]) if needs_x else None
    found: list[list[Tensor | None]] = [[None] * len(Supports._fields + C._fields) for _ in adapters]
    for j, at in order.spans:
        adapter, want, mine = adapters[j], wanted[j], None if x is None else x[at].clone()
        s, path = _with_wc(adapter, weight), path_of("glora", adapter.call.route)
        made = Made(None) if mine is None else path.forward(mine, weight, s, adapter.call)
        own, *grads = path.backward(
            dy[at].clone(), mine, weight, s, made, adapter.call, want.s._replace(x=needs_x)
        )  # fmt: skip
        if dx is not None:
            dx[at] = given(own)
        of_c = [None] * len(C._fields)
        if any(want.c):
            of_c = path.wc_backward(grads[_WC], weight, adapter.c, want.c)
        found[j] = [*grads, *of_c]
    return None if dx is None else order.unsort(dx), found


def _sorted(rows: Tensor, adapters: Sequence[Adapter]) -> Order:
    if is_capturing(rows.device):
        raise RuntimeError(
            "inside batch_invariant() multi_glora_linear sorts its rows on the host, which no CUDA graph can hold: "
            "capture calls of glora_linear instead"
        )
    return order_of(rows, len(adapters) - 1, lambda *_: False)


def _with_wc(adapter: Adapter, weight: Weight) -> Supports:
    """The supports of an adapter, with W·c where it has C."""
    s, c, call = adapter
    if all(t is None for t in c):
        return s
    return s._replace(wc=path_of("glora", call.route).wc_forward(weight, c))


_WC = Supports._fields.index("wc")
