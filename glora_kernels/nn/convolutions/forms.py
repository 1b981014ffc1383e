"""y of a convolution with an adapter, without a dense ΔW.

With ∗ for the convolution by W (N, C, *kernel), K = C times the size of the kernel and W flattened to (N, K):

    y = x∗W_eff + β,   W_eff = W + W∘A + s·B,   β = b + b∘D + E + W·C

    A none, constant, vector:  (x∗W)∘(1+a)
    A lora:                    x∗(W∘(1 + A_up·A_down)), a dense weight that is built again in backward
    product variant:           x∗W + p∗U with p = A_down·x over the channels, U = W·A_up (N, R, *kernel)
    B lora:                    + s·B_up·(x̃∗B_down), B_down (R, K) as (R, C, *kernel)
    B vector, constant:        + b·σ, σ = (the sum of x over the channels)∗1
    C, D, E:                   + β

A 1 x 1 convolution without padding is a linear layer over the places of x, whatever the stride. Where x has its
channels last in memory these rows are there already, and `adapted_linear` takes them, with its kernels. An x with
contiguous channels stays as it is: its rows would be a copy, and backward would keep it.

Saved for backward are x, h = x̃∗B_down, p and the parameters: nothing of the size of y. So a vector A's gradient
computes x∗W again. With dropout there is the mask too, one byte an element of x.

In 16 bits the vendor's convolution gives a rounded x∗W. The terms are added to that in fp32, and the sum is rounded
with a dither that keeps the mean, since rounding to nearest would mostly give x∗W again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glora_kernels.dispatch.checks import check_frozen
from glora_kernels.dispatch.common import autocast_dtype, cast, factor_dtype, given, wide_dtype, without_autocast
from glora_kernels.dispatch.ways import is_elsewhere, once_differentiable
from glora_kernels.glora.call import Supports, shift
from glora_kernels.glora.chunks import row_chunks
from glora_kernels.nn.adapted import Frozen, Operands, adapted_linear
from glora_kernels.nn.convolutions.geometry import Geometry
from glora_kernels.ops import glora_wc
from glora_kernels.reference.random import round_dithered

NO_ROWS = "it is a convolution, whose adapters cannot differ by example"
"""Why `gk.rows` is refused."""

_CHUNK = {True: 1 << 17, False: 1 << 24}
"""Is it on a CPU → how many elements are rounded at a time: what a cache holds, or little memory beside the rest."""


def adapted_conv(x: Tensor, base: Frozen, adapter: Operands, geometry: Geometry) -> Tensor:
    """y (B, N, ...) of an x (B, C, ...), or of one without B; in the dtype of x, under autocast in that of autocast.

    Args:
        x: the input.
        base: W (N, C, *kernel), dense, and the bias.
        adapter: the parameters by the shapes of `GLoRAConfig.parameter_shapes`, with this kernel.
        geometry: of the convolution.

    Raises:
        ValueError: an x of another number of dimensions or channels, or a weight that requires a gradient.
        TypeError: an x that is not floating point, or a dtype that differs from the weight's.
    """
    weight = base.weight
    assert isinstance(weight, Tensor)
    if x.ndim == weight.ndim - 1:
        return adapted_conv(x.unsqueeze(0), base, adapter, geometry).squeeze(0)
    _check(x, weight)
    if geometry.is_pointwise and (rows := x.movedim(1, -1)).is_contiguous():
        places = (slice(None), *(slice(None, None, step) for step in geometry.stride))
        return adapted_linear(rows[places], (weight.flatten(1), base.bias, None), adapter).movedim(-1, 1)
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x.device.type):
        return _general(cast(x, dtype), weight, base.bias, adapter, geometry)


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.ndim != weight.ndim or x.shape[1] != weight.shape[1]:
        dims = ", ".join(["B", str(weight.shape[1]), *["..."] * (weight.ndim - 2)])
        raise ValueError(
            f"x must be ({dims}) for a convolution of {weight.ndim - 2} dimensions, or without B; got {tuple(x.shape)}"
        )
    if x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise TypeError(f"x is {x.dtype} and the weight {weight.dtype}, which autocast settles, and it is off")
    check_frozen("weight", weight)


def _general(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Operands, geometry: Geometry) -> Tensor:
    """y of an x in the dtype of the computation, with autocast off."""
    own, s, p, variant = adapter
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p) if p else None
    if keep is not None and geometry.outside:  # what is repeated outside is dropped with what it repeats
        keep = geometry.padded(cast(keep, x.dtype)) != 0
    x = geometry.padded(x)
    down, up, b = own["B_down"], own["B_up"], own["B"]
    a, a_up, a_down = own["A"], own["A_up"], own["A_down"]
    narrow = factor_dtype(x.dtype, (a_up, a_down, up, down))
    h = h_up = added = None
    if up is not None and down is not None:
        h = _thin(x, cast(down, narrow).view(len(down), *weight.shape[1:]), keep, geometry)
        h_up = cast(up, narrow) * (s / (1 - p))
    elif b is not None:
        wide = wide_dtype(x.dtype)
        window = torch.ones(1, 1, *geometry.kernel, dtype=wide, device=x.device)
        h = geometry.product(x.sum(1, keepdim=True, dtype=wide), window)
        h_up = cast(b, wide).view(-1, 1).expand(len(weight), 1)
    if variant == "matmul" and a_up is not None and a_down is not None:
        ones = (1,) * len(geometry.kernel)
        mixed = _thin(x, cast(a_down, narrow).view(*a_down.shape, *ones), None, geometry.of_channels)
        u = _thin(weight, cast(a_up, narrow).t().reshape(*a_down.shape, *ones), None, geometry.of_channels)
        added = geometry.product(mixed, u)
        a_up = a_down = None
    cs = {"c": own["C"], "c_up": own["C_up"], "c_down": own["C_down"]}
    wc = None if all(c is None for c in cs.values()) else glora_wc(weight.flatten(1), **cs)
    beta = shift(Supports(bias=bias, wc=wc, d=own["D"] if bias is not None else None, e=own["E"]), x.dtype)
    beta = None if beta is None else beta.expand(len(weight))
    a = None if a is None else a.expand(len(weight))
    call = (x, weight, a, a_up, a_down, h, h_up, added, beta)
    if is_elsewhere(x):
        return _rounded(_sum(geometry, *call), x.dtype)
    y: Tensor = _Sum.apply(geometry, *call)
    return y


def _thin(x: Tensor, down: Tensor, keep: Tensor | None, geometry: Geometry) -> Tensor:
    """(keep∘x)∗down (B, R, ...) in the dtype of `down`; nothing but x, keep and down is saved."""
    if is_elsewhere(x):
        return geometry.product(_kept(x, keep, down.dtype), down)
    h: Tensor = _Thin.apply(geometry, x, down, keep)
    return h


def _kept(x: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    return cast(x if keep is None else torch.where(keep, x, 0.0), dtype)


class _Thin(torch.autograd.Function):
    """h = (keep∘x)∗down. dx = keep∘(dh∗ᵀdown), and ddown from keep∘x, which is made again."""

    @staticmethod
    def forward(ctx: Any, geometry: Geometry, x: Tensor, down: Tensor, keep: Tensor | None) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(x, down, keep)
        return geometry.product(_kept(x, keep, down.dtype), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Any:
        x, down, keep = ctx.saved_tensors
        with without_autocast(x.device.type):
            wanted = ctx.needs_input_grad[1:3]
            dx, ddown = ctx.geometry.gradients(dh, _kept(x, keep, down.dtype), down, wanted)
            return None, None if dx is None else cast(_kept(dx, keep, dx.dtype), x.dtype), ddown, None


def _effective(weight: Tensor, a_up: Tensor | None, a_down: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W in `dtype`, or W∘(1 + A_up·A_down), rounded once, with the dither."""
    if a_up is None or a_down is None:
        return cast(weight, dtype)
    wide = wide_dtype(dtype)
    scale = (1 + cast(a_up, wide) @ cast(a_down, wide)).view(weight.shape)
    return _rounded(cast(weight, wide) * scale, dtype)


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded so that the result is the value on average, in the order of memory that it has; no view."""
    if value.dtype == dtype:
        return value
    if torch.compiler.is_compiling():
        dithered: Tensor = _Dithered.apply(value, dtype)
        return dithered
    if is_elsewhere(value):
        return value.to(dtype)
    if not value.is_contiguous() and not value.movedim(1, -1).is_contiguous():
        value = value.contiguous()
    rounded = torch.empty_like(value, dtype=dtype)
    given, out = ((t if t.is_contiguous() else t.movedim(1, -1)).flatten(0, -2) for t in (value, rounded))
    for rows in row_chunks(given, always=True, size=_CHUNK[value.device.type == "cpu"]):
        out[rows] = round_dithered(given[rows], dtype, first_row=rows.start)
    return rounded


class _Dithered(torch.autograd.Function):
    """A value rounded with the dither in a graph of torch.compile, where gradients pass as through a cast."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = value.dtype
        return round_dithered(value.contiguous().flatten(0, -2), dtype).view(value.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy.to(ctx.dtype), None


def _plus(y: Tensor, h: Tensor, up: Tensor) -> Tensor:
    """y + up·h over the channels, in the memory of y."""
    if y.is_contiguous():
        y.flatten(2).baddbmm_(up.expand(len(y), *up.shape), h.flatten(2))
        return y
    rows = y.movedim(1, -1)
    if not rows.is_contiguous():
        return _plus(y.contiguous(), h, up)
    rows.flatten(0, -2).addmm_(h.movedim(1, -1).flatten(0, -2), up.t())
    return y


def _sum(
    geometry: Geometry, x: Tensor, weight: Tensor, a: Tensor | None, a_up: Tensor | None, a_down: Tensor | None,
    h: Tensor | None, up: Tensor | None, added: Tensor | None, beta: Tensor | None,
) -> Tensor:  # fmt: skip
    """(x∗W_eff)∘(1+a) + h·upᵀ + added + β, in fp32 for 16-bit values where there is more than x∗W_eff + b.

    With all supports at zero it equals the vendor's x∗W + b bit for bit. Where no gradients are recorded it is computed
    in the memory of x∗W.
    """
    dtype, wide = x.dtype, wide_dtype(x.dtype)
    bias = None if beta is None else cast(beta, dtype)
    y = geometry.product(x, _effective(weight, a_up, a_down, dtype), bias)
    if a is None and h is None and added is None and (beta is None or beta.dtype == dtype):
        return y
    y, shape = cast(y, wide), (-1, *[1] * len(geometry.kernel))
    out = None if torch.is_grad_enabled() else y
    scale = None if a is None else (1 + cast(a, wide)).view(shape)
    if beta is not None and bias is not None:
        rounded, exact = cast(bias, wide).view(shape), cast(beta, wide).view(shape)
        if scale is not None:  # the vendor has added b: (x∗W)∘(1+a) + β
            y = torch.lerp(rounded, y, scale, out=out)
        if dtype != wide:
            y = torch.add(y, exact - rounded, out=out)
    elif scale is not None:
        y = torch.mul(y, scale, out=out)
    if added is not None:
        y = torch.add(y, cast(added, wide), out=out)
    if h is None or up is None:
        return y
    h, up = cast(h, wide), cast(up, wide)
    return _plus(y, h, up) if out is not None else y + geometry.of_channels.product(h, up.view(*up.shape, *shape[1:]))


class _Sum(torch.autograd.Function):
    """`_sum`, rounded once. Gradients, with (·∗ᵀW) for the transposed convolution:

    dx = (dy∘(1+a))∗ᵀW_eff, da = Σ dy∘(x∗W), dh = dy·up, dup = Σ dyᵀh, dadded = dy, dβ = Σ dy, the sums over all
    places; of A lora: H = dW_eff∘W, dA_up = H·A_downᵀ, dA_down = A_upᵀ·H. There is none for W.
    """

    @staticmethod
    def forward(ctx: Any, geometry: Geometry, x: Tensor, weight: Tensor, *terms: Tensor | None) -> Tensor:
        ctx.geometry = geometry
        a, a_up, a_down, h, up, added, beta = terms
        ctx.save_for_backward(x, weight, a, a_up, a_down, h, up)
        ctx.added = None if added is None else added.dtype
        ctx.beta = None if beta is None else beta.dtype
        return _rounded(_sum(geometry, x, weight, *terms), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, a, a_up, a_down, h, up = ctx.saved_tensors
        geometry, places = ctx.geometry, [0, *range(2, dy.ndim)]
        _, need_x, _, need_a, need_a_up, need_a_down, need_h, need_up, need_added, need_beta = ctx.needs_input_grad
        wide, need_pair = wide_dtype(x.dtype), need_a_up or need_a_down
        da = da_up = da_down = None
        with without_autocast(x.device.type):
            left = dy if a is None else _scaled(dy, a)
            dx, dweight = geometry.gradients(left, x, _effective(weight, a_up, a_down, x.dtype), (need_x, need_pair))
            if need_a:
                z = geometry.product(x, cast(weight, x.dtype))
                da = cast((cast(dy, wide) * z).sum(places), a.dtype)
            if need_pair:
                product = (cast(given(dweight), wide) * weight).flatten(1)
                da_up = cast(product @ cast(a_down, wide).t(), a_up.dtype) if need_a_up else None
                da_down = cast(cast(a_up, wide).t() @ product, a_down.dtype) if need_a_down else None
            dh = dup = None
            if need_h or need_up:
                factor = up.view(*up.shape, *[1] * len(geometry.kernel))
                dh, dup = geometry.of_channels.gradients(cast(dy, h.dtype), h, factor, (need_h, need_up))
                dup = None if dup is None else dup.view(up.shape)
            dadded = cast(dy, ctx.added) if need_added else None
            dbeta = cast(dy.sum(places, dtype=wide), ctx.beta) if need_beta else None
        return None, dx, None, da, da_up, da_down, dh, dup, dadded, dbeta


def _scaled(dy: Tensor, a: Tensor) -> Tensor:
    """dy∘(1+a); a 16-bit dy rounds with the dither, as the rounded y does."""
    scale = (1 + cast(a, wide_dtype(dy.dtype))).view(-1, *[1] * (dy.ndim - 2))
    return _rounded(dy * scale, dy.dtype)
