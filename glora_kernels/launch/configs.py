"""Launch configurations: pure functions of architecture, dtype and shape. Nothing is tuned on a first call.

`arch` is "sm_80", "sm_89", "sm_90", "sm_100", "gfx942" …, or "cpu" in the interpreter. Shared memory a block, the
bound on BLOCK_* × stages: 163 KiB on sm_80, 99 KiB on sm_86/sm_89, 227 KiB on sm_90 and sm_100, 64 KiB on gfx942.
"""

from __future__ import annotations

import torch

MAX_BLOCK_R = 64
"""Ranks above this are taken in several steps."""


def block_r(rank: int) -> int:
    """The padded rank of one step: a power of two from 16, the smallest a matrix instruction takes."""
    return max(16, min(MAX_BLOCK_R, 1 << (rank - 1).bit_length()))


def large_product(arch: str, dtype: torch.dtype, m: int, weight_dtype: torch.dtype | None = None) -> dict[str, int]:
    """Blocks of `_glora_fwd_kernel` and `_glora_dx_kernel`: rows, columns, depth of the reduction.

    Under autocast the weight may be wider than x (`weight_dtype`) and fills the stages in its own width.
    """
    if arch == "cpu":
        return {"rows": 32, "cols": 32, "depth": 32, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        return {"rows": 64, "cols": 64, "depth": 32, "num_warps": 4, "num_stages": 2}
    rows = 128 if m > 64 else 64
    if arch.startswith("gfx"):
        return {"rows": rows, "cols": 128, "depth": 64, "num_warps": 4, "num_stages": 2}
    stages = 4 if arch in ("sm_80", "sm_90", "sm_100") else 3
    if weight_dtype is not None and weight_dtype.itemsize > dtype.itemsize:
        stages = 2
    return {
        "rows": rows,
        "cols": 128,
        "depth": 64,
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": stages,
    }


def project(arch: str, dtype: torch.dtype) -> dict[str, int]:
    """Blocks of `_project_kernel`: rows, depth of the reduction.

    32 rows keep it on mma.sync: the dropped x is made in registers, from where wgmma would be serialized, and a
    kernel that waits for memory gains nothing from wgmma.
    """
    if arch == "cpu":
        return {"rows": 32, "cols": 32, "num_warps": 4, "num_stages": 1}
    return {"rows": 32, "cols": 64 if dtype == torch.float32 else 128, "num_warps": 4, "num_stages": 2}


def factor_grad(arch: str, dtype: torch.dtype) -> dict[str, int]:
    """Blocks of `_factor_grad_kernel`: depth of the reduction over the rows, columns."""
    if arch == "cpu":
        return {"rows": 32, "cols": 32, "num_warps": 4, "num_stages": 1}
    return {"rows": 32 if dtype == torch.float32 else 64, "cols": 64, "num_warps": 4, "num_stages": 2}


def hadamard_grad(arch: str, dtype: torch.dtype) -> dict[str, int]:
    """Blocks of `_hadamard_grad_kernel`: weight rows and columns, depth of the reduction over the tokens."""
    if arch == "cpu":
        return {"rows": 32, "cols": 32, "depth": 32, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        return {"rows": 64, "cols": 64, "depth": 32, "num_warps": 4, "num_stages": 2}
    stages = 2 if arch.startswith("gfx") else 3
    return {"rows": 128, "cols": 128, "depth": 64, "num_warps": 8, "num_stages": stages}


def elementwise(arch: str) -> dict[str, int]:
    """Blocks of `_weff_kernel` and `_beta_kernel`."""
    rows, cols = (32, 32) if arch == "cpu" else (32, 128)
    return {"rows": rows, "cols": cols, "num_warps": 4, "num_stages": 1 if arch == "cpu" else 2}


def row_splits(rows: int, programs: int, block: int) -> int:
    """Into how many parts a sum over `rows` is split so that about 256 programs run, each with work to do."""
    wanted = max(1, 256 // max(1, programs))
    return max(1, min(wanted, -(-rows // (4 * block))))
