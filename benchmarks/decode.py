"""A step of generation: a few tokens through one copy of the layer after the other, forward without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, peers
from benchmarks.battery import DecodeEntry
from benchmarks.cases import Contestant
from benchmarks.devices import Call, Device
from benchmarks.floor import BYTES, Ceilings, packed_bytes
from benchmarks.values import Values


@dataclass
class DecodeContestant(Contestant):
    """A contestant that runs without gradients; `layers` holds what its steps call in turn, the first included."""

    layers: list[Callable[[Tensor], Any]] = field(default_factory=list)


def check_entry(entry: DecodeEntry, values: Values) -> tuple[DecodeContestant, float]:
    """Build every copy, and compare y of the first with float64; the largest error over the largest value.

    Raises:
        AssertionError: it is not right.
        Unavailable: it cannot be built here.
    """
    problems = values.copies(entry)
    layers = [ungraded(peers.build(entry, problem).forward) for problem in problems]
    found = DecodeContestant(entry.case, entry.impl, layers[0], {}, layers)
    expected = {"y": values.expected(entry, problems[0])["y"]}
    error = cases.compare(f"{found.name}, {problems[0].shape}", {"y": found.forward(problems[0].x)}, expected)
    return found, error


def ungraded(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same without gradients."""

    def call(x: Tensor) -> Any:
        with torch.no_grad():
            return forward(x)

    return call


def steps(contestant: DecodeContestant, values: Values) -> list[Call]:
    """One call for each copy of the layer."""
    sets = [x for x, _ in values.inputs(contestant)]

    def step(layer: Callable[[Tensor], Any], x: Tensor) -> Call:
        return lambda: layer(x)

    return [step(layer, sets[i % len(sets)]) for i, layer in enumerate(contestant.layers)]


def facts(contestant: DecodeContestant, values: Values, device: Device) -> dict[str, Any]:
    """What is counted of one forward; nothing is kept for a backward."""
    step = steps(contestant, values)[0]
    found: dict[str, Any] = {"saved_bytes": 0, "held_bytes": None, "peak_fwd": device.peak_bytes(step)}
    found["host_us"] = device.host_us(step)
    try:
        found["launches"] = device.launches(step)
    except RuntimeError as reason:  # a profiler that another tool holds must not cost the row
        found["launches_error"] = str(reason)[:200]
    return found


def bandwidth(entry: DecodeEntry, seconds: float, ceilings: Ceilings) -> dict[str, float]:
    """The weight's bytes over the time, of a 4-bit weight its codes; and that over the bandwidth of a copy."""
    dense = entry.n * entry.k * BYTES[entry.dtype]
    stored = packed_bytes(entry.n, entry.k) if entry.case.startswith("nf4-") else dense
    gbps = stored / seconds / 1e9
    return {"weight_gbps": gbps, "weight_of_copy": gbps / ceilings.gbps}
