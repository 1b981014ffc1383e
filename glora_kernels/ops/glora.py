"""The GLoRA linear operator: forward, gradients, and its registration with PyTorch.

    y = Z∘(1+a) + s·(x̃·B_downᵀ)·B_upᵀ + σ·bᵀ + β,   Z = xWᵀ, σ = Σₖ xₖ, x̃ = mask·x/(1-p), β = bias∘(1+d) + e + wc

with Z from W_eff = W∘(1 + A_up·A_down) where A is lora, and x·A_downᵀ·(W·A_up)ᵀ added in the product variant.
Three ways lead into it (`ops.ways`): in eager mode an `autograd.Function` (8 µs a call), under torch.compile and for
whoever watches the operations the registered operator, one node, and under torch.func PyTorch's own operations. What
it computes: `ops.eager`, `ops.triton`; `ops.composite`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch import routes
from glora_kernels.launch.workspace import private_workspace, workspace_lock
from glora_kernels.ops import composite
from glora_kernels.ops import eager as eager_path
from glora_kernels.ops import triton as triton_path
from glora_kernels.ops.common import (
    LIBRARY,
    NO_QUANT,
    QUANT_ARGUMENTS,
    Call,
    Needs,
    Supports,
    Weight,
    autocast_dtype,
    check_form,
    check_vector,
    factor_dtype,
    owned,
    quant_arguments,
    read_saved,
    restored,
    state_of,
    stored,
    weight_of,
    wide_dtype,
    without_autocast,
)
from glora_kernels.ops.ways import is_batched, is_plain, is_transformed, is_watched, once_differentiable, rows_of
from glora_kernels.quant import QuantizedWeight
from glora_kernels.spec import VARIANTS

_NO_GUARD = nullcontext()
_N = len(Supports._fields)
_AB = Supports._fields.index("bias")  # before it the forms of A and B, from it on the terms of β
_SUPPORTS = ", ".join(f"Tensor? {name}" for name in Supports._fields)
_VALUES = "float scale, float dropout_p, Tensor? seed, bool matmul, str route"
_GRADIENTS = ", ".join("Tensor" for _ in Needs._fields)
LIBRARY.define(
    f"glora_linear(Tensor x, Tensor weight, {_SUPPORTS}, {_VALUES}, {QUANT_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    f"glora_linear_backward(Tensor dy, Tensor? x, Tensor weight, {_SUPPORTS}, Tensor? y, Tensor? h, Tensor? sigma, "
    f"Tensor? u, {_VALUES}, bool[] needs, {QUANT_ARGUMENTS}) -> ({_GRADIENTS})"
)
_V = _N + len(Call._fields)  # behind x and W: the supports, the values, and then the QUANT_ARGUMENTS
_BACK = _V + 5  # as in the backward, where y, h, σ and U stand before the values and what is needed behind them
_SEEDS = 2**62, 2**63 - 1


def glora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    a: Tensor | None = None,
    a_up: Tensor | None = None,
    a_down: Tensor | None = None,
    b: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    wc: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    variant: str = "hadamard",
) -> Tensor:
    """y = x (W + W∘A + s·B)ᵀ + bias∘(1+d) + e + wc, without building W_eff where A is not lora.

    The gradients, with g = Σₘ dy: ∂bias = g∘(1+d), ∂wc = g, ∂d = g∘bias, ∂e = g, summed where d or e is a constant;
    those of x, A and B: `ops.eager.backward`.

    Args:
        x: (..., K); also nested, whose y is nested as it is, or sparse, whose y is dense.
        weight: W (N, K), frozen; any strides. In the dtype of x, or any where autocast settles it. Or a
            `QuantizedWeight`: W is what the codes stand for, rounded to the dtype of x (of autocast).
        bias: of the base (N,), or None.
        a: A as a vector (N,) or constant (1,).
        a_up: A=lora, (N, R); in the product variant (K, R).
        a_down: A=lora, (R, K).
        b: B as a vector (N,) or constant (1,).
        b_up: B=lora, (N, R).
        b_down: B=lora, (R, K).
        wc: W·c (N,), the part of C (`glora_wc`), in fp32 over 16 bits.
        d: D as a vector (N,) or constant (1,); needs a bias.
        e: E as a vector (N,) or constant (1,).
        scale: s, multiplies the low-rank B path only.
        dropout_p: p in [0, 1), on x in the low-rank B path only.
        seed: one int64, the key of the dropout mask, on the CPU or on the device of x; needed where p > 0
            (`dropout_seed`). One on the CPU is a constant to a CUDA graph that captures the call.
        variant: "hadamard" (W∘A) or "matmul" (W·A).

    Returns:
        (..., N) in the dtype of x (of autocast where it is on). The adapters may have another dtype; their
        gradients come in theirs.

    Raises:
        ValueError: sizes, devices or a combination of arguments that do not fit (d without a bias is one), a seed
            that is not one int64, or a weight that requires grad.
        TypeError: an x that is not floating point, or a dtype that differs from the weight's.
        RuntimeError: a forced `backend` that cannot serve the call. In backward: x or a parameter was
            overwritten in place meanwhile, or y while a trained vector or constant A needs it.
    """
    s = Supports(a, a_up, a_down, b, b_up, b_down, bias, wc, d, e)
    if not is_plain(x):
        x, nested = rows_of(x)
        return nested(_linear(x, weight, s, scale, dropout_p, seed, variant))
    return _linear(x, weight, s, scale, dropout_p, seed, variant)


def _linear(
    x: Tensor, weight: Weight, s: Supports, scale: float, dropout_p: float, seed: Tensor | None, variant: str
) -> Tensor:
    target, transformed = autocast_dtype(x), is_transformed()
    _check(x, weight, s, dropout_p, seed, variant, target, transformed)
    if target is not None and x.dtype != target:
        x = x.to(target)
    call = Call(scale, dropout_p, seed, variant == "matmul", _route(x, weight))
    if transformed:
        return composite.glora_linear(x, weight, s, call)
    if is_watched(x):
        return torch.ops.glora_kernels.glora_linear(x, stored(weight), *s, *call, *quant_arguments(weight))[0]
    if not torch.is_grad_enabled():
        return _forward(x, weight, s, call)[0]
    return _GLoRAFunction.apply(x, weight, call, *s)


def dropout_seed(device: torch.device) -> Tensor:
    """One int64, the key of the dropout mask of one call on `device`.

    Drawn on the host, from torch's CPU generator, whatever the device: the GPU has nothing to do for it, and a kernel
    gets it as a number. Activation checkpointing restores that generator, and so sees the same mask. Bit 62 is set,
    so that the number has one integer type as a kernel's argument.

    On the device while a CUDA graph is captured or torch.compile traces: a number drawn on the host would be a
    constant there, and every replay would drop the same elements. A key behind a pointer is another compiled kernel,
    and a capture is no time to compile: see `seeds_on_device`.
    """
    if torch.compiler.is_compiling() or (device.type == "cuda" and (_Seeds.on_device or _capturing())):
        return torch.randint(*_SEEDS, (1,), dtype=torch.int64, device=device)
    return torch.randint(*_SEEDS, (1,), dtype=torch.int64, device="cpu")


class _Seeds:
    on_device = False


@contextlib.contextmanager
def seeds_on_device() -> Iterator[None]:
    """Inside, `dropout_seed` draws on the device, as under capture: to compile for a CUDA graph before capturing it."""
    before, _Seeds.on_device = _Seeds.on_device, True
    try:
        yield
    finally:
        _Seeds.on_device = before


def _capturing() -> bool:
    # A fake tensor of a GPU may be met where there is none, and the question itself is an error there.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _check(
    x: Tensor,
    weight: Weight,
    s: Supports,
    dropout_p: float,
    seed: Tensor | None,
    variant: str,
    target: torch.dtype | None,
    transformed: bool = False,
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    n, k = weight.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have {k} features in its last dimension (in_features); got shape {tuple(x.shape)}")
    if target is None and x.dtype != weight.dtype and isinstance(weight, Tensor):
        raise TypeError(f"x and weight must have one dtype outside autocast; got x {x.dtype} and weight {weight.dtype}")
    device = x.device
    for tensor in (weight, *s):
        if tensor is not None and tensor.device != device:
            names = ("weight", *Supports._fields)
            name = next(n for n, t in zip(names, (weight, *s), strict=True) if t is tensor)
            raise ValueError(f"x and {name} must be on one device; got x on {device} and {name} on {tensor.device}")
    if weight.requires_grad and torch.is_grad_enabled() and not transformed:
        raise ValueError(
            "weight requires a gradient, but a GLoRA layer's base is frozen and gets none; "
            "call weight.requires_grad_(False)"
        )
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}; got {variant!r}")
    check_form("a", n, True, k if variant == "matmul" else n, k, s.a, s.a_up, s.a_down)
    check_form("b", n, True, n, k, s.b, s.b_up, s.b_down)
    if s.bias is not None:
        check_vector("bias", s.bias, n, constant=False)
    elif s.d is not None:
        raise ValueError("d scales the bias: it cannot be given where bias is None")
    if s.wc is not None:
        check_vector("wc", s.wc, n, constant=False)
    if s.d is not None:
        check_vector("d", s.d, n, constant=True)
    if s.e is not None:
        check_vector("e", s.e, n, constant=True)
    if variant == "matmul" and s.a is not None:
        raise ValueError("variant='matmul' accepts a_up and a_down, not a")
    if dropout_p != 0.0:
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
        if s.b_up is not None and seed is None:
            raise ValueError(f"dropout_p={dropout_p} needs a seed: pass seed=dropout_seed(x.device)")
    if seed is not None and (
        seed.dtype != torch.int64 or seed.numel() != 1 or (seed.device != device and seed.device.type != "cpu")
    ):
        raise ValueError(
            f"seed must be one int64 on the CPU or on the device of x, {device}; "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )


def _route(x: Tensor, weight: Weight) -> str:
    return routes.route(x.device.type, x.dtype, four_bit=isinstance(weight, QuantizedWeight))


def _workspace_guard(x: Tensor, weight: Weight, s: Supports, call: Call) -> AbstractContextManager[object]:
    """Held while a call builds a weight in the workspace and reads it, where host threads may share a stream."""
    builds = isinstance(weight, QuantizedWeight) or weight.dtype != x.dtype
    if x.is_cuda and (builds or s.a is not None or (s.a_up is not None and not call.matmul)):
        return workspace_lock
    return _NO_GUARD


def _forward(x: Tensor, weight: Weight, s: Supports, call: Call) -> Any:
    """(y, h, σ, U) of an N-dimensional x by the call's route."""
    path = eager_path if call.route == "eager" else triton_path
    flat = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    with without_autocast(x.device.type), _workspace_guard(x, weight, s, call):
        y, h, sigma, u = path.forward(flat, weight, s, call)
    if x.ndim != 2:  # no view: PyTorch refuses to change a view in place that came out of a Function
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])
    return y, h, sigma, u


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    s: Supports,
    y: Tensor | None,
    h: Tensor | None,
    sigma: Tensor | None,
    u: Tensor | None,
    call: Call,
    needs: Needs,
) -> list[Tensor | None]:
    """The gradients in the order of `Needs`, each in the shape and dtype of its tensor."""
    lead, n, k = dy.shape[:-1], weight.shape[0], weight.shape[1]
    rows = math.prod(lead)
    path = eager_path if call.route == "eager" else triton_path
    if dy.ndim != 2:
        dy = dy.reshape(rows, n)
        x = None if x is None else x.reshape(rows, k)
        y = None if y is None else y.reshape(rows, n)
    with without_autocast(dy.device.type), _workspace_guard(dy, weight, s, call):
        grads = list(path.backward(dy, x, weight, s, y, h, sigma, u, call, needs))
    if grads[0] is not None and len(lead) != 1:
        grads[0] = grads[0].view(*lead, k)
    for i, tensor in enumerate(s, start=1):
        grad = grads[i]
        if grad is not None and tensor is not None and grad.dtype != tensor.dtype:
            grads[i] = grad.to(tensor.dtype)
    return grads


def _saved(needs: Needs, s: Supports, call: Call) -> tuple[bool, bool, bool, bool, bool]:
    """Which of (x, y, h, σ, U) backward will read.

    x is kept for a gradient that multiplies it, and beside y for a vector or constant A: Z is computed anew in the
    rows where y does not give it (`ops.recover`).
    """
    keep_x = needs.a or needs.b_down or needs.a_down or (needs.a_up and not call.matmul)
    keep_h = needs.b_up or (needs.a and s.b_up is not None) or (call.matmul and needs.a_up)
    keep_sigma = s.b is not None and (needs.b or needs.a)
    keep_u = call.matmul and s.a_up is not None and (needs.x or needs.a_down)
    return keep_x, needs.a, keep_h, keep_sigma, keep_u


class _GLoRAFunction(torch.autograd.Function):
    """Eager mode's way in: few arguments and few calls, since each costs a microsecond a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, call: Call, *tensors: Tensor | None) -> Tensor:
        s = Supports(*tensors)
        wanted = ctx.needs_input_grad
        needs = Needs(wanted[0], *wanted[3:])
        if call.route == "eager" and call.dropout_p and needs.b_down:
            # Of PyTorch operations the mask is dear to make twice, and a byte an element beside an x that is kept too.
            # The kernels make it in registers, and again in backward.
            rows, cols = math.prod(x.shape[:-1]), x.shape[-1]
            call = call._replace(seed=eager_path.keep_of(call, rows, cols, x.device))
        y, h, sigma, u = _forward(x, weight, s, call)
        if any(needs):
            keep_x, keep_y, keep_h, keep_sigma, keep_u = _saved(needs, s, call)
            reads_shift = needs.a or needs.bias or needs.wc or needs.d or needs.e
            ctx.save_for_backward(
                stored(weight),
                *tensors[:_AB],
                call.seed,
                x if keep_x else None,
                y if keep_y else None,
                h if keep_h else None,
                sigma if keep_sigma else None,
                u if keep_u else None,
                *(tensors[_AB:] if reads_shift else ()),
            )
            ctx.needs = needs
            ctx.quant_state = state_of(weight)
            ctx.call = call if call.seed is None else call._replace(seed=None)  # saved: a change of it is noticed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensor, *rest = read_saved(ctx, with_y=ctx.needs.a)
        seed, x, y, h, sigma, u, *terms = rest[_AB:]
        call = ctx.call if seed is None else ctx.call._replace(seed=seed)
        weight, s = restored(tensor, ctx.quant_state), Supports(*rest[:_AB], *terms)
        run = _batched_backward if is_batched(dy) else _operator_backward if is_watched(dy) else _backward
        grads = run(dy, x, weight, s, y, h, sigma, u, call, ctx.needs)
        return (grads[0], None, None, *grads[1:])


def _operator_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    s: Supports,
    y: Tensor | None,
    h: Tensor | None,
    sigma: Tensor | None,
    u: Tensor | None,
    call: Call,
    needs: Needs,
) -> list[Tensor | None]:
    """`_backward` through the registered operator."""
    grads = torch.ops.glora_kernels.glora_linear_backward(
        dy, x, stored(weight), *s, y, h, sigma, u, *call, list(needs), *quant_arguments(weight)
    )
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _batched_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Weight,
    s: Supports,
    y: Tensor | None,
    h: Tensor | None,
    sigma: Tensor | None,
    u: Tensor | None,
    call: Call,
    needs: Needs,
) -> list[Tensor | None]:
    """`_backward` of a batch of dy. An x that was not kept takes no part in any wanted gradient."""
    if x is None:
        x = torch.zeros(*dy.shape[:-1], weight.shape[1], dtype=dy.dtype, device=dy.device)

    def forward(x: Tensor, *tensors: Tensor | None) -> Tensor:
        return composite.glora_linear(x, weight, Supports(*tensors), call, h, sigma)

    return composite.gradients(forward, (x, *s), needs, dy)


def _needs(ctx: Any) -> Needs:
    wanted = ctx.needs_input_grad
    return Needs(wanted[0], *wanted[2 : 2 + _N])


# The registered operators: the same functions behind torch.compile's boundary. An absent result is an empty tensor.


def _op(x: Tensor, weight: Tensor, *rest: Any) -> Any:
    with private_workspace():  # a graph that PyTorch captures must own all memory it writes
        y, *others = _forward(x, weight_of(weight, *rest[_V:]), Supports(*rest[:_N]), Call(*rest[_N:_V]))
    return y, *(x.new_empty(0) if other is None else other for other in others)


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Any:
    s, call, (*_, form) = Supports(*rest[:_N]), Call(*rest[_N:_V]), rest[_V:] or NO_QUANT
    m, n = math.prod(x.shape[:-1]), form[0] if form else weight.shape[0]
    rank = s.a_up.shape[1] if call.matmul and s.a_up is not None else 0
    total, narrow = rank + (0 if s.b_up is None else s.b_up.shape[1]), factor_dtype(x.dtype, s)
    return (
        x.new_empty(*x.shape[:-1], n),
        x.new_empty(m, total, dtype=narrow) if total else x.new_empty(0),
        x.new_empty(m, dtype=wide_dtype(x.dtype)) if s.b is not None else x.new_empty(0),
        x.new_empty(n, rank, dtype=narrow) if rank else x.new_empty(0),
    )


def _op_backward(dy: Tensor, x: Any, weight: Tensor, *rest: Any) -> Any:
    s, (y, h, sigma, u), (*values, needs) = Supports(*rest[:_N]), rest[_N : _N + 4], rest[_N + 4 : _BACK]
    with private_workspace():
        w = weight_of(weight, *rest[_BACK:])
        grads = _backward(dy, x, w, s, y, h, sigma, u, Call(*values), Needs(*needs))
    return owned([dy.new_empty(0) if grad is None else grad for grad in grads])


def _fake_backward(dy: Tensor, x: Any, weight: Tensor, *rest: Any) -> Any:
    s, needs, (*_, form) = Supports(*rest[:_N]), Needs(*rest[_BACK - 1]), rest[_BACK:] or NO_QUANT
    empty = dy.new_empty
    dx = empty(*dy.shape[:-1], form[1] if form else weight.shape[1]) if needs.x else empty(0)
    others = (
        empty(tensor.shape, dtype=tensor.dtype) if need and tensor is not None else empty(0)
        for tensor, need in zip(s, needs[1:], strict=True)
    )
    return dx, *others


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, *rest = inputs
    y, h, sigma, u = output
    ctx.mark_non_differentiable(h, sigma, u)
    s, call, (*state, form) = Supports(*rest[:_N]), Call(*rest[_N:_V]), rest[_V:] or NO_QUANT
    keep = _saved(_needs(ctx), s, call)
    kept = (t if k else None for t, k in zip((x, y, h, sigma, u), keep, strict=True))
    ctx.save_for_backward(weight, *s, call.seed, *kept, *state)
    ctx.form = form
    ctx.call = call._replace(seed=None)


def _op_autograd(ctx: Any, dy: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    weight, *rest = read_saved(ctx, with_y=_needs(ctx).a)
    seed, x, y, h, sigma, u, *state = rest[_N:]
    call, weight = ctx.call._replace(seed=seed), weight_of(weight, *(*state, ctx.form))
    run = _batched_backward if is_batched(dy) else _operator_backward
    grads = run(dy, x, weight, Supports(*rest[:_N]), y, h, sigma, u, call, _needs(ctx))
    return (grads[0], None, *grads[1:], *(None for _ in range(len(Call._fields) + len(NO_QUANT))))


def _op_autocast(x: Tensor, weight: Tensor, *rest: Any) -> Any:
    target = autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return torch.ops.glora_kernels.glora_linear(x if target is None else x.to(target), weight, *rest)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("glora_linear", _op, _device)
    LIBRARY.impl("glora_linear_backward", _op_backward, _device)
    LIBRARY.impl("glora_linear", _op_autocast, f"Autocast{_device}")
torch.library.register_fake("glora_kernels::glora_linear", _fake, lib=LIBRARY)
torch.library.register_fake("glora_kernels::glora_linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("glora_kernels::glora_linear", _op_autograd, setup_context=_setup_context, lib=LIBRARY)
