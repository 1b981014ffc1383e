"""The kernels over a 4-bit weight in every form that changes their code, as launches on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch.configs import Shape
from glora_kernels.quant import NestedState, QuantizedWeight, QuantState

M, N, K, R = 8192, 4096, 14336, 16

BF16_ONLY = frozenset([
    "dequantize fp4, by bytes", "dequantize, vectors", "W_eff of 4 bits, R=64", "dequantize, lora in fp32",
    "W_eff of 4 bits, odd", "hadamard grad, 4-bit, W_eff", "wc, 4-bit, odd",
    "hadamard grad, 4-bit, factors fp32",
])  # fmt: skip
"""Forms compiled for bf16 alone: other flags or sizes of kernels that every dtype compiles in their fullest form."""


def cases(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    """(name, Launch) of each form. They import the kernels, and so Triton."""
    for part in (_dequantize, _training):
        for name, launch in part(dtype, arch):
            if dtype == torch.bfloat16 or name not in BF16_ONLY:
                yield name, launch


def _dequantize(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch.dequantize import dequantize_launch

    weight, odd = _weight(dtype, K), _weight(dtype, K + 1, "fp4", nested=False)
    out, odd_out = _empty(N, K, dtype=dtype), _empty(N, K + 1, dtype=dtype)
    yield "dequantize", dequantize_launch(weight, out, arch=arch)
    bytewise = _weight(dtype, K + 1, "fp4", nested=False, n=N + 1)
    yield "dequantize fp4, by bytes", dequantize_launch(bytewise, _empty(N + 1, K + 1, dtype=dtype), arch=arch)
    vectors: dict[str, Any] = {"a": _empty(N, dtype=dtype), "b": _empty(1, dtype=dtype)}
    yield "dequantize, vectors", dequantize_launch(weight, out, **vectors, arch=arch)
    yield "W_eff of 4 bits", dequantize_launch(weight, out, **_factors("ab", R, dtype), scale=2.0, arch=arch)
    yield "W_eff of 4 bits, R=64", dequantize_launch(weight, out, **_factors("ab", 64, dtype), arch=arch)
    if dtype != torch.float32:
        wide = _factors("ab", 64, torch.float32)
        yield "dequantize, lora in fp32", dequantize_launch(weight, out, **wide, arch=arch)
    ragged = _factors("ab", 64, dtype, K + 1)
    yield "W_eff of 4 bits, odd", dequantize_launch(odd, odd_out, **ragged, arch=arch)


def _training(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch import weight as around

    weight, odd = _weight(dtype, K), _weight(dtype, K + 1, "fp4", nested=False)
    dy, x = _empty(M, N, dtype=dtype), _empty(M, K, dtype=dtype)
    n_tiles, k_tiles = around.hadamard_grad_tiles(Shape(M, N, K, R), dtype, arch)
    sums: dict[str, Any] = {"dup": _empty(k_tiles, N, R), "ddown": _empty(n_tiles, R, K), **_factors("a", R, dtype)}
    if dtype != torch.float32:
        n_tiles, k_tiles = around.hadamard_grad_tiles(Shape(M, N, K, R), dtype, arch, torch.float32)
        wide: dict[str, Any] = {"dup": _empty(k_tiles, N, R), "ddown": _empty(n_tiles, R, K), "factors": torch.float32}
        wide |= _factors("a", R, torch.float32)
        yield "hadamard grad, 4-bit, factors fp32", around.hadamard_grad_launch(dy, x, weight, **wide, arch=arch)
    yield "hadamard grad, 4-bit", around.hadamard_grad_launch(dy, x, weight, **sums, arch=arch)
    more: dict[str, Any] = {"weff": _empty(N, K, dtype=dtype), "s": _empty(2, M, R), "db_down": _empty(R, K)}
    yield "hadamard grad, 4-bit, W_eff", around.hadamard_grad_launch(dy, x, weight, **sums, **more, arch=arch)
    low_rank = (_empty(K, R, dtype=dtype), _empty(R, 1, dtype=dtype))
    yield "wc, 4-bit", around.wc_launch(weight, None, *low_rank, _empty(N), arch=arch)
    yield "wc, 4-bit, odd", around.wc_launch(odd, _empty(K + 1, dtype=dtype), None, None, _empty(N), arch=arch)
    part = _empty(around.wc_grad_splits(weight, arch), K)
    yield "wc grad, 4-bit", around.wc_grad_launch(weight, _empty(N), part, arch=arch)


def _factors(letters: str, rank: int, dtype: torch.dtype, k: int = K) -> dict[str, Any]:
    ups = {f"{letter}_up": _empty(N, rank, dtype=dtype) for letter in letters}
    return ups | {f"{letter}_down": _empty(rank, k, dtype=dtype) for letter in letters}


def _weight(
    dtype: torch.dtype, k: int, quant_type: str = "nf4", nested: bool = True, n: int = N
) -> QuantizedWeight:  # fmt: skip
    """(n, k) in blocks of 64."""
    blocks = -(-n * k // 64)
    double = NestedState(_empty(-(-blocks // 256)), _empty(256), 256, _empty()) if nested else None
    absmax = _empty(blocks, dtype=torch.uint8) if nested else _empty(blocks)
    packed = _empty((n * k + 1) // 2, 1, dtype=torch.uint8)
    return QuantizedWeight(packed, QuantState(absmax, quant_type, 64, (n, k), dtype, double))


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
