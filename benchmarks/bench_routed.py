"""One row each of what is routed: a batch of several adapters, and the experts of a mixture, each with a LoRA.

Of adapters the comparison is that of `bench_multi`, at one size. Of experts: every token goes to `top` of them; `ours`
is one call of `ops.expert_glora_linear`, `base` the same call without adapters, and `grouped_mm` PyTorch's product of
the frozen weights alone, over rows that were gathered before, which is less work than either. y is compared with
float64 before anything is timed. Forward is without gradients, backward is of x and of every factor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import bench_multi, problems
from benchmarks.bench_multi import PASSES, SCALE, Forward, step
from benchmarks.devices import Spread
from benchmarks.measure import Bench
from glora_kernels.ops import expert_glora_linear
from glora_kernels.reference.tolerance import allowed_error


class Sizes(NamedTuple):
    """experts, and how many of them a token has; tokens; N and K of an expert; rank of every LoRA."""

    experts: int
    top: int
    tokens: int
    n: int
    k: int
    rank: int
    dtype: torch.dtype


ADAPTERS = {
    "cuda": bench_multi.Sizes(4096, 16, torch.bfloat16, (32,), (8,)),
    "tiny": bench_multi.Sizes(32, 2, torch.float32, (3,), (2,)),
}
EXPERTS = {
    "cuda": Sizes(8, 2, 2048, 14336, 4096, 16, torch.bfloat16),
    "tiny": Sizes(3, 2, 8, 24, 16, 2, torch.float32),
}  # fmt: skip


class Experts:
    """Weights and factors of all experts, and the tokens of each."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return problems.normal(generator, sizes.dtype, *shape, std=shape[-1] ** -0.5)

        self.x, self.weight = draw(sizes.tokens, sizes.k), draw(sizes.experts, sizes.n, sizes.k)
        self.up = draw(sizes.experts, sizes.n, sizes.rank).requires_grad_()
        self.down = draw(sizes.experts, sizes.rank, sizes.k).requires_grad_()
        first = torch.arange(sizes.tokens, device=device)
        self.index = torch.stack([(first + i) % sizes.experts for i in range(sizes.top)], dim=1)

    def contestants(self) -> dict[str, Forward]:
        """By name, from x to y (T·top, N); `grouped_mm` where this PyTorch has it for x's dtype, its rows sorted."""
        adapters = {"b_up": self.up, "b_down": self.down, "scale": SCALE}
        order = self.index.flatten().argsort(stable=True)
        sorted_x = self.x[order // self.index.shape[1]]
        ends = torch.bincount(self.index.flatten(), minlength=len(self.weight)).cumsum(0).to(torch.int32)
        found: dict[str, Forward] = {
            "ours": lambda x: expert_glora_linear(x, self.weight, None, adapters, index=self.index).flatten(0, 1),
            "base": lambda x: expert_glora_linear(x, self.weight, None, None, index=self.index).flatten(0, 1),
        }
        if hasattr(functional, "grouped_mm") and self.x.dtype == torch.bfloat16:
            found["grouped_mm"] = lambda x: functional.grouped_mm(sorted_x, self.weight.mT, offs=ends)
        return found

    @torch.no_grad()
    def expected(self, dtype: torch.dtype) -> Tensor:
        """y of `ours` by the letter in a dtype."""
        y = torch.empty(*self.index.shape, self.weight.shape[1], dtype=dtype, device=self.x.device)
        for e, weight in enumerate(self.weight):
            tokens, place = (self.index == e).nonzero(as_tuple=True)
            rows = self.x[tokens].to(dtype)
            low = functional.linear(functional.linear(rows, self.down[e].to(dtype)), self.up[e].to(dtype))
            y[tokens, place] = functional.linear(rows, weight.to(dtype)) + SCALE * low
        return y.flatten(0, 1)


def experts(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    """Milliseconds of every contestant, and of `ours` over each other the median of the ratios of the rounds.

    Raises:
        AssertionError: y is not right.
    """
    made, rows = Experts(sizes, bench.device.torch_device), []
    contestants = made.contestants()
    exact = made.expected(torch.float64)
    limit = allowed_error(exact, made.expected(sizes.dtype), sizes.dtype)
    with torch.no_grad():
        problems.compare("experts", {"y": contestants["ours"](made.x)}, {"y": (exact, limit)})
    del exact
    for direction in PASSES:
        timed = [name for name in contestants if direction == "fwd" or name != "grouped_mm"]
        steps = {name: [step(contestants[name], made.x, direction)] for name in timed}
        times = bench.device.times(steps, "eager", bench.rounds)
        row: dict[str, Any] = {"pass": direction}
        row |= {f"{name}_ms": 1e3 * Spread.of(taken).median for name, taken in times.items()}
        for name in timed[1:]:
            row |= Spread.ratio(times["ours"], times[name]).named(f"over_{name}")
        rows.append(row)
    return {**sizes._asdict(), "dtype": str(sizes.dtype).removeprefix("torch."), "rows": rows}


def test_adapters(bench: Bench) -> None:
    bench.note("adapters", lambda: bench_multi.multi(ADAPTERS[bench.scale], bench))


def test_experts(bench: Bench) -> None:
    bench.note("experts", lambda: experts(EXPERTS[bench.scale], bench))
