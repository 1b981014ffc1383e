"""A cost model: the expected time of a layer's pass on each route, from its operations and bytes.

None of it was measured. The figures of a card (`CARDS`) are the speeds that large GEMMs and copies should reach, and
the share of the vendor's speed that our own large product might reach. They only decide between two correct routes, and
a table measured on the card replaces them (`runtime.tables`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from glora_kernels.runtime import configs
from glora_kernels.runtime.configs import Shape


class Card(NamedTuple):
    """The speeds of a card.

    tflops, tflops_fp32: of the vendor's GEMM in 16 bits and fp32. gbps: GB/s of a copy (read + write). share,
    share_fp32: the speed of our large product, as a share of the vendor's. scaled: how many times longer it takes where
    its left operand is scaled first, in registers.
    """

    tflops: float
    tflops_fp32: float
    gbps: float
    share: float
    share_fp32: float
    scaled: float


CARDS = {
    "sm_80": Card(250.0, 18.0, 1600.0, 0.94, 0.70, 1.1),
    "sm_89": Card(150.0, 50.0, 850.0, 0.94, 0.70, 1.1),
    "sm_90": Card(798.0, 50.0, 3000.0, 0.92, 0.70, 1.5),
    "sm_100": Card(1500.0, 65.0, 6500.0, 0.85, 0.70, 1.5),
    "gfx942": Card(600.0, 90.0, 4000.0, 0.80, 0.60, 1.1),
}
"""Datasheet figures, scaled by what GEMMs usually reach. The shares are hopes: counting instructions, 0.78 to 0.86 are
likelier on sm_90. A wgmma whose left operand comes from registers waits in every step (`scaled`)."""

LAUNCH_MS = 0.003
"""The cost of one more launch, where launches follow each other on a stream."""

FEW_TOKENS = configs.M_CLASSES[0]
"""Up to this M the kernel that reads 4-bit codes is expected to beat dequantizing W into a workspace and the vendor's
GEMM; it takes no larger M. Unmeasured; counted for an H100 (3.0 TB/s, 798 TFLOP/s), in picoseconds per weight:

- workspace: 0.56 bytes read, 2 written and 2 read again: 1.5; and one more launch.
- codes: 0.56 bytes read: 0.19; about 10 instructions to decode one: 0.35; at M = 64, 128 operations at half of the
  peak: 0.32. In all 0.9 if nothing overlaps."""


def predict(arch: str, dtype: torch.dtype, shape: Shape, *, backward: bool, scales: bool) -> dict[str, float]:
    """The milliseconds of each route, for the part of a pass that differs between them.

    Args:
        arch: an architecture of `CARDS`.
        dtype: of x.
        shape: M, N, K, R.
        backward: the pass that computes dx, else the one that computes y.
        scales: A is a vector or constant: backward scales dy inside our product, or W before it.
    """
    bytes_ms = 1.0 / (CARDS[arch].gbps * 1e6)
    size = dtype.itemsize
    m, n, k, _ = shape
    out, inner = (m * k, m * n) if backward else (m * n, m * k)
    moved = size * (out + inner + n * k) * bytes_ms  # each matrix moved once: a lower bound, reached with few rows
    fused = max(_own_product(arch, dtype, shape, backward), moved)
    if backward and scales:
        fused = min(fused * CARDS[arch].scaled, fused + _scaled_weight(arch, dtype, shape))
    library = max(_library_product(arch, dtype, shape), moved) + LAUNCH_MS
    # The terms are written and the GEMM adds to them; or the GEMM's result is read, scaled, added to and written.
    library += 2 * size * out * bytes_ms
    if backward:
        library += _scaled_weight(arch, dtype, shape) if scales else 0.0
    else:
        # One program per block of rows reads x and then all columns of y: few rows leave most of the card idle.
        blocks = -(-m // 32)
        idle = max(1.0, configs.programs(arch) / max(1, blocks))
        library += (idle - 1.0) * size * (inner + 2 * out) * bytes_ms
    return {"fused": fused, "library": library}


def scales_weight_first(arch: str, dtype: torch.dtype, shape: Shape) -> bool:
    """Whether computing W∘(1+a) first, one more launch and a W written and read, is cheaper for dx than scaling dy."""
    if arch not in CARDS:
        return False
    longer = _own_product(arch, dtype, shape, backward=True) * (CARDS[arch].scaled - 1.0)
    return _scaled_weight(arch, dtype, shape) < longer


def _library_product(arch: str, dtype: torch.dtype, shape: Shape) -> float:
    tflops = CARDS[arch].tflops_fp32 if dtype == torch.float32 else CARDS[arch].tflops
    return 2 * shape.m * shape.n * shape.k / (tflops * 1e9)


def _own_product(arch: str, dtype: torch.dtype, shape: Shape, backward: bool) -> float:
    """The time of our own product, whose last wave of tiles leaves part of the card idle."""
    cols = shape.k if backward else shape.n
    tile = configs.large_product(arch, dtype, shape.m, cols)
    tiles, here = -(-shape.m // tile["rows"]) * -(-cols // tile["cols"]), configs.programs(arch)
    waiting = -(-tiles // here) * here / max(1, tiles)
    share = CARDS[arch].share_fp32 if dtype == torch.float32 else CARDS[arch].share
    return _library_product(arch, dtype, shape) / share * waiting


def _scaled_weight(arch: str, dtype: torch.dtype, shape: Shape) -> float:
    return LAUNCH_MS + 2 * dtype.itemsize * shape.n * shape.k / (CARDS[arch].gbps * 1e6)
