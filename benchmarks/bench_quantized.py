"""Beside the layers over a 4-bit base: dequantizing alone, and what such layers hold.

Dequantizing, plain and with GLoRA on the way, W + W∘A + B with A and B from vectors or from factors: what it reads and
writes over the time, beside a copy of as many bytes. By CUDA, by Triton, by bitsandbytes (plain) and by eager PyTorch;
each is compared first, plain bit for bit with the codec in plain PyTorch, the rest with float64. Codes and result lie
in several copies, more than the cache holds.

Memory, of one layer and of a stack of them that feed each other: base, adapters, the one workspace, what a forward
saves, and the peak of a step beyond all that. All bytes are those of tensors. Every layer is compared with float64
first.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure, peers, problems
from benchmarks.cases import LLAMA, LORA, QGLORA, QLORA, QLORA_LORA, Entry
from benchmarks.devices import Device, Spread, Step, progress
from benchmarks.measure import Bench
from benchmarks.peers import Unavailable
from benchmarks.problems import tensor_bytes
from glora_kernels.four_bit import cuda
from glora_kernels.four_bit import dequantize as by_triton
from glora_kernels.quant import QuantizedWeight, dequantize, quantize_weight
from glora_kernels.quant.bnb import to_linear4bit
from glora_kernels.reference.tolerance import allowed_error
from glora_kernels.runtime import environment, workspace

FORMS = ("plain", "vectors", "low-rank")
BACKENDS = ("cuda", "triton", "bnb", "eager")
CONTESTANTS = ((QLORA, "ours"), (QGLORA, "ours"), (QLORA_LORA, "ours"), (QLORA, "peft"), (QLORA, "eager"),
               (LORA, "ours"))  # fmt: skip
"""case, impl of the memory's rows."""
Adapter = dict[str, Tensor]
"""a, b or a_up, a_down, b_up, b_down, as the launchers take them; nothing where plain."""


@dataclass(frozen=True)
class Sizes:
    """Of dequantizing: (N, K) by name, the rank of factors. Of memory: N = K, M, the rank, numbers of layers."""

    shapes: Mapping[str, tuple[int, int]]
    rank: int
    features: int
    m: int
    r: int
    layers: tuple[int, ...]
    dtype: str = "fp32"


SIZES = {
    "cuda": Sizes({name: LLAMA[name] for name in ("gate", "q")}, 16, 4096, 2048, 16, (1, 8), "bf16"),
    "cpu": Sizes({"1024x1024": (1024, 1024)}, 16, 2048, 64, 8, (1, 4)),
    "tiny": Sizes({"64x64": (64, 64)}, 4, 64, 8, 4, (1, 2)),
}


def dequantizing(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    """A row for each shape, form, backend and mode; `left_out` has the reason in the place of a row."""
    device, rates, rows, left_out = bench.device, bench.ceilings(), [], {}
    for name, (n, k) in progress(sizes.shapes.items(), "dequantizing"):
        weights, outs = copies(n, k, problems.DTYPES[sizes.dtype], device)
        for form in FORMS:
            adapter = adapter_of(form, n, k, sizes, device)
            calls: dict[str, list[Step]] = {}
            errors = {}
            for backend in BACKENDS:
                try:
                    if backend in ("cuda", "triton") and device.kind != "cuda":
                        raise Unavailable("its kernels need a GPU")
                    listed = [step(backend, w, out, adapter) for w, out in zip(weights, outs, strict=True)]
                    errors[backend] = check(listed[0], weights[0], outs[0], adapter)
                    calls[backend] = listed
                except Exception as error:  # a backend may be missing in any way
                    left_out[f"dequantizing, {form} ({backend})"] = measure.describe(error)
            moved = weights[0].nbytes() + outs[0].nbytes + sum(tensor.nbytes for tensor in adapter.values())
            for mode in device.timers:
                ready = {}
                for backend, listed in calls.items():
                    try:
                        device.ready(listed, mode)
                        ready[backend] = listed
                    except Exception as error:  # nor need it be one that can be captured
                        left_out[f"dequantizing, {form} ({backend}), {mode}"] = measure.describe(error)
                for backend, seconds in device.times(ready, mode, bench.rounds).items():
                    spread = Spread.of(seconds)
                    row: dict[str, Any] = {"shape": name, "n": n, "k": k, "form": form, "backend": backend}
                    row |= {"dtype": sizes.dtype, "mode": mode, **spread.row(), "bytes": moved}
                    row["of_copy"] = moved / spread.median / 1e9 / rates.gbps
                    rows.append(row | {"max_rel_err": errors[backend]})
        device.free()
    return {"rows": rows, "r": sizes.rank, "left_out": left_out}


def step(backend: str, weight: QuantizedWeight, out: Tensor, adapter: Adapter) -> Step:
    """A call that dequantizes into `out` by one backend. bitsandbytes has no `out` on a CPU: there the call returns the
    result.

    Raises:
        Unavailable: not with an adapter.
        ImportError, RuntimeError: the backend is not installed.
    """
    if backend in ("cuda", "triton"):
        launch = (cuda if backend == "cuda" else by_triton).dequantize_launch
        arch = environment.arch(torch.cuda.current_device()) if weight.is_cuda else "cpu"
        return launch(weight, out, arch=arch, **adapter).run
    if backend == "bnb":
        if adapter:
            raise Unavailable("bitsandbytes dequantizes alone")
        function = importlib.import_module("bitsandbytes").functional.dequantize_4bit
        layer, to = to_linear4bit(weight, None, weight.dtype), {"out": out} if weight.is_cuda else {}
        return lambda: function(layer.weight.data, layer.weight.quant_state, **to)

    def eager() -> None:
        dequantize(weight, out.dtype, out=out)
        if adapter:
            a, b = (_term(adapter, name, out.dtype) for name in "ab")
            out.addcmul_(out, a).add_(b)

    return eager


def _term(adapter: Adapter, name: str, dtype: torch.dtype) -> Tensor:
    """A or B (N, K) or (N, 1)."""
    if name in adapter:
        return adapter[name].to(dtype)[:, None]
    return adapter[f"{name}_up"].to(dtype) @ adapter[f"{name}_down"].to(dtype)


def adapter_of(form: str, n: int, k: int, sizes: Sizes, device: Device) -> Adapter:
    """Values N(0, 0.02²), in the dtype of the result."""
    generator, dtype = torch.Generator(device.torch_device).manual_seed(2), problems.DTYPES[sizes.dtype]
    shapes: dict[str, tuple[int, ...]] = {"a": (n,), "b": (n,)} if form == "vectors" else {}
    if form == "low-rank":
        shapes = {f"{name}_{end}": (n, sizes.rank) if end == "up" else (sizes.rank, k)
                  for name in "ab" for end in ("up", "down")}  # fmt: skip
    return {name: problems.normal(generator, dtype, *size, std=problems.STD) for name, size in shapes.items()}


def check(call: Step, weight: QuantizedWeight, out: Tensor, adapter: Adapter) -> float:
    """Run it into a poisoned `out` and compare that, or what it returns; the largest error over the largest value.

    Raises:
        AssertionError: it is not right.
    """
    out.fill_(float("nan"))
    returned = call()
    out = returned if isinstance(returned, Tensor) else out
    plain = dequantize(weight, out.dtype)
    if not adapter:
        if not torch.equal(out, plain):
            raise AssertionError("the dequantized weight is not bit for bit that of the codec")
        return 0.0
    a, b = (_term(adapter, name, torch.float64) for name in "ab")
    truth = plain.double() * (1 + a) + b
    low = {name: _term(adapter, name, out.dtype) for name in "ab"}
    limit = allowed_error(truth, plain * (1 + low["a"]) + low["b"], out.dtype)
    return problems.compare("W + W∘A + B", {"the weight": out}, {"the weight": (truth, limit)})


def copies(n: int, k: int, dtype: torch.dtype, device: Device) -> tuple[list[QuantizedWeight], list[Tensor]]:
    """As many weights and places for the result as exceed the cache."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    dense = torch.randn(n, k, generator=generator, device=device.torch_device).mul_(k**-0.5).to(dtype)
    weight = quantize_weight(dense, "nf4", double_quant=True)
    count = device.layers(weight.nbytes() + dense.nbytes)
    return [copy.deepcopy(weight) for _ in range(count)], [torch.empty_like(dense) for _ in range(count)]


def memory(sizes: Sizes, bench: Bench) -> dict[str, Any]:
    """A row for each contestant and number of layers; `left_out` has the reason in the place of a row."""
    rows, left_out, n = [], {}, sizes.features
    for case, impl in progress(CONTESTANTS, "memory"):
        entry = Entry(case, impl, sizes.m, n, n, sizes.r, 0.0, dtype=sizes.dtype)
        try:
            layers = [_layer(entry, seed, bench.device) for seed in range(max(sizes.layers))]
            for count in sizes.layers:
                rows.append({"case": case, "impl": impl, "layers": count, **_held(entry, layers[:count], bench.device)})
        except Exception as error:  # a contestant may fail in any way; the others go on
            left_out[f"memory, {case} ({impl})"] = measure.describe(error)
        layers = []
        workspace.release()
        bench.device.free()
    return {"n": n, "k": n, "m": sizes.m, "r": sizes.r, "dtype": sizes.dtype, "rows": rows, "left_out": left_out}


def _layer(entry: Entry, seed: int, device: Device) -> tuple[problems.Contestant, float, list[Tensor]]:
    """One layer, compared with float64: itself, its error, what it holds beside its adapter."""
    problem = problems.make_problem(entry, device.torch_device, seed=seed)
    problem = problems.quantized(problem) if entry.quantized else problem
    found = peers.build(problem)
    error = problems.check(found, problem)
    holder = found.forward if isinstance(found.forward, nn.Module) else problems.base_layer(problem)
    own = {parameter.data_ptr() for parameter in found.params.values()}
    return found, error, [tensor for tensor in problems.held_tensors(holder) if tensor.data_ptr() not in own]


def _held(
    entry: Entry, layers: list[tuple[problems.Contestant, float, list[Tensor]]], device: Device
) -> dict[str, Any]:
    params = [parameter for contestant, _, _ in layers for parameter in contestant.params.values()]
    base = [tensor for _, _, tensors in layers for tensor in tensors]
    x, dy = problems.random_inputs(entry, torch.Generator(device.torch_device).manual_seed(1))

    def stack(x: Tensor) -> Tensor:
        for contestant, _, _ in layers:
            x = contestant.forward(x)
        return x

    def step() -> object:
        return torch.autograd.grad(stack(x), [x, *params], dy)

    workspace.release()
    step()  # whatever is made once is there
    found = {"base_bytes": tensor_bytes(base), "adapter_bytes": tensor_bytes(params)}
    found["workspace_bytes"] = workspace_bytes(device)
    found["saved_bytes"] = measure.saved_bytes(stack, x, [*params, *base])
    found["peak_bytes"] = device.peak_bytes(step) or 0
    together = sum(found[name] for name in ("base_bytes", "adapter_bytes", "workspace_bytes", "peak_bytes"))
    return {**found, "all_bytes": together, "max_rel_err": max(error for _, error, _ in layers)}


def workspace_bytes(device: Device) -> int:
    """The one buffer that is reused, as large as the last calls made it; 0 where none needed it."""
    one = torch.empty(1, 1, device=device.torch_device)
    size = workspace.workspace_like(one, one.dtype).untyped_storage().nbytes()
    return 0 if size == one.nbytes else size


def test_dequantizing(bench: Bench) -> None:
    bench.note("dequantizing", lambda: dequantizing(SIZES[bench.scale], bench))


def test_memory(bench: Bench) -> None:
    bench.note("memory", lambda: memory(SIZES[bench.scale], bench))
