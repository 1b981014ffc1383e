"""One tolerance for everything: no worse than twice plain PyTorch at the same dtype, plus a small floor.

`judge`, for results of a layer: the floor is proportional to the root sum of squares of an element's terms, and errors
are judged in two norms. `allowed_error`, for any other result: the floor is proportional to the largest value, and only
the largest error counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from glora_kernels.reference.glora import glora_linear
from glora_kernels.spec import GLoRAConfig

FACTOR = 2.0
"""An error may be this many times that of plain PyTorch."""
FLOOR, RMS_FLOOR = 4.0, 2.0
"""The floors of the largest error and of the root mean square error, in units of eps(dtype)."""
FEW = 8
"""With fewer elements than this, the error of plain PyTorch may be near zero by luck (`unlucky_error`)."""


def literal_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    params: Mapping[str, Tensor],
    config: GLoRAConfig,
    dy: Tensor,
    dtype: torch.dtype,
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """y and every gradient of the literal layer at `dtype`: "y", "dx", "dbias" and "d<support>"."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_()

    x, leaves = leaf(x), {name: leaf(value) for name, value in params.items()}
    b = None if bias is None else leaf(bias)
    with torch.enable_grad():
        y = glora_linear(x, weight.detach().to(dtype), b, leaves, config, keep)
        y.backward(dy.to(dtype))
    found = {"y": y.detach(), "dx": x.grad, "dbias": None if b is None else b.grad}
    found |= {f"d{name}": value.grad for name, value in leaves.items()}
    return {name: value for name, value in found.items() if value is not None}


def literal_terms(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    params: Mapping[str, Tensor],
    config: GLoRAConfig,
    dy: Tensor,
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """For each element of the results of `literal_step`: the root of the sum of the squares of its terms, in float64.

    The results are multilinear in the inputs: the sum of the squared terms is the same formula of squared inputs, with
    s² in place of s, s_A² in place of s_A and (1-p)² in place of 1-p.
    """
    if config.B == "lora":
        config = replace(config, alpha=config.scale**2 * config.rank, dropout=1.0 - (1.0 - config.dropout) ** 2)
    if config.A == "lora":
        config = replace(config, alpha_A=config.scale_A**2 * config.rank)
    x, weight, dy = (tensor.detach().double().square() for tensor in (x, weight, dy))
    b = None if bias is None else bias.detach().double().square()
    squares = {name: value.detach().double().square() for name, value in params.items()}
    sums = literal_step(x, weight, b, squares, config, dy, torch.float64, keep)
    return {name: value.sqrt() for name, value in sums.items()}


class Judged(NamedTuple):
    """An error, and the largest that is accepted. norm: "rms" or "max"."""

    norm: str
    error: float
    allowed: float


def judge(
    value: Tensor, truth: Tensor, literal: Tensor, terms: Tensor, eps: float, unlucky: Callable[[], float]
) -> list[Judged]:
    """A result against its float64 value, in both norms: |value - truth| ≤ 2·|literal - truth| + floor·eps·|terms|.

    Args:
        value: the result.
        truth: its value in float64, from the same rounded inputs.
        literal: the result of plain PyTorch in the same dtype. For a float64 result it is `truth` itself; then 1e-12
            is allowed, for sums in another order.
        terms: for each element the root of the sum of the squares of its terms (`literal_terms`). With FEW elements or
            more, the largest error is judged by the largest |truth| where that is smaller.
        eps: machine epsilon of the dtype.
        unlucky: returns the largest error of `literal` over draws of the signs of dy (`unlucky_error`). Called for a
            tensor of fewer than FEW elements that exceeds its bound: that error takes the place of a smaller one.
    """
    if literal is truth:
        return [Judged("max", largest_error(value, truth), allowed_error(truth, truth, torch.float64))]
    found = []
    for norm, of, floor in (("rms", _rms, RMS_FLOOR), ("max", _largest, FLOOR)) if value.numel() else ():
        error, plain, size = of(value.detach().double() - truth), of(literal.double() - truth), of(terms)
        if norm == "max" and value.numel() >= FEW:
            size = min(size, of(truth))
        if not error <= FACTOR * plain + floor * eps * size and value.numel() < FEW:
            plain = max(plain, unlucky())
        found.append(Judged(norm, float("inf") if error != error else error, FACTOR * plain + floor * eps * size))
    return found


def unlucky_error(dy: Tensor, error: Callable[[Tensor], float]) -> float:
    """The largest value of `error`, a function of dy, over 16 random draws of the signs of dy."""
    errors = []
    for i in range(16):
        signs = torch.randint(0, 2, dy.shape, generator=torch.Generator().manual_seed(i)).to(dy.device) * 2 - 1
        errors.append(error(dy * signs.to(dy.dtype)))
    return max(errors)


def allowed_error(truth: Tensor, literal: Tensor, dtype: torch.dtype, size: float = 0.0) -> float:
    """The largest absolute error that is accepted of a result whose float64 value is `truth`.

    FACTOR times the largest error of plain PyTorch at this dtype (`literal`), plus FLOOR·eps(dtype)·max|truth|; in
    float64 1e-12 times the largest value. A larger `size` takes the place of max|truth|: where the result is one sum of
    many terms, the root of the sum of their squares.
    """
    if truth.numel() == 0:
        return 0.0
    magnitude = max(size, _largest(truth))
    if dtype == torch.float64:  # the truth itself is no more exact than that
        return 1e-12 * max(1.0, magnitude)
    return FACTOR * largest_error(literal, truth) + FLOOR * torch.finfo(dtype).eps * magnitude


def largest_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| in float64; infinite where the difference is NaN."""
    if truth.numel() == 0:
        return 0.0
    error = (value.detach().double() - truth.detach().double()).abs()
    return float("inf") if bool(error.isnan().any()) else float(error.max())


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def _largest(t: Tensor) -> float:
    return float(t.abs().max())
