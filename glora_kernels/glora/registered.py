"""The GLoRA linear operator as PyTorch's dispatcher knows it: schema, fake, autograd, autocast.

The same functions as in eager mode (`glora.op`) behind torch.compile's boundary: one node. An absent result is an
empty tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glora_kernels.dispatch.common import (
    LIBRARY,
    NO_QUANT,
    QUANT_ARGUMENTS,
    Call,
    Needs,
    Supports,
    autocast_dtype,
    factor_dtype,
    owned,
    read_saved,
    wide_dtype,
)
from glora_kernels.dispatch.prepared import find
from glora_kernels.dispatch.ways import is_batched
from glora_kernels.glora.op import GLORA, NO_C, NOTHING, SEED, batched_backward, kept, operator_backward, prepare
from glora_kernels.runtime.workspace import private_workspace

_N = len(Supports._fields)
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


def _needs(ctx: Any) -> Needs:
    wanted = ctx.needs_input_grad
    return Needs(wanted[0], *wanted[2 : 2 + _N])


def _op(x: Tensor, weight: Tensor, *rest: Any) -> Any:
    call, (*beside, form) = Call(*rest[_N:_V]), rest[_V:] or NO_QUANT
    row = (x, weight, *beside, *rest[:_N], *NO_C, call.seed)
    form, call = tuple(form), call._replace(seed=None)
    with private_workspace():  # a graph that PyTorch captures must own all memory it writes
        flat = x if x.ndim == 2 or x.is_contiguous() else x.contiguous()
        found = find(
            GLORA, (flat, *row[1:]), 1, (form, call), lambda: prepare(row, form, call, *NOTHING[1:], registered=True)
        )
        y, *others = found.forward((flat, *row[1:]))
    return y, *(x.new_empty(0) if other is None else other for other in others[:3])


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
    (*values, needs), (*beside, form) = rest[_N + 4 : _BACK], rest[_BACK:] or NO_QUANT
    call, wanted = Call(*values), Needs(*needs)
    row = (x, weight, *beside, *rest[:_N], *NO_C, call.seed, *rest[_N : _N + 4], None, None)
    with private_workspace():
        found = prepare((dy if x is None else x, *row[1:]), form, call._replace(seed=None), *wanted, registered=True)
        grads = iter(found.backward([dy], [row[i] for i in found.saved]))
    return owned([grad if need and (grad := next(grads)) is not None else dy.new_empty(0) for need in wanted])


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
    keep = kept(_needs(ctx), s, call.matmul)
    made = (t if k else None for t, k in zip((y, h, sigma, u), keep[1:], strict=True))
    ctx.save_for_backward(x if keep.x else None, weight, *state, *s, *NO_C, call.seed, *made)
    ctx.form = form
    ctx.call = call._replace(seed=None)


def _op_autograd(ctx: Any, dy: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    row = read_saved(ctx, with_y=_needs(ctx).a)
    run = batched_backward if is_batched(dy) else operator_backward
    grads = run(dy, row, ctx.form, ctx.call._replace(seed=row[SEED]), _needs(ctx))
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
