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
    if torch.compiler.is_compiling():
        return _registered(x, weight, up, down, *groups, scale, of_tokens)[0]
    return _ExpertLinear.apply(x, weight, up, down, groups, scale, of_tokens)


def _forward(
    x: Tensor, weight: Tensor, up: Tensor | None, down: Tensor | None, groups: Groups, scale: float, of_tokens: bool
) -> tuple[Tensor, Tensor | None]:
    """y (M, N) and h (M, R)."""
    rows = groups.gather(x) if of_tokens else x
    y = _product(rows, weight, groups.ends)
    if up is None or down is None:
        return y, None
    h = _product(rows, down, groups.ends)
    return y.add_(_product(h, up, groups.ends), alpha=scale), h


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    up: Tensor | None,
    down: Tensor | None,
    h: Tensor | None,
    groups: Groups,
    scale: float,
    of_tokens: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dU and dD: those that are needed."""
    dy, (needs_x, needs_up, needs_down) = dy.contiguous(), needs
    dx = dh = dup = ddown = None
    if up is not None and (needs_x or needs_down):
        dh = _product(dy, up.transpose(1, 2), groups.ends).mul_(scale)
    if needs_up and h is not None:
        dup = _outer(dy, h, groups.ends).mul_(scale)
    if needs_down and dh is not None and x is not None:
        ddown = _outer(dh, groups.gather(x) if of_tokens else x, groups.ends)
    if needs_x:
        dx = _product(dy, weight.transpose(1, 2), groups.ends)
        if dh is not None and down is not None:
            dx.add_(_product(dh, down.transpose(1, 2), groups.ends))
        dx = groups.sum_back(dx) if of_tokens else dx
    return dx, dup, ddown


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, up: Any, down: Any, groups: Groups, scale: float, of_tokens: bool
    ) -> Tensor:
        y, h = _forward(x, weight, up, down, groups, scale, of_tokens)
        ctx.save_for_backward(None if h is None else x, weight, up, down, h, *groups[:3])
        ctx.rest = groups.each, scale, of_tokens
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, h, *group = ctx.saved_tensors
        each, scale, of_tokens = ctx.rest
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        ends, order, back = group
        groups = Groups(ends, order, back, each)
        dx, *dfactors = _backward(dy, x, weight, up, down, h, groups, scale, of_tokens, needs)
        return dx, None, *dfactors, None, None, None


# One operator for torch.compile, whose compiler lowers `grouped_mm` in bf16 alone. It gives h as well, for backward.


@torch.library.custom_op("glora_kernels::expert_linear", mutates_args=())
def _registered(
    x: Tensor,
    weight: Tensor,
    up: Tensor | None,
    down: Tensor | None,
    ends: Tensor,
    order: Tensor,
    back: Tensor,
    each: int,
    scale: float,
    of_tokens: bool,
) -> tuple[Tensor, Tensor]:
    y, h = _forward(x, weight, up, down, Groups(ends, order, back, each), scale, of_tokens)
    return y, x.new_empty(0) if h is None else h.contiguous()


@_registered.register_fake
def _(x, weight, up, down, ends, order, back, each, scale, of_tokens):
    rows = len(order)
    return x.new_empty(rows, weight.shape[1]), x.new_empty(0) if down is None else x.new_empty(rows, down.shape[1])


@torch.library.custom_op("glora_kernels::expert_linear_backward", mutates_args=())
def _registered_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    up: Tensor | None,
    down: Tensor | None,
    h: Tensor,
    ends: Tensor,
    order: Tensor,
    back: Tensor,
    each: int,
    scale: float,
    of_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    has_factors = up is not None
    needs, groups = (True, has_factors, has_factors), Groups(ends, order, back, each)
    found = _backward(dy, x, weight, up, down, h if has_factors else None, groups, scale, of_tokens, needs)
    dx, dup, ddown = (dy.new_empty(0) if part is None else part.contiguous() for part in found)
    return dx, dup, ddown


@_registered_backward.register_fake
def _(dy, x, weight, up, down, h, ends, order, back, each, scale, of_tokens):
    return x.new_empty(x.shape), *(dy.new_empty(0 if part is None else part.shape) for part in (up, down))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, up, down, ends, order, back, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, up, down, output[1], ends, order, back)


def _back(ctx: Any, dy: Tensor, dh: Tensor | None) -> Any:
    dx, dup, ddown = _registered_backward(dy, *ctx.saved_tensors, *ctx.rest)
    has_factors = ctx.saved_tensors[2] is not None
    return dx, None, dup if has_factors else None, ddown if has_factors else None, *[None] * 6


_registered.register_autograd(_back, setup_context=_keep)


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
