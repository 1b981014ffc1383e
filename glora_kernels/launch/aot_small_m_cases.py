"""The product of few tokens over a 4-bit weight in every form that changes its code, as launches on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glora_kernels.quant import NestedState, QuantizedWeight, QuantState

N, K = 28672, 8192
"""The largest projection of LLaMA-3-70B: on every card enough programs of the most rows, which make h themselves."""

BF16_ONLY = frozenset([
    "4-bit, one token, W alone", "4-bit, one token, largest rank", "4-bit, few tokens, h before",
    "4-bit, few tokens, fp4", "4-bit, few tokens, blocks of 4096", "4-bit, few tokens, factors fp32",
])  # fmt: skip
"""Forms compiled for bf16 alone: other flags or sizes of kernels that every dtype compiles in their fullest form."""


def cases(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    """(name, Launch) of each form. They import the kernels, and so Triton."""
    for name, launch in _cases(dtype, arch):
        if dtype == torch.bfloat16 or name not in BF16_ONLY:
            yield name, launch


def _cases(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch.small_m import MAX_RANK, Launches

    largest = MAX_RANK[dtype]
    yield "4-bit, one token, W alone", _launch(dtype, arch, 1)
    yield "4-bit, one token", _launch(dtype, arch, 1, nested=True, **_terms(dtype, 1, 16))
    yield "4-bit, one token, largest rank", _launch(dtype, arch, 1, **{**_terms(dtype, 1, largest), "h": None})
    yield "4-bit, few tokens", _launch(dtype, arch, 16, nested=True, **_terms(dtype, 16, 16))
    yield "4-bit, few tokens, M=64", _launch(dtype, arch, 64, **_terms(dtype, 64, 16))
    yield "4-bit, few tokens, fp4", _launch(dtype, arch, 3, "fp4", **_low_rank(dtype, 3, 16))
    yield "4-bit, few tokens, blocks of 4096", _launch(dtype, arch, 32, blocksize=4096)
    if dtype != torch.float32:
        wide = torch.float32
        yield "4-bit, few tokens, factors fp32", _launch(dtype, arch, 16, nested=True, **_terms(dtype, 16, 16, wide))
        yield "4-bit, few tokens, M=64, factors fp32", _launch(dtype, arch, 64, **_terms(dtype, 64, 16, wide))
    both = _launch(dtype, arch, 17, **_low_rank(dtype, 17, largest))
    assert isinstance(both, Launches)
    for name, step in zip(("h of few tokens", "few tokens, h before"), both.steps, strict=True):
        yield f"4-bit, {name}", step


def _launch(
    dtype: torch.dtype,
    arch: str,
    m: int,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    **terms: Any,
) -> Any:
    from glora_kernels.launch.small_m import small_m_launch

    blocks = N * K // blocksize
    double = NestedState(_empty(blocks // 256), _empty(256), 256, _empty()) if nested else None
    absmax = _empty(blocks, dtype=torch.uint8 if nested else torch.float32)
    state = QuantState(absmax, quant_type, blocksize, (N, K), dtype, double)
    weight = QuantizedWeight(_empty(N * K // 2, 1, dtype=torch.uint8), state)
    return small_m_launch(_empty(m, K, dtype=dtype), weight, _empty(m, N, dtype=dtype), **terms, arch=arch)


def _low_rank(dtype: torch.dtype, m: int, rank: int, factors: torch.dtype | None = None) -> dict[str, Any]:
    dtype = factors or dtype
    up, down, h = _empty(N, rank, dtype=dtype), _empty(rank, K, dtype=dtype), _empty(m, rank, dtype=dtype)
    return {"b_up": up, "b_down": down, "h": h, "scale": 2.0}


def _terms(dtype: torch.dtype, m: int, rank: int, factors: torch.dtype | None = None) -> dict[str, Any]:
    vectors = {name: _empty(N, dtype=dtype) for name in ("a", "b", "bias", "d", "e")}
    return {**_low_rank(dtype, m, rank, factors), **vectors, "wc": _empty(N), "sigma": _empty(m)}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
