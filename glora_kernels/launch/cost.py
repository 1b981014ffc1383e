"""A cost model: how long a pass of a layer should take on each route, from its operations and bytes.

The figures of a card are what large products and copies reach (`CARDS`), and the share of the vendor's product that
our own large product reaches. They are assumptions until a table measured on the card replaces them
(`launch.tables`); they decide between two correct routes, and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from glora_kernels.launch import configs
from glora_kernels.launch.configs import Shape


class Card(NamedTuple):
    """16-bit and fp32 TFLOP/s of the vendor's product, GB/s of a copy (read + write), our product's share of it."""

    tflops: float
    tflops_fp32: float
    gbps: float
    share: float
    share_fp32: float


CARDS = {
    "sm_80": Card(250.0, 18.0, 1600.0, 0.94, 0.70),
    "sm_89": Card(150.0, 50.0, 850.0, 0.94, 0.70),
    "sm_90": Card(798.0, 50.0, 3000.0, 0.92, 0.70),
    "sm_100": Card(1500.0, 65.0, 6500.0, 0.85, 0.70),
    "gfx942": Card(600.0, 90.0, 4000.0, 0.80, 0.60),
}
"""sm_90: measured on an H100; the others: datasheets, scaled by what products usually reach."""

LAUNCH_MS = 0.003
"""What one more launch costs where launches follow each other on a stream."""


def predict(arch: str, dtype: torch.dtype, shape: Shape, *, backward: bool, scales: bool) -> dict[str, float]:
    """Milliseconds of the part of a pass that differs between the routes, by route.

    Args:
        arch: an architecture of `CARDS`.
        dtype: of x.
        shape: M, N, K, R.
        backward: the pass of dx; else of y.
        scales: A is a vector or constant, which the library's product needs a scaled weight for in backward.
    """
    card = CARDS[arch]
    wide = dtype == torch.float32
    size = dtype.itemsize
    m, n, k, _ = shape
    out, inner = (m * k, m * n) if backward else (m * n, m * k)
    product = 2 * m * n * k / ((card.tflops_fp32 if wide else card.tflops) * 1e9)
    bytes_ms = 1.0 / (card.gbps * 1e6)
    moved = size * (out + inner + n * k) * bytes_ms  # each matrix once: the floor of a few rows
    fused = max(product / (card.share_fp32 if wide else card.share), moved)
    library = max(product, moved) + LAUNCH_MS
    # The terms that are added to the product: written, read again by it; or read, scaled and written.
    library += 2 * size * out * bytes_ms
    if backward:
        library += LAUNCH_MS + 2 * size * n * k * bytes_ms if scales else 0.0
    else:
        # One program a row block reads x and then walks y: a few rows leave most of the card idle.
        blocks = -(-m // 32)
        idle = max(1.0, configs.programs(arch) / max(1, blocks))
        library += (idle - 1.0) * size * (inner + 2 * out) * bytes_ms
    return {"fused": fused, "library": library}
