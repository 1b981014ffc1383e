"""The two random streams of the library in plain PyTorch: dropout masks and rounding dither.

Both are pure functions of a position (the masks also of a seed). So forward, backward, a recomputation, the eager path
and the Triton kernels (`tile.py`, the same integers) all get the same bits, and the kernels store none.

Dropout: Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
7 rounds is the smallest count that passes BigCrush). One counter yields 128 bits, used as eight 16-bit
numbers for eight neighbouring columns, so p is rounded to a multiple of 1/65536.

Dither: the additive lattice u(i, j) = frac(i·φ₁ + j·φ₂) in 32-bit integers, (φ₁, φ₂) the inverse powers of
the plastic number (Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018). Rounding
fp32 to 16 bits with it keeps the mean: a part of a value below half a unit in the last place survives on
average, whereas rounding to nearest loses it (w·(1+1e-3) becomes w again in bfloat16).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
PHILOX_A, PHILOX_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
DITHER_ROW, DITHER_COL = 0xC13FA9A9, 0x91E10DA5  # 2**32/ρ and 2**32/ρ² as odd integers, ρ = 1.3247179572…

_MASK = 0xFFFFFFFF
_CHUNK = 1 << 16  # counters at a time: few enough for the cache, enough for every thread


def dropout_threshold(p: float) -> int:
    """The threshold for p: an element is kept where its 16-bit number is at least this."""
    return round(p * 65536)


def keep_mask(seed: Tensor, rows: int, cols: int, p: float, columns_before: int = 0) -> Tensor:
    """The dropout mask of a (rows, cols) matrix: True where an element is kept, with probability 1-p.

    Args:
        seed: one int64, the Philox key, on the device of the mask.
        rows: M; the row number is the counter's second word.
        cols: K; column k takes number k % 8 of the counter whose first word is k // 8.
        p: the probability of dropping, in [0, 1).
        columns_before: of the mask of a wider matrix, the part (rows, cols) after so many columns.
    """
    first, skipped = divmod(columns_before, 8)
    groups = (skipped + cols + 7) // 8
    threshold = dropout_threshold(p)
    parts = []
    step = max(1, _CHUNK // max(1, groups))
    c0 = torch.arange(first, first + groups, device=seed.device)
    for i in range(0, rows, step):
        c1 = torch.arange(i, min(i + step, rows), device=seed.device)[:, None]
        halves = [
            half for word in _philox(seed, c0, c1) for half in ((word & 0xFFFF) >= threshold, word >= threshold << 16)
        ]
        parts.append(torch.stack(halves, -1).reshape(-1, groups * 8))
    keep = torch.cat(parts) if parts else torch.empty(0, groups * 8, dtype=torch.bool, device=seed.device)
    return keep[:, skipped : skipped + cols]


def _philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-7 of the counters (c0, c1, 0, 0); 32-bit words held in int64.

    c0 (groups,) and c1 (rows, 1) are broadcast only when they meet, which saves most of two rounds. The product of two
    32-bit words may overflow to a negative int64, which has the right bits.
    """
    c2 = c3 = torch.zeros(1, dtype=torch.int64, device=seed.device)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(PHILOX_ROUNDS):
        product_a, product_b = c0 * PHILOX_A, c2 * PHILOX_B
        c0 = (product_b >> 32).bitwise_and_(_MASK) ^ (c1 ^ k0)
        c2 = (product_a >> 32).bitwise_and_(_MASK) ^ (c3 ^ k1)
        c1, c3 = product_b.bitwise_and_(_MASK), product_a.bitwise_and_(_MASK)
        k0, k1 = (k0 + PHILOX_KEY_A) & _MASK, (k1 + PHILOX_KEY_B) & _MASK
    return c0, c1, c2, c3


def dither_bits(rows: int, cols: int, device: torch.device | str, first_row: int = 0) -> Tensor:
    """The lattice's 16-bit numbers, (rows, cols) int32 in [0, 65536), from row `first_row` on."""
    return _lattice(rows, cols, device, first_row, bits=16)


def round_dithered(value: Tensor, dtype: torch.dtype, first_row: int = 0) -> Tensor:
    """Round an fp32 matrix to bfloat16 or float16 so that the result is the value on average.

    The lattice number u is added below the last kept bit before truncating: a value a fraction f of the way
    between two neighbours goes to the upper one where u < f. Values that `dtype` holds exactly stay.

    Args:
        value: (rows, cols), contiguous.
        dtype: bfloat16 or float16; a wider one is an ordinary cast.
        first_row: the position of the first row in the whole matrix, where `value` is a chunk of it.
    """
    if dtype.itemsize > 2:
        return value.to(dtype)
    dropped = 16 if dtype == torch.bfloat16 else 13
    # In place on one integer buffer: each operation is a memory-bound pass over the data, and several of them would
    # take as long as the matrix product before.
    bits = _lattice(value.shape[0], value.shape[1], value.device, first_row, dropped)
    rounded = bits.add_(value.view(torch.int32)).bitwise_and_(-(1 << dropped)).view(torch.float32)
    # The addition could turn a NaN into a number. Checking first is cheap on a CPU; with a GPU the host would wait.
    if value.device.type != "cpu" or torch.compiler.is_compiling() or not math.isfinite(value.sum()):
        rounded = torch.where(torch.isfinite(value), rounded, value)
    return rounded.to(dtype)


def _lattice(rows: int, cols: int, device: torch.device | str, first_row: int, bits: int) -> Tensor:
    """The upper `bits` bits of the 32-bit lattice, (rows, cols) int32."""
    i = _wrap_int32(torch.arange(first_row, first_row + rows, device=device) * DITHER_ROW)
    j = _wrap_int32(torch.arange(cols, device=device) * DITHER_COL)
    return torch.add(i[:, None], j).bitwise_right_shift_(32 - bits).bitwise_and_((1 << bits) - 1)


def _wrap_int32(value: Tensor) -> Tensor:
    """The low 32 bits of an int64 as an int32, whose sums wrap as those of unsigned integers do."""
    return (((value + 0x80000000) & _MASK) - 0x80000000).to(torch.int32)
