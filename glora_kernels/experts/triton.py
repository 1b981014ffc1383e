"""Both passes over experts by kernels: allocates, and launches. Same signatures as `experts.eager`.

Forward: `_multi_shrink_kernel` (h and σ), `_expert_product_kernel` (y with all terms, x read through the rows' tokens).
Backward: shrink (h, σ, S, τ, dy∘(1+a)), the product (dx by rows), `_expert_sum_kernel` (the rows of each token),
`_multi_outer_kernel` (the gradients), and before that Z once more where a vector or constant A is trained. Whose a row
is are data on the device: nothing waits for the host. 4-bit weights are decoded inside the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Codes, Weight, codes_of, given, stored, weight_of
from glora_kernels.experts.call import Call, Made, Needs, Terms
from glora_kernels.experts.groups import Groups
from glora_kernels.experts.product import Rows, expert_product_launch, expert_sum_launch, sizes_of
from glora_kernels.glora.call import C, Supports
from glora_kernels.glora.call import Call as One
from glora_kernels.multi.adapters import Adapter
from glora_kernels.multi.outer import Gradients, multi_outer_launch
from glora_kernels.multi.plan import Plan
from glora_kernels.multi.shrink import Side, multi_shrink_launch, shrink_of
from glora_kernels.multi.table import Kind, Table, table_of
from glora_kernels.runtime import configs, environment, program
from glora_kernels.runtime.launch import Dropout
from glora_kernels.runtime.planning import arch_of, is_planning
from glora_kernels.runtime.recording import empty, rows


class _How(NamedTuple):
    """What a pass depends on besides its tensors.

    rows_each: as `configs.expert_rows` has it. form: of a 4-bit weight (`dispatch.common.Codes`).
    """

    kind: Kind
    rows_each: int
    form: tuple[int, ...]
    p: float
    each: int
    of_tokens: bool
    is_sorted: bool


class _Wanted(NamedTuple):
    """What a backward makes: dx, and which `Gradients`, in which dtypes."""

    x: bool
    dtypes: Gradients


def forward(x: Tensor, weight: Weight, groups: Groups, t: Terms, call: Call) -> Made:
    """y (M,N). See `experts.eager.forward`; h and σ are made again in backward."""
    table = _table(t, call, groups.experts, x)
    (y,) = _passed("experts forward", _forward, None, x, weight, groups, table, t, call)
    return Made(given(y))


def _forward(tensors: Sequence[Tensor | None], how: _How) -> list[Tensor | None]:
    own = _read(tensors, how)
    x, (n, k), arch = given(own.x), own.sizes, arch_of(given(own.x))
    shrink = shrink_of(own.m, n, k, how.kind, x.dtype, arch)
    low = _low(x, own.m, how.kind, shrink.bands)
    sums = _sums(x, own.m, shrink.bands) if how.kind.layout.b else None
    if low is not None or sums is not None:
        side = Side(x, own.x_rows.list, own.x_rows.each, low, sums)
        multi_shrink_launch(own.table, own.plan, x=side, seed=own.seed, m=own.m, how=shrink, arch=arch).run()
    y = empty(x, own.m, n)
    expert_product_launch(
        y, x, own.weight, own.table, own.plan, rows_each=how.rows_each, low=low, sums=sums, left_rows=own.x_rows,
        out_rows=own.y_rows, arch=arch,
    ).run()  # fmt: skip
    return [y]


def backward(
    dy: Tensor, x: Tensor | None, weight: Weight, groups: Groups, t: Terms, made: Made, call: Call, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of `Needs`. See `experts.eager.backward`; of `made` nothing is read."""
    table = _table(t, call, groups.experts, dy)
    kind, experts = table.kind, groups.experts
    wanted = _Wanted(needs.x, Gradients(
        b_up=kind.factor if needs.up else None, b_down=kind.factor if needs.down else None,
        g=torch.float32 if needs.beta else None, b=kind.vector if needs.b else None,
        a=kind.vector if needs.a else None,
    ))  # fmt: skip
    dx, *found = _passed("experts backward", _backward, dy, x, weight, groups, table, t, call, wanted)
    grads = Gradients(*found)

    def of_factor(grad: Tensor | None, factor: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.view(given(factor).shape)

    def of_vector(grad: Tensor | None, vector: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        grad = grad[:experts]
        return grad if given(vector).shape[1] == grad.shape[1] else grad.sum(1, keepdim=True)

    return (
        dx, of_vector(grads.a, t.a), of_factor(grads.b_up, t.up), of_factor(grads.b_down, t.down),
        of_vector(grads.b, t.b), of_vector(grads.g, t.beta),
    )  # fmt: skip


def _backward(tensors: Sequence[Tensor | None], how: _How, wanted: _Wanted) -> list[Tensor | None]:
    """dx and the `Gradients`."""
    own = _read(tensors, how)
    dy, x, kind, (n, k), m = given(tensors[0]), own.x, how.kind, own.sizes, own.m
    arch, layout, dtypes = arch_of(dy), how.kind.layout, wanted.dtypes
    shrink = shrink_of(m, n, k, kind, dy.dtype, arch)
    h = _low(dy, m, kind, shrink.bands) if dtypes.b_up else None
    s = _low(dy, m, kind, shrink.bands) if wanted.x or dtypes.b_down else None
    sigma = _sums(dy, m, shrink.bands) if dtypes.b else None
    tau = _sums(dy, m, shrink.bands) if wanted.x and layout.b else None
    left = empty(dy, m, n) if wanted.x and layout.a else None
    of_x = of_dy = None
    if h is not None or sigma is not None:
        of_x = Side(given(x), own.x_rows.list, own.x_rows.each, h, sigma)
    if s is not None or tau is not None or left is not None:
        of_dy = Side(dy, own.y_rows, None, s, tau, left)
    if of_x is not None or of_dy is not None:
        multi_shrink_launch(
            own.table, own.plan, x=of_x, dy=of_dy, seed=own.seed, m=m, how=shrink, arch=arch
        ).run()  # fmt: skip
    dx = None
    if wanted.x:
        by_rows = empty(dy, m, k)
        expert_product_launch(
            by_rows, dy if left is None else left, own.weight, own.table, own.plan, rows_each=how.rows_each, low=s,
            sums=tau, of_dx=True, left_rows=Rows(own.y_rows), out_rows=own.x_rows.list, mask_rows=own.x_rows,
            seed=own.seed, arch=arch,
        ).run()  # fmt: skip
        dx = by_rows
        if own.x_rows.each is not None:
            dx = empty(dy, m // how.each, k)
            expert_sum_launch(by_rows, dx, how.each).run()
    z = None
    if dtypes.a:
        z = empty(dy, m, n)
        expert_product_launch(
            z, given(x), own.weight, own.table, own.plan, rows_each=how.rows_each, terms=False,
            left_rows=own.x_rows, out_rows=own.y_rows, arch=arch,
        ).run()  # fmt: skip
    shapes = Gradients(
        (sum(kind.ranks) * n,), (sum(kind.ranks) * k,), *[(len(kind.ranks), n)] * (len(Gradients._fields) - 3)
    )  # fmt: skip
    grads = Gradients(*[
        None if dtype is None else empty(dy, *shape, dtype=dtype)
        for dtype, shape in zip(dtypes[:-1], shapes[:-1], strict=True)
    ])  # fmt: skip
    if any(grad is not None for grad in grads):
        multi_outer_launch(
            grads, own.table, own.plan, dy=dy, x=x, z=z, h=h, s=s, sigma=sigma, dy_rows=own.y_rows,
            x_rows=own.x_rows.list, x_each=own.x_rows.each, seed=own.seed, bands=shrink.bands, arch=arch,
        ).run()  # fmt: skip
    return [dx, *grads[:-1]]


class _Own(NamedTuple):
    """The operands of a pass. m: M. x_rows, y_rows: for each sorted row its row in x, and in y and dy."""

    x: Tensor | None
    weight: Weight
    plan: Plan
    table: Table
    m: int
    sizes: tuple[int, int]
    x_rows: Rows
    y_rows: Tensor | None
    seed: Any


def _passed(
    name: str, function: program.Pass, dy: Tensor | None, x: Tensor | None, weight: Weight, groups: Groups,
    table: Table, t: Terms, call: Call, *wanted: _Wanted,
) -> Sequence[Tensor | None]:  # fmt: skip
    """The results of a pass, by its program where it has one.

    Of x there is the first row: kernels get its address, and how many tokens there are is no part of a call's class.
    """
    codes = codes_of(weight)
    by_token = call.of_tokens and groups.order is not None
    tensors = (
        dy, x if x is None or not by_token else x[:1], stored(weight), *codes[:4], groups.starts, groups.order,
        table.entries, t.seed,
    )  # fmt: skip
    m = len(given(groups.order if groups.order is not None else x if x is not None else dy))
    with_rows = (0, 8) if by_token else (0, 1, 8)
    each = configs.expert_rows(m, groups.experts)
    values = (
        _How(table.kind, each, tuple(codes.form), call.dropout_p, call.each, call.of_tokens, call.is_sorted), *wanted,
    )  # fmt: skip
    device = groups.starts.get_device()
    found = program.find(name, function, program.PassInputs(tensors, frozenset(with_rows), m, device), values)
    return function(tensors, *values) if found is None else found.run(tensors, m)


def _read(tensors: Sequence[Tensor | None], how: _How) -> _Own:
    """The operands of a pass from its tensors, in the order of `_passed`."""
    dy, x, packed, absmax, nested, code, offset, starts, order, entries, seed = tensors
    weight = weight_of(given(packed), Codes(absmax, nested, code, offset, how.form))
    table = Table(given(entries), how.kind)
    m = rows(order if order is not None else given(x if x is not None else dy))
    plan = Plan(given(starts) if order is None else order, given(starts))  # its places are read by nobody here
    x_rows = Rows(order, how.each if how.each > 1 else None) if how.of_tokens else Rows()
    return _Own(
        x, weight, plan, table, m, sizes_of(weight, len(table.entries) - 1), x_rows,
        None if how.is_sorted else order, None if seed is None else Dropout(how.p, seed).key(),
    )  # fmt: skip


def _low(like: Tensor, m: int, kind: Kind, bands: int) -> Tensor | None:
    """Memory for h, or S, where there is a rank."""
    if not kind.rank:
        return None
    wide = torch.float32 if kind.factor.itemsize > like.dtype.itemsize or bands > 1 else like.dtype
    return empty(like, bands, m, kind.width, dtype=wide)


def _sums(like: Tensor, m: int, bands: int) -> Tensor:
    """Memory for σ, or τ."""
    return empty(like, bands, m, dtype=torch.float32)


_tables: dict[tuple[Any, ...], Table] = {}
"""By where the operands lie: walking through the experts of a layer would cost each call a few hundred microseconds."""
_KEPT = 1024


def _table(t: Terms, call: Call, experts: int, like: Tensor) -> Table:
    """The experts as adapters, and behind them that of rows without one."""
    parts = (t.a, t.up, t.down, t.b, t.beta)
    key = (
        call.scale, call.dropout_p, experts, like.dtype, like.device, environment.stream_of(like.device),
        *(None if p is None else (p.data_ptr(), p.shape, p.stride(), p.dtype) for p in parts),
    )  # fmt: skip
    keeps = not is_planning() and not environment.is_capturing(like.device)  # `table_of` keeps a graph's tables alive
    if keeps and (known := _tables.get(key)) is not None:
        return known
    each = [(None,) * experts if p is None else p.unbind() for p in parts]
    one, none = One(call.scale, call.dropout_p, None, False, call.route), C()
    adapters = [
        Adapter(Supports(a=a, b=b, b_up=up, b_down=down, wc=beta), none, one)
        for a, up, down, b, beta in zip(*each, strict=True)
    ]  # fmt: skip
    adapters.append(Adapter(Supports(), none, one._replace(dropout_p=0.0)))
    found = table_of(adapters, like.dtype, like.device, [-1] * len(adapters))
    if keeps and not found.held:
        if len(_tables) >= _KEPT:
            _tables.clear()
        _tables[key] = found
    return found
