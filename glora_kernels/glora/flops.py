"""How many floating-point operations the registered operators do, for PyTorch's flop counter.

In units of 2·rows·columns·depth per matrix product; what is done once an element is not counted, as PyTorch
does not count it either. Importing this module registers the formulas (torch.utils.flop_counter).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import glora_kernels.glora.registered
import glora_kernels.glora.wc  # both define the operators  # noqa: F401

Shape = Sequence[int]


def forward_flops(
    x: Shape, weight: Shape, a_up: Shape | None, a_down: Shape | None, b_up: Shape | None, matmul: bool
) -> int:
    """x·Wᵀ; A lora: A_up·A_down (product variant: W·A_up, x·A_downᵀ, P·Uᵀ); B lora: x·B_downᵀ, h·B_upᵀ."""
    (n, k), m = weight, math.prod(x[:-1])
    flops = 2 * m * n * k
    if a_up is not None and a_down is not None:
        r = a_down[0]
        flops += 2 * n * k * r + (2 * m * r * (n + k) if matmul else 0)
    if b_up is not None:
        flops += 2 * m * b_up[1] * (n + k)
    return flops


def backward_flops(
    dy: Shape,
    weight: Shape,
    a_down: Shape | None,
    b_up: Shape | None,
    matmul: bool,
    needs: Sequence[bool],
) -> int:
    """The products of `glora.eager.backward` for the wanted gradients, in the order of `Needs`."""
    (n, k), m = weight, math.prod(dy[:-1])
    need_x, need_a, need_a_up, need_a_down, _, need_b_up, need_b_down = needs[:7]
    flops = 2 * m * n * k if need_x else 0
    if a_down is not None:
        r = a_down[0]
        if matmul:
            flops += 2 * m * n * r * (need_x or need_a_down) + 2 * m * k * r * (need_x + need_a_down)
            flops += need_a_up * (2 * m * n * r + 2 * n * k * r)
        else:
            flops += 2 * n * k * r * (need_x + need_a_up + need_a_down)
            flops += 2 * m * n * k * (need_a_up or need_a_down)
    if b_up is not None:
        r = b_up[1]
        flops += 2 * m * n * r * ((need_b_up or need_a) + (need_x or need_b_down))
        flops += 2 * m * k * r * (need_x + need_b_down)
    return flops


def wc_flops(weight: Shape, c_up: Shape | None) -> int:
    """W·c, and C_up·C_down where C is lora."""
    return 2 * math.prod(weight) + (0 if c_up is None else 2 * math.prod(c_up))


def wc_backward_flops(weight: Shape, c_up: Shape | None, needs: Sequence[bool]) -> int:
    """Wᵀg, and the two rank-R products."""
    _, need_up, need_down = needs
    pair = 0 if c_up is None else 2 * math.prod(c_up) * (need_up + need_down)
    return (2 * math.prod(weight) if any(needs) else 0) + pair


def _sizes(weight: Shape, quant: Sequence[Any]) -> Shape:
    """(N, K): of a matrix its shape, of a 4-bit weight the first two numbers of its form (`QUANT_ARGUMENTS`)."""
    form = quant[-1] if quant else []
    return form[:2] if form else weight


@register_flop_formula(torch.ops.glora_kernels.glora_linear)
def _glora_linear_flops(
    x: Shape, weight: Shape, a: Any, a_up: Any, a_down: Any, b: Any, b_up: Any, b_down: Any, bias: Any, wc: Any, d: Any,
    e: Any, scale: float, dropout_p: float, seed: Any, matmul: bool, route: str, *quant: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return forward_flops(x, _sizes(weight, quant), a_up, a_down, b_up, matmul)


@register_flop_formula(torch.ops.glora_kernels.glora_linear_backward)
def _glora_linear_backward_flops(
    dy: Shape, x: Any, weight: Shape, a: Any, a_up: Any, a_down: Any, b: Any, b_up: Any, b_down: Any, bias: Any,
    wc: Any, d: Any, e: Any, y: Any, h: Any, sigma: Any, u: Any, scale: float, dropout_p: float, seed: Any,
    matmul: bool, route: str, needs: Sequence[bool], *quant: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return backward_flops(dy, _sizes(weight, quant), a_down, b_up, matmul, needs)


@register_flop_formula(torch.ops.glora_kernels.glora_wc)
def _glora_wc_flops(weight: Shape, c: Any, c_up: Any, c_down: Any, route: str, *quant: Any, **kwargs: Any) -> int:
    return wc_flops(_sizes(weight, quant), c_up)


@register_flop_formula(torch.ops.glora_kernels.glora_wc_backward)
def _glora_wc_backward_flops(
    g: Shape, weight: Shape, c: Any, c_up: Any, c_down: Any, needs: Sequence[bool], route: str, *quant: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    return wc_backward_flops(_sizes(weight, quant), c_up, needs)
