"""The one place that knows how time is taken: a CPU here, a card in `benchmarks.gpu`, behind the same few methods."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import Ceilings

Call = Callable[[], object]


def tensors_of(y: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a forward gave, as a list: one tensor, or one for each layer of a set."""
    return [y] if isinstance(y, Tensor) else list(y)


def bytes_of(y: Tensor | Sequence[Tensor]) -> int:
    """The bytes behind what a forward gave, each piece of memory once."""
    storages = [tensor.untyped_storage() for tensor in tensors_of(y)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Device:
    """A CPU, timed by the host's clock. `benchmarks.gpu.Cuda` overrides what differs on a card.

    A step is one forward (and backward) on one of several input sets; a run goes through all sets once, so that no
    step finds its input in the cache.
    """

    kind = "cpu"
    modes: tuple[str, ...] = ("eager",)
    region_s = 5e-3
    """The shortest stretch that is timed at once: shorter runs are repeated."""
    cache_bytes = 32 << 20
    most_sets = 2
    most_layers = 8
    """Copies of a layer that is timed with few tokens: see `layers`."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind)

    def name(self) -> str:
        """The processor's name."""
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            return platform.processor() or platform.machine()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())

    def driver(self) -> str | None:
        """The version of the device's driver, where there is one."""
        return None

    def ceilings(self) -> Ceilings:
        """The rates of a large fp32 product and of a large copy, measured now."""
        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        seconds = self.best(lambda: torch.mm(a, b), 10)
        source, target = torch.randn(1 << 25), torch.empty(1 << 25)
        copied = self.best(lambda: target.copy_(source), 10)
        return Ceilings(2 * 2048**3 / seconds / 1e12, 2 * source.nbytes / copied / 1e9)

    def sets(self, set_bytes: int) -> int:
        """How many input sets are rotated: more than twice the cache, two at least."""
        return max(2, min(self.most_sets, -(-2 * self.cache_bytes // max(1, set_bytes))))

    def layers(self, layer_bytes: int) -> int:
        """How many copies of a layer are read in turn, so that its weight comes from memory: as `sets`."""
        return max(2, min(self.most_layers, -(-2 * self.cache_bytes // max(1, layer_bytes))))

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def healthy(self) -> bool:
        """Whether the device still answers; after some errors a process cannot use a card any more."""
        return True

    def free(self) -> None:
        """Give cached memory back."""

    def prepare(self, steps: Sequence[Call], mode: str) -> Call:
        """One call that makes a run of the steps: in eager mode one after the other."""
        if mode not in self.modes:
            raise ValueError(f"mode {mode!r} is none of {', '.join(self.modes)} on {self.kind}")
        listed = tuple(steps)

        def run() -> None:
            for step in listed:
                step()

        return run

    def elapsed(self, call: Call, repeats: int) -> float:
        """Seconds of one call, over `repeats` calls in a row."""
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    def best(self, call: Call, times: int) -> float:
        """The median of single calls after a warm-up, in seconds."""
        for _ in range(3):
            call()
        return statistics.median([self.elapsed(call, 1) for _ in range(times)])

    def interleaved(self, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        """Seconds a call of each, one entry a round; every round times each once, in an order that rotates."""
        repeats = {}
        for name, call in calls.items():
            call()
            once = self.elapsed(call, 1)
            repeats[name] = max(1, min(100, round(self.region_s / max(once, 1e-7))))
        names = list(calls)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(-1, rounds):
            start = i % len(names) if names else 0
            for name in names[start:] + names[:start]:
                seconds = self.elapsed(calls[name], repeats[name])
                if i >= 0:  # the first round warms up
                    times[name].append(seconds)
        return times

    def peak_bytes(self, step: Call) -> int | None:
        """The most memory a step holds beyond what was held before it, where that can be known."""
        return None

    def held_bytes(self, forward: Callable[[], Tensor]) -> int | None:
        """What is held between forward and backward besides y, by the allocator's own count."""
        return None

    def launches(self, step: Call) -> int | None:
        """Kernels a step launches."""
        return None

    def host_us(self, step: Call, times: int = 10) -> float:
        """Microseconds the host spends on a step, not waiting for the device."""
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            step()
        spent = (time.perf_counter() - begin) / times
        self.synchronize()
        return 1e6 * spent

    def details(self) -> dict[str, Any]:
        """What else is worth knowing of the device."""
        return {"cores": os.cpu_count(), "threads": torch.get_num_threads()}


def get(kind: str) -> Device:
    """The device of "cpu", "cuda" or "auto" (a card where torch sees one).

    Raises:
        RuntimeError: "cuda" where there is none.
    """
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return Device()
    if not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch sees no CUDA device here; --device cpu measures the small cases")
    from benchmarks.gpu import Cuda

    return Cuda()


def chosen(kind: str) -> Device:
    """`get` for a command line: where there is no such device, the reason on stderr and exit code 2."""
    try:
        return get(kind)
    except RuntimeError as reason:
        print(reason, file=sys.stderr)
        raise SystemExit(2) from None
