"""The kernels of a group in every form that changes their code, as launches on meta tensors of LLaMA-like sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch.configs import MAX_FACTOR_RANK, Shape

M, K, R = 8192, 4096, 16
QKV, GATE_UP = (4096, 1024, 1024), (14336, 14336)
SIX = (1024,) * 6
"""More members than come through descriptors."""

SEED = 2**62 + 1


BF16_ONLY = frozenset([
    "grouped fwd", "grouped fwd, bases alone", "grouped fwd, gate and up", "grouped fwd, R=64",
    "grouped fwd, 6 members", "grouped fwd, W transposed", "grouped fwd, W fp32", "grouped dx", "grouped dx, 6 members",
    "grouped dx, W fp32", "grouped down, dropout", "grouped dy, R=64", "grouped x",
])  # fmt: skip
"""Forms compiled for bf16 alone: other flags or sizes of kernels that every dtype compiles in their fullest form."""


FACTORS_FP32 = frozenset([
    "grouped fwd full", "grouped fwd, R=64", "grouped down, R=64, dropout", "grouped dx full, dropout",
    "grouped dy full", "grouped dy, R=64", "grouped x, R=64, dropout",
])  # fmt: skip
"""Forms compiled with factors in fp32 as well, over 16 bits."""


def cases(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    """(name, Launch) of each form. They import the kernels, and so Triton."""
    for part in (_forward, _backward, _sums):
        for name, launch in part(dtype, arch, dtype):
            if dtype == torch.bfloat16 or name not in BF16_ONLY:
                yield name, launch
        if dtype != torch.float32:
            for name, launch in part(dtype, arch, torch.float32):
                if name in FACTORS_FP32 and (dtype == torch.bfloat16 or name not in BF16_ONLY):
                    yield f"{name}, factors fp32", launch


def _forward(dtype: torch.dtype, arch: str, factors: torch.dtype) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch.grouped import grouped_down_launch, grouped_fwd_launch, makes_h_inside

    def forward(sizes: Sequence[int], rank: int = R, *, weight: torch.dtype = dtype, bias: bool = False,
                transposed: bool = False) -> Any:  # fmt: skip
        count = len(sizes)
        x, k = _empty(M, K, dtype=dtype), K
        weights = [_empty(k, n, dtype=weight).t() if transposed else _empty(n, k, dtype=weight) for n in sizes]
        pairs, low = rank > 0, factors if weight == dtype else weight
        downs = [_empty(rank, k, dtype=low) if pairs else None for _ in sizes]
        return grouped_fwd_launch(
            [x] * count, weights, [_empty(M, n, dtype=dtype) for n in sizes], downs=downs,
            ups=[_empty(n, rank, dtype=low) if pairs else None for n in sizes],
            biases=[_empty(n, dtype=dtype) if bias else None for n in sizes],
            hs=[_empty(M, rank, dtype=low) if pairs else None for _ in sizes], leave_h=[True] * count,
            scales=[2.0] * count, inside=makes_h_inside([x] * count, weights, downs, rank, 0.0, arch), arch=arch,
        )  # fmt: skip

    yield "grouped fwd full", forward(QKV, bias=True)
    yield "grouped fwd", forward(QKV)
    yield "grouped fwd, bases alone", forward(QKV, 0)
    yield "grouped fwd, gate and up", forward(GATE_UP)
    yield "grouped fwd, R=64", forward(QKV, 64)
    yield "grouped fwd, 6 members", forward(SIX, bias=True)
    yield "grouped fwd, W transposed", forward(QKV, transposed=True)
    yield "grouped fwd, W fp32", forward(QKV, weight=torch.float32, bias=True)

    for rank in (R, 64):
        x = _empty(M, K, dtype=dtype)
        yield (
            "grouped down, dropout" if rank == R else f"grouped down, R={rank}, dropout",
            grouped_down_launch(
                [x] * 3, [_empty(rank, K, dtype=factors)] * 3, [_empty(M, rank, dtype=factors)] * 3, scales=[2.0] * 3,
                dropout_p=0.1, seeds=[SEED] * 3, arch=arch,
            ),
        )  # fmt: skip


def _backward(dtype: torch.dtype, arch: str, factors: torch.dtype) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch.grouped import Paths, grouped_dx_launch

    def dx(sizes: Sequence[int], *, weight: torch.dtype = dtype, seeds: Sequence[Any] = ()) -> Any:
        """One x for all, and two where there are six members."""
        count = len(sizes)
        owners = [i // 4 for i in range(count)]
        paths = Paths(
            [_empty(2, M, R, dtype=torch.float32)] * count,
            [_empty(R, K, dtype=factors if weight == dtype else weight)] * count,
            seeds,
        )
        return grouped_dx_launch(
            [_empty(M, n, dtype=dtype) for n in sizes], [_empty(n, K, dtype=weight) for n in sizes],
            [_empty(M, K, dtype=dtype)] * (owners[-1] + 1), owners=owners, paths=paths, path_owners=owners,
            dropout_p=0.1 if seeds else 0.0, arch=arch,
        )  # fmt: skip

    yield "grouped dx full, dropout", dx(QKV, seeds=[_empty(1, dtype=torch.int64)] * 3)
    yield "grouped dx", dx(QKV)
    yield "grouped dx, 6 members", dx(SIX, seeds=[SEED] * 6)
    yield "grouped dx, W fp32", dx(QKV, weight=torch.float32, seeds=[SEED] * 3)


def _sums(dtype: torch.dtype, arch: str, factors: torch.dtype) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch.grouped import grouped_dy_launch, grouped_dy_sizes, grouped_x_launch
    from glora_kernels.launch.sums import x_splits

    for rank in (R, 64):
        shape = Shape(M, max(QKV), max(QKV), rank)
        splits, bands, width = grouped_dy_sizes(shape, len(QKV), 1, dtype, arch, factors)
        here = rank <= MAX_FACTOR_RANK  # above, dyᵀh has a launch of its own, of `_grouped_x_kernel`
        parts = _empty(splits, 1 + rank, sum(QKV), dtype=torch.float32).split(QKV, 2) if here else None
        yield (
            "grouped dy full" if here else f"grouped dy, R={rank}",
            grouped_dy_launch(
                [_empty(M, n, dtype=dtype) for n in QKV], ups=[_empty(n, rank, dtype=factors) for n in QKV],
                hs=[_empty(M, rank, dtype=factors) if here else None for _ in QKV],
                ss=[_empty(bands, M, rank, dtype=torch.float32)] * 3, parts=parts, with_g=here,
                scales=[2.0] * 3, factors=factors, shape=shape, bands=(bands, width), arch=arch,
            ),
        )  # fmt: skip

        shape = Shape(M, K, K, rank)
        splits = x_splits(shape, dtype, arch)
        yield (
            "grouped x" if rank == R else f"grouped x, R={rank}, dropout",
            grouped_x_launch(
                [_empty(M, K, dtype=dtype)] * 3, ss=[_empty(bands, M, rank, dtype=torch.float32)] * 3,
                parts=[_empty(splits, rank, K, dtype=torch.float32)] * 3, dropout_p=0.0 if rank == R else 0.1,
                seeds=() if rank == R else [SEED] * 3, factors=factors, shape=shape, splits=splits, arch=arch,
            ),
        )  # fmt: skip


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
