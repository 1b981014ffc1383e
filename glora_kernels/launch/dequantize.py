"""The launcher that makes a dense weight of one in 4 bits, and what every kernel is told of such a weight."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.dequantize import _dequantize_adapted_kernel, _dequantize_kernel
from glora_kernels.kernels.operands import Codes, Matrix, Nested
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import Launch, arithmetic, matrix, numerics, options, pair, vector
from glora_kernels.quant import QuantizedWeight

_WORD_CODES = 8
"""The codes of a 32-bit word."""


def codes(weight: QuantizedWeight, words: bool = False) -> Codes:
    """A weight in 4 bits as a kernel reads it; `words`: whether it may read whole words of codes."""
    state, nested = weight.state, weight.state.nested
    constants = (_constant(state.quant_type), _constant(state.blocksize), _constant(weight.dtype), _constant(words))
    more = None
    if nested is not None:
        more = Nested(nested.absmax, nested.code, nested.offset, _constant(nested.blocksize))
    return Codes(weight.packed, state.absmax, more, *constants)


def weight_operands(weight: Tensor | QuantizedWeight) -> dict[str, Matrix | Codes | None]:
    """The arguments of `kernels.weight._read_weight`: a dense weight, or one in 4 bits."""
    if isinstance(weight, Tensor):
        return {"w": matrix(weight), "codes": None}
    return {"w": None, "codes": codes(weight, reads_words(weight, weight.shape[1]))}


@functools.cache
def _constant(value: str | int | torch.dtype) -> Any:
    """A constant of the compiled kernel within a structure of operands."""
    import triton.language as tl

    return tl.constexpr(str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value)


def reads_words(weight: QuantizedWeight, codes: int) -> bool:
    """Whether runs of this many codes can be read as whole, aligned 32-bit words."""
    return codes % _WORD_CODES == 0 and weight.packed.data_ptr() % 4 == 0


def dequantize_launch(
    weight: QuantizedWeight,
    out: Tensor,
    *,
    a: Tensor | None = None,
    a_up: Tensor | None = None,
    a_down: Tensor | None = None,
    b: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    scale: float = 1.0,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch:
    """out (N,K) = W, or W + W∘A + B, A = a (N,) or (1,), or a_up·a_down; B = b (N,) or (1,), or scale·b_up·b_down.

    `out` is contiguous, in fp32, fp16 or bf16. W alone is bit for bit `quant.dequantize`; with A or B the sum is taken
    in fp32 and rounded as by `reference.random.round_dithered`.
    """
    n, k = weight.shape
    p, r = 0 if a_up is None else a_up.shape[1], 0 if b_up is None else b_up.shape[1]
    config = config or tables.choose("dequantize", arch, out.dtype, Shape(0, n, k, max(p, r)))
    if all(t is None for t in (a, a_up, b, b_up)):
        return _plain(weight, out, config)
    if arch == "sm_100":  # what does not spill
        config = config | {"num_warps": 8}
    how = numerics(out.dtype, a_up, a_down, b_up, b_down)
    args = {
        "codes": codes(weight, reads_words(weight, k)),
        "a": vector(a), "a_pair": pair(a_up, a_down), "b": vector(b), "b_pair": pair(b_up, b_down), "out": out,
        "N": n, "K": k, "P": p, "R": r, "scale": float(scale),
        "PRECISION": how.factor_precision, "UPCAST": how.upcast,
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_P": configs.block_r(max(1, p), config["depth"]), "BLOCK_R": configs.block_r(max(1, r), config["depth"]),
    }  # fmt: skip
    tiles = cdiv(n, config["rows"]) * cdiv(k, config["cols"])
    return Launch(_dequantize_adapted_kernel, (tiles,), args, options(config, args))


def _plain(weight: QuantizedWeight, out: Tensor, config: dict[str, int]) -> Launch:
    total = weight.numel()
    words = reads_words(weight, total)
    block = config["rows"] * config["cols"] // (_WORD_CODES if words else 2)
    args = {
        "codes": codes(weight, words), "out": out, "total": total, "UPCAST": arithmetic(weight.dtype)["UPCAST"],
        "BLOCK_UNITS": block,
    }  # fmt: skip
    return Launch(
        _dequantize_kernel, (cdiv(cdiv(total, _WORD_CODES if words else 2), block),), args, options(config, args)
    )
