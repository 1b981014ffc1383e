"""Dequantizes a weight: W alone, or merged with the supports A and B."""

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from glora_kernels import tile
from glora_kernels.four_bit.codec import (
    WORD_CODES,
    _absmax,
    _as_stored,
    _decode,
    _nearest,
    _shifts,
    _weight_tile,
    codes,
    reads_words,
)
from glora_kernels.operands import Matrix
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.launch import Launch, numerics, options, pair, vector
from glora_kernels.runtime.spills import Beside, fitted


@triton.jit
def _dequantize_kernel(codes, out, total, UPCAST: tl.constexpr, BLOCK_UNITS: tl.constexpr):
    """out[i] = level of nibble i · absmax of its block, rounded to the weight's dtype, i < total, over the flat weight.

    A unit is one read: a word of eight codes (with codes.words: `total` is a multiple of 8, the packed weight starts at
    a multiple of 4 bytes) or a byte of two. It lies in one block.
    """
    COUNT: tl.constexpr = 8 if codes.words else 2
    unit = tl.program_id(0).to(tl.int64) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    mask = unit * COUNT < total
    if codes.words:
        packed = tl.load(codes.packed.to(tl.pointer_type(tl.int32)) + unit, mask=mask, other=0)
    else:
        packed = tl.load(codes.packed + unit, mask=mask, other=0).to(tl.int32)
    absmax = _absmax(codes, 0, unit * COUNT // codes.block, mask)
    level = _decode((packed[:, None] >> _shifts(COUNT)[None, :]) & 15, codes.kind)
    value = _nearest(_as_stored(level * absmax[:, None], codes, UPCAST), out.dtype.element_ty, UPCAST)
    element = unit[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    if codes.words:  # one mask for the eight values of a unit, so that the compiler stores whole vectors
        tl.store(out + element, value, mask=mask[:, None])
    else:
        tl.store(out + element, value, mask=element < total)


@triton.jit
def _dequantize_adapted_kernel(
    codes,
    a,
    a_pair,
    b,
    b_pair,
    out,
    N,
    K,
    P,
    R,
    scale,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[n,k] = w + w·a + b: a[n] or Σ_p A_up[n,p]·A_down[p,k]; b[n] or scale·Σ_r B_up[n,r]·B_down[r,k].

    Computed in fp32 and rounded once, with the dither that keeps the mean of a small adapter.
    """
    across = tl.cdiv(K, BLOCK_K)
    first_n = (tl.program_id(0) // across) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    first_k = (tl.program_id(0) % across) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    w = _weight_tile(codes, first_n, first_k, N, K, UPCAST, BLOCK_N, BLOCK_K)
    # Rounded as W alone would be, so that adapters of zero change nothing: the dither keeps values exact in 16 bits.
    w = _nearest(w, out.dtype.element_ty, UPCAST).to(tl.float32)
    if a is not None:
        w += w * tile.read_vector(a, n, N)[:, None]
    if a_pair is not None:
        w += w * tile.factor_product(a_pair, n, k, N, K, P, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_P)
    if b is not None:
        w += tile.read_vector(b, n, N)[:, None]
    if b_pair is not None:
        w += scale * tile.factor_product(b_pair, n, k, N, K, R, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_R)
    tile.write(Matrix(out, K, 1), tile.rounded(w, n, k, out.dtype.element_ty), n, k, N, K)


def dequantize_launch(
    weight: QuantizedWeight, out: Tensor, *,
    a: Tensor | None = None, a_up: Tensor | None = None, a_down: Tensor | None = None,
    b: Tensor | None = None, b_up: Tensor | None = None, b_down: Tensor | None = None,
    scale: float = 1.0, arch: str,
) -> Launch:  # fmt: skip
    """out (N,K) = W, or W + W∘A + B, A = a (N,) or (1,), or a_up·a_down; B = b (N,) or (1,), or scale·b_up·b_down.

    `out` is contiguous, in fp32, fp16 or bf16. W alone has the same bits as `quant.dequantize`; with A or B the sum is
    computed in fp32 and rounded like `reference.random.round_dithered`.
    """
    n, k = weight.shape
    p, r = 0 if a_up is None else a_up.shape[1], 0 if b_up is None else b_up.shape[1]
    config = tables.choose("dequantize", arch, out.dtype, Shape(0, n, k, max(p, r)))
    if all(t is None for t in (a, a_up, b, b_up)):
        return _plain(weight, out, config)
    config = fitted("dequantize_adapted", config, Beside(arch, out.dtype))
    how = numerics(out.dtype, a_up, a_down, b_up, b_down)
    args = {
        "codes": codes(weight, reads_words(weight, k)),
        "a": vector(a), "a_pair": pair(a_up, a_down), "b": vector(b), "b_pair": pair(b_up, b_down), "out": out,
        "N": n, "K": k, "P": p, "R": r, "scale": float(scale),
        "PRECISION": how.factor_precision, "UPCAST": how.upcast,
        "BLOCK_N": config["rows"], "BLOCK_K": config["cols"],
        "BLOCK_P": configs.block_r(p, config["depth"]), "BLOCK_R": configs.block_r(r, config["depth"]),
    }  # fmt: skip
    tiles = cdiv(n, config["rows"]) * cdiv(k, config["cols"])
    return Launch(_dequantize_adapted_kernel, (tiles,), args, options(config, args))


def _plain(weight: QuantizedWeight, out: Tensor, config: dict[str, int]) -> Launch:
    total = weight.numel()
    words = reads_words(weight, total)
    block = config["rows"] * config["cols"] // (WORD_CODES if words else 2)
    args = {
        "codes": codes(weight, words), "out": out, "total": total, "UPCAST": environment.interpreting(),
        "BLOCK_UNITS": block,
    }  # fmt: skip
    return Launch(
        _dequantize_kernel, (cdiv(cdiv(total, WORD_CODES if words else 2), block),), args, options(config, args)
    )
