"""The least time a case can take: its large products, and what must move through memory besides.

Pure arithmetic. A frozen linear layer, forward and backward, is two products, y = xWᵀ and dx = dy·W, whose operands
pass through memory once each. An adapter adds

    LoRA                  x once more (dB_down); the thin products of h, y, dS, dx, dB_up, dB_down
    A vector or constant  y once more (dA is recovered from Σ dy∘y)
    C, D, E               W once more in each pass (W·C and Wᵀg)
    A lora                a third product (dA, which also yields the gradients of B lora without reading x again),
                          and W_eff rebuilt in each pass: W read, W_eff written
    a 4-bit base          the weight unpacked in each pass: half a byte read, two written (W_eff alike).
                          Forward of a few tokens: the codes go into the product, and no weight is written

A product takes the longer of its arithmetic and its operands' traffic; the rest is added, as nothing overlaps with
tensor cores for certain. Dropout adds nothing: masks are made where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import FROZEN, LLAMA, LORA, Entry

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: TFLOP/s of a large product, GB/s of a copy (bytes read plus bytes written)."""

    tflops: float
    gbps: float


H100 = Ceilings(798.0, 3000.0)
"""Measured once on an H100 80GB HBM3; used only for figures marked as computed."""


@dataclass(frozen=True)
class Work:
    """What a case must do at least. products: large ones; flops: all; moved: bytes beyond the products' operands."""

    products: int
    product_flops: float
    thin_flops: float
    product_bytes: float
    moved: float

    @property
    def flops(self) -> float:
        return self.products * self.product_flops + self.thin_flops

    @property
    def bytes(self) -> float:
        return self.products * self.product_bytes + self.moved


def work(entry: Entry, direction: str = "fwd_bwd") -> Work:
    """The least work of one case, forward ("fwd") or forward and backward ("fwd_bwd")."""
    m, n, k, r = entry.m, entry.n, entry.k, entry.r or 0
    size, both = BYTES[entry.dtype], direction == "fwd_bwd"
    passes = 2 if both else 1
    products, thin, moved = passes, 0.0, 0.0
    x, y, w = m * k * size, m * n * size, float(n * k * size)
    plain = {FROZEN: ["none"] * 5, LORA: ["none", "lora", "none", "none", "none"]}
    a, b, *vectors = plain.get(entry.adapter) or entry.adapter.removeprefix("glora:").split(",")
    if b == "lora":
        pair = 2.0 * m * r * (n + k * max(1, len(entry.widths)))
        thin += pair  # h and h·B_upᵀ
        if both:
            thin += pair  # dS and dS·B_down
            if a != "lora":
                thin += pair  # dB_up and dB_down
                moved += x
    if a in ("vector", "constant") and both:
        moved += y
    if a == "lora":
        products += 1 if both else 0
        moved += 0 if entry.quantized else passes * 2 * w
    if entry.quantized and entry.decode and a != "lora":
        w = packed_bytes(n, k)
    elif entry.quantized:
        moved += passes * n * k * (0.5 + size)
    if any(form != "none" for form in vectors):
        moved += passes * w
    return Work(products, 2.0 * m * n * k, thin, float(x + y + w), moved)


def packed_bytes(n: int, k: int) -> float:
    """The codes of a 4-bit weight; absmax beside them (at most half a bit a weight) is not counted."""
    return 0.5 * n * k


def floor_ms(entry: Entry, ceilings: Ceilings, direction: str = "fwd_bwd") -> float:
    """The least milliseconds of a case on a device with these ceilings."""
    least = work(entry, direction)
    product = max(least.product_flops / (1e9 * ceilings.tflops), least.product_bytes / (1e6 * ceilings.gbps))
    rest = least.thin_flops / (1e9 * ceilings.tflops) + least.moved / (1e6 * ceilings.gbps)
    return least.products * product + rest


def seven(case: str, m: int = 8192, r: int = 16, ceilings: Ceilings = H100) -> float:
    """The summed floor of the seven LLaMA-3-8B linears over the same seven frozen."""
    above = [Entry(case, "ours", m, n, k, r, 0.0, name) for name, (n, k) in LLAMA.items()]
    below = [Entry(FROZEN, "eager", m, n, k, layer=name) for name, (n, k) in LLAMA.items()]
    return sum(floor_ms(e, ceilings) for e in above) / sum(floor_ms(e, ceilings) for e in below)
