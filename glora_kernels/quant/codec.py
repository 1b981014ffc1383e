"""Quantizing and dequantizing in plain PyTorch: the reference for the kernels, and the implementation on CPUs.

Every step rounds where bitsandbytes rounds, so that both give the same bits in both directions. Where bitsandbytes is
loaded, whole blocks on a CPU are decoded by its operator, in about half the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glora_kernels.modes import has_values
from glora_kernels.quant.codes import NESTED_BLOCKSIZE, QUANT_TYPES, dynamic_map, encoder, pairs
from glora_kernels.quant.weight import DTYPES, NestedState, QuantizedWeight, QuantState, check_blocksize
from glora_kernels.spec import check_choice

_CHUNK = 1 << 18  # elements at a time, so that the temporaries stay in the cache
_GRID = 65535
_NATIVE_BLOCKSIZE = 1024


@torch.inference_mode(False)  # the result may be kept and used in training
@torch.no_grad()
def quantize_weight(
    weight: Tensor, quant_type: str, blocksize: int = 64, double_quant: bool = False
) -> QuantizedWeight:
    """Quantize a weight to 4 bits: for each element the code nearest to w / absmax, absmax of its block.

    Args:
        weight: (N, K) in float32, bfloat16 or float16; any strides.
        quant_type: "nf4" or "fp4".
        blocksize: 32, 64, ... 4096. K need not be a multiple of it.
        double_quant: quantize absmax to 8 bits, in blocks of 256 (saves 0.37 bits a weight at blocksize 64).

    Raises:
        TypeError: a weight of another dtype.
        ValueError: another type or block size, no matrix, a weight on the meta device, with NaN or inf, or with
            `double_quant` numbers so large that the mean of absmax overflows.
    """
    check_choice("quant_type", quant_type, QUANT_TYPES)
    check_blocksize(blocksize)
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16 to be quantized; got {weight.dtype}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be a matrix with at least one element; got shape {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no values to quantize")
    if has_values(weight) and not bool(torch.isfinite(weight).all()):
        raise ValueError("weight holds NaN or inf, which have no 4-bit code")
    flat = weight.reshape(-1)
    total = flat.numel()
    packed = torch.empty((total + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-total // blocksize), dtype=torch.float32, device=weight.device)
    step = max(_CHUNK // blocksize, 1) * blocksize
    for first in range(0, total, step):
        values = flat[first : first + step].float()
        codes = _encode(values, absmax[first // blocksize :], quant_type, blocksize)
        packed[first // 2 : first // 2 + len(codes) // 2, 0] = (codes[::2] << 4) | codes[1::2]
    state = QuantState(absmax, quant_type, blocksize, (weight.shape[0], weight.shape[1]), weight.dtype)
    if double_quant:
        quantized, nested = _quantize_absmax(absmax)
        state = QuantState(quantized, quant_type, blocksize, state.shape, weight.dtype, nested)
    return QuantizedWeight(packed, state)


@torch.no_grad()
def dequantize(
    weight: QuantizedWeight, dtype: torch.dtype, rows: slice | None = None, out: Tensor | None = None
) -> Tensor:
    """W (N, K), or some rows: code · absmax in fp32, rounded to the dtype it was quantized from, then to `dtype`.

    The first rounding makes W the matrix that bitsandbytes dequantizes to, whatever `dtype` is.

    Args:
        weight: the 4-bit weight.
        dtype: of the result.
        rows: a range of rows with step 1; None means all.
        out: a contiguous tensor for the result.
    """
    n, k = weight.state.shape
    if rows is None and out is None and (whole := decoded_at_once(weight, dtype)) is not None:
        return whole
    first, last, _ = (rows or slice(None)).indices(n)
    count = max(0, last - first)
    if out is None:
        out = torch.empty(count, k, dtype=dtype, device=weight.device)
    flat, begin, end = out.view(-1), first * k, first * k + count * k
    blocksize = weight.state.blocksize
    native = _native(weight)
    step = max(_CHUNK // blocksize, 1) * blocksize
    # One buffer for all steps: allocating one in each step would cost as much as the look-up.
    levels = torch.empty(min(step, end - begin + blocksize) // 2 + 1, dtype=torch.int64, device=weight.device)
    for a in range(begin // blocksize * blocksize, end, step):
        b = min(a + step, end)
        if native is not None and (b - a) % blocksize == 0:
            values = _decoded_by(native, weight, a, b)
        else:
            values = _decode(weight, a, b, levels).to(weight.state.dtype)
        low = max(a, begin)
        flat[low - begin : b - begin] = values[low - a :]
    return out


def decoded_at_once(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor | None:
    """W (N, K) by one call of bitsandbytes' operator, in memory that it makes; None where it takes more than that."""
    state = weight.state
    n, k = state.shape
    if state.dtype != dtype or n * k % state.blocksize or (native := _native(weight)) is None:
        return None
    return _decoded_by(native, weight, 0, n * k).view(n, k)


def absmax_of(state: QuantState, blocks: slice = slice(None)) -> Tensor:
    """The absmax of a range of blocks in fp32, dequantized if nested."""
    absmax, nested = state.absmax[blocks], state.nested
    if nested is None:
        return absmax
    start, stop, _ = blocks.indices(len(state.absmax))
    of_block = torch.arange(start, stop, dtype=torch.int32, device=absmax.device).div_(
        nested.blocksize, rounding_mode="floor"
    )
    scale = nested.absmax.index_select(0, of_block)
    # Two roundings: a fused multiply-add gives other bits.
    return nested.code.index_select(0, absmax.int()).mul_(scale).add_(nested.offset)


def _encode(values: Tensor, absmax: Tensor, quant_type: str, blocksize: int) -> Tensor:
    """The codes of these blocks (the last may be shorter), padded to an even number; fills `absmax`."""
    bounds, codes = encoder(quant_type, values.device)
    whole = len(values) // blocksize
    blocks = values[: whole * blocksize].view(whole, blocksize)
    absmax[:whole] = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax[:whole].clamp(min=1e-38))[:, None]).view(-1)
    if len(rest := values[whole * blocksize :]):
        # For the last, shorter block bitsandbytes clamps absmax itself, and divides instead of multiplying by 1/absmax.
        absmax[whole] = rest.abs().max().clamp(min=1e-38)
        scaled = torch.cat([scaled, rest / absmax[whole]])
    if len(scaled) % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    return codes[torch.bucketize(scaled.clamp_(-1, 1), bounds, out_int32=True)]


def _native(weight: QuantizedWeight) -> Callable[..., Tensor] | None:
    """bitsandbytes' operator where it is loaded (which takes a second) and has one for this device, a CPU.

    Blocks of 2048 and more it decodes by a function that it compiles first.
    """
    if weight.device.type != "cpu" or weight.state.blocksize > _NATIVE_BLOCKSIZE or torch.compiler.is_compiling():
        return None
    if "bitsandbytes" not in sys.modules:
        return None
    operator: Any = getattr(torch.ops.bitsandbytes, "dequantize_4bit", None)
    if operator is None or not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::dequantize_4bit", "CPU"):
        return None
    native: Callable[..., Tensor] = operator.default
    return native


def _decoded_by(native: Callable[..., Tensor], weight: QuantizedWeight, begin: int, end: int) -> Tensor:
    """The flat elements [begin, end), whole blocks, in the dtype that W was quantized from.

    A row a block: rows that are no whole blocks it would decode wrongly.
    """
    state, size = weight.state, weight.state.blocksize
    blocks = slice(begin // size, end // size)
    packed = weight.packed.view(-1)[begin // 2 : end // 2]
    shape = [blocks.stop - blocks.start, size]
    return native(packed, absmax_of(state, blocks), size, state.quant_type, shape, state.dtype).view(-1)


def _decode(weight: QuantizedWeight, begin: int, end: int, buffer: Tensor) -> Tensor:
    """The flat elements [begin, end) in fp32, in the buffer's memory; `begin` must be the start of a block."""
    state = weight.state
    packed = weight.packed.view(-1)[begin // 2 : (end + 1) // 2]
    levels = buffer[: len(packed)]
    torch.index_select(pairs(state.quant_type, packed.device), 0, packed.int(), out=levels)
    values = levels.view(torch.float32)[: end - begin]
    size = state.blocksize
    absmax = absmax_of(state, slice(begin // size, -(-end // size)))
    whole = (end - begin) // size
    values[: whole * size].view(whole, size).mul_(absmax[:whole, None])
    if whole < len(absmax):
        values[whole * size :].mul_(absmax[whole])
    return values


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, NestedState]:
    """Quantize absmax to 8 bits: subtract the mean, scale blocks of 256, take the nearest number of the dynamic map.

    As bitsandbytes does on a CPU, values are first rounded to a grid of 65536 numbers over [-1, 1]; a block of zeros
    gets code 0.
    """
    code = dynamic_map(absmax.device)
    offset = absmax.mean()
    if has_values(offset) and not bool(torch.isfinite(offset)):
        raise ValueError("weight holds numbers too large for double quantization: the mean of absmax overflows")
    centred = absmax - offset
    blocks = -(-len(centred) // NESTED_BLOCKSIZE)
    padded = torch.nn.functional.pad(centred, (0, blocks * NESTED_BLOCKSIZE - len(centred))).view(blocks, -1)
    scale = padded.abs().amax(1)
    scaled = (padded * (1.0 / scale)[:, None]).clamp_(-1, 1)
    # Product and sum with one rounding, like a fused multiply-add: float64 holds both exactly.
    place = ((scaled + 1) * 0.5).double().mul_(_GRID).add_(0.5).float().floor_()
    codes = torch.bucketize(place.mul_(2.0).div_(_GRID).sub_(1.0), (code[:-1] + code[1:]) / 2, out_int32=True)
    codes.masked_fill_((scale == 0)[:, None], 0)
    # Cloned: saving stores whole memory, and loading writes to it, so it must not be shared or larger than needed.
    return codes.view(-1)[: len(centred)].to(torch.uint8), NestedState(scale, code.clone(), NESTED_BLOCKSIZE, offset)
