"""The launcher of y for a few tokens over a 4-bit base: which calls it serves, its blocks, and where h is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.operands import W_ALONE, Matrix, Terms
from glora_kernels.kernels.small_m import _small_h_kernel, _small_m_kernel
from glora_kernels.launch import configs
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.dequantize import codes
from glora_kernels.launch.plan import Launch, halves, matrix, numerics, options, terms
from glora_kernels.launch.sizes import rows
from glora_kernels.quant import QuantizedWeight

MAX_TOKENS = 64
MAX_RANK = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
"""By dtype of x: sums over more rows of B_down spill."""

ALIGNMENT = 16
"""Bytes that a thread loads at once of W and of x."""

TILE = 8192
"""Elements of W that a program of 128 threads decodes a step: more of them, and their sums, leave no registers."""

DRAM_BYTES, L2_BYTES = 3.0e6, 5.5e6
"""Bytes a microsecond, as measured on an H100; the ratio is what counts, and it is much the same on other cards."""

LAUNCH_US = 2.5
"""What one more dependent launch costs."""


@dataclass(frozen=True)
class Launches:
    """Launches that run one after the other."""

    steps: tuple[Launch, ...]

    def run(self) -> None:
        for step in self.steps:
            step.run()

    def __str__(self) -> str:
        return " + ".join(map(str, self.steps))


def serves_small_m(x: Tensor, weight: QuantizedWeight, rank: int = 0) -> str | None:
    """Why `small_m_launch` does not serve this call, or None where it does.

    Args:
        x: (M, K), as the launch would get it.
        weight: (N, K) in 4 bits.
        rank: of the low-rank pair, 0 without one.
    """
    (m, k), (n, weight_k), blocksize = x.shape, weight.shape, weight.state.blocksize
    if weight_k != k:
        return f"x has {k} columns, the weight {n}x{weight_k}"
    if not 1 <= m <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, got {m}"
    if x.dtype not in MAX_RANK:
        return f"x must be float32, float16 or bfloat16, got {x.dtype}"
    if rank > MAX_RANK[x.dtype]:
        return f"with {x.dtype} it takes ranks up to {MAX_RANK[x.dtype]}, got {rank}"
    if weight.dtype not in (x.dtype, torch.float32):
        return f"x is {x.dtype} and W was quantized from {weight.dtype}, which it would be rounded to first"
    if blocksize < 32 or k % blocksize:
        return f"K = {k} is no multiple of the block size {blocksize}: blocks of W run over the ends of its rows"
    if k % 32:
        return f"K = {k} is no multiple of 32: the packed rows do not begin at multiples of {ALIGNMENT} bytes"
    if weight.packed.data_ptr() % ALIGNMENT:
        return f"the packed weight does not begin at a multiple of {ALIGNMENT} bytes"
    if x.stride(1) != 1:
        return f"the columns of x must be neighbours, got strides {x.stride()}"
    if x.data_ptr() % ALIGNMENT or (m > 1 and x.stride(0) * x.itemsize % ALIGNMENT):
        return f"the rows of x must begin at multiples of {ALIGNMENT} bytes, got strides {x.stride()}"
    return None


def small_m_config(arch: str, dtype: torch.dtype, shape: Shape) -> dict[str, int]:
    """Blocks of `_small_m_kernel`: tokens (`rows`), rows of W (`cols`), depth of the reduction.

    One token is not padded, more are to a multiple of 16. The fewest programs that fill the card: each reads all of x
    and of B_down.
    """
    if arch == "cpu":
        return {"rows": configs.tokens(shape.m), "cols": 32, "depth": 64, "num_warps": 4, "num_stages": 1}
    filled = 0.9 * configs.programs(arch)
    cols = next((c for c in (64, 32) if cdiv(shape.n, c) >= filled), 16)
    rows = configs.tokens(shape.m)
    rank = configs.block_r(max(1, shape.r))
    # The depths that do not spill; one token keeps x∘B_down in registers too.
    single = dtype == torch.float32
    if rows == 1:
        depth = TILE // max(cols, 2 * rank if single else rank)
        return {"rows": 1, "cols": cols, "depth": depth, "num_warps": 4, "num_stages": 1}
    depth = min(256, TILE // max(cols, rows)) // (2 if rows == 32 or rank > 16 else 1)
    if single:
        return {"rows": rows, "cols": cols, "depth": max(32, depth // 2), "num_warps": 8, "num_stages": 1}
    return {"rows": rows, "cols": cols, "depth": depth, "num_warps": 4, "num_stages": 1}


def h_before(shape: Shape, cols: int) -> bool:
    """Whether h is better made by a launch of its own than once more by every program of `cols` rows of W.

    By bytes: W comes from memory, B_down for every program from the L2, and both pass between the L2 and the programs.
    """
    m, n, k, r = shape
    weight = n * k * 0.5625  # nibbles, and fp32 absmax in blocks of 64
    inside = max(weight / DRAM_BYTES, (weight + cdiv(n, cols) * r * k * 2) / L2_BYTES)
    alone = LAUNCH_US + m * r * k * 4 / L2_BYTES
    return inside > weight / DRAM_BYTES + alone


def small_m_launch(
    x: Tensor,
    weight: QuantizedWeight,
    y: Tensor,
    added: Terms = W_ALONE,
    *,
    b_down: Tensor | None = None,
    scale: float = 1.0,
    h: Tensor | None = None,
    sigma: Tensor | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch | Launches:
    """y = Z∘(1+a) + h·upᵀ + σ·bᵀ + bias∘(1+d) + e + wc with Z = x·Wᵀ, h = scale·x·b_downᵀ, σ = Σₖ xₖ.

    Accumulated in fp32 and rounded once, to nearest. One launch; two where `h_before` finds h better made first,
    which takes memory for it: a call without `h` makes it inside at any shape.

    Args:
        x: (M, K), one that `serves_small_m` accepts.
        weight: (N, K) in 4 bits; decoded in fp32, rounded to x's dtype.
        y: (M, N), any strides, written.
        added: the terms as tensors: a, b, shift.d, shift.e (N,) or (1,); shift.bias, shift.wc (N,); up (N, R)
            contiguous, with b_down.
        b_down: (R, K), any strides.
        scale: of h.
        h: (M, R) in x's dtype, in fp32 where a factor is, written where given (with b_down).
        sigma: (M,) fp32, written where given.
        arch: whose configuration is taken.
        config: in the place of `small_m_config`.

    Raises:
        ValueError: a call that is not served, with the reason; nothing is written.
    """
    m, k, n = rows(x), x.shape[1], weight.shape[0]
    r = 0 if b_down is None else b_down.shape[0]
    if (added.up is None) != (b_down is None):
        raise ValueError("up and b_down come together")
    if added.up is not None and not added.up.is_contiguous():
        raise ValueError(f"up must be contiguous, got strides {added.up.stride()}")
    if h is not None and b_down is None:
        raise ValueError("h is given, but no b_down to make it of")
    reason = serves_small_m(x, weight, r)
    if reason is not None:
        raise ValueError(f"the fused product of few tokens does not serve this call: {reason}")
    shape = Shape(configs.tokens(m), n, k, r)
    how = numerics(x.dtype, added.up, b_down)
    config = config or small_m_config(arch, x.dtype, shape)
    config = configs.fitted("small_m", config, arch, x.dtype, r, halves=halves(how))
    if arch == "sm_100" and weight.state.nested is not None:
        config = configs.all_registers(config, arch)
    before = h is not None and h_before(shape, config["cols"])
    x_rows = Matrix(x, x.stride(0) if shape.m > 1 else 0, 1)
    args = {
        "x": x_rows, "codes": codes(weight), "y": matrix(y), "b_down": None if before else matrix(b_down),
        "h": matrix(h), "sigma": sigma, "terms": terms(added),
        "M": m, "N": n, "K": k, "R": r, "scale": float(scale), "NUMERICS": how,
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"], "BLOCK_K": config["depth"],
        "BLOCK_R": configs.block_r(max(1, r)),
    }  # fmt: skip
    product = Launch(_small_m_kernel, (cdiv(n, config["cols"]),), args, options(config, args))
    if not before:
        return product
    low = {
        "x": x_rows, "b_down": matrix(b_down), "h": matrix(h), "K": k, "R": r, "scale": float(scale),
        "UPCAST": how.upcast, "BLOCK_K": 64 if arch == "cpu" else 1024,
    }  # fmt: skip
    return Launches((Launch(_small_h_kernel, (m * r,), low, {"num_warps": 4, "num_stages": 1}), product))
