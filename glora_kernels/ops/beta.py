"""The x-independent vector β of a layer, and its gradients.

    β = b∘(1+d) + e + W·c,   (N,)
    ∂b = g∘(1+d),  ∂c = Wᵀg,  ∂d = g∘b,  ∂e = g  (summed where d or e is a constant),  g = ∂β

C multiplies the base W, never the adapted one. β is computed anew at each forward: a changed parameter leaves
no trace that would tell when an old one is stale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glora_kernels.launch import routes
from glora_kernels.ops import triton as triton_path
from glora_kernels.ops.common import LIBRARY, check_vector, wide_dtype, without_autocast

LIBRARY.define("glora_beta(Tensor weight, Tensor? bias, Tensor? c, Tensor? d, Tensor? e, str route) -> Tensor")
LIBRARY.define(
    "glora_beta_backward(Tensor g, Tensor weight, Tensor? bias, Tensor? c, Tensor? d, Tensor? e, bool[] needs, "
    "str route) -> (Tensor, Tensor, Tensor, Tensor)"
)


def glora_beta(
    weight: Tensor,
    bias: Tensor | None,
    c: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
) -> Tensor | None:
    """β = b∘(1+d) + e + W·c, the part of a GLoRA layer that does not depend on x.

    Args:
        weight: W (N, K), frozen.
        bias: b (N,), or None.
        c: (K,), or None. A low-rank C is multiplied out by the caller.
        d: (N,) or (1,), or None; needs a bias.
        e: (N,) or (1,), or None.

    Returns:
        (N,), in fp32 over a 16-bit weight (a small E must survive its addition to b); the bias itself where
        c, d and e are absent.

    Raises:
        ValueError: a size or device that does not fit, or d without a bias.
    """
    if c is None and d is None and e is None:
        return bias
    n, k = weight.shape
    for name, tensor, size in (("bias", bias, n), ("c", c, k), ("d", d, n), ("e", e, n)):
        if tensor is not None:
            check_vector(name, tensor, size, constant=name in "de")
            if tensor.device != weight.device:
                raise ValueError(f"weight and {name} must be on one device; got {weight.device} and {tensor.device}")
    if d is not None and bias is None:
        raise ValueError("d scales the bias: it cannot be given where bias is None")
    if c is None and d is None and e is not None:  # one addition: PyTorch's own costs less than a call of ours
        e = e.to(wide_dtype(weight.dtype))
        return e.expand(weight.shape[0]) if bias is None else bias.to(e.dtype) + e
    route = routes.route(weight.device.type, weight.dtype)
    if torch.compiler.is_compiling():
        return torch.ops.glora_kernels.glora_beta(weight, bias, c, d, e, route)
    return _BetaFunction.apply(weight, bias, c, d, e, route)


def _forward(
    weight: Tensor, bias: Tensor | None, c: Tensor | None, d: Tensor | None, e: Tensor | None, route: str
) -> Tensor:
    with without_autocast(weight.device.type):
        if route == "triton":
            return triton_path.beta_forward(weight, bias, c, d, e)
        wide = wide_dtype(weight.dtype)
        beta = None if bias is None else bias.to(wide)
        if beta is not None and d is not None:
            beta = torch.addcmul(beta, beta, d.to(wide))
        if e is not None:
            beta = e.to(wide).expand(weight.shape[0]) if beta is None else beta + e.to(wide)
        if c is not None:
            wc = (weight @ c.to(weight.dtype)).to(wide)
            beta = wc if beta is None else beta + wc
        if beta is None:
            raise AssertionError("glora_beta has no term")
        return beta.clone() if c is None and (bias is None or (d is None and e is None)) else beta


def _backward(
    g: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    d: Tensor | None,
    e: Tensor | None,
    needs: list[bool],
    route: str,
) -> tuple[Tensor | None, ...]:
    need_b, need_c, need_d, need_e = needs
    with without_autocast(weight.device.type):
        db = dc = dd = de = None
        if need_b and bias is not None:
            db = (g if d is None else torch.addcmul(g, g, d.to(g.dtype))).to(bias.dtype)
        if need_c and c is not None:
            if route == "triton":
                dc = triton_path.beta_backward_c(g, weight, c)
            else:
                dc = (weight.t() @ g.to(weight.dtype)).to(c.dtype)
        if need_d and d is not None and bias is not None:
            dd = _reduced(g * bias.to(g.dtype), d)
        if need_e and e is not None:
            de = _reduced(g, e)
        return db, dc, dd, de


def _reduced(gradient: Tensor, parameter: Tensor) -> Tensor:
    if parameter.numel() == 1 and gradient.numel() > 1:
        gradient = gradient.sum().view(1)
    return gradient.to(parameter.dtype)


class _BetaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Any, c: Any, d: Any, e: Any, route: str) -> Tensor:
        ctx.save_for_backward(weight, bias, c, d, e)
        ctx.route = route
        return _forward(weight, bias, c, d, e, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[1:5])
        weight, bias, c, d, e = ctx.saved_tensors
        return (None, *_backward(g, weight, bias, c, d, e, needs, ctx.route), None)


# The registered operators: the same functions behind torch.compile's boundary.


def _op_backward(g: Tensor, weight: Tensor, bias: Any, c: Any, d: Any, e: Any, needs: list[bool], route: str) -> Any:
    grads = _backward(g, weight, bias, c, d, e, needs, route)
    # Two outputs of an operator may not be one tensor, and none may be an input.
    return tuple(g.new_empty(0) if grad is None else grad.clone() for grad in grads)


def _fake(weight: Tensor, bias: Any, c: Any, d: Any, e: Any, route: str) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=wide_dtype(weight.dtype))


def _fake_backward(g: Tensor, weight: Tensor, bias: Any, c: Any, d: Any, e: Any, needs: list[bool], route: str) -> Any:
    present = ((bias, needs[0]), (c, needs[1]), (d, needs[2] and bias is not None), (e, needs[3]))
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if tensor is not None and need
        else g.new_empty(0)
        for tensor, need in present
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    weight, bias, c, d, e, ctx.route = inputs
    ctx.save_for_backward(weight, bias, c, d, e)


def _op_autograd(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[1:5])
    grads = torch.ops.glora_kernels.glora_beta_backward(g.contiguous(), *ctx.saved_tensors, needs, ctx.route)
    return (None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("glora_beta", _forward, _device)
    LIBRARY.impl("glora_beta_backward", _op_backward, _device)
torch.library.register_fake("glora_kernels::glora_beta", _fake, lib=LIBRARY)
torch.library.register_fake("glora_kernels::glora_beta_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("glora_kernels::glora_beta", _op_autograd, setup_context=_setup_context, lib=LIBRARY)
