"""What operators refuse alike: sizes, pairs of factors, and seeds that do not fit. Every name is the caller's."""

from __future__ import annotations

import torch
from torch import Tensor


def check_vector(name: str, tensor: Tensor, size: int, constant: bool) -> None:
    """A vector of the given size, or where `constant` allows it one number."""
    if tensor.shape != (size,) and not (constant and tensor.shape == (1,)):
        accepted = f"{(size,)} or (1,)" if constant else f"{(size,)}"
        raise ValueError(f"{name} must have shape {accepted}; got {tuple(tensor.shape)}")


def check_factors(names: tuple[str, str], down: Tensor | None, up: Tensor | None, rows: int, cols: int) -> None:
    """Factors down (R, cols) and up (rows, R), or neither; their names in that order."""
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
    name: str,
    size: int,
    constant: bool,
    factors: tuple[int, int],
    vector: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
) -> None:
    """One support is a vector of `size` (or a constant), or the product of two `factors` (rows, R) and (R, cols)."""
    if vector is not None:
        if up is not None or down is not None:
            raise ValueError(f"{name} and {name}_up, {name}_down are two forms of one support; give one of them")
        check_vector(name, vector, size, constant)
    check_factors((f"{name}_down", f"{name}_up"), down, up, *factors)


def check_dropout(p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p!r}")


def check_seed(name: str, seed: Tensor, device: torch.device) -> None:
    elsewhere = seed.device != device and seed.device.type != "cpu"
    if seed.dtype != torch.int64 or seed.numel() != 1 or elsewhere:
        raise ValueError(
            f"{name} must be one int64 on the CPU or on the device of x, {device}; "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )
