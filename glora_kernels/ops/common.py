"""What the operators share: the tensors of a call by name, which gradients are wanted, and autocast."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("glora_kernels", "DEF")
"""Every operator of the package is defined in this one namespace: torch.ops.glora_kernels."""


class Supports(NamedTuple):
    """The forms of A and B in one call; an absent one is None.

    a (N,) or (1,): A as a vector or constant. a_up (N,R), a_down (R,K): A=lora (in the product variant a_up is
    (K,R)). b (N,) or (1,): B as a vector or constant. b_up (N,R), b_down (R,K): B=lora.
    """

    a: Tensor | None = None
    a_up: Tensor | None = None
    a_down: Tensor | None = None
    b: Tensor | None = None
    b_up: Tensor | None = None
    b_down: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients a backward must produce, in the order it returns them."""

    x: bool
    beta: bool
    a: bool
    a_up: bool
    a_down: bool
    b: bool
    b_up: bool
    b_down: bool


class Call(NamedTuple):
    """The values of one call that are no tensors, and the dropout seed.

    scale: s on the low-rank B path. dropout_p: p of that path. seed: one int64, or None where p = 0.
    matmul: A=lora is the product variant. route: "eager" or "triton".
    """

    scale: float
    dropout_p: float
    seed: Tensor | None
    matmul: bool
    route: str


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that the call's own rules say is there: anything else is a fault of ours, and no silent None."""
    if tensor is None:
        raise AssertionError("a tensor that backward needs was not saved by forward")
    return tensor


def check_vector(name: str, tensor: Tensor, size: int, constant: bool) -> None:
    """A vector of the given size, or where `constant` allows it one number."""
    if tensor.shape != (size,) and not (constant and tensor.shape == (1,)):
        accepted = f"{(size,)} or (1,)" if constant else f"{(size,)}"
        raise ValueError(f"{name} must have shape {accepted}; got {tuple(tensor.shape)}")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and scales are taken in: fp32 for 16-bit values."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants for a matrix product of x, or None: the rule F.linear follows."""
    device_type = x.device.type
    if (
        device_type != "meta"
        and torch.is_autocast_enabled(device_type)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside an operator the dtypes are settled: a product in fp32 must stay one."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
