"""The launcher of y for a few tokens over a 4-bit base: which calls it serves, its blocks, and where h is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv

from glora_kernels.kernels.small_m import _small_h_kernel, _small_m_kernel
from glora_kernels.launch import configs
from glora_kernels.launch.configs import Shape
from glora_kernels.launch.dequantize import codec_arguments
from glora_kernels.launch.plan import Launch, arithmetic, factor_arithmetic, options, shift, strides, vector_stride
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
        return {"rows": _tokens(shape.m), "cols": 32, "depth": 64, "num_warps": 4, "num_stages": 1}
    filled = 0.9 * configs.programs(arch)
    cols = next((c for c in (64, 32) if cdiv(shape.n, c) >= filled), 16)
    rows = _tokens(shape.m)
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
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    wc: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
    h: Tensor | None = None,
    sigma: Tensor | None = None,
    arch: str,
    config: dict[str, int] | None = None,
) -> Launch | Launches:
    """y = Z∘(1+a) + h·B_upᵀ + σ·bᵀ + bias∘(1+d) + e + wc with Z = x·Wᵀ, h = scale·x·B_downᵀ, σ = Σₖ xₖ.

    Accumulated in fp32 and rounded once, to nearest. One launch; two where `h_before` finds h better made first,
    which takes memory for it: a call without `h` makes it inside at any shape.

    Args:
        x: (M, K), one that `serves_small_m` accepts.
        weight: (N, K) in 4 bits; decoded in fp32, rounded to x's dtype.
        y: (M, N), any strides, written.
        a, b, d, e: (N,) or (1,).
        b_up, b_down: (N, R) and (R, K), any strides, both or neither.
        bias, wc: (N,).
        h: (M, R) in x's dtype, in fp32 where a factor is, written where given (with b_down).
        sigma: (M,) fp32, written where given.
        arch: whose configuration is taken.
        config: in the place of `small_m_config`.

    Raises:
        ValueError: a call that is not served, with the reason; nothing is written.
    """
    (m, k), n = x.shape, weight.shape[0]
    r = 0 if b_down is None else b_down.shape[0]
    if (b_up is None) != (b_down is None):
        raise ValueError("b_up and b_down come together")
    if h is not None and b_down is None:
        raise ValueError("h is given, but no b_down to make it of")
    reason = serves_small_m(x, weight, r)
    if reason is not None:
        raise ValueError(f"the fused product of few tokens does not serve this call: {reason}")
    shape = Shape(m, n, k, r)
    config = config or small_m_config(arch, x.dtype, shape)
    factors = factor_arithmetic(x.dtype, b_up, b_down)
    if arch in ("sm_80", "sm_89", "gfx942") and config["rows"] == 64 and factors["FACTOR_PRECISION"] == "halves":
        config = config | {"depth": min(64, config["depth"])}  # what does not spill
    before = h is not None and h_before(shape, config["cols"])
    args = {
        "x_ptr": x, "stride_xm": x.stride(0) if m > 1 else 0,
        "packed_ptr": weight.packed, **{key: value for key, value in codec_arguments(weight).items() if key != "WORDS"},
        "y_ptr": y, **strides(y, "stride_ym", "stride_yn"),
        "b_down_ptr": b_down, **strides(b_down, "stride_bdr", "stride_bdk"),
        "up_ptr": b_up, **strides(b_up, "stride_upn", "stride_upr"),
        "h_ptr": h, **strides(h, "stride_hm", "stride_hr"),
        "sigma_ptr": sigma,
        "a_ptr": a, "stride_a": vector_stride(a),
        "b_ptr": b, "stride_b": vector_stride(b),
        **shift(bias, wc, d, e),
        "M": m, "N": n, "K": k, "HALF": k // 2, "R": r, "scale": float(scale),
        "HAS_A": a is not None, "HAS_B": b is not None, "HAS_UP": b_up is not None,
        "MAKE_H": b_down is not None and not before, "STORE_H": h is not None and not before,
        "MAKE_SIGMA": b is not None or sigma is not None, "STORE_SIGMA": sigma is not None,
        **arithmetic(x.dtype), **factors,
        "BLOCK_M": config["rows"], "BLOCK_N": config["cols"], "BLOCK_K": config["depth"],
        "BLOCK_R": configs.block_r(max(1, r)),
    }  # fmt: skip
    product = Launch(_small_m_kernel, (cdiv(n, config["cols"]),), args, options(config, args))
    if not before:
        return product
    assert h is not None
    assert b_down is not None
    return Launches((_h_launch(x, b_down, h, scale, arch), product))


def _h_launch(x: Tensor, b_down: Tensor, h: Tensor, scale: float, arch: str) -> Launch:
    """h (M,R) = scale·x·B_downᵀ, a program a number."""
    (m, k), r = x.shape, b_down.shape[0]
    args = {
        "x_ptr": x, "stride_xm": x.stride(0) if m > 1 else 0,
        "b_down_ptr": b_down, **strides(b_down, "stride_bdr", "stride_bdk"),
        "h_ptr": h, **strides(h, "stride_hm", "stride_hr"),
        "K": k, "R": r, "scale": float(scale),
        "UPCAST": arithmetic(x.dtype)["UPCAST"], "BLOCK_K": 64 if arch == "cpu" else 1024,
    }  # fmt: skip
    return Launch(_small_h_kernel, (m * r,), args, {"num_warps": 4, "num_stages": 1})


def _tokens(m: int) -> int:
    """One token, or the padded number of them: a power of two from 16, which a matrix instruction takes."""
    return 1 if m == 1 else configs.block_r(m)
