"""The linear layers of experts: groups of rows, of which each has a frozen weight and a low-rank adapter of its own.

    y[i] = x[token(i)]·W_eᵀ + s·(x[token(i)]·D_eᵀ)·U_eᵀ,   e the expert of row i

Rows are sorted by expert; token(i) says which row of x the i-th one reads, for a token goes to several experts. x is
read through this index, in backward again, and no copy of it is kept; there is no dense U·D, and dx is a sum in the
order of the experts of a token, the same in every run. The products are PyTorch's `grouped_mm`, and one product an
expert where it does not serve (float64, say, or a W of sizes or strides that it does not take).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glora_kernels.dispatch.operator import LIBRARY

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
        y, h = _product(rows, weight, groups.ends, False), None
        if down is not None:
            h = _product(rows, down, groups.ends, True)
            y = y.add_(_product(h, up, groups.ends, True), alpha=scale)
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
            dh = _product(dy, up.transpose(1, 2), ends, True).mul_(ctx.scale)
        if needs_up:
            dup = _outer(dy, h, ends).mul_(ctx.scale)
        if needs_down:
            assert dh is not None
            ddown = _outer(dh, groups.gather(x) if ctx.of_tokens else x, ends)
        if needs_x:
            dx = _product(dy, weight.transpose(1, 2), ends, False)
            if dh is not None:
                dx.add_(_product(dh, down.transpose(1, 2), ends, True))
            dx = groups.sum_back(dx) if ctx.of_tokens else dx
        return dx, None, dup, ddown, None, None, None


def _product(rows: Tensor, weight: Tensor, ends: Tensor, is_factor: bool) -> Tensor:
    """rows (M, K), weight (E, N, K) → (M, N): each row by the weight of its group."""
    run: Any = torch.ops.glora_kernels.expert_product if torch.compiler.is_compiling() else _product_now
    found: Tensor = run(rows, weight, ends, is_factor)
    return found


def _outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left (M, N), right (M, R) → (E, N, R): Σ over the rows of each group of left·rightᵀ."""
    run: Any = torch.ops.glora_kernels.expert_outer if torch.compiler.is_compiling() else _outer_now
    found: Tensor = run(left, right, ends)
    return found


def _product_now(rows: Tensor, weight: Tensor, ends: Tensor, is_factor: bool) -> Tensor:
    fits = _is_aligned(weight)
    if not _is_served(rows) or not (fits or is_factor):  # a copy of W with zeros would be as large as all experts
        return _each(rows, weight, ends)
    n = weight.shape[1]
    weight = weight if fits else _padded(_padded(weight.contiguous(), 2), 1)
    return F.grouped_mm(_padded(rows.contiguous(), 1), weight.transpose(1, 2), offs=ends)[:, :n]


def _outer_now(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    n, r = left.shape[1], right.shape[1]
    if _is_served(left):
        left, right = _padded(left.contiguous(), 1), _padded(right.contiguous(), 1)
        return F.grouped_mm(left.t(), right, offs=ends)[:, :n, :r]
    found = left.new_zeros(len(ends), n, r)
    for e, (first, last) in enumerate(_spans(ends)):
        if last > first:
            found[e] = left[first:last].t() @ right[first:last]
    return found


def _is_served(rows: Tensor) -> bool:
    """Whether `grouped_mm` takes these rows."""
    return rows.dtype in SERVED and len(rows) > 0


def _is_aligned(weight: Tensor) -> bool:
    """Whether `grouped_mm` takes a weight (E, N, K) as it lies."""
    step = ALIGNMENT // weight.element_size()
    e, n, k = weight.stride()
    along, across = (n, k) if k == 1 else (k, n)
    lengths = (*weight.shape[1:], e, along)
    return across == 1 and not any(length % step for length in lengths) and weight.data_ptr() % ALIGNMENT == 0


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


# For torch.compile the products are one node each: its fake `grouped_mm` knows bf16 alone, and sizes cannot be read.
LIBRARY.define("expert_product(Tensor rows, Tensor weight, Tensor ends, bool is_factor) -> Tensor")
LIBRARY.define("expert_outer(Tensor left, Tensor right, Tensor ends) -> Tensor")
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("expert_product", lambda *arguments: _product_now(*arguments).contiguous(), _device)
    LIBRARY.impl("expert_outer", lambda *arguments: _outer_now(*arguments).contiguous(), _device)


@torch.library.register_fake("glora_kernels::expert_product", lib=LIBRARY)
def _fake_product(rows: Tensor, weight: Tensor, ends: Tensor, is_factor: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.register_fake("glora_kernels::expert_outer", lib=LIBRARY)
def _fake_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])
