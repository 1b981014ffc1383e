"""Adapters of one form with few rows each, as one: their tensors stacked, their rows padded to one number.

For each of them, and in `wide_dtype`, what `glora.eager` computes for a layer of its own: a few operations for all
adapters in the place of a few for each. Stacking copies the factors once, which any product with them reads anyway.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import cast, given, wide_dtype
from glora_kernels.glora.call import Call, Made, Needs, Supports, shift
from glora_kernels.glora.eager import keep_of
from glora_kernels.multi.adapters import Adapter
from glora_kernels.reference.random import round_dithered

MOST = 32
"""Of more rows an adapter's own operations are large enough."""


class Part(NamedTuple):
    """The rows of adapter j, among sorted ones.

    own: they take W_eff in the place of W. by_rank: they would, but are few. form: equal for those that can be stacked.
    """

    at: slice
    j: int
    s: Supports
    call: Call
    own: bool
    by_rank: bool
    form: Hashable

    @property
    def size(self) -> int:
        return int(self.at.stop - self.at.start)

    @property
    def beside(self) -> Supports:
        """The supports that act beside the products with W."""
        return self.s._replace(a_up=None, a_down=None) if self.by_rank else self.s


def form_of(j: int, adapter: Adapter, size: int) -> Hashable:
    """What the adapters of a stack have in common; of an adapter with many rows, that it is the only one."""
    s, c, call = adapter
    if size > MOST:
        return j
    tensors = (s.a, s.b, s.b_up, s.b_down, s.wc, s.d, s.e, c.c, c.c_up)
    shapes = tuple([None if t is None else (t.shape, t.dtype) for t in tensors])
    return shapes, call.dropout_p > 0, (size - 1).bit_length()  # no more than half of the padded rows are zeros


class Stack(NamedTuple):
    """Adapters of one form, whose rows follow each other.

    at: their rows, among sorted ones. size: rows of each, padded; places: of the rows among these, None if none is.
    s: tensors with one dimension more in front, but the bias, in `wide`, that of dtype. scale: s/(1-p) of all, or of
    each (J,1,1). keep: their dropout masks.
    """

    parts: Sequence[Part]
    at: slice
    size: int
    places: Tensor | None
    s: Supports
    scale: float | Tensor
    keep: Tensor | None
    dtype: torch.dtype
    wide: torch.dtype

    @classmethod
    def of(cls, parts: Sequence[Part], like: Tensor) -> Stack:
        """like: in the dtype and on the device of the computation."""
        at, wide = slice(parts[0].at.start, parts[-1].at.stop), wide_dtype(like.dtype)
        sizes, supports, first = [part.size for part in parts], [part.beside for part in parts], parts[0]
        size, places = max(sizes), None
        if min(sizes) < size:
            counts = torch.tensor(sizes)
            shifts = torch.arange(len(parts)) * size - torch.tensor([0, *accumulate(sizes)][:-1])
            places = torch.arange(sum(sizes)) + shifts.repeat_interleave(counts)
            places = places.to(like.device)
        tensors = {
            name: cast(torch.stack([given(getattr(each, name)) for each in supports]), wide)
            for name, tensor in supports[0]._asdict().items()
            if tensor is not None and name != "bias"
        }
        scales = [part.call.scale / (1.0 - part.call.dropout_p) for part in parts]
        scale: float | Tensor = scales[0]
        if len(set(scales)) > 1:
            scale = torch.tensor(scales, dtype=wide, device=like.device).view(-1, 1, 1)
        keep = None
        if first.call.dropout_p and first.s.b_down is not None:
            k = first.s.b_down.shape[1]
            keep = torch.stack([given(keep_of(p.call, size, k, like.device)) for p in parts])
        return cls(parts, at, size, places, Supports(bias=first.s.bias, **tensors), scale, keep, like.dtype, wide)

    def padded(self, matrix: Tensor) -> Tensor:
        """Those rows of a matrix of sorted rows, (J, size, ·), with zeros where an adapter has fewer."""
        rows = matrix[self.at]
        if self.places is not None:
            rows = rows.new_zeros(len(self.parts) * self.size, rows.shape[1]).index_copy_(0, self.places, rows)
        return cast(rows, self.wide).view(-1, self.size, rows.shape[1])

    def rows(self, stack: Tensor) -> Tensor:
        """The inverse of `padded`."""
        flat = stack.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def made(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """h (J, size, R) and σ (J, size) of x (J, size, K)."""
        h = None
        if self.s.b_down is not None:
            h = torch.bmm(self.dropped(x), self.s.b_down.mT).mul_(self.scale)
        return h, None if self.s.b is None else x.sum(-1)

    def dropped(self, x: Tensor) -> Tensor:
        return x if self.keep is None else torch.where(self.keep, x, 0.0)

    def put(self, y: Tensor, x: Tensor) -> None:
        """Write into y what the product with W is added to: all terms, or where A scales that, β."""
        beta = self._beta
        h, sigma = (None, None) if self.s.a is not None else self.made(self.padded(x))
        if h is None and sigma is None:
            y[self.at] = 0.0 if beta is None else self._broad(beta)
            return
        rounds = beta is not None or sigma is not None
        y[self.at] = self._sum(beta, h, sigma, y.shape[1], dither=rounds)

    def finish(self, y: Tensor, x: Tensor) -> None:
        """y = Z∘(1+a) + h·B_upᵀ + σ·bᵀ + β from Z + β, where there is an A. See `glora.eager.scale_rows`."""
        if self.s.a is None:
            return
        beta, base, scale = self._beta, self.padded(y), (1 + self.s.a)[:, None]
        if beta is None:
            base = base * scale
        elif self.dtype == self.wide:
            base = torch.lerp(beta, base, scale)
        else:
            base = torch.addcmul(beta - scale * beta.to(self.dtype).to(self.wide), base, scale)
        y[self.at] = self._sum(base, *self.made(self.padded(x)), y.shape[1], dither=True)

    def scaled(self, dy: Tensor) -> Tensor:
        """The rows of dy∘(1+a)."""
        if self.s.a is None:
            return dy[self.at]
        rows = self.rows(self.padded(dy) * (1 + self.s.a)[:, None])
        return round_dithered(rows.contiguous(), self.dtype)

    @property
    def _beta(self) -> Tensor | None:
        """β of each adapter, (J, 1, N) or of fewer dimensions or elements."""
        beta = shift(self.s, self.dtype)
        return None if beta is None else cast(beta if beta.ndim == 1 else beta[:, None], self.wide)

    def _broad(self, beta: Tensor) -> Tensor:
        """β for each row."""
        if beta.ndim == 1:
            return beta
        return self.rows(beta.expand(-1, self.size, -1))

    def _sum(self, base: Tensor | None, h: Tensor | None, sigma: Tensor | None, n: int, dither: bool) -> Tensor:
        """The rows (·, N) of base + h·B_upᵀ + σ·bᵀ in the dtype of the computation."""
        total = base
        if h is not None:
            up = given(self.s.b_up).mT
            total = torch.bmm(h, up) if base is None else torch.baddbmm(base, h, up)
        if sigma is not None:
            term = sigma[..., None] * given(self.s.b)[:, None]
            total = term if total is None else total + term
        rows = self.rows(given(total)).expand(-1, n)
        return round_dithered(rows.contiguous(), self.dtype) if dither else cast(rows, self.dtype)

    def gradients(self, dy: Tensor, x: Tensor | None, needs: Needs) -> tuple[Tensor | None, Supports, Made]:
        """The rows of dx but for its product with W, or a number for each; the gradients but that of A; and h and σ.

        The gradient of the bias is one sum for all. See `glora.eager.small_gradients`. dy and x are sorted rows.
        """
        s, dy, x = self.s, self.padded(dy), None if x is None else self.padded(x)
        h, sigma = (None, None) if x is None else self.made(x)
        delta: Tensor | None = None
        found: dict[str, Tensor] = {}
        if s.b_up is not None:
            if needs.b_up:
                found["b_up"] = torch.bmm(dy.mT, given(h))
            if needs.x or needs.b_down:
                ds = torch.bmm(dy, s.b_up).mul_(self.scale)
                if needs.b_down:
                    found["b_down"] = torch.bmm(ds.mT, self.dropped(given(x)))
                if needs.x:
                    delta = self.dropped(torch.bmm(ds, given(s.b_down)))
        if s.b is not None:
            if needs.b:
                found["b"] = _fitting(torch.bmm(given(sigma)[:, None], dy).squeeze(1), s.b)
            if needs.x:
                tau = dy.sum(-1, keepdim=True) * s.b[:, None] if s.b.shape[1] == 1 else dy @ s.b[..., None]
                delta = tau if delta is None else delta + tau
        if needs.shift:
            g = dy.sum(1)
            if needs.bias:
                found["bias"] = (g if s.d is None else torch.addcmul(g, g, s.d)).sum(0)
            if needs.d:
                found["d"] = _fitting(g * given(s.bias), given(s.d))
            if needs.e:
                found["e"] = _fitting(g, given(s.e))
            if needs.wc:
                found["wc"] = g.clone() if needs.e else g  # autograd may keep both as they are
        return None if delta is None else cast(self.rows(delta), self.dtype), Supports(**found), Made(None, h, sigma)


def _fitting(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient (J, N) of vectors, or summed that of constants (J, 1)."""
    return grad if like.shape[1] > 1 else grad.sum(1, keepdim=True)
