"""Sets of layers that read one input, over the same weights and values, as every contestant computes them.

The set's weights are the rows of one matrix, W (ΣN, K): what takes the concatenation takes it whole, the others their
rows of it. `check_entry` compares y, dx and every gradient with float64, as for single layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cases
from benchmarks.battery import Entry, SiblingEntry
from benchmarks.cases import Contestant, Expected, Problem, Shape
from benchmarks.devices import Device
from benchmarks.peers import Unavailable
from glora_kernels import GLoRAConfig
from glora_kernels.grouped import op as grouped
from glora_kernels.reference.tolerance import allowed_error, literal_step

Grads = tuple[Tensor, tuple[Tensor, ...]]
"""dy of a set: (M, ΣN) in one piece, and (M, N) of each member in memory of its own."""


@dataclass
class SiblingContestant(Contestant):
    """A contestant whose forward gives one y for each member, or where `joined` one (M, ΣN)."""

    joined: bool = False


@dataclass
class SiblingValues:
    """The values of one set: W and the members' rows of it, their factors, and the input sets that are rotated."""

    shape: Shape
    config: GLoRAConfig
    weight: Tensor
    weights: list[Tensor]
    downs: list[Tensor]
    ups: list[Tensor]
    sets: list[tuple[Tensor, Grads]]
    _expected: dict[str, Expected] = field(default_factory=dict)

    @property
    def widths(self) -> list[int]:
        return [len(weight) for weight in self.weights]

    def inputs(self, contestant: Contestant) -> list[tuple[Tensor, Any]]:
        """(x, dy) of every input set, dy in the pieces of the contestant's y."""
        joined = isinstance(contestant, SiblingContestant) and contestant.joined
        return [(x, whole if joined else parts) for x, (whole, parts) in self.sets]

    def owned(self, entry: Entry) -> list[Tensor]:
        """What exists whether or not a contestant runs."""
        return [self.weight, *self.downs, *self.ups]

    def member(self, i: int) -> Problem:
        """One layer of the set by itself."""
        x, (_, dys) = self.sets[0]
        params = {"B_up": self.ups[i], "B_down": self.downs[i]}
        shape = replace(self.shape, n=len(self.weights[i]))
        return Problem(shape, self.config, x, dys[i], self.weights[i], None, params)

    def expected(self, entry: SiblingEntry) -> Expected:
        """What is right, and how far off it may be; computed once for all frozen contestants and once for LoRA."""
        if entry.adapter not in self._expected:
            self._expected[entry.adapter] = _expectations(self, entry.frozen)
        return self._expected[entry.adapter]

    def forget(self) -> None:
        """Drop the float64 results, which are large."""
        self._expected.clear()


def make_values(entries: Sequence[SiblingEntry], device: Device) -> SiblingValues:
    """Random values on the device for the entries of one group, which have one rank: x and dy ~ N(0,1), W ~ N(0,1/K),
    factors ~ N(0, 0.02²)."""
    entry = entries[0]
    where, dtype = str(device.torch_device), cases.DTYPES[entry.dtype]
    (rank,) = {other.r for other in entries if other.r is not None} or {1}
    shape = Shape(entry.m, entry.k, entry.n, rank, dtype, where)
    generator = torch.Generator(where).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=where).mul_(std).to(dtype)

    weight = normal(entry.n, entry.k, std=entry.k**-0.5)
    downs = [normal(rank, entry.k, std=cases.STD) for _ in entry.widths]
    ups = [normal(n, rank, std=cases.STD) for n in entry.widths]
    count = device.sets(weight.element_size() * entry.m * (entry.k + entry.n))
    sets = []
    for _ in range(count):
        x, dy = normal(entry.m, entry.k).requires_grad_(), normal(entry.m, entry.n)
        sets.append((x, (dy, tuple(part.contiguous() for part in dy.split(list(entry.widths), dim=1)))))
    config = cases.case_config("lora", rank)
    return SiblingValues(shape, config, weight, list(weight.split(list(entry.widths))), downs, ups, sets)


def build(entry: SiblingEntry, values: SiblingValues) -> SiblingContestant:
    """The contestant of an entry, with the set's values.

    Raises:
        Unavailable: it cannot be built here.
    """
    builders: dict[tuple[str, str], Callable[[SiblingValues], SiblingContestant]] = {
        ("frozen", "concat"): _concat_frozen, ("frozen", "eager"): _loop_frozen,
        ("lora", "ours"): _ours, ("lora", "single"): _single, ("lora", "eager"): _loop,
        ("lora", "grouped_mm"): _grouped_mm, ("lora", "concat"): _concat, ("lora", "peft"): _peft,
    }  # fmt: skip
    try:
        found = builders[entry.adapter, entry.impl](values)
    except ImportError as reason:
        raise Unavailable(f"{type(reason).__name__}: {reason}") from reason
    found.case, found.impl = entry.case, entry.impl
    return found


def check_entry(entry: SiblingEntry, values: SiblingValues) -> tuple[SiblingContestant, float]:
    """A contestant, and its largest relative error on the first input set.

    Raises:
        AssertionError: it is not right.
        Unavailable: it cannot be built here.
    """
    contestant = build(entry, values)
    x, dy = values.inputs(contestant)[0]
    y, found = cases.gradients(contestant, x, dy)
    y = y if isinstance(y, Tensor) else torch.cat(tuple(y), dim=1)
    results = {"y": y.detach()} | {f"d{name}": value for name, value in found.items()}
    return contestant, cases.compare(str(entry), results, values.expected(entry))


def _expectations(values: SiblingValues, frozen: bool) -> Expected:
    """Of y, dx and the gradient of every factor, alone ("dB_up.1") and with its siblings' ("dB_up")."""
    config = cases.case_config("frozen", 1) if frozen else values.config
    dtype = values.shape.dtype
    exact, plain = (_literal(values, config, frozen, at) for at in (torch.float64, dtype))
    return {name: (value, allowed_error(value, plain[name], dtype)) for name, value in exact.items()}


def _literal(values: SiblingValues, config: GLoRAConfig, frozen: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    steps = []
    for i in range(len(values.weights)):
        one = values.member(i)
        steps.append(literal_step(one.x, one.weight, None, {} if frozen else one.params, config, one.dy, dtype))
    found = {"y": torch.cat([step["y"] for step in steps], dim=1)}
    found["dx"] = sum((step["dx"] for step in steps[1:]), steps[0]["dx"])
    for name in () if frozen else ("dB_up", "dB_down"):
        found |= {f"{name}.{i}": step[name] for i, step in enumerate(steps)}
        found[name] = torch.cat([step[name] for step in steps])
    return found


def _concat_frozen(values: SiblingValues) -> SiblingContestant:
    """One product over the concatenated weights: the least that a set can take."""
    return SiblingContestant("", "", lambda x: F.linear(x, values.weight), joined=True)


def _loop_frozen(values: SiblingValues) -> SiblingContestant:
    return SiblingContestant("", "", lambda x: [F.linear(x, weight) for weight in values.weights])


def _ours(values: SiblingValues) -> SiblingContestant:
    downs, ups, params = _own_factors(values)
    scale = values.config.scale

    def forward(x: Tensor) -> list[Tensor]:
        return grouped.grouped_lora_linear(x, values.weights, downs, ups, scales=scale)

    return SiblingContestant("", "", forward, params)


def _single(values: SiblingValues) -> SiblingContestant:
    """`GLoRALinear`, layer by layer."""
    return _each([cases.ours(values.member(i)) for i in range(len(values.weights))])


def _peft(values: SiblingValues) -> SiblingContestant:
    return _each([cases.peft(values.member(i)) for i in range(len(values.weights))])


def _each(layers: Sequence[Contestant]) -> SiblingContestant:
    params = {f"{name}.{i}": value for i, layer in enumerate(layers) for name, value in layer.params.items()}
    return SiblingContestant("", "", lambda x: [layer.forward(x) for layer in layers], params)


def _loop(values: SiblingValues) -> SiblingContestant:
    """Single operations, layer by layer: base, A, B, scale, add."""
    downs, ups, params = _own_factors(values)
    scale = values.config.scale

    def forward(x: Tensor) -> list[Tensor]:
        found = []
        for weight, down, up in zip(values.weights, downs, ups, strict=True):
            found.append(F.linear(x, weight) + scale * F.linear(F.linear(x, down), up))
        return found

    return SiblingContestant("", "", forward, params)


def _concat(values: SiblingValues) -> SiblingContestant:
    """The base and the A of all members as one product each, then B of each member added to its columns."""
    _, ups, params = _own_factors(values)
    down = torch.cat(values.downs).requires_grad_()
    params = {"B_down": down} | {name: value for name, value in params.items() if name.startswith("B_up")}
    widths, ranks, scale = values.widths, [len(own) for own in values.downs], values.config.scale

    def forward(x: Tensor) -> list[Tensor]:
        base, low = F.linear(x, values.weight).split(widths, dim=1), F.linear(x, down).split(ranks, dim=1)
        return [torch.addmm(b, h, up.t(), alpha=scale) for b, h, up in zip(base, low, ups, strict=True)]

    return SiblingContestant("", "", forward, params)


def _grouped_mm(values: SiblingValues) -> SiblingContestant:
    """Three grouped products, base, A and B: x of every member times its own columns of one right operand."""
    if not hasattr(F, "grouped_mm"):
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    down, up = torch.cat(values.downs).requires_grad_(), torch.cat(values.ups).requires_grad_()
    members, rank, scale = len(values.weights), values.shape.r, values.config.scale
    ends = torch.tensor(values.widths, device=values.weight.device).cumsum(0).to(torch.int32)
    rank_ends = torch.arange(rank, (members + 1) * rank, rank, device=values.weight.device, dtype=torch.int32)

    def forward(x: Tensor) -> Tensor:
        repeated = x.expand(members, *x.shape)
        low = F.grouped_mm(repeated, down.t(), offs=rank_ends).view(len(x), members, rank).transpose(0, 1)
        base = F.grouped_mm(repeated, values.weight.t(), offs=ends)
        return base + scale * F.grouped_mm(low, up.t(), offs=ends)

    return SiblingContestant("", "", forward, {"B_down": down, "B_up": up}, joined=True)


def _own_factors(values: SiblingValues) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Trainable copies of the factors, and both by name."""
    downs = [down.clone().requires_grad_() for down in values.downs]
    ups = [up.clone().requires_grad_() for up in values.ups]
    params = {f"B_down.{i}": down for i, down in enumerate(downs)} | {f"B_up.{i}": up for i, up in enumerate(ups)}
    return downs, ups, params
