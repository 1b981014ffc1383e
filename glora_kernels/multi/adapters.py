"""The adapters of a call as data: the distinct tensors, which of them each adapter has, and the rows of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.glora.call import C, Call, Supports

ABSENT = -1
"""The index of an operand that an adapter does not have, and of the adapter of a row that has none."""


class Shared(NamedTuple):
    """What all rows have in common. x: one, (..., K). rows: one, the adapter of each row, int64 (M,), -1 for none.

    weight: one, W or its codes. bias: one or none. absmax and the nested ones: of the codes, one each or none.
    """

    x: list[Tensor]
    rows: list[Tensor]
    weight: list[Tensor]
    bias: list[Tensor]
    absmax: list[Tensor]
    nested_absmax: list[Tensor]
    nested_code: list[Tensor]
    nested_offset: list[Tensor]


class Operands(NamedTuple):
    """The distinct tensors of all adapters: by the keyword arguments of `ops.glora_linear` that are tensors."""

    a: list[Tensor]
    a_up: list[Tensor]
    a_down: list[Tensor]
    b: list[Tensor]
    b_up: list[Tensor]
    b_down: list[Tensor]
    wc: list[Tensor]
    c: list[Tensor]
    c_up: list[Tensor]
    c_down: list[Tensor]
    d: list[Tensor]
    e: list[Tensor]
    seed: list[Tensor]


class Numbers(NamedTuple):
    """The numbers of a call.

    places: for each adapter and then each field of `Operands` the index of its tensor there, or ABSENT. scales,
    dropout_ps, matmuls: s, p, and whether A=lora is the product variant, of each adapter. route: "eager" or "triton".
    form: of a 4-bit weight (`dispatch.common.Codes`).
    """

    places: Sequence[int]
    scales: Sequence[float]
    dropout_ps: Sequence[float]
    matmuls: Sequence[bool]
    route: str
    form: Sequence[int]

    @property
    def size(self) -> int:
        return len(self.scales)

    def places_of(self, j: int) -> dict[str, int]:
        """The index of each tensor that adapter j has."""
        width = len(Operands._fields)
        own = zip(Operands._fields, self.places[j * width : (j + 1) * width], strict=True)
        return {name: place for name, place in own if place != ABSENT}


class Adapter(NamedTuple):
    """One adapter over the base of a call."""

    s: Supports
    c: C
    call: Call


def adapters_of(shared: Shared, operands: Operands, numbers: Numbers) -> list[Adapter]:
    """All adapters of a call, and behind them the base alone: that of rows whose number is -1."""
    bias = shared.bias[0] if shared.bias else None
    found = []
    for j in range(numbers.size):
        own = {name: getattr(operands, name)[place] for name, place in numbers.places_of(j).items()}
        c, seed = C(*(own.pop(name, None) for name in C._fields)), own.pop("seed", None)
        call = Call(numbers.scales[j], numbers.dropout_ps[j], seed, bool(numbers.matmuls[j]), numbers.route)
        found.append(Adapter(Supports(bias=bias, **own), c, call))
    return [*found, Adapter(Supports(bias=bias), C(), Call(1.0, 0.0, None, False, numbers.route))]


class Span(NamedTuple):
    """The rows of adapter j, -1 for the base alone, among rows sorted by adapter."""

    j: int
    rows: slice

    @property
    def size(self) -> int:
        return int(self.rows.stop - self.rows.start)


class Order(NamedTuple):
    """Rows sorted by adapter, those of one adapter in the order that they have among all.

    spans: of the adapters that have rows. places: for each sorted row its place among all; None where they are sorted.
    """

    spans: list[Span]
    places: Tensor | None

    def sort(self, matrix: Tensor) -> Tensor:
        return matrix if self.places is None else matrix.index_select(0, self.places)

    def unsort(self, matrix: Tensor) -> Tensor:
        if self.places is None:
            return matrix
        return torch.empty_like(matrix).index_copy_(0, self.places, matrix)


def check_rows(rows: Tensor, count: int) -> None:
    """Raise a ValueError for a row whose number is none of `count` adapters."""
    wrong = (rows < ABSENT) | (rows >= count)
    if bool(wrong.any()):
        raise ValueError(
            f"rows must be numbers of adapters, 0 to {count - 1}, or -1 for the base alone; got {int(rows[wrong][0])}"
        )


def order_of(rows: Tensor, count: int, place: Callable[[int, int], Any]) -> Order:
    """The order of the rows of a call with `count` adapters, on the host.

    place: of an adapter and its number of rows: by what adapters with rows are sorted before their numbers.

    Raises:
        ValueError: there is no adapter of some row's number.
    """
    check_rows(rows, count)
    sizes = torch.bincount(rows + 1, minlength=count + 1).tolist()
    sequence = sorted((j for j in range(ABSENT, count) if sizes[j + 1]), key=lambda j: place(j, sizes[j + 1]))
    spans, start = [], 0
    for j in sequence:
        spans.append(Span(j, slice(start, start + sizes[j + 1])))
        start += sizes[j + 1]
    ranks = torch.empty(count + 1, dtype=torch.int64)
    ranks[torch.tensor(sequence, dtype=torch.int64) + 1] = torch.arange(len(sequence))
    keys = ranks.to(rows.device)[rows + 1]
    return Order(spans, None if bool((keys[1:] >= keys[:-1]).all()) else keys.argsort(stable=True))
