"""The launchers of backward's one read of dy and one of x. They allocate nothing, and say how large what they fill is.

Partial sums: `bands` (number, width) of a reduction that the reader adds, `splits` of rows that `finish_launch` adds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.operands import NO_COLUMNS, Columns, Parts, Terms
from glora_kernels.kernels.sums import _dy_kernel, _x_kernel
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import NO_DROPOUT, Dropout, Launch, matrix, numerics, options, rank_step, terms
from glora_kernels.launch.sizes import rows


def padded(size: int) -> int:
    """Numbers in a row of S, or in one of τ, of which so many are used (`kernels.sums._padded`)."""
    return cdiv(size, 16) * 16


def dy_config(
    shape: Shape,
    dtype: torch.dtype,
    arch: str,
    mixed: bool = False,
    pairs: bool = False,
    factors: torch.dtype | None = None,
    aligned: bool = True,
) -> dict[str, int]:
    """The configuration of `dy_launch`: `mixed` where it is given a y that holds more than Z∘(1+a), `pairs` where S is
    of both U and up.

    factors: the dtype they are multiplied in, that of dy where it is not given. aligned: whether every row of dy begins
    at a multiple of 32 bytes.
    """
    config = tables.choose("dy_mixed" if mixed else "dy", arch, dtype, shape)
    if mixed and not aligned:
        tall, wide = 32 if arch == "sm_100" else 64, 32 if dtype == torch.float32 else 64  # what does not spill
        config = config | {"rows": min(tall, config["rows"]), "cols": min(wide, config["cols"])}
    elif not aligned and arch in configs.OLD:
        config = config | {"num_warps": 8}
    if dtype == torch.float16 and factors == torch.float32:  # halves of dy as well
        config = config | {"rows": max(32, config["rows"] // 2), "cols": 32}
        return configs.all_registers(config, arch) if pairs else config
    if factors == torch.float32 and (pairs or arch == "sm_100"):  # what does not spill
        config = config | {"rows": min(64, config["rows"])}
    return configs.all_registers(config, arch) if torch.float32 in (dtype, factors) else config


def dy_bands(shape: Shape, config: dict[str, int], arch: str) -> tuple[int, int]:
    """(number, width) of the bands of N over which S and τ are partial sums.

    Few, as every block of columns of x reads all of them; one where S is as large as x.
    """
    most = 4 if shape.r <= configs.MAX_FACTOR_RANK else 1
    return configs.bands(arch, shape.m, config["rows"], shape.n, config["cols"], most)


def dy_launch(
    dy: Tensor,
    given: Terms,
    *,
    y: Tensor | None = None,
    s: Tensor | None = None,
    tau: Tensor | None = None,
    factor: Parts | None = None,
    columns: Columns = NO_COLUMNS,
    ranks: tuple[int, int],
    band_width: int,
    scale: float = 1.0,
    factors: torch.dtype | None = None,
    config: dict[str, int],
) -> Launch:
    """S (bands,M,padded) = [dy·U | scale·dy·up], τ (bands,padded) = dy·b, and sums over the rows of each program.

    factor (P+R,N): Σₘ [P|h]·dy. columns: of g, sigma and q with its judges those that are wanted, each
    vectors (N,); q takes y, and of it what the terms u, up, b and the shift hold. `given` has h as `low` (M,P+R).
    Factors and h are multiplied in the dtype of dy, or of `factors` where that is wider.
    """
    m, n = rows(dy), dy.shape[1]
    p, r = ranks
    wide = numerics(dy.dtype, factors)
    args = {
        "dy": matrix(dy), "y": matrix(y), "terms": terms(given)._replace(low=given.low),
        "s": s, "tau": tau, "factor": factor, "columns": columns,
        "M": m, "N": n, "P": p, "R": r, "band_width": band_width, "scale": float(scale),
        "NUMERICS": wide,
        "RANK_STEP": rank_step(p, r),
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"],
        **_rank_blocks(ranks),
        "BLOCK_H": 16 if factor is None else configs.block_r(p + r),
    }  # fmt: skip
    grid = cdiv(m, config["rows"]) * _across(ranks), cdiv(n, band_width)
    return Launch(_dy_kernel, grid, args, options(config, args))


def x_config(
    shape: Shape, ranks: tuple[int, int], dtype: torch.dtype, arch: str, factors: torch.dtype | None = None
) -> dict[str, int]:
    """The configuration of `x_launch`."""
    config = tables.choose("x", arch, dtype, shape)
    if dtype.itemsize == 2 and factors == torch.float32 and max(ranks) > configs.MAX_FACTOR_RANK:
        config = config | {"rows": min(32, config["rows"])}  # halves of that many columns of S: what does not spill
        if arch.startswith("gfx"):
            config = config | {"cols": min(32, config["cols"])}
    if dtype == torch.float16 and factors == torch.float32:  # halves of x as well
        config = config | {"cols": min(64, config["cols"]), "num_stages": 2}
        return configs.all_registers(config, arch) if min(ranks) else config
    return configs.all_registers(config, arch) if min(ranks) or torch.float32 in (dtype, factors) else config


def x_splits(shape: Shape, dtype: torch.dtype, arch: str) -> int:
    """How many partial sums over M `x_launch` writes."""
    config = tables.choose("x", arch, dtype, shape)
    programs = cdiv(shape.k, config["cols"]) * cdiv(max(1, shape.r), configs.RANK_BLOCK)
    return configs.row_splits(shape.m, programs, config["rows"])


def x_launch(
    x: Tensor,
    s: Tensor | None,
    *,
    ranks: tuple[int, int],
    splits: int,
    p_part: Tensor | None = None,
    v_part: Tensor | None = None,
    dx: Tensor | None = None,
    downs: tuple[Tensor | None, Tensor | None] = (None, None),
    tau: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    factors: torch.dtype | None = None,
    config: dict[str, int],
) -> Launch:
    """p_part (splits,P,K) = S[:, :P]ᵀ·x and v_part (splits,R,K) = S[:, P:]ᵀ·drop(x), S (bands,M,P+R or more).

    With `dx` (M,K) also dx = S[:, :P]·a_down + mask∘(S[:, P:]·b_down)/(1-p) + τ·1ᵀ of `downs`; x only gives the sizes
    then, unless a part is wanted. S is multiplied in the dtype of x, or of `factors` where that is wider.
    """
    m, k = rows(x), x.shape[1]
    if x.stride(0) % 16:  # rows off 16 bytes: what does not spill
        config = config | {"cols": min(64, config["cols"]), "num_warps": 8}
    bands = s.shape[0] if s is not None else (1 if tau is None else tau.shape[0])
    args = {
        "x": matrix(x), "s": matrix(s), "tau": tau,
        "a_down": matrix(downs[0]), "b_down": matrix(downs[1]), "dx": matrix(dx),
        "p_part": p_part, "v_part": v_part,
        "M": m, "K": k, "P": ranks[0], "R": ranks[1],
        **dropout.arguments(downs[1] if v_part is None else v_part),
        "BANDS": bands, "NUMERICS": numerics(x.dtype, factors), "P_STEP": rank_step(ranks[0], 0),
        "BLOCK_M": config["rows"], "BLOCK_K": config["cols"],
        **_rank_blocks(ranks),
    }  # fmt: skip
    return Launch(_x_kernel, (cdiv(k, config["cols"]) * _across(ranks), splits), args, options(config, args))


def _rank_blocks(ranks: tuple[int, int]) -> dict[str, int]:
    p, r = (configs.block_r(max(1, rank), configs.RANK_BLOCK) for rank in ranks)
    return {"BLOCK_P": p, "BLOCK_R": r}


def _across(ranks: tuple[int, int]) -> int:
    """How many programs share the columns of S."""
    return max(1, cdiv(max(ranks), configs.RANK_BLOCK))
