"""Dequantizing alone: what it reads and writes over the time, beside a copy of as many bytes.

Plain, and with GLoRA on the way, W + W∘A + B with A and B from vectors or from factors. By CUDA, by Triton, by
bitsandbytes (plain) and by eager PyTorch; each is compared first: plain bit for bit with the codec in plain PyTorch,
the rest with float64. Codes and result lie in several copies, more than the cache holds.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, runner
from benchmarks.battery import LLAMA
from benchmarks.devices import Call, Device
from benchmarks.floor import Ceilings
from benchmarks.quantized_peers import Unavailable
from benchmarks.timing import Spread, progress
from glora_kernels.quant import QuantizedWeight, dequantize, quantize_weight
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime import environment

FORMS = ("plain", "vectors", "low-rank")
BACKENDS = ("cuda", "triton", "bnb", "eager")


@dataclass(frozen=True)
class Sizes:
    """(N, K) by name, the rank of factors, and the dtype of the result."""

    shapes: Mapping[str, tuple[int, int]]
    r: int
    dtype: torch.dtype


SIZES = {
    "cuda": Sizes({name: LLAMA[name] for name in ("gate", "q")}, 16, torch.bfloat16),
    "cpu": Sizes({"1024x1024": (1024, 1024)}, 16, torch.float32),
    "tiny": Sizes({"64x64": (64, 64)}, 4, torch.float32),
}

Adapter = dict[str, Tensor]
"""a, b or a_up, a_down, b_up, b_down, as the launchers take them; nothing where plain."""


def measure(
    sizes: Sizes, device: Device, rates: Ceilings, rounds: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """A row for each shape, form, backend and mode; `left_out` has the reason in the place of a row."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name, (n, k) in progress(sizes.shapes.items(), "dequantizing"):
        weights, outs = _copies(n, k, sizes.dtype, device)
        for form in FORMS:
            adapter = adapter_of(form, n, k, sizes, device)
            steps: dict[str, list[Call]] = {}
            errors = {}
            for backend in BACKENDS:
                with _left_out(f"dequantizing, {form} ({backend})", left_out, say):
                    if backend in ("cuda", "triton") and device.kind != "cuda":
                        raise Unavailable("its kernels need a GPU")
                    calls = [step(backend, w, out, adapter) for w, out in zip(weights, outs, strict=True)]
                    errors[backend] = check(calls[0], weights[0], outs[0], adapter)
                    steps[backend] = calls
            moved = weights[0].nbytes() + outs[0].nbytes + sum(tensor.nbytes for tensor in adapter.values())
            for mode in device.modes:
                prepared: dict[str, Call] = {}
                for backend, calls in steps.items():
                    with _left_out(f"dequantizing, {form} ({backend}), {mode}", left_out, say):
                        prepared[backend] = device.prepare(calls, mode)
                for backend, seconds in device.interleaved(prepared, rounds).items():
                    spread = Spread.of([s / len(weights) for s in seconds])
                    gbps = moved / spread.median / 1e9
                    row: dict[str, Any] = {"shape": name, "n": n, "k": k, "form": form, "backend": backend}
                    row |= {"dtype": cases.dtype_name(sizes.dtype), "mode": mode, "median_ms": 1e3 * spread.median}
                    row |= {"p20_ms": 1e3 * spread.p20, "p80_ms": 1e3 * spread.p80, "bytes": moved, "gbps": gbps}
                    rows.append(row | {"of_copy": gbps / rates.gbps, "max_rel_err": errors[backend]})
        device.free()
    return {"rows": rows, "r": sizes.r, "left_out": left_out}


def step(backend: str, weight: QuantizedWeight, out: Tensor, adapter: Adapter) -> Call:
    """A call that dequantizes into `out` by one backend.

    bitsandbytes has no `out` on a CPU: there the call returns the result.

    Raises:
        Unavailable: not with an adapter.
        ImportError, RuntimeError: the backend is not installed.
    """
    if backend in ("cuda", "triton"):
        place = "glora_kernels.four_bit." + ("cuda" if backend == "cuda" else "dequantize")
        arch = environment.arch(torch.cuda.current_device()) if weight.is_cuda else "cpu"
        return importlib.import_module(place).dequantize_launch(weight, out, arch=arch, **adapter).run
    if backend == "bnb":
        return _bitsandbytes(weight, out, adapter)
    return lambda: _eager(weight, out, adapter)


def _bitsandbytes(weight: QuantizedWeight, out: Tensor, adapter: Adapter) -> Call:
    if adapter:
        raise Unavailable("bitsandbytes dequantizes alone")
    from glora_kernels.quant.bnb import to_linear4bit

    function = importlib.import_module("bitsandbytes").functional.dequantize_4bit
    layer = to_linear4bit(weight, None, weight.dtype)
    if not weight.is_cuda:
        return lambda: function(layer.weight.data, layer.weight.quant_state)
    return lambda: function(layer.weight.data, layer.weight.quant_state, out=out)


def _eager(weight: QuantizedWeight, out: Tensor, adapter: Adapter) -> None:
    dequantize(weight, out.dtype, out=out)
    if adapter:
        a, b = (_term(adapter, name, out.dtype) for name in "ab")
        out.addcmul_(out, a).add_(b)


def _term(adapter: Adapter, name: str, dtype: torch.dtype) -> Tensor:
    """A or B (N, K) or (N, 1)."""
    if name in adapter:
        return adapter[name].to(dtype)[:, None]
    return adapter[f"{name}_up"].to(dtype) @ adapter[f"{name}_down"].to(dtype)


def adapter_of(form: str, n: int, k: int, sizes: Sizes, device: Device) -> Adapter:
    """Values N(0, 0.02²), in the dtype of the result."""
    generator = torch.Generator(device.torch_device).manual_seed(2)

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, device=device.torch_device)
        return values.mul_(cases.STD).to(sizes.dtype)

    if form == "plain":
        return {}
    if form == "vectors":
        return {"a": normal(n), "b": normal(n)}
    return {f"{name}_{end}": normal(*((n, sizes.r) if end == "up" else (sizes.r, k))) for name in "ab"
            for end in ("up", "down")}  # fmt: skip


def check(call: Call, weight: QuantizedWeight, out: Tensor, adapter: Adapter) -> float:
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
    error, size = largest_error(out, truth), float(truth.abs().max())
    if not error <= limit:
        raise AssertionError(f"W + W∘A + B is off by {error / size:.3g} of its largest value, over {limit / size:.3g}")
    return error / size


def _copies(n: int, k: int, dtype: torch.dtype, device: Device) -> tuple[list[QuantizedWeight], list[Tensor]]:
    generator = torch.Generator(device.torch_device).manual_seed(0)
    dense = torch.randn(n, k, generator=generator, device=device.torch_device).mul_(k**-0.5).to(dtype)
    weight = quantize_weight(dense, "nf4", double_quant=True)
    count = device.layers(weight.nbytes() + dense.nbytes)
    return [copy.deepcopy(weight) for _ in range(count)], [torch.empty_like(dense) for _ in range(count)]


@contextmanager
def _left_out(what: str, reasons: dict[str, str], say: Callable[[str], None]) -> Iterator[None]:
    """Turn whatever goes wrong inside into a reason; the others go on."""
    try:
        yield
    except Exception as error:  # a backend may be missing in any way
        reasons.setdefault(what, runner.describe(error))
        say(f"    left out: {what}: {reasons[what]}")
