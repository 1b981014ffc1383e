"""The choices that `tune` tries: configurations of a kernel, or names of `tables.NAMED`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from glora_kernels.four_bit.kinds import usable
from glora_kernels.runtime import configs, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import DEQUANTIZE, SMALL_M
from glora_kernels.tools.trials import forms

MOST = 8
"""The most configurations that are tried of a kernel, its default among them."""

_LARGE = (
    {"cols": 128, "parts": 2}, {"cols": 256, "parts": 4, "num_stages": 3}, {"cols": 256, "parts": 4},
    {"rows": 256, "cols": 128, "parts": 2, "num_stages": 3}, {"num_stages": 3}, {"num_stages": 5},
    {"depth": 128, "num_stages": 2}, {"persistent": False}, {"rows": 64, "num_warps": 4},
    {"depth": 32, "num_stages": 5},
)  # fmt: skip
_INTO_RANK = (
    {"num_stages": 3}, {"num_stages": 4}, {"depth": 64, "num_stages": 4}, {"depth": 256},
    {"num_warps": 2}, {"num_warps": 8},
)  # fmt: skip
VARIATIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "fwd": _LARGE, "dx": _LARGE, "prepare": _INTO_RANK, "added_terms": ({"cols": 64}, {"cols": 256}, *_INTO_RANK),
    "dy": (
        {"num_stages": 3}, {"num_warps": 8}, {"rows": 128}, {"rows": 128, "num_warps": 4}, {"cols": 128},
        {"cols": 32, "num_stages": 3}, {"rows": 64, "num_warps": 4},
    ),
    "x": (
        {"num_stages": 2}, {"num_stages": 4}, {"rows": 64, "num_stages": 2}, {"rows": 64}, {"cols": 64},
        {"num_warps": 8},
    ),
    "hadamard_grad": (
        {"num_stages": 4}, {"num_stages": 2}, {"depth": 32, "num_stages": 5}, {"rows": 64, "num_warps": 4},
        {"depth": 128, "num_stages": 2},
    ),
    "small_m": (
        {"cols": 16}, {"cols": 32}, {"cols": 64}, {"depth": 32}, {"depth": 64}, {"depth": 128}, {"num_warps": 8},
        {"num_warps": 2},
    ),
}  # fmt: skip
"""Changes to the default of each kernel of `configs.TUNED`, those likeliest to gain first."""


def options(what: str, arch: str, dtype: torch.dtype, shape: Shape) -> list[Any]:
    """The choices to try, the baseline first: configurations, or the names whose kernels can serve here."""
    if what not in tables.NAMED:
        return candidates(what, arch, dtype, kept_for(what, shape))
    kinds = (*usable("auto", arch), "workspace")
    return [name for name in tables.NAMED[what] if name in tables.ROUTES or name in kinds]


def kept_for(what: str, shape: Shape) -> Shape:
    """The shape of a row: with the class of M, as launchers ask for it, except for `DEQUANTIZE` and `SMALL_M`."""
    if what in (DEQUANTIZE, SMALL_M):
        return shape
    return shape._replace(m=configs.tokens(shape.m) if what == "small_m" else configs.m_class(shape.m))


def candidates(kernel: str, arch: str, dtype: torch.dtype, shape: Shape) -> list[dict[str, int]]:
    """The configurations to try of a kernel, its default first: all different, valid and small enough for the card.

    Raises:
        ValueError: the kernel is not tuned.
    """
    if kernel not in VARIATIONS:
        raise ValueError(f"kernel must be one of {', '.join(map(repr, VARIATIONS))}; got {kernel!r}")
    default = configs.default(kernel, arch, dtype, shape)
    limit = configs.SHARED_LIMIT.get(arch, min(configs.SHARED_LIMIT.values()))
    found = [default]
    for changes in VARIATIONS[kernel]:
        changed = {name: value for name, value in changes.items() if name in default}
        if not default.get("tma", False):
            changed.pop("persistent", None)  # without TMA nothing overlaps the epilogue of a persistent grid
            if "parts" in changed:
                changed["parts"] = default["parts"]
        config = default | changed
        fits = shared_bytes(kernel, config, dtype, shape) <= limit and _registers_fit(kernel, config, dtype)
        if config not in found and fits and tables.fault(kernel, arch, dtype, shape, config) is None:
            found.append(config)
    return found[:MOST]


def shared_bytes(kernel: str, config: dict[str, int], dtype: torch.dtype, shape: Shape) -> int:
    """An upper estimate of a program's shared memory: the stages of operands, and data that is exchanged through it."""
    size, stages, rank = dtype.itemsize, config["num_stages"], configs.block_r(max(1, shape.r))
    rows, cols, depth = config.get("rows", 0), config["cols"], config.get("depth", 0)
    if kernel in ("fwd", "dx"):
        return stages * (rows + cols) * depth * size + (rows * cols // config["parts"] * size if config["tma"] else 0)
    if kernel == "hadamard_grad":
        return stages * (rows + cols) * depth * size + rows * cols * size
    if kernel == "dy":
        return stages * (rows + rank) * cols * size + rank * rows * size
    if kernel == "small_m":
        return stages * (rank * size + cols) * depth + configs.tokens(shape.m) * depth * size
    if kernel == "x":
        return stages * rows * (cols * size + 4 * rank)
    return stages * (rows + rank) * (depth if kernel == "prepare" else max(depth, cols)) * size


def _registers_fit(kernel: str, config: dict[str, int], dtype: torch.dtype) -> bool:
    """Whether the accumulator of a large product leaves enough registers for everything else."""
    if kernel not in ("fwd", "dx", "hadamard_grad"):
        return True
    each = config["rows"] * config["cols"] // (32 * config["num_warps"])
    return each <= (64 if dtype == torch.float32 else 128)


def compilations(kernels: Iterable[tuple[str, Shape]], dtype: str, arch: str) -> int:
    """About how many compilations a run takes; shapes with equal configurations share them."""
    different = {
        (kernel, *sorted(config.items()))
        for kernel, shape in kernels
        for config in options(kernel, arch, tables.DTYPES[dtype], shape)
    }
    # In the other forms the default and the best are compiled.
    return len(different) + sum(2 * (len(forms(kernel)) - 1) for kernel in {kernel for kernel, *_ in different})
