"""Values that the call of one layer leaves for the calls of others with the same input (`nn.siblings`).

Each value is taken once, by a call with the same tensor object in the same mode, if nothing it depends on has changed
since. While torch.compile traces, a separate store is used, because tracing cannot see writes in place.
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
"""Waiting values (outputs or dropout seeds), by the place of the member that will take them."""
Members = Sequence[Any] | None


class Pending:
    """Values that the call of one member with x left for others, each to be taken once by a call with the same x.

    For outputs `members` and `backwards` are given: they depend on parameters, and on a graph that a backward frees.
    """

    def __init__(
        self, x: Tensor, computed_by: int, values: Values, members: Members, backwards: Backwards | None
    ) -> None:
        self.x, self.computed_by, self.values = weakref.ref(x), computed_by, values
        self.mode, self.version = _mode(x), _version([x])
        self.states = None if members is None else {place: _state(members[place]) for place in values}
        self.backwards, self.ran = backwards, 0 if backwards is None else backwards.count

    def is_for(self, x: Tensor) -> bool:
        return self.x() is x

    def is_current(self, x: Tensor, place: int, member: Any) -> bool:
        """Whether nothing that the member's value depends on has changed."""
        if self.mode != _mode(x) or self.version != _version([x]):
            return False
        if self.backwards is not None and self.backwards.count != self.ran:
            return False
        return self.states is None or self.states[place] == _state(member)

    def is_for_another(self, x: Tensor) -> bool:
        """Whether the values are for a tensor other than x that still exists, in the same mode."""
        first = self.x()
        return first is not None and first is not x and self.mode == _mode(x)


class TracedPending:
    """`Pending` while torch.compile traces, which cannot see writes in place."""

    def __init__(self, x: Tensor, computed_by: int, values: Values, are_outputs: bool) -> None:
        self.x, self.computed_by, self.values, self.are_outputs = x, computed_by, values, are_outputs
        self.mode, self.trace = _traced_mode(x), _trace()

    def is_for(self, x: Tensor) -> bool:
        return self.x is x

    def is_current(self, x: Tensor, place: int, member: Any) -> bool:
        return self.mode == _traced_mode(x) and (not self.are_outputs or self.trace == _trace())

    def is_for_another(self, x: Tensor) -> bool:
        return self.x is not x and self.mode == _traced_mode(x) and self.trace == _trace()


class Eager(threading.local):
    """Waiting values outside of torch.compile; one store per thread, since replicas and requests run in threads."""

    pending: Pending | None = None

    def leave(
        self, x: Tensor, computed_by: int, values: Values, members: Members = None, backwards: Backwards | None = None
    ) -> None:
        self.pending = Pending(x, computed_by, values, members, backwards)


class Traced:
    """Waiting values while torch.compile traces one graph; no output is passed on to another graph.

    The rules of `SiblingGroup` hold within a graph, with these differences. If x or a parameter is overwritten in place
    between two members' calls, the second still gets the old output. After a graph break, or in a later call, a member
    computes its output again. So layers that do not read one input are an error only with fullgraph=True; otherwise the
    graph breaks between them.

    A graph breaks at a `torch.utils.checkpoint.checkpoint` around members; with fullgraph=True set
    `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`.
    """

    def __init__(self) -> None:
        self.pending: TracedPending | None = None

    def leave(
        self, x: Tensor, computed_by: int, values: Values, members: Members = None, backwards: Backwards | None = None
    ) -> None:
        self.pending = TracedPending(x, computed_by, values, are_outputs=members is not None)


def _mode(x: Tensor) -> tuple[object, ...]:
    """The modes that must be equal in two calls if one computation is to serve both."""
    hooks = _saved_tensors_hooks()
    inside = None if hooks is None else id(hooks[0])
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(x), inside


def _traced_mode(x: Tensor) -> tuple[object, ...]:
    """`_mode` while torch.compile traces, which cannot see inference mode and hooks."""
    return torch.is_grad_enabled(), autocast_dtype(x)


_TRACES: weakref.WeakKeyDictionary[CompileContext, str] = weakref.WeakKeyDictionary()
_NUMBERS = itertools.count()


def _trace() -> str:
    """A unique name of the graph that torch.compile is tracing; in the graph it is a constant."""
    context = CompileContext.try_get()
    return "" if context is None else _TRACES.setdefault(context, str(next(_NUMBERS)))


# The effect of torch.compiler.assume_constant_result, which would import all of torch.compile.
_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def may_recompute(layer: Any) -> bool:
    """Whether this computation may be repeated in backward (activation checkpointing), or is such a repetition."""
    if torch.compiler.is_compiling() or (layer.training and not torch.is_grad_enabled()):
        return True
    return _saved_tensors_hooks() is not None or torch._C._current_graph_task_id() != -1


def _saved_tensors_hooks() -> tuple[object, object] | None:
    """The innermost hooks on saved tensors; activation checkpointing makes a pair for each region."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _version(tensors: Iterable[Tensor | None]) -> int:
    """The number of in-place writes to the tensors, in all; -1 where an inference tensor does not count them."""
    try:
        return sum([tensor._version for tensor in tensors if tensor is not None])
    except RuntimeError:
        return -1


def _state(layer: Any) -> tuple[object, ...]:
    """The state of a layer on which its output depends."""
    return layer.training, layer._disabled, _version(layer._parameters.values())
