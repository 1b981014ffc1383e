"""`glora_linear` in plain PyTorch: for CPUs and for any dtype. It builds no dense weight except W_eff of A=lora.

With Z = xWᵀ, h = s·x̃·B_downᵀ, σ = Σₖ xₖ and β = bias∘(1+d) + e + wc (`glora.call.shift`):

    A none, constant, vector:  y = Z∘(1+a) + h·B_upᵀ + σ·bᵀ + β
    A lora:                    y = x·W_effᵀ + (the rest as above),  W_eff = W∘(1 + A_up·A_down) in the workspace
    product variant:           y = Z + P·Uᵀ + (the rest),           P = x·A_downᵀ, U = W·A_up

Forward and backward take 2 products of the size of W, 3 where A is lora; all others have rank R.

In 16 bits a small adapter must not be rounded away. Its terms are added inside the large product, which rounds
once; where a 16-bit value is scaled by 1+a, or a small term is added to a bias, the result is rounded with a dither
that keeps the mean.

A 4-bit weight is dequantized to the same workspace in the dtype of the computation, in forward and again in backward;
W_eff and H are built a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from glora_kernels.dispatch.common import Weight, cast, factor_dtype, given, wide_dtype
from glora_kernels.glora import recover
from glora_kernels.glora.call import C, Call, Made, Needs, Supports, shift, wc_dtype
from glora_kernels.glora.chunks import gathered, row_chunks, spread, thin, weight_rows, weighted_sum, wide_chunks
from glora_kernels.quant import QuantizedWeight, decoded_at_once, dequantize
from glora_kernels.reference.random import keep_mask, round_dithered
from glora_kernels.runtime.workspace import workspace_like

_ROWS_OF_H = 1 << 19  # elements of H at a time, where it is fp32 and W 16-bit: a size at which BLAS is fast


NOTHING = Made(None)


class AddedTerms(NamedTuple):
    """The terms added to the large product: h·factorᵀ + σ·bᵀ + β, with h (M,·) and factor (N,·)."""

    beta: Tensor | None = None
    h: Tensor | None = None
    factor: Tensor | None = None
    sigma: Tensor | None = None
    b: Tensor | None = None


def forward(x: Tensor, weight: Weight, s: Supports, call: Call, known: Made = NOTHING) -> Made:
    """y (M,N), and the results that backward may read.

    Args:
        x: (M, K) in the dtype of the computation.
        weight: W (N, K) in that dtype, in another one under autocast, or in 4 bits.
        s: the supports, and the bias and wc.
        call: scale, dropout, variant.
        known: a mask and a U that there are already.
    """
    dtype = x.dtype
    terms, made = small_terms(x, weight, s, call, known)
    if s.a is not None:
        y = scale_rows(_product(x, cast_weight(weight, dtype), terms.beta), 1 + s.a.to(wide_dtype(dtype)), terms)
    else:
        y = with_terms(x, weight_for(weight, s, call, dtype), terms)
    return Made(y, *made[1:])


def small_terms(
    x: Tensor, weight: Weight, s: Supports, call: Call, known: Made = NOTHING
) -> tuple[AddedTerms, Made]:  # fmt: skip
    """Return all terms of y but x·Wᵀ, and what backward reads of them; y is not there yet. `known`: as in `forward`."""
    keep = known.mask
    if keep is None and s.b_up is not None:
        keep = keep_of(call, x.shape[0], x.shape[1], x.device)
    u = product_factor(weight, s, call, x.dtype) if known.u is None else known.u
    factor, h = _low_rank(x, s, call, keep, u)
    sigma = None if s.b is None else x.sum(-1, dtype=wide_dtype(x.dtype))
    return AddedTerms(shift(s, x.dtype), h, factor, sigma, s.b), Made(None, h, sigma, u, keep)


def with_terms(x: Tensor, weight: Tensor, terms: AddedTerms) -> Tensor:
    """x·Wᵀ plus the terms. The GEMM accumulates onto the terms, so that 16-bit results are rounded only once."""
    delta = added_terms(x, weight.shape[0], terms)
    if delta is None:
        return _product(x, weight, terms.beta)
    return torch.addmm(delta, x, weight.t(), out=delta)


def put_terms(out: Tensor, x: Tensor, terms: AddedTerms) -> None:
    """Write the sum of the terms of the rows x into out (M,N)."""
    delta = added_terms(x, out.shape[1], terms)
    if delta is not None:
        out.copy_(delta)
    elif terms.beta is None:
        out.zero_()
    else:
        out.copy_(terms.beta)


def _product(x: Tensor, weight: Tensor, beta: Tensor | None) -> Tensor:
    return linear(x, weight, None if beta is None else cast(beta, x.dtype))


def backward(
    dy: Tensor, x: Tensor | None, weight: Weight, s: Supports, made: Made, call: Call, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`, in the order of `Needs`; None where not wanted.

    dx = (dy∘(1+a))·W_eff + mask∘(S·B_down)/(1-p) + (dy·b)·1ᵀ with S = s·dy·B_up; dB_up = dyᵀh; dB_down = Sᵀx̃;
    B vector: dyᵀσ; A vector: Σₘ dy∘Z, from y; A lora: H = (dyᵀx)∘W, dA_up = H·A_downᵀ, dA_down = A_upᵀ·H; product
    variant: dA_up = Wᵀ(dyᵀP), dA_down = (dy·U)ᵀx. With g = Σₘ dy: ∂bias = g∘(1+d), ∂wc = g, ∂d = g∘bias, ∂e = g.
    """
    delta, grads = small_gradients(dy, x, weight, s, made, call, needs)
    dx = None
    if needs.x:
        left = dy if s.a is None else scale_dy(dy, s.a)
        effective = weight_for(weight, s, call, dy.dtype)
        dx = left @ effective if delta is None else torch.addmm(delta, left, effective, out=delta)
    if not call.matmul and (needs.a_up or needs.a_down):
        grads[1:3] = _hadamard_gradients(dy, given(x), weight, s, needs)
    return dx, *grads


def small_gradients(
    dy: Tensor, x: Tensor | None, weight: Weight, s: Supports, made: Made, call: Call, needs: Needs
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the terms of dx other than dy·W, and the gradients in the order of `Supports`, None for A=lora."""
    dtype = dy.dtype
    da = da_up = db = db_up = None
    split = 0 if not call.matmul or s.a_up is None else s.a_up.shape[1]  # the columns of h that are the product's
    of_u = needs.a_up and split > 0
    if of_u or needs.b_up:  # of [U, B_up], transposed: hᵀ·dy takes a third of the time of dyᵀ·h in MKL
        d_factor = gathered(_columns(made.h, 0 if of_u else split, None if needs.b_up else split), dy, dtype)
        if of_u:
            da_up = gathered(d_factor[:split].t(), weight, dtype).t()
        if needs.b_up:
            db_up = d_factor[split if of_u else 0 :].t()
    delta, da_down, db_down = _through_low_rank(dy, x, s, made, call, needs)
    if s.b is not None:
        if needs.b:
            db = weighted_sum(given(made.sigma), dy)
            db = db if s.b.numel() > 1 else db.sum().view(1)
        if needs.x:
            b = s.b.to(wide_dtype(dtype))
            tau = dy.to(b.dtype) @ b if s.b.numel() > 1 else dy.sum(-1, dtype=b.dtype) * b
            ones = tau.to(dtype)[:, None].expand(dy.shape[0], weight.shape[1])
            delta = ones.contiguous() if delta is None else delta.add_(ones)
    if needs.a:
        da = recover.gradient(dy, given(x), weight, s, made)

    shift_grads: tuple[Tensor | None, ...] = (None,) * 4
    if needs.shift:
        shift_grads = shift_gradients(dy.sum(0, dtype=wide_dtype(dtype)), s, needs)
    return delta, [da, da_up, da_down, db, db_up, db_down, *shift_grads]


def _hadamard_gradients(
    dy: Tensor, x: Tensor, weight: Weight, s: Supports, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """(dA_up, dA_down) from H = (dyᵀx)∘W, built in the workspace, or chunk by chunk where factors are wider than x."""
    dtype, narrow = dy.dtype, factor_dtype(dy.dtype, s.factors)
    up, down = cast(given(s.a_up), narrow), cast(given(s.a_down), narrow)
    if narrow == dtype:
        h = workspace_like(weight, dtype)
        torch.mm(dy.t(), x, out=h)
        for rows in row_chunks(h, always=True) if isinstance(weight, QuantizedWeight) else [slice(None)]:
            h[rows].mul_(weight_rows(weight, rows, dtype))
        return h @ down.t() if needs.a_up else None, up.t() @ h if needs.a_down else None
    dup = torch.empty_like(up) if needs.a_up else None
    ddown = torch.zeros_like(down) if needs.a_down else None
    x = x.to(narrow)
    for rows in row_chunks(weight, always=True, size=_ROWS_OF_H):
        h = dy[:, rows].t().to(narrow) @ x
        h.mul_(weight_rows(weight, rows, dtype))
        if dup is not None:
            dup[rows] = h @ down.t()
        if ddown is not None:
            ddown.addmm_(up[rows].t(), h)
    return dup, ddown


def wc_forward(weight: Weight, c: C) -> Tensor:
    """W·c (N,) in `wc_dtype`; where C is lora, c = C_up·C_down is computed in that dtype first."""
    wide = wc_dtype(weight, c)
    vector = c_vector(c, wide)
    if isinstance(weight, Tensor) and weight.dtype == wide:
        return weight @ vector
    wc = torch.empty(weight.shape[0], dtype=wide, device=weight.device)
    for rows, part in wide_chunks(weight, wide):
        torch.mv(part, vector, out=wc[rows])
    return wc


def c_vector(c: C, wide: torch.dtype) -> Tensor:
    """c (K,), given or C_up·C_down, in the dtype `wide`."""
    return cast(given(c.c), wide) if c.c_up is None else (cast(c.c_up, wide) @ cast(given(c.c_down), wide)).squeeze(1)


def wc_backward(g: Tensor, weight: Weight, c: C, needs: Sequence[bool]) -> list[Tensor | None]:
    """[dc = Wᵀg, dC_up = dc·C_downᵀ, dC_down = C_upᵀ·dc] in the wide dtype; None where not wanted."""
    return c_gradients(weighted_sum(cast(g, wc_dtype(weight, c)), weight), c, needs)


def c_gradients(dc: Tensor, c: C, needs: Sequence[bool]) -> list[Tensor | None]:
    """[dc, dC_up, dC_down] from dc, in its dtype; None where not wanted."""
    wide = dc.dtype
    need_c, need_up, need_down = needs
    return [
        dc if need_c else None,
        dc.unsqueeze(1) * cast(given(c.c_down), wide).t() if need_up else None,
        cast(given(c.c_up), wide).t() @ dc.unsqueeze(1) if need_down else None,
    ]


def weight_for(weight: Weight, s: Supports, call: Call, dtype: torch.dtype) -> Tensor:
    """The weight of the large product: W itself, or W_eff = W∘(1 + A_up·A_down) built in the workspace."""
    if call.matmul or s.a_up is None or s.a_down is None:
        return cast_weight(weight, dtype)
    effective = workspace_like(weight, dtype)
    wide = wide_dtype(dtype)
    if dtype == wide and isinstance(weight, Tensor):
        torch.mm(cast(s.a_up, dtype), cast(s.a_down, dtype), out=effective)
        return torch.addcmul(weight, weight, effective, out=effective)
    up, down = s.a_up.to(wide), s.a_down.to(wide)
    for rows in row_chunks(effective, always=True):
        part = weight_rows(weight, rows, dtype).to(wide)
        part = torch.addcmul(part, part, up[rows] @ down)
        effective[rows] = round_dithered(part, dtype, first_row=rows.start)
    return effective


def cast_weight(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W in the dtype of the computation: W itself, or a copy in the workspace that each call makes again.

    The copy is a cast under autocast, or the dequantized weight; one that is decoded at once has memory of its own.
    """
    if isinstance(weight, QuantizedWeight):
        whole = decoded_at_once(weight, dtype)
        return dequantize(weight, dtype, out=workspace_like(weight, dtype)) if whole is None else whole
    if weight.dtype == dtype:
        return weight
    return workspace_like(weight, dtype).copy_(weight)


def product_factor(weight: Weight, s: Supports, call: Call, dtype: torch.dtype) -> Tensor | None:
    """U = W·A_up (N,P) of the product variant, for a computation in `dtype`; None in the other."""
    if not call.matmul or s.a_up is None:
        return None
    narrow = factor_dtype(dtype, s.factors)
    return thin(weight if narrow != dtype else cast_weight(weight, dtype), cast(s.a_up, narrow).t(), dtype)


def _low_rank(
    x: Tensor, s: Supports, call: Call, keep: Tensor | None, u: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """All low-rank terms as one product h·factorᵀ: (factor (N,·), h (M,·)); u: U of the product variant."""
    pairs = _pairs(s, u, factor_dtype(x.dtype, s.factors), keep is None)
    hs = []
    for _, down, own in pairs:
        h = thin(x if own else dropped(x, keep), down, x.dtype)
        scaled(h[:, own:], call.scale / (1.0 - call.dropout_p))
        hs.append(h)
    return _joined([pair.factor for pair in pairs], 1), _joined(hs, 1)


class _Pair(NamedTuple):
    """A term x·downᵀ·factorᵀ; the first `own` of its columns are the product variant's, the rest those of B."""

    factor: Tensor
    down: Tensor
    own: int


def _pairs(s: Supports, u: Tensor | None, narrow: torch.dtype, join: bool) -> list[_Pair]:
    """U·A_down of the product variant and B_up·B_down; joined, so that x is read once, where no mask differs."""
    pairs = []
    if u is not None:
        pairs.append(_Pair(u, cast(given(s.a_down), narrow), u.shape[1]))
    if s.b_up is not None and s.b_down is not None:
        pairs.append(_Pair(cast(s.b_up, narrow), cast(s.b_down, narrow), 0))
    if len(pairs) < 2 or not join:
        return pairs
    (u_, a_down, own), (b_up, b_down, _) = pairs
    return [_Pair(torch.cat([u_, b_up], 1), torch.cat([a_down, b_down]), own)]


def _through_low_rank(
    dy: Tensor, x: Tensor | None, s: Supports, made: Made, call: Call, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(the low-rank terms of dx, dA_down of the product variant, dB_down), from dh = dy·factor of each pair."""
    delta = da_down = db_down = None
    through_b = s.b_up is not None and (needs.x or needs.b_down)
    keep = made.mask
    if keep is None and through_b:
        keep = keep_of(call, dy.shape[0], given(s.b_down).shape[1], dy.device)
    used = s if through_b else s._replace(b_up=None)
    u = made.u if needs.x or needs.a_down else None
    for factor, down, own in _pairs(used, u, factor_dtype(dy.dtype, s.factors), keep is None):
        mask = None if own else keep
        dh = thin(dy, factor.t(), dy.dtype)
        scaled(dh[:, own:], call.scale / (1.0 - call.dropout_p))
        of_b = needs.b_down and own < down.shape[0]
        if of_b or (own and needs.a_down):
            d_down = gathered(dh, dropped(given(x), mask), dy.dtype)
            if own and needs.a_down:
                da_down = d_down[:own].clone() if of_b else d_down[:own]
            if of_b:
                db_down = d_down[own:].clone() if own else d_down
        if needs.x:
            term = dropped(spread(dh, down, dy.dtype), mask)
            delta = term if delta is None else delta.add_(term)
    return delta, da_down, db_down


def added_terms(x: Tensor, n: int, terms: AddedTerms) -> Tensor | None:
    """The sum of the terms, (M,N); None where there is only a β that the GEMM can add as its bias, or nothing."""
    dtype, wide = x.dtype, wide_dtype(x.dtype)
    beta, h, factor, sigma, _ = terms
    if h is None and sigma is None and (beta is None or beta.dtype == dtype):
        return None
    if h is not None and factor is not None and sigma is None:
        if beta is None:
            return spread(h, factor.t(), dtype)
        if dtype == wide:
            return linear(h, factor, cast(beta, dtype))
    delta = torch.empty(x.shape[0], n, dtype=dtype, device=x.device)
    for rows in row_chunks(delta):
        part = delta[rows] if dtype == wide else torch.empty(delta[rows].shape, dtype=wide, device=x.device)
        part.zero_() if beta is None else part.copy_(beta.expand_as(part))
        # Rounding to nearest would lose a small E or B that is added to a 16-bit bias.
        _finish_rows(delta, rows, part, terms)
    return delta


def scale_rows(base: Tensor, row_scale: Tensor, terms: AddedTerms) -> Tensor:
    """y = Z∘(1+a) + h·factorᵀ + σ·bᵀ + β from base = Z + β, in place.

    If all supports are zero, y equals base bit for bit. In 16 bits y = base∘(1+a) + (β - (1+a)∘β) + …; in wider dtypes
    y = β + (1+a)∘(base - β) + …, so that no rounding error is the same in all rows: dA is recovered from their sum.
    """
    dtype, wide, beta = base.dtype, row_scale.dtype, terms.beta
    offset = None if beta is None or dtype == wide else beta.to(wide) - row_scale * beta.to(dtype).to(wide)
    for rows in row_chunks(base):
        y = base[rows].to(wide)
        if beta is None:
            y.mul_(row_scale)
        elif offset is None:
            torch.lerp(beta.to(wide), y, row_scale, out=y)
        else:
            torch.addcmul(offset, y, row_scale, out=y)
        # A 16-bit base was rounded: rounding base∘(1+a) to nearest would mostly give it again.
        _finish_rows(base, rows, y, terms)
    return base


def _finish_rows(out: Tensor, rows: slice, part: Tensor, terms: AddedTerms) -> None:
    """out[rows] = part + h·factorᵀ + σ·bᵀ, rounded with the dither if `out` is narrower; else `part` is out[rows]."""
    wide = part.dtype
    if terms.h is not None and terms.factor is not None:
        torch.addmm(part, terms.h[rows].to(wide), terms.factor.to(wide).t(), out=part)
    if terms.sigma is not None and terms.b is not None:
        part.addcmul_(terms.sigma[rows, None], terms.b.to(wide))
    if out.dtype != wide:
        out[rows] = round_dithered(part, out.dtype, first_row=rows.start)


def scale_dy(dy: Tensor, a: Tensor) -> Tensor:
    """dy∘(1+a); a 16-bit dy rounds with the dither, for the reason given in `scale_rows`."""
    dtype = dy.dtype
    scale = 1 + a.to(wide_dtype(dtype))
    if scale.dtype == dtype:
        return dy * scale
    scaled = torch.empty(dy.shape, dtype=dtype, device=dy.device)
    for rows in row_chunks(dy):
        scaled[rows] = round_dithered(dy[rows] * scale, dtype, first_row=rows.start)
    return scaled


def shift_gradients(g: Tensor, s: Supports, needs: Needs) -> tuple[Tensor | None, ...]:
    """(∂bias, ∂wc, ∂d, ∂e) from g = ∂β; ∂d and ∂e are summed where d or e is a constant. Some may be g itself."""
    dbias = dd = de = None
    if needs.bias:
        dbias = g if s.d is None else torch.addcmul(g, g, cast(s.d, g.dtype))
    if needs.d and s.d is not None:
        dd = g * cast(given(s.bias), g.dtype)
        dd = dd if s.d.numel() > 1 else dd.sum().view(1)
    if needs.e and s.e is not None:
        de = g if s.e.numel() > 1 else g.sum().view(1)
    return dbias, g if needs.wc else None, dd, de


def keep_of(call: Call, rows: int, cols: int, device: torch.device) -> Tensor | None:
    """The dropout mask of a call, on a device; None without dropout."""
    return mask_of(call.dropout_p, call.seed, rows, cols, device, call.columns_before)


def mask_of(
    p: float, seed: Tensor | None, rows: int, cols: int, device: torch.device, columns_before: int = 0
) -> Tensor | None:  # fmt: skip
    """The dropout mask that a seed determines, on a device; None without dropout."""
    if p == 0.0:
        return None
    return keep_mask(given(seed).to(device, non_blocking=True), rows, cols, p, columns_before)


def dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """mask∘x, without the factor 1/(1-p), which is applied to a smaller result of rank R instead."""
    return x if keep is None else torch.where(keep, x, 0.0)


def scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1.0 else product.mul_(scale)


def _joined(parts: list[Tensor], dim: int) -> Tensor | None:
    return (torch.cat(parts, dim) if len(parts) > 1 else parts[0]) if parts else None


def _columns(h: Tensor | None, first: int, last: int | None) -> Tensor:
    return given(h) if first == 0 and last is None else given(h)[:, first:last]
