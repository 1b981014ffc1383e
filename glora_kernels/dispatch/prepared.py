"""Classes of calls: what a class needs is found at its first call, and later calls look it up.

The result of the checks and the launches depend only on the classes, dtypes, shapes, strides and devices of the tensors
and on a few values; these are the cache key. Stored under it are what backward reads and returns, and the programs of
both passes (`runtime.program`). One `autograd.Function` serves every operator; its arguments are only the tensors that
are trained, since each argument costs a microsecond per layer.

The tensors of a call stand in a row; in the row of backward, the results of forward follow them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.dispatch.common import given, settled, without_autocast
from glora_kernels.dispatch.signature import Row, Values
from glora_kernels.dispatch.ways import is_batched, is_watched, once_differentiable
from glora_kernels.runtime import environment, program
from glora_kernels.runtime.direct import forms
from glora_kernels.runtime.program import Program

NO_GUARD: AbstractContextManager[object] = contextlib.nullcontext()
_PLAIN = {Tensor, nn.Parameter, type(None)}
_FLAGS = b"\1" * 1024
_KEPT = 1024
"""How many classes of calls are remembered."""
_KEPT_BACKWARDS = 16
"""How many backward programs a class keeps. Their key has the strides of dy, which in a transposed dy follow M."""


class Operation:
    """The mathematics of an operator, on the row of a call and its values (`dispatch.signature`)."""

    name: str

    def forward(self, row: Row, values: Values) -> Sequence[Tensor | None]:
        """The outputs, then the results that backward may read."""
        raise NotImplementedError

    def backward(
        self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients of the wanted entries, in their order, shapes and dtypes. `row` ends with forward's results."""
        raise NotImplementedError

    def elsewhere(
        self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """`backward` where the gradients are watched or batched (`dispatch.ways`)."""
        raise NotImplementedError


class AskedPass(NamedTuple):
    """One pass of a call: the arguments of `runtime.program.find`."""

    name: str
    function: program.Pass
    operands: program.PassInputs
    values: tuple[Hashable, ...]
    outputs: int | None = None


class Prepared:
    """A class of calls, and what all of them share.

    Attributes:
        operation, values: the operator, and the values of the calls.
        wanted: for each entry of the row, whether it needs a gradient; `trained`: the indices where it does.
        saved: indices into the row of backward (the operands, then forward's results): what is kept for backward.
        size: the length of that row.
        with_rows: its indices with one row per token; empty for an operator without inputs.
        outputs: how many outputs there are.
        has_kernels: whether it runs as recorded launches, not as plain PyTorch.
        keeps: whether anybody reads results other than the outputs.
        is_invariant: whether the calls were made inside `batch_invariant`.
        guard: a lock, held from building a weight in the shared workspace until its reader is launched.
    """

    def __init__(
        self, operation: Operation, values: Values, wanted: Sequence[bool], saved: Sequence[int],
        *, size: int, with_rows: Sequence[int] = (), outputs: int = 1, has_kernels: bool, keeps: bool = False,
        guard: AbstractContextManager[object] | None = None,
    ) -> None:  # fmt: skip
        self.operation, self.values, self.wanted, self.saved = operation, values, tuple(wanted), tuple(saved)
        self.size, self.with_rows, self.outputs, self.has_kernels = size, frozenset(with_rows), outputs, has_kernels
        self.trained = tuple(i for i, want in enumerate(wanted) if want)
        self.guard = guard
        self.is_invariant = values.is_invariant
        self.keeps = keeps or bool(self.trained)
        self._flags = bytes([bool(with_rows)] * outputs + [place in self.with_rows for place in saved])
        self._whole = [i for i, place in enumerate(saved) if place in self.with_rows or place >= len(wanted)]
        self.reads_output = any(len(wanted) <= place < len(wanted) + outputs for place in saved)
        self._forward: Program | None = None
        self._backwards: dict[Hashable, Program | None] = {}
        self.apply: Callable[..., Sequence[Tensor]] = Applied.apply

    def plan(self, operands: program.PassInputs) -> None:
        """Record or look up the program of forward."""
        self._forward = program.find(*self.forward_pass(operands))

    def forward_pass(self, operands: program.PassInputs) -> AskedPass:
        """The forward pass of a call."""
        operation, count = self.operation, None if self.keeps else self.outputs

        def run(row: Row, values: Values, count: int | None) -> Sequence[Tensor | None]:
            return operation.forward(row, values)[:count]

        return AskedPass(operation.name, run, operands, (self.values, count), self.outputs)

    def forward(self, row: Row) -> Sequence[Tensor | None]:
        """The outputs, with the leading dimensions of x, then the results that backward may read."""
        x = given(row[0])
        if self._forward is None:
            with without_autocast(x.device.type), self.guard or NO_GUARD:
                return self.operation.forward(row, self.values)
        m, lead = program.rows_of(x), x.shape[:-1] if x.ndim > 2 else None
        if self.guard is None:
            return self._forward.run(row, m, lead)
        with self.guard:
            return self._forward.run(row, m, lead)

    def backward(self, dys: Sequence[Tensor], saved: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients of the trained tensors, from the tensors at the indices `saved`."""
        first = dys[0]
        m = program.rows_of(first) if self.with_rows else 1
        # A saved tensor may come back with other strides: from hooks (offloading), or after `.data` was set.
        for i in self._whole:
            tensor = saved[i]
            if not tensor.is_contiguous() and (tensor.ndim > 2 or self.saved[i] >= len(self.wanted)):
                saved = [*saved[:i], tensor.contiguous(), *saved[i + 1 :]]
        if self.is_invariant:
            dys = [*map(settled, dys)]
            saved = [settled(t) if place in self.with_rows else t for t, place in zip(saved, self.saved, strict=True)]
            first = dys[0]
        if self.has_kernels and (first.ndim > 1 or not self.with_rows) and program.serves(m):
            dys = [dy if dy.ndim <= 2 or dy.is_contiguous() else dy.contiguous() for dy in dys]
            key = (
                first.dtype == torch.float32 and environment.allow_tf32(),
                forms((*dys, *saved), self._flags, first.is_cuda),
            )
            try:
                found = self._backwards[key]
            except KeyError:
                if len(self._backwards) >= _KEPT_BACKWARDS:
                    self._backwards.clear()
                found = self._backwards[key] = program.find(*self.backward_pass(dys, saved))
            if found is not None:
                with self.guard or NO_GUARD:
                    lead = first.shape[:-1] if first.ndim > 2 else None
                    return found.run((*dys, *saved), m, lead)
        with without_autocast(dys[0].device.type), self.guard or NO_GUARD:
            return self.operation.backward(dys, self.placed(saved), self.values, self.wanted)

    def backward_pass(self, dys: Sequence[Tensor], saved: Sequence[Tensor]) -> AskedPass:
        """The backward pass of a call, from the tensors at the indices `saved`."""
        count = len(dys)
        rows = {*range(count)} if self.with_rows else set()
        rows |= {count + i for i, place in enumerate(self.saved) if place in self.with_rows}

        def run(tensors: Row, *_: Any) -> Sequence[Tensor | None]:
            mine = [given(dy) for dy in tensors[:count]]
            return self.operation.backward(mine, self.placed(tensors[count:]), self.values, self.wanted)

        m = program.rows_of(dys[0]) if self.with_rows else 1
        operands = program.PassInputs((*dys, *saved), frozenset(rows), m, dys[0].get_device())
        values = (self.values, self.wanted, self.saved)
        return AskedPass(f"{self.operation.name} backward", run, operands, values)

    def placed(self, saved: Row) -> Row:
        """The row of backward, with None for everything that was not saved."""
        row: list[Tensor | None] = [None] * self.size
        for place, tensor in zip(self.saved, saved, strict=True):
            row[place] = tensor
        return row


_prepared: dict[Hashable, Prepared] = {}


def wanted_of(row: Row) -> tuple[bool, ...]:
    """For each tensor of a call, whether it needs a gradient."""
    if not torch.is_grad_enabled():
        return (False,) * len(row)
    return tuple([t is not None and t.requires_grad for t in row])


def are_even(tensors: Row) -> bool:
    """Whether all have the same number of tokens, as a program of launches requires."""
    return len(tensors) < 2 or len({given(t).shape[:-1] for t in tensors}) == 1


def find(
    operation: Operation, row: Row, with_rows: int, key: tuple[Hashable, ...], make: Callable[[], Prepared]
) -> Prepared:
    """The class of a call. For the first call of a class, `make` checks it and describes the class.

    Args:
        operation: the operator.
        row: its tensors; the first is not None.
        with_rows: how many leading entries have one row per token; each is a matrix or contiguous.
        key: what else the call depends on: values, modes, what requires a gradient.
        make: raises where the call is none.
    """
    first: Any = row[0]
    m = program.rows_of(first) if with_rows and first.ndim else 1
    if (with_rows and first.ndim < 2) or not program.serves(m):
        return make()
    device, even = first.get_device(), with_rows < 2 or are_even(row[:with_rows])
    try:
        whole = (
            operation.name,
            key,
            even,
            program.class_of(m, device),
            first.dtype == torch.float32 and environment.allow_tf32(),
            forms(row, _FLAGS[:with_rows], first.is_cuda),
        )
    except (IndexError, RuntimeError):  # a tensor without strides or an address: `make` says what it takes
        return make()
    found = _prepared.get(whole)
    if found is None:
        found = make()
        found.has_kernels &= even
        # Tensors of other classes than PyTorch's own (sharded, wrapped ones) are not taken for one another.
        if not _PLAIN.issuperset([t.__class__ for t in row]):
            return found
        if found.has_kernels:
            found.plan(program.PassInputs(tuple(row), frozenset(range(with_rows)), m, device))
        if len(_prepared) >= _KEPT:
            _prepared.clear()
        found.apply = _apply
        _prepared[whole] = found
    return found


def read_saved(ctx: Any, with_y: bool = False) -> tuple[Any, ...]:
    """The tensors that forward saved, or an error that says what to write instead of overwriting one of them.

    with_y: backward reads an output too, which the error then mentions.
    """
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        output = "; or its output, which backward reads as well (an activation or dropout with inplace=True)"
        raise RuntimeError(
            "a tensor was overwritten in place between the forward of a layer and its backward, which needs it as it "
            "was: the layer's input (h += layer(h); write h = h + layer(h)), one of its parameters (a step of the "
            f"optimizer before backward){output if with_y else ''}; use the out-of-place form. PyTorch says: {error}"
        ) from error


def call(prepared: Prepared, row: Row) -> Sequence[Tensor]:
    """The outputs of a call, with a backward where something is trained."""
    if not prepared.trained:
        outputs: Any = prepared.forward(row)[: prepared.outputs]
        return outputs
    return prepared.apply(prepared, row, *[row[i] for i in prepared.trained])


class Backwards:
    """Counts the backwards it is told of (`note_backwards`)."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, *_: object) -> None:
        self.count += 1


def note_backwards(ys: Iterable[Tensor], backwards: Backwards) -> None:
    """Make the nodes of autograd that made these outputs count, in `backwards`, each backward that reaches them."""
    for node in {y.grad_fn for y in ys}:
        if isinstance(node, Applied._backward_cls):
            vars(node)["backwards"] = backwards  # a hook would cost two microseconds
        elif node is not None:
            node.register_prehook(backwards.note)


class Applied(torch.autograd.Function):
    """The autograd function of all operators in plain eager mode."""

    @staticmethod
    def forward(ctx: Any, prepared: Prepared, row: Row, *trained: Tensor) -> Any:
        results = prepared.forward(row)
        save(ctx, prepared, row, results)
        return tuple(results[: prepared.outputs])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        prepared: Prepared = ctx.prepared
        if ctx.backwards is not None:
            ctx.backwards.note()
        watched = torch.is_grad_enabled()  # true under create_graph=True
        for dy in dys:
            watched |= is_batched(dy) or is_watched(dy)
        if watched:
            return _elsewhere(ctx, *dys)
        return None, None, *prepared.backward(dys, read_saved(ctx, prepared.reads_output))


# `Applied.apply` without its work for torch.func (2 µs): transformed calls never come here (`dispatch.ways`).
# A tensor that outlived its transform could, but has no data pointer: its class is not kept and has the usual `apply`.
_apply = super(torch.autograd.Function, Applied).apply


@once_differentiable
def _elsewhere(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
    prepared: Prepared = ctx.prepared
    saved = read_saved(ctx, prepared.reads_output)
    for dy in dys:
        if is_batched(dy) or is_watched(dy):
            found = prepared.operation.elsewhere(dys, prepared.placed(saved), prepared.values, prepared.wanted)
            return None, None, *found
    return None, None, *prepared.backward(dys, saved)


def save(ctx: Any, prepared: Prepared, row: Row, results: Row) -> None:
    """Save for backward the tensors it reads."""
    everything = (*row, *results)
    ctx.save_for_backward(*[everything[i] for i in prepared.saved])
    ctx.prepared, ctx.backwards = prepared, None
