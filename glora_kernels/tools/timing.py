"""Fair comparisons of times on one machine.

Every round times each contender once, so that a card that slows down slows all of them. A contender is a list of steps,
one for each of several input sets that together exceed the L2 cache, so that no step finds its input there.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from glora_kernels.runtime import environment

Step = Callable[[], object]
Timer = Callable[[Sequence[Sequence[Step]], int], list[list[float]]]
"""(contenders, rounds) → for each contender, the milliseconds per step in each round."""

_GRAPH_STEPS = 8
"""The fewest steps in a graph, so that starting its replay takes a negligible share."""


def ratio(times: Sequence[float], other: Sequence[float]) -> float:
    """The median over rounds of the ratio times / other."""
    return statistics.median(a / b for a, b in zip(times, other, strict=True))


def graph_timer(contenders: Sequence[Sequence[Step]], rounds: int) -> list[list[float]]:
    """Time on the current GPU by replaying CUDA graphs: the kernels alone, without the host's time between them.

    Steps must not allocate tensors that are read later, because a graph allocates from its own memory pool.
    """
    side = torch.cuda.Stream()
    graphs = []
    for steps in contenders:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiled and warm before anything is captured
            _in_turn(steps)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(_repeats(steps)):
                _in_turn(steps)
        graphs.append(graph)
    torch.cuda.synchronize()
    calls = [(graph.replay, _repeats(steps) * len(steps)) for graph, steps in zip(graphs, contenders, strict=True)]
    return _event_rounds(calls, rounds)


def event_timer(contenders: Sequence[Sequence[Step]], rounds: int) -> list[list[float]]:
    """Time on the current GPU, step by step; where the card waits for the host, the wait counts."""
    return _event_rounds([(functools.partial(_in_turn, steps), len(steps)) for steps in contenders], rounds)


def clock_timer(contenders: Sequence[Sequence[Step]], rounds: int) -> list[list[float]]:
    """Time on the CPU, by its clock."""
    times: list[list[float]] = [[] for _ in contenders]
    for i, counts in _turns(len(contenders), rounds, warm=1):
        begin = time.perf_counter()
        _in_turn(contenders[i])
        if counts:
            times[i].append(1e3 * (time.perf_counter() - begin) / len(contenders[i]))
    return times


def _in_turn(steps: Sequence[Step]) -> None:
    for step in steps:
        step()


def _event_rounds(calls: Sequence[tuple[Callable[[], Any], int]], rounds: int) -> list[list[float]]:
    """Milliseconds per step by CUDA events. The host does not wait between rounds, so that the card need not either."""
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for i, counts in _turns(len(calls), rounds, warm=2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        calls[i][0]()
        end.record()
        if counts:
            events[i].append((begin, end))
    torch.cuda.synchronize()
    return [
        [begin.elapsed_time(end) / steps for begin, end in pairs]
        for pairs, (_, steps) in zip(events, calls, strict=True)
    ]


def _turns(count: int, rounds: int, warm: int) -> Iterator[tuple[int, bool]]:
    """(contender, whether it counts): every round has all and begins with another; the first rounds only warm up."""
    for turn in range(-warm, rounds):
        for place in range(count):
            yield (turn + place) % count, turn >= 0


def _repeats(steps: Sequence[Step]) -> int:
    return -(-_GRAPH_STEPS // len(steps))


@dataclass(frozen=True)
class Machine:
    """The device that is measured on, and how its time is taken."""

    name: str
    arch: str
    device: str
    timer: Timer
    l2_bytes: int = 0
    memory_bytes: int = 1 << 34
    synchronize: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.monotonic


def this_gpu() -> Machine:
    """The current GPU.

    Raises:
        RuntimeError: PyTorch sees none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures on a GPU, and PyTorch sees none here")
    index = torch.cuda.current_device()
    return Machine(
        environment.device_name(index), environment.arch(index), "cuda", graph_timer, environment.l2_bytes(index),
        torch.cuda.mem_get_info(index)[0], torch.cuda.synchronize,
    )  # fmt: skip


def why(error: Exception, machine: Machine) -> str:
    """One line that says why a launch failed.

    Raises:
        RuntimeError: the device no longer responds.
    """
    try:
        machine.synchronize()
    except Exception as broken:
        raise RuntimeError(
            "the device answers no more after a failed launch; what was measured before is in the table. Run again, "
            "with --kernels to leave out the kernel that failed"
        ) from broken
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
