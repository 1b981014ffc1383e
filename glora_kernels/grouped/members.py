"""The operands of a group's kernels: tuples with one entry per member, from which a program picks its own.

First the device functions that pick entry g, then the host functions that make the tuples. Where some members have an
operand and others do not, the others get an address that is never read, with size or rank 0. A path is a low-rank input
h = s·x̃·downᵀ that one or more members use.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from glora_kernels.operands import Bias, Low, Masks, Matrix, Path
from glora_kernels.reference.random import dropout_threshold
from glora_kernels.runtime import configs
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Dropout
from glora_kernels.runtime.recording import rows


@triton.jit
def pick(values, g):
    """values[g], where g is known at run time only."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(g == i, values[i], value)
    return value


@triton.jit
def pick_field(entries, g, FIELD: tl.constexpr):
    """Field number FIELD of entries[g].

    Field by field, since Triton can build a structure only of a class named in the code; and by number, since Triton
    3.6 loses the names of the fields on the way into `getattr`.
    """
    value = entries[0][FIELD]
    for i in tl.static_range(1, len(entries)):
        value = tl.where(g == i, entries[i][FIELD], value)
    return value


@triton.jit
def rows_of(M, Ms, g):
    """The number of rows of member g: M, where all members have the same."""
    if Ms is None:
        return M
    else:
        return pick(Ms, g)


@triton.jit
def pick_rows(matrices, g):
    """matrices[g], where all have contiguous rows."""
    return Matrix(pick_field(matrices, g, 0), pick_field(matrices, g, 1), 1)


@triton.jit
def pick_weight(weights, g, COLS_FIRST: tl.constexpr):
    """weights[g] (cols, depth), where the rows of all are contiguous (COLS_FIRST), or the columns of all."""
    if COLS_FIRST:
        return pick_rows(weights, g)
    else:
        return Matrix(pick_field(weights, g, 0), 1, pick_field(weights, g, 2))


@triton.jit
def pick_low(lows, g):
    return Low(
        pick_field(lows, g, 0), pick_field(lows, g, 1), pick_field(lows, g, 2), pick_field(lows, g, 3),
        pick_field(lows, g, 4),
    )  # fmt: skip


@triton.jit
def pick_path(paths, t):
    return Path(pick_field(paths, t, 0), pick_field(paths, t, 1), pick_field(paths, t, 2))


@triton.jit
def pick_bias(biases, g):
    return Bias(pick_field(biases, g, 0), pick_field(biases, g, 1))


@triton.jit
def tiles(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.cdiv(rows, ROWS) * tl.cdiv(cols, COLS)


@triton.jit
def member_of(tile, M, Ms, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(the member g that a tile belongs to, the first tile of g), tiles being numbered over all members."""
    g = tile * 0
    start = tile * 0
    first = tile * 0
    for i in tl.static_range(len(cols)):
        here = tile >= first
        g = tl.where(here, i, g)
        start = tl.where(here, first, start)
        first += tiles(rows_of(M, Ms, i), cols[i], ROWS, COLS)
    return g, start


def group_shape(xs: Sequence[Tensor], weights: Sequence[Tensor], rank: int) -> Shape:
    """The sizes a configuration is chosen by: the class of the most rows, the sum of the columns, the largest depth."""
    m = configs.m_class(max(map(rows, xs)))
    return Shape(m, sum(w.shape[0] for w in weights), max(w.shape[1] for w in weights), rank)


def row_counts(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """M, the most rows of a member; Ms, the rows of each, or None where they are equal."""
    each = tuple(map(rows, tensors))
    return {"M": max(each), "Ms": each if len(set(each)) > 1 else None}


def addresses(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """A tensor for every member; one without gets that of another as a stand-in. None where no member has one."""
    stand_in = next((tensor for tensor in tensors if tensor is not None), None)
    if stand_in is None:
        return None
    return tuple(stand_in if tensor is None else tensor for tensor in tensors)


def lows(
    ups: Sequence[Tensor | None], hs: Sequence[Tensor | None], leave_h: Sequence[bool], ranks: Sequence[int],
    scales: Sequence[float],
) -> tuple[Low, ...] | None:  # fmt: skip
    up, h = addresses(ups), addresses(hs)
    if up is None or h is None:
        return None
    return tuple(map(Low, up, h, map(int, leave_h), ranks, map(float, scales)))


def biases(tensors: Sequence[Tensor | None]) -> tuple[Bias, ...] | None:
    found = addresses(tensors)
    if found is None:
        return None
    return tuple(map(Bias, found, (0 if bias is None else bias.shape[0] for bias in tensors)))


def masks(p: float, seeds: Sequence[Tensor | int]) -> Masks | None:
    """The dropout masks of a kernel, one seed per path; None without dropout."""
    each = [Dropout(p, seed).key() for seed in seeds] if p > 0.0 else []
    return Masks(tuple(each), float(dropout_threshold(p)), 1.0 / (1.0 - p)) if each else None
