"""The part of a 4-bit weight that one rank holds: its own codes and block scales, equal to those of the whole.

Codes are in the order of the flat matrix, 2 a byte, with one scale for each block of them. So rows (column layers) can
be cut where a part begins with a block, columns (row layers) where each row of a part is whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glora_kernels.parallel.layout import COLUMN
from glora_kernels.quant import QuantizedWeight, QuantState


def refusal(weight: QuantizedWeight, direction: str, ranks: int) -> str | None:
    """The reason why a 4-bit weight cannot be cut over so many ranks; None where it can."""
    n, k = weight.shape
    state = weight.state
    if direction == COLUMN:
        rows = n // ranks
        blocks, rest = divmod(rows * k, state.blocksize)
        if rest:
            return f"a rank's {rows} rows of {k} 4-bit codes are not whole blocks of {state.blocksize}"
        if state.nested is not None and ranks > 1 and blocks % state.nested.blocksize:
            return (
                f"a rank's {rows} rows of {k} 4-bit codes have {blocks} scales, which in double quantization are not "
                f"whole blocks of {state.nested.blocksize}; quantize with double_quant=False"
            )
        return None
    if state.nested is not None:
        return "columns of 4-bit codes cannot be cut out of double quantization; quantize with double_quant=False"
    if (k // ranks) % state.blocksize:
        return (
            f"a rank's {k // ranks} columns of 4-bit codes are not whole blocks of {state.blocksize}; quantize with a "
            "smaller blocksize, or leave the layer out of the plan"
        )
    return None


def cut(weight: QuantizedWeight, direction: str, rank: int, ranks: int) -> QuantizedWeight:
    """The part of one rank, for which `refusal` is None, in memory of its own."""
    n, k = weight.shape
    state = weight.state

    def part(tensor: Tensor, columns: int) -> Tensor:
        """Of a tensor in the order of the flat matrix, with so many entries a row (column layers: any)."""
        if direction == COLUMN:
            return tensor.flatten().chunk(ranks)[rank].clone()
        return tensor.view(n, columns).chunk(ranks, 1)[rank].clone(memory_format=torch.contiguous_format).flatten()

    shape = (n // ranks, k) if direction == COLUMN else (n, k // ranks)
    nested = state.nested
    if nested is not None:
        nested = type(nested)(part(nested.absmax, 0), nested.code, nested.blocksize, nested.offset)
    absmax = part(state.absmax, k // state.blocksize)
    own = QuantState(absmax, state.quant_type, state.blocksize, shape, state.dtype, nested)
    return QuantizedWeight(part(weight.packed, k // 2).view(-1, 1), own)
