"""A group of LoRA layers as data: the distinct tensors of a call, and which of them each member uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch import common
from glora_kernels.dispatch.common import Supports

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
    dtype = operands.xs[0].dtype
    found = {common.factor_dtype(dtype, Supports(b_up=factor)) for factor in (*operands.ups, *operands.downs)}
    return max(found, key=lambda each: each.itemsize, default=dtype)


class GroupNeeds(NamedTuple):
    """Which gradients a backward must produce, one flag a distinct tensor."""

    xs: Sequence[bool]
    downs: Sequence[bool]
    ups: Sequence[bool]
    biases: Sequence[bool]


class GroupGradients(NamedTuple):
    """The gradients of `Operands`, None where not wanted."""

    xs: list[Tensor | None]
    downs: list[Tensor | None]
    ups: list[Tensor | None]
    biases: list[Tensor | None]

    @classmethod
    def empty(cls, needs: GroupNeeds) -> GroupGradients:
        return cls(
            [None] * len(needs.xs), [None] * len(needs.downs), [None] * len(needs.ups), [None] * len(needs.biases)
        )
