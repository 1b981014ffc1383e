"""The one place that knows how time and memory are taken: a CPU, and a card behind the same few methods.

Two things are compared by what they take in the same round, one right after the other, and medians are taken over the
ratios of the rounds: a machine that slows down for a second slows both. A step is one forward (and backward) on one of
several input sets, which a round goes through in turn, so that no step finds its input in the cache. The clocks are
those of `tune`: the host's on a CPU; on a card events around the steps, in eager mode or as the replay of a CUDA graph.
Nothing here changes a setting of the card.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.floor import Ceilings
from glora_kernels.glora.op import seeds_on_device
from glora_kernels.tools import timing

Step = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """A sample's median with its 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])

    @classmethod
    def ratio(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """How many times longer the one takes, over the ratios of the single rounds."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def named(self, name: str) -> dict[str, float]:
        return {name: self.median, f"{name}_p20": self.p20, f"{name}_p80": self.p80}

    def row(self) -> dict[str, float]:
        """Of seconds, as the rows have them."""
        return {"median_ms": 1e3 * self.median, "p20_ms": 1e3 * self.p20, "p80_ms": 1e3 * self.p80}


def progress(items: Iterable[T], label: str) -> Iterable[T]:
    """A progress bar on a terminal where tqdm is installed; the items themselves elsewhere."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, leave=False)


class Device:
    """A CPU."""

    kind = "cpu"
    timers: Mapping[str, timing.Timer] = {"eager": timing.clock_timer}
    """By mode."""
    region_s = 5e-3
    """The shortest stretch of time that is read off the clock: shorter steps are repeated."""
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

    def details(self) -> dict[str, Any]:
        """What else is worth knowing of the device."""
        return {"cores": os.cpu_count(), "threads": torch.get_num_threads()}

    def ceilings(self) -> Ceilings:
        """The rates of a large fp32 product and of a large copy (bytes read and written), measured now."""
        return self._ceilings(2048, torch.float32, 1 << 27, 1, 10)

    def _ceilings(self, size: int, dtype: torch.dtype, copied: int, repeats: int, rounds: int) -> Ceilings:
        where = self.torch_device
        a, b, out = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(3))
        source = torch.randn(copied // 4, device=where)
        target = torch.empty_like(source)
        steps: dict[str, list[Step]] = {"product": [lambda: torch.mm(a, b, out=out)] * repeats}
        steps["copy"] = [lambda: target.copy_(source)]
        product, copying = (statistics.median(seconds) for seconds in self.times(steps, "eager", rounds).values())
        return Ceilings(2 * size**3 / product / 1e12, 2 * copied / copying / 1e9)

    def sets(self, set_bytes: int) -> int:
        """How many input sets are rotated: more than twice the cache, two at least."""
        return max(2, min(self.most_sets, -(-2 * self.cache_bytes // max(1, set_bytes))))

    def layers(self, layer_bytes: int) -> int:
        """How many copies of a layer are read in turn, so that its weight comes from memory: as `sets`."""
        return max(2, min(self.most_layers, -(-2 * self.cache_bytes // max(1, layer_bytes))))

    def ready(self, steps: Sequence[Step], mode: str) -> None:
        """Run a contender alone once as it will be timed: whatever goes wrong, goes wrong here."""
        for step in steps:
            step()

    def times(self, contenders: Mapping[str, Sequence[Step]], mode: str, rounds: int) -> dict[str, list[float]]:
        """Seconds a step of each, one entry a round; every round times each once, in an order that rotates."""
        listed = [self._filled(steps) for steps in contenders.values()]
        found = self.timers[mode](listed, rounds)
        return {name: [1e-3 * ms for ms in one] for name, one in zip(contenders, found, strict=True)}

    def _filled(self, steps: Sequence[Step]) -> list[Step]:
        """The steps as often as fill `region_s`."""
        begin = time.perf_counter()
        for step in steps:
            step()
        once = max(time.perf_counter() - begin, 1e-7)
        return [*steps] * max(1, min(100, round(self.region_s / once)))

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def healthy(self) -> bool:
        """Whether the device still answers; after some errors a process cannot use a card any more."""
        return True

    def free(self) -> None:
        """Give cached memory back."""

    def peak_bytes(self, step: Step) -> int | None:
        """The most memory a step holds beyond what was held before it: of the allocations that a profiler sees."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        kineto = profiler.profiler and profiler.profiler.kineto_results
        if not kineto:
            return None
        now = peak = 0
        events = [event for event in kineto.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak

    def held_bytes(self, forward: Callable[[], Any]) -> int | None:
        """What is held between forward and backward besides y, by the allocator's own count."""
        return None

    def launches(self, step: Step) -> int | None:
        """Kernels a step launches."""
        return None

    def host_us(self, step: Step, times: int = 10) -> float:
        """Microseconds the host spends on a step, not waiting for the device."""
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            step()
        spent = (time.perf_counter() - begin) / times
        self.synchronize()
        return 1e6 * spent


class Cuda(Device):
    """The current CUDA device. A graph holds steps over each of the rotating input sets."""

    kind = "cuda"
    timers: Mapping[str, timing.Timer] = {"eager": timing.event_timer, "graph": timing.graph_timer}
    region_s = 0.0
    most_sets = 64
    most_layers = 64

    def __init__(self) -> None:
        torch.cuda.init()
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = int(getattr(self._properties, "L2_cache_size", 0)) or 50 << 20

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def driver(self) -> str | None:
        """As nvidia-smi reports it; None where it cannot be asked."""
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.split("\n")[0].strip() or None

    def details(self) -> dict[str, Any]:
        p = self._properties
        return {
            "multiprocessors": p.multi_processor_count, "l2_bytes": self.cache_bytes, "memory_bytes": p.total_memory,
            "capability": f"{p.major}.{p.minor}",
        }  # fmt: skip

    def ceilings(self) -> Ceilings:
        """An 8192³ bf16 product of random values, ten in a row for the clock to settle, and a copy of 1 GiB."""
        found = self._ceilings(8192, torch.bfloat16, 1 << 30, 10, 20)
        self.free()
        return found

    def ready(self, steps: Sequence[Step], mode: str) -> None:
        """As a graph also with dropout keys drawn on the device, as the capture will draw them: that is another
        compiled kernel of ours, and nothing may be compiled during capture."""
        super().ready(steps, mode)
        if mode == "graph":
            with seeds_on_device():
                super().ready(steps, mode)
            timing.graph_timer([steps], 1)
        self.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def healthy(self) -> bool:
        try:
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").add_(1).item()
        except RuntimeError:
            return False
        return True

    def free(self) -> None:
        torch.cuda.empty_cache()

    def peak_bytes(self, step: Step) -> int | None:
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def held_bytes(self, forward: Callable[[], Any]) -> int | None:
        forward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = forward()
        torch.cuda.synchronize()
        storages = [one.untyped_storage() for one in ([y] if isinstance(y, Tensor) else y)]
        own = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        return max(0, torch.cuda.memory_allocated() - before - own)

    def launches(self, step: Step) -> int | None:
        """Kernels, copies and fills of one step, counted by the profiler; None where it sees none."""
        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or []) or None


def get(kind: str) -> Device:
    """The device of "cpu", "cuda" or "auto" (a card where torch sees one); where there is no such device, the reason
    on stderr and exit code 2."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return Device()
    if not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here; --device cpu measures the small cases", file=sys.stderr)
        raise SystemExit(2)
    return Cuda()
