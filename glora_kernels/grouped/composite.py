"""A group as differentiable operations of PyTorch, as `glora.composite`: each member a layer of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from glora_kernels.dispatch.common import Call, Supports
from glora_kernels.glora.composite import glora_linear
from glora_kernels.grouped.group import ABSENT, Group, Operands


def grouped_lora_linear(operands: Operands, group: Group, hs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """y_i of every member: each a layer of its own here. `hs` as forward saved them, one a path."""

    def of(tensors: Sequence[Tensor], index: int) -> Tensor | None:
        return None if index == ABSENT else tensors[index]

    ys = []
    for x, w, down, up, bias, seed_of, scale, path in zip(*group[:7], group.path_of(), strict=True):
        s = Supports(b_up=of(operands.ups, up), b_down=of(operands.downs, down), bias=of(operands.biases, bias))
        seed = of(operands.seeds, seed_of)
        call = Call(scale, 0.0 if seed is None else group.dropout_p, seed, False, group.route)
        ys.append(glora_linear(operands.xs[x], operands.weights[w], s, call, None if hs is None else of(hs, path)))
    return ys
