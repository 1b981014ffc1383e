"""W_e·columns_e of thin columns: the term of C in β, and the factor U = W·A_up of the product variant.

dcolumns_e = W_eᵀ·d_e
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Codes, Weight, cast, codes_of, given, stored, weight_of
from glora_kernels.dispatch.operator import Operator
from glora_kernels.dispatch.prepared import Prepared
from glora_kernels.dispatch.signature import Row, Signature, Values
from glora_kernels.experts.products import of_expert
from glora_kernels.glora.chunks import gathered, thin
from glora_kernels.glora.composite import dense_of


def expert_wc(weight: Weight, columns: Tensor) -> Tensor:
    """W_e·columns_e (E, N, P) of columns (E, K, P), in their dtype; W (E, N, K), or in 4 bits (E·N, K)."""
    *codes, form = codes_of(weight)
    return EXPERT_WC.call((stored(weight), columns, *codes), form, lambda row: Values((form,)), inputs=0)[0]


class _Operands(NamedTuple):
    weight: Tensor
    columns: Tensor


class _ExpertWc(Operator):
    name = "expert_wc"
    signature = Signature(_Operands, Codes)
    has_inputs = False
    results = ("wc",)
    trained = ("columns",)

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        saved = [i for i, tensor in enumerate(row) if tensor is not None]
        return Prepared(
            self, values, self.graded(wanted), saved, size=len(row) + 1, has_kernels=False, keeps=registered
        )

    def _each(self, row: Row, values: Values) -> list[tuple[Weight, Tensor]]:
        """W_e and its columns."""
        (packed, columns), codes = self.signature.read(row, values)
        weight = weight_of(packed, codes)
        return [(of_expert(weight, e, len(columns)), own) for e, own in enumerate(columns)]

    def forward(self, row: Row, values: Values) -> list[Tensor]:
        return [torch.stack([thin(weight, own.t(), own.dtype) for weight, own in self._each(row, values)])]

    def backward(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor]:
        each = zip(dys[0], self._each(row, values), strict=True)
        return [cast(torch.stack([gathered(d, weight, d.dtype).t() for d, (weight, _) in each]), given(row[1]).dtype)]

    def composite(self, row: Row, values: Values) -> tuple[Tensor]:
        return (torch.stack([dense_of(weight, own.dtype) @ own for weight, own in self._each(row, values)]),)

    def fake(self, operands: _Operands, codes: Codes) -> tuple[Tensor]:
        columns = operands.columns
        return (columns.new_empty(columns.shape[0], _rows(operands, codes), columns.shape[2]),)

    def flops(self, operands: Any, codes: Codes) -> int:
        return 2 * _rows(operands, codes) * math.prod(operands.columns)

    def backward_flops(self, dy: Any, needs: Sequence[bool], operands: Any, codes: Codes) -> int:
        return 2 * _rows(operands, codes) * math.prod(operands.columns) * needs[0]


def _rows(operands: Any, codes: Codes) -> int:
    """N, from tensors or their shapes."""
    weight, columns = (getattr(own, "shape", own) for own in operands)
    return codes.form[0] // columns[0] if codes.form else weight[1]


EXPERT_WC = _ExpertWc()
EXPERT_WC.register()
