"""Checks of arguments that all operators share; their errors name the argument as the caller does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Weight, autocast_dtype
from glora_kernels.dispatch.ways import is_transformed


def check_product(x_name: str, x: Tensor, weight_name: str, weight: Weight) -> None:
    """x (..., K) is floating point and fits a frozen W (N, K); outside autocast a dense W must have its dtype."""
    if not x.is_floating_point():
        raise TypeError(f"{x_name} must be a floating-point tensor, got {x.dtype}")
    sizes = tuple(weight.shape)
    if len(sizes) != 2 or x.ndim == 0 or x.shape[-1] != sizes[1]:
        needed = f"; x must have {sizes[1]} features in its last dimension" if len(sizes) == 2 else ""
        raise ValueError(
            f"{x_name} (..., K) and {weight_name} (N, K) do not fit: {tuple(x.shape)}, {sizes}{needed} (in_features)"
        )
    if isinstance(weight, Tensor) and x.dtype != weight.dtype and autocast_dtype(x) is None:
        raise TypeError(
            f"{x_name} and {weight_name} must have one dtype outside autocast; got {x.dtype}, {weight.dtype}"
        )
    check_frozen(weight_name, weight)


def check_frozen(name: str, weight: Weight) -> None:
    if weight.requires_grad and torch.is_grad_enabled() and not is_transformed():
        first_fsdp = (
            ". The first FSDP (FullyShardedDataParallel) gives the frozen weights of a unit one beside its trained "
            "parameters: use gk.fully_shard"
        )
        raise ValueError(
            f"{name} requires a gradient, but the base of an adapted layer is frozen and gets none; "
            f"call {name}.requires_grad_(False){'' if weight.is_leaf else first_fsdp}"
        )


def check_devices(first: tuple[str, torch.device], others: Iterable[tuple[str, Weight | None]]) -> None:
    """Every tensor that is given is on the device of the first."""
    for name, tensor in others:
        if tensor is not None and tensor.device != first[1]:
            raise ValueError(
                f"{name} is on {tensor.device} and {first[0]} on {first[1]}; a call is computed on one device"
            )


def check_vector(name: str, tensor: Tensor, size: int, constant: bool) -> None:
    """The tensor has shape (size,), or (1,) where `constant` allows it."""
    if tensor.shape != (size,) and not (constant and tensor.shape == (1,)):
        accepted = f"{(size,)} or (1,)" if constant else f"{(size,)}"
        raise ValueError(f"{name} must have shape {accepted}; got {tuple(tensor.shape)}")


def check_factors(names: tuple[str, str], down: Tensor | None, up: Tensor | None, rows: int, cols: int) -> None:
    """Factors down (R, cols) and up (rows, R) are both given or both None; `names` in that order."""
    if down is None and up is None:
        return
    if down is None or up is None:
        missing = names[0 if down is None else 1]
        raise ValueError(f"{' and '.join(names)} come together; {missing} is missing")
    if down.ndim != 2 or len(down) == 0 or down.shape[1] != cols or up.shape != (rows, len(down)):
        raise ValueError(
            f"{names[0]} must be (R, {cols}) and {names[1]} ({rows}, R) with one rank R >= 1; "
            f"got {tuple(down.shape)} and {tuple(up.shape)}"
        )


def check_form(
    name: str, size: int, constant: bool, factors: tuple[int, int],
    vector: Tensor | None, up: Tensor | None, down: Tensor | None,
) -> None:  # fmt: skip
    """A support is a vector of `size` (or a constant) or a low-rank pair up (rows, R), down (R, cols), not both.

    factors: (rows, cols) of the pair.
    """
    if vector is not None:
        if up is not None or down is not None:
            raise ValueError(f"{name} and {name}_up, {name}_down are two forms of one support; give one of them")
        check_vector(name, vector, size, constant)
    check_factors((f"{name}_down", f"{name}_up"), down, up, *factors)


def check_dropout(p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p!r}")


def check_seed(name: str, seed: Tensor, device: torch.device) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(f"{name} must be one int64 in a tensor (`dropout_seed`); got {type(seed).__name__}")
    elsewhere = seed.device != device and seed.device.type != "cpu"
    if seed.dtype != torch.int64 or seed.numel() != 1 or elsewhere:
        raise ValueError(
            f"{name} must be one int64 on the CPU or on the device of x, {device}; "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )
