"""One tolerance for everything: no worse than twice plain PyTorch at the same dtype, plus a small floor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from glora_kernels.reference.glora import glora_linear
from glora_kernels.spec import GLoRAConfig

FLOOR = 4.0
"""The floor in units of eps(dtype) times the largest absolute value of the true result."""


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


def unlucky_errors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    params: Mapping[str, Tensor],
    config: GLoRAConfig,
    dy: Tensor,
    dtype: torch.dtype,
    keep: Tensor | None = None,
) -> dict[str, float]:
    """The largest error of each gradient of the literal layer that is one number, over 16 draws of the signs of dy.

    The error of a single number may be near zero by luck, and says little of what the arithmetic costs.
    """
    found: dict[str, float] = {}
    numbers = {f"d{name}" for name, value in params.items() if value.numel() == 1}
    for i in range(16 if numbers else 0):
        signs = torch.randint(0, 2, dy.shape, generator=torch.Generator().manual_seed(i)).to(dy.device) * 2 - 1
        step = (x, weight, bias, params, config, dy * signs.to(dy.dtype))
        exact, plain = literal_step(*step, torch.float64, keep), literal_step(*step, dtype, keep)
        found |= {name: max(found.get(name, 0.0), largest_error(plain[name], exact[name])) for name in numbers}
    return found


def allowed_error(truth: Tensor, literal: Tensor, dtype: torch.dtype, size: float = 0.0, unlucky: float = 0.0) -> float:
    """The largest absolute error accepted of a result whose float64 value is `truth`.

    Twice the largest error of the literal layer at this dtype, plus FLOOR·eps(dtype)·max|truth|; at float64
    1e-12 of the largest value. `size` takes the place of a smaller max|truth| where the result is one sum of many
    terms: the root of the sum of their squares. `unlucky` takes the place of a smaller error of the literal layer
    where the result is one number (`unlucky_errors`).
    """
    if truth.numel() == 0:
        return 0.0
    magnitude = max(size, float(truth.abs().max()))
    if dtype == torch.float64:  # the truth itself is no more exact than that
        return 1e-12 * max(1.0, magnitude)
    floor = FLOOR * torch.finfo(dtype).eps * magnitude
    return 2.0 * max(unlucky, largest_error(literal, truth)) + floor


def largest_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| in float64; infinite where a NaN appears that the truth has not."""
    if truth.numel() == 0:
        return 0.0
    error = (value.detach().double() - truth.detach().double()).abs()
    return float("inf") if bool(error.isnan().any()) else float(error.max())
