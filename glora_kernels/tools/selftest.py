"""`python -m glora_kernels check`: every kernel on this machine against the oracle, in about a minute."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from glora_kernels.glora import op as operator
from glora_kernels.nn import GLoRALinear
from glora_kernels.reference.cases import AWKWARD
from glora_kernels.reference.random import keep_mask
from glora_kernels.reference.tolerance import judge, largest_error, literal_step, literal_terms, unlucky_error
from glora_kernels.runtime import routes
from glora_kernels.runtime.progress import progress
from glora_kernels.spec import CHOICES, GLoRAConfig

SHAPES = ((*AWKWARD[0][0], *AWKWARD[0][1:]), (64, 128, 96, 16))
"""(M, K, N, R): one that fits no block, one that fits them all."""

_SERVED_BY = {
    "y": "_glora_fwd_kernel", "dx": "_glora_dx_kernel", "dA_up": "_hadamard_grad_kernel",
    "dA_down": "_hadamard_grad_kernel", "dA": "_finish_kernel", "dB": "_dy_kernel", "dB_up": "_dy_kernel",
    "dB_down": "_x_kernel", "dC": "_wc_grad_kernel", "dC_up": "_c_grad_kernel", "dC_down": "_c_grad_kernel",
    "dbias": "_dy_kernel", "dD": "_dy_kernel", "dE": "_dy_kernel",
}  # fmt: skip


@dataclass
class Row:
    """The worst of one result over all cases: `worst` is its error over what is allowed, so 1 is the limit."""

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
    """The rows of one route on one device; each case is forward and backward of one layer."""
    rows: dict[tuple[str, str], Row] = {}
    shapes = SHAPES[:1] if device == "cpu" and route == "triton" else SHAPES  # the interpreter is slow
    cases = list(itertools.product(dtypes, configurations(), shapes))
    for dtype, config, (m, k, n, r) in progress(cases, route, show):
        config = GLoRAConfig.from_dict(config.to_dict() | {"rank": r})
        _case(rows, device, route, dtype, config, m, k, n)
    return list(rows.values())


def _case(
    rows: dict[tuple[str, str], Row],
    device: str,
    route: routes.Backend,
    dtype: torch.dtype,
    config: GLoRAConfig,
    m: int,
    k: int,
    n: int,
) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device, dtype)

    layer = GLoRALinear(k, n, config, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(random(n, k, std=k**-0.5))
        assert layer.bias is not None
        layer.bias.copy_(random(n))
        for name, parameter in layer.adapter().items():
            # B stands beside W and is of its size: a larger one would leave nothing of W∘(1+A) in y.
            parameter.copy_(random(*parameter.shape, std=0.3 * (k**-0.5 if name == "B" else 1.0)))
    layer.bias.requires_grad_()
    x, dy = random(m, k).requires_grad_(), random(m, n)
    before = torch.random.get_rng_state()
    with routes.backend(route):
        y = layer(x)
        y.backward(dy)
    ours = {"y": y, "dx": x.grad, "dbias": layer.bias.grad}
    ours |= {f"d{name}": parameter.grad for name, parameter in layer.adapter().items()}

    keep = None
    if config.dropout and config.B == "lora":
        torch.random.set_rng_state(before)
        keep = keep_mask(operator.dropout_seed(x.device).to(x.device), m, k, config.dropout)
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
        _, error, allowed = max(judged, key=lambda one: one.error / one.allowed)
        kernel = _kernel_of(name, config) if route == "triton" else "plain PyTorch"
        label = str(dtype).removeprefix("torch.")
        row = rows.setdefault((label, name + kernel), Row(route, label, name, kernel))
        row.cases += 1
        if error / allowed >= row.worst:
            row.worst, row.error, row.allowed = error / allowed, error, allowed
            row.case = f"A={config.A} B={config.B} {config.variant} M={m} K={k} N={n} R={config.rank}"


def _kernel_of(result: str, config: GLoRAConfig) -> str:
    """The kernel of the Triton path that makes a result; h, σ, W_eff and W·c enter through y and dx."""
    if config.variant == "matmul" and result == "dA_up":
        return "_x_kernel"
    if config.variant == "hadamard" and config.A == "lora" and result == "dB_down":
        return "_hadamard_grad_kernel"
    return _SERVED_BY[result]
