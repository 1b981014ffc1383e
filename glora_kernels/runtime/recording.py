"""Records a pass: its launches and allocations, from one run on meta tensors in the place of its operands ("twins").

Every tensor of a recorded launch is a view of an operand, of something allocated by `empty`, or of the workspace; a
program recognizes which by its storage.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glora_kernels.runtime.planning import planning
from glora_kernels.runtime.sizes import HostValue, Rows, at

_LINE = 512
"""Alignment in bytes of allocations that share one block, that of PyTorch's own allocations."""


class Place(NamedTuple):
    """Where a tensor of a recorded launch lies: the slot of its memory, and the offset in it in bytes."""

    slot: int
    offset: int


class Allocation:
    """Memory allocated while recording.

    Attributes:
        shape: may follow M. has_rows: its first dimension is M itself.
        is_alone: it has a tensor of its own, as a result or because it is filled with zeros (`is_zero`); all other
            allocations share one block.
    """

    def __init__(self, twin: Tensor, shape: tuple[int, ...], is_zero: bool) -> None:
        self.twin, self.shape, self.dtype, self.is_zero = twin, shape, twin.dtype, is_zero
        self.rows = next((size for size in shape if isinstance(size, Rows)), None)
        self.has_rows = self.rows is not None and self.rows is shape[0] and self.rows.is_m
        self.is_alone = is_zero
        self.place = Place(-1, 0)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape, start=self.dtype.itemsize)


class Result(NamedTuple):
    """A result of a pass: the whole tensor in a slot (`twin` is None), or a view of it, given by the view's twin."""

    slot: int
    twin: Tensor | None


class _Recording(threading.local):
    current: Recording | None = None


_recording = _Recording()


class Recording:
    """One run of a pass. Slots are numbered: operands, allocations of their own, the shared block, the workspace."""

    def __init__(self, tensors: Sequence[Tensor | None], with_rows: frozenset[int], m: int) -> None:
        self.steps: list[Any] = []
        self.made: list[Allocation] = []
        self.workspace_bytes = 0
        self.scratch: int | None = None
        self.count = len(tensors)
        self.twins = tuple(
            None if t is None else _twin(t, m if i in with_rows else None) for i, t in enumerate(tensors)
        )
        self._operands = {storage_of(t): (i, t) for i, t in enumerate(self.twins) if t is not None}
        self._hosts = {
            storage_of(twin): i
            for i, (twin, t) in enumerate(zip(self.twins, tensors, strict=True))
            if twin is not None and t is not None and t.is_cpu and t.numel() == 1 and t.dtype == torch.int64
        }
        self.rows = {storage_of(t): Rows(m) for i, t in enumerate(self.twins) if t is not None and i in with_rows}
        self._watch = _Watch()
        self._workspaces: dict[int, Tensor] = {}
        self._places: dict[int, Allocation] = {}

    @contextlib.contextmanager
    def on(self, arch: str, programs: int | None = None) -> Iterator[None]:
        """Inside, this thread's steps and allocations are recorded, as for a card of `arch` (`planning`)."""
        before, _recording.current = _recording.current, self
        try:
            with self._watch, planning(arch, programs) as self.steps:
                yield
        finally:
            _recording.current = before

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, is_zero: bool = False) -> Tensor:
        twin = torch.empty([int(size) for size in shape], dtype=dtype, device="meta")
        made = Allocation(twin, shape, is_zero)
        self.made.append(made)
        self._places[storage_of(twin)] = made
        if made.rows is not None:
            self.rows[storage_of(twin)] = made.rows
        return twin

    def workspace(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        twin = torch.empty(shape, dtype=dtype, device="meta")
        self._workspaces[storage_of(twin)] = twin
        self.workspace_bytes = max(self.workspace_bytes, twin.numel() * dtype.itemsize)
        return twin

    def host_value(self, tensor: Tensor) -> HostValue | None:
        """A stand-in for the number in a CPU tensor; None where the tensor is on the device."""
        slot = self._hosts.get(storage_of(tensor))
        return None if slot is None else HostValue((1 << 62) + 1, slot)  # odd, so that Triton assumes no divisor of it

    @property
    def slots(self) -> int:
        return self.count + sum(one.is_alone for one in self.made) + 2

    def results(self, results: Sequence[Tensor | None]) -> list[Result | None] | None:
        """Where the results lie; None where an operation of PyTorch took part, which a program could not repeat."""
        if self._watch.found:
            return None
        known = [t for t in results if t is not None]
        for tensor in known:
            made = self._places.get(storage_of(tensor))
            if made is None:
                return None
            made.is_alone = True
        slot, offset = self.count, 0
        for one in self.made:
            if one.is_alone:
                one.place, slot = Place(slot, 0), slot + 1
        for one in self.made:
            if not one.is_alone:
                one.place = Place(slot, offset)
                offset = (one.nbytes + (_LINE - 1)) // _LINE * _LINE + offset
        self.scratch = offset
        found: list[Result | None] = []
        for result in results:
            if result is None:
                found.append(None)
                continue
            made = self._places[storage_of(result)]
            whole = (result.shape, result.stride(), result.storage_offset()) == (made.twin.shape, made.twin.stride(), 0)
            found.append(Result(made.place.slot, None if whole else result))
        return found

    def like(self, made: Allocation) -> int | None:
        """The slot of an operand with the dtype, shape and strides of an allocation for every M, or None."""
        for i, twin in enumerate(self.twins):
            if twin is None or made.is_zero or twin.dtype != made.dtype or twin.shape != made.twin.shape:
                continue
            known = self.rows.get(storage_of(twin))
            if twin.stride() == made.twin.stride() and (known is not None) == made.has_rows == (made.rows is not None):
                return i
        return None

    def place_of(self, tensor: Tensor) -> Place:
        """The slot of a recorded tensor's memory, and where in it the tensor begins."""
        storage, offset = storage_of(tensor), int(tensor.storage_offset())
        if storage in self._operands:
            slot, twin = self._operands[storage]
            return Place(slot, (offset - int(twin.storage_offset())) * tensor.itemsize)
        if storage in self._workspaces:
            return Place(self.slots - 1, offset * tensor.itemsize)
        made = self._places[storage]
        if offset and any(isinstance(size, Rows) for size in made.shape[1:]):
            raise AssertionError("a view into memory whose rows follow M: where it begins would follow M as well")
        return Place(made.place.slot, made.place.offset + offset * tensor.itemsize)

    def where(self, twin: Tensor, m: int) -> tuple[int, Sequence[int], Sequence[int], int]:
        """(slot, shape, strides, offset) of a recorded view of an allocation that has a tensor of its own."""
        place = self.place_of(twin)
        return place.slot, self.shape(twin, m), twin.stride(), at(place.offset, m) // twin.itemsize

    def shape(self, twin: Tensor, m: int) -> Sequence[int]:
        """The shape of a recorded tensor for this M."""
        shape, known = list(twin.shape), self.rows.get(storage_of(twin))
        if known is not None:  # one dimension follows M: of those with that size, the outermost in memory
            i = max((i for i, size in enumerate(shape) if size == known), key=twin.stride, default=None)
            if i is not None:
                shape[i] = at(known, m)
        return shape


class Bound(NamedTuple):
    """A recording, with the memory of one call (an entry per slot) and its M."""

    recording: Recording
    memory: Sequence[Any]
    m: int

    def number(self, value: int) -> int:
        """The value that a recorded number has in this call."""
        return int(self.memory[value.slot]) if isinstance(value, HostValue) else at(value, self.m)

    def view(self, twin: Tensor) -> Tensor:
        """The matrix or vector that stands in this call for a recorded one."""
        return self._strided(twin, self.recording.shape(twin, self.m), twin.stride())

    def pointer(self, twin: Tensor) -> Tensor:
        """The first element of what `view` returns: a kernel gets no more of a tensor than its address."""
        return self._strided(twin, (1,), (1,))

    def _strided(self, twin: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        place = self.recording.place_of(twin)
        base, offset = self.memory[place.slot], at(place.offset, self.m)
        if place.slot >= self.recording.slots - 2:  # these hold bytes: the shared block, and the workspace
            count = _extent(shape, strides) * twin.itemsize
            return base[offset : offset + count].view(twin.dtype).as_strided(shape, strides)
        return base.as_strided(shape, strides, base.storage_offset() + offset // twin.itemsize)


class _Watch(TorchDispatchMode):
    """Notes the operations of PyTorch that do more than allocate or view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket not in _HARMLESS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


_HARMLESS = {torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.new_empty, torch.ops.aten.detach}


def storage_of(tensor: Tensor) -> int:
    """Identifies a tensor's memory, which its views share; it works on the meta device as well."""
    return int(tensor.untyped_storage()._cdata)


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of elements of memory from the first to the last element of a strided tensor."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def flat_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor (..., C) seen as (M, C). With more than two dimensions it is contiguous."""
    return tensor.stride() if tensor.ndim <= 2 else (tensor.shape[-1], 1)


def _twin(tensor: Tensor, m: int | None) -> Tensor:
    """A meta tensor with the dtype, strides and alignment of `tensor`, and with m rows where m is given."""
    shape = tuple(tensor.shape)
    strides = tensor.stride()
    if m is not None:
        shape, strides = (m, *shape[-1:])[: max(1, min(2, tensor.ndim))], flat_stride(tensor)
    offset = (tensor.data_ptr() & 15) // tensor.itemsize
    size = offset + _extent(shape, strides)
    return torch.empty(size, dtype=tensor.dtype, device="meta").as_strided(shape, strides, offset)


def rows(tensor: Tensor) -> int:
    """The number of rows of a tensor; every size, grid and argument that follows M must be computed from it."""
    size = tensor.shape[0]
    known = None if _recording.current is None else _recording.current.rows.get(storage_of(tensor))
    return known if known is not None and known == size else size


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor on the device of `like`, in its dtype or another; while a pass is recorded, a meta tensor."""
    if _recording.current is not None:
        return _recording.current.allocate(shape, dtype or like.dtype)
    return like.new_empty(shape, dtype=dtype or like.dtype)


def zeros(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like `empty`, filled with zeros."""
    if _recording.current is not None:
        return _recording.current.allocate(shape, dtype or like.dtype, is_zero=True)
    return like.new_zeros(shape, dtype=dtype or like.dtype)


def recorded() -> Recording | None:
    """The recording that this thread is inside, or None."""
    return _recording.current
