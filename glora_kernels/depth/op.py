"""Operations over depth: work that needs no layer's output is done for all layers of a model in one launch.

    merge     W ← W + W∘A + s·B (or W + W·A + s·B),  b ← b + b∘D + E + W·C
    restore   W and b back from their copies
    shifts    β_l = b_l + b_l∘D_l + E_l + W_l·C_l of every layer l, with gradients

One launch takes the layers of one device, weight dtype, adapter dtype, bias dtype and order of storage; a model with
several of these takes one launch for each. `served` says which layers the kernels take; of the others, `shifts` has an
eager path, and `nn` merges them one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.depth import eager
from glora_kernels.depth.table import Copy, GroupKey, Layer, group_key
from glora_kernels.dispatch.common import Weight, cast, path_of, stored, without_autocast
from glora_kernels.dispatch.ways import is_batched, is_elsewhere, once_differentiable
from glora_kernels.runtime import routes


def served(layer: Layer) -> GroupKey | None:
    """The key of the launch that a layer belongs to; None if it is not on the Triton route or no kernel takes it."""
    return group_key(layer) if _on_triton(layer.weight) else None


def merge(layers: Sequence[Layer], betas: Sequence[Tensor | None]) -> None:
    """W ← W + W∘A + s·B (W + W·A + s·B in the product variant) and beta ← b + b∘D + E + W·C, the old W: one launch.

    Computed in fp32 in the order of `reference.effective_weight` and rounded once: the same bits where A and B are
    vectors or constants. Low-rank products (in the product variant (W·A_up)·A_down) and W·C are summed in another
    order, so that their last bits differ before the rounding.

    Args:
        layers: of one `served` key; their weights are overwritten.
        betas: for each layer the memory for its full bias, contiguous, in the dtype of the bias (may be the bias
            itself); None where the bias stays as it is.
    """
    path_of("depth", "triton").merge(layers, betas)
    _overwritten([layer.dense for layer in layers], betas)


def restorable(copy: Copy) -> tuple[object, ...] | None:
    """The key of the launch that restores a copy; None if a kernel cannot read the copy or write its target.

    A GPU reads host memory that is pinned; the copy must have the dtype, sizes and strides of its target.
    """
    weight, *_ = copy
    pairs = [(copy[0], copy[1])] + ([(copy[2], copy[3])] if copy[2] is not None and copy[3] is not None else [])
    if not _on_triton(weight):
        return None
    for target, source in pairs:
        alike = target.dtype == source.dtype and target.shape == source.shape and target.stride() == source.stride()
        dense = target.is_contiguous() or target.t().is_contiguous()
        readable = not target.is_cuda or source.is_pinned()
        if not (alike and dense and readable) or type(target.data) is not Tensor:
            return None
    return weight.device, weight.dtype.itemsize, pairs[-1][0].dtype.itemsize


def restore(copies: Sequence[Copy]) -> None:
    """Overwrite every weight and bias with its copy, bit for bit, in one launch, and wait for it.

    Args:
        copies: of one `restorable` key.
    """
    path_of("depth", "triton").restore(copies)
    _overwritten([copy[0] for copy in copies], [copy[2] for copy in copies])
    if copies[0][0].is_cuda:  # the copies may be freed, and PyTorch does not know that a launch reads pinned memory
        torch.cuda.current_stream(copies[0][0].device).synchronize()


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory with the same strides. From a GPU, pinned and asynchronous: synchronize before reading it.

    If no memory can be pinned, warns and uses ordinary memory, for which `restorable` is None.
    """
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.to("cpu", copy=True)
    shape, strides = tensor.shape, tensor.stride()
    try:
        host = torch.empty_strided(shape, strides, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError as error:
        warnings.warn(
            f"no pinned host memory for the base of a merged layer ({error}): its weight is restored by a copy of its "
            "own and not in one launch",
            stacklevel=2,
        )
        host = torch.empty_strided(shape, strides, dtype=tensor.dtype)
    return host.copy_(tensor, non_blocking=True)


def shifts(layers: Sequence[Layer]) -> list[Tensor]:
    """β_l = b_l + b_l∘D_l + E_l + W_l·C_l of every layer in one launch; the gradients take one more, two with C=lora.

    With g_l = ∂β_l: ∂b = g∘(1+D), ∂D = g∘b, ∂E = g (summed for constants), dc = Wᵀg is ∂C, or C=lora has
    ∂C_up = dc·C_downᵀ and ∂C_down = C_upᵀ·dc, which needs all of dc and so a second launch.

    Backward may run several times, for some of the layers each (activation checkpointing with use_reentrant=True does
    that), so that autograd's saved tensors cannot be used; a tensor that was overwritten meanwhile is still noticed.

    Args:
        layers: any; the adapters' A and B are not read.

    Returns:
        One β (N,) per layer, in fp32, or float64 for a float64 weight.

    Raises:
        RuntimeError: in backward: a parameter was overwritten since forward.
    """
    if any(is_elsewhere(stored(layer.weight)) for layer in layers):
        return [eager.beta(layer) for layer in layers]
    groups: dict[GroupKey | None, list[int]] = {}
    shifting = [layer.shifting() for layer in layers]
    for i, layer in enumerate(shifting):
        groups.setdefault(served(layer), []).append(i)
    found: dict[int, Tensor] = {}
    for key, places in groups.items():
        members = [shifting[i] for i in places]
        slots = [(i, name) for i, layer in enumerate(members) for name in layer.names()]
        tensors = [members[i].tensor(name) for i, name in slots]
        plan = _Plan(key, tuple(layer.detached() for layer in members), tuple(slots))
        found |= zip(places, _ShiftFunction.apply(plan, *tensors), strict=True)
    return [found[i] for i in range(len(layers))]


class _Plan(NamedTuple):
    """One call of `_ShiftFunction`: its layers, and in `slots` (layer, name) of each of its tensor arguments."""

    key: GroupKey | None
    layers: tuple[Layer, ...]
    slots: tuple[tuple[int, str], ...]

    def versions(self) -> list[list[int]]:
        """How often each tensor of each layer was overwritten; 0 for inference tensors, which do not count it."""
        tensors = [[stored(layer.weight), *map(layer.tensor, layer.names())] for layer in self.layers]
        return [[0 if tensor.is_inference() else tensor._version for tensor in own] for own in tensors]

    def forward(self) -> tuple[Tensor, ...]:
        if self.key is None:
            return tuple(map(eager.shifted, self.layers))
        found: tuple[Tensor, ...] = path_of("depth", "triton").shifts(self.key, self.layers)
        return found

    def backward(self, gs: Mapping[int, Tensor], asked: Mapping[int, list[str]]) -> Mapping[tuple[int, str], Tensor]:
        """The gradients named in `asked`, by layer and name, from the g of some layers."""
        batched = any(map(is_batched, gs.values()))
        if self.key is not None and not batched:
            found: Mapping[tuple[int, str], Tensor] = path_of("depth", "triton").shift_gradients(*self[:2], gs, asked)
            return found
        of = eager.batched_shift_gradients if batched else eager.shift_gradients
        own = {i: of(self.layers[i], g, asked[i]) for i, g in gs.items()}
        return {(i, name): grad for i, grads in own.items() for name, grad in grads.items()}


class _ShiftFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.versions = plan, plan.versions()
        with without_autocast(plan.layers[0].weight.device.type):
            return plan.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, versions = ctx.plan, ctx.plan.versions()
        asked: dict[int, list[str]] = {}
        for (i, name), need in zip(plan.slots, ctx.needs_input_grad[1:], strict=True):
            if need and gs[i] is not None:
                asked.setdefault(i, []).append(name)
        if any(ctx.versions[i] != versions[i] for i in asked):
            raise RuntimeError(
                "a weight, bias or parameter of C, D or E was overwritten between shift_once and backward, which needs "
                "its old value; change parameters after backward only"
            )
        with without_autocast(plan.layers[0].weight.device.type):
            grads = plan.backward({i: gs[i] for i in asked}, asked) if asked else {}
        found = ((grads.get((i, name)), plan.layers[i].tensor(name).dtype) for i, name in plan.slots)
        return (None, *(None if grad is None else cast(grad, dtype) for grad, dtype in found))


def _on_triton(weight: Weight) -> bool:
    """Whether a weight is on the Triton route. A forced backend that cannot serve it is no error: eager does it."""
    choice, device = routes.chosen(), weight.device.type
    if choice == "triton":
        return routes.can_launch(device) and weight.dtype in routes.TRITON_DTYPES
    return choice == "auto" and routes.explain(device, weight.dtype)[0] == "triton"


def _overwritten(weights: Sequence[Tensor], others: Sequence[Tensor | None]) -> None:
    """Tell autograd that these changed, so that a later backward that needs an old value raises an error."""
    for tensor in (*weights, *others):
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
