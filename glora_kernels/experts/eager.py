"""Both passes over experts in plain PyTorch. No tensor of the size of all experts is made.

    y[i] = Z[i]∘(1+a_e) + s·(x̃[i]·D_eᵀ)·U_eᵀ + σ[i]·b_e + β_e,   Z[i] = x[token(i)]·W_eᵀ, e the expert of row i

x is read through the rows' tokens, in backward again, and no copy of it is kept; dx is a sum in the order of the
experts of a token, the same in every run. Where nothing but U·D is added, y is rounded to 16 bits twice, as PEFT's is;
where A, B or β are, or factors in fp32, once more, with a dither. So is dx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Weight, cast, factor_dtype, given, wide_dtype
from glora_kernels.experts.call import Call, Made, Needs, Terms
from glora_kernels.experts.groups import Groups
from glora_kernels.experts.products import by_factor, by_weight, of_expert, outer, sums, without_rest
from glora_kernels.glora import call as glora
from glora_kernels.glora import recover
from glora_kernels.glora.chunks import row_chunks
from glora_kernels.glora.eager import dropped, mask_of, scaled
from glora_kernels.reference.random import round_dithered


def forward(x: Tensor, weight: Weight, groups: Groups, t: Terms, call: Call) -> Made:
    """y (M,N), its rows sorted or in their places, and what backward reads.

    Args:
        x: in the dtype of the computation.
        weight: W (E,N,K) in that dtype, in another one under autocast, or in 4 bits (E·N,K).
        groups: which rows go to which expert.
        t, call: what is added, and the numbers.
    """
    rows = _rows(x, groups, call)
    y, h, low = by_weight(rows, weight, groups), None, None
    if t.up is not None and t.down is not None:
        narrow = factor_dtype(x.dtype, (t.up, t.down))
        mine = rows if call.dropout_p == 0.0 else _rows(_dropped(x, t, call), groups, call)
        h = scaled(by_factor(cast(mine, narrow), cast(t.down, narrow), groups), call.low_scale).contiguous()
        low = by_factor(h, cast(t.up, narrow), groups)
    sigma = None if t.b is None else rows.sum(-1, dtype=wide_dtype(x.dtype))
    if t.a is not None or sigma is not None or t.beta is not None or (low is not None and low.dtype != y.dtype):
        _finish(y, groups, low, sigma, t.a, t.b, t.beta)
    elif low is not None:
        y.add_(low)
    return Made(y if call.is_sorted else groups.unsort(y), h, sigma)


def _finish(
    y: Tensor, groups: Groups, low: Tensor | None, column: Tensor | None, a: Tensor | None = None,
    b: Tensor | None = None, beta: Tensor | None = None,
) -> None:  # fmt: skip
    """y = y∘(1+a) + low + column·b + β, in place and rounded once; column (M,), b of ones where it is None."""
    wide, expert = wide_dtype(y.dtype), groups.expert_of_rows(len(y)).clamp_(max=groups.experts - 1)
    a, b, beta = (None if own is None else cast(own, wide) for own in (a, b, beta))
    for part in row_chunks(y, always=True):
        own, mine = expert[part], y[part].to(wide)
        if a is not None:
            mine = mine * (1 + a[own])
        if low is not None:
            mine = mine + low[part]
        if column is not None:
            mine = mine + (column[part, None] if b is None else column[part, None] * b[own])
        if beta is not None:
            mine = mine + beta[own]
        y[part] = round_dithered(mine, y.dtype, first_row=part.start)
    without_rest(y, groups)


def backward(
    dy: Tensor, x: Tensor | None, weight: Weight, groups: Groups, t: Terms, made: Made, call: Call, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of `Needs`; None where not wanted.

    dx = Σ over the rows of a token of (dy∘(1+a))·W + mask∘(S·D) + dy·b, S = s/(1-p)·dy·U; dU = dyᵀh; dD = Sᵀx̃;
    db = dyᵀσ; dβ = Σ dy; dA = Σ dy∘Z, from y (`glora.recover`): sums over the rows of an expert.
    """
    wide, y = wide_dtype(dy.dtype), made.y
    if not call.is_sorted and groups.order is not None:
        dy, y = dy[groups.order], None if y is None else y[groups.order]
    rows = None if x is None else _rows(x, groups, call)
    da = dup = ddown = db = dbeta = dx = low = None
    if t.up is not None and t.down is not None:
        narrow = factor_dtype(dy.dtype, (t.up, t.down))
        if needs.up:
            dup = outer(cast(dy, narrow), given(made.h), groups)
        if needs.x or needs.down:
            s = scaled(by_factor(cast(dy, narrow), cast(t.up, narrow).mT, groups), call.low_scale)
            if needs.down:
                mine = given(rows) if call.dropout_p == 0.0 else _rows(_dropped(given(x), t, call), groups, call)
                ddown = outer(s, cast(mine, narrow), groups)
            low = by_factor(s, cast(t.down, narrow).mT, groups) if needs.x else None
    if needs.b:
        db = _fitting(sums(cast(dy, wide) * given(made.sigma)[:, None], groups), given(t.b))
    if needs.beta:
        dbeta = _fitting(sums(cast(dy, wide), groups), given(t.beta))
    if needs.a:
        da = _scale_gradient(dy, given(rows), weight, groups, t, made._replace(y=y))
    if needs.x:
        dx = _input_gradient(dy, low, weight, groups, t, call)
    return dx, da, dup, ddown, db, dbeta


def _input_gradient(
    dy: Tensor, low: Tensor | None, weight: Weight, groups: Groups, t: Terms, call: Call
) -> Tensor:  # fmt: skip
    """dx from sorted rows of dy, and of S·D."""
    wide = wide_dtype(dy.dtype)
    expert = (
        groups.expert_of_rows(len(dy)).clamp_(max=groups.experts - 1) if t.a is not None or t.b is not None else None
    )
    left = dy
    if t.a is not None:
        a, left = cast(t.a, wide), torch.empty_like(dy)
        for part in row_chunks(dy, always=True):
            left[part] = round_dithered(dy[part] * (1 + a[given(expert)[part]]), dy.dtype, first_row=part.start)
    dx = by_weight(left, weight, groups, transposed=True)
    if low is not None and call.dropout_p > 0.0:
        keep = given(_keep(len(dx) // (call.each if call.of_tokens else 1), dx.shape[1], t, call, dx.device))
        low = dropped(low, groups.gather(keep) if call.of_tokens else keep)
    if t.b is not None or (low is not None and low.dtype != dx.dtype):
        tau = None if t.b is None else (dy.to(wide) * cast(t.b, wide)[given(expert)]).sum(1)
        _finish(dx, groups, low, tau)
    elif low is not None:
        dx.add_(low)
    return groups.sum_back(dx) if call.of_tokens else dx


def _scale_gradient(dy: Tensor, rows: Tensor, weight: Weight, groups: Groups, t: Terms, made: Made) -> Tensor:
    """dA of each expert."""
    wide, a = wide_dtype(dy.dtype), given(t.a)
    found = dy.new_zeros(a.shape, dtype=wide)
    for e, span in enumerate(groups.spans()):
        if span.start == span.stop:
            continue
        s = glora.Supports(
            a=a[e], b=None if t.b is None else t.b[e], b_up=None if t.up is None else t.up[e],
            wc=None if t.beta is None else t.beta[e],
        )  # fmt: skip
        own = glora.Made(*(None if value is None else value[span] for value in made))
        found[e] = recover.gradient(
            dy[span], rows[span], of_expert(weight, e, groups.experts), s, own
        )  # fmt: skip
    return found


def _rows(x: Tensor, groups: Groups, call: Call) -> Tensor:
    return groups.gather(x) if call.of_tokens else x


def _dropped(x: Tensor, t: Terms, call: Call) -> Tensor:
    """mask∘x, by the place in x: all experts of a token see it alike."""
    return dropped(x, _keep(x.shape[0], x.shape[1], t, call, x.device))


def _keep(rows: int, cols: int, t: Terms, call: Call, device: torch.device) -> Tensor | None:
    return mask_of(call.dropout_p, t.seed, rows, cols, device)


def _fitting(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient (E, N) of vectors, or summed that of constants (E, 1)."""
    return grad if like.shape[1] > 1 else grad.sum(1, keepdim=True)
