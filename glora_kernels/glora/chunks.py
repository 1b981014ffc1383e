"""Products of a large matrix and a thin one, a few rows at a time.

16-bit and 4-bit values are computed on in fp32 in chunks, whose temporaries stay in the cache. A thin factor in the
dtype of the large matrix takes one ordinary product. For a wider factor (fp32 adapters, 16-bit weight) the large matrix
is cast to the dtype of the factor chunk by chunk, so that the factor is never rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from glora_kernels.dispatch.common import Weight
from glora_kernels.quant import QuantizedWeight, dequantize

_CHUNK = 1 << 17  # elements


def row_chunks(matrix: Weight, always: bool = False, size: int = _CHUNK) -> list[slice]:
    """Slices of the rows: chunks of `size` elements for 16-bit values or with `always`, else all rows at once."""
    rows, cols = matrix.shape
    step = rows if matrix.dtype.itemsize > 2 and not always else max(1, size // max(1, cols))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, max(1, step))]


def weight_rows(weight: Weight, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some rows of W: those of a 4-bit weight dequantized to `dtype`, those of a matrix as they are."""
    return dequantize(weight, dtype, rows) if isinstance(weight, QuantizedWeight) else weight[rows]


def wide_chunks(matrix: Weight, wide: torch.dtype, exact: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
    """(rows, the rows cast to `wide`), chunk by chunk; 4-bit codes are first rounded to `exact` where it is given."""
    chunks = row_chunks(matrix, always=True)
    if isinstance(matrix, QuantizedWeight):
        yield from ((rows, dequantize(matrix, exact or wide, rows).to(wide)) for rows in chunks)
        return
    if not chunks:
        return
    buffer = torch.empty(chunks[0].stop, matrix.shape[1], dtype=wide, device=matrix.device)
    for rows in chunks:
        yield rows, buffer[: rows.stop - rows.start].copy_(matrix[rows])


def thin(matrix: Weight, down: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix (M,K) · downᵀ (K,R), in the dtype of `down`; 4-bit codes are dequantized to `dtype`."""
    if isinstance(matrix, Tensor) and matrix.dtype == down.dtype:
        return linear(matrix, down)
    product = torch.empty(matrix.shape[0], down.shape[0], dtype=down.dtype, device=down.device)
    for rows, part in wide_chunks(matrix, down.dtype, dtype):
        torch.mm(part, down.t(), out=product[rows])
    return product


def gathered(left: Tensor, matrix: Weight, dtype: torch.dtype) -> Tensor:
    """leftᵀ (R,M) · matrix (M,K), in the dtype of `left`; 4-bit codes are dequantized to `dtype`."""
    if isinstance(matrix, Tensor) and matrix.dtype == left.dtype:
        return left.t() @ matrix
    total = torch.zeros(left.shape[1], matrix.shape[1], dtype=left.dtype, device=left.device)
    for rows, part in wide_chunks(matrix, left.dtype, dtype):
        total.addmm_(left[rows].t(), part)
    return total


def spread(left: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """left (M,R) · factor (R,K) in their dtype, rounded once to `dtype`."""
    if left.dtype == dtype:
        return left @ factor
    product = torch.empty(left.shape[0], factor.shape[1], dtype=dtype, device=left.device)
    for rows in row_chunks(product):
        product[rows] = left[rows] @ factor
    return product


def weighted_sum(vector: Tensor, matrix: Weight) -> Tensor:
    """vector (M,) · matrix (M,K), in the dtype of `vector`: one sum per chunk of rows, then the sum of these.

    A BLAS adds row after row to one sum, which loses a digit of fp32 over thousands of rows, unless the columns are
    contiguous.
    """
    if isinstance(matrix, Tensor) and matrix.dtype == vector.dtype and matrix.stride(0) == 1:
        return matrix.t() @ vector
    total = torch.zeros(matrix.shape[1], dtype=vector.dtype, device=vector.device)
    if isinstance(matrix, Tensor) and matrix.dtype == vector.dtype:
        for rows in row_chunks(matrix, always=True, size=64 * matrix.shape[1]):
            total += matrix[rows].t() @ vector[rows]
        return total
    for rows, part in wide_chunks(matrix, vector.dtype):
        total += weighted_sum(vector[rows], part)
    return total
