"""Merging and unmerging many layers at once, in one launch where the kernels over depth take them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from glora_kernels.launch.table import Layer
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.requantize import Kept
from glora_kernels.ops import depth

SHIFTS = frozenset(("C", "C_up", "D", "E"))
"""The parameters that make a layer's full bias another than its base's."""


def operands(layer: GLoRALinear) -> Layer:
    """A layer as the operators over depth take it; its parameters stay part of the graph."""
    adapter: Mapping[str, Tensor] = layer.adapter()
    return Layer(layer.base_weight(), layer.bias, adapter, layer.config.scale, layer.config.variant == "matmul")


def split_for_merge(layers: Mapping[str, GLoRALinear]) -> tuple[list[GLoRALinear], dict[str, GLoRALinear]]:
    """(the layers that `merge_together` takes, the others by path)."""
    single = {path: layer for path, layer in layers.items() if depth.served(operands(layer)) is None}
    return [layer for path, layer in layers.items() if path not in single], single


@torch.no_grad()
def merge_together(layers: Sequence[GLoRALinear]) -> None:
    """`GLoRALinear.merge` of every layer, one launch for those of one device, dtype and order of storage; or of none.

    The bases are copied to the host first, from a GPU into pinned memory (which PyTorch keeps for the next merge) and
    waited for once.

    Raises:
        RuntimeError: a layer is merged already, or disabled.
    """
    groups: dict[Hashable, list[int]] = {}
    tables = [operands(layer) for layer in layers]
    for i, (layer, table) in enumerate(zip(layers, tables, strict=True)):
        layer.check_mergeable()
        if table.adapter:
            groups.setdefault(depth.served(table), []).append(i)
    betas = [_beta_target(layer) for layer in layers]
    bases = [
        Kept(depth.host_copy(layer.weight), None if layer.bias is None else depth.host_copy(layer.bias))
        for layer in layers
    ]
    for device in {layer.weight.device for layer in layers if layer.weight.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    done: list[GLoRALinear] = []
    try:
        for places in groups.values():
            depth.merge([tables[i] for i in places], [betas[i] for i in places])
            for i in places:
                layers[i]._base = bases[i]
                done.append(layers[i])
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    for layer, base, beta in zip(layers, bases, betas, strict=True):
        layer._base = base
        if layer.bias is None and beta is not None:
            layer.bias = nn.Parameter(beta, requires_grad=False)


def split_for_unmerge(layers: Mapping[str, GLoRALinear]) -> tuple[list[GLoRALinear], dict[str, GLoRALinear]]:
    """(the merged layers that `unmerge_together` takes, the others by path)."""
    single = {
        path: layer
        for path, layer in layers.items()
        if layer.quant_state is not None or depth.restorable(_copies(layer)) is None
    }
    return [layer for path, layer in layers.items() if path not in single], single


@torch.no_grad()
def unmerge_together(layers: Sequence[GLoRALinear]) -> None:
    """`GLoRALinear.unmerge` of every layer, one launch for those of one device and width of numbers; or of none."""
    groups: dict[Hashable, list[GLoRALinear]] = {}
    for layer in layers:
        groups.setdefault(depth.restorable(_copies(layer)), []).append(layer)
    done: list[GLoRALinear] = []
    try:
        for group in groups.values():
            depth.restore([_copies(layer) for layer in group])
            for layer in group:
                if layer.base_bias is None:
                    layer.bias = None
                layer._base = None
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.merge()
        raise


def _copies(layer: GLoRALinear) -> depth.Copy:
    """What to restore, and from where; a bias that the base has not is dropped instead."""
    assert layer._base is not None
    weight, bias, _ = layer._base
    target = None if bias is None or layer.bias is None else layer.bias.detach()
    return layer.weight.detach(), weight, target, None if target is None else bias


def _beta_target(layer: GLoRALinear) -> Tensor | None:
    """Where the merged bias goes: the bias itself, or new memory; None where it is that of the base."""
    if SHIFTS.isdisjoint(layer.adapter()):
        return None
    if layer.bias is not None:
        return layer.bias.detach()
    return layer.weight.new_empty(layer.out_features)
