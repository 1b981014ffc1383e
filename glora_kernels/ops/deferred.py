"""The gradient of a factor that layers share, as one product over all of them at the end.

    dB_down = Σ_l s_l·(dy_l·B_up,l)ᵀ·x̃_l,   dB_up = Σ_l dy_lᵀ·h_l,   h = s·x̃·B_downᵀ,   x̃ = mask·x/(1-p)

Inside `nn.deferred_shared_grads`, layers call `glora_linear` here: the same result and gradients as
`ops.glora_linear`, but backward hands the two factors of a shared parameter's gradient to a `Deferred` instead of
multiplying them, and returns no gradient for it. `Deferred.finish` has one launch for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from glora_kernels.launch.plan import arch_of
from glora_kernels.launch.table import SharedFactor, SharedProduct
from glora_kernels.ops import glora as plain
from glora_kernels.ops.common import (
    Call,
    Needs,
    Supports,
    Weight,
    autocast_dtype,
    cast,
    given,
    restored,
    state_of,
    stored,
    wide_dtype,
    without_autocast,
)
from glora_kernels.ops.eager import dropped
from glora_kernels.reference.random import keep_mask

_N = len(Supports._fields)


class _Record(NamedTuple):
    """What one backward of one layer handed over: its place among the layers and in time, the product, its route."""

    layer: int
    turn: int
    product: SharedProduct
    triton: bool


class Deferred:
    """What the layers' backwards hand over, and at the end the gradients of the shared factors.

    Attributes:
        bytes: of the tensors handed over, which stay alive until the end: for each layer M·(K + R) numbers where
            `B_down` is shared (x and S = dy·B_up), M·(N + R) where `B_up` is (dy and h), in the dtype of x. What
            several layers hand over, as q, k and v do with their x, counts once.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._records: dict[str, dict[nn.Parameter, list[_Record]]] = {"b_down": {}, "b_up": {}}
        self._counted: set[tuple[int, int]] = set()
        self._turn = 0

    def add(self, name: str, parameter: nn.Parameter, layer: int, product: SharedProduct, triton: bool) -> None:
        """Take one layer's product leftᵀ·right, (R,K) for "b_down" or, transposed, (N,R) for "b_up"."""
        self._turn += 1
        self._records[name].setdefault(parameter, []).append(_Record(layer, self._turn, product, triton))
        for tensor in (product.left, product.right):
            key = tensor.data_ptr(), tensor.numel()
            if key not in self._counted:
                self._counted.add(key)
                self.bytes += tensor.numel() * tensor.element_size()

    def drop(self) -> None:
        """Forget what was handed over."""
        for records in self._records.values():
            records.clear()
        self._counted.clear()

    @torch.no_grad()
    def finish(self) -> None:
        """Add every gradient to `.grad`, summed in fp32 in the order of the layers: one launch a device and dtype."""
        launches: dict[tuple[object, ...], list[tuple[nn.Parameter, Tensor, SharedFactor]]] = {}
        for name, found in self._records.items():
            for parameter, records in found.items():
                records.sort()
                products = [record.product for record in records]
                dtypes = {product.right.dtype for product in products}
                if not all(record.triton for record in records) or len(dtypes) > 1:
                    _add(parameter, _sum(products, name == "b_up"))
                    continue
                grad = _gradient(parameter)
                factor = SharedFactor(grad.t() if name == "b_up" else grad, grad is parameter.grad, products)
                launches.setdefault((grad.device, grad.dtype, *dtypes), []).append((parameter, grad, factor))
        for factors in launches.values():
            _launch(factors)
        self.drop()


def _launch(found: list[tuple[nn.Parameter, Tensor, SharedFactor]]) -> None:
    from glora_kernels.launch import depth

    factors = [factor for *_, factor in found]
    tables = depth.shared_grad_tables(factors)
    depth.shared_grad_launch(tables, factors, arch=arch_of(factors[0].out)).run()
    for parameter, grad, factor in found:
        if factor.adds:
            torch.autograd.graph.increment_version(grad)
        parameter.grad = grad


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Where a kernel puts a gradient: `.grad` itself, to which it then adds, or new memory where there is none."""
    grad = parameter.grad
    return torch.empty_like(parameter, memory_format=torch.contiguous_format) if grad is None else grad


def _sum(products: list[SharedProduct], transposed: bool) -> Tensor:
    """Σ scale·leftᵀ·drop(right), or its transpose, in the wide dtype."""
    first = products[0]
    wide = wide_dtype(first.left.dtype)
    total = first.left.new_zeros(first.left.shape[1], first.right.shape[1], dtype=wide)
    for left, right, scale, p, seed in products:
        if p > 0.0:
            rows, cols = right.shape
            keep = keep_mask(given(seed).to(right.device), rows, cols, p)
            right = dropped(right, keep)
        total.addmm_(left.to(wide).t(), right.to(wide), alpha=scale / (1.0 - p))
    return total.t() if transposed else total


def _add(parameter: nn.Parameter, total: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = total.to(parameter.dtype).contiguous()
    else:
        parameter.grad += total.to(parameter.grad.dtype)


class DeferredLinear:
    """`ops.glora_linear` of one layer whose shared factors' gradients go to a `Deferred`.

    Args:
        deferred: where they go.
        layer: the layer's place, which fixes the order of the sum.
        shared: the shared parameters by the name of the argument, "b_down" and "b_up".
    """

    def __init__(self, deferred: Deferred, layer: int, shared: Mapping[str, nn.Parameter]) -> None:
        self.deferred = deferred
        self.layer = layer
        self.shared = shared

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        variant: str = "hadamard",
        **supports: Tensor | None,
    ) -> Tensor:
        """As `ops.glora_linear`, with its errors. Traced by torch.compile it is that, gradients included."""
        if torch.compiler.is_compiling():
            return plain.glora_linear(
                x, weight, bias, scale=scale, dropout_p=dropout_p, seed=seed, variant=variant, **supports
            )
        s = Supports(bias=bias, **supports)
        target = autocast_dtype(x)
        plain._check(x, weight, s, dropout_p, seed, variant, target)
        if target is not None and x.dtype != target:
            x = x.to(target)
        call = Call(scale, dropout_p, seed, variant == "matmul", plain._route(x, weight))
        return _DeferredFunction.apply(x, weight, call, self, *s)


class _DeferredFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, call: Call, to: DeferredLinear, *tensors: Tensor | None) -> Tensor:
        s = Supports(*tensors)
        y, h, sigma, u = plain._forward(x, weight, s, call)
        needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        keep = plain._saved(needs, s, call, None)
        kept = (t if k else None for t, k in zip((x, y, h, sigma, u), keep, strict=True))
        ctx.save_for_backward(stored(weight), *s, call.seed, *kept)
        ctx.quant_state = state_of(weight)
        ctx.needs, ctx.call, ctx.to = needs, call._replace(seed=None), to
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensor, *rest = ctx.saved_tensors
        weight = restored(tensor, ctx.quant_state)
        s = Supports(*rest[:_N])
        seed, x, y, h, sigma, u = rest[_N:]
        call = ctx.call._replace(seed=seed)
        to, needs = ctx.to, ctx.needs
        down, up = to.shared.get("b_down"), to.shared.get("b_up")
        rest_of_needs = needs
        if down is not None and needs.b_down:
            rest_of_needs = rest_of_needs._replace(b_down=False)
        if up is not None and needs.b_up:
            rest_of_needs = rest_of_needs._replace(b_up=False)
        grads = plain._backward(dy, x, weight, s, y, h, sigma, u, call, rest_of_needs)
        flat = _rows(dy)
        with without_autocast(dy.device.type):
            if down is not None and needs.b_down:
                left = torch.mm(flat, cast(given(s.b_up), dy.dtype))
                product = SharedProduct(left, _rows(given(x)), call.scale, call.dropout_p, seed)
                to.deferred.add("b_down", down, to.layer, product, call.route != "eager")
            if up is not None and needs.b_up:
                rank = given(s.b_up).shape[1]
                product = SharedProduct(given(h)[:, -rank:], flat, 1.0, 0.0, None)
                to.deferred.add("b_up", up, to.layer, product, call.route != "eager")
        return (grads[0], None, None, None, *grads[1:])


def _rows(tensor: Tensor) -> Tensor:
    """(…, C) as a matrix whose rows are contiguous."""
    flat = tensor.detach().reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
