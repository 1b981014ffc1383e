"""Which calls of few tokens the two products that read the codes of W can compute: that of csrc, and that of Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime.cost import FEW_TOKENS

MAX_RANK = {
    "cuda": {torch.float16: 64, torch.bfloat16: 64},
    "triton": {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64},
}
"""By dtype of x. csrc holds B_up of a block's rows in shared memory; with larger ranks Triton would spill registers."""

ALIGNMENT = 16
"""How many bytes of W or x a thread loads at once."""


def why_not(
    kind: str, x: Tensor, weight: QuantizedWeight, rank: int = 0, factors: torch.dtype | None = None
) -> str | None:
    """Why the `small_m_launch` of a kind does not serve a call; None if it does.

    Args:
        kind: "cuda" or "triton".
        x: (M, K), as the launch would get it.
        weight: (N, K) in 4 bits.
        rank: of the low-rank pair, 0 without one.
        factors: the dtype of products with the pair, by default that of x.
    """
    (n, k), nested, blocksize, ranks = weight.shape, weight.state.nested, weight.state.blocksize, MAX_RANK[kind]
    if x.ndim != 2 or x.shape[1] != k:
        return f"x must be (M, {k}) for a weight {n}x{k}, and x has {x.shape[-1]} columns in {x.ndim} dimensions"
    m = x.shape[0]
    if not 1 <= m <= FEW_TOKENS:
        return f"it takes 1 to {FEW_TOKENS} tokens, got {m}"
    if x.dtype not in ranks:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in ranks)
        return f"x must be {', '.join(names)} or {last}, got {x.dtype}"
    if not 0 <= rank <= ranks[x.dtype]:
        return f"with {x.dtype} it takes ranks up to {ranks[x.dtype]}, got {rank}"
    if weight.dtype not in (x.dtype, torch.float32):
        return f"x is {x.dtype} and W was quantized from {weight.dtype}, which it would be rounded to first"
    if kind == "cuda" and rank and factors is not None and factors.itemsize > x.itemsize:
        return f"it multiplies the factors in the dtype of x, {x.dtype}, and these are {factors}"
    if kind == "cuda" and max(n, k) >= 1 << 30:
        return f"it counts rows and columns in 32 bits, the weight is {n}x{k}"
    if kind == "cuda" and nested is not None and not is_power_of_two(nested.blocksize):
        return f"the nested block size must be a power of two, got {nested.blocksize}"
    if blocksize < 32 or k % blocksize:
        return f"K = {k} is no multiple of the block size {blocksize}: blocks of W run over the ends of its rows"
    if weight.packed.data_ptr() % ALIGNMENT:
        return f"the packed weight does not begin at a multiple of {ALIGNMENT} bytes"
    if x.stride(1) != 1:
        return f"the columns of x must be neighbours, got strides {x.stride()}"
    if x.data_ptr() % ALIGNMENT or (m > 1 and x.stride(0) * x.itemsize % ALIGNMENT):
        return f"the rows of x must begin at multiples of {ALIGNMENT} bytes, got strides {x.stride()}"
    return None


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
