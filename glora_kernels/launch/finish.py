"""The launchers of the end of a backward: partial sums become gradients. They allocate nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.finish import _finish_kernel, _totals_kernel
from glora_kernels.kernels.operands import NO_COLUMNS, Anew, Columns, Parts, Sum
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import Launch, matrix, numerics, options, vector
from glora_kernels.launch.sizes import rows

_RANK_STEP = 16
"""Columns of dyᵀ[P|h] that one program adds up, at any rank."""


def parts(tensor: Tensor, count: int) -> Parts:
    """`count` partial sums of a matrix, tensor[i]."""
    step = tensor.stride(0)
    return Parts(tensor, tensor.stride(1), step, count * step)


def summed(tensor: Tensor, out: Tensor) -> Sum:
    """out = Σ tensor[i], both contiguous."""
    size = out.numel()
    return Sum(tensor, size, len(tensor) * size, out)


def finish_launch(
    *,
    columns: Columns = NO_COLUMNS,
    anew: Anew | None = None,
    factor: Parts | None = None,
    du: Tensor | None = None,
    db_up: Tensor | None = None,
    n: int = 0,
    ranks: tuple[int, int] = (0, 0),
    sums: Sequence[Sum] = (),
    dtype: torch.dtype,
    arch: str,
) -> Launch:
    """The gradients of `columns`; du (N,P) and db_up (N,R) from `factor`, sums (P+R,N); and the `sums`.

    `columns` and `anew` hold tensors, of which the latter is only needed for da. `ranks`: (P, R). The dtype is that of
    dy, in which Z is computed anew.
    """
    config = tables.choose("finish", arch, dtype, Shape(0, n, 0, sum(ranks)))
    if anew is not None and anew.x.stride(0) % 16:  # rows off 16 bytes: what does not spill
        config = config | {"tokens": min(64, config["tokens"]), "num_warps": 8}
    elif anew is not None and anew.w.dtype != dtype and arch == "sm_100":
        config = config | {"num_warps": 8}
    elif arch in ("sm_86", "sm_89"):
        config = configs.all_registers(config, arch)
    across, tile = cdiv(n, config["cols"]), config["rows"] * config["cols"]
    vectors = {name: vector(getattr(columns, name)) for name in ("a", "bias", "d")}
    grid = across * (columns.end is not None) + across * cdiv(sum(ranks), _RANK_STEP) * (factor is not None)
    for item in sums:
        grid = cdiv(item.step, tile) + grid
    args = {
        "factor": factor, "du": du, "db_up": db_up, "columns": columns._replace(**vectors),
        "anew": None if anew is None else Anew(*map(matrix, anew)),
        "sums": tuple(sums),
        "M": 0 if anew is None else rows(anew.x), "N": n, "K": 0 if anew is None else anew.x.shape[1],
        "P": ranks[0], "R": ranks[1],
        "NUMERICS": numerics(dtype),
        "BLOCK_N": config["cols"], "BLOCK_C": _RANK_STEP, "BLOCK_M": config["tokens"], "BLOCK_K": config["depth"],
        "BLOCK": tile,
    }  # fmt: skip
    return Launch(_finish_kernel, (grid,), args, options(config))


def totals_launch(vectors: Tensor, out: Tensor) -> Launch:
    """out (I,) = Σₙ vectors (I,N) in fp32: the gradients of constants."""
    args = {"vectors_ptr": vectors, "out_ptr": out, "N": vectors.shape[1], "BLOCK_N": 1024}
    return Launch(_totals_kernel, (vectors.shape[0],), args, {"num_warps": 4, "num_stages": 1})
