"""The tensors of one group: a problem without an adapter, and the input sets that are rotated."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, quantized_peers
from benchmarks.battery import DecodeEntry, Entry
from benchmarks.cases import Contestant, Expected, Problem, Shape
from benchmarks.devices import Device
from glora_kernels.quant import QuantState


@dataclass
class Values:
    """The tensors of one group.

    device: what they are on; it says how many copies of a layer the steps of a `DecodeEntry` read in turn.
    """

    problem: Problem
    sets: list[tuple[Tensor, Tensor]]
    device: Device
    _quantized: dict[bool, Problem] = field(default_factory=dict)
    _expected: dict[tuple[Any, ...], Expected] = field(default_factory=dict)

    def of(self, entry: Entry, p: float | None = None) -> Problem:
        """The problem of an entry: the shared base and input, and adapter values that only its configuration sets."""
        base = self.problem
        if entry.case.startswith("nf4-"):
            if entry.bias not in self._quantized:
                plain = base if entry.bias else replace(base, bias=None)
                self._quantized[entry.bias] = quantized_peers.quantized(plain)
            base = self._quantized[entry.bias]
        shape = replace(base.shape, r=entry.r or 1)
        config = cases.case_config(entry.adapter, shape.r, (entry.p or 0.0) if p is None else p)
        params = cases.adapter_values(shape, config, entry.bias)
        return replace(base, shape=shape, config=config, bias=base.bias if entry.bias else None, params=params)

    def copies(self, entry: Entry) -> list[Problem]:
        """The same problem, the base in memory of its own each time: more of them than the device's cache holds."""
        problem = self.of(entry)
        stored = problem.weight.nbytes if problem.base is None else _state_bytes(problem)
        count = self.device.layers(stored) if isinstance(entry, DecodeEntry) else 1
        return [problem, *(_copied(problem) for _ in range(count - 1))]

    def expected(self, entry: Entry, problem: Problem) -> Expected:
        """What is right without dropout, computed once for all that compute it."""
        key = (entry.adapter, entry.r, entry.bias, problem.base is not None)
        if key not in self._expected:
            self._expected[key] = cases.expectations(problem)
        return self._expected[key]

    def inputs(self, contestant: Contestant) -> list[tuple[Tensor, Any]]:
        """(x, dy) of every input set."""
        return list(self.sets)

    def owned(self, entry: Entry) -> list[Tensor]:
        """What the base of an entry holds whether or not it runs."""
        base = self.of(entry)
        modules = [] if base.base is None else [*base.base.parameters(), *base.base.buffers(), *_state(base)]
        return [base.weight, *([] if base.bias is None else [base.bias]), *modules]

    def forget(self) -> None:
        """Drop the float64 results, which are large."""
        self._expected.clear()


def shared_values(entries: list[Entry], device: Device) -> Values:
    """Random values on the device for entries of one shape."""
    first = entries[0]
    shape = Shape(first.m, first.k, first.n, 1, cases.DTYPES[first.dtype], str(device.torch_device))
    problem = cases.make_problem(shape, cases.case_config("frozen", 1), any(entry.bias for entry in entries))
    generator = torch.Generator(shape.device).manual_seed(1)
    sets = [(problem.x, problem.dy)]
    for _ in range(device.sets(problem.x.nbytes + problem.dy.nbytes) - 1):
        sets.append(cases.random_inputs(shape, generator))
    return Values(problem, sets, device)


def _copied(problem: Problem) -> Problem:
    if problem.base is None:
        return replace(problem, weight=problem.weight.clone())
    return replace(problem, base=copy.deepcopy(problem.base))


def _state(problem: Problem) -> tuple[Tensor, ...]:
    """The codes of a 4-bit base of ours, which are no parameters, and what stands beside them."""
    base: Any = problem.base
    state = getattr(base, "quant_state", None)
    return (base.weight, *state.tensors()) if isinstance(state, QuantState) else ()


def _state_bytes(problem: Problem) -> int:
    assert problem.base is not None
    return sum(tensor.nbytes for tensor in (*problem.base.parameters(), *_state(problem)))
