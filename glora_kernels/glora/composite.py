"""`glora_linear` as differentiable operations of PyTorch: nothing in place, nothing saved by hand, no dither.

    y = x·W_effᵀ∘(1+a) + h·B_upᵀ + P·Uᵀ + σ·bᵀ + β

The terms are those of `glora.eager`, added in `wide_dtype` and rounded once, to nearest; the dropout mask is the same.
torch.func, forward-mode differentiation and torch.jit.trace use this path (`dispatch.ways`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from glora_kernels.dispatch.common import Weight, factor_dtype, wide_dtype, without_autocast
from glora_kernels.glora.call import C, Call, Supports, shift, wc_dtype
from glora_kernels.glora.eager import c_vector, dropped, keep_of
from glora_kernels.quant import dequantize


def valued(computed: Tensor, saved: Tensor | None) -> Tensor:
    """The saved value, with the derivatives of `computed`: x, from which that came, may not have been saved."""
    return computed if saved is None else computed + (saved.view(computed.shape) - computed).detach()


def glora_linear(
    x: Tensor, weight: Weight, s: Supports, call: Call, h: Tensor | None = None, sigma: Tensor | None = None
) -> Tensor:
    """y (..., N) of an x (..., K) in the dtype of the computation; arguments as in `glora.eager.forward`.

    Where a forward saved h and sigma, their values are used instead of those computed from x.
    """
    if x.ndim == 1:  # the tangent of F.linear of a vector has another shape than its value
        return glora_linear(x[None], weight, s, call, h, sigma)[0]
    dtype, wide, narrow = x.dtype, wide_dtype(x.dtype), factor_dtype(x.dtype, s.factors)
    with without_autocast(x.device.type):
        w = dense_of(weight, dtype)
        low = None
        if s.a_up is not None and s.a_down is not None:
            if call.matmul:
                rank = s.a_up.shape[1]
                p = valued(linear(x.to(narrow), s.a_down.to(narrow)), None if h is None else h[:, :rank])
                h = None if h is None else h[:, rank:]
                low = linear(p, w.to(narrow) @ s.a_up.to(narrow))
            else:
                w = (w.to(wide) * (1 + s.a_up.to(wide) @ s.a_down.to(wide))).to(dtype)
        y = linear(x, w).to(wide)
        if s.a is not None:
            y = y * (1 + s.a.to(wide))
        if low is not None:
            y = y + low
        if s.b_up is not None and s.b_down is not None:
            keep = keep_of(call, math.prod(x.shape[:-1]), x.shape[-1], x.device)
            kept = dropped(x, None if keep is None else keep.view(x.shape))
            own = linear(kept.to(narrow), s.b_down.to(narrow)) * (call.scale / (1.0 - call.dropout_p))
            y = y + linear(valued(own, h), s.b_up.to(narrow))
        if s.b is not None:
            y = y + valued(x.sum(-1, keepdim=True, dtype=wide), sigma) * s.b.to(wide)
        beta = shift(s, dtype)
        return (y if beta is None else y + beta.to(wide)).to(dtype)


def glora_wc(weight: Weight, c: C) -> Tensor:
    """W·c (N,), as `glora.eager.wc_forward`."""
    wide = wc_dtype(weight, c)
    with without_autocast(weight.device.type):
        return dense_of(weight, wide) @ c_vector(c, wide)


def dense_of(weight: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    # torch.jit.trace fails on a view of another dtype, so it sees the dequantized matrix as a constant.
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return dequantize(weight, dtype)
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
