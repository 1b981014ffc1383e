"""The three ways to call an operator, and when each is taken; and inputs that are nested or sparse.

    function    `prepared.Applied`, an `autograd.Function`: plain eager mode, where a call costs 8 µs
    operator    the registered operator, one node of a graph, where a call is watched: by torch.compile or by a
                TorchDispatchMode (selective checkpointing, make_fx, fake tensors, counters of operations)
    composite   differentiable operations of PyTorch, where a call is transformed, so that more than one backward may
                be asked for: torch.func, forward-mode differentiation; and under torch.jit.trace

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
    """Whether a call is transformed: it runs as PyTorch's own operations, which have every derivative."""
    return not torch.compiler.is_compiling() and _has_other_derivatives()


def _has_other_derivatives() -> bool:
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_watched(tensor: Tensor) -> bool:
    """Whether a call is watched: it goes through the registered operator, unless it is transformed."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or isinstance(tensor, FakeTensor)


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether a call is transformed or watched."""
    return is_watched(tensor) or _has_other_derivatives()


def is_batched(dy: Tensor) -> bool:
    """Whether a gradient is a batch of gradients under PyTorch's older vmap or that of torch.func."""
    return torch._C._functorch.is_legacy_batchedtensor(dy) or torch._C._functorch.is_batchedtensor(dy)


class _Once(torch.autograd.Function):
    """Passes gradients through, connected to the tensors they depend on, so that a second derivative is an error."""

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
    """Like torch's decorator of the same name, but a second derivative is an error everywhere.

    torch.autograd.functional does not see the error of torch's and returns zeros. In a backward, grad mode is on only
    under create_graph=True.
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
    """(the rows of x as an ordinary tensor, a function that gives a result of these rows the dimensions of x).

    An ordinary x becomes a matrix. The result of a sparse x is dense, as with F.linear.
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
