"""The adapters of a call as a table of 64-bit integers on the device: addresses (0: absent), sizes, strides, numbers.

How many adapters there are, their ranks and forms are data of the kernels that read it: none is compiled again when
they change. What is compiled in is a `Layout`: the dtypes, and which forms any adapter has.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glora_kernels import tile
from glora_kernels.dispatch.common import given
from glora_kernels.multi.adapters import Adapter
from glora_kernels.operands import Matrix
from glora_kernels.reference.random import dropout_threshold
from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import halves, numerics
from glora_kernels.runtime.spills import Beside, fitted

COLUMNS = (
    "rank", "first_rank", "scale", "threshold", "seed", "seed_address", "b_up", "b_up_row", "b_down", "b_down_row",
    "a", "a_step", "b", "b_step", "d", "d_step", "e", "e_step", "wc", "wc_step", "wc_row",
)  # fmt: skip
"""One adapter. first_rank: Σ of the ranks before it. scale: s/(1-p), fp32. step: of a vector, 0 of a constant.

wc_row: its row among the W·c that the call itself makes, -1 for none; `wc` is one that was given.
"""

_WIDTH = tl.constexpr(len(COLUMNS))
_PLACES = {name: place for place, name in enumerate(COLUMNS)}
_VECTORS = ("a", "b", "d", "e")


class Layout(NamedTuple):
    """What kernels are compiled for: the dtypes by name, and whether any adapter has a form.

    step: what all ranks are multiples of, and what the rows of every B_up begin at multiples of. align: the latter of
    every B_down. A pointer is a multiple of as many bytes, of B_up of two a number.
    """

    factor: str
    vector: str
    given_wc: str
    a: bool
    b: bool
    d: bool
    e: bool
    wc: bool
    drops: bool
    step: int
    align: int


@triton.constexpr_function
def _place(column):
    return _PLACES[column]


@triton.jit
def row_of(table_ptr, adapter):
    return table_ptr + adapter.to(tl.int64) * _WIDTH


@triton.jit
def number(row, COLUMN: tl.constexpr, ALIGN: tl.constexpr = 1):
    """A 64-bit entry, a multiple of ALIGN. Here, as the compiler keeps no such word of what a function returned."""
    return tl.multiple_of(tl.load(row + _place(COLUMN)), ALIGN)


@triton.jit
def size(row, COLUMN: tl.constexpr, ALIGN: tl.constexpr = 1):
    """A 32-bit entry, a multiple of ALIGN."""
    return tl.multiple_of(tl.load(row + _place(COLUMN)).to(tl.int32), ALIGN)


@triton.jit
def rank(row, LAYOUT: tl.constexpr):
    STEP: tl.constexpr = LAYOUT.step
    return size(row, "rank", STEP)


@triton.jit
def scale(row):
    return size(row, "scale").to(tl.float32, bitcast=True)


@triton.jit
def key_of(row, seed):
    """The key of the dropout mask: the one `seed` of all, or the adapter's own, an entry or behind an address."""
    if seed is None:
        key = number(row, "seed")
        address = number(row, "seed_address")
        if address != 0:
            key = tl.load(address.to(tl.pointer_type(tl.int64)))
        return key
    else:
        return tile.seed_of(seed)


@triton.jit
def vector(row, COLUMN: tl.constexpr, index, length, DTYPE: tl.constexpr):
    """A vector, or a constant repeated, in fp32 at `index`; zeros outside, and where it is absent."""
    address = number(row, COLUMN)
    offsets = index.to(tl.int64) * tl.load(row + _place(COLUMN) + 1)
    mask = (index < length) & (address != 0)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def b_up(row, LAYOUT: tl.constexpr):
    """B_up (N,R); never read where R is 0."""
    STEP: tl.constexpr = LAYOUT.step
    ptr = number(row, "b_up").to(tl.pointer_type(tile.dtype_of(LAYOUT.factor)))
    return Matrix(tl.multiple_of(ptr, 2 * STEP), number(row, "b_up_row", STEP), 1)


@triton.jit
def b_down(row, LAYOUT: tl.constexpr):
    """B_down (R,K); never read where R is 0."""
    ALIGN: tl.constexpr = LAYOUT.align
    ptr = number(row, "b_down").to(tl.pointer_type(tile.dtype_of(LAYOUT.factor)))
    return Matrix(tl.multiple_of(ptr, ALIGN), number(row, "b_down_row", ALIGN), 1)


class Kind(NamedTuple):
    """What the host knows of a table: what is compiled in, the rank of each adapter, and what dtypes are read."""

    layout: Layout
    ranks: tuple[int, ...]
    factor: torch.dtype
    vector: torch.dtype

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks)

    @property
    def width(self) -> int:
        """The numbers in a row of h, or of S: whole lines of memory."""
        return -(-self.rank // 16) * 16

    def config(
        self, kernel: str, arch: str, dtype: torch.dtype, sizes: tuple[int, int, int], aligned: bool = True
    ) -> dict[str, int]:
        """The configuration of a kernel in a computation in `dtype` of (M, N, K); `aligned`: see `spills.Beside`."""
        m, n, k = sizes
        chosen = tables.choose(kernel, arch, dtype, Shape(configs.m_class(m), n, k, self.rank))
        wide, drops = halves(numerics(dtype, self.factor)), self.layout.drops
        return fitted(kernel, chosen, Beside(arch, dtype, self.rank, halves=wide, drops=drops, aligned=aligned))

    def rank_blocks(self, most: int) -> tuple[int, int]:
        """(number, columns) of the blocks of a row of h, or of S, each of `most` columns or less."""
        block = configs.block_r(self.rank, most)
        return max(1, -(-self.rank // block)), block


class Table(NamedTuple):
    """The adapters of a call for its kernels.

    entries: (J, columns) int64 on the device. held: the copies among what it has addresses of, to be kept until the
    launches that read them are issued.
    """

    entries: Tensor
    kind: Kind
    held: Sequence[Tensor] = ()

    @property
    def lasts(self) -> bool:
        """Whether it is right for as long as the adapters' tensors stay where they are, whatever is written there."""
        return not self.held and not self.kind.layout.drops  # a copy is of the values of now, as a key on the host is


_uploaded: dict[tuple[Any, ...], tuple[int, Tensor]] = {}
"""By device and contents: the stream that a table was copied on, and the table."""
_KEPT = 1024
_captured: list[Tensor] = []
"""The tables that captured graphs read, for as long as the process lives."""


def table_of(adapters: Sequence[Adapter], dtype: torch.dtype, device: torch.device, wc_rows: Sequence[int]) -> Table:
    """The table of a call's adapters; copied to the device where it differs from those that were.

    Factors come in one dtype, and so do vectors: fp32 where theirs differ, which takes a copy of each, as do rows of
    factors that are not contiguous.

    Args:
        adapters: of the call.
        dtype: of the computation.
        device: where the kernels run.
        wc_rows: `wc_row` of each.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the table is none of those that were copied before.
    """
    supports = [adapter.s for adapter in adapters]
    held: list[Tensor] = []
    factor = _one_dtype([t for s in supports for t in (s.b_up, s.b_down) if t is not None], dtype)
    own = _one_dtype([t for s in supports for name in _VECTORS if (t := getattr(s, name)) is not None], dtype)
    given_wc = _one_dtype([s.wc for s in supports if s.wc is not None], torch.float32)

    def matrix(tensor: Tensor) -> tuple[int, int]:
        if tensor.dtype != factor or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
            tensor = tensor.to(factor).contiguous()
            held.append(tensor)
        return tensor.data_ptr(), tensor.stride(0)

    def vector(tensor: Tensor | None, dtype: torch.dtype) -> tuple[int, int]:
        if tensor is None:
            return 0, 0
        if tensor.dtype != dtype:
            tensor = tensor.to(dtype)
            held.append(tensor)
        return tensor.data_ptr(), 0 if tensor.numel() == 1 else tensor.stride(0)

    values: list[int] = []
    ranks, first, step, align = [], 0, 0, 0
    for (s, _, call), wc_row in zip(adapters, wc_rows, strict=True):
        rank, drops = 0, False
        up = down = (0, 0)
        if s.b_up is not None:
            rank, up, down = s.b_up.shape[1], matrix(s.b_up), matrix(given(s.b_down))
            step |= up[0] // factor.itemsize | up[1] | rank
            align |= down[0] // factor.itemsize | down[1]
            drops = call.dropout_p > 0.0
        seed = call.seed if drops else None  # None: the kernels get one for all
        on_host = seed is not None and seed.is_cpu
        values += (
            rank, first, _bits(call.scale / (1.0 - call.dropout_p if drops else 1.0)),
            dropout_threshold(call.dropout_p) if drops else 0,
            int(seed) if seed is not None and on_host else 0,
            seed.data_ptr() if seed is not None and not on_host else 0,
            *up, *down, *vector(s.a, own), *vector(s.b, own), *vector(s.d, own), *vector(s.e, own),
            *vector(s.wc, given_wc), wc_row,
        )  # fmt: skip
        ranks.append(rank)
        first += rank
    has = {name: any(getattr(s, name) is not None for s in supports) for name in (*_VECTORS, "wc")}
    layout = Layout(
        _name(factor), _name(own), _name(given_wc), **has,
        drops=any(call.dropout_p > 0.0 and s.b_up is not None for s, _, call in adapters),
        step=8 if step % 8 == 0 else 1, align=16 if align % 16 == 0 else 1,
    )  # fmt: skip
    return Table(_on_device(tuple(values), device), Kind(layout, tuple(ranks), factor, own), held)


def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    shape = len(values) // len(COLUMNS), len(COLUMNS)
    if device.type == "meta":
        return torch.empty(shape, dtype=torch.int64, device=device)
    capturing = environment.is_capturing(device)
    stream = environment.stream_of(device)
    on, found = _uploaded.get((device, values), (-1, None))
    # A capture begins where the device has nothing left to do.
    if found is None or (on != stream and not capturing):
        if capturing:
            raise RuntimeError(
                "the adapters of multi_glora_linear are not those of a call before this CUDA graph's capture (their "
                "addresses, ranks, scales or dropout keys on the host differ): call it once with these tensors first"
            )
        host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda").view(shape)
        if len(_uploaded) >= _KEPT:
            _uploaded.clear()
        found = host.to(device, non_blocking=True)
        _uploaded[device, values] = stream, found
    if capturing:
        _captured.append(found)
    return found


def _one_dtype(tensors: Sequence[Tensor], otherwise: torch.dtype) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors} or {otherwise}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
