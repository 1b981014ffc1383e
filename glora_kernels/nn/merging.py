"""Merging and unmerging many layers at once, in one launch where the kernels over depth take them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from glora_kernels.depth import op as depth
from glora_kernels.depth.table import Layer
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.requantize import Kept, check_finite, keep
from glora_kernels.nn.undo import all_or_none
from glora_kernels.runtime.planning import is_planning

SHIFTS = frozenset(("C", "C_up", "D", "E"))
"""The parameters that make a layer's full bias another than its base's."""


def adds_bias(layer: GLoRALinear) -> bool:
    """Whether the merged layer has a bias that its base has not."""
    return layer.base_bias is None and not SHIFTS.isdisjoint(layer.adapter())


def operands(layer: GLoRALinear) -> Layer:
    """A layer as the operators over depth take it; its parameters stay part of the graph."""
    adapter: Mapping[str, Tensor] = layer.adapter()
    return Layer(layer.base_weight(), layer.bias, adapter, layer.config.scale, layer.config.variant == "matmul")


def split_for_merge(layers: Mapping[str, GLoRALinear]) -> tuple[dict[str, GLoRALinear], dict[str, GLoRALinear]]:
    """(the layers that `merge_together` takes, the others), by path."""
    single = {path: layer for path, layer in layers.items() if depth.served(operands(layer)) is None}
    return {path: layer for path, layer in layers.items() if path not in single}, single


@torch.no_grad()
def merge_together(layers: Mapping[str, GLoRALinear]) -> None:
    """`GLoRALinear.merge` of every layer, one launch for those of one device, dtype and order of storage; or of none.

    The bases are copied to the host first, from a GPU into pinned memory (which PyTorch keeps for the next merge) and
    waited for once.

    Args:
        layers: by path.

    Raises:
        RuntimeError: a layer is merged already, or disabled.
        ValueError: a merged weight or bias holds NaN or inf where the base does not.
    """
    groups: dict[Hashable, list[str]] = {}
    tables = {path: operands(layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.check_mergeable()
        if tables[path].adapter:
            groups.setdefault(depth.served(tables[path]), []).append(path)
    betas = {path: _beta_target(layer) for path, layer in layers.items()}
    bases = {
        path: Kept(depth.host_copy(layer.weight), None if layer.bias is None else depth.host_copy(layer.bias))
        for path, layer in layers.items()
    }
    for device in {layer.weight.device for layer in layers.values() if layer.weight.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    with all_or_none() as undo:
        undo.callback(unmerge_all, layers.values())
        for path, layer in layers.items():
            layer.keep_base(bases[path])
        for paths in groups.values():
            depth.merge([tables[path] for path in paths], [betas[path] for path in paths])
        for path, layer in layers.items():
            if layer.bias is None and (beta := betas[path]) is not None:
                layer.bias = nn.Parameter(beta, requires_grad=False)
        if not is_planning():
            _check_finite(layers, bases)


def unmerge_all(layers: Iterable[GLoRALinear]) -> None:
    """Put back the base of every layer that is merged."""
    for layer in layers:
        if layer.merged:
            layer.unmerge()


def _check_finite(layers: Mapping[str, GLoRALinear], bases: Mapping[str, Kept]) -> None:
    """One pass over the merged values, and a look at the base only where that finds NaN or inf."""
    merged = [(path, t) for path, layer in layers.items() for t in (layer.weight, layer.bias) if t is not None]
    if not merged:
        return
    norms = torch._foreach_norm([tensor for _, tensor in merged], math.inf)
    broken = {path for (path, _), norm in zip(merged, norms, strict=True) if not math.isfinite(norm)}
    for path in broken:
        merged_values, base = (
            Kept(values.weight.t() if layers[path]._transposed else values.weight, values.bias)
            for values in (keep(layers[path]), bases[path])
        )
        with named(path):
            check_finite(merged_values, base)


@contextlib.contextmanager
def named(path: str) -> Iterator[None]:
    """A ValueError of a layer's says of which layer it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"merge: {path!r}: {error}") from error


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
    with all_or_none() as undo:
        undo.callback(_merge_anew, layers)
        for group in groups.values():
            depth.restore([_copies(layer) for layer in group])
            for layer in group:
                layer.forget_base()


def _merge_anew(layers: Sequence[GLoRALinear]) -> None:
    unmerge_all(layers)  # a launch may have come to its end in part
    merge_together({str(i): layer for i, layer in enumerate(layers)})


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
