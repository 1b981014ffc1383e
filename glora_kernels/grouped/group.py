"""The data of a grouped call: its distinct tensors, and which of them each member uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch import common

ABSENT = -1
"""The index of an operand that a member does not have."""


class Operands(NamedTuple):
    """The distinct tensors of one call. xs are (M,K), weights (N,K), downs (R,K), ups (N,R), biases (N,).

    seeds: one int64 each, on the CPU or the device of x.
    """

    xs: list[Tensor]
    weights: list[Tensor]
    downs: list[Tensor]
    ups: list[Tensor]
    biases: list[Tensor]
    seeds: list[Tensor]

    def flat(self) -> list[Tensor]:
        return [tensor for tensors in self for tensor in tensors]


class LowRankInput(NamedTuple):
    """A path: one h = s·x̃·downᵀ, however many members use it. x, down, seed: indices in `Operands`; scale: s."""

    x: int
    down: int
    seed: int
    scale: float


class Group(NamedTuple):
    """The indices of the distinct tensors that each member uses, and the numbers of the call.

    scales: s of each member. route: "eager" or "triton".
    """

    x: Sequence[int]
    weight: Sequence[int]
    down: Sequence[int]
    up: Sequence[int]
    bias: Sequence[int]
    seed: Sequence[int]
    scales: Sequence[float]
    dropout_p: float
    route: str

    @property
    def size(self) -> int:
        return len(self.weight)

    def low_rank_inputs(self) -> list[LowRankInput]:
        """The low-rank input of each member; its `down` is ABSENT where the member has no low-rank pair."""
        return [LowRankInput(*each) for each in zip(self.x, self.down, self.seed, self.scales, strict=True)]

    def paths(self) -> list[LowRankInput]:
        """The distinct low-rank inputs of the group."""
        return list(dict.fromkeys(path for path in self.low_rank_inputs() if path.down != ABSENT))

    def path_of(self) -> list[int]:
        """The index in `paths` of each member, or ABSENT."""
        index = {path: i for i, path in enumerate(self.paths())}
        return [index.get(path, ABSENT) for path in self.low_rank_inputs()]


def factor_dtype(operands: Operands) -> torch.dtype:
    """The dtype of every h and S of a group: fp32 where x has 16 bits and any member's factor is wider."""
    return common.factor_dtype(operands.xs[0].dtype, [*operands.ups, *operands.downs])


class Trained(NamedTuple):
    """An entry for each distinct trainable tensor: whether its gradient is wanted, or the gradient (None: unwanted)."""

    xs: list[Any]
    downs: list[Any]
    ups: list[Any]
    biases: list[Any]

    def without(self) -> Trained:
        """The same lists filled with None, to which gradients are then added."""
        return Trained(*([None] * len(each) for each in self))


def add(totals: list[Any], index: int, term: Tensor) -> None:
    """Add one member's term to the gradient at `index`."""
    known = totals[index]
    totals[index] = term if known is None else known + term
