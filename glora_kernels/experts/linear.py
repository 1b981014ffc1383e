"""The linear layers of experts: groups of rows, of which each has a frozen weight and a low-rank adapter of its own.

    y[i] = x[token(i)]·W_eᵀ + s·(x[token(i)]·D_eᵀ)·U_eᵀ,   e the expert of row i

Rows are sorted by expert; token(i) says which row of x the i-th one reads, for a token goes to several experts. x is
read through this index, in backward again, and no copy of it is kept; there is no dense U·D, and dx is a sum in the
order of the experts of a token, the same in every run. The products are PyTorch's `grouped_mm`, and one product an
expert where it does not serve (float64).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 16
"""Bytes that `grouped_mm` wants rows to be a multiple of."""

SERVED = (torch.float32, torch.bfloat16, torch.float16)


class Groups(NamedTuple):
    """Which rows go to which expert.

    Attributes:
        ends: (E,) int32: where the rows of each expert end; those of an expert without rows where the former ones do.
        order: (M,): the place before sorting of each sorted row.
        back: (M,): the place after sorting of each row, the inverse of `order`.
        each: how many rows each token has.
    """

    ends: Tensor
    order: Tensor
    back: Tensor
    each: int

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Groups:
        """Of the experts of every token (T, k). Nothing waits for a GPU."""
        flat = index.reshape(-1)
        sorted_, order = torch.sort(flat, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        ends = torch.searchsorted(sorted_, torch.arange(experts, device=flat.device), right=True).to(torch.int32)
        return cls(ends, order, back, index.shape[-1])

    def gather(self, x: Tensor) -> Tensor:
        """The rows of tokens x (T, K), sorted by expert: (M, K)."""
        return x[self.order // self.each]

    def sum_back(self, rows: Tensor) -> Tensor:
        """For each token the sum of its rows: (M, K) → (T, K)."""
        return rows[self.back].view(-1, self.each, rows.shape[-1]).sum(1)


def expert_linear(
    x: Tensor, weight: Tensor, groups: Groups, up: Tensor | None, down: Tensor | None, scale: float, of_tokens: bool
) -> Tensor:
    """y (M, N), its rows sorted by expert.

    Args:
        x: of the tokens (T, K), or of the sorted rows (M, K).
        weight: (E, N, K), frozen, in any order of storage.
        groups: which rows go to which expert.
        up, down: U (E, N, R) and D (E, R, K) in the dtype of x; None for the base alone.
        scale: s.
        of_tokens: whether x is that of the tokens.
    """
    return _ExpertLinear.apply(x, weight, up, down, groups, scale, of_tokens)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Tensor, up: Any, down: Any, groups: Groups, scale: float, of_tokens: bool
    ) -> Tensor:
        rows = groups.gather(x) if of_tokens else x
        y, h = _product(rows, weight, groups.ends), None
        if down is not None:
            h = _product(rows, down, groups.ends)
            y = y.add_(_product(h, up, groups.ends), alpha=scale)
        else:
            x = None  # backward does not need it
        ctx.save_for_backward(x, weight, up, down, h, *groups[:3])
        ctx.each, ctx.scale, ctx.of_tokens = groups.each, scale, of_tokens
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, h, ends, order, back = ctx.saved_tensors
        groups, dy = Groups(ends, order, back, ctx.each), dy.contiguous()
        needs_x, _, needs_up, needs_down = ctx.needs_input_grad[:4]
        dh = dx = dup = ddown = None
        if up is not None and (needs_x or needs_down):
            dh = _product(dy, up.transpose(1, 2), ends).mul_(ctx.scale)
        if needs_up:
            dup = _outer(dy, h, ends).mul_(ctx.scale)
        if needs_down:
            assert dh is not None
            ddown = _outer(dh, groups.gather(x) if ctx.of_tokens else x, ends)
        if needs_x:
            dx = _product(dy, weight.transpose(1, 2), ends)
            if dh is not None:
                dx.add_(_product(dh, down.transpose(1, 2), ends))
            dx = groups.sum_back(dx) if ctx.of_tokens else dx
        return dx, None, dup, ddown, None, None, None


def _product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows (M, K), weight (E, N, K) → (M, N): each row by the weight of its group."""
    if rows.dtype not in SERVED or not len(rows):
        return _each(rows, weight, ends)
    n = weight.shape[1]
    rows, weight = _padded(rows, 1), _padded(_padded(weight, 2), 1)
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)[:, :n]


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left (M, N), right (M, R) → (E, N, R): Σ over the rows of each group of left·rightᵀ."""
    if left.dtype not in SERVED or not len(left):
        found = left.new_zeros(len(ends), left.shape[1], right.shape[1])
        for e, (first, last) in enumerate(_spans(ends)):
            if last > first:
                found[e] = left[first:last].t() @ right[first:last]
        return found
    n, r = left.shape[1], right.shape[1]
    return F.grouped_mm(_padded(left, 1).t(), _padded(right, 1), offs=ends)[:, :n, :r]


def _each(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`_product` by one product an expert; on a GPU it waits for the sizes of the groups."""
    y = rows.new_zeros(len(rows), weight.shape[1])
    for e, (first, last) in enumerate(_spans(ends)):
        if last > first:
            torch.mm(rows[first:last], weight[e].t(), out=y[first:last])
    return y


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    found = ends.tolist()
    return list(zip([0, *found], found, strict=False))


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """With zeros behind a dimension, until its length in bytes is a multiple of the alignment."""
    step = ALIGNMENT // tensor.element_size()
    lack = -tensor.shape[dim] % step
    if not lack:
        return tensor
    behind = [0, 0] * (tensor.ndim - 1 - dim) + [0, lack]
    return F.pad(tensor, behind)
