"""The processes of a search: where torch.distributed is initialised all of its ranks, else this process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: T) -> list[T]:
    """The values of all ranks, in their order; every rank has to call it."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def from_first(act: Callable[[], T]) -> T:
    """What `act` gives on rank 0, which alone calls it; what it raises there is raised on every rank."""
    result: T | None = None
    failure: Exception | None = None
    if rank_and_world()[0] == 0:
        try:
            result = act()
        except Exception as error:
            failure = error
    result, failure = gathered((result, failure))[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
