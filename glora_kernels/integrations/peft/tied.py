"""Bases of PEFT's layers that lie in one memory (tied weights): which they are, and what may be written to them.

A weight or a bias that belongs to several layers holds the sum of what the adapters of all of them change, as with
PEFT's own methods; each of them sees it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from glora_kernels.nn.merging.values import Kept, ToMerge, same_bias, writable
from glora_kernels.nn.ties import overlaps, same_place


def is_tied(base: Any, other: Any) -> bool:
    """Whether the weight or the bias of two bases is one memory.

    Raises:
        ValueError: a part of it only, or in another order: what both would write is undefined.
    """
    if base is other:
        return True
    pairs = [pair for pair in itertools.product(_tensors(base), _tensors(other)) if overlaps(*pair)]
    if not all(same_place(*pair) for pair in pairs):
        raise ValueError(
            "merge: the weight or bias of this layer overlaps with that of another layer, which is merged, without "
            "being the same tensor; unmerge that first"
        )
    return bool(pairs)


def check_writable(base: Any) -> None:
    """from_linear4bit copies an absmax or offset in another dtype than fp32, and writing to a copy changes nothing.

    Raises:
        ValueError: a `Linear4bit` whose state is not in the memory that it is read from.
    """
    layer = writable(base)
    if layer is base:
        return
    state, mine = base.weight.quant_state, layer.quant_state
    assert mine is not None
    theirs = [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
    ours = [mine.absmax, *([mine.nested.absmax, mine.nested.offset] if mine.nested is not None else [])]
    if any(not isinstance(t, Tensor) or t.data_ptr() != o.data_ptr() for t, o in zip(theirs, ours, strict=True)):
        raise ValueError("merge: the absmax or offset of this Linear4bit is not in fp32, and cannot be written to")


def without_adapters(base: Any, now: Kept, others: Sequence[ToMerge]) -> Kept:
    """The values of a base that is not merged itself, where other layers may have merged into its memory."""
    weight, bias, state = now
    for other in others:
        if same_place(base.weight, other.base.weight):
            weight, state = other.original.weight, other.original.quant_state
        if same_bias(base, other.base):
            bias = other.original.bias
    return Kept(weight, bias, state)


def _tensors(base: Any) -> list[Tensor]:
    return [tensor for tensor in (base.weight, base.bias) if tensor is not None]
