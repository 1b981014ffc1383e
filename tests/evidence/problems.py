"""Problems in one shape: `ours(route)` gives named results, `check(found, route)` holds them to float64.

They are made of the problems of the operators' own tests. `on` moves one to another device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import adapters
import groups
import helpers
import routed
import torch
from depth import test_over_depth as over_depth
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels import reference
from glora_kernels.depth.deferred import Deferred
from glora_kernels.quant import QuantizedWeight
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime.routes import backend

Results = dict[str, Tensor]


def on(device: str, problem: Any) -> Any:
    """A problem on a device, as it was: what is shared stays so, and what wants a gradient."""
    known: dict[int, Tensor] = {}

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = value.detach().to(device).requires_grad_(value.requires_grad)
            return known[id(value)]
        if isinstance(value, QuantizedWeight):
            return QuantizedWeight(value.packed.to(device), value.state.to(device))
        if isinstance(value, list):
            return [moved(one) for one in value]
        if isinstance(value, tuple):
            return type(value)(*map(moved, value)) if hasattr(value, "_fields") else tuple(map(moved, value))
        if isinstance(value, dict):
            return {name: moved(one) for name, one in value.items()}
        if dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
            fields = (field.name for field in dataclasses.fields(value) if field.name != "truth")
            return dataclasses.replace(value, **{name: moved(getattr(value, name)) for name in fields})  # type: ignore[type-var]
        return value

    return moved(problem)


@dataclass
class Layer:
    """One layer. codes: in the place of the weight, which is what they stand for. inside: where it is called."""

    problem: helpers.Problem
    codes: QuantizedWeight | None = None
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext

    def ours(self, route: str) -> Results:
        problem = self.problem if self.codes is None else dataclasses.replace(self.problem, weight=self.codes)
        with self.inside():
            found = helpers.ours(problem, route)
        return {name: value for name, value in found.items() if value is not None}

    def check(self, found: Results, route: str) -> None:
        helpers.check(self.problem, {name: found.get(name) for name in ("y", *self.problem.leaves())}, route)


@dataclass
class Group:
    problem: groups.Group

    def ours(self, route: str) -> Results:
        return self.problem.ours(route)

    def check(self, found: Results, route: str) -> None:
        self.problem.check(found, self.problem.xs[0].dtype)


@dataclass
class Rows:
    """Rows of many adapters or of experts. truth: the same over a dense weight, where that of `problem` is in codes."""

    problem: adapters.Mixed | routed.Routed
    truth: adapters.Mixed | routed.Routed | None = None

    def ours(self, route: str) -> Results:
        with backend(route):
            return self.problem.ours()

    def check(self, found: Results, route: str) -> None:
        truth = self.truth or self.problem
        truth.check(found, truth.x.dtype)


@dataclass
class Model:
    """Layers merged in one launch and given their base back in another, then run with β of all made at once."""

    problems: list[helpers.Problem]

    def ours(self, route: str) -> Results:
        model = nn.ModuleList(_layer(p) for p in self.problems)
        xs, found = [p.x.detach().requires_grad_() for p in self.problems], {}
        with backend(route):
            gk.merge(model)
            for i, layer in enumerate(model):
                found |= {f"{i}.merged": layer.weight.clone(), f"{i}.merged bias": layer.bias.detach().clone()}
            gk.unmerge(model)
            with gk.shift_once(model):
                ys = [layer(x) for layer, x in zip(model, xs, strict=True)]
            torch.autograd.backward(ys, [p.dy for p in self.problems])
        for i, (layer, x, y) in enumerate(zip(model, xs, ys, strict=True)):
            found |= {f"{i}.restored": layer.weight.detach(), f"{i}.y": y.detach(), f"{i}.x": x.grad}
            found |= {f"{i}.{name}": t.grad for name, t in layer.adapter().items()}
        return found

    def check(self, found: Results, route: str) -> None:
        for i, p in enumerate(self.problems):
            assert torch.equal(found[f"{i}.restored"], p.weight), f"layer {i} has another base than before"
            exact, plain = _effective(p, torch.float64), _effective(p, torch.float32)
            for name, true, near in zip((f"{i}.merged", f"{i}.merged bias"), exact, plain, strict=True):
                error, allowed = largest_error(found[name], true), allowed_error(true, near.to(p.x.dtype), p.x.dtype)
                assert error <= allowed, f"{name}: error {error:.3e} over {allowed:.3e}"
            helpers.check(p, {name: found.get(f"{i}.{name}") for name in ("y", *p.leaves())}, route)


@dataclass
class Shared:
    """The gradients of factors that layers share: whether it is an up, and what it is summed of."""

    factors: list[tuple[bool, list[Any]]]

    def ours(self, route: str) -> Results:
        deferred, parameters = Deferred(), []
        for is_up, products in self.factors:
            rank, cols = products[0].left.shape[1], products[0].right.shape[1]
            shape = (cols, rank) if is_up else (rank, cols)
            parameters.append(
                nn.Parameter(torch.zeros(shape, dtype=products[0].left.dtype, device=products[0].left.device))
            )
            for place, product in enumerate(products):
                deferred.add(parameters[-1], place, product, is_up, triton=route == "triton")
        return {f"factor {i}": grad for i, grad in enumerate(deferred.gradients(parameters)) if grad is not None}

    def check(self, found: Results, route: str) -> None:
        assert len(found) == len(self.factors)
        for i, (is_up, products) in enumerate(self.factors):
            dtype = products[0].left.dtype
            exact, plain = (over_depth.true_sum(products, t) for t in (torch.float64, dtype))
            error = largest_error(found[f"factor {i}"], exact.t() if is_up else exact)
            assert error <= allowed_error(exact, plain, dtype), f"factor {i}: error {error:.3e}"


def _layer(p: helpers.Problem) -> gk.GLoRALinear:
    n, k = p.weight.shape
    linear = nn.Linear(k, n, dtype=p.weight.dtype, device="meta")
    linear.weight, linear.bias = nn.Parameter(p.weight.clone()), nn.Parameter(p.bias.clone())  # type: ignore[union-attr]
    layer = gk.GLoRALinear.from_linear(linear, p.config)
    with torch.no_grad():
        for name, parameter in layer.adapter().items():
            parameter.copy_(p.params[name])
    return layer


def _effective(p: helpers.Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, params = p.weight.to(dtype), {name: t.to(dtype) for name, t in p.params.items()}
    bias = reference.effective_bias(weight, p.bias.to(dtype), params, p.config)  # type: ignore[union-attr]
    return reference.effective_weight(weight, params, p.config), bias
