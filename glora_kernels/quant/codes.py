"""The numbers that 4-bit and 8-bit codes stand for, as fp32.

NF4 (Dettmers et al., "QLoRA", 2023, appendix E): the quantiles of a normal distribution, scaled to [-1, 1]. FP4: sign,
two bits of exponent, one of mantissa, scaled to [-1, 1]. The 8-bit map of nested absmax is the signed dynamic data
type (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016): the number of leading zero bits is a
decimal exponent, the remaining bits are a linear fraction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glora_kernels.modes import constant

QUANT_TYPES: tuple[str, ...] = ("nf4", "fp4")
BLOCKSIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256

NF4: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_POSITIVE = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4: tuple[float, ...] = (*_FP4_POSITIVE, 0.0, *(-level for level in _FP4_POSITIVE[1:]))

_LEVELS = {"nf4": NF4, "fp4": FP4}


def codebook(quant_type: str, device: torch.device) -> Tensor:
    """(16,) fp32: the level of each 4-bit code."""
    return constant(f"codebook of {quant_type}", device, lambda: _levels(quant_type))


def pairs(quant_type: str, device: torch.device) -> Tensor:
    """(256,) int64: for each byte the bits of its two fp32 levels, that of the high nibble first.

    Looking up one 64-bit number for a byte takes a third of the time of looking up two floats.
    """

    def build() -> Tensor:
        byte = torch.arange(256, device="cpu")
        return _levels(quant_type)[torch.stack([byte >> 4, byte & 15], 1)].view(torch.int64).view(256)

    return constant(f"pairs of {quant_type}", device, build)


def encoder(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(bounds (15,), codes (16,)): a value with i bounds below it has the code codes[i]; one on a bound goes down."""

    def bounds() -> Tensor:
        ordered = _levels(quant_type).sort().values
        return (ordered[:-1] + ordered[1:]) / 2

    def codes() -> Tensor:
        return _levels(quant_type).argsort(stable=True).to(torch.uint8)

    return constant(f"bounds of {quant_type}", device, bounds), constant(f"codes of {quant_type}", device, codes)


def dynamic_map(device: torch.device) -> Tensor:
    """(256,) fp32, sorted: the signed 8-bit dynamic data type."""

    def build() -> Tensor:
        levels = [0.0, 1.0]
        for exponent in range(7):
            # The middles of 2^exponent equal parts of [0.1, 1], in fp32 as in bitsandbytes.
            bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
            middles = (bounds[:-1] + bounds[1:]) / 2.0
            for sign in (1, -1):
                levels += (sign * 10 ** (exponent - 6) * middles).tolist()
        return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")

    return constant("dynamic map", device, build)


def _levels(quant_type: str) -> Tensor:
    return torch.tensor(_LEVELS[quant_type], dtype=torch.float32, device="cpu")
