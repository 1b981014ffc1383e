"""The kernels over depth in every form that changes their code, as launches on meta tensors of LLaMA-like sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch.table import Layer, SharedFactor, SharedProduct, group_key

M, N, K, R = 8192, 4096, 14336, 16
SEED = 2**62 + 1

BF16_ONLY = frozenset([
    "merge lora", "merge vectors", "merge lora, R=64", "merge product variant, R=64", "merge lora, unaligned",
    "merge lora, R=64, adapters fp32", "merge full, W transposed", "shift, W transposed", "shift grad, W transposed",
    "shift, unaligned", "shift grad, unaligned", "shared grad, R=16", "shared grad, R=16, dropout",
    "shared grad, R=64", "shared grad, R=64, dropout, unaligned", "shared grad, R=16, dropout, factors fp32",
])  # fmt: skip
"""Forms compiled for bf16 alone: other flags or sizes of kernels that every dtype compiles in their fullest form."""


def cases(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    """(name, Launch) of each form. They import the kernels, and so Triton."""
    for part in (_merge, _shift, _shared):
        for name, launch in part(dtype, arch):
            if dtype == torch.bfloat16 or name not in BF16_ONLY:
                yield name, launch


def _merge(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch import depth

    def merge(layers: list[Layer]) -> Any:
        key = group_key(layers[0])
        assert key is not None
        outputs = [{"beta": _empty(layer.weight.shape[0], dtype=dtype)} for layer in layers]
        return depth.merge_launch(depth.layer_table(layers, key, outputs), arch=arch)

    lora = {"B_up": (N, R), "B_down": (R, K)}
    both = {"A_up": (N, R), "A_down": (R, K), **lora}
    shifts = {"C_up": (K, R), "C_down": (R, 1), "D": (N,), "E": (N,)}
    yield "merge lora", merge([_layer(lora, dtype)])
    yield "merge full", merge([_layer({**both, **shifts}, dtype)])
    yield "merge vectors", merge([_layer({"A": (N,), "B": (N,), "E": (N,)}, dtype)])
    yield "merge lora, R=64", merge([_layer({"B_up": (N, 64), "B_down": (64, K)}, dtype)])
    yield "merge product variant", merge([_layer({**lora, "A_up": (K, R), "A_down": (R, K)}, dtype, product=True)])
    wide = {"A_up": (K, 64), "A_down": (64, K), "B_up": (N, 64), "B_down": (64, K)}
    yield "merge product variant, R=64", merge([_layer(wide, dtype, product=True)])
    yield "merge lora, unaligned", merge([_layer({"B_up": (N, R), "B_down": (R, K + 1)}, dtype, k=K + 1)])
    if dtype != torch.float32:
        yield "merge full, adapters fp32", merge([_layer({**both, **shifts}, dtype, adapter=torch.float32)])
        rank_64 = {"B_up": (N, 64), "B_down": (64, K)}
        yield "merge lora, R=64, adapters fp32", merge([_layer(rank_64, dtype, adapter=torch.float32)])
    yield "merge full, W transposed", merge([_layer({**both, **shifts}, dtype, transposed=True)])
    copies = [(_empty(N, K, dtype=dtype), _empty(N, K, dtype=dtype), _empty(N, dtype=dtype), _empty(N, dtype=dtype))]
    yield "restore", depth.restore_launch(depth.restore_table(copies), copies, arch=arch)


def _shift(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch import depth

    wide = torch.float32
    for name, transposed, k in ((", unaligned", False, K + 1), (", W transposed", True, K), ("", False, K)):
        low = {"C_up": (k, R), "C_down": (R, 1), "D": (N,), "E": (N,)}
        layer = _layer(low, dtype, transposed=transposed, k=k)
        key = group_key(layer)
        assert key is not None
        beta: dict[str, Tensor | None] = {"beta": _empty(N, dtype=wide)}
        yield f"shift{name}", depth.shift_launch(depth.layer_table([layer], key, [beta]), arch=arch)
        grads: dict[str, Tensor | None] = {
            "g": _empty(N, dtype=wide), "dc_up": _empty(k, R, dtype=dtype), "dc_down": _empty(R, 1, dtype=dtype),
            "dc_wide": _empty(k, dtype=wide), "dd": _empty(N, dtype=dtype), "de": _empty(N, dtype=dtype),
        }  # fmt: skip
        table = depth.layer_table([layer], key, [grads])
        yield f"shift grad{name}", depth.shift_grad_launch(table, arch=arch)
    yield "shift down", depth.shift_down_launch(table, arch=arch)


def _shared(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Any]]:
    from glora_kernels.launch import depth

    def shared(rank: int, p: float, k: int = K, left_dtype: torch.dtype = dtype) -> Any:
        left, right = _empty(M, rank, dtype=left_dtype), _empty(M, k, dtype=dtype)
        part = SharedProduct(left, right, 2.0, p, torch.tensor([SEED]) if p else None)
        factors = [SharedFactor(_empty(rank, k, dtype=torch.float32), [part, part])]
        return depth.shared_grad_launch(depth.shared_grad_tables(factors), factors, arch=arch)

    for rank in (R, 64):
        yield f"shared grad, R={rank}", shared(rank, 0.0)
        yield f"shared grad, R={rank}, dropout", shared(rank, 0.1)
        if dtype != torch.float32:
            yield f"shared grad, R={rank}, dropout, factors fp32", shared(rank, 0.1, left_dtype=torch.float32)
    yield "shared grad, R=64, dropout, unaligned", shared(64, 0.1, K + 1)


def _layer(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    adapter: torch.dtype | None = None,
    product: bool = False,
    transposed: bool = False,
    k: int = K,
) -> Layer:
    weight = _empty(k, N, dtype=dtype).t() if transposed else _empty(N, k, dtype=dtype)
    tensors = {name: _empty(*shape, dtype=adapter or dtype) for name, shape in shapes.items()}
    return Layer(weight, _empty(N, dtype=dtype), tensors, 2.0, product)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
