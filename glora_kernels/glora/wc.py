"""W·c, the term of support C in β, and its gradients.

    wc = W·c,   c = C_up·C_down where C is lora
    dc = Wᵀg,  dC_up = dc·C_downᵀ,  dC_down = C_upᵀ·dc,   g = ∂wc

C multiplies the base W, never the adapted one. W·c does not depend on x, yet every forward computes it again, because
there is no reliable sign that a parameter has changed since.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from glora_kernels.dispatch.checks import check_devices, check_form
from glora_kernels.dispatch.common import (
    Codes,
    Weight,
    cast,
    codes_of,
    given,
    path_of,
    stored,
    weight_of,
    without_autocast,
)
from glora_kernels.dispatch.operator import Operator
from glora_kernels.dispatch.prepared import Prepared
from glora_kernels.dispatch.signature import Row, Signature, Values
from glora_kernels.dispatch.ways import is_batched, is_watched
from glora_kernels.glora import composite
from glora_kernels.glora.call import C, wc_dtype
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import routes


def glora_wc(
    weight: Weight, c: Tensor | None = None, *, c_up: Tensor | None = None, c_down: Tensor | None = None
) -> Tensor:
    """W·c, or W·(C_up·C_down), which `glora_linear` adds to every row of y.

    Args:
        weight: W (N, K), frozen; any strides, or in 4 bits.
        c: C as a vector, (K,).
        c_up: C=lora, (K, R).
        c_down: C=lora, (R, 1).

    Returns:
        (N,), in fp32 over a 16-bit or 4-bit weight: neither c nor the result is rounded to 16 bits.

    Raises:
        ValueError: a size or device that does not fit, or not exactly one form of C.
        RuntimeError: a forced `backend` that cannot serve the call.

    Examples:
        >>> from glora_kernels.ops import glora_linear, glora_wc
        >>> x, weight, c = torch.randn(2, 16), torch.randn(32, 16), torch.randn(16, requires_grad=True)
        >>> y = glora_linear(x, weight, wc=glora_wc(weight, c))  # as glora_linear(x, weight, c=c)
    """
    *codes, form = codes_of(weight)
    row = stored(weight), c, c_up, c_down, *codes
    return WC.call(row, form, lambda row: Values((_checked_route(weight, C(*row[1:4])), form)), inputs=0)[0]


def _checked_route(weight: Weight, c: C) -> str:
    k = weight.shape[1]
    if all(form is None for form in c):
        raise ValueError("glora_wc needs c, or c_up and c_down")
    check_form("c", k, False, (k, 1), *c)
    check_devices(("weight", weight.device), c._asdict().items())
    return routes.route(weight.device.type, wc_dtype(weight, c), four_bit=isinstance(weight, QuantizedWeight))


class _Base(NamedTuple):
    weight: Tensor


class _Route(NamedTuple):
    route: str


class _Wc(Operator):
    name = "glora_wc"
    signature = Signature(_Base, C, _Route, Codes)
    has_inputs = False
    results = ("wc",)
    trained = C._fields

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        saved = [i for i, tensor in enumerate(row) if tensor is not None]
        route, _ = values.numbers
        wanted = self.graded(wanted)
        return Prepared(
            self, values, wanted, saved, size=len(row) + 1, has_kernels=not routes.is_eager(route), keeps=registered
        )

    def _read(self, row: Row, values: Values) -> tuple[Weight, C, str]:
        (packed,), c, (route,), codes = self.signature.read(row, values)
        return weight_of(packed, codes), c, route

    def forward(self, row: Row, values: Values) -> list[Tensor | None]:
        weight, c, route = self._read(row, values)
        return [path_of("glora", route).wc_forward(weight, c)]

    def backward(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
        weight, c, route = self._read(row, values)
        needs = wanted[1:4]
        found = zip(path_of("glora", route).wc_backward(dys[0], weight, c, needs), c, needs, strict=True)
        return [cast(grad, given(tensor).dtype) for grad, tensor, need in found if need]

    def composite(self, row: Row, values: Values) -> tuple[Tensor]:
        weight, c, _ = self._read(row, values)
        return (composite.glora_wc(weight, c),)

    def fake(self, base: _Base, c: C, route: _Route, codes: Codes) -> tuple[Tensor]:
        weight = weight_of(base.weight, codes)
        return (base.weight.new_empty(weight.shape[0], dtype=wc_dtype(weight, c)),)

    def flops(self, base: Any, c: Any, route: _Route, codes: Any) -> int:
        return 2 * math.prod(sizes(base.weight, codes)) + (2 * math.prod(c.c_up) if c.c_up else 0)

    def backward_flops(self, dy: Any, needs: Sequence[bool], base: Any, c: Any, route: _Route, codes: Any) -> int:
        pair = 2 * math.prod(c.c_up) * sum(needs[1:]) if c.c_up else 0
        return (2 * math.prod(sizes(base.weight, codes)) if any(needs) else 0) + pair


def sizes(weight: Sequence[int], codes: Any) -> Sequence[int]:
    """(N, K) from the shape of a weight, or the form of its codes."""
    return codes.form[:2] if codes.form else weight


WC = _Wc()
WC.register()


def gradients(g: Tensor, weight: Weight, c: C, wanted: Sequence[bool], route: str) -> Sequence[Tensor | None]:
    """The wanted ones of (dc, dC_up, dC_down) from g = ∂wc, in their tensors' dtypes; g may be watched or batched."""
    *codes, form = codes_of(weight)
    run = WC.elsewhere if is_batched(g) or is_watched(g) else WC.backward
    with without_autocast(g.device.type):
        return run([g], (stored(weight), *c, *codes, None), Values((route, form)), (False, *wanted, *(False,) * 4))
