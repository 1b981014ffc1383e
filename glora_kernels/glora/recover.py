"""dA = Σₘ dy∘Z of a vector or constant A, without a stored Z.

    dA = Σₘ q / (1+a),   q = dy∘(y - h·B_upᵀ - σ·bᵀ - β) = dy∘Z∘(1+a)

y is saved anyway, so Z∘(1+a) = y - (the other terms) costs no GEMM, but precision. Forward rounds three values:
(Z+β)∘(1+a), Z∘(1+a) + β, and y. With p = |dy|·(the largest of the three), each rounding changes dA[n] by at most
u·Σₘ p / |1+a|; rounding Z itself would change it by at most u·Σₘ |q| / |1+a|. Where the first is too much larger, that
is, for rows n of the weight with

    Σₘ p > 1.5·Σₘ |q|,  or  Σₘ p² > 2·Σₘ q²,  or  |1+a| < 2⁻¹⁰,

(`reference.recovery`), Z is computed again from x. For the other rows, the error from a rounding of y is at most 1.5
times what the same rounding of Z would cause, in the worst case and in the root mean square: |error of dA[n]| ≤
1.5·c·u·Σₘ |dy∘Z|, plus the error of accumulating the sums, with u the unit roundoff of y's dtype and c the roundings
that y went through: 2 on the eager path, 3 in 16 bits, where the dither errs by up to 2u.

For a small layer that product costs less than the sums do, and dA is computed from x at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from glora_kernels.dispatch.common import Weight, given, wide_dtype
from glora_kernels.glora.call import Made, Supports, shift
from glora_kernels.glora.chunks import row_chunks, weight_rows
from glora_kernels.reference.recovery import SQUARES, SUM, TINY

_ROWS = 256  # of the weight at a time, where Z is computed again
SMALL = 1 << 22  # M·N·K of a layer whose Z costs less than the sums: a tenth to a third of a millisecond of a core


def gradient(dy: Tensor, x: Tensor, weight: Weight, s: Supports, made: Made) -> Tensor:
    """dA in `wide_dtype`: (N,), or (1,) for a constant a.

    Args:
        dy: (M,N).
        x: (M,K).
        weight: W (N,K).
        s: a, and the tensors of B and of β.
        made: the results of forward: y, and h or σ where there is a B.
    """
    a = given(s.a).to(wide_dtype(dy.dtype))
    if isinstance(weight, Tensor) and dy.numel() * x.shape[1] <= SMALL:
        total = (dy.to(a.dtype) * linear(x, weight.to(dy.dtype))).sum(0)
    else:
        total = _from_y(dy, x, weight, s, made, a)
    return total if a.numel() > 1 else total.sum().view(1)


def _from_y(dy: Tensor, x: Tensor, weight: Weight, s: Supports, made: Made, a: Tensor) -> Tensor:
    """(N,), from y where it tells enough of Z, else from x."""
    wide, n, beta = a.dtype, dy.shape[1], shift(s, dy.dtype)
    up = None if s.b_up is None else s.b_up.to(wide).t()
    b = None if s.b is None else s.b.to(wide)
    beta = None if beta is None else beta.to(wide)
    total, abs_q, abs_p, square_q, square_p = dy.new_zeros(5, n, dtype=wide)
    alone = beta is None and up is None and b is None
    for rows in row_chunks(dy, always=True):
        value, d = made.y[rows].to(wide), dy[rows].to(wide)
        if alone:
            total += (value * d).sum(0)
            continue
        largest = value.abs()
        if up is not None:
            value = torch.addmm(value, given(made.h)[rows].to(wide), up, alpha=-1.0)
        elif b is not None:
            value = torch.addcmul(value, given(made.sigma)[rows, None], b, value=-1.0)
        if beta is not None:
            if up is not None or b is not None:
                largest = torch.maximum(largest, value.abs())
            torch.maximum(largest, torch.add(value, a * beta).abs_(), out=largest)
            value = value - beta
        else:
            torch.maximum(largest, value.abs(), out=largest)
        value = value * d
        largest *= d.abs()
        total += value.sum(0)
        abs_q += value.abs().sum(0)
        abs_p += largest.sum(0)
        square_q += value.square_().sum(0)
        square_p += largest.square_().sum(0)
    # Every comparison is false for NaN (y overflowed), so that such rows are computed again.
    kept = total.isfinite() & (abs_p <= SUM * abs_q) & (square_p <= SQUARES * square_q) & ((1 + a).abs() >= TINY)
    total = total / (1 + a)
    for first in range(0, n, _ROWS):
        near = (~kept[first : first + _ROWS]).nonzero().squeeze(1)
        if len(near):
            z = linear(x, weight_rows(weight, slice(first, first + _ROWS), dy.dtype)[near].to(dy.dtype))
            total[first + near] = (dy[:, first + near].to(wide) * z).sum(0)
    return total
