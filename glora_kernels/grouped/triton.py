"""The Triton path of a group: allocates results and partial sums, and launches. Same signatures as `grouped.eager`.

Forward: `_grouped_fwd_kernel`, after `_grouped_down_kernel` where the former cannot compute h as well. Backward:
`_grouped_dy_kernel`, `_grouped_x_kernel`, `_finish_kernel`, `_grouped_dx_kernel`: four launches, as for one layer. One
more above `MAX_FACTOR_RANK`, and one more where `_grouped_x_kernel` cannot sum S over its bands: where too many members
share a path, or some gradient of a `down` is not wanted. The partial sums of the members are side by side in one
tensor, like the columns of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import given
from glora_kernels.glora.finish import finish_launch, parts, summed
from glora_kernels.glora.sums import padded, x_splits
from glora_kernels.glora.triton import check_rank
from glora_kernels.grouped.group import ABSENT, Group, LowRankInput, Operands, Trained, add, factor_dtype
from glora_kernels.grouped.product import Paths, grouped_dx_launch, grouped_fwd_launch, makes_h_inside
from glora_kernels.grouped.sums import (
    grouped_bands_launch,
    grouped_down_launch,
    grouped_dy_launch,
    grouped_dy_sizes,
    grouped_x_launch,
    most_bands,
)
from glora_kernels.operands import NO_COLUMNS, Columns, Parts
from glora_kernels.runtime.configs import MAX_FACTOR_RANK, Shape, m_class
from glora_kernels.runtime.planning import arch_of
from glora_kernels.runtime.recording import empty, rows, zeros

_LINE = 128


class _Call(NamedTuple):
    """A call, and what both passes need of it.

    paths: the distinct low-rank inputs; path_of: for each member the index of its path. rank: the largest. wide: the
    dtype of h, S and of products with factors.
    """

    operands: Operands
    group: Group
    paths: list[LowRankInput]
    path_of: list[int]
    rank: int
    wide: torch.dtype
    arch: str

    def inputs(self, paths: Iterable[int]) -> list[Tensor]:
        return [self.operands.xs[self.paths[t].x] for t in paths]

    def downs(self, paths: Iterable[int]) -> list[Tensor]:
        return [self.operands.downs[self.paths[t].down] for t in paths]

    def seeds(self, paths: Iterable[int]) -> list[Tensor]:
        """The seeds of paths, all on one device; empty without dropout."""
        if not self.group.dropout_p:
            return []
        keys = self.operands.seeds
        if len({key.device for key in keys}) > 1:
            keys = [key.to(self.operands.xs[0].device) for key in keys]
        return [keys[self.paths[t].seed] for t in paths]

    def of_members(self, each: list[Tensor]) -> list[Tensor | None]:
        """For each member, the entry of its path; None where it has no path."""
        return [None if t == ABSENT else each[t] for t in self.path_of]


def _call(operands: Operands, group: Group) -> _Call:
    operands = _plain(operands)
    rank = max((len(down) for down in operands.downs), default=0)
    check_rank(rank)
    wide = factor_dtype(operands)
    return _Call(operands, group, group.paths(), group.path_of(), rank, wide, arch_of(operands.xs[0]))


def forward(operands: Operands, group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """(y_i (M,N) of every member, h_t (M,R) of every path). See `grouped.eager.forward`."""
    call = _call(operands, group)
    operands, path_of, every = call.operands, call.path_of, range(len(call.paths))
    xs = [operands.xs[i] for i in group.x]
    weights = [operands.weights[i] for i in group.weight]
    hs = [
        empty(x, rows(x), len(down), dtype=call.wide)
        for x, down in zip(call.inputs(every), call.downs(every), strict=True)
    ]
    inside = makes_h_inside(
        xs, weights, [*operands.downs, *operands.ups], call.rank, group.dropout_p, call.arch
    )  # fmt: skip
    if hs and not inside:
        grouped_down_launch(
            call.inputs(every), call.downs(every), hs, scales=[path.scale for path in call.paths],
            dropout_p=group.dropout_p, seeds=call.seeds(every), arch=call.arch,
        ).run()  # fmt: skip
    ys = [empty(x, rows(x), len(w)) for x, w in zip(xs, weights, strict=True)]
    grouped_fwd_launch(
        xs, weights, ys, downs=_of(operands.downs, group.down), ups=_of(operands.ups, group.up),
        biases=_of(operands.biases, group.bias), hs=call.of_members(hs),
        leave_h=[path != ABSENT and path not in path_of[:i] for i, path in enumerate(path_of)],
        scales=group.scales, inside=inside, arch=call.arch,
    ).run()  # fmt: skip
    return ys, hs


def backward(dys: list[Tensor], operands: Operands, hs: list[Tensor], group: Group, needs: Trained) -> Trained:
    """The gradients of the distinct tensors. See `grouped.eager.backward`."""
    call = _call(operands, group)
    dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
    grads = needs.without()
    ms = [rows(dys[call.path_of.index(t)]) for t in range(len(call.paths))]
    read = _read_dy(dys, ms, call, hs, needs)
    downs, ss = _read_x(call, read.ss, ms, needs)
    _finish(dys, call, read, downs, needs, grads)
    _input_gradients(dys, call, ss, needs, grads)
    return grads


class _Read(NamedTuple):
    """The results of reading every dy: S_t (bands,M,R), and partial sums along M, all members side by side.

    part (splits,1,ΣN): Σₘ dy. factor (splits,R,ΣN): dyᵀh.
    """

    ss: list[Tensor]
    part: Parts | None
    factor: Parts | None


def _read_dy(dys: list[Tensor], ms: Sequence[int], call: _Call, hs: list[Tensor], needs: Trained) -> _Read:
    """S of every path, of as many rows as `ms` says, or of none; and the sums along M that are wanted."""
    group, paths, path_of, rank, dy = call.group, call.paths, call.path_of, call.rank, dys[0]
    widths = [dy.shape[1] for dy in dys]
    total = sum(widths)
    shape = Shape(max(map(rows, dys)), max(widths), max(widths), rank)
    users = [path_of.count(t) for t in range(len(paths))]
    sharing = max(users, default=0)
    splits, bands, width = grouped_dy_sizes(shape, group.size, sharing, dy.dtype, call.arch, call.wide)
    # S of all paths or of none: a member without an S of its own would write into another's (`members.addresses`).
    wants_s = any(needs.xs[path.x] or needs.downs[path.down] for path in paths)
    # Each member of a path writes bands of its own. A path with fewer members than another has bands left over: zeros.
    make = empty if len(set(users)) == 1 else zeros
    ss = [
        make(dy, bands * sharing, m, len(call.operands.downs[path.down]), dtype=torch.float32)
        for path, m in zip(paths, ms, strict=True) if wants_s
    ]  # fmt: skip
    with_g = any(bias != ABSENT and needs.biases[bias] for bias in group.bias)
    with_factor = any(up != ABSENT and needs.ups[up] for up in group.up)
    here = with_factor and rank <= MAX_FACTOR_RANK
    count = with_g + rank * here
    part = empty(dy, splits, count, padded(total), dtype=torch.float32)[..., :total] if count else None
    own_h = call.of_members(hs)
    if part is not None or ss:
        grouped_dy_launch(
            dys, ups=_of(call.operands.ups, group.up), hs=own_h if here else [None] * group.size,
            ss=call.of_members(ss) if ss else [None] * group.size,
            # The members of a path write to bands of their own, in the order of the members.
            first_bands=[path_of[:i].count(path) * bands for i, path in enumerate(path_of)],
            parts=None if part is None else _columns(part, widths), with_g=with_g, scales=group.scales,
            factors=call.wide, shape=shape, bands=(bands, width), arch=call.arch,
        ).run()  # fmt: skip
    factor = parts(part[:, int(with_g) :], splits) if part is not None and here else None
    if with_factor and not here:
        shape = shape._replace(m=m_class(shape.m))
        across = x_splits(shape, dy.dtype, call.arch)
        sums = empty(dy, across, rank, total, dtype=torch.float32)
        factor = parts(sums, across)
        low = [i for i in range(group.size) if path_of[i] != ABSENT]
        columns = _columns(sums, widths)
        grouped_x_launch(
            [dys[i] for i in low], ss=[given(own_h[i])[None] for i in low], parts=[columns[i] for i in low],
            factors=hs[0].dtype, shape=shape, splits=across, arch=call.arch,
        ).run()  # fmt: skip
    return _Read(ss, parts(part[:, 0], splits) if part is not None and with_g else None, factor)


class _Downs(NamedTuple):
    """Partial sums (splits,·) of all wanted S_tᵀ·x̃_t side by side; memory (1,·) for their sums; views of it by path."""

    parts: Tensor
    sums: Tensor
    grads: dict[int, Tensor]


def _read_x(
    call: _Call, ss: list[Tensor], ms: Sequence[int], needs: Trained
) -> tuple[_Downs | None, list[Tensor]]:  # fmt: skip
    """Partial sums of S_tᵀ·x̃_t for each path whose `down` is trained; and S_t summed over its bands, for dx.

    ms: the rows of each S_t. An x that no `down` needs may have none: it was not kept for backward.

    The launch that reads x also sums the bands, if it reads the S of every path and a kernel can hold that many bands
    (`most_bands`). Otherwise one launch sums them first.
    """
    operands = call.operands
    wanted = [t for t, path in enumerate(call.paths) if needs.downs[path.down]]
    sums: list[Tensor] | None = None
    if ss and any(needs.xs):
        sums = [empty(s, m, s.shape[2], dtype=call.wide) for s, m in zip(ss, ms, strict=True)]
    many = bool(ss) and len(ss[0]) > most_bands(call.rank)
    if ss and (many or (sums is not None and len(wanted) < len(ss))):
        if len(ss[0]) > 1:
            alone = [empty(s, 1, m, s.shape[2]) for s, m in zip(ss, ms, strict=True)]
            grouped_bands_launch(ss, [s[0] for s in alone]).run()
            ss = alone
        sums = None
    downs = None
    if wanted:
        xs = call.inputs(wanted)
        sizes = [tuple(down.shape) for down in call.downs(wanted)]
        k = max(x.shape[1] for x in xs)
        shape = Shape(m_class(max(map(rows, xs))), k, k, max(rank for rank, _ in sizes))
        splits = x_splits(shape, xs[0].dtype, call.arch)
        part = empty(xs[0], splits, _padded(sizes), dtype=torch.float32)
        grouped_x_launch(
            xs, ss=[ss[t] for t in wanted], sums=sums, parts=_views(part, sizes), dropout_p=call.group.dropout_p,
            seeds=call.seeds(wanted), factors=call.wide, shape=shape, splits=splits, arch=call.arch,
        ).run()  # fmt: skip
        dtype = _gradient_dtype(operands.downs, [path.down for path in call.paths])
        total = empty(part, 1, part.shape[1], dtype=dtype)
        downs = _Downs(part, total, dict(zip(wanted, _views(total, sizes), strict=True)))
    return downs, [s[0] for s in ss] if sums is None else sums


def _finish(dys: list[Tensor], call: _Call, read: _Read, downs: _Downs | None, needs: Trained, grads: Trained) -> None:
    """Partial sums become d_up, d_bias and d_down, in one launch."""
    operands, group, total = call.operands, call.group, sum(dy.shape[1] for dy in dys)
    d_up = d_bias = None
    columns = NO_COLUMNS
    if read.factor is not None:
        d_up = empty(dys[0], total, call.rank, dtype=_gradient_dtype(operands.ups, group.up))
    if read.part is not None:
        d_bias = empty(dys[0], total, dtype=_gradient_dtype(operands.biases, group.bias))
        columns = Columns(g=read.part.ptr, step=read.part.step, end=read.part.end, de=d_bias)
    if any(one is not None for one in (d_up, d_bias, downs)):
        finish_launch(
            columns=columns, factor=read.factor, db_up=d_up, n=total, ranks=(0, 0 if d_up is None else call.rank),
            sums=() if downs is None else (summed(downs.parts, downs.sums),), dtype=dys[0].dtype, arch=call.arch,
        ).run()  # fmt: skip
    first = 0
    for dy, up, bias in zip(dys, group.up, group.bias, strict=True):
        last = first + dy.shape[1]
        if up != ABSENT and needs.ups[up]:
            add(grads.ups, up, given(d_up)[first:last, : operands.ups[up].shape[1]])
        if bias != ABSENT and needs.biases[bias]:
            add(grads.biases, bias, given(d_bias)[first:last])
        first = last
    for t, grad in ({} if downs is None else downs.grads).items():
        add(grads.downs, call.paths[t].down, grad[0])


def _input_gradients(
    dys: list[Tensor], call: _Call, ss: list[Tensor], needs: Trained, grads: Trained
) -> None:  # fmt: skip
    """dx of every x that wants one, each the sum over the members that read it."""
    group, weights = call.group, [call.operands.weights[i] for i in call.group.weight]
    wanted = [o for o in range(len(call.operands.xs)) if needs.xs[o]]
    if not wanted:
        return
    place = {o: i for i, o in enumerate(wanted)}
    members = sorted((i for i in range(group.size) if group.x[i] in place), key=lambda i: place[group.x[i]])
    low = sorted((t for t, path in enumerate(call.paths) if path.x in place), key=lambda t: place[call.paths[t].x])
    firsts = [group.x.index(o) for o in wanted]
    dxs = [empty(dys[0], rows(dys[i]), weights[i].shape[1]) for i in firsts]
    grouped_dx_launch(
        [dys[i] for i in members], [weights[i] for i in members], dxs, owners=[place[group.x[i]] for i in members],
        paths=Paths([ss[t] for t in low], call.downs(low), call.seeds(low)),
        path_owners=[place[call.paths[t].x] for t in low], dropout_p=group.dropout_p, arch=call.arch,
    ).run()  # fmt: skip
    for o, dx in zip(wanted, dxs, strict=True):
        grads.xs[o] = dx


def _plain(operands: Operands) -> Operands:
    """The operands as the kernels need them: x with contiguous rows, small ones contiguous, one dtype per field."""
    weights = _one_layout(operands.weights)
    xs = [x if x.stride(-1) == 1 else x.contiguous() for x in operands.xs]
    return operands._replace(
        xs=xs, weights=weights, downs=_small(operands.downs), ups=_small(operands.ups), biases=_small(operands.biases)
    )  # fmt: skip


def _one_layout(weights: list[Tensor]) -> list[Tensor]:
    if len({weight.dtype for weight in weights}) > 1:
        raise ValueError(f"the weights of a group must have one dtype; got {sorted({str(w.dtype) for w in weights})}")
    for axis in (1, 0):
        if all(weight.stride(axis) == 1 for weight in weights):
            return weights
    layouts = [weight.stride() for weight in weights]
    raise ValueError(f"the weights of a group must all be row-major, or all transposed; got strides {layouts}")


def _small(tensors: list[Tensor]) -> list[Tensor]:
    """Factors or biases, made contiguous and of one dtype: fp32 where theirs differ."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    return [tensor.contiguous() for tensor in tensors]


def _gradient_dtype(tensors: Sequence[Tensor], indices: Sequence[int]) -> torch.dtype:
    """The dtype in which the kernel writes gradients: the tensors' own, or fp32 where terms are still to be added."""
    used = [i for i in indices if i != ABSENT]
    return tensors[0].dtype if len(set(used)) == len(used) else torch.float32


# Matrices of different sizes lie side by side in one tensor, padded to whole lines, so that one sum adds up all.


def _padded(sizes: Sequence[tuple[int, ...]]) -> int:
    return -(-sum(map(math.prod, sizes)) // _LINE) * _LINE


def _views(memory: Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The matrices (count,·,·) in a tensor (count, _padded(sizes))."""
    views, first = [], 0
    for size in sizes:
        views.append(memory[:, first : first + math.prod(size)].view(len(memory), *size))
        first += math.prod(size)
    return views


def _columns(part: Tensor, widths: list[int]) -> list[Tensor]:
    return list(part.split(widths, dim=2))


def _of(tensors: list[Tensor], indices: Sequence[int]) -> list[Tensor | None]:
    return [None if i == ABSENT else tensors[i] for i in indices]
