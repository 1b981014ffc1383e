"""W·c, the part of a GLoRA layer that C is, and its gradients.

    wc = W·c,   c = C_up·C_down where C is lora
    dc = Wᵀg,  dC_up = dc·C_downᵀ,  dC_down = C_upᵀ·dc,   g = ∂wc

C multiplies the base W, never the adapted one. W·c does not depend on x, and yet is computed anew at each forward: a
changed parameter leaves no trace that would tell when an old one is stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch import routes
from glora_kernels.ops import composite
from glora_kernels.ops import eager as eager_path
from glora_kernels.ops import triton as triton_path
from glora_kernels.ops.common import (
    LIBRARY,
    NO_QUANT,
    QUANT_ARGUMENTS,
    Weight,
    cast,
    check_form,
    quant_arguments,
    restored,
    state_of,
    stored,
    wc_dtype,
    weight_of,
    without_autocast,
)
from glora_kernels.ops.ways import is_batched, is_transformed, is_watched, once_differentiable
from glora_kernels.quant import QuantizedWeight

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
    k = weight.shape[1]
    if c is None and c_up is None and c_down is None:
        raise ValueError("glora_wc needs c, or c_up and c_down")
    check_form("c", k, False, k, 1, c, c_up, c_down)
    for name, tensor in (("c", c), ("c_up", c_up), ("c_down", c_down)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"weight and {name} must be on one device; got {weight.device} and {tensor.device}")
    four_bit = isinstance(weight, QuantizedWeight)
    route = routes.route(weight.device.type, wc_dtype(weight, c, c_up), four_bit=four_bit)
    if is_transformed():
        return composite.glora_wc(weight, c, c_up, c_down)
    if is_watched(stored(weight)):
        return torch.ops.glora_kernels.glora_wc(stored(weight), c, c_up, c_down, route, *quant_arguments(weight))
    return _WCFunction.apply(weight, c, c_up, c_down, route)


def _forward(weight: Weight, c: Tensor | None, c_up: Tensor | None, c_down: Tensor | None, route: str) -> Tensor:
    path = eager_path if route == "eager" else triton_path
    with without_autocast(weight.device.type):
        return path.wc_forward(weight, c, c_up, c_down)


def gradients(
    g: Tensor,
    weight: Weight,
    c: Tensor | None,
    c_up: Tensor | None,
    c_down: Tensor | None,
    needs: Sequence[bool],
    route: str,
) -> tuple[Tensor | None, ...]:
    """(dc, dC_up, dC_down) from g = ∂wc, each in the dtype of its tensor; None where not wanted."""
    if is_batched(g):
        tensors = c, c_up, c_down
        return tuple(composite.gradients(lambda *of: composite.glora_wc(weight, *of), tensors, needs, g))
    if is_watched(g):
        return _operator_gradients(g, weight, c, c_up, c_down, needs, route)
    return _gradients(g, weight, c, c_up, c_down, needs, route)


def _operator_gradients(
    g: Tensor,
    weight: Weight,
    c: Tensor | None,
    c_up: Tensor | None,
    c_down: Tensor | None,
    needs: Sequence[bool],
    route: str,
) -> tuple[Tensor | None, ...]:
    grads = torch.ops.glora_kernels.glora_wc_backward(
        g.contiguous(), stored(weight), c, c_up, c_down, list(needs), route, *quant_arguments(weight)
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _gradients(
    g: Tensor,
    weight: Weight,
    c: Tensor | None,
    c_up: Tensor | None,
    c_down: Tensor | None,
    needs: Sequence[bool],
    route: str,
) -> tuple[Tensor | None, ...]:
    path = eager_path if route == "eager" else triton_path
    with without_autocast(weight.device.type):
        grads = path.wc_backward(g, weight, c, c_up, c_down, needs)
    return tuple(
        None if grad is None or tensor is None else cast(grad, tensor.dtype)
        for grad, tensor in zip(grads, (c, c_up, c_down), strict=True)
    )


class _WCFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Weight, c: Any, c_up: Any, c_down: Any, route: str) -> Tensor:
        ctx.save_for_backward(stored(weight), c, c_up, c_down)
        ctx.quant_state = state_of(weight)
        ctx.route = route
        return _forward(weight, c, c_up, c_down, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        tensor, c, c_up, c_down = ctx.saved_tensors
        weight = restored(tensor, ctx.quant_state)
        return (None, *gradients(g, weight, c, c_up, c_down, ctx.needs_input_grad[1:4], ctx.route), None)


# The registered operators: the same functions behind torch.compile's boundary. An absent result is an empty tensor.


def _op(weight: Tensor, c: Any, c_up: Any, c_down: Any, route: str, *quant: Any) -> Tensor:
    return _forward(weight_of(weight, *quant), c, c_up, c_down, route)


def _op_backward(
    g: Tensor, weight: Tensor, c: Any, c_up: Any, c_down: Any, needs: list[bool], route: str, *quant: Any
) -> Any:
    grads = _gradients(g, weight_of(weight, *quant), c, c_up, c_down, needs, route)
    return tuple(g.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


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
    *tensors, ctx.route = inputs[:5]
    *state, ctx.form = inputs[5:] or NO_QUANT
    ctx.save_for_backward(*tensors, *state)


def _op_autograd(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    weight, c, c_up, c_down, *state = ctx.saved_tensors
    whole = weight_of(weight, *(*state, ctx.form))
    run = gradients if is_batched(g) else _operator_gradients
    grads = run(g, whole, c, c_up, c_down, ctx.needs_input_grad[1:4], ctx.route)
    return (None, *grads, *(None for _ in range(6)))  # the route and QUANT_ARGUMENTS


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("glora_wc", _op, _device)
    LIBRARY.impl("glora_wc_backward", _op_backward, _device)
torch.library.register_fake("glora_kernels::glora_wc", _fake, lib=LIBRARY)
torch.library.register_fake("glora_kernels::glora_wc_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("glora_kernels::glora_wc", _op_autograd, setup_context=_setup_context, lib=LIBRARY)
