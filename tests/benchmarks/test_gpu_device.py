"""The card's methods against a stand-in for torch.cuda: what is called, in which order, and the arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.devices import Call
from benchmarks.gpu import Cuda
from glora_kernels.glora import op as glora


class FakeStream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append("wait")


class FakeEvent:
    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []

    @contextlib.contextmanager
    def section(name: str) -> Iterator[None]:
        log.append(f"{name} begin")
        yield
        log.append(f"{name} end")

    class FakeGraph:
        def replay(self) -> None:
            log.append("replay")

    properties = SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=132, total_memory=1, major=9, minor=0)
    here = FakeStream(log)
    fakes: dict[str, Any] = {
        "init": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "Stream": lambda: FakeStream(log),
        "current_stream": lambda: here,
        "stream": lambda stream: section("stream"),
        "synchronize": lambda: None,
        "CUDAGraph": FakeGraph,
        "graph": lambda graph, stream: section("capture"),
        "Event": FakeEvent,
    }
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def test_a_graph_is_warmed_up_beside_and_captured_once(log: list[str]) -> None:
    """The last warm-up draws dropout keys where the capture will: nothing is compiled during it."""
    device = Cuda()

    def step(name: str) -> Call:
        return lambda: log.append(f"{'card' if glora._Seeds.on_device else 'host'} {name}")

    replay = device.prepare([step("a"), step("b")], "graph")
    assert log == [
        "wait",
        "stream begin",
        *["host a", "host b"] * 3,
        *["card a", "card b"],
        "stream end",
        "wait",
        "capture begin",
        "host a",
        "host b",
        "capture end",
    ]
    log.clear()
    replay()
    assert log == ["replay"]


def test_eager_runs_are_the_steps(log: list[str]) -> None:
    Cuda().prepare([lambda: log.append("a"), lambda: log.append("b")], "eager")()
    assert log == ["a", "b"]


def test_events_give_seconds_a_call(log: list[str]) -> None:
    def call() -> None:
        FakeEvent.clock += 0.25

    assert Cuda().elapsed(call, 4) == pytest.approx(0.25)


def test_rounds_are_interleaved_and_short_calls_repeated(log: list[str]) -> None:
    def take(name: str, seconds: float) -> Any:
        def call() -> None:
            log.append(name)
            FakeEvent.clock += seconds

        return call

    times = Cuda().interleaved({"long": take("long", 1.0), "short": take("short", 0.5e-3)}, 3)
    assert times["long"] == pytest.approx([1.0] * 3)
    assert times["short"] == pytest.approx([0.5e-3] * 3)
    assert log.count("long") == 2 + 4  # a call, a try, a round of warming up, three rounds
    assert log.count("short") == 2 + 4 * 4  # 2 ms of region hold four of them


def test_input_sets_exceed_twice_the_cache(log: list[str]) -> None:
    device = Cuda()
    assert device.sets(134 << 20) == 2
    assert device.sets(5 << 20) == 20
    assert device.sets(1) == device.most_sets
    assert device.details()["multiprocessors"] == 132
