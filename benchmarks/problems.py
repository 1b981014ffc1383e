"""The values of a case, and what is right for them: x, dy, W, b, the adapter, and every result in float64.

A `Problem` is one layer, or a set of layers that read one x; `benchmarks.peers` makes contestants of it. `check`
compares one with float64 before it is timed, by the project's one tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import glora_kernels as gk
from benchmarks.cases import Entry
from benchmarks.devices import Device
from glora_kernels import GLoRAConfig, QuantizedLinear
from glora_kernels.glora.op import dropout_seed
from glora_kernels.quant import QuantState
from glora_kernels.reference.random import keep_mask
from glora_kernels.reference.tolerance import allowed_error, largest_error, literal_step

STD = 0.02
"""The spread of every adapter value: nothing is zero, as it would be in a fresh adapter."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Problem:
    """The values of one entry. `params` holds the supports by the names of the configuration.

    base: the frozen layer itself where it is no nn.Linear on `weight` (a 4-bit one; `weight` is then decoded).
    Of a set the weights are rows of `weight`, and the factors are "<support>.<member>".
    """

    entry: Entry
    config: GLoRAConfig
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    params: dict[str, Tensor]
    base: nn.Module | None = None

    def members(self) -> list[Problem]:
        """The layers of a set by themselves."""
        widths, found = list(self.entry.widths), []
        parts = zip(self.weight.split(widths), self.dy.split(widths, dim=1), strict=True)
        for i, (weight, dy) in enumerate(parts):
            entry = replace(self.entry, case=self.entry.adapter, n=widths[i], widths=())
            params = {name.partition(".")[0]: v for name, v in self.params.items() if name.endswith(f".{i}")}
            found.append(replace(self, entry=entry, weight=weight, dy=dy, params=params))
        return found


@dataclass
class Contestant:
    """One thing that is measured: what it computes, and the trainable tensors by our names.

    forward: x → y, or x → one y for each layer of a set, or where `joined` one y (M, ΣN) for the set.
    """

    forward: Callable[[Tensor], Any]
    params: Mapping[str, Tensor] = field(default_factory=dict)
    joined: bool = False


Expected = dict[str, tuple[Tensor, float]]
"""By result ("y", "dx", "d<support>"): its float64 value, and the largest absolute error that is accepted."""


def case_config(case: str, rank: int, dropout: float = 0.0) -> GLoRAConfig:
    """The configuration a case's name stands for: "frozen", "lora" (alpha = 2R) or "glora:<A>,<B>,<C>,<D>,<E>"."""
    if case == "lora":
        return GLoRAConfig.lora(rank=rank, alpha=2 * rank, dropout=dropout)
    forms = ["none"] * 5 if case == "frozen" else case.removeprefix("glora:").split(",")
    return GLoRAConfig.of(forms, rank=rank, dropout=dropout)


def normal(generator: torch.Generator, dtype: torch.dtype, *size: int, std: float = 1.0) -> Tensor:
    """N(0, std²) where the generator is."""
    return torch.randn(*size, generator=generator, device=generator.device).mul_(std).to(dtype)


def random_inputs(entry: Entry, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One x, which requires a gradient, and one dy, both N(0,1)."""
    x, dy = (normal(generator, DTYPES[entry.dtype], entry.m, size) for size in (entry.k, entry.n))
    return x.requires_grad_(), dy


def std_of(name: str, k: int) -> float:
    """The standard deviation of a support, with which it changes W by some hundredths, as training does.

    A vector or constant B is added to every weight of a row, so it is that much of the weights' own size, K^-½.
    """
    return STD * k**-0.5 if name == "B" else STD


def adapter_values(entry: Entry, config: GLoRAConfig, device: Any, seed: int = 2) -> dict[str, Tensor]:
    """The supports of a configuration, of a set those of each member: the same for the same shapes."""
    found = {}
    for i, width in enumerate(entry.widths or (entry.n,)):
        generator = torch.Generator(device).manual_seed(seed + i)
        for name, size in config.parameter_shapes(entry.k, width, entry.bias).items():
            value = normal(generator, DTYPES[entry.dtype], *size, std=std_of(name, entry.k))
            found[f"{name}.{i}" if entry.widths else name] = value
    return found


def make_problem(entry: Entry, device: Any = "cpu", config: GLoRAConfig | None = None, seed: int = 0) -> Problem:
    """Random values: x and dy ~ N(0,1), W ~ N(0,1/K), b ~ N(0, 0.02²), every support by `std_of`.

    config: where the entry's case has no name for it.
    """
    generator, dtype = torch.Generator(device).manual_seed(seed), DTYPES[entry.dtype]
    config = case_config(entry.adapter, entry.r or 1, entry.p or 0.0) if config is None else config
    x, dy = random_inputs(entry, generator)
    weight = normal(generator, dtype, entry.n, entry.k, std=entry.k**-0.5)
    bias = normal(generator, dtype, entry.n, std=STD) if entry.bias else None
    return Problem(entry, config, x, dy, weight, bias, adapter_values(entry, config, device, seed + 2))


def quantized(problem: Problem) -> Problem:
    """The problem on a 4-bit base (NF4, blocks of 64, double quantization); its weight is the one decoded again."""
    layer = gk.quantize(base_layer(problem), "nf4", double_quant=True)
    assert isinstance(layer, QuantizedLinear)
    return replace(problem, weight=layer.to_linear(problem.weight.dtype).weight.detach(), base=layer)


def base_layer(problem: Problem) -> nn.Module:
    """The frozen layer: the problem's own, or an nn.Linear that shares its weight and bias."""
    if problem.base is not None:
        return problem.base
    n, k = problem.weight.shape
    linear = nn.Linear(k, n, bias=problem.bias is not None, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        linear.bias = nn.Parameter(problem.bias, requires_grad=False)
    return linear


def held_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and of a 4-bit base of either library what its quantization state holds."""
    found = [*module.parameters(), *module.buffers()]
    one: Any
    for one in module.modules():
        state = getattr(one, "quant_state", None)
        found += [*([one.weight] if isinstance(state, QuantState) else []), *_state_tensors(state)]
    return found


def _state_tensors(state: Any) -> list[Tensor]:
    if state is None or isinstance(state, QuantState):
        return [] if state is None else list(state.tensors())
    values = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    return [value for value in values if isinstance(value, Tensor)] + _state_tensors(getattr(state, "state2", None))


def tensor_bytes(tensors: list[Tensor]) -> int:
    """Each piece of memory once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Values:
    """The tensors of one group: a problem without an adapter, and the input sets that are rotated."""

    def __init__(self, entries: Sequence[Entry], device: Device) -> None:
        self.device, where = device, device.torch_device
        first = replace(entries[0], case="frozen", r=None, p=None, bias=any(entry.bias for entry in entries), widths=())
        self.problem = make_problem(first, where)
        generator = torch.Generator(where).manual_seed(1)
        count = device.sets(self.problem.x.nbytes + self.problem.dy.nbytes)
        self._sets: list[tuple[Tensor, Any]] = [(self.problem.x, self.problem.dy)]
        self._sets += [random_inputs(first, generator) for _ in range(count - 1)]
        self._pieces: list[tuple[Tensor, Any]] = []
        self._quantized: dict[bool, Problem] = {}
        self._expected: dict[tuple[Any, ...], Expected] = {}

    def of(self, entry: Entry) -> Problem:
        """The problem of an entry: the shared base and input, and adapter values that only its configuration sets."""
        base = replace(self.problem, bias=self.problem.bias if entry.bias else None)
        if entry.quantized:
            if entry.bias not in self._quantized:
                self._quantized[entry.bias] = quantized(base)
            base = self._quantized[entry.bias]
        config = case_config(entry.adapter, entry.r or 1, entry.p or 0.0)
        return replace(base, entry=entry, config=config, params=adapter_values(entry, config, base.x.device))

    def copies(self, entry: Entry) -> list[Problem]:
        """The same problem; of a step of generation more of them than the device's cache holds, each base in memory of
        its own."""
        problem = self.of(entry)
        if not entry.decode:
            return [problem]
        stored = tensor_bytes([problem.weight] if problem.base is None else held_tensors(problem.base))
        found = [problem]
        for _ in range(self.device.layers(stored) - 1):
            own = {"weight": problem.weight.clone()} if problem.base is None else {"base": copy.deepcopy(problem.base)}
            found.append(replace(problem, **own))
        return found

    def inputs(self, contestant: Contestant, entry: Entry) -> list[tuple[Tensor, Any]]:
        """(x, dy) of every input set, dy in the pieces of the contestant's y."""
        if not entry.widths or contestant.joined:
            return self._sets
        if not self._pieces:
            self._pieces = [(x, pieces(dy, entry)) for x, dy in self._sets]
        return self._pieces

    def expected(self, problem: Problem) -> Expected:
        """What is right without dropout, computed once for all that compute it."""
        entry = problem.entry
        key = (entry.adapter, entry.r, entry.bias, entry.quantized)
        if key not in self._expected:
            self._expected[key] = expectations(problem)
        return self._expected[key]

    def owned(self, entry: Entry) -> list[Tensor]:
        """What exists of an entry whether or not it runs."""
        problem = self.of(entry)
        state = [] if problem.base is None else held_tensors(problem.base)
        return [problem.weight, *([] if problem.bias is None else [problem.bias]), *problem.params.values(), *state]

    def forget(self) -> None:
        """Drop the float64 results, which are large."""
        self._expected.clear()


def pieces(dy: Tensor, entry: Entry) -> tuple[Tensor, ...]:
    """dy of a set as one for each member, in memory of its own."""
    return tuple(part.contiguous() for part in dy.split(list(entry.widths), dim=1))


def literal(problem: Problem, dtype: torch.dtype, keep: Tensor | None = None) -> dict[str, Tensor]:
    """y and every gradient of the literal formula; of a set also those of each factor alone and with its siblings'."""
    if not problem.entry.widths:
        values = (problem.x, problem.weight, problem.bias, problem.params, problem.config, problem.dy)
        return literal_step(*values, dtype, keep)
    steps = [literal(one, dtype) for one in problem.members()]
    found = {"y": torch.cat([step["y"] for step in steps], dim=1), "dx": sum(step["dx"] for step in steps)}
    for name in (name for name in steps[0] if name not in ("y", "dx")):
        found |= {f"{name}.{i}": step[name] for i, step in enumerate(steps)}
        found[name] = torch.cat([step[name] for step in steps])
    return found  # type: ignore[return-value]


def expectations(problem: Problem, keep: Tensor | None = None) -> Expected:
    """The literal formula in float64, and by the project's one tolerance what may differ from it.

    Everything is compared, on the device it lives on: float64 products of the largest layer take a data-centre card a
    fraction of a second, and a sample of rows and columns would leave tiles unseen. keep: the dropout mask.
    """
    dtype = problem.weight.dtype
    exact, plain = literal(problem, torch.float64, keep), literal(problem, dtype, keep)
    return {name: (value, allowed_error(value, plain[name], dtype)) for name, value in exact.items()}


def dropout_expectations(problem: Problem) -> Expected:
    """The same under the mask that the next call of ours draws from the generators as they are now."""
    x = problem.x
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # the key is drawn on the host, or on a card
        seed = dropout_seed(x.device)
    return expectations(problem, keep_mask(seed.to(x.device), x.shape[0], x.shape[1], problem.config.dropout))


def gradients(contestant: Contestant, x: Tensor, dy: Any) -> tuple[Any, dict[str, Tensor]]:
    """y, and the gradients of x and of every trainable tensor ("x" and the names of `params`).

    `torch.autograd.grad` hands them over as they are: nothing is accumulated into `.grad`.
    """
    inputs = {"x": x, **contestant.params}
    y = contestant.forward(x)
    return y, dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))


def check(contestant: Contestant, problem: Problem, expected: Expected | None = None) -> float:
    """Compare y, dx and every adapter gradient with float64; the largest error over the largest value.

    Raises:
        AssertionError: something is off by more than twice the literal formula at the same dtype and a small floor.
    """
    entry = problem.entry
    dy = pieces(problem.dy, entry) if entry.widths and not contestant.joined else problem.dy
    y, found = gradients(contestant, problem.x, dy)
    results = {"y": joined(y).detach()} | {f"d{name}": value for name, value in found.items()}
    return compare(str(entry), results, expectations(problem) if expected is None else expected)


def joined(y: Any) -> Tensor:
    """What a forward gave as one tensor."""
    return y if isinstance(y, Tensor) else torch.cat(tuple(y), dim=1)


def compare(what: str, results: Mapping[str, Tensor], expected: Expected) -> float:
    """The largest error of the results over the largest value of each; raises as `check`."""
    worst = 0.0
    for name, value in results.items():
        exact, limit = expected[name]
        error = largest_error(value.reshape(exact.shape), exact)
        size = max(float(exact.abs().max()), torch.finfo(torch.float64).tiny)
        if not error <= limit:
            raise AssertionError(
                f"{what}: {name} is off by {error / size:.3g} of its largest value, "
                f"more than {limit / size:.3g} (twice the literal formula in the same dtype and a floor)"
            )
        worst = max(worst, error / size)
    return worst


@torch.no_grad()
def copy_values(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write the values into parameters of the same names."""
    if set(params) != set(values):
        raise AssertionError(f"parameters {sorted(params)} cannot take the values of {sorted(values)}")
    for name, parameter in params.items():
        parameter.copy_(values[name].reshape(parameter.shape))
