"""dA = Σₘ dy∘Z of a vector or constant A, without a stored Z.

    Σₘ dy∘Z = (Σₘ dy∘y - rest) / (1+a),   rest = β∘g + Σᵣ B_up∘(dyᵀh) + b∘(dyᵀσ)

y is there anyway and the terms of `rest` are gradients that exist already. The price is y's rounding in the place
of Z's: where y is much larger than Z∘(1+a) (a bias in the hundreds, 1+a near zero), little of Z is left in y.
Such rows of the weight are found by `ill_conditioned_rows`, and Z is computed for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glora_kernels.ops.common import Supports, wide_dtype

_SAMPLED_ROWS = 64
_TINY = 2.0**-10


def ill_conditioned_rows(
    y: Tensor, beta: Tensor | None, h: Tensor | None, sigma: Tensor | None, s: Supports, x_is_kept: bool
) -> Tensor:
    """Where rms(y[:,n]) > limit·rms(Z[:,n]·(1+a[n])), or 1+a is next to nothing: (N,) bool.

    The limit bounds how many times larger the rounding error of dA may be than from Z: 2 where x is kept anyway; 8
    for 16-bit and 64 for wider values where it would be kept for this alone. Judged by up to 128 rows of y, evenly
    spread: it decides about accuracy only.
    """
    assert s.a is not None
    wide = wide_dtype(y.dtype)
    step = max(1, y.shape[0] // _SAMPLED_ROWS)
    tiny = (1 + s.a.to(wide)).abs() < _TINY
    terms = []
    if beta is not None:
        terms.append(beta.to(wide))
    if h is not None and s.b_up is not None:
        terms.append(h[::step].to(wide) @ s.b_up.to(wide).t())
    if sigma is not None and s.b is not None:
        terms.append(sigma[::step, None] * s.b.to(wide))
    if not terms:
        return tiny.expand(y.shape[1])
    sample = y[::step].to(wide)
    own = (sample - sum(terms[1:], terms[0])).square().sum(0)
    limit = 2.0 if x_is_kept else (8.0 if y.dtype.itemsize == 2 else 64.0)
    return tiny | (sample.square().sum(0) > limit**2 * own)


def rest_of_gradient(
    g: Tensor | None, beta: Tensor | None, dy_h: Tensor | None, dy_sigma: Tensor | None, s: Supports
) -> Tensor | None:
    """Σₘ dy∘(y - Z∘(1+a)), (N,), from g = Σₘ dy, dyᵀh (N,R) and dyᵀσ (N,)."""
    terms = []
    if beta is not None and g is not None:
        terms.append(beta.to(g.dtype) * g)
    if s.b_up is not None and dy_h is not None:
        wide = wide_dtype(dy_h.dtype)
        terms.append((s.b_up.to(wide) * dy_h.to(wide)).sum(1))
    if s.b is not None and dy_sigma is not None:
        terms.append(s.b.to(dy_sigma.dtype) * dy_sigma)
    return sum(terms[1:], terms[0]) if terms else None


def gradient(total: Tensor, rest: Tensor | None, exact: Tensor | None, exact_total: Tensor | None, a: Tensor) -> Tensor:
    """dA from Σₘ dy∘y and `rest`, (N,); with `exact_total` = Σₘ dy∘Z in the rows that `exact` marks."""
    da = (total if rest is None else total - rest) / (1 + a.to(total.dtype))
    if exact is not None and exact_total is not None:
        da = torch.where(exact, exact_total, da)
    return da if a.numel() > 1 else da.sum().view(1)
