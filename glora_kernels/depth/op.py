"""The operators over depth: what waits for no layer is done for all layers of a model in one launch.

    merge     W ← W + W∘A + s·B (or W + W·A + s·B),  b ← b + b∘D + E + W·C
    restore   W and b back from their copies
    shifts    β_l = b_l + b_l∘D_l + E_l + W_l·C_l of every layer l, with gradients

One launch takes the layers of one device, weight dtype, adapter dtype, bias dtype and order of storage; a model with
several of those takes one launch each. `layers_served` says which layers the kernels take; `shifts` has an eager path
for the others, `nn` merges them one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.depth.table import GroupKey, Layer, group_key
from glora_kernels.dispatch.common import Supports, Weight, cast, given, shift, stored, wide_dtype, without_autocast
from glora_kernels.dispatch.ways import is_batched, is_transformed, is_watched, once_differentiable
from glora_kernels.glora import composite
from glora_kernels.glora import eager as eager_path
from glora_kernels.glora import wc as operator
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import environment, routes
from glora_kernels.runtime.planning import arch_of

Copy = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""A weight, its copy, a bias, its copy."""


def served(layer: Layer) -> GroupKey | None:
    """The launch that a layer belongs to, or None where it is not on the Triton route or no kernel takes it."""
    return group_key(layer) if _on_triton(layer.weight) else None


def merge(layers: Sequence[Layer], betas: Sequence[Tensor | None]) -> None:
    """W ← W + W∘A + s·B (W + W·A + s·B in the product variant) and beta ← b + b∘D + E + W·C, the old W: one launch.

    In fp32, rounded once, in the order of `reference.effective_weight`: the same bits where A and B are vectors or
    constants. A low-rank product is a sum over the rank in another order (in the product variant (W·A_up)·A_down),
    whose last bits differ before the rounding; so are the terms of W·C.

    Args:
        layers: of one `served` key; their weights are overwritten.
        betas: for each layer where the full bias goes, contiguous, in the dtype of the bias (may be the bias itself);
            None where the bias stays.
    """
    from glora_kernels.depth.merge import merge_launch
    from glora_kernels.depth.rows import layer_table

    key = given_key(layers)
    table = layer_table(layers, key, [{"beta": beta} for beta in betas])
    merge_launch(table, arch=arch_of(layers[0].dense)).run()
    _overwritten([layer.dense for layer in layers], betas)


def restorable(copy: Copy) -> tuple[object, ...] | None:
    """What the copies restored in one launch have in common, or None where a kernel cannot read or place this one.

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
    """Every weight and bias overwritten with its copy, bit for bit, in one launch, and waited for.

    Args:
        copies: of one `restorable` key.
    """
    from glora_kernels.depth.merge import restore_launch, restore_table

    table = restore_table(copies)
    restore_launch(table, copies, arch=arch_of(copies[0][0])).run()
    _overwritten([copy[0] for copy in copies], [copy[2] for copy in copies])
    if copies[0][0].is_cuda:  # the copies may be freed, and pinned memory knows nothing of our launch
        torch.cuda.current_stream(copies[0][0].device).synchronize()


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory with the same strides; from a GPU pinned and asynchronous: synchronize before reading it.

    Where no memory can be pinned, a warning, and ordinary memory: `restorable` then says None.
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
    """β_l = b_l + b_l∘D_l + E_l + W_l·C_l of every layer, one launch; its gradients are one more, two with C=lora.

    With g_l = ∂β_l: ∂b = g∘(1+D), ∂D = g∘b, ∂E = g (sums for constants), dc = Wᵀg is ∂C, or C=lora has
    ∂C_up = dc·C_downᵀ and ∂C_down = C_upᵀ·dc, which waits for all of dc: the second launch.

    The gradients may be asked for several times, by parts of the layers (activation checkpointing with
    use_reentrant=True does), so that nothing is saved by autograd; a tensor that was overwritten meanwhile is noticed
    all the same.

    Args:
        layers: any; the adapters' A and B are not read.

    Returns:
        One β a layer, (N,): in fp32, or float64 for a float64 weight.

    Raises:
        RuntimeError: in backward: a parameter was overwritten since.
    """
    if is_transformed() or any(is_watched(stored(layer.weight)) for layer in layers):
        return [_composite_shift(layer) for layer in layers]
    groups: dict[GroupKey | None, list[int]] = {}
    wanted = [_shift_only(layer) for layer in layers]
    for i, layer in enumerate(wanted):
        groups.setdefault(served(layer), []).append(i)
    found: dict[int, Tensor] = {}
    for key, places in groups.items():
        members = [wanted[i] for i in places]
        slots = [(i, name) for i, layer in enumerate(members) for name in _names(layer)]
        tensors = [_tensor(members[i], name) for i, name in slots]
        plan = _Plan(key, tuple(_detached(layer) for layer in members), tuple(slots))
        found |= zip(places, _ShiftFunction.apply(plan, *tensors), strict=True)
    return [found[i] for i in range(len(layers))]


class _Plan(NamedTuple):
    """One call of `_ShiftFunction`: the layers, and (layer, name) of each tensor that it is given for its gradient."""

    key: GroupKey | None
    layers: tuple[Layer, ...]
    slots: tuple[tuple[int, str], ...]

    def versions(self) -> list[list[int]]:
        """How often each tensor of each layer was overwritten, which those of inference mode do not count."""
        tensors = [[stored(layer.weight), *map(partial(_tensor, layer), _names(layer))] for layer in self.layers]
        return [[0 if tensor.is_inference() else tensor._version for tensor in own] for own in tensors]


class _ShiftFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.versions = plan.versions()
        with without_autocast(plan.layers[0].weight.device.type):
            return tuple(map(_eager_shift, plan.layers)) if plan.key is None else _triton_shifts(plan.key, plan.layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, versions = ctx.plan, ctx.plan.versions()
        grads: dict[tuple[int, str], Tensor] = {}
        asked = {slot for slot, need in zip(plan.slots, ctx.needs_input_grad[1:], strict=True) if need}
        active = {i: g for i, g in enumerate(gs) if g is not None and any(slot[0] == i for slot in asked)}
        if any(ctx.versions[i] != versions[i] for i in active):
            raise RuntimeError(
                "a weight, bias or parameter of C, D or E was overwritten between shift_once and backward, which needs "
                "its old value; change parameters after backward only"
            )
        with without_autocast(plan.layers[0].weight.device.type):
            if any(map(is_batched, active.values())):
                for i, g in active.items():
                    grads |= _batched_shift_grads(plan.layers[i], g, i, asked)
            elif plan.key is not None and active:
                grads = _triton_shift_grads(plan.key, plan.layers, active, asked)
            elif active:
                for i, g in active.items():
                    names = {name for j, name in asked if i == j}
                    grads |= {(i, name): grad for name, grad in _eager_shift_grads(plan.layers[i], g, names).items()}
        found = (grads.get(slot) for slot in plan.slots)
        dtypes = (_tensor(plan.layers[i], name).dtype for i, name in plan.slots)
        return (None, *(None if g is None else cast(g, dtype) for g, dtype in zip(found, dtypes, strict=True)))


def _eager_shift(layer: Layer) -> Tensor:
    get, weight = layer.adapter.get, layer.weight
    wc = None
    if get("C") is not None or get("C_up") is not None:
        wc = eager_path.wc_forward(weight, get("C"), get("C_up"), get("C_down"))
    return _beta(layer, wc).clone()


def _composite_shift(layer: Layer) -> Tensor:
    """β by differentiable operations and `ops.glora_wc`, which is itself one of the `dispatch.ways`."""
    get = layer.adapter.get
    wc = None
    if get("C") is not None or get("C_up") is not None:
        wc = operator.glora_wc(layer.weight, get("C"), c_up=get("C_up"), c_down=get("C_down"))
    return _beta(layer, wc)


def _beta(layer: Layer, wc: Tensor | None) -> Tensor:
    get, weight = layer.adapter.get, layer.weight
    # A 4-bit W is exact in any dtype: its adapter's decides.
    exact = isinstance(weight, QuantizedWeight) and any(t.dtype == torch.float64 for t in layer.adapter.values())
    dtype = torch.float64 if exact else weight.dtype
    beta = given(shift(Supports(bias=layer.bias, wc=wc, d=get("D"), e=get("E")), dtype))
    return beta.to(wide_dtype(dtype)).expand(weight.shape[0])


def _eager_shift_grads(layer: Layer, g: Tensor, names: set[str]) -> dict[str, Tensor]:
    get = layer.adapter.get
    bias, d = layer.bias, get("D")
    found: dict[str, Tensor | None] = {
        "bias": g if d is None else g + g * d.to(g.dtype),
        "D": None if bias is None else g * bias.to(g.dtype),
        "E": g,
    }
    if names & {"C", "C_up", "C_down"}:
        needs = [name in names for name in ("C", "C_up", "C_down")]
        dc = iter(operator.gradients(g, layer.weight, (get("C"), get("C_up"), get("C_down")), needs, "eager"))
        found |= {name: next(dc) for name in ("C", "C_up", "C_down") if name in names}
    grads = {name: given(found[name]) for name in names}
    constants = {name for name in names & {"D", "E"} if layer.adapter[name].numel() == 1}
    return {name: grad.sum().view(1) if name in constants else grad for name, grad in grads.items()}


def _batched_shift_grads(layer: Layer, g: Tensor, i: int, asked: set[tuple[int, str]]) -> dict[tuple[int, str], Tensor]:
    """The gradients of one layer for a batch of g."""
    names = [name for name in _names(layer) if (i, name) in asked]

    def forward(*tensors: Tensor) -> Tensor:
        new = dict(zip(names, tensors, strict=True))
        bias = new.pop("bias", layer.bias)
        return _composite_shift(Layer(layer.weight, bias, {**layer.adapter, **new}))

    found = composite.gradients(forward, [_tensor(layer, name) for name in names], [True] * len(names), g)
    return {(i, name): given(grad) for name, grad in zip(names, found, strict=True)}


def _triton_shifts(key: GroupKey, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    from glora_kernels.depth.rows import layer_table
    from glora_kernels.depth.shift import shift_launch

    weight = layers[0].dense
    sizes = [layer.weight.shape[0] for layer in layers]
    betas = weight.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    table = layer_table(layers, key, [{"beta": beta} for beta in betas])
    shift_launch(table, arch=arch_of(weight)).run()
    return betas


def _triton_shift_grads(
    key: GroupKey, layers: Sequence[Layer], gs: dict[int, Tensor], asked: set[tuple[int, str]]
) -> dict[tuple[int, str], Tensor]:
    from glora_kernels.depth.rows import layer_table
    from glora_kernels.depth.shift import shift_down_launch, shift_grad_launch

    columns: list[dict[str, Tensor | None]] = []
    grads: dict[tuple[int, str], Tensor] = {}
    for i, g in gs.items():
        own = {
            name: torch.empty_like(_tensor(layers[i], name), dtype=key.bias if name == "bias" else key.adapter,
                                   memory_format=torch.contiguous_format)
            for j, name in asked if i == j
        }  # fmt: skip
        grads |= {(i, name): grad for name, grad in own.items()}
        wide = g.new_empty(layers[i].dense.shape[1], dtype=torch.float32) if "C_down" in own else None
        columns.append({
            "g": g.to(torch.float32).contiguous(), "dbias": own.get("bias"), "dc": own.get("C"), "dc_wide": wide,
            "dc_up": own.get("C_up"), "dc_down": own.get("C_down"), "dd": own.get("D"), "de": own.get("E"),
        })  # fmt: skip
    members = [layers[i] for i in gs]
    table, arch = layer_table(members, key, columns), arch_of(members[0].dense)
    shift_grad_launch(table, arch=arch).run()
    if any(name == "C_down" for _, name in asked):
        shift_down_launch(table, arch=arch).run()
    return grads


def given_key(layers: Sequence[Layer]) -> GroupKey:
    """The one key of the layers of a launch.

    Raises:
        ValueError: there is no layer, one that no kernel takes, or several keys.
    """
    keys = {group_key(layer) for layer in layers}
    key = keys.pop() if len(keys) == 1 else None
    if key is None:
        raise ValueError("one launch takes layers of one device, dtype and order of storage, which `served` tells")
    return key


def _on_triton(weight: Weight) -> bool:
    """Whether kernels run where a weight is. A forced backend that cannot serve it is no error: eager merges it."""
    choice, device = routes.current_backend(), weight.device.type
    if choice == "triton":
        runs = device == "cuda" or (device == "cpu" and environment.interpreting())
        return runs and weight.dtype in routes.TRITON_DTYPES
    return choice == "auto" and routes.explain(device, weight.dtype)[0] == "triton"


def _overwritten(weights: Sequence[Tensor], others: Sequence[Tensor | None]) -> None:
    """Tell autograd, so that a backward that is still to come on an old value is an error and not a wrong gradient."""
    for tensor in (*weights, *others):
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _shift_only(layer: Layer) -> Layer:
    shifting = {"C", "C_up", "C_down", "D", "E"}
    adapter = {name: tensor for name, tensor in layer.adapter.items() if name in shifting}
    return Layer(layer.weight, layer.bias, adapter)


def _names(layer: Layer) -> list[str]:
    return [*(() if layer.bias is None else ("bias",)), *layer.adapter]


def _tensor(layer: Layer, name: str) -> Tensor:
    return given(layer.bias) if name == "bias" else layer.adapter[name]


def _detached(layer: Layer) -> Layer:
    bias = None if layer.bias is None else layer.bias.detach()
    return Layer(layer.weight.detach(), bias, {name: tensor.detach() for name, tensor in layer.adapter.items()})
