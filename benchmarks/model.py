"""Model-level rows: decoder layers shaped like LLaMA-3-8B's, random weights, every linear adapted.

Plain PyTorch: RMSNorm, rotary positions, grouped-query attention by `scaled_dot_product_attention`, SwiGLU. Timed in
eager mode, forward and backward, all contestants in the same rounds. Each contestant is checked on one layer and a
short sequence first: y and every gradient against the same layer in float64 with the literal formula in its linears,
by the tolerance of the single layers. More layers repeat the code that was checked.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import glora_kernels as gk
from benchmarks import battery, cases, schema
from benchmarks.devices import Device
from benchmarks.peers import Unavailable
from benchmarks.runner import describe
from benchmarks.store import Store
from benchmarks.timing import Spread
from glora_kernels import GLoRAConfig, GLoRALinear, reference
from glora_kernels.reference.tolerance import allowed_error, largest_error

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONTESTANTS: tuple[tuple[str, str], ...] = (
    (battery.FROZEN, "eager"),
    (battery.LORA, "ours"),
    (battery.VECTOR_LORA, "ours"),
    (battery.VECTORS, "ours"),
    (battery.LORA_LORA, "ours"),
    (battery.LORA, "peft"),
    (battery.VECTORS, "peft"),
    (battery.LORA_LORA, "peft"),
)


@dataclass(frozen=True)
class Dims:
    """The sizes of a decoder layer, and what it is run on."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    dtype: torch.dtype
    batch: int
    length: int
    rank: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


DIMS = {
    "cuda": Dims("llama-3-8b layer", 4096, 32, 8, 14336, torch.bfloat16, 4, 2048, 16),
    "cpu": Dims("small layer", 512, 8, 2, 1792, torch.float32, 1, 512, 8),
    "tiny": Dims("tiny layer", 16, 2, 1, 40, torch.float32, 1, 8, 2),
}


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on (batch, length, hidden)."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, dims: Dims, device: torch.device, generator: torch.Generator) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = dims.heads, dims.kv_heads, dims.hidden // dims.heads
        kv = self.kv_heads * self.size
        sizes = {"q_proj": (dims.hidden, dims.hidden), "k_proj": (kv, dims.hidden), "v_proj": (kv, dims.hidden)}
        sizes |= {"o_proj": (dims.hidden, dims.hidden), "gate_proj": (dims.intermediate, dims.hidden)}
        sizes |= {"up_proj": (dims.intermediate, dims.hidden), "down_proj": (dims.hidden, dims.intermediate)}
        for name, (n, k) in sizes.items():
            linear = nn.Linear(k, n, bias=False, device="meta")
            weight = torch.randn(n, k, generator=generator, device=device).mul_(k**-0.5).to(dims.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, linear)
        ones = torch.ones(dims.hidden, device=device, dtype=dims.dtype)
        self.norm_in = nn.Parameter(ones, requires_grad=False)
        self.norm_mlp = nn.Parameter(ones.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        seen = F.rms_norm(x, (hidden,), self.norm_in, 1e-5)
        q = self.q_proj(seen).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(seen).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        v = self.v_proj(seen).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        cos, sin = _rotary(length, self.size, x)
        mixed = F.scaled_dot_product_attention(
            _rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        seen = F.rms_norm(x, (hidden,), self.norm_mlp, 1e-5)
        return x + self.down_proj(F.silu(self.gate_proj(seen)) * self.up_proj(seen))


def _rotary(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    rates = 500000.0 ** (-torch.arange(0, size, 2, device=like.device, dtype=torch.float64) / size)
    angles = torch.arange(length, device=like.device, dtype=torch.float64)[:, None] * rates
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def make_base(dims: Dims, layers: int, device: torch.device) -> nn.Sequential:
    """Frozen decoder layers with random weights."""
    generator = torch.Generator(device).manual_seed(0)
    return nn.Sequential(*(DecoderLayer(dims, device, generator) for _ in range(layers)))


def adapt(base: nn.Sequential, case: str, impl: str, rank: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base with every linear adapted, on the same weights; and the trainable tensors as "<path>.<support>".

    Raises:
        Unavailable: the implementation is not installed or has no such layer.
    """
    model: nn.Module = copy.deepcopy(base, {id(value): value for value in base.parameters()})
    if case == battery.FROZEN:
        return model, {}
    config = cases.case_config(case, rank)
    if impl == "ours":
        dtype = next(base.parameters()).dtype  # of the others' adapters too
        model = gk.inject(model, config, target_modules=list(LINEARS), adapter_dtype=dtype)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, GLoRALinear)}
        named = {name: _supports(layer, config) for name, layer in layers.items()}
    elif impl == "peft":
        model, named = _peft(model, config, case)
    else:
        raise Unavailable(f"no {impl} model")
    expected = 7 * len(base)
    if len(named) != expected:
        raise AssertionError(f"{len(named)} linears adapted, not {expected}")
    for i, path in enumerate(sorted(named)):
        cases.copy_values(named[path], _values(named[path], i))
    return model, {f"{path}.{name}": value for path in sorted(named) for name, value in named[path].items()}


def _supports(layer: nn.Module, config: GLoRAConfig) -> dict[str, Tensor]:
    names = config.parameter_shapes(1, 1, False)
    return {name: layer.get_parameter(name) for name in names}


def _peft(model: nn.Module, config: GLoRAConfig, case: str) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    try:
        library = importlib.import_module("peft")
        adapter = cases.peft_config(library, config, case, LINEARS)
    except (ImportError, ValueError) as reason:
        raise Unavailable(str(reason)) from reason
    wrapped = library.get_peft_model(model, adapter, autocast_adapter_dtype=False)
    inner = wrapped.base_model.model
    found = {n: m for n, m in inner.named_modules() if n.rpartition(".")[2] in LINEARS}
    return wrapped, {name: cases.peft_parameters(layer, config) for name, layer in found.items()}


def _values(params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """N(0, 0.02²), the same for every implementation: drawn in our order of names and our shapes."""
    found = {}
    for name in sorted(params):
        like = params[name]
        generator = torch.Generator(like.device).manual_seed(seed)
        found[name] = torch.randn(like.numel(), generator=generator, device=like.device).mul_(cases.STD).to(like.dtype)
        found[name] = found[name].view(like.shape)
    return found


class _Literal(nn.Module):
    """A linear with the literal formula."""

    def __init__(self, weight: Tensor, params: dict[str, Tensor], config: GLoRAConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.frozen = weight.to(dtype)
        self.config = config
        self.params = nn.ParameterDict({name: nn.Parameter(v.detach().to(dtype)) for name, v in params.items()})

    def forward(self, x: Tensor) -> Tensor:
        return reference.glora_linear(x, self.frozen, None, dict(self.params.items()), self.config)


def _literal(base: nn.Sequential, params: dict[str, Tensor], case: str, rank: int, dtype: torch.dtype) -> nn.Module:
    model = copy.deepcopy(base, {id(value): value for value in base.parameters()})
    config = cases.case_config(case, rank)
    for i, layer in enumerate(model):
        for name in LINEARS:
            path = f"{i}.{name}"
            mine = {key.removeprefix(f"{path}."): v for key, v in params.items() if key.startswith(f"{path}.")}
            setattr(layer, name, _Literal(base.get_submodule(path).get_parameter("weight"), mine, config, dtype))
        for name in ("norm_in", "norm_mlp"):
            weight = base.get_submodule(str(i)).get_parameter(name)
            setattr(layer, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    return model


def _results(model: nn.Module, x: Tensor, dy: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *params], dy)]


def check(model: nn.Module, params: dict[str, Tensor], base: nn.Sequential, case: str, dims: Dims) -> float:
    """Compare y, dx and every adapter gradient with float64 on a short sequence; the largest relative error.

    Raises:
        AssertionError: something is outside the tolerance.
    """
    device = next(base.parameters()).device
    generator = torch.Generator(device).manual_seed(3)
    shape = (1, min(256, dims.length), dims.hidden)
    x, dy = (torch.randn(shape, generator=generator, device=device).to(dims.dtype) for _ in range(2))
    found = _results(model, x, dy, list(params.values()))

    def literal(dtype: torch.dtype) -> list[Tensor]:
        exact = _literal(base, params, case, dims.rank, dtype)
        by_name = {name.replace(".params.", "."): value for name, value in exact.named_parameters()}
        return _results(exact, x.to(dtype), dy.to(dtype), [by_name[name] for name in params])

    truth, plain, worst = literal(torch.float64), literal(dims.dtype), 0.0
    for name, value, exact, eager in zip(["y", "x", *params], found, truth, plain, strict=True):
        error, limit = largest_error(value.reshape(exact.shape), exact), allowed_error(exact, eager, dims.dtype)
        if not error <= limit:
            raise AssertionError(f"{case}: {name} is off by {error:.3g}, more than {limit:.3g}")
        worst = max(worst, error / max(float(exact.abs().max()), 1e-300))
    return worst


def measure(
    what: str,
    scale: str,
    device: Device,
    store: Store,
    rounds: int = 8,
    out_of_time: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> bool:
    """Measure "layer" (one layer) or "growth" (1, 2, 4, 8 layers); rows go to the store. False: time ran out."""
    dims = DIMS[scale]
    for layers in (1,) if what == "layer" else (2, 4, 8):
        listed = CONTESTANTS if what == "layer" else tuple(c for c in CONTESTANTS if c[0] != battery.VECTORS)
        name = f"{dims.name} x{layers}"
        todo = [c for c in listed if f"{name}|{c[0]}|{c[1]}" not in store.settled()]
        if not [c for c in todo if c[0] != battery.FROZEN]:
            continue
        if out_of_time():
            return False
        group = f"{name}|{dims.tokens}"
        if store.struck_out(group):
            for case, impl in todo:
                reason = "did not finish in several attempts"
                store.add("error", key=f"{name}|{case}|{impl}", impl=impl, what=f"{name}, {case}", reason=reason)
            continue
        say(f"  {name}, {dims.tokens} tokens")
        store.add("begin", key=group)
        _measure(name, layers, dims, todo, device, store, rounds, say)
        store.add("end", key=group)
        device.free()
    return True


def _measure(
    name: str,
    layers: int,
    dims: Dims,
    todo: list[tuple[str, str]],
    device: Device,
    store: Store,
    rounds: int,
    say: Callable[[str], None],
) -> None:
    where = device.torch_device
    base = make_base(dims, layers, where)
    one = nn.Sequential(base[0])
    generator = torch.Generator(where).manual_seed(1)
    shape = (dims.batch, dims.length, dims.hidden)
    x = torch.randn(shape, generator=generator, device=where).to(dims.dtype).requires_grad_()
    dy = torch.randn(shape, generator=generator, device=where).to(dims.dtype)
    calls: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for case, impl in todo:
        key = f"{name}|{case}|{impl}"
        reason = None
        try:
            error = check(*adapt(one, case, impl, dims.rank), one, case, dims)
            model, params = adapt(base, case, impl, dims.rank)
            values = list(params.values())

            def step(model: nn.Module = model, values: list[Tensor] = values) -> object:
                return torch.autograd.grad(model(x), [x, *values], dy)

            extra = device.peak_bytes(step)
            held = sum(p.nbytes for p in model.parameters())
            facts[key] = {"case": case, "impl": impl, "peak_bytes": None if extra is None else held + extra}
            facts[key]["detail"] = {"layers": layers, "rank": dims.rank, "max_rel_err": error}
            calls[key] = step
        except Exception as failure:  # a contestant may fail in any way; the others go on
            reason = describe(failure)
        if reason is not None:
            store.add("error", key=key, impl=impl, what=f"{name}, {case} ({impl})", reason=reason)
            say(f"    left out: {name}, {case} ({impl}): {reason}")
            if not device.healthy():
                from benchmarks.runner import DeviceLost

                raise DeviceLost(reason)
            device.free()
    for key, seconds in device.interleaved(calls, rounds).items():
        spread, fact = Spread.of(seconds), facts[key]
        row: dict[str, Any] = {"model": name, "case": fact["case"], "impl": fact["impl"], "tokens": dims.tokens}
        row |= {"median_ms": 1e3 * spread.median, "tokens_per_s": dims.tokens / spread.median}
        row |= {"peak_bytes": fact["peak_bytes"]}
        schema.check_model(row)
        spread_ms = {"p20_ms": 1e3 * spread.p20, "p80_ms": 1e3 * spread.p80}
        store.add("model", key=key, row=row, detail=fact["detail"] | spread_ms)
