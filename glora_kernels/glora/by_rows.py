"""`glora_linear` on the eager path inside `batch_invariant`: one row at a time. Same signatures as `glora.eager`.

A BLAS gives the same bits for the same shapes, strides and alignment, and promises no more: rows of a product depend on
how many there are, and an odd depth, on some processors, on their place among them. So each row is a copy in memory of
its own and takes the same calls of `glora.eager` as any other, also for its sums and its rounding, whose dither is that
of row 0. What has no rows is made once a call: the weight, U, and the dropout mask. Gradients of parameters are sums
over the rows, from the functions of `glora.eager` as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glora_kernels.dispatch.common import LINE, Weight, given, settled
from glora_kernels.glora import eager
from glora_kernels.glora.call import C, Call, Made, Needs, Supports
from glora_kernels.quant import QuantizedWeight


def forward(x: Tensor, weight: Weight, s: Supports, call: Call) -> Made:
    """y (M,N), and the results that backward may read. See `glora.eager.forward`."""
    weight, s = _aligned(weight), _settled(s)
    known = Made(None, u=eager.product_factor(weight, s, call, x.dtype), mask=_mask(x, s, call))
    if not len(x):
        return eager.forward(x, weight, s, call, known)
    own, beside = eager.weight_for(weight, s, call, x.dtype), _beside(s, call)
    rows = [eager.forward(_row(x, m), own, beside, call, _of_row(known, m)) for m in range(len(x))]
    y, h, sigma = (
        None if each[0] is None else torch.cat(each) for each in zip(*(row[:3] for row in rows), strict=True)
    )
    return known._replace(y=y, h=h, sigma=sigma)


def backward(
    dy: Tensor, x: Tensor | None, weight: Weight, s: Supports, made: Made, call: Call, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`, in the order of `Needs`; None where not wanted. See `glora.eager.backward`."""
    weight, s = _aligned(weight), _settled(s)
    _, *grads = eager.backward(dy, x, weight, s, made, call, needs._replace(x=False))
    if not needs.x:
        return None, *grads
    dx = dy.new_empty(len(dy), weight.shape[1])
    known = Made(None, u=made.u, mask=_mask(dx, s, call) if made.mask is None else made.mask)
    own, beside = eager.weight_for(weight, s, call, dy.dtype), _beside(s, call)
    for m in range(len(dy)):
        dx[m] = given(eager.backward(_row(dy, m), None, own, beside, _of_row(known, m), call, Needs(x=True))[0])[0]
    return dx, *grads


def wc_forward(weight: Weight, c: C) -> Tensor:
    """W·c (N,). See `glora.eager.wc_forward`."""
    return eager.wc_forward(_aligned(weight), C(*(None if t is None else settled(t) for t in c)))


def wc_backward(g: Tensor, weight: Weight, c: C, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `wc_forward`; None where not wanted. See `glora.eager.wc_backward`."""
    return eager.wc_backward(
        settled(g), _aligned(weight), C(*(None if t is None else settled(t) for t in c)), needs
    )  # fmt: skip


def _row(matrix: Tensor, m: int) -> Tensor:
    """Row m, in memory of its own."""
    return matrix[m : m + 1].clone()


def _of_row(known: Made, m: int) -> Made:
    return known if known.mask is None else known._replace(mask=_row(known.mask, m))


def _mask(x: Tensor, s: Supports, call: Call) -> Tensor | None:
    return None if s.b_up is None else eager.keep_of(call, x.shape[0], x.shape[1], x.device)


def _beside(s: Supports, call: Call) -> Supports:
    """The supports that act beside the product with the weight of `eager.weight_for`."""
    return s if call.matmul else s._replace(a_up=None, a_down=None)


def _settled(s: Supports) -> Supports:
    return Supports(*(None if t is None else settled(t) for t in s))


def _aligned(weight: Weight) -> Weight:
    """The weight with its strides, in aligned memory."""
    if isinstance(weight, QuantizedWeight) or weight.data_ptr() % LINE == 0:
        return weight
    return weight.clone()
