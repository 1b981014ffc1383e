"""The ways into one computation, and when each is taken; and x in the layouts that are no matrix.

    function    an `autograd.Function` around the path: plain eager mode, where a call costs 8 µs
    operator    the registered operator, one node for whoever watches: torch.compile, or a TorchDispatchMode
                (selective checkpointing, make_fx, fake tensors, counters of operations). Inside the node a path may
                write in its own memory; between nodes nothing is overwritten
    composite   y by differentiable operations of PyTorch, where other derivatives are taken than one backward:
                torch.func, forward-mode differentiation; and under torch.jit.trace

A backward whose gradient is batched (is_grads_batched, jacobian(vectorize=True)) differentiates the composite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a call is computed by PyTorch's own operations, of which every derivative is known."""
    return not torch.compiler.is_compiling() and _has_other_derivatives()


def _has_other_derivatives() -> bool:
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_watched(tensor: Tensor) -> bool:
    """Whether a call goes through the registered operator, unless it is transformed."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or isinstance(tensor, FakeTensor)


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether a call is transformed or watched."""
    return is_watched(tensor) or _has_other_derivatives()


def is_batched(dy: Tensor) -> bool:
    """Whether a gradient stands for a batch of them, as PyTorch's own vmap or that of torch.func makes it."""
    return torch._C._functorch.is_legacy_batchedtensor(dy) or torch._C._functorch.is_batchedtensor(dy)


class _Once(torch.autograd.Function):
    """Gradients as they are, which hang on what they were made of: a second derivative is an error, never zero."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        raise RuntimeError(
            "an adapted layer is differentiated once by backward() and torch.autograd: the gradients have no gradient "
            "there (create_graph=True, hvp, hessian). For higher derivatives use torch.func (grad, jvp, hessian)"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's decorator of a backward, whose error is not seen by torch.autograd.functional, which takes zeros.

    Gradients are recorded here only under create_graph=True.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *dys: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *dys)
        with torch.no_grad():
            found = backward(ctx, *dys)
        grads = found if isinstance(found, tuple) else (found,)
        links = [t for t in (*dys, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return _Once.apply(len(grads), *grads, *links) if links else found

    return run


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary strided tensor, neither nested nor sparse."""
    return x.layout == torch.strided and not x.is_nested


def rows_of(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The rows of x: of a nested or sparse one as an ordinary tensor, of that as a matrix or contiguous.

    And what gives a result of these rows the dimensions of x; that of a sparse one is dense, as that of F.linear is.
    """
    if not x.is_nested:
        if x.layout != torch.strided:
            return x.to_dense(masked_grad=False), lambda y: y
        lead = x.shape[:-1]
        return x.reshape(lead.numel(), x.shape[-1]), lambda y: y.view(*lead, y.shape[-1])
    if x.layout == torch.jagged:
        nesting: Any = x
        offsets, lengths, dim = nesting.offsets(), nesting.lengths(), nesting._ragged_idx
        return x.values(), lambda y: torch.nested.nested_tensor_from_jagged(y, offsets, lengths, jagged_dim=dim)
    parts = x.unbind()
    shapes = [part.shape for part in parts]
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    def nested(y: Tensor) -> Tensor:
        pieces = y.split([shape[:-1].numel() for shape in shapes])
        return torch.nested.as_nested_tensor(
            [piece.view(*shape[:-1], -1) for piece, shape in zip(pieces, shapes, strict=True)]
        )

    return rows, nested
