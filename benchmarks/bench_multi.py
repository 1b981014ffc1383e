"""One batch whose rows have an adapter each, beside what one would do instead, by the number of rows an adapter.

LoRA adapters on one base, rows sorted by adapter. `mixed` is one call of `ops.multi_glora_linear` with an `AdapterSet`;
`loop` calls our single layer once an adapter; `peft` is PEFT's layer with `adapter_names=`; `separate` are PEFT layers
with one adapter each, called one after the other, as J calls of a model are; `frozen` is the base alone. Every y is
compared with float64 before anything is timed. Forward is without gradients, backward is of x and every factor.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks import problems
from benchmarks.devices import Spread, progress
from benchmarks.measure import Bench
from glora_kernels.ops import AdapterSet, glora_linear, multi_glora_linear
from glora_kernels.reference.tolerance import allowed_error


class Sizes(NamedTuple):
    """features: N = K; rank of every adapter; how many adapters, and how many rows each of them has."""

    features: int
    rank: int
    dtype: torch.dtype
    adapters: tuple[int, ...]
    rows: tuple[int, ...]


ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIZES = {
    "cuda": Sizes(4096, 16, torch.bfloat16, (8, 32), ROWS), "cpu": Sizes(1024, 8, torch.float32, (8, 32), ROWS),
    "tiny": Sizes(32, 2, torch.float32, (3,), (1, 4)),
}  # fmt: skip
SCALE = 2.0
PASSES = ("fwd", "fwd_bwd")
Forward = Callable[[Tensor], Tensor]


class _Base(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear


class Layers:
    """A base and its adapters."""

    def __init__(self, sizes: Sizes, count: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(device, sizes.dtype)

        n, r = sizes.features, sizes.rank
        self.sizes, self.weight = sizes, draw(n, n)
        self.downs = [draw(r, n).requires_grad_() for _ in range(count)]
        self.ups = [draw(n, r).requires_grad_() for _ in range(count)]
        self.keywords: list[dict[str, Any]] = [
            {"b_down": down, "b_up": up, "scale": SCALE} for down, up in zip(self.downs, self.ups, strict=True)
        ]

    def contestants(self, rows: int) -> dict[str, Forward]:
        """By name; PEFT's where it is installed."""
        count, chosen = len(self.downs), AdapterSet(self.keywords)
        index = torch.arange(count, device=self.weight.device).repeat_interleave(rows)

        def loop(x: Tensor) -> Tensor:
            parts = zip(x.split(rows), self.keywords, strict=True)
            return torch.cat([glora_linear(part, self.weight, None, **own) for part, own in parts])

        found: dict[str, Forward] = {
            "frozen": lambda x: linear(x, self.weight),
            "mixed": lambda x: multi_glora_linear(x, self.weight, None, chosen, index),
            "loop": loop,
        }
        try:
            layer, *alone = self._pefts(["all"] + [str(j) for j in range(count)])
        except ImportError:
            return found
        names = [str(j) for j in range(count) for _ in range(rows)]
        found["peft"] = lambda x: layer(x, adapter_names=names)
        found["separate"] = lambda x: torch.cat([one(part) for one, part in zip(alone, x.split(rows), strict=True)])
        return found

    def _pefts(self, which: Sequence[str]) -> list[nn.Module]:
        """PEFT's layers over this base: with all adapters, or with the one of a number."""
        library, found = importlib.import_module("peft"), []
        config = library.LoraConfig(r=self.sizes.rank, lora_alpha=SCALE * self.sizes.rank, target_modules=["linear"])
        for name in which:
            base = nn.Linear(1, 1, bias=False)
            base.weight = nn.Parameter(self.weight, requires_grad=False)
            base.in_features = base.out_features = self.sizes.features
            mine = [str(j) for j in range(len(self.downs))] if name == "all" else [name]
            model = library.get_peft_model(_Base(base), copy.copy(config), mine[0], autocast_adapter_dtype=False)
            for other in mine[1:]:
                model.add_adapter(other, copy.copy(config), autocast_adapter_dtype=False)
            layer = model.base_model.model.linear.eval()
            for one in mine:
                layer.lora_A[one].weight, layer.lora_B[one].weight = (
                    nn.Parameter(t.detach()) for t in (self.downs[int(one)], self.ups[int(one)])
                )
            found.append(layer)
        return found

    def expected(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """y by the letter in a dtype."""
        rows, base = len(x) // len(self.downs), linear(x.to(dtype), self.weight.to(dtype))
        own = zip(x.to(dtype).split(rows), self.downs, self.ups, strict=True)
        return base + torch.cat([SCALE * linear(linear(part, down.to(dtype)), up.to(dtype)) for part, down, up in own])


def multi(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    """Milliseconds of every contestant, and over `mixed` the median of the ratios of the rounds.

    Raises:
        AssertionError: a y is not right.
    """
    found, device = [], bench.device.torch_device
    cases = [(count, rows) for count in sizes.adapters for rows in sizes.rows]
    for count, rows in progress(cases, "adapters"):
        layers = Layers(sizes, count, device)
        contestants = layers.contestants(rows)
        x = torch.randn(count * rows, sizes.features, device=device, dtype=sizes.dtype)
        check(layers, contestants, x)
        for direction in PASSES:
            steps = {name: [step(forward, x, direction)] for name, forward in contestants.items()}
            times = bench.device.times(steps, "eager", bench.rounds)
            row: dict[str, Any] = {"adapters": count, "rows": rows, "pass": direction}
            row |= {f"{name}_ms": 1e3 * Spread.of(taken).median for name, taken in times.items()}
            for name, taken in times.items():
                if name != "mixed":
                    row |= Spread.ratio(taken, times["mixed"]).named(f"{name}_over_mixed")
            found.append(row)
    dtype = str(sizes.dtype).removeprefix("torch.")
    return {"features": sizes.features, "rank": sizes.rank, "dtype": dtype, "rows": found}


@torch.no_grad()
def check(layers: Layers, contestants: dict[str, Forward], x: Tensor) -> None:
    """Compare every y with float64; raises as `problems.compare`."""
    exact = layers.expected(x, torch.float64)
    limit = allowed_error(exact, layers.expected(x, x.dtype), x.dtype)
    for name, forward in contestants.items():
        if name != "frozen":
            problems.compare(name, {"y": forward(x)}, {"y": (exact, limit)})


def step(forward: Forward, x: Tensor, direction: str) -> Callable[[], object]:
    """A forward without gradients, or one with a backward; those of the factors are added up, as every contestant's."""

    @torch.no_grad()
    def decode() -> None:
        forward(x)

    own = x.clone().requires_grad_()
    if direction == "fwd":
        return decode
    dy = torch.randn_like(forward(own))

    def train() -> None:
        forward(own).backward(dy)
        own.grad = None

    return train


def test_multi(bench: Bench) -> None:
    bench.note("multi", lambda: multi(SIZES[bench.scale], bench))
