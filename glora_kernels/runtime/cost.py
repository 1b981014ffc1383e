"""A cost model: how long a pass of a layer should take on each route, from its operations and bytes.

Nothing of it was measured: the figures of a card are what large products and copies should reach (`CARDS`), and the
share of the vendor's product that our own large product might. A table measured on the card replaces them
(`runtime.tables`); they decide between two correct routes, and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from glora_kernels.runtime import configs
from glora_kernels.runtime.configs import Shape


class Card(NamedTuple):
    """16-bit and fp32 TFLOP/s of the vendor's product, GB/s of a copy (read + write), our product's share of it.

    `scaled`: how much longer our product takes where its left operand is scaled on its way, through registers.
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
"""Datasheets, scaled by what products usually reach. The shares are hopes: by a count of instructions 0.78 to 0.86 are
likelier on sm_90. Where the left operand of a wgmma comes from registers, it waits for every step (`scaled`)."""

LAUNCH_MS = 0.003
"""What one more launch costs where launches follow each other on a stream."""

FEW_TOKENS = configs.M_CLASSES[0]
"""Up to how many tokens the product that reads the codes is expected to beat the codes decoded once into a workspace
and the vendor's product; more it does not take. Unmeasured; counted for an H100 (3.0 TB/s, 798 TFLOP/s), in picoseconds
a weight:

- workspace: 0.56 bytes read, 2 written and 2 read again, 1.5; and one launch more.
- codes: 0.56 bytes, 0.19; about 10 instructions to decode one, 0.35; at M = 64, 128 operations at half of the peak,
  0.32. Together 0.9 if none of it hides behind another."""


def predict(arch: str, dtype: torch.dtype, shape: Shape, *, backward: bool, scales: bool) -> dict[str, float]:
    """Milliseconds of the part of a pass that differs between the routes, by route.

    Args:
        arch: an architecture of `CARDS`.
        dtype: of x.
        shape: M, N, K, R.
        backward: the pass of dx; else of y.
        scales: A is a vector or constant, by which backward scales dy on its way into our product, or W first.
    """
    bytes_ms = 1.0 / (CARDS[arch].gbps * 1e6)
    size = dtype.itemsize
    m, n, k, _ = shape
    out, inner = (m * k, m * n) if backward else (m * n, m * k)
    moved = size * (out + inner + n * k) * bytes_ms  # each matrix once: the floor of a few rows
    fused = max(_own_product(arch, dtype, shape, backward), moved)
    if backward and scales:
        fused = min(fused * CARDS[arch].scaled, fused + _scaled_weight(arch, dtype, shape))
    library = max(_library_product(arch, dtype, shape), moved) + LAUNCH_MS
    # The terms that are added to the product: written, read again by it; or read, scaled and written.
    library += 2 * size * out * bytes_ms
    if backward:
        library += _scaled_weight(arch, dtype, shape) if scales else 0.0
    else:
        # One program a row block reads x and then walks y: a few rows leave most of the card idle.
        blocks = -(-m // 32)
        idle = max(1.0, configs.programs(arch) / max(1, blocks))
        library += (idle - 1.0) * size * (inner + 2 * out) * bytes_ms
    return {"fused": fused, "library": library}


def scales_weight_first(arch: str, dtype: torch.dtype, shape: Shape) -> bool:
    """Whether dx of our own product gains by W∘(1+a) made first, of a launch and a W more to write and read."""
    if arch not in CARDS:
        return False
    longer = _own_product(arch, dtype, shape, backward=True) * (CARDS[arch].scaled - 1.0)
    return _scaled_weight(arch, dtype, shape) < longer


def _library_product(arch: str, dtype: torch.dtype, shape: Shape) -> float:
    tflops = CARDS[arch].tflops_fp32 if dtype == torch.float32 else CARDS[arch].tflops
    return 2 * shape.m * shape.n * shape.k / (tflops * 1e9)


def _own_product(arch: str, dtype: torch.dtype, shape: Shape, backward: bool) -> float:
    """Of our own product, whose last tiles leave a part of the card idle."""
    cols = shape.k if backward else shape.n
    tile = configs.large_product(arch, dtype, shape.m, cols)
    tiles, here = -(-shape.m // tile["rows"]) * -(-cols // tile["cols"]), configs.programs(arch)
    waiting = -(-tiles // here) * here / max(1, tiles)
    share = CARDS[arch].share_fp32 if dtype == torch.float32 else CARDS[arch].share
    return _library_product(arch, dtype, shape) / share * waiting


def _scaled_weight(arch: str, dtype: torch.dtype, shape: Shape) -> float:
    return LAUNCH_MS + 2 * dtype.itemsize * shape.n * shape.k / (CARDS[arch].gbps * 1e6)
