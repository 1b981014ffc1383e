"""The launcher that makes a dense weight of one in 4 bits, and what every kernel is told of such a weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.dequantize import _dequantize_adapted_kernel, _dequantize_kernel
from glora_kernels.launch import configs, tables
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.plan import Launch, arithmetic, factor_arithmetic, options, strides, vector_stride
from glora_kernels.quant import QuantizedWeight

_WORD_CODES = 8
"""The codes of a 32-bit word."""


def codec_arguments(weight: QuantizedWeight | None, words: bool = False) -> dict[str, Any]:
    """The arguments of `kernels.codec` beside the packed codes; of a dense weight (None) they are absent."""
    if weight is None:
        pointers = dict.fromkeys(("absmax_ptr", "nested_absmax_ptr", "nested_code_ptr", "offset_ptr"))
        return {**pointers, "CODE": "", "BLOCKSIZE": 0, "NESTED": False, "NESTED_BLOCKSIZE": 0, "WORDS": False}
    state, nested = weight.state, weight.state.nested
    return {
        "absmax_ptr": state.absmax,
        "nested_absmax_ptr": None if nested is None else nested.absmax,
        "nested_code_ptr": None if nested is None else nested.code,
        "offset_ptr": None if nested is None else nested.offset,
        "CODE": state.quant_type, "BLOCKSIZE": state.blocksize,
        "NESTED": nested is not None, "NESTED_BLOCKSIZE": 0 if nested is None else nested.blocksize,
        "WORDS": words,
    }  # fmt: skip


def weight_arguments(weight: Tensor | QuantizedWeight) -> dict[str, Any]:
    """The arguments of `kernels.weight._read_weight`, for a dense weight or one in 4 bits."""
    if isinstance(weight, Tensor):
        return {
            "w_ptr": weight, **strides(weight, "stride_wn", "stride_wk"), "QUANTIZED": False,
            **codec_arguments(None), **_rounding(weight),
        }  # fmt: skip
    return {
        "w_ptr": weight.packed, "stride_wn": 0, "stride_wk": 0, "QUANTIZED": True,
        **codec_arguments(weight, reads_words(weight, weight.shape[1])), **_rounding(weight),
    }  # fmt: skip


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
    args = {
        "packed_ptr": weight.packed, **codec_arguments(weight, reads_words(weight, k)), **_rounding(weight),
        "a_ptr": a, "stride_a": vector_stride(a),
        "a_up_ptr": a_up, **strides(a_up, "stride_aun", "stride_aur"),
        "a_down_ptr": a_down, **strides(a_down, "stride_adr", "stride_adk"),
        "b_ptr": b, "stride_b": vector_stride(b),
        "b_up_ptr": b_up, **strides(b_up, "stride_bun", "stride_bur"),
        "b_down_ptr": b_down, **strides(b_down, "stride_bdr", "stride_bdk"),
        "out_ptr": out, "N": n, "K": k, "P": p, "R": r, "scale": float(scale),
        "HAS_A": a is not None, "HAS_A_LORA": a_up is not None,
        "HAS_B": b is not None, "HAS_B_LORA": b_up is not None,
        "PRECISION": factor_arithmetic(out.dtype, a_up, a_down, b_up, b_down)["FACTOR_PRECISION"],
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
        "packed_ptr": weight.packed, **codec_arguments(weight, words), **_rounding(weight),
        "out_ptr": out, "total": total, "BLOCK_UNITS": block,
    }  # fmt: skip
    return Launch(
        _dequantize_kernel, (cdiv(cdiv(total, _WORD_CODES if words else 2), block),), args, options(config, args)
    )


def _rounding(weight: Tensor | QuantizedWeight) -> dict[str, Any]:
    """The dtype that decoded numbers are rounded to, so that W is one matrix whatever is computed in."""
    how = arithmetic(weight.dtype)
    return {"W_DTYPE": how["DTYPE"], "UPCAST": how["UPCAST"]}
