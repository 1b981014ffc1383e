"""A group of LoRA layers inside `batch_invariant`: each member as a call of `glora_linear` of its own.

So a row has the bits that it has without the group. A path's h is computed for each of its members; what is shared gets
the sum of the members' gradients, in their order.
"""

from __future__ import annotations

from torch import Tensor

from glora_kernels.dispatch import common
from glora_kernels.dispatch.common import cast, path_of, wide_dtype
from glora_kernels.glora.call import Call, Made, Needs, Supports
from glora_kernels.grouped.group import ABSENT, Group, Operands, Trained, add, factor_dtype


def forward(operands: Operands, group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """(y_i (M,N) of every member, h_t (M,R) of every path). See `grouped.eager.forward`."""
    path, ys, hs = path_of("glora", group.route), [], {}
    for i, t in enumerate(group.path_of()):
        made = path.forward(operands.xs[group.x[i]], operands.weights[group.weight[i]], *_member(operands, group, i))
        ys.append(made.y)
        if t != ABSENT:
            hs[t] = made.h
    return ys, [cast(hs[t], factor_dtype(operands)) for t in range(len(hs))]


def backward(dys: list[Tensor], operands: Operands, hs: list[Tensor], group: Group, needs: Trained) -> Trained:
    """The gradients of the distinct tensors. See `grouped.eager.backward`."""
    path, path_of_member, grads = path_of("glora", group.route), group.path_of(), needs.without()
    for i, dy in enumerate(dys):
        x, t, up, down, bias = group.x[i], path_of_member[i], group.up[i], group.down[i], group.bias[i]
        s, call = _member(operands, group, i)
        wanted = Needs(
            x=needs.xs[x], b_up=up != ABSENT and needs.ups[up], b_down=down != ABSENT and needs.downs[down],
            bias=bias != ABSENT and needs.biases[bias],
        )  # fmt: skip
        h = None if t == ABSENT else cast(hs[t], common.factor_dtype(dy.dtype, s.factors))
        dx, *own = path.backward(
            dy, operands.xs[x] if wanted.b_down else None, operands.weights[group.weight[i]], s, Made(None, h), call,
            wanted,
        )  # fmt: skip
        found = dict(zip(Supports._fields, own, strict=True))
        for totals, index, grad in (
            (grads.xs, x, dx), (grads.ups, up, found["b_up"]), (grads.downs, down, found["b_down"]),
            (grads.biases, bias, found["bias"]),
        ):  # fmt: skip
            if grad is not None:
                add(totals, index, grad.to(wide_dtype(dy.dtype)))
    return grads


def _member(operands: Operands, group: Group, i: int) -> tuple[Supports, Call]:
    """The supports of a member, and the numbers of its call."""

    def at(tensors: list[Tensor], index: int) -> Tensor | None:
        return None if index == ABSENT else tensors[index]

    s = Supports(
        bias=at(operands.biases, group.bias[i]), b_up=at(operands.ups, group.up[i]),
        b_down=at(operands.downs, group.down[i]),
    )  # fmt: skip
    seed = at(operands.seeds, group.seed[i])
    return s, Call(group.scales[i], 0.0 if seed is None else group.dropout_p, seed, False, group.route)
