"""The GLoRA linear operator: the public function, its checks, and its registration with PyTorch.

    y = Z∘(1+a) + s·(x̃·B_downᵀ)·B_upᵀ + σ·bᵀ + β,   Z = xWᵀ, σ = Σₖ xₖ, x̃ = mask·x/(1-p), β = bias∘(1+d) + e + wc

where A is lora, Z = x·W_effᵀ with W_eff = W∘(1 + A_up·A_down); the product variant adds x·A_downᵀ·(W·A_up)ᵀ instead.
The mathematics is in `glora.eager`, `glora.triton` and `glora.composite`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch import checks, prepared
from glora_kernels.dispatch.common import (
    Codes,
    Weight,
    autocast_dtype,
    cast,
    codes_of,
    factor_dtype,
    flat,
    given,
    path_of,
    settled,
    stored,
    unflat,
    weight_of,
    wide_dtype,
)
from glora_kernels.dispatch.operator import Operator
from glora_kernels.dispatch.prepared import Prepared
from glora_kernels.dispatch.signature import Row, Signature, Values
from glora_kernels.dispatch.ways import is_elsewhere
from glora_kernels.glora import composite
from glora_kernels.glora.call import C, Call, Made, Needs, Supports
from glora_kernels.glora.wc import glora_wc, sizes
from glora_kernels.glora.wc import gradients as wc_gradients
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import routes
from glora_kernels.runtime.environment import is_capturing
from glora_kernels.runtime.workspace import workspace_lock
from glora_kernels.spec import VARIANTS


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
    columns_before: int = 0,
) -> Tensor:
    """y = x (W + W∘A + s·B)ᵀ + bias∘(1+d) + e + W·c, without building W_eff where A is not lora.

    The gradients, with g = Σₘ dy: ∂bias = g∘(1+d), ∂wc = g, ∂d = g∘bias, ∂e = g, summed where d or e is a constant;
    those of x, A and B: `glora.eager.backward`.

    Args:
        x: (..., K); also nested, whose y is nested as it is, or sparse, whose y is dense.
        weight: W (N, K), frozen; any strides. In the dtype of x, or any where autocast settles it. Or a
            `QuantizedWeight`: W is its dequantized value, rounded to the dtype of x (of autocast).
        bias: of the base (N,), or None.
        a: A as a vector (N,) or constant (1,).
        a_up: A=lora, (N, R); in the product variant (K, R).
        a_down: A=lora, (R, K).
        b: B as a vector (N,) or constant (1,).
        b_up: B=lora, (N, R).
        b_down: B=lora, (R, K).
        wc: W·c (N,), if already computed (`glora_wc`); in fp32 for 16-bit dtypes.
        c: C as a vector (K,), instead of wc: W·c is then computed in the same node of autograd.
        c_up: C=lora, (K, R).
        c_down: C=lora, (R, 1).
        d: D as a vector (N,) or constant (1,); needs a bias.
        e: E as a vector (N,) or constant (1,).
        scale: s, multiplies the low-rank B path only.
        dropout_p: p in [0, 1), on x in the low-rank B path only.
        seed: one int64, the key of the dropout mask, on the CPU or on the device of x; needed where p > 0
            (`dropout_seed`). One on the CPU is a constant to a CUDA graph that captures the call.
        variant: "hadamard" (W∘A) or "matmul" (W·A).
        columns_before: where x and W are a part of the columns of wider matrices (tensor parallelism by rows), how many
            columns of those come before: the dropout mask is that part of the whole mask. Kernels take multiples of 8.

    Returns:
        (..., N) in the dtype of x (of autocast where it is on). The adapters may have another dtype; their
        gradients come in theirs.

    Raises:
        ValueError: sizes, devices or a combination of arguments that do not fit (d without a bias is one), a seed
            that is not one int64, or a weight that requires grad.
        TypeError: an x that is not floating point, or a dtype that differs from the weight's.
        RuntimeError: a forced `backend` that cannot serve the call. In backward: x or a parameter was
            overwritten in place since forward, or y was while a trained vector or constant A needs it.

    Examples:
        >>> from glora_kernels.ops import glora_linear
        >>> x, weight, bias = torch.randn(2, 16), torch.randn(32, 16), torch.randn(32)
        >>> a = torch.zeros(32, requires_grad=True)
        >>> torch.equal(glora_linear(x, weight, bias, a=a), nn.functional.linear(x, weight, bias))
        True
    """
    cs = () if c is None and c_up is None and c_down is None else (c, c_up, c_down)
    if cs and wc is None and is_elsewhere(x):  # the registered operator has no C: `glora_wc` is another node
        wc, cs = glora_wc(weight, c, c_up=c_up, c_down=c_down), ()
    s = Supports(a, a_up, a_down, b, b_up, b_down, bias, wc, d, e)

    def check(row: Row) -> Values:
        return checked(given(row[0]), weight, s, cs, Settings(scale, dropout_p, seed, variant, columns_before))

    codes = codes_of(weight)
    row = row_of(x, stored(weight), s, seed, codes, cs)
    return GLORA.call(row, (codes.form, scale, dropout_p, variant, columns_before), check)[0]


class Settings(NamedTuple):
    """The arguments of `glora_linear` that are not operands."""

    scale: float = 1.0
    dropout_p: float = 0.0
    seed: Tensor | None = None
    variant: str = "hadamard"
    columns_before: int = 0


def prepare_uncached(x: Tensor, weight: Weight, s: Supports, settings: Settings) -> tuple[Prepared, Row]:
    """Check and prepare a call with gradients, without the cache: (the class, the row)."""
    x = cast(x, autocast_dtype(x) or x.dtype)
    if routes.invariant():
        x = settled(x)
    values, row = checked(x, weight, s, (), settings), row_of(x, stored(weight), s, settings.seed, codes_of(weight))
    return GLORA.prepare(row, values, prepared.wanted_of(row)), row


def row_of(
    x: Tensor, weight: Tensor, s: Supports, seed: Tensor | None, codes: Codes, cs: Row = ()
) -> tuple[Tensor | None, ...]:
    """The tensors of a call in the order of the operator's arguments; then those of C, in eager mode only."""
    return (x, weight, *s, seed, *codes[:4], *cs)


def checked(x: Tensor, weight: Weight, s: Supports, cs: Row, settings: Settings) -> Values:
    """Raise the errors of `glora_linear`, or return the values of the call."""
    checks.check_product("x", x, "weight", weight)
    (n, k), tensors = weight.shape, s._asdict() | dict(zip(C._fields, cs, strict=False))
    checks.check_devices(("x", x.device), [("weight", weight), *tensors.items()])
    if settings.variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}; got {settings.variant!r}")
    product = settings.variant == "matmul"
    checks.check_form("a", n, True, (k if product else n, k), s.a, s.a_up, s.a_down)
    if product and s.a is not None:
        raise ValueError("variant='matmul' accepts a_up and a_down, not a")
    checks.check_form("b", n, True, (n, k), s.b, s.b_up, s.b_down)
    if cs:
        checks.check_form("c", k, False, (k, 1), *cs)
        if s.wc is not None:
            raise ValueError("wc is W·c: it and c, or c_up and c_down, are two forms of one term; give one of them")
    if s.d is not None and s.bias is None:
        raise ValueError("d scales the bias: it cannot be given where bias is None")
    for name, constant in (("bias", False), ("wc", False), ("d", True), ("e", True)):
        if tensors[name] is not None:
            checks.check_vector(name, tensors[name], n, constant)
    checks.check_dropout(settings.dropout_p)
    if settings.columns_before < 0:
        raise ValueError(f"columns_before must be a number of columns, 0 or more; got {settings.columns_before}")
    if settings.dropout_p and s.b_up is not None and settings.seed is None:
        raise ValueError(f"dropout_p={settings.dropout_p} needs a seed: pass seed=dropout_seed(x.device)")
    if settings.seed is not None:
        checks.check_seed("seed", settings.seed, x.device)
    route = routes.route(x.device.type, x.dtype, four_bit=isinstance(weight, QuantizedWeight))
    return values_of(weight, settings, route)


def values_of(weight: Weight, settings: Settings, route: str) -> Values:
    product, form = settings.variant == "matmul", codes_of(weight).form
    return Values((settings.scale, settings.dropout_p, product, route, settings.columns_before, form))


class _Inputs(NamedTuple):
    """x (..., K), and the weight or its packed codes."""

    x: Tensor
    weight: Tensor


class _GLoRALinear(Operator):
    name = "glora_linear"
    signature = Signature(_Inputs, Supports, Call, Codes)
    results = reads = Made._fields[:4]
    trained = ("x", *Supports._fields)

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        wanted = self.graded(wanted)
        x, count, needs = given(row[0]), len(row), _needs(wanted)
        weight, s, call = self.read(row, values)
        eager, product = routes.is_eager(call.route), call.matmul and s.a_up is not None
        # A vector or constant A gets its gradient from y. Where y gives x·Wᵀ too inaccurately, `glora.recover` computes
        # it from x again.
        keeps_x = needs.a or needs.b_down or needs.a_down or (needs.a_up and not call.matmul)
        keeps_shift = needs.a or needs.shift
        kept = Made(
            y=needs.a,
            h=needs.b_up or (needs.a and s.b_up is not None) or (product and needs.a_up),
            sigma=s.b is not None and (needs.b or needs.a),
            u=product and (needs.x or needs.a_down),
            # The eager path keeps its mask (a byte per element of x), since drawing it again is slow. Kernels draw it
            # again in registers; the registered operator has no result for it.
            mask=eager and call.dropout_p > 0 and needs.b_down and not registered,
            wc=count > self.count and (needs.a or needs.wc),
        )
        own = [t is not None and (keeps_shift or i not in _SHIFT) for i, t in enumerate(row)]
        builds = isinstance(weight, QuantizedWeight) or weight.dtype != x.dtype or s.a is not None
        builds = builds or (s.a_up is not None and not call.matmul)
        saved = [i for i, keep in enumerate((keeps_x, *own[1:], *kept)) if keep]
        with_rows = 0, *(count + Made._fields.index(name) for name in ("y", "h", "sigma"))  # 0: x
        return Prepared(
            self, values, wanted, saved, size=count + len(kept), with_rows=with_rows, has_kernels=not eager,
            keeps=registered, guard=workspace_lock if x.is_cuda and builds else None,
        )  # fmt: skip

    def read(self, row: Row, values: Values) -> tuple[Weight, Supports, Call]:
        (_, packed), s, call, codes = self.signature.read(row, values)
        return weight_of(packed, codes), s, call

    def forward(self, row: Row, values: Values) -> Made:
        weight, s, call = self.read(row, values)
        x, path, cs, wc = given(row[0]), path_of("glora", call.route), row[_C], None
        if cs:
            wc = path.wc_forward(weight, C(*cs))
            s = s._replace(wc=wc)
        made = path.forward(flat(x), weight, s, call)
        return made._replace(y=unflat(made.y, x.shape[:-1]), wc=wc)

    def backward(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
        row, made = _as_in_forward(row, len(wanted))
        weight, s, call = self.read(row, values)
        path, needs = path_of("glora", call.route), _needs(wanted)
        lead, (dy, x, y) = dys[0].shape[:-1], (None if t is None else flat(t) for t in (dys[0], row[0], made.y))
        found = path.backward(dy, x, weight, s, made._replace(y=y), call, needs)
        grads = dict(zip((0, *_SUPPORTS), found, strict=True))
        if needs.x and len(lead) != 1:
            grads[0] = grads[0].view(*lead, weight.shape[1])
        if any(wanted[_C]):
            through = path.wc_backward(grads[_WC], weight, C(*row[_C]), wanted[_C])
            grads |= zip(range(_C.start, _C.stop), through, strict=True)
        return [_cast(grads[i], row[i]) for i, want in enumerate(wanted) if want]

    def elsewhere(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
        own, made = _as_in_forward(row, len(wanted))
        flags = [*wanted[: self.count]]
        flags[_WC] = flags[_WC] or any(wanted[_C])
        found = super().elsewhere(dys, (*own[: self.count], *made[:4]), values, flags)
        grads = dict(zip((i for i, want in enumerate(flags) if want), found, strict=True))
        if not any(wanted[_C]):
            return [*grads.values()]
        weight, _, call = self.read(own, values)
        through = wc_gradients(given(grads.pop(_WC)), weight, C(*own[_C]), wanted[_C], call.route)
        return [*grads.values(), *through]

    def composite(self, row: Row, values: Values) -> tuple[Tensor]:
        weight, s, call = self.read(row, values)
        _, h, sigma, *_ = row[self.count :] or (None,) * 3
        return (composite.glora_linear(given(row[0]), weight, s, call, h, sigma),)

    def fake(self, inputs: _Inputs, s: Supports, call: Call, codes: Codes) -> Made:
        x, weight = inputs.x, weight_of(inputs.weight, codes)
        m, n, narrow = math.prod(x.shape[:-1]), weight.shape[0], factor_dtype(x.dtype, s.factors)
        rank = s.a_up.shape[1] if call.matmul and s.a_up is not None else 0
        width = rank + (0 if s.b_up is None else s.b_up.shape[1])
        return Made(
            y=x.new_empty(*x.shape[:-1], n),
            h=x.new_empty(m, width, dtype=narrow) if width else None,
            sigma=x.new_empty(m, dtype=wide_dtype(x.dtype)) if s.b is not None else None,
            u=x.new_empty(n, rank, dtype=narrow) if rank else None,
        )

    def input_shapes(self, dys: Sequence[Tensor], inputs: _Inputs, s: Any, call: Any, codes: Codes) -> list[Any]:
        return [(*dys[0].shape[:-1], sizes(inputs.weight.shape, codes)[1])]

    def flops(self, inputs: Any, s: Any, call: Call, codes: Codes) -> int:
        """x·Wᵀ; A lora: A_up·A_down (product variant: W·A_up, x·A_downᵀ, P·Uᵀ); B lora: x·B_downᵀ, h·B_upᵀ."""
        (n, k), m = sizes(inputs.weight, codes), math.prod(inputs.x[:-1])
        flops = 2 * m * n * k
        if s.a_up is not None:
            r = s.a_down[0]
            flops += 2 * n * k * r + (2 * m * r * (n + k) if call.matmul else 0)
        if s.b_up is not None:
            flops += 2 * m * s.b_up[1] * (n + k)
        return flops

    def backward_flops(self, dy: Any, needs: Sequence[bool], inputs: Any, s: Any, call: Call, codes: Codes) -> int:
        """The products of `glora.eager.backward` for the wanted gradients."""
        (n, k), m, need = sizes(inputs.weight, codes), math.prod(dy[:-1]), Needs(*needs)
        flops = 2 * m * n * k if need.x else 0
        if s.a_down is not None:
            r = s.a_down[0]
            if call.matmul:
                flops += 2 * m * n * r * (need.x or need.a_down) + 2 * m * k * r * (need.x + need.a_down)
                flops += need.a_up * (2 * m * n * r + 2 * n * k * r)
            else:
                flops += 2 * n * k * r * (need.x + need.a_up + need.a_down)
                flops += 2 * m * n * k * (need.a_up or need.a_down)
        if s.b_up is not None:
            r = s.b_up[1]
            flops += 2 * m * n * r * ((need.b_up or need.a) + (need.x or need.b_down))
            flops += 2 * m * k * r * (need.x + need.b_down)
        return flops


GLORA = _GLoRALinear()
GLORA.register()
_SUPPORTS = range(2, 2 + len(Supports._fields))
PLACE = {name: place for place, name in enumerate(GLORA.signature.tensors)}
_WC, _SHIFT = PLACE["wc"], range(PLACE["bias"], PLACE["e"] + 1)
_C = slice(GLORA.count, GLORA.count + len(C._fields))


def _needs(wanted: Sequence[bool]) -> Needs:
    """The gradients that the passes must return; ∂wc where a gradient of C is wanted."""
    needs = Needs(wanted[0], *wanted[2 : 2 + len(Supports._fields)])
    return needs._replace(wc=True) if any(wanted[_C]) else needs


def _as_in_forward(row: Row, count: int) -> tuple[list[Any], Made]:
    """Split the row of backward into operands, with the W·c that forward made among them, and results."""
    own, made = [*row[:count]], Made(*row[count:])
    if made.wc is not None:
        own[_WC] = made.wc
    return own, made


def _cast(grad: Tensor | None, tensor: Tensor | None) -> Tensor | None:
    return grad if grad is None or tensor is None else cast(grad, tensor.dtype)


def dropout_seed(device: torch.device) -> Tensor:
    """One int64, the key of the dropout mask of one call on `device`.

    Drawn on the host from torch's CPU generator, for any device: it costs the GPU nothing, and a kernel gets it as a
    number. Activation checkpointing restores that generator, so recomputation drops the same elements. Bit 62 is set,
    so that Triton gives every seed the same integer type.

    While a CUDA graph is captured or torch.compile traces, it is drawn on the device: a number drawn on the host would
    be a constant in the graph, and every replay would drop the same elements. A kernel that reads its seed from memory
    is compiled separately, which must happen before a capture: see `seeds_on_device`.
    """
    if torch.compiler.is_compiling() or (device.type == "cuda" and (_Seeds.on_device or is_capturing(device))):
        return torch.randint(*_SEEDS, (1,), dtype=torch.int64, device=device)
    return torch.randint(*_SEEDS, (1,), dtype=torch.int64, device="cpu")


_SEEDS = 2**62, 2**63 - 1


class _Seeds:
    on_device = False


@contextlib.contextmanager
def seeds_on_device() -> Iterator[None]:
    """Inside, `dropout_seed` draws on the device, so that the kernels of a CUDA graph are compiled before capture."""
    before, _Seeds.on_device = _Seeds.on_device, True
    try:
        yield
    finally:
        _Seeds.on_device = before
