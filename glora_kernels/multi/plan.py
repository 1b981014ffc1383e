"""The rows of a call sorted by adapter, on the device: no launch waits for the host to know who has how many.

A kernel's tiles of BLOCK_M sorted rows are numbered so that those of adapter j begin at starts[j] // BLOCK_M + j: M //
BLOCK_M + J tiles are enough for any assignment, and of an adapter with rows none is another's. A program finds its own
by counting (`tile_of`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from triton import cdiv

from glora_kernels.multi.adapters import check_rows
from glora_kernels.runtime import environment
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.planning import is_planning

_BLOCK = 16


class Plan(NamedTuple):
    """places: for each sorted row its place among all, int32 (M,). starts: the first of each adapter's, (J+1,)."""

    places: Tensor
    starts: Tensor


@triton.jit
def tile_of(starts_ptr, t, J, BLOCK_M: tl.constexpr):
    """(adapter, its first sorted row, the first of tile t, the adapter's end); an empty tile begins behind that."""
    adapter = -1
    for j0 in range(0, J, 64):
        j = j0 + tl.arange(0, 64)
        begins = tl.load(starts_ptr + j, mask=j < J, other=0) // BLOCK_M + j
        adapter += tl.sum(((j < J) & (begins <= t)).to(tl.int32), 0)
    start = tl.load(starts_ptr + adapter)
    first = start + (t - start // BLOCK_M - adapter) * BLOCK_M
    return adapter, start, first, tl.load(starts_ptr + adapter + 1)


@triton.jit
def rows_at(rows_ptr, each, i, end, M):
    """The rows of a matrix that stand at i among the sorted ones, i itself where there is no list; M behind the end.

    each: how many of the list's rows one row of the matrix stands for, if not one.
    """
    if rows_ptr is None:
        return tl.where(i < end, i, M)
    elif each is None:
        return tl.load(rows_ptr + i, mask=i < end, other=M).to(tl.int32)
    else:
        return tl.where(i < end, tl.load(rows_ptr + i, mask=i < end, other=0).to(tl.int32) // each, M)


def tiles(m: int, count: int, block: int) -> int:
    """How many tiles there are at most."""
    return m // block + count


@triton.jit(do_not_specialize=["M", "J"], debug=True)
def _multi_plan_kernel(rows_ptr, places_ptr, starts_ptr, M, J, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """places and starts of `Plan`, of rows int64 (M,) with -1 for the last adapter: a row's place is a count.

    Programs of rows, and behind them programs of starts.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.cdiv(M, BLOCK)
    is_row = tl.program_id(0) < blocks
    j = i - blocks * BLOCK
    key = tl.load(rows_ptr + i, mask=is_row & (i < M), other=-1).to(tl.int32)
    tl.device_assert((key >= -1) & (key < J - 1), "rows must be numbers of adapters, or -1 for the base alone")
    key = tl.where(is_row, tl.where(key < 0, J - 1, key), j)
    before = tl.zeros((BLOCK,), tl.int32)
    for m0 in range(0, M, STEP):
        m = m0 + tl.arange(0, STEP)
        other = tl.load(rows_ptr + m, mask=m < M, other=J).to(tl.int32)
        other = tl.where(other < 0, J - 1, other)[None, :]
        ties = (other == key[:, None]) & (m[None, :] < i[:, None]) & is_row
        before += tl.sum(((other < key[:, None]) | ties).to(tl.int32), 1)
    tl.store(places_ptr + before, i, mask=is_row & (i < M))
    tl.store(starts_ptr + j, before, mask=(j >= 0) & (j <= J))


def multi_plan_launch(rows: Tensor, places: Tensor, starts: Tensor) -> Launch:
    """The places (M,) and starts (J+1,), int32, of rows int64 (M,)."""
    m, j = len(rows), len(starts) - 1
    args = {"rows_ptr": rows, "places_ptr": places, "starts_ptr": starts, "M": m, "J": j, "BLOCK": _BLOCK, "STEP": 256}
    return Launch(_multi_plan_kernel, (cdiv(m, _BLOCK) + cdiv(j + 1, _BLOCK),), args, {"num_warps": 4, "num_stages": 1})


_plans = WeakTensorKeyDictionary()
"""By the tensor of an assignment: all layers of a step share it."""


def plan_of(rows: Tensor, count: int) -> Plan:
    """The order of rows int64 (M,) of `count` adapters, of which the last takes those whose number is -1.

    Kept with the tensor until that is written. Not while a CUDA graph is captured, whose replays sort anew what then
    stands there: the assignment is data of the graph.

    Raises:
        ValueError: on the host, a number that is no adapter's. On a device the kernel asserts it, in replays of a graph
            too, as PyTorch's kernels do for an index.
    """
    if is_planning() or rows.is_inference() or environment.is_capturing(rows.device):
        return _planned(rows, count)
    owner = rows if rows._base is None else rows._base
    key = rows._version, count, rows.storage_offset(), rows.shape, rows.stride(), environment.stream_of(rows.device)
    known: tuple[object, Plan] | None = _plans.get(owner)
    if known is None or known[0] != key:
        known = _plans[owner] = key, _planned(rows, count)
    return known[1]


def _planned(rows: Tensor, count: int) -> Plan:
    if not (rows.is_cuda or is_planning()):
        check_rows(rows, count - 1)
    rows = rows.contiguous()
    plan = Plan(*(torch.empty(size, dtype=torch.int32, device=rows.device) for size in (len(rows), count + 1)))
    multi_plan_launch(rows, *plan).run()
    return plan
