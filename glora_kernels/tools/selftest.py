"""`python -m glora_kernels check`: every kernel on this machine against the oracle, in about a minute."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from glora_kernels.glora import op as operator
from glora_kernels.nn import GLoRALinear
from glora_kernels.reference.cases import AWKWARD
from glora_kernels.reference.random import keep_mask
from glora_kernels.reference.tolerance import Judged, judge, largest_error, literal_step, literal_terms, unlucky_error
from glora_kernels.runtime import routes
from glora_kernels.runtime.progress import progress
from glora_kernels.spec import CHOICES, GLoRAConfig

SHAPES = ((*AWKWARD[0][0], *AWKWARD[0][1:]), (64, 128, 96, 16))
"""(M, K, N, R): a shape that no block divides, and one that all divide."""

_SERVED_BY = {
    "y": "_glora_fwd_kernel", "dx": "_glora_dx_kernel", "dA_up": "_hadamard_grad_kernel",
    "dA_down": "_hadamard_grad_kernel", "dA": "_finish_kernel", "dB": "_dy_kernel", "dB_up": "_dy_kernel",
    "dB_down": "_x_kernel", "dC": "_wc_grad_kernel", "dC_up": "_c_grad_kernel", "dC_down": "_c_grad_kernel",
    "dbias": "_dy_kernel", "dD": "_dy_kernel", "dE": "_dy_kernel",
}  # fmt: skip
"""The kernel that does most of the work for a result. `_finish_kernel` adds up the partial sums of most gradients."""


class Case(NamedTuple):
    """A forward and backward of one layer of (N,K) on x (M,K)."""

    route: routes.Backend
    device: str
    dtype: torch.dtype
    config: GLoRAConfig
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        config = self.config
        return f"A={config.A} B={config.B} {config.variant} M={self.m} K={self.k} N={self.n} R={config.rank}"


@dataclass
class Row:
    """The worst case of one result. `worst`: its error over the allowed error, so 1 is the limit."""

    route: routes.Backend
    dtype: str
    result: str
    kernel: str
    cases: int = 0
    worst: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    case: str = ""

    @property
    def passed(self) -> bool:
        return self.worst <= 1.0


def configurations() -> list[GLoRAConfig]:
    """All 16 (A, B) pairs with C, D and E in turn, dropout where B is lora, and the product variant."""
    rest = (("lora", "vector", "constant"), ("vector", "constant", "vector"), ("none", "none", "none"))
    pairs = itertools.product(CHOICES["A"], CHOICES["B"])
    found = [GLoRAConfig.of((a, b, *rest[i % 3]), alpha=6.0, dropout=0.25 * (i % 2)) for i, (a, b) in enumerate(pairs)]
    return [*found, GLoRAConfig("lora", "lora", variant="matmul"), GLoRAConfig("lora", "none", variant="matmul")]


def run(device: str, route: routes.Backend, dtypes: list[torch.dtype], show: bool = False) -> list[Row]:
    """The rows of one route on one device: one for each dtype, result and kernel."""
    rows: dict[tuple[str, str], Row] = {}
    shapes = SHAPES[:1] if device == "cpu" and route == "triton" else SHAPES  # the interpreter is slow
    cases = list(itertools.product(dtypes, configurations(), shapes))
    for dtype, config, (m, k, n, r) in progress(cases, route, show):
        config = GLoRAConfig.from_dict(config.to_dict() | {"rank": r})
        _try(Case(route, device, dtype, config, m, k, n), rows)
    return list(rows.values())


def _layer_and_inputs(case: Case) -> tuple[GLoRALinear, torch.Tensor, torch.Tensor]:
    """The layer, x and dy of a case, the same random numbers each time."""
    _, device, dtype, config, m, k, n = case
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device, dtype)

    layer = GLoRALinear(k, n, config, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(random(n, k, std=k**-0.5))
        assert layer.bias is not None
        layer.bias.copy_(random(n))
        for name, parameter in layer.adapter().items():
            # B is added to W and must be of its size: a larger one would drown W∘(1+A) in y.
            parameter.copy_(random(*parameter.shape, std=0.3 * (k**-0.5 if name == "B" else 1.0)))
    layer.bias.requires_grad_()
    return layer, random(m, k).requires_grad_(), random(m, n)


def _try(case: Case, rows: dict[tuple[str, str], Row]) -> None:
    """Run a case and note its results in the rows."""
    (layer, x, dy), dtype, config = _layer_and_inputs(case), case.dtype, case.config
    before = torch.random.get_rng_state()
    with routes.backend(case.route):
        y = layer(x)
        y.backward(dy)
    ours = {"y": y, "dx": x.grad, "dbias": None if layer.bias is None else layer.bias.grad}
    ours |= {f"d{name}": parameter.grad for name, parameter in layer.adapter().items()}

    keep = None
    if config.dropout and config.B == "lora":
        torch.random.set_rng_state(before)
        keep = keep_mask(operator.dropout_seed(x.device).to(x.device), case.m, case.k, config.dropout)
    step = (x, layer.weight, layer.bias, layer.adapter(), config)
    truth = literal_step(*step, dy, torch.float64, keep)
    literal = truth if dtype == torch.float64 else literal_step(*step, dy, dtype, keep)
    terms = literal_terms(*step, dy, keep)
    for name, value in ours.items():
        assert value is not None

        def of_literal(dy: torch.Tensor, name: str = name) -> float:
            exact, plain = (literal_step(*step, dy, kind, keep)[name] for kind in (torch.float64, dtype))
            return largest_error(plain, exact)

        judged = judge(
            value, truth[name], literal[name], terms[name], torch.finfo(dtype).eps,
            functools.partial(unlucky_error, dy, of_literal),
        )  # fmt: skip
        _note(case, name, max(judged, key=lambda one: one.error / one.allowed), rows)


def _note(case: Case, result: str, judged: Judged, rows: dict[tuple[str, str], Row]) -> None:
    """Add a result of a case to its row, which keeps the worst."""
    kernel = _kernel_of(result, case.config) if case.route == "triton" else "plain PyTorch"
    label = str(case.dtype).removeprefix("torch.")
    row = rows.setdefault((label, result + kernel), Row(case.route, label, result, kernel))
    row.cases += 1
    worst = judged.error / judged.allowed
    if worst >= row.worst:
        row.worst, row.error, row.allowed, row.case = worst, judged.error, judged.allowed, str(case)


def _kernel_of(result: str, config: GLoRAConfig) -> str:
    """The kernel of a result in this configuration. Kernels of h, σ, W_eff and W·c are tested through y and dx."""
    if config.variant == "matmul" and result == "dA_up":
        return "_x_kernel"
    if config.variant == "hadamard" and config.A == "lora" and result == "dB_down":
        return "_hadamard_grad_kernel"
    return _SERVED_BY[result]
