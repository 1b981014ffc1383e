"""The GLoRA linear operator: forward and gradients; registered with PyTorch in `glora.registered`.

    y = Z∘(1+a) + s·(x̃·B_downᵀ)·B_upᵀ + σ·bᵀ + β,   Z = xWᵀ, σ = Σₖ xₖ, x̃ = mask·x/(1-p), β = bias∘(1+d) + e + wc

with Z from W_eff = W∘(1 + A_up·A_down) where A is lora, and x·A_downᵀ·(W·A_up)ᵀ added in the product variant.
Three ways lead into it (`dispatch.ways`): in eager mode an `autograd.Function`, under torch.compile and for
whoever watches the operations the registered operator, one node, and under torch.func PyTorch's own operations. What
it computes: `glora.eager`, `glora.triton`; `glora.composite`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch import prepared
from glora_kernels.dispatch.common import (
    Call,
    Needs,
    Supports,
    Weight,
    autocast_dtype,
    cast,
    check_form,
    check_vector,
    given,
    path_of,
    quant_arguments,
    stored,
    weight_of,
)
from glora_kernels.dispatch.prepared import Prepared, Row
from glora_kernels.dispatch.ways import is_batched, is_plain, is_transformed, is_watched, rows_of
from glora_kernels.glora import composite
from glora_kernels.glora import eager as eager_path
from glora_kernels.glora.wc import glora_wc
from glora_kernels.glora.wc import gradients as wc_gradients
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import routes
from glora_kernels.runtime.workspace import workspace_lock
from glora_kernels.spec import VARIANTS

_N = len(Supports._fields)
NOTHING = (False,) * (5 + _N)  # the weight, x, the supports, C
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
    c: Tensor | None = None,
    c_up: Tensor | None = None,
    c_down: Tensor | None = None,
    d: Tensor | None = None,
    e: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    variant: str = "hadamard",
) -> Tensor:
    """y = x (W + W∘A + s·B)ᵀ + bias∘(1+d) + e + W·c, without building W_eff where A is not lora.

    The gradients, with g = Σₘ dy: ∂bias = g∘(1+d), ∂wc = g, ∂d = g∘bias, ∂e = g, summed where d or e is a constant;
    those of x, A and B: `glora.eager.backward`.

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
        wc: W·c (N,), the part of C, where it is at hand (`glora_wc`); in fp32 over 16 bits.
        c: C as a vector (K,), in the place of wc: W·c is made here, in the same node of autograd.
        c_up: C=lora, (K, R).
        c_down: C=lora, (R, 1).
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
    s, cs = Supports(a, a_up, a_down, b, b_up, b_down, bias, wc, d, e), (c, c_up, c_down)
    if not is_plain(x):
        x, nested = rows_of(x)
        return nested(_linear(x, weight, s, cs, scale, dropout_p, seed, variant))
    return _linear(x, weight, s, cs, scale, dropout_p, seed, variant)


def _linear(
    x: Tensor,
    weight: Weight,
    s: Supports,
    cs: tuple[Tensor | None, ...],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    variant: str,
) -> Tensor:
    target, transformed = autocast_dtype(x), is_transformed()
    if transformed or is_watched(x):
        _check(x, weight, s, cs, dropout_p, seed, variant, target, transformed)
        if cs != NO_C:
            s = s._replace(wc=glora_wc(weight, cs[0], c_up=cs[1], c_down=cs[2]))
        if target is not None and x.dtype != target:
            x = x.to(target)
        call = Call(scale, dropout_p, seed, variant == "matmul", _route(x, weight))
        if transformed:
            return composite.glora_linear(x, weight, s, call)
        return torch.ops.glora_kernels.glora_linear(x, stored(weight), *s, *call, *quant_arguments(weight))[0]
    if target is not None and x.dtype != target:
        x = x.to(target)
    if x.ndim == 1 or (x.ndim > 2 and not x.is_contiguous()):
        lead = x.shape[:-1]
        y = _linear(x.reshape(math.prod(lead), x.shape[-1]), weight, s, cs, scale, dropout_p, seed, variant)
        return y.view(*lead, weight.shape[0])
    row, form = row_of(x, weight, s, seed, cs)
    wanted = NOTHING
    if torch.is_grad_enabled():
        wanted = (weight.requires_grad, *[t is not None and t.requires_grad for t in (x, *s, *cs)])

    def make() -> Prepared:
        _check(x, weight, s, cs, dropout_p, seed, variant, target)
        call = Call(scale, dropout_p, None, variant == "matmul", _route(x, weight))
        return prepare(row, form, call, *wanted[1:])

    key = (form, scale, dropout_p, variant, target, routes.chosen(), wanted)
    return prepared.call(prepared.find(GLORA, row, 1, key, make), row)[0]


# The tensors of a call in a row (`dispatch.prepared`): x, the stored weight, the four beside 4-bit codes, the supports,
# C, the seed; in backward behind them what forward made of them: y, h, σ, U, W·c, and on the eager path the mask.
SUPPORTS = slice(6, 6 + _N)
_C = slice(SUPPORTS.stop, SUPPORTS.stop + 3)
SEED = _C.stop
MADE = slice(SEED + 1, SEED + 5)
_WC, _MASK = MADE.stop, MADE.stop + 1
NO_C = (None, None, None)


def row_of(
    x: Tensor, weight: Weight, s: Supports, seed: Tensor | None, cs: Sequence[Tensor | None] = NO_C
) -> tuple[Row, tuple[int, ...]]:
    """The tensors of a call in a row, and the form of its weight."""
    *beside, form = quant_arguments(weight)
    return (x, stored(weight), *beside, *s, *cs, seed), form


def weight_in(row: Row, form: Sequence[int]) -> Weight:
    """W of a row."""
    packed, absmax, nested_absmax, code, offset = row[1 : SUPPORTS.start]
    return weight_of(given(packed), absmax, nested_absmax, code, offset, form)


class _Values(NamedTuple):
    """form: of a 4-bit weight, empty beside a matrix. keeps_mask: the eager path makes the dropout mask once, for both
    passes: it is dear, and a byte an element beside an x that is kept too. The kernels make it in registers."""

    form: tuple[int, ...]
    call: Call
    keeps_mask: bool

    @property
    def path(self) -> Any:
        return path_of("glora", self.call.route)


def prepare(row: Row, form: Sequence[int], call: Call, *wanted: bool, registered: bool = False) -> Prepared:
    """A class of calls, of which this is one.

    Args:
        row: of the call.
        form: of its weight.
        call: its values, without the seed.
        wanted: which of x, the supports and C want a gradient.
        registered: for the registered operators, which return what backward may read, and pass no mask.
    """
    s, eager = Supports(*row[SUPPORTS]), call.route == "eager"
    flags = (wanted[0], *(False,) * (SUPPORTS.start - 1), *wanted[1:], *(False,) * (SEED - len(wanted) - 4))
    needs = needs_of(flags)
    keep = kept(needs, s, call.matmul)
    reads_shift = needs.a or needs.bias or needs.wc or needs.d or needs.e
    shifts = range(SUPPORTS.start + Supports._fields.index("bias"), SUPPORTS.stop)
    keeps_mask = not registered and eager and call.dropout_p > 0 and needs.b_down
    saved = [0] * keep.x
    saved += [i for i in range(1, SEED + 1) if row[i] is not None and (reads_shift or i not in shifts)]
    saved += [MADE.start + i for i, keeps in enumerate(keep[1:]) if keeps]
    makes_wc = any(c is not None for c in row[_C])
    saved += [_WC] * (makes_wc and (needs.a or needs.wc)) + [_MASK] * keeps_mask
    x, weight = given(row[0]), weight_in(row, form)
    builds = bool(form) or weight.dtype != x.dtype or s.a is not None or (s.a_up is not None and not call.matmul)
    return Prepared(
        GLORA,
        _Values(tuple(form), call, keeps_mask),
        flags,
        saved,
        size=_MASK + 1,
        with_rows=(0, *range(MADE.start, MADE.start + 3)),
        has_kernels=not eager,
        keeps=registered,
        guard=workspace_lock if x.is_cuda and builds else None,
    )


class Kept(NamedTuple):
    """Which of x and the results of forward backward reads."""

    x: bool
    y: bool
    h: bool
    sigma: bool
    u: bool


def kept(needs: Needs, s: Supports, matmul: bool) -> Kept:
    """What a backward reads.

    x is kept for a gradient that multiplies it, and beside y for a vector or constant A: Z is computed anew in the
    rows where y does not give it (`glora.recover`).
    """
    return Kept(
        x=needs.a or needs.b_down or needs.a_down or (needs.a_up and not matmul),
        y=needs.a,
        h=needs.b_up or (needs.a and s.b_up is not None) or (matmul and needs.a_up),
        sigma=s.b is not None and (needs.b or needs.a),
        u=matmul and s.a_up is not None and (needs.x or needs.a_down),
    )


def _forward(row: Row, values: _Values) -> Sequence[Tensor | None]:
    """(y, h, σ, U, W·c, mask) of an N-dimensional x by the call's route."""
    form, call, keeps_mask = values
    x, weight, s, cs = given(row[0]), weight_in(row, form), Supports(*row[SUPPORTS]), row[_C]
    rows, k = math.prod(x.shape[:-1]), x.shape[-1]
    call = call._replace(seed=row[SEED])
    mask = eager_path.keep_of(call, rows, k, x.device) if keeps_mask else None
    if mask is not None:
        call = call._replace(seed=mask)
    wc = None
    if any(c is not None for c in cs):
        wc = values.path.wc_forward(weight, *cs)
        s = s._replace(wc=wc)
    y, h, sigma, u = values.path.forward(x if x.ndim == 2 else x.reshape(rows, k), weight, s, call)
    if x.ndim != 2:  # no view: PyTorch refuses to change a view in place that came out of a Function
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])
    return y, h, sigma, u, wc, mask


def _backward(dys: Sequence[Tensor], row: Row, values: _Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the wanted places, each in the shape and dtype of its tensor."""
    dy, form, needs = dys[0], values.form, needs_of(wanted)
    weight, s, (y, h, sigma, u) = weight_in(row, form), _supports(row), row[MADE]
    lead, (n, k), x = dy.shape[:-1], weight.shape, row[0]
    rows = math.prod(lead)
    if dy.ndim != 2:
        dy, y = dy.reshape(rows, n), None if y is None else y.reshape(rows, n)
    x = x if x is None or x.ndim == 2 else x.reshape(rows, k)
    grads = list(values.path.backward(dy, x, weight, s, y, h, sigma, u, _call(row, values), needs))
    if grads[0] is not None and len(lead) != 1:
        grads[0] = grads[0].view(*lead, k)
    cs = row[_C]
    through = values.path.wc_backward(grads[_GRAD_WC], weight, *cs, wanted[_C]) if any(wanted[_C]) else NO_C
    found = [*zip(grads, (None, *s), _own(wanted), strict=True), *zip(through, cs, wanted[_C], strict=True)]
    return [grad if grad is None or t is None else cast(grad, t.dtype) for grad, t, want in found if want]


_GRAD_WC = 1 + Supports._fields.index("wc")


def _own(wanted: Sequence[bool]) -> tuple[bool, ...]:
    """Of the flags of a row those of x and the supports."""
    return (wanted[0], *wanted[SUPPORTS])


def _supports(row: Row) -> Supports:
    """The supports in a row of backward, with the W·c that forward made."""
    s = Supports(*row[SUPPORTS])
    return s if row[_WC] is None else s._replace(wc=row[_WC])


def _call(row: Row, values: _Values) -> Call:
    """The values of a call in backward: with the seed, or the mask that forward made of it."""
    return values.call._replace(seed=row[_MASK] if values.keeps_mask else row[SEED])


def needs_of(wanted: Sequence[bool]) -> Needs:
    """What the passes are asked for, by the flags of a row: W·c where C is."""
    needs = Needs(*_own(wanted))
    return needs._replace(wc=True) if any(wanted[_C]) else needs


def _elsewhere(dys: Sequence[Tensor], row: Row, values: _Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    needs, call, cs = needs_of(wanted), _call(row, values), row[_C]
    row = (*row[: SUPPORTS.start], *_supports(row), *row[SUPPORTS.stop :])
    run = batched_backward if is_batched(dys[0]) else operator_backward
    grads = run(dys[0], row, values.form, call, needs)
    found = [grad for grad, want in zip(grads, _own(wanted), strict=True) if want]
    if any(wanted[_C]):
        found += wc_gradients(given(grads[_GRAD_WC]), weight_in(row, values.form), cs, wanted[_C], call.route)
    return found


GLORA = prepared.Operation("glora_linear", _forward, _backward, _elsewhere)


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
    cs: Sequence[Tensor | None],
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
    for tensor in (weight, *s, *cs):
        if tensor is not None and tensor.device != device:
            names = ("weight", *Supports._fields, "c", "c_up", "c_down")
            name = next(n for n, t in zip(names, (weight, *s, *cs), strict=True) if t is tensor)
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
    if cs:
        check_form("c", k, False, k, 1, *cs)
    if s.wc is not None:
        check_vector("wc", s.wc, n, constant=False)
        if any(c is not None for c in cs):
            raise ValueError("wc is W·c: it and c, or c_up and c_down, are two forms of one term; give one of them")
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


def operator_backward(
    dy: Tensor, row: Sequence[Tensor | None], form: Sequence[int], call: Call, needs: Needs
) -> list[Tensor | None]:
    """The gradients in the order of `Needs`, through the registered operator; None where not wanted."""
    x, weight, *beside = row[: SUPPORTS.start]
    grads = torch.ops.glora_kernels.glora_linear_backward(
        dy, x, weight, *row[SUPPORTS], *row[MADE], *call, list(needs), *beside, list(form)
    )  # fmt: skip
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def batched_backward(
    dy: Tensor, row: Sequence[Tensor | None], form: Sequence[int], call: Call, needs: Needs
) -> list[Tensor | None]:
    """The same of a batch of dy. An x that was not kept takes no part in any wanted gradient."""
    weight, (_, h, sigma, _) = weight_in(row, form), row[MADE]
    x = row[0]
    if x is None:
        x = torch.zeros(*dy.shape[:-1], weight.shape[1], dtype=dy.dtype, device=dy.device)

    def forward(x: Tensor, *tensors: Tensor | None) -> Tensor:
        return composite.glora_linear(x, weight, Supports(*tensors), call, h, sigma)

    return composite.gradients(forward, (x, *row[SUPPORTS]), needs, dy)
