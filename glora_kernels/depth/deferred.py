"""The gradient of a factor that layers share, as one product over all of them at the end of a backward pass.

    dB_down = Σ_l s_l·(dy_l·B_up,l)ᵀ·x̃_l,   dB_up = Σ_l dy_lᵀ·h_l,   h = s·x̃·B_downᵀ,   x̃ = mask·x/(1-p)

Inside `nn.deferred_shared_grads`, layers call a `DeferredLinear`: same result and gradients as `ops.glora_linear`, but
backward does not multiply the two factors of a shared parameter's gradient: it hands them to a `Deferred`. All these
layers have one more input, a tensor without elements (`ticket`) that a node of autograd makes from the shared
parameters. Autograd therefore calls the backward of that node after those of all layers, whatever began the pass; it
computes all products in one launch and returns the gradients, which go their usual way: to `.grad`, hooks, other
processes, or the caller of `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.depth.table import SharedFactor, SharedProduct
from glora_kernels.dispatch.common import (
    Weight,
    cast,
    factor_dtype,
    given,
    path_of,
    settled,
    wide_dtype,
    without_autocast,
)
from glora_kernels.dispatch.prepared import NO_GUARD, Applied, Prepared, read_saved
from glora_kernels.dispatch.signature import Row
from glora_kernels.dispatch.ways import is_batched, is_elsewhere, is_plain, is_watched
from glora_kernels.glora import op as plain
from glora_kernels.glora.call import Made, Supports
from glora_kernels.glora.chunks import thin
from glora_kernels.glora.eager import dropped, mask_of
from glora_kernels.glora.wc import glora_wc
from glora_kernels.runtime import routes


class _Record(NamedTuple):
    """A product handed over by the backward of one layer. layer, turn: its place among the layers, and in time."""

    layer: int
    turn: int
    product: SharedProduct
    transposed: bool
    triton: bool


class Deferred:
    """Collects what the layers' backwards hand over, until the backward pass asks for the gradients.

    Attributes:
        bytes: size of the tensors handed over, in all passes so far; they stay alive until their pass ends. For each
            layer M·(K + R) numbers where `B_down` is shared (x and S = dy·B_up), M·(N + R) where `B_up` is (dy and
            h), in the dtype of x. A tensor from several layers, such as the x of q, k and v, counts once per pass.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._records: dict[tuple[int, nn.Parameter], list[_Record]] = {}  # by backward pass and parameter
        self._turn = 0

    def add(self, parameter: nn.Parameter, layer: int, product: SharedProduct, transposed: bool, triton: bool) -> None:
        """Take one layer's product leftᵀ·right: (R,K), or `transposed` the gradient of a `B_up` (N,R)."""
        self._turn += 1
        record = _Record(layer, self._turn, product, transposed, triton)
        self._records.setdefault((_pass(), parameter), []).append(record)

    def drop(self) -> None:
        """Forget what a failed backward pass has left here."""
        self._records.clear()

    @torch.no_grad()
    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """The gradients of this pass, summed in fp32 in the order of the layers, rounded once; one launch per dtype."""
        grads: dict[nn.Parameter, Tensor] = {}
        sizes: dict[tuple[int, int], int] = {}
        launches: dict[tuple[object, ...], list[SharedFactor]] = {}
        for parameter in parameters:
            records = sorted(self._records.pop((_pass(), parameter), ()), key=lambda each: (each.layer, each.turn))
            if not records:
                continue
            products, transposed = [record.product for record in records], records[0].transposed
            for product in products:
                sizes |= {(t.data_ptr(), t.numel()): t.nbytes for t in (product.left, product.right)}
            dtypes = {(product.left.dtype, product.right.dtype) for product in products}
            if not all(record.triton for record in records) or len(dtypes) > 1:
                grads[parameter] = _sum(products, transposed).to(parameter.dtype).contiguous()
                continue
            grad = grads[parameter] = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            factor = SharedFactor(grad.t() if transposed else grad, products)
            launches.setdefault((grad.dtype, *dtypes), []).append(factor)
        for factors in launches.values():
            path_of("depth", "triton").shared_gradients(factors)
        self.bytes += sum(sizes.values())
        return [grads.get(parameter) for parameter in parameters]


def ticket(deferred: Deferred, parameters: Sequence[nn.Parameter]) -> Tensor:
    """A tensor without elements, to be an input of every layer that shares one of the parameters (of one device)."""
    with torch.inference_mode(False), torch.enable_grad():
        return _SharedGradients.apply(deferred, *parameters)


class _SharedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, deferred: Deferred, *parameters: nn.Parameter) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.deferred, ctx.parameters = deferred, parameters
        return parameters[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.deferred.gradients(ctx.parameters)


def _pass() -> int:
    """The id of the running backward pass; a reentrant checkpoint starts one of its own."""
    return torch._C._current_graph_task_id()


def _sum(products: list[SharedProduct], transposed: bool) -> Tensor:
    """Σ scale·leftᵀ·drop(right), or its transpose, in `wide_dtype`."""
    first = products[0]
    wide = wide_dtype(first.left.dtype)
    total = first.left.new_zeros(first.left.shape[1], first.right.shape[1], dtype=wide)
    for left, right, scale, p, seed in products:
        right = dropped(right, mask_of(p, seed, right.shape[0], right.shape[1], right.device))
        total.addmm_(left.to(wide).t(), right.to(wide), alpha=scale / (1.0 - p))
    return total.t() if transposed else total


class DeferredLinear:
    """`ops.glora_linear` for one layer, with the gradients of its shared factors left to a `Deferred`.

    Args:
        deferred: collects the factors of these gradients.
        ticket: the `ticket` of the shared parameters.
        layer: the layer's place, which fixes the order of the sum.
        shared: the shared parameters by name of their argument, "b_down" and "b_up".
    """

    def __init__(self, deferred: Deferred, ticket: Tensor, layer: int, shared: Mapping[str, nn.Parameter]) -> None:
        self.deferred = deferred
        self.ticket = ticket
        self.layer = layer
        self.shared = shared

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        c: Tensor | None = None,
        c_up: Tensor | None = None,
        c_down: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """As `ops.glora_linear`, with its errors.

        Nothing is deferred where the call is watched or transformed (`dispatch.ways`) or needs no gradient, or where
        the layer's parameter has been replaced or is not trained.
        """
        if c is not None or c_up is not None:
            others["wc"] = glora_wc(weight, c, c_up=c_up, c_down=c_down)
        trained = {name: p for name, p in self.shared.items() if others.get(name) is p and p.requires_grad}
        if not trained or not torch.is_grad_enabled() or not is_plain(x) or is_elsewhere(x):
            return plain.glora_linear(x, weight, bias, **others)
        settings = plain.Settings(**{name: others.pop(name) for name in plain.Settings._fields if name in others})
        prepared, row = plain.prepare_uncached(x, weight, Supports(bias=bias, **others), settings)
        y: Tensor = _DeferredFunction.apply(
            prepared, row, self, trained, self.ticket, *[row[i] for i in prepared.trained]
        )
        return y


class _DeferredFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prepared: Prepared,
        row: Row,
        to: DeferredLinear,
        shared: Mapping[str, nn.Parameter],
        ticket: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        ctx.to, ctx.shared, ctx.node = to, shared, ticket.grad_fn
        y: Tensor = Applied.forward(ctx, prepared, row, *trained)[0]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Nothing is deferred under create_graph=True, so that a second derivative is an error, nor where gradients are
        # watched or batched, since the sum at the end of the pass would escape that.
        if torch.is_grad_enabled() or is_batched(dy) or is_watched(dy):
            _, _, *grads = Applied.backward(ctx, dy)
        else:
            grads = _deferred_backward(ctx, dy)
        return (None, None, None, None, None, *grads)


def _deferred_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    prepared: Prepared = ctx.prepared
    row = prepared.placed(read_saved(ctx, prepared.reads_output))
    if prepared.is_invariant:
        dy = settled(dy)
    shared = {plain.PLACE[name]: parameter for name, parameter in ctx.shared.items()}
    rest = [want and place not in shared for place, want in enumerate(prepared.wanted)]
    with without_autocast(dy.device.type), prepared.guard or NO_GUARD:
        found = iter(prepared.operation.backward([dy], row, prepared.values, rest))
        # Hand over only if this pass wants the shared parameters (`autograd.grad` and `backward(inputs=)` may not).
        if torch._C._will_engine_execute_node(ctx.node):
            _hand_over(ctx.to, ctx.shared, prepared, row, dy)
    return [next(found) if rest[place] else None for place in prepared.trained]


def _hand_over(
    to: DeferredLinear, shared: Mapping[str, nn.Parameter], prepared: Prepared, row: Row, dy: Tensor
) -> None:
    """Hand the factors of the shared parameters' gradients to the `Deferred`."""
    _, s, call = plain.GLORA.read(row, prepared.values)
    h = Made(*row[len(prepared.wanted) :]).h
    flat, up = _rows(dy), given(s.b_up)
    triton = not routes.is_eager(call.route)
    if "b_down" in shared:
        left = thin(flat, cast(up, factor_dtype(dy.dtype, s.factors)).t(), dy.dtype)
        product = SharedProduct(left, _rows(given(row[0])), call.scale, call.dropout_p, call.seed)
        to.deferred.add(shared["b_down"], to.layer, product, False, triton)
    if "b_up" in shared:
        product = SharedProduct(h[:, -up.shape[1] :], flat, 1.0, 0.0, None)
        to.deferred.add(shared["b_up"], to.layer, product, True, triton)


def _rows(tensor: Tensor) -> Tensor:
    """(…, C) as a matrix whose rows are contiguous."""
    flat = tensor.detach().reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
