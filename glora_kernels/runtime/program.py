"""Programs: the launches of a pass, planned once for a class of calls and replayed with the tensors of each call.

A pass (`glora.triton.forward`, say) is a function of tensors that allocates, launches and returns. The first call of a
class runs it on meta tensors that stand for its operands ("twins"), which records its launches and allocations: a
program (`runtime.recording`). Later calls of the class allocate the results, and one block for everything that lies
between two kernels; fill addresses and the numbers that follow M into prepared parameters; and launch from C
(`runtime.direct`). Where that is impossible (no CUDA, the interpreter, a profiler that hooks launches) the same program
goes through Triton's own launcher.

The class of a call is all that decides code or launches: dtypes, shapes and strides except M, alignment, the class of M
(`configs.representative`), the device, and the other arguments of the pass. Addresses are no part of it, and a program
holds no tensor: weights may be moved, swapped, merged or freed between two calls.

With GLORA_KERNELS_LAUNCH=slow (or inside `launching(cached=False)`) nothing is kept: every call runs its passes as they
are written, which is the mode to debug in. Both ways give the same launches.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.direct import Sizes, Unsuited, describe, module
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.planning import is_planning
from glora_kernels.runtime.recording import Bound, Recording, Result, flat_stride
from glora_kernels.runtime.sizes import at
from glora_kernels.runtime.workspace import workspace

Results = Sequence[Tensor | None]
Pass = Callable[..., Results]
"""A pass: (tensors, *values) → results. Its launches and allocations depend on nothing but the class of the call."""

_KEPT = 1024
"""The number of M for which a program keeps its sizes, and the number of programs that are kept."""


class PassInputs(NamedTuple):
    """The tensors that a pass takes in one call, and which of them follow M.

    tensors: on a GPU, a CPU tensor among them can only be a dropout seed. with_rows: the indices of those of shape
    (M, ·) or (M,), or (..., ·) and contiguous. device: an index; -1 for the CPU (the interpreter).
    """

    tensors: tuple[Tensor | None, ...]
    with_rows: frozenset[int]
    m: int
    device: int


def class_of(m: int, device: int) -> tuple[Hashable, ...]:
    """The part of a call's cache key that is not in its tensors or values: class of M, card, tables, caching."""
    return configs.representative(m), device, tables.version(), _State.cached


def key_of(operands: PassInputs) -> tuple[Hashable, ...]:
    """The cache key of a call's program, without the values of the pass."""
    single = any(t is not None and t.dtype == torch.float32 for t in operands.tensors)
    return (
        class_of(operands.m, operands.device),
        single and environment.allow_tf32(),
        *(None if t is None else _form(t, i in operands.with_rows) for i, t in enumerate(operands.tensors)),
    )


def _form(tensor: Tensor, has_rows: bool) -> tuple[Hashable, ...]:
    """What launches depend on in a tensor; with `has_rows`, its number of rows is left out."""
    if has_rows:
        return tensor.dtype, tensor.ndim > 1 and tensor.shape[-1], flat_stride(tensor), tensor.data_ptr() & 15
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() & 15, tensor.device


class _State:
    cached = not environment.launches_slowly()


@contextlib.contextmanager
def launching(cached: bool) -> Iterator[None]:
    """Inside, programs are kept and used, or not. It holds for the whole process."""
    before, _State.cached = _State.cached, cached
    try:
        yield
    finally:
        _State.cached = before


def rows_of(tensor: Tensor) -> int:
    """M of a tensor (..., C) with a row per token."""
    return tensor.numel() // max(1, tensor.shape[-1])


_programs: dict[Hashable, Program | None] = {}
_lock = threading.Lock()


def serves(m: int) -> bool:
    """Whether a call may have a program: it has rows, caching is on, and this thread is not planning."""
    return m > 0 and _State.cached and not is_planning()


def find(
    name: str, function: Pass, operands: PassInputs, values: tuple[Hashable, ...] = (), outputs: int | None = None
) -> Program | None:
    """The program of a call's class, planned where the class is new; None if the call or the pass can have none.

    Args:
        name: of the pass.
        function: the pass, called with (tensors, *values).
        operands: of the call.
        values: the other arguments that decide launches.
        outputs: how many of the results, from the first, take the leading dimensions of an N-dimensional x; None: all.
    """
    if not serves(operands.m):
        return None
    key = (name, values, *key_of(operands))
    try:
        return _programs[key]
    except KeyError:
        program = _planned(name, function, operands, values, outputs)
        with _lock:
            if len(_programs) >= _KEPT:
                _programs.clear()
            return _programs.setdefault(key, program)


def _planned(
    name: str, function: Pass, operands: PassInputs, values: tuple[Hashable, ...], outputs: int | None
) -> Program | None:
    device = next(t for t in operands.tensors if t is not None and t.get_device() == operands.device).device
    on_gpu = device.type == "cuda"
    arch = environment.arch(device.index) if on_gpu else "cpu"
    programs = environment.multiprocessors(device.index) if on_gpu else None
    recording, results = record(function, operands, values, arch, programs)
    found = recording.results(results)
    return None if found is None else Program(name, recording, found, device, outputs)


def record(
    function: Pass, operands: PassInputs, values: tuple[Hashable, ...], arch: str, programs: int | None = None
) -> tuple[Recording, Results]:
    """Run a pass on twins of its operands and record it, for a card that need not be here.

    Args:
        function, operands, values: as in `find`.
        arch, programs: the card, as in `planning`.
    """
    recording = Recording(operands.tensors, operands.with_rows, configs.representative(operands.m))
    with recording.on(arch, programs):
        results = function(recording.twins, *values)
    return recording, results


class _Allocation(NamedTuple):
    """A tensor to be allocated.

    like: the slot of an operand of the same form, for torch.empty_like, or None. make: torch.empty or torch.zeros.
    leads: its first dimension, M, is replaced by the leading dimensions of x.
    """

    like: int | None
    make: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    leads: bool


class _View(NamedTuple):
    """A result that is a view of an allocation."""

    result: int
    slot: int
    shape: Sequence[int]
    strides: Sequence[int]
    offset: int


class _Split(NamedTuple):
    """Results that together are all the rows of one allocation."""

    slot: int
    rows: list[int]
    results: list[int]


class _Sized(NamedTuple):
    """The sizes of a program for one M.

    made: the tensors to allocate. scratch: bytes of the block for what lies between kernels. packed: numbers for
    `direct`. views: results that are views and in none of the splits.
    """

    made: list[_Allocation]
    scratch: int
    packed: bytes
    views: list[_View]
    splits: list[_Split]


class Program:
    """The launches of one class of calls of a pass.

    Attributes:
        name: of the pass.
        steps: the recorded steps, whose tensors are meta tensors.
    """

    def __init__(
        self,
        name: str,
        recording: Recording,
        results: list[Result | None],
        device: torch.device,
        outputs: int | None = None,
    ) -> None:
        self.name, self.steps, self.device = name, recording.steps, device
        self._recording = recording
        self._results = [None if result is None else result.slot for result in results]
        self._leading = {*self._results[:outputs]}
        self._views = {i: one.twin for i, one in enumerate(results) if one is not None and one.twin is not None}
        self._made = [made for made in recording.made if made.is_alone]
        self._workspace = recording.workspace_bytes
        self._index, self._sizes = device.index if device.type == "cuda" else -1, Sizes()
        self._kept: dict[int, _Sized] = {}
        self._segments = self._prepared()

    def _prepared(self) -> list[tuple[Any, int, int]]:
        """The steps for `direct`: (capsule, first, last) of launches, (step, 0, 0) of others; [] if it is unsuited."""
        if self.device.type != "cuda" or torch.version.hip or environment.interpreting():
            return []
        launches = [step for step in self.steps if isinstance(step, Launch)]
        try:
            with torch.cuda.device(self._index):  # the card that is compiled for and loaded on
                place_of = self._recording.place_of
                described = tuple(describe(step, step.compiled(), self._sizes, place_of) for step in launches)
        except Unsuited:
            return []
        capsule = module().prepare(described, self._recording.slots)
        segments: list[tuple[Any, int, int]] = []
        first = 0
        for are_launches, group in itertools.groupby(self.steps, lambda step: isinstance(step, Launch)):
            steps = list(group)
            if are_launches:
                segments.append((capsule, first, first + len(steps)))
                first += len(steps)
            else:
                segments += [(step, 0, 0) for step in steps]
        return segments

    def run(self, tensors: Sequence[Tensor | None], m: int, lead: tuple[int, ...] | None = None) -> Results:
        """Run the program on tensors of the class that it was planned for, and return the results.

        Args:
            tensors: as in `PassInputs`.
            m: M.
            lead: the dimensions that outputs with a row per token get in the place of M.
        """
        if self._index >= 0 and self._index != torch._C._cuda_getDevice():
            with torch.cuda.device(self._index):
                return self._run(tensors, m, lead)
        return self._run(tensors, m, lead)

    def _run(self, tensors: Sequence[Tensor | None], m: int, lead: tuple[int, ...] | None) -> Results:
        sized = self._kept.get(m) or self._resized(m)
        device = self.device
        made = []
        for like, make, shape, dtype, leads in sized.made:
            if like is not None:  # takes half the time of allocating by a shape
                made.append(torch.empty_like(tensors[like]))  # type: ignore[arg-type]
            elif leads and lead is not None:
                made.append(make(*lead, *shape[1:], dtype=dtype, device=device))
            else:  # sizes one by one: PyTorch parses a tuple more slowly
                made.append(make(*shape, dtype=dtype, device=device))
        scratch = torch.empty(sized.scratch, dtype=torch.uint8, device=device) if sized.scratch else None
        buffer = workspace(self._workspace, device) if self._workspace else None
        memory: tuple[Any, ...] = (*tensors, *made, scratch, buffer)
        if self._segments and not _has_hooks():
            stream = torch._C._cuda_getCurrentRawStream(self._index)
            for segment, first, last in self._segments:
                if last:
                    module().run(segment, first, last, sized.packed, memory, stream, self._index)
                else:
                    segment.bound(Bound(self._recording, memory, m)).run()
        else:
            for step in self.steps:
                step.bound(Bound(self._recording, memory, m)).run()
        found = [None if slot is None else memory[slot] for slot in self._results]
        for slot, rows, which in sized.splits:
            for i, piece in zip(which, torch.split_with_sizes(memory[slot], rows), strict=True):
                found[i] = piece
        for i, slot, *where in sized.views:
            found[i] = memory[slot].as_strided(*where)
        return found

    def _resized(self, m: int) -> _Sized:
        made: list[_Allocation] = []
        for one in self._made:
            shape, leads = tuple(at(size, m) for size in one.shape), one.has_rows and one.place.slot in self._leading
            like = self._recording.like(one) if leads or not one.has_rows else None
            make = torch.zeros if one.is_zero else torch.empty
            made.append(_Allocation(like, make, shape, one.dtype, leads))
        views = [_View(i, *self._recording.where(twin, m)) for i, twin in self._views.items()]
        views.sort(key=lambda view: view.offset)
        made, splits = _stacked(views, made, self._recording.count)
        views = [view for view in views if all(view.slot != split.slot for split in splits)]
        sized = _Sized(made, at(self._recording.scratch or 0, m), self._sizes.pack(m), views, splits)
        if len(self._kept) >= _KEPT:
            self._kept.clear()
        self._kept[m] = sized
        return sized


def _stacked(views: Sequence[_View], made: Sequence[_Allocation], first: int) -> tuple[list[_Allocation], list[_Split]]:
    """(allocations, splits): an allocation whose views are matrices one below the other becomes one, and is split.

    One torch.split_with_sizes makes all its views, in half the time of one as_strided per view.

    Args:
        views: sorted by offset.
        made: the allocations; the first has the slot `first`.
    """
    allocations, found = [*made], []
    for slot in sorted({view.slot for view in views}):
        mine = [view for view in views if view.slot == slot]
        one = made[slot - first]
        rest, rows = mine[0].shape[1:], [view.shape[0] for view in mine]
        size = math.prod(rest)
        starts = [0, *itertools.accumulate(size * count for count in rows)]
        whole = all(
            (*view.shape[1:], *view.strides, view.offset) == (*rest, *_contiguous(view.shape), start)
            for view, start in zip(mine, starts, strict=False)
        )
        if whole and starts[-1] == math.prod(one.shape) and one.like is None and not one.leads:
            allocations[slot - first] = one._replace(shape=(sum(rows), *rest))
            found.append(_Split(slot, rows, [view.result for view in mine]))
    return allocations, found


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _has_hooks() -> bool:
    """Whether Triton launch hooks are set, as by its profiler."""
    runtime = _triton_runtime()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def _triton_runtime() -> Any:
    from triton import knobs

    return knobs.runtime
