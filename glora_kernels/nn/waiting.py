"""What the call of one layer leaves for the calls of others with the same input (`nn.siblings`).

Each is taken once, by a call with the same tensor object in the same mode, as long as nothing has changed that it
depends on. While torch.compile traces, which sees nothing that is written in place, there is a store apart.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import CompileContext

from glora_kernels.dispatch.common import autocast_dtype
from glora_kernels.dispatch.prepared import Backwards

Values = dict[int, Any]
"""What waits, by the place of the member that it waits for."""
Members = Sequence[Any] | None


class Pending:
    """What the call of one member with x left for others, each to be taken once by a call with the same x.

    Outputs, which have `members`, also depend on parameters and on a graph that one backward frees.
    """

    def __init__(self, x: Tensor, by: int, values: Values, members: Members, backwards: Backwards | None) -> None:
        self.x, self.by, self.values = weakref.ref(x), by, values
        self.mode, self.version = _mode(x), _version([x])
        self.states = None if members is None else {place: _state(members[place]) for place in values}
        self.backwards, self.ran = backwards, 0 if backwards is None else backwards.count

    def is_for(self, x: Tensor) -> bool:
        return self.x() is x

    def is_current(self, x: Tensor, place: int, member: Any) -> bool:
        """Whether nothing has changed since, of what the value depends on."""
        if self.mode != _mode(x) or self.version != _version([x]):
            return False
        if self.backwards is not None and self.backwards.count != self.ran:
            return False
        return self.states is None or self.states[place] == _state(member)

    def is_for_another(self, x: Tensor) -> bool:
        """Whether a tensor that still exists, and is not x, was given to the other call in the same mode."""
        first = self.x()
        return first is not None and first is not x and self.mode == _mode(x)


class TracedPending:
    """The same while torch.compile traces, which sees nothing that is written in place."""

    def __init__(self, x: Tensor, by: int, values: Values, are_outputs: bool) -> None:
        self.x, self.by, self.values, self.are_outputs = x, by, values, are_outputs
        self.mode, self.trace = _traced_mode(x), _trace()

    def is_for(self, x: Tensor) -> bool:
        return self.x is x

    def is_current(self, x: Tensor, place: int, member: Any) -> bool:
        return self.mode == _traced_mode(x) and (not self.are_outputs or self.trace == _trace())

    def is_for_another(self, x: Tensor) -> bool:
        return self.x is not x and self.mode == _traced_mode(x) and self.trace == _trace()


class Eager(threading.local):
    """What waits, for each thread its own: replicas, and requests that are served at once, have inputs of their own."""

    pending: Pending | None = None

    def leave(
        self, x: Tensor, by: int, values: Values, members: Members = None, backwards: Backwards | None = None
    ) -> None:
        self.pending = Pending(x, by, values, members, backwards)


class Traced:
    """What waits while torch.compile traces: nothing once the graph is complete."""

    def __init__(self) -> None:
        self.pending: TracedPending | None = None

    def leave(
        self, x: Tensor, by: int, values: Values, members: Members = None, backwards: Backwards | None = None
    ) -> None:
        self.pending = TracedPending(x, by, values, are_outputs=members is not None)


def _mode(x: Tensor) -> tuple[object, ...]:
    """What must be the same in two calls that one computation serves, beside the input."""
    hooks = _saved_tensors_hooks()
    inside = None if hooks is None else id(hooks[0])
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(x), inside


def _traced_mode(x: Tensor) -> tuple[object, ...]:
    """`_mode` where torch.compile traces, which knows neither inference mode nor hooks."""
    return torch.is_grad_enabled(), autocast_dtype(x)


_TRACES: weakref.WeakKeyDictionary[CompileContext, str] = weakref.WeakKeyDictionary()
_NUMBERS = itertools.count()


def _trace() -> str:
    """A name of the graph that torch.compile traces, which no other has; in the graph it is a constant."""
    context = CompileContext.try_get()
    return "" if context is None else _TRACES.setdefault(context, str(next(_NUMBERS)))


# What torch.compiler.assume_constant_result sets, which imports all of torch.compile to do so.
_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def may_recompute(layer: Any) -> bool:
    """Whether what is computed now may be computed again in the backward pass, or is so just now."""
    if torch.compiler.is_compiling() or (layer.training and not torch.is_grad_enabled()):
        return True
    return _saved_tensors_hooks() is not None or torch._C._current_graph_task_id() != -1


def _saved_tensors_hooks() -> tuple[object, object] | None:
    """The innermost hooks on saved tensors; activation checkpointing has a pair for each region."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _version(tensors: Iterable[Tensor | None]) -> int:
    """How often the tensors were overwritten in place, in all."""
    try:
        return sum([tensor._version for tensor in tensors if tensor is not None])
    except RuntimeError:  # a tensor of inference mode does not count it
        return -1


def _state(layer: Any) -> tuple[object, ...]:
    """What the output of a layer depends on, beside its input."""
    return layer.training, layer._disabled, _version(layer._parameters.values())
