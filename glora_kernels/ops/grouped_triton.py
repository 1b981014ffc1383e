"""The Triton path of a group: allocates results and partial sums, and launches. Same signatures as `ops.grouped_eager`.

Forward: `_grouped_fwd_kernel`, after `_grouped_down_kernel` where h cannot be made beside the product. Backward:
`_grouped_dy_kernel`, the sums over x, `_finish_kernel`, `_grouped_dx_kernel`: four launches, as of one layer. What
the members leave lies side by side in one tensor, as if they were the columns of one layer.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glora_kernels.launch import environment
from glora_kernels.launch.configs import MAX_FACTOR_RANK, Shape
from glora_kernels.launch.plan import arch_of
from glora_kernels.ops.common import given
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


def forward(operands: Operands, group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """(y_i (M,N) of every member, h_t (M,R) of every path). See `ops.grouped_eager.forward`."""
    operands = _plain(operands)
    xs = [operands.xs[i] for i in group.x]
    weights = [operands.weights[i] for i in group.weight]
    downs, ups = _of(operands.downs, group.down), _of(operands.ups, group.up)
    paths, path_of = group.paths(), group.path_of()
    rank = _max_rank(operands.downs)
    arch = arch_of(xs[0])
    hs = [operands.xs[x].new_empty(len(operands.xs[x]), len(operands.downs[down])) for x, down, _, _ in paths]
    inside = launch.makes_h_inside(xs, weights, rank, group.dropout_p, arch)
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
    ss = _sums_over_dy(dys, operands, hs, group, needs, grads, arch)
    _sums_over_x(operands, ss, group, needs, grads, arch)
    _input_gradients(dys, operands, ss, group, needs, grads, arch)
    return grads


def _sums_over_dy(
    dys: list[Tensor],
    operands: Operands,
    hs: list[Tensor],
    group: Group,
    needs: GroupNeeds,
    grads: GroupGradients,
    arch: str,
) -> list[Tensor | None]:
    """S_t (bands,M,R) of every path that wants it, as one band more for each of its members; d_up and d_bias."""
    paths, path_of = group.paths(), group.path_of()
    members = range(group.size)
    widths = [dy.shape[1] for dy in dys]
    rank, total = _max_rank(operands.downs), sum(widths)
    shape = Shape(max(len(dy) for dy in dys), max(widths), max(widths), rank)
    splits, bands, width = reads.dy_sizes(shape, dys[0].dtype, arch)
    # Of all paths or of none: a member whose place were missing would write into another's.
    wants_s = any(needs.xs[x] or needs.downs[down] for x, down, _, _ in paths)
    most = max((path_of.count(t) for t in range(len(paths))), default=0)
    ss: list[Tensor | None] = [None] * len(paths)
    for t, (_, down, _, _) in enumerate(paths if wants_s else []):
        users = [i for i in members if path_of[i] == t]
        # A path with fewer members than another has bands of zeros: a kernel adds equally many of each.
        make = dys[0].new_empty if len(users) == most else dys[0].new_zeros
        size = (most * bands, len(dys[users[0]]), len(operands.downs[down]))
        ss[t] = make(size, dtype=torch.float32)
    own_s: list[Tensor | None] = []
    for i, path in enumerate(path_of):
        s = None if path == ABSENT else ss[path]
        nth = path_of[:i].count(path)
        own_s.append(None if s is None else s[nth * bands : (nth + 1) * bands])
    with_g = any(group.bias[i] != ABSENT and needs.biases[group.bias[i]] for i in members)
    with_factor = any(path_of[i] != ABSENT and needs.ups[group.up[i]] for i in members)
    here = with_factor and rank <= MAX_FACTOR_RANK
    rows = with_g + rank * here
    part = dys[0].new_empty(splits, rows, total, dtype=torch.float32) if rows else None
    own_h = [None if path == ABSENT else hs[path] for path in path_of]
    if rows or any(s is not None for s in own_s):
        launch.grouped_dy_launch(
            dys, ups=_of(operands.ups, group.up), hs=own_h if here else [None] * group.size, ss=own_s,
            parts=None if part is None else _columns(part, widths), with_g=with_g, scales=group.scales, shape=shape,
            bands=(bands, width), arch=arch,
        ).run()  # fmt: skip
    factor = part[:, int(with_g) :] if part is not None and here else None
    if with_factor and not here:
        parts = reads.x_splits(shape, dys[0].dtype, arch)
        factor = dys[0].new_empty(parts, rank, total, dtype=torch.float32)
        low = [i for i in members if path_of[i] != ABSENT]
        columns = _columns(factor, widths)
        launch.grouped_x_launch(
            [dys[i] for i in low], ss=[given(own_h[i])[None] for i in low], parts=[columns[i] for i in low],
            shape=shape, splits=parts, arch=arch,
        ).run()  # fmt: skip
    outputs: dict[str, Tensor] = {}
    if with_factor:
        outputs["db_up"] = dys[0].new_empty(total, rank, dtype=_dtype_of(operands.ups))
    if with_g:
        outputs["de"] = dys[0].new_empty(total, dtype=_dtype_of(operands.biases))
    if outputs:
        end.finish_launch(
            part=part[:, :1] if part is not None and with_g else None, factor=factor, r=rank if with_factor else 0,
            with_g=with_g, outputs=outputs, device_of=dys[0], arch=arch,
        ).run()  # fmt: skip
    start = 0
    for i, size in enumerate(widths):
        if path_of[i] != ABSENT and needs.ups[group.up[i]]:
            mine = outputs["db_up"][start : start + size, : operands.ups[group.up[i]].shape[1]]
            _add(grads.ups, group.up[i], mine)
        if group.bias[i] != ABSENT and needs.biases[group.bias[i]]:
            _add(grads.biases, group.bias[i], outputs["de"][start : start + size])
        start += size
    return ss


def _sums_over_x(
    operands: Operands,
    ss: list[Tensor | None],
    group: Group,
    needs: GroupNeeds,
    grads: GroupGradients,
    arch: str,
) -> None:
    """d_down_t = S_tᵀ·x̃_t of every path."""
    paths = group.paths()
    wanted = [t for t, (_, down, _, _) in enumerate(paths) if needs.downs[down]]
    if not wanted:
        return
    xs = [operands.xs[paths[t][0]] for t in wanted]
    downs = [operands.downs[paths[t][1]] for t in wanted]
    sums = [given(ss[t]) for t in wanted]
    shape = Shape(max(len(x) for x in xs), max(x.shape[1] for x in xs), max(x.shape[1] for x in xs),
                  max(len(down) for down in downs))  # fmt: skip
    splits = reads.x_splits(shape, xs[0].dtype, arch)
    # All parts in one tensor, each of its own size, so that one sum makes all gradients of them.
    sizes = [down.numel() for down in downs]
    padded = -(-sum(sizes) // _LINE) * _LINE
    part = xs[0].new_empty(splits, padded, dtype=torch.float32)
    parts, first = [], 0
    for down, size in zip(downs, sizes, strict=True):
        parts.append(part[:, first : first + size].view(splits, *down.shape))
        first += size
    launch.grouped_x_launch(
        xs, ss=sums, parts=parts, dropout_p=group.dropout_p,
        seeds=[seed for t, seed in enumerate(_seeds(operands, group)) if t in wanted], shape=shape, splits=splits,
        arch=arch,
    ).run()  # fmt: skip
    out = part.new_empty(padded, dtype=_dtype_of(downs))
    lines = (padded // _LINE, _LINE)
    end.finish_launch(
        outputs={}, sums=(end.Sum(part.view(splits, *lines), out.view(lines)),), device_of=xs[0], arch=arch
    ).run()  # fmt: skip
    first = 0
    for t, down, size in zip(wanted, downs, sizes, strict=True):
        _add(grads.downs, paths[t][1], out[first : first + size].view(down.shape))
        first += size


_LINE = 1024


def _input_gradients(
    dys: list[Tensor],
    operands: Operands,
    ss: list[Tensor | None],
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
            [given(ss[t]) for t in low],
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
    xs = [x if x.is_meta or x.stride(-1) == 1 else x.contiguous() for x in operands.xs]
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


def _dtype_of(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of an operand's gradients: its own, or fp32 where several terms may be added up in it."""
    return tensors[0].dtype


def _add(totals: list[Tensor | None], index: int, term: Tensor) -> None:
    known = totals[index]
    totals[index] = term if known is None else known.float() + term.float()


def _columns(part: Tensor, widths: list[int]) -> list[Tensor]:
    return list(part.split(widths, dim=2))


def _of(tensors: list[Tensor], indices: Sequence[int]) -> list[Tensor | None]:
    return [None if i == ABSENT else tensors[i] for i in indices]


def _seeds(operands: Operands, group: Group) -> list[Tensor | int]:
    """The key of every path; none where nothing is dropped."""
    return [operands.seeds[seed] for _, _, seed, _ in group.paths()] if group.dropout_p else []


def _max_rank(downs: list[Tensor]) -> int:
    rank = max((len(down) for down in downs), default=0)
    if rank > MAX_RANK:
        raise RuntimeError(
            f"the Triton kernels hold a rank of up to {MAX_RANK} in registers; got {rank}: use backend('eager')"
        )
    return rank
