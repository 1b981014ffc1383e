"""Merging every linear of a model: the kernel over the bandwidth of a copy, and `gk.merge` with the copies it keeps.

The kernel reads every W and both its factors and writes W: that traffic over the time is set beside what a large copy
reaches. `gk.merge` also copies every base to host memory, which is timed apart. Every merged weight is compared with
float64 first, and every unmerged one with the bits it had.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import glora_kernels as gk
from benchmarks import cases
from benchmarks.battery import LLAMA
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.timing import Spread
from glora_kernels import GLoRALinear
from glora_kernels.reference.tolerance import allowed_error, largest_error

WHOLE_LAYERS = 8
"""At most so many decoder layers go through `gk.merge`: their bases must fit in the host's memory."""

OF_MEMORY = 0.3
"""How much of a card's free memory the weights may take; the check holds a second copy of them."""


@dataclass(frozen=True)
class Sizes:
    """Decoder layers with LLaMA-3-8B's linears, all sizes divided by `by`, LoRA of rank r on each."""

    layers: int
    by: int
    r: int
    dtype: torch.dtype

    @property
    def weight_bytes(self) -> int:
        return self.layers * sum(n * k for n, k in LLAMA.values()) // self.by**2 * self.dtype.itemsize


SIZES = {
    "cuda": Sizes(32, 1, 16, torch.bfloat16),
    "cpu": Sizes(2, 4, 16, torch.float32),
    "tiny": Sizes(2, 128, 4, torch.float32),
}


def measure(sizes: Sizes, device: Device, rates: Ceilings, rounds: int) -> dict[str, Any]:
    """Time the kernel where Triton serves the device, and `gk.merge` and `gk.unmerge` as a whole.

    Raises:
        AssertionError: a merged weight is not right, or an unmerged one is not what it was.
    """
    sizes = fitting(sizes, device)
    model = make_model(sizes, device)
    layers = [module for module in model.modules() if isinstance(module, GLoRALinear)]
    before = [layer.weight.clone() for layer in layers]
    kernel = _kernel(layers)
    error = check(layers, before, (lambda: gk.merge(model)) if kernel is None else kernel)
    if kernel is None:
        gk.unmerge(model)
    found: dict[str, Any] = {"layers": sizes.layers, "linears": len(layers), "r": sizes.r, "max_rel_err": error}
    found |= {"dtype": cases.dtype_name(sizes.dtype), "kernel": None}
    if kernel is not None:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)
        found["kernel"] = _timed_kernel(kernel, layers, device, rates, rounds)
    del before
    whole = nn.ModuleList(list(model)[:WHOLE_LAYERS])
    found["whole"] = _whole(whole, device, max(3, rounds // 3))
    return found


def fitting(sizes: Sizes, device: Device) -> Sizes:
    """The sizes with as many layers, halved until they fit, as the card has memory for."""
    if device.kind != "cuda":
        return sizes
    free, _ = torch.cuda.mem_get_info()
    while sizes.layers > 1 and sizes.weight_bytes > OF_MEMORY * free:
        sizes = replace(sizes, layers=sizes.layers // 2)
    return sizes


def make_model(sizes: Sizes, device: Device) -> nn.ModuleList:
    """Decoder layers of linears with random weights, each with LoRA and none of its factors zero."""
    where = device.torch_device
    generator = torch.Generator(where).manual_seed(0)
    model = nn.ModuleList()
    for _ in range(sizes.layers):
        block = nn.ModuleDict()
        for name, (n, k) in LLAMA.items():
            linear = nn.Linear(k // sizes.by, n // sizes.by, bias=False, device=where, dtype=sizes.dtype)
            with torch.no_grad():
                linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
            block[name] = linear
        model.append(block)
    gk.inject(model, cases.case_config("lora", sizes.r), adapter_dtype=sizes.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=cases.STD, generator=generator)
    return model


def check(layers: list[GLoRALinear], before: list[Tensor], merge: Callable[[], object]) -> float:
    """Merge, and compare every weight with W + s·B_up·B_down in float64; the largest relative error.

    Raises:
        AssertionError: one is off by more than twice what plain PyTorch is at the same dtype, and a floor.
    """
    merge()
    worst = 0.0
    for i, (layer, weight) in enumerate(zip(layers, before, strict=True)):
        exact = _literal(layer, weight, torch.float64)
        error = largest_error(layer.weight, exact)
        limit = allowed_error(exact, _literal(layer, weight, weight.dtype), weight.dtype)
        size = float(exact.abs().max())
        if not error <= limit:
            raise AssertionError(f"merged weight {i} is off by {error / size:.3g}, more than {limit / size:.3g}")
        worst = max(worst, error / size)
    return worst


@torch.no_grad()
def _literal(layer: GLoRALinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    up, down = layer.adapter()["B_up"].to(dtype), layer.adapter()["B_down"].to(dtype)
    return weight.to(dtype) + layer.config.scale * (up @ down)


def _kernel(layers: list[GLoRALinear]) -> Callable[[], None] | None:
    """The launch that merges all layers, its table made; None where no kernel serves this device."""
    from glora_kernels.depth.table import Layer, group_key
    from glora_kernels.runtime import routes

    weight = layers[0].weight
    if routes.route(weight.device.type, weight.dtype) != "triton":
        return None
    from glora_kernels.depth.merge import merge_launch
    from glora_kernels.depth.rows import layer_table
    from glora_kernels.runtime.planning import arch_of

    operands = [Layer(one.weight.detach(), None, one.adapter(), one.config.scale) for one in layers]
    key = group_key(operands[0])
    assert key is not None
    table = layer_table(operands, key, [{} for _ in operands])
    launch = merge_launch(table, arch=arch_of(weight))

    def merge(kept: object = table) -> None:  # the table keeps alive what its addresses point to
        launch.run()

    return merge


def _timed_kernel(
    kernel: Callable[[], None], layers: list[GLoRALinear], device: Device, rates: Ceilings, rounds: int
) -> dict[str, Any]:
    """The launch and a loop of the library's products; both go on adding to the same weights."""

    @torch.no_grad()
    def loop() -> None:
        for layer in layers:
            own = layer.adapter()
            layer.weight.addmm_(own["B_up"], own["B_down"], alpha=layer.config.scale)

    times = device.interleaved({"kernel": kernel, "loop": loop}, rounds)
    taken, other = Spread.of(times["kernel"]), Spread.of(times["loop"])
    moved = sum(2 * layer.weight.nbytes + sum(p.nbytes for p in layer.adapter().values()) for layer in layers)
    gbps = moved / taken.median / 1e9
    return {
        "median_s": taken.median, "p20_s": taken.p20, "p80_s": taken.p80, "bytes": moved, "gbps": gbps,
        "of_copy": gbps / rates.gbps, "loop_s": other.median, "loop_of_copy": moved / other.median / 1e9 / rates.gbps,
    }  # fmt: skip


def _whole(model: nn.ModuleList, device: Device, rounds: int) -> dict[str, Any]:
    """Seconds of gk.merge, gk.unmerge, the copies to the host alone, and a loop that keeps no base; medians.

    Raises:
        AssertionError: unmerging does not give the base back.
    """
    layers = [module for module in model.modules() if isinstance(module, GLoRALinear)]
    weights = [layer.weight.detach() for layer in layers]
    base = [weight.clone() for weight in weights]
    host = [torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda) for weight in weights]

    def copies() -> None:
        for target, weight in zip(host, weights, strict=True):
            target.copy_(weight, non_blocking=True)

    steps = {"merge": lambda: gk.merge(model), "unmerge": lambda: gk.unmerge(model), "copy": copies}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(-1, rounds):
        for name, step in steps.items():
            device.synchronize()
            begin = time.perf_counter()
            step()
            device.synchronize()
            if i >= 0:  # the first round warms up, and pins the memory that is kept
                times[name].append(time.perf_counter() - begin)
    if not all(torch.equal(weight, kept) for weight, kept in zip(weights, base, strict=True)):
        raise AssertionError("unmerged weights are not the bases they were")
    found = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return found | {"linears": len(layers), "bytes": sum(math.prod(w.shape) * w.itemsize for w in weights)}
