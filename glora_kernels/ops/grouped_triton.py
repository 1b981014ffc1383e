"""The Triton path of a group: allocates results and partial sums, and launches. Same signatures as `ops.grouped_eager`.

Forward: `_grouped_fwd_kernel`, after `_grouped_down_kernel` where h cannot be made beside the product. Backward:
`_grouped_dy_kernel`, `_grouped_x_kernel`, `_finish_kernel`, `_grouped_dx_kernel`: four launches, as of one layer; one
more above `MAX_FACTOR_RANK`, and one where so many members share a path that its S is summed first. What the members
leave lies side by side in one tensor, as if they were the columns of one layer.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from glora_kernels.launch import environment
from glora_kernels.launch.configs import MAX_FACTOR_RANK, Shape
from glora_kernels.launch.plan import arch_of
from glora_kernels.ops.common import Supports, factor_dtype, given
from glora_kernels.ops.grouped_common import ABSENT, Group, GroupGradients, GroupNeeds, Operands
from glora_kernels.ops.triton import MAX_RANK

if TYPE_CHECKING:
    from glora_kernels.launch import finish as end
    from glora_kernels.launch import grouped as launch
    from glora_kernels.launch import sums as reads
else:

    class _Lazy:
        """A module of launchers, loaded with the kernels at its first use, which then takes this object's place."""

        def __init__(self, alias: str, name: str) -> None:
            self._alias, self._name = alias, name

        def __getattr__(self, attribute: str) -> object:
            environment.require_triton()
            module = globals()[self._alias] = importlib.import_module(f"glora_kernels.launch.{self._name}")
            return getattr(module, attribute)

    end, launch, reads = _Lazy("end", "finish"), _Lazy("launch", "grouped"), _Lazy("reads", "sums")


_LINE = 128


def forward(operands: Operands, group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """(y_i (M,N) of every member, h_t (M,R) of every path). See `ops.grouped_eager.forward`."""
    operands = _plain(operands)
    xs = [operands.xs[i] for i in group.x]
    weights = [operands.weights[i] for i in group.weight]
    downs, ups = _of(operands.downs, group.down), _of(operands.ups, group.up)
    paths, path_of = group.paths(), group.path_of()
    rank = _max_rank(operands.downs)
    arch = arch_of(xs[0])
    wide = _factor_dtype(xs[0].dtype, operands)
    hs = [
        operands.xs[x].new_empty(len(operands.xs[x]), len(operands.downs[down]), dtype=wide) for x, down, _, _ in paths
    ]
    inside = launch.makes_h_inside(xs, weights, [*operands.downs, *operands.ups], rank, group.dropout_p, arch)
    if hs and not inside:
        launch.grouped_down_launch(
            [operands.xs[x] for x, _, _, _ in paths], [operands.downs[down] for _, down, _, _ in paths], hs,
            scales=[scale for *_, scale in paths], dropout_p=group.dropout_p, seeds=_seeds(operands, group), arch=arch,
        ).run()  # fmt: skip
    ys = [x.new_empty(len(x), len(w)) for x, w in zip(xs, weights, strict=True)]
    launch.grouped_fwd_launch(
        xs, weights, ys, downs=downs, ups=ups, biases=_of(operands.biases, group.bias),
        hs=[None if path == ABSENT else hs[path] for path in path_of],
        leave_h=[path != ABSENT and path not in path_of[:i] for i, path in enumerate(path_of)],
        scales=group.scales, inside=inside, arch=arch,
    ).run()  # fmt: skip
    return ys, hs


def backward(
    dys: list[Tensor], operands: Operands, hs: list[Tensor], group: Group, needs: GroupNeeds
) -> GroupGradients:
    """The gradients of the distinct tensors. See `ops.grouped_eager.backward`."""
    operands = _plain(operands)
    dys = [dy if dy.stride(-1) == 1 else dy.contiguous() for dy in dys]
    grads = GroupGradients.empty(needs)
    arch = arch_of(dys[0])
    read = _read_dy(dys, operands, hs, group, needs, arch)
    downs = _read_x(operands, read.ss, group, needs, arch)
    _finish(dys, operands, read, downs, group, needs, grads, arch)
    _input_gradients(dys, operands, read.ss, group, needs, grads, arch)
    return grads


class _Read(NamedTuple):
    """What reading every dy gave: S_t (bands,M,R), and of all members side by side partial sums along M.

    part (splits,1,ΣN): Σₘ dy. factor (splits,R,ΣN): dyᵀh.
    """

    ss: list[Tensor]
    part: Tensor | None
    factor: Tensor | None


def _read_dy(
    dys: list[Tensor], operands: Operands, hs: list[Tensor], group: Group, needs: GroupNeeds, arch: str
) -> _Read:
    """S of every path, or of none; the sums along M as far as wanted."""
    paths, path_of = group.paths(), group.path_of()
    widths = [dy.shape[1] for dy in dys]
    rank, total = _max_rank(operands.downs), sum(widths)
    shape = Shape(max(len(dy) for dy in dys), max(widths), max(widths), rank)
    users = [path_of.count(t) for t in range(len(paths))]
    sharing = max(users, default=0)
    wide = _factor_dtype(dys[0].dtype, operands)
    splits, bands, width = launch.grouped_dy_sizes(shape, group.size, sharing, dys[0].dtype, arch, wide)
    # Of all paths or of none: a member whose place were missing would write into another's.
    wants_s = any(needs.xs[x] or needs.downs[down] for x, down, _, _ in paths)
    sizes = [(len(dys[path_of.index(t)]), len(operands.downs[path[1]])) for t, path in enumerate(paths) if wants_s]
    # Each member of a path adds bands of its own. Where a path has fewer of them than another, the rest stay zero.
    make = dys[0].new_empty if len(set(users)) == 1 else dys[0].new_zeros
    memory = make(bands * sharing, _padded(sizes), dtype=torch.float32)
    ss = _views(memory, sizes)
    own_s: list[Tensor | None] = []
    for i, path in enumerate(path_of):
        first = path_of[:i].count(path) * bands
        own_s.append(ss[path][first : first + bands] if wants_s and path != ABSENT else None)
    with_g = any(bias != ABSENT and needs.biases[bias] for bias in group.bias)
    with_factor = any(up != ABSENT and needs.ups[up] for up in group.up)
    here = with_factor and rank <= MAX_FACTOR_RANK
    rows = with_g + rank * here
    part = dys[0].new_empty(splits, rows, total, dtype=torch.float32) if rows else None
    own_h = [None if path == ABSENT else hs[path] for path in path_of]
    if part is not None or ss:
        launch.grouped_dy_launch(
            dys, ups=_of(operands.ups, group.up), hs=own_h if here else [None] * group.size, ss=own_s,
            parts=None if part is None else _columns(part, widths), with_g=with_g, scales=group.scales, factors=wide,
            shape=shape, bands=(bands, width), arch=arch,
        ).run()  # fmt: skip
    if ss and len(memory) > launch.most_bands(rank):
        memory, parts = memory.new_empty(1, memory.shape[1]), memory
        end.finish_launch(outputs={}, sums=(_lines(parts, memory),), device_of=dys[0], arch=arch).run()
        ss = _views(memory, sizes)
    factor = part[:, int(with_g) :] if part is not None and here else None
    if with_factor and not here:
        count = reads.x_splits(shape, dys[0].dtype, arch)
        factor = dys[0].new_empty(count, rank, total, dtype=torch.float32)
        low = [i for i in range(group.size) if path_of[i] != ABSENT]
        columns = _columns(factor, widths)
        launch.grouped_x_launch(
            [dys[i] for i in low], ss=[given(own_h[i])[None] for i in low], parts=[columns[i] for i in low],
            factors=hs[0].dtype, shape=shape, splits=count, arch=arch,
        ).run()  # fmt: skip
    return _Read(ss, part[:, :1] if part is not None and with_g else None, factor)


class _Downs(NamedTuple):
    """Partial sums (splits,·) of every wanted S_tᵀ·x̃_t side by side, and where their sums go: (1,·), (1,R,K) each."""

    parts: Tensor
    sums: Tensor
    grads: dict[int, Tensor]


def _read_x(operands: Operands, ss: list[Tensor], group: Group, needs: GroupNeeds, arch: str) -> _Downs | None:
    """S_tᵀ·x̃_t of every path whose gradient of `down` is wanted."""
    paths = group.paths()
    wanted = [t for t, (_, down, _, _) in enumerate(paths) if needs.downs[down]]
    if not wanted:
        return None
    xs = [operands.xs[paths[t][0]] for t in wanted]
    sizes = [tuple(operands.downs[paths[t][1]].shape) for t in wanted]
    k = max(x.shape[1] for x in xs)
    shape = Shape(max(len(x) for x in xs), k, k, max(rank for rank, _ in sizes))
    splits = reads.x_splits(shape, xs[0].dtype, arch)
    parts = xs[0].new_empty(splits, _padded(sizes), dtype=torch.float32)
    keys = _seeds(operands, group)
    launch.grouped_x_launch(
        xs, ss=[ss[t] for t in wanted], parts=_views(parts, sizes), dropout_p=group.dropout_p,
        seeds=[keys[t] for t in wanted] if keys else [], factors=_factor_dtype(xs[0].dtype, operands), shape=shape,
        splits=splits, arch=arch,
    ).run()  # fmt: skip
    sums = parts.new_empty(1, parts.shape[1], dtype=_gradient_dtype(operands.downs, [down for _, down, _, _ in paths]))
    return _Downs(parts, sums, dict(zip(wanted, _views(sums, sizes), strict=True)))


def _finish(
    dys: list[Tensor],
    operands: Operands,
    read: _Read,
    downs: _Downs | None,
    group: Group,
    needs: GroupNeeds,
    grads: GroupGradients,
    arch: str,
) -> None:
    """Partial sums become d_up, d_bias and d_down, in one launch."""
    rank, total = _max_rank(operands.downs), sum(dy.shape[1] for dy in dys)
    outputs: dict[str, Tensor] = {}
    if read.factor is not None:
        outputs["db_up"] = dys[0].new_empty(total, rank, dtype=_gradient_dtype(operands.ups, group.up))
    if read.part is not None:
        outputs["de"] = dys[0].new_empty(total, dtype=_gradient_dtype(operands.biases, group.bias))
    if outputs or downs is not None:
        end.finish_launch(
            part=read.part, factor=read.factor, r=0 if read.factor is None else rank, with_g=read.part is not None,
            outputs=outputs, sums=() if downs is None else (_lines(downs.parts, downs.sums),), device_of=dys[0],
            arch=arch,
        ).run()  # fmt: skip
    first = 0
    for i, dy in enumerate(dys):
        last = first + dy.shape[1]
        up, bias = group.up[i], group.bias[i]
        if up != ABSENT and needs.ups[up]:
            _add(grads.ups, up, outputs["db_up"][first:last, : operands.ups[up].shape[1]])
        if bias != ABSENT and needs.biases[bias]:
            _add(grads.biases, bias, outputs["de"][first:last])
        first = last
    for t, grad in ({} if downs is None else downs.grads).items():
        _add(grads.downs, group.paths()[t][1], grad[0])


def _input_gradients(
    dys: list[Tensor],
    operands: Operands,
    ss: list[Tensor],
    group: Group,
    needs: GroupNeeds,
    grads: GroupGradients,
    arch: str,
) -> None:
    """dx of every x that wants one, each the sum over the members that read it."""
    wanted = [o for o in range(len(operands.xs)) if needs.xs[o]]
    if not wanted:
        return
    place = {o: i for i, o in enumerate(wanted)}
    members = sorted((i for i in range(group.size) if group.x[i] in place), key=lambda i: place[group.x[i]])
    paths = group.paths()
    low = sorted((t for t, path in enumerate(paths) if path[0] in place), key=lambda t: place[paths[t][0]])
    keys = _seeds(operands, group)
    dxs = []
    for o in wanted:
        member = group.x.index(o)
        dxs.append(dys[0].new_empty(len(dys[member]), operands.weights[group.weight[member]].shape[1]))
    launch.grouped_dx_launch(
        [dys[i] for i in members], [operands.weights[group.weight[i]] for i in members], dxs,
        owners=[place[group.x[i]] for i in members],
        paths=launch.Paths(
            [ss[t] for t in low],
            [operands.downs[paths[t][1]] for t in low],
            [keys[t] for t in low] if keys else [],
        ),
        path_owners=[place[paths[t][0]] for t in low], dropout_p=group.dropout_p, arch=arch,
    ).run()  # fmt: skip
    for o, dx in zip(wanted, dxs, strict=True):
        grads.xs[o] = dx


def _plain(operands: Operands) -> Operands:
    """The operands as the kernels read them: x with contiguous rows, small ones contiguous, one dtype an operand."""
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
    """Factors and biases, contiguous and in one dtype: fp32 where theirs differ."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        tensors = [tensor.float() for tensor in tensors]
    return [tensor.contiguous() for tensor in tensors]


def _factor_dtype(dtype: torch.dtype, operands: Operands) -> torch.dtype:
    """`ops.common.factor_dtype` of a group: one for all of its members."""
    down, up = (next(iter(tensors), None) for tensors in (operands.downs, operands.ups))
    return factor_dtype(dtype, Supports(b_up=up, b_down=down))


def _gradient_dtype(tensors: Sequence[Tensor], indices: Sequence[int]) -> torch.dtype:
    """The dtype in which an operand's gradients leave the kernel: its own, or fp32 where several terms are added up."""
    used = [i for i in indices if i != ABSENT]
    return tensors[0].dtype if len(set(used)) == len(used) else torch.float32


def _add(totals: list[Tensor | None], index: int, term: Tensor) -> None:
    known = totals[index]
    totals[index] = term if known is None else known + term


# Matrices of different sizes side by side in one tensor, in whole lines, so that one sum adds up all of them.


def _padded(sizes: Sequence[tuple[int, ...]]) -> int:
    return -(-sum(map(math.prod, sizes)) // _LINE) * _LINE


def _views(memory: Tensor, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The matrices (count,·,·) in a tensor (count, _padded(sizes))."""
    views, first = [], 0
    for size in sizes:
        views.append(memory[:, first : first + math.prod(size)].view(len(memory), *size))
        first += math.prod(size)
    return views


def _lines(parts: Tensor, out: Tensor) -> end.Sum:
    """The sum of all rows of `parts` into the one row of `out`."""
    count = parts.shape[1] // _LINE
    return end.Sum(parts.view(len(parts), count, _LINE), out.view(count, _LINE))


def _columns(part: Tensor, widths: list[int]) -> list[Tensor]:
    return list(part.split(widths, dim=2))


def _of(tensors: list[Tensor], indices: Sequence[int]) -> list[Tensor | None]:
    return [None if i == ABSENT else tensors[i] for i in indices]


def _seeds(operands: Operands, group: Group) -> list[Tensor]:
    """The key of every path, all on one device; none where nothing is dropped."""
    if not group.dropout_p:
        return []
    keys = operands.seeds
    if len({key.device for key in keys}) > 1:
        keys = [key.to(operands.xs[0].device) for key in keys]
    return [keys[seed] for _, _, seed, _ in group.paths()]


def _max_rank(downs: list[Tensor]) -> int:
    rank = max((len(down) for down in downs), default=0)
    if rank > MAX_RANK:
        raise RuntimeError(
            f"the Triton kernels hold a rank of up to {MAX_RANK} in registers; got {rank}: use backend('eager')"
        )
    return rank
