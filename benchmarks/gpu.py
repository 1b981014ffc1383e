"""Time, memory and launches on a CUDA device: events, graph capture and replay, the profiler.

Nothing here changes a setting of the card. A graph holds one step over each of the rotating input sets; times are
taken with events around enough replays to fill a millisecond or two.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.devices import Call, Device, bytes_of
from benchmarks.floor import Ceilings
from glora_kernels.glora.op import seeds_on_device


class Cuda(Device):
    """The current CUDA device."""

    kind = "cuda"
    modes = ("eager", "graph")
    region_s = 2e-3
    most_sets = 64
    most_layers = 64

    def __init__(self) -> None:
        torch.cuda.init()
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = int(getattr(self._properties, "L2_cache_size", 0)) or 50 << 20
        self._side = torch.cuda.Stream()  # one stream for every warm-up and capture

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

    def ceilings(self) -> Ceilings:
        """An 8192³ bf16 product of random values, and a copy of 1 GiB counting bytes read and written."""
        seconds, copied = self._product(8192), self._copy(1 << 30)
        self.free()
        return Ceilings(2 * 8192**3 / seconds / 1e12, 2 * (1 << 30) / copied / 1e9)

    def _product(self, size: int) -> float:
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(20):  # long enough for the clock to settle where it stays under load
            torch.mm(a, b, out=out)
        return self.best(lambda: torch.mm(a, b, out=out), 20)

    def _copy(self, size: int) -> float:
        source = torch.randn(size // 4, device="cuda")
        target = torch.empty_like(source)
        return self.best(lambda: target.copy_(source), 20)

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

    def prepare(self, steps: Sequence[Call], mode: str) -> Call:
        """In eager mode the steps themselves; otherwise the replay of a graph that holds them.

        The last warm-up draws dropout keys on the device, as the capture will: that is another compiled kernel of
        ours, and nothing may be compiled during capture.
        """
        if mode != "graph":
            return super().prepare(steps, mode)
        run = super().prepare(steps, "eager")
        here = torch.cuda.current_stream()
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            for _ in range(3):
                run()
            with seeds_on_device():
                run()
        here.wait_stream(self._side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side):
            run()
        torch.cuda.synchronize()
        return graph.replay  # the bound method keeps the graph

    def elapsed(self, call: Call, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    def peak_bytes(self, step: Call) -> int | None:
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def held_bytes(self, forward: Callable[[], Tensor]) -> int | None:
        forward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = forward()
        torch.cuda.synchronize()
        return max(0, torch.cuda.memory_allocated() - before - bytes_of(y))

    def launches(self, step: Call) -> int | None:
        """Kernels, copies and fills of one step, counted by the profiler; None where it sees none."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = profiler.events() or []
        count = sum(event.device_type == DeviceType.CUDA for event in events)
        return count or None

    def details(self) -> dict[str, Any]:
        """Multiprocessors, L2 bytes, memory, compute capability."""
        p = self._properties
        return {
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": self.cache_bytes,
            "memory_bytes": p.total_memory,
            "capability": f"{p.major}.{p.minor}",
        }
