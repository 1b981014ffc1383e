"""Products of groups of rows with a weight each, in plain PyTorch.

They are PyTorch's `grouped_mm`, and one product an expert where that does not serve: float64, a W of sizes or strides
that it does not take, and a W in 4 bits, of which the weight of one expert at a time is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from glora_kernels.dispatch.common import Weight
from glora_kernels.experts.groups import Groups
from glora_kernels.glora.eager import cast_weight
from glora_kernels.quant import QuantizedWeight, QuantState
from glora_kernels.quant.codec import absmax_of

ALIGNMENT = 16
"""Bytes that `grouped_mm` wants rows to be a multiple of."""

SERVED = (torch.float32, torch.bfloat16, torch.float16)


def by_weight(rows: Tensor, weight: Weight, groups: Groups, transposed: bool = False) -> Tensor:
    """rows (M, K), W (E, N, K) → (M, N): each row by the weight of its group; `transposed`: (M, N) → (M, K).

    A W in 4 bits is (E·N, K).
    """
    if isinstance(weight, Tensor):
        weight = weight.mT if transposed else weight
        if _is_served(rows) and weight.dtype == rows.dtype and _is_aligned(weight):
            return _grouped(rows, weight, groups)
    return _each(rows, weight, groups, transposed)


def by_factor(rows: Tensor, factor: Tensor, groups: Groups) -> Tensor:
    """`by_weight` of a factor (E, N, K), which is small: it may be copied to be served."""
    if not _is_served(rows):
        return _each(rows, factor, groups, False)
    n = factor.shape[1]
    if not _is_aligned(factor):
        factor = _padded(_padded(factor.contiguous(), 2), 1)
    return _grouped(rows, factor, groups)[:, :n]


def outer(left: Tensor, right: Tensor, groups: Groups) -> Tensor:
    """left (M, N), right (M, R) → (E, N, R): Σ over the rows of each group of left·rightᵀ."""
    n, r = left.shape[1], right.shape[1]
    if _is_served(left):
        left, right = _padded(left.contiguous(), 1), _padded(right.contiguous(), 1)
        return F.grouped_mm(left.t(), right, offs=groups.ends)[:, :n, :r]
    found = left.new_zeros(groups.experts, n, r)
    for e, span in _with_rows(groups):
        found[e] = left[span].t() @ right[span]
    return found


def sums(rows: Tensor, groups: Groups) -> Tensor:
    """rows (M, N) → (E, N): the sum over the rows of each group."""
    starts = groups.starts[:-1].to(torch.int64)
    if not len(rows):
        return rows.new_zeros(groups.experts, rows.shape[1])
    return torch.segment_reduce(rows, "sum", offsets=starts, axis=0, initial=0.0, unsafe=True)


def of_expert(weight: Weight, e: int, experts: int) -> Weight:
    """W_e (N, K), a view of W (E, N, K), or of the codes of one in 4 bits (E·N, K).

    Raises:
        ValueError: the codes of an expert are no whole number of blocks.
    """
    if isinstance(weight, Tensor):
        return weight[e]
    state, size = weight.state, weight.numel() // experts
    if size % state.blocksize:
        raise ValueError(
            f"a 4-bit weight of experts has whole blocks of {state.blocksize} for each; got {size} numbers an expert"
        )
    blocks = size // state.blocksize
    absmax = absmax_of(state, slice(e * blocks, (e + 1) * blocks))
    n, k = state.shape[0] // experts, state.shape[1]
    codes = weight.packed.view(-1)[e * size // 2 : (e + 1) * size // 2]
    return QuantizedWeight(codes, QuantState(absmax, state.quant_type, state.blocksize, (n, k), state.dtype))


def _grouped(rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    return without_rest(F.grouped_mm(_padded(rows.contiguous(), 1), weight.mT, offs=groups.ends), groups)


def without_rest(y: Tensor, groups: Groups) -> Tensor:
    """y (M, N) with zeros in the rows that have no expert, in place."""
    if y.device.type == "cpu":
        y[int(groups.starts[-2]) :] = 0.0
        return y
    return y.masked_fill_((torch.arange(len(y), device=y.device) >= groups.starts[-2])[:, None], 0.0)


def _each(rows: Tensor, weight: Weight, groups: Groups, transposed: bool) -> Tensor:
    """`by_weight` by one product an expert."""
    dense = isinstance(weight, Tensor)
    y = rows.new_zeros(len(rows), weight.shape[1] if dense or transposed else weight.shape[0] // groups.experts)
    for e, span in _with_rows(groups):
        own = cast_weight(of_expert(weight, e, groups.experts), rows.dtype)  # in the workspace, if not as it is stored
        torch.mm(rows[span], own if transposed and not dense else own.t(), out=y[span])
    return y


def _with_rows(groups: Groups) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and these."""
    return ((e, span) for e, span in enumerate(groups.spans()) if span.start < span.stop)


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


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """With zeros behind a dimension, until its length in bytes is a multiple of the alignment."""
    step = ALIGNMENT // tensor.element_size()
    lack = -tensor.shape[dim] % step
    if not lack:
        return tensor
    behind = [0, 0] * (tensor.ndim - 1 - dim) + [0, lack]
    return F.pad(tensor, behind)
