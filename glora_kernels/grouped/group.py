"""A group of LoRA layers as data: the distinct tensors of a call, and which of them each member uses."""

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


class Group(NamedTuple):
    """Which of the distinct tensors each member uses, by index, and the numbers of the call.

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

    def keys(self) -> list[tuple[int, int, int, float]]:
        """(x, down, seed, s) of each member: all that its h depends on."""
        return list(zip(self.x, self.down, self.seed, self.scales, strict=True))

    def paths(self) -> list[tuple[int, int, int, float]]:
        """The distinct keys with a low-rank pair: one h = s·x̃·downᵀ each, however many members use it."""
        return list(dict.fromkeys(key for key in self.keys() if key[1] != ABSENT))

    def path_of(self) -> list[int]:
        """The index in `paths` of each member, or ABSENT."""
        index = {path: i for i, path in enumerate(self.paths())}
        return [index.get(key, ABSENT) for key in self.keys()]


def factor_dtype(operands: Operands) -> torch.dtype:
    """The dtype of every h and S of a group: fp32 where x has 16 bits and a factor of any member is wider."""
    return common.factor_dtype(operands.xs[0].dtype, [*operands.ups, *operands.downs])


class Trained(NamedTuple):
    """Of each distinct tensor that may have a gradient, whether it is wanted; or the gradient, None where it is not."""

    xs: list[Any]
    downs: list[Any]
    ups: list[Any]
    biases: list[Any]

    def without(self) -> Trained:
        """None of each, for what is wanted to be added to."""
        return Trained(*([None] * len(each) for each in self))


def add(totals: list[Any], index: int, term: Tensor) -> None:
    """One more member's term of a gradient."""
    known = totals[index]
    totals[index] = term if known is None else known + term
