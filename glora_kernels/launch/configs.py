"""Launch configurations: pure functions of kernel, architecture, dtype and shape. Nothing is tuned on a first call.

`arch` is "sm_80", "sm_89", "sm_90", "sm_100", "gfx942" …, or "cpu" in the interpreter. Shared memory a block, the
bound on BLOCK_* × stages: 163 KiB on sm_80, 99 KiB on sm_86/sm_89, 227 KiB on sm_90 and sm_100, 64 KiB on gfx942.
A configuration is a dictionary: blocks (`rows`, `cols`, `depth` of a product's tile), num_warps, num_stages and, for
the two large products, tma, persistent and warp_specialize.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

KERNELS: tuple[str, ...] = (
    "fwd", "dx", "prepare", "added_terms", "dy", "dy_mixed", "x", "hadamard_grad", "finish", "weight", "dequantize",
)  # fmt: skip
"""The kernels with a configuration of their own; "weight" serves W_eff, U and W·c, "dy_mixed" a read of dy and of a y
that holds more than Z."""

TOTALS_BESIDE_DX = ("sm_90", "sm_100", "cpu")
"""Where `_glora_dx_kernel` also sums the gradients of constants; elsewhere its pointers leave no register for that."""

MAX_FACTOR_RANK = 32
"""Up to this rank `_dy_kernel` takes dyᵀh as well; above, its partial sums would move more than reading dy again."""

MAX_BANDS = 8
"""The most parts of the reduction over which h, S, σ and τ are partial sums that the next kernel adds."""

PROGRAMS = {"cpu": 2, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors of the largest card of an architecture."""


SHARED_LIMIT = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536,
}  # fmt: skip
"""Shared memory that a block may use, in bytes."""


class Shape(NamedTuple):
    """One call: x (M,K), W (N,K), rank R (of the larger low-rank pair, 0 without one)."""

    m: int
    n: int
    k: int
    r: int


def block_r(rank: int, limit: int = 256) -> int:
    """The padded rank of one step: a power of two from 16, the smallest a matrix instruction takes."""
    return max(16, min(limit, 1 << (rank - 1).bit_length()))


def programs(arch: str) -> int:
    """How many programs keep the card busy at one a multiprocessor."""
    return PROGRAMS.get(arch, 108)


def choose(
    kernel: str, arch: str, dtype: torch.dtype, shape: Shape, weight_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """The configuration of a kernel of `KERNELS`.

    Under autocast the weight may be wider than x (`weight_dtype`) and fills the stages in its own width.
    """
    if arch == "cpu" and kernel not in ("fwd", "dx"):
        return _interpreted(kernel)
    if kernel in ("fwd", "dx"):
        mixed = weight_dtype is not None and weight_dtype.itemsize > dtype.itemsize
        rows, cols = (shape.m, shape.n) if kernel == "fwd" else (shape.m, shape.k)
        return large_product(arch, dtype, rows, cols, mixed)
    return {
        "prepare": into_rank, "added_terms": into_rank, "dy": dy_pass, "dy_mixed": dy_mixed_pass,
        "x": x_pass, "hadamard_grad": hadamard_grad,
        "finish": finish, "weight": weight_pass, "dequantize": dequantize,
    }[kernel](arch, dtype, shape)  # fmt: skip


def large_product(
    arch: str, dtype: torch.dtype, rows: int, cols: int, mixed: bool = False, tma: bool = True
) -> dict[str, int]:
    """Tile of `_glora_fwd_kernel` and `_glora_dx_kernel` for a (rows, cols) output.

    `parts`: in how many parts of its columns a tile is finished and stored. Without `tma`, or where the operands do not
    allow it (`mixed`: a weight wider than x; strides off 16 bytes), the operands are read by pointers.
    """
    plain = {"tma": False, "persistent": False, "warp_specialize": False, "parts": 1}
    if arch == "cpu":
        return _interpreted("fwd") | {"tma": tma and not mixed}
    if dtype == torch.float32:
        warps = 8 if arch == "sm_90" else 4  # what does not spill
        return {"rows": 64, "cols": 64, "depth": 32, "num_warps": warps, "num_stages": 2, **plain}
    tall = 128 if rows > 64 else 64
    warps = 8 if tall == 128 or arch in ("sm_80", "sm_89") else 4
    if arch.startswith("gfx"):
        return {"rows": tall, "cols": 128, "depth": 64, "num_warps": 4, "num_stages": 2, **plain}
    if arch not in ("sm_90", "sm_100") or mixed or not tma:
        stages = 2 if mixed else (4 if arch in ("sm_80", "sm_90", "sm_100") else 3)
        # cp.async fills the pipe best with two programs a multiprocessor, which persistence would forbid.
        plain["parts"] = 2
        return {"rows": tall, "cols": 128, "depth": 64, "num_warps": warps, "num_stages": stages, **plain}
    through_tma = {"tma": True, "persistent": True, "warp_specialize": False}
    # On sm_100 the full epilogue spills beside 128x256, and warp specialisation compiles for a few forms only.
    if arch == "sm_90" and tall == 128 and _ceil(rows, 128) * _ceil(cols, 256) >= programs(arch):
        return {"rows": 128, "cols": 256, "depth": 64, "num_warps": 8, "num_stages": 4, "parts": 4, **through_tma}
    return {"rows": tall, "cols": 128, "depth": 64, "num_warps": warps, "num_stages": 4, "parts": 2, **through_tma}


def into_rank(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_prepare_kernel` and `_added_terms_kernel`: rows of x, depth of the reduction.

    32 rows keep it on mma.sync: the dropped x is made in registers, from where wgmma would be serialized, and a
    kernel that waits for memory gains nothing from wgmma.
    """
    depth = 64 if arch == "sm_100" or shape.r > 16 else 128
    if shape.r > 64:
        depth = 32
    if dtype == torch.float32:
        cols = 32 if arch.startswith("gfx") else 64
        return {"rows": 32, "cols": cols, "depth": 32, "num_warps": 8, "num_stages": 2}
    warps = 8 if shape.r > 16 and arch == "sm_89" else 4
    return {"rows": 32, "cols": 128, "depth": depth, "num_warps": warps, "num_stages": 2}


def dy_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_dy_kernel`: rows and columns of dy at a time.

    Every program leaves one partial sum (R, N) behind, written and read in fp32: with 256 rows that is R/64 of the
    bytes of a 16-bit dy itself. So above `MAX_FACTOR_RANK` dyᵀh is taken by `_x_kernel`, from a second read of dy.
    """
    thin = dtype != torch.float32 and not arch.startswith("gfx")
    if shape.r > 64:  # the factors fill registers and shared memory
        rows = 64 if thin and arch in ("sm_80", "sm_90", "sm_100") else 32
        return {"rows": rows, "cols": 32, "num_warps": 8, "num_stages": 1 if arch.startswith("gfx") else 2}
    if shape.r > 16 or not thin or shape.m < 4096:
        rows = 128 if thin and shape.m >= 2048 else 64
        return {"rows": rows, "cols": 64, "num_warps": 8 if shape.r > 16 else 4, "num_stages": 2}
    return {"rows": 256, "cols": 64, "num_warps": 8, "num_stages": 2}


def dy_mixed_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_dy_kernel` where it takes out of y what is no part of Z: a tile more of each in registers."""
    config = dy_pass(arch, dtype, shape)
    if arch.startswith("gfx"):
        config = config | {"cols": 32}  # what does not spill
    if dtype == torch.float32:
        return config | {"rows": 32, "num_warps": 8}
    return config | {"rows": min(config["rows"], 128), "num_warps": 8}


def x_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_x_kernel`: rows of x at a time, columns."""
    cols = 64 if shape.r > 16 or dtype == torch.float32 else 128
    if shape.r > 64:
        cols = 16 if dtype == torch.float32 else 32
    stages = 1 if shape.r > 64 and arch.startswith("gfx") else 2
    warps = 8 if shape.r > 64 or arch == "sm_89" else 4
    return {"rows": 32 if dtype == torch.float32 else 64, "cols": cols, "num_warps": warps, "num_stages": stages}


def hadamard_grad(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_hadamard_grad_kernel`: weight rows and columns, depth of the reduction over the tokens."""
    if dtype == torch.float32:
        warps = 8 if arch in ("sm_90", "sm_100") else 4  # what does not spill
        return {"rows": 64, "cols": 64, "depth": 32, "num_warps": warps, "num_stages": 2}
    stages = 3 if arch in ("sm_80", "sm_90", "sm_100") else 2
    return {"rows": 128, "cols": 128, "depth": 64, "num_warps": 8, "num_stages": stages}


def finish(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_finish_kernel`: rows and columns of the gradients; tokens and depth of the product seldom made."""
    if dtype == torch.float32:  # it spills at the sizes that 16 bits take
        return {"rows": 32, "cols": 32, "tokens": 32, "depth": 32, "num_warps": 4, "num_stages": 2}
    warps = 8 if arch == "sm_80" else 4
    return {"rows": 32, "cols": 32, "tokens": 128, "depth": 64, "num_warps": warps, "num_stages": 2}


def weight_pass(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of W where it is read once: W_eff, U, W·c and Wᵀg."""
    cols = 32 if dtype == torch.float32 else (64 if arch == "sm_100" else 128)
    return {"rows": 16 if dtype == torch.float32 else 32, "cols": cols, "num_warps": 4, "num_stages": 2}


def dequantize(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of W where it is made of 4 bits: rows and columns where terms are added, else their product at a time.

    `depth` is a step of the rank.
    """
    if dtype == torch.float32:
        return {"rows": 32, "cols": 64, "depth": 16, "num_warps": 4, "num_stages": 2}
    return {"rows": 32, "cols": 128, "depth": 32, "num_warps": 4, "num_stages": 2}


def bands(arch: str, rows: int, block: int, depth: int, step: int) -> tuple[int, int]:
    """(number, width) of the bands of a reduction over `depth`, so that a few rows still make enough programs.

    A width is a multiple of `step`, and every band has something in it.
    """
    blocks = _ceil(rows, block)
    wanted = min(MAX_BANDS, max(1, programs(arch) // max(1, blocks)), max(1, depth // step))
    number = 1 << (wanted.bit_length() - 1)
    width = max(1, _ceil(_ceil(depth, number), step) * step)
    return max(1, _ceil(depth, width)), width


def row_splits(rows: int, blocks: int, block: int) -> int:
    """Into how many parts a sum over `rows` is split so that about 256 programs run, each with work to do."""
    wanted = max(1, 256 // max(1, blocks))
    return max(1, min(wanted, _ceil(rows, 4 * block)))


def _interpreted(kernel: str) -> dict[str, int]:
    """Small blocks for the interpreter; the large products take descriptors there where the operands allow it."""
    config = {"rows": 32, "cols": 32, "depth": 32, "num_warps": 4, "num_stages": 1}
    if kernel == "finish":
        config["tokens"] = 32
    if kernel in ("fwd", "dx"):
        config |= {"tma": True, "persistent": True, "warp_specialize": False, "parts": 2}
    return config


def _ceil(size: int, block: int) -> int:
    return -(-size // block)
