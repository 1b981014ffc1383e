"""Merging every linear of a model.

The kernel reads every W and both its factors and writes W, in one launch on a card; that traffic over the time is set
beside what a large copy reaches. `gk.merge` also copies every base to host memory, which is timed apart. Every merged
weight is compared with float64 first, and every unmerged one with the bits it had.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import glora_kernels as gk
from benchmarks import bench_models, problems
from benchmarks.bench_models import DIMS, DecoderLayer, Dims, Which, make_base
from benchmarks.cases import LORA
from benchmarks.devices import Device, Spread
from benchmarks.measure import Bench
from glora_kernels import GLoRALinear
from glora_kernels.depth.table import Layer, group_key
from glora_kernels.reference.tolerance import allowed_error
from glora_kernels.runtime import routes
from glora_kernels.runtime.planning import arch_of

WHOLE_LAYERS = 8
"""At most so many decoder layers go through `gk.merge`: their bases must fit in the host's memory."""
OF_MEMORY = 0.3
"""How much of a card's free memory the weights may take; the check holds a second copy of them."""


LAYERS = {"cuda": 32, "cpu": 2, "tiny": 2}


def merging(dims: Dims, layers: int, bench: Bench) -> dict[str, Any]:
    """Time the kernel where Triton serves the device, and `gk.merge` and `gk.unmerge` as a whole.

    Raises:
        AssertionError: a merged weight is not right, or an unmerged one is not what it was.
    """
    count = fitting(dims, layers, bench.device)
    model: Any = bench_models.adapt(make_base(dims, count, bench.device.torch_device), Which(LORA, "ours"), dims).model
    linears = adapted(model)
    before = [layer.weight.clone() for layer in linears]
    kernel = merge_kernel(linears)
    error = check(linears, before, (lambda: gk.merge(model)) if kernel is None else kernel)
    found: dict[str, Any] = {"layers": count, "linears": len(linears), "r": dims.rank, "max_rel_err": error}
    found |= {"dtype": dims.dtype, "kernel": None}
    if kernel is None:
        gk.unmerge(model)
    else:
        with torch.no_grad():
            for layer, weight in zip(linears, before, strict=True):
                layer.weight.copy_(weight)
        found["kernel"] = _timed(kernel, linears, bench)
    del before
    whole = nn.ModuleList(list(model.layers)[:WHOLE_LAYERS])
    return found | {"whole": _whole(whole, bench.device, max(3, bench.rounds // 3))}


def adapted(model: nn.Module) -> list[GLoRALinear]:
    return [module for module in model.modules() if isinstance(module, GLoRALinear)]


def fitting(dims: Dims, layers: int, device: Device) -> int:
    """The number of layers, halved until they fit, as the card has memory for."""
    if device.kind != "cuda":
        return layers
    with torch.device("meta"):
        one = sum(parameter.numel() for parameter in DecoderLayer(dims).parameters()) * dims.torch_dtype.itemsize
    free, _ = torch.cuda.mem_get_info()
    while layers > 1 and layers * one > OF_MEMORY * free:
        layers //= 2
    return layers


def check(layers: list[GLoRALinear], before: list[Tensor], merge: Callable[[], object]) -> float:
    """Merge, and compare every weight with W + s·B_up·B_down in float64; the largest relative error.

    Raises:
        AssertionError: one is off by more than twice what plain PyTorch is at the same dtype, and a floor.
    """
    merge()

    def literal(layer: GLoRALinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
        up, down = layer.adapter()["B_up"].to(dtype), layer.adapter()["B_down"].to(dtype)
        return weight.to(dtype) + layer.config.scale * (up @ down)

    worst = 0.0
    for i, (layer, weight) in enumerate(zip(layers, before, strict=True)):
        with torch.no_grad():
            exact, plain = literal(layer, weight, torch.float64), literal(layer, weight, weight.dtype)
        expected = {"the weight": (exact, allowed_error(exact, plain, weight.dtype))}
        worst = max(worst, problems.compare(f"merged weight {i}", {"the weight": layer.weight}, expected))
    return worst


def merge_kernel(layers: list[GLoRALinear]) -> Callable[[], None] | None:
    """The launch that merges all layers, its table made; None where no kernel serves this device."""
    weight = layers[0].weight
    if routes.route(weight.device.type, weight.dtype) != "triton":
        return None
    operands = [Layer(one.weight.detach(), None, one.adapter(), one.config.scale) for one in layers]
    key = group_key(operands[0])
    assert key is not None
    from glora_kernels.depth.merge import merge_launch  # with triton
    from glora_kernels.depth.rows import layer_table

    table = layer_table(operands, key, [{} for _ in operands])
    launch = merge_launch(table, arch=arch_of(weight))

    def merge(kept: object = table) -> None:  # the table keeps alive what its addresses point to
        launch.run()

    return merge


def _timed(kernel: Callable[[], None], layers: list[GLoRALinear], bench: Bench) -> dict[str, Any]:
    """The launch and a loop of the library's products; both go on adding to the same weights."""

    @torch.no_grad()
    def loop() -> None:
        for layer in layers:
            own = layer.adapter()
            layer.weight.addmm_(own["B_up"], own["B_down"], alpha=layer.config.scale)

    times = bench.device.times({"kernel": [kernel], "loop": [loop]}, "eager", bench.rounds)
    taken, other = Spread.of(times["kernel"]), Spread.of(times["loop"])
    moved = sum(2 * layer.weight.nbytes + sum(p.nbytes for p in layer.adapter().values()) for layer in layers)
    gbps, copy = moved / taken.median / 1e9, bench.ceilings().gbps
    return {
        "median_s": taken.median, "p20_s": taken.p20, "p80_s": taken.p80, "bytes": moved, "gbps": gbps,
        "of_copy": gbps / copy, "loop_s": other.median, "loop_of_copy": moved / other.median / 1e9 / copy,
    }  # fmt: skip


def _whole(model: nn.ModuleList, device: Device, rounds: int) -> dict[str, Any]:
    """Seconds of gk.merge, gk.unmerge and the copies to the host alone; medians.

    Raises:
        AssertionError: unmerging does not give the base back.
    """
    weights = [layer.weight.detach() for layer in adapted(model)]
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
    return found | {"linears": len(weights), "bytes": sum(weight.nbytes for weight in weights)}


def test_merging(bench: Bench) -> None:
    bench.note("merging", lambda: merging(DIMS[bench.scale], LAYERS[bench.scale], bench))
