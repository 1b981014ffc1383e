"""W·c, the part of a GLoRA layer that C is, and its gradients.

    wc = W·c,   c = C_up·C_down where C is lora
    dc = Wᵀg,  dC_up = dc·C_downᵀ,  dC_down = C_upᵀ·dc,   g = ∂wc

C multiplies the base W, never the adapted one. W·c does not depend on x, and yet is computed anew at each forward: a
changed parameter leaves no trace that would tell when an old one is stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch import prepared
from glora_kernels.dispatch.common import (
    LIBRARY,
    NO_QUANT,
    QUANT_ARGUMENTS,
    Weight,
    cast,
    check_form,
    given,
    path_of,
    quant_arguments,
    stored,
    wc_dtype,
    weight_of,
    without_autocast,
)
from glora_kernels.dispatch.prepared import Prepared, Row
from glora_kernels.dispatch.ways import is_batched, is_transformed, is_watched
from glora_kernels.glora import composite
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import routes

LIBRARY.define(
    f"glora_wc(Tensor weight, Tensor? c, Tensor? c_up, Tensor? c_down, str route, {QUANT_ARGUMENTS}) -> Tensor"
)
LIBRARY.define(
    "glora_wc_backward(Tensor g, Tensor weight, Tensor? c, Tensor? c_up, Tensor? c_down, bool[] needs, str route, "
    f"{QUANT_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)


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
    """
    state, watched = quant_arguments(weight), is_watched(stored(weight))
    if is_transformed() or watched:
        route = _checked_route(weight, c, c_up, c_down)
        if not watched or is_transformed():
            return composite.glora_wc(weight, c, c_up, c_down)
        return torch.ops.glora_kernels.glora_wc(stored(weight), c, c_up, c_down, route, *state)
    *beside, form = state
    row = (stored(weight), *beside, c, c_up, c_down)
    wanted: tuple[bool, ...] = (False, False, False)
    if torch.is_grad_enabled():
        wanted = tuple([t is not None and t.requires_grad for t in (c, c_up, c_down)])

    def make() -> Prepared:
        return _prepare(row, form, _checked_route(weight, c, c_up, c_down), wanted)

    return prepared.call(prepared.find(_WC, row, 0, (form, routes.chosen(), wanted), make), row)[0]


def _checked_route(weight: Weight, c: Tensor | None, c_up: Tensor | None, c_down: Tensor | None) -> str:
    k = weight.shape[1]
    if c is None and c_up is None and c_down is None:
        raise ValueError("glora_wc needs c, or c_up and c_down")
    check_form("c", k, False, k, 1, c, c_up, c_down)
    for name, tensor in (("c", c), ("c_up", c_up), ("c_down", c_down)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"weight and {name} must be on one device; got {weight.device} and {tensor.device}")
    four_bit = isinstance(weight, QuantizedWeight)
    return routes.route(weight.device.type, wc_dtype(weight, c, c_up), four_bit=four_bit)


# The tensors of a call in a row (`dispatch.prepared`): the stored weight, the four beside 4-bit codes, c, C_up, C_down.
_C = slice(5, 8)


class _Values(NamedTuple):
    form: tuple[int, ...]
    route: str

    def weight(self, row: Row) -> Weight:
        packed, absmax, nested_absmax, code, offset = row[: _C.start]
        return weight_of(given(packed), absmax, nested_absmax, code, offset, self.form)


def _prepare(row: Row, form: Sequence[int], route: str, wanted: Sequence[bool]) -> Prepared:
    saved = [i for i, tensor in enumerate(row) if tensor is not None]
    flags = (*(False,) * _C.start, *wanted)
    return Prepared(_WC, _Values(tuple(form), route), flags, saved, size=len(row) + 1, has_kernels=route != "eager")


def _forward(row: Row, values: _Values) -> list[Tensor | None]:
    path = path_of("glora", values.route)
    return [path.wc_forward(values.weight(row), *row[_C])]


def _backward(dys: Sequence[Tensor], row: Row, values: _Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    return _written(dys[0], values.weight(row), row[_C], wanted[_C], values.route)


def _elsewhere(dys: Sequence[Tensor], row: Row, values: _Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    return gradients(dys[0], values.weight(row), row[_C], wanted[_C], values.route)


def gradients(g: Tensor, weight: Weight, cs: Row, needs: Sequence[bool], route: str) -> list[Tensor | None]:
    """The wanted ones of (dc, dC_up, dC_down) from g = ∂wc, in the dtypes of their tensors, by any `dispatch.ways`."""
    if is_batched(g):
        grads = composite.gradients(lambda *of: composite.glora_wc(weight, *of), cs, needs, g)
    elif is_watched(g):
        *beside, form = quant_arguments(weight)
        grads = torch.ops.glora_kernels.glora_wc_backward(
            g.contiguous(), stored(weight), *cs, list(needs), route, *beside, list(form)
        )
    else:
        with without_autocast(g.device.type):
            return _written(g, weight, cs, needs, route)
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


def _written(g: Tensor, weight: Weight, cs: Row, needs: Sequence[bool], route: str) -> list[Tensor | None]:
    path = path_of("glora", route)
    found = zip(path.wc_backward(g, weight, *cs, needs), cs, needs, strict=True)
    return [cast(grad, given(tensor).dtype) for grad, tensor, need in found if need]


_WC = prepared.Operation("glora_wc", _forward, _backward, _elsewhere)


# The registered operators: the same functions behind torch.compile's boundary. An absent result is an empty tensor.


def _op(weight: Tensor, c: Any, c_up: Any, c_down: Any, route: str, *quant: Any) -> Any:
    *beside, form = quant or NO_QUANT
    row, none = (weight, *beside, c, c_up, c_down), (False, False, False)
    found = prepared.find(_WC, row, 0, (tuple(form), route), lambda: _prepare(row, form, route, none))
    return found.forward(row)[0]


def _op_backward(
    g: Tensor, weight: Tensor, c: Any, c_up: Any, c_down: Any, needs: list[bool], route: str, *quant: Any
) -> Any:
    *beside, form = quant or NO_QUANT
    row = (weight, *beside, c, c_up, c_down)
    found = _prepare(row, form, route, needs)
    grads = iter(found.backward([g], [row[i] for i in found.saved]))
    return tuple(given(next(grads)).contiguous() if need else g.new_empty(0) for need in needs)


def _fake(weight: Tensor, c: Any, c_up: Any, c_down: Any, route: str, *quant: Any) -> Tensor:
    whole = weight_of(weight, *quant)
    return weight.new_empty(whole.shape[0], dtype=wc_dtype(whole, c, c_up))


def _fake_backward(
    g: Tensor, weight: Tensor, c: Any, c_up: Any, c_down: Any, needs: list[bool], route: str, *quant: Any
) -> Any:
    return tuple(
        g.new_empty(tensor.shape, dtype=tensor.dtype) if need and tensor is not None else g.new_empty(0)
        for tensor, need in zip((c, c_up, c_down), needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    weight, *cs, ctx.route = inputs[:5]
    *state, ctx.form = inputs[5:] or NO_QUANT
    ctx.save_for_backward(weight, *state, *cs)


def _op_autograd(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[1:4]
    wanted = (*(False,) * _C.start, *needs)
    grads = iter(_elsewhere([g], ctx.saved_tensors, _Values(tuple(ctx.form), ctx.route), wanted))
    return (
        None,
        *(next(grads) if need else None for need in needs),
        *(None for _ in range(6)),
    )  # route, QUANT_ARGUMENTS


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("glora_wc", _op, _device)
    LIBRARY.impl("glora_wc_backward", _op_backward, _device)
torch.library.register_fake("glora_kernels::glora_wc", _fake, lib=LIBRARY)
torch.library.register_fake("glora_kernels::glora_wc_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("glora_kernels::glora_wc", _op_autograd, setup_context=_setup_context, lib=LIBRARY)
