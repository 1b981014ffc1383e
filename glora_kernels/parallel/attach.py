"""Cutting a GLoRA layer over the ranks of a mesh: its parameters become DTensors, its calls those of `call.Cut`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.utils.weak import WeakTensorKeyDictionary

from glora_kernels.nn.adapted import ADAPTER_NAMES
from glora_kernels.nn.ranks import is_part
from glora_kernels.parallel import codes
from glora_kernels.parallel.call import Cut
from glora_kernels.parallel.grads import settle_before_steps
from glora_kernels.parallel.layout import refusal

_MADE = WeakTensorKeyDictionary()
"""Parameters that were cut and that layers still have, and the DTensors in their place: a shared one becomes one."""


def attach(layer: Any, mesh: DeviceMesh, direction: str, src_data_rank: int | None = 0) -> None:
    """Cut a GLoRA layer over a mesh, with the values of the mesh's first rank; every rank must call it.

    A shared factor becomes one DTensor in all layers that have it. The base may be cut already.

    Args:
        layer: a `GLoRALinear`.
        mesh: 1-D.
        direction: `layout.COLUMN` or `layout.ROW`.
        src_data_rank: the rank of the mesh whose values all get; None: each cuts its own.

    Raises:
        ValueError: the layer cannot be cut; the message says why. It is unchanged.
        RuntimeError: it is merged, or a parameter is computed from others.
    """
    cut = Cut(mesh, direction)
    if reason := reason_against(layer, cut):
        raise ValueError(f"cannot cut this layer over {mesh.size()} ranks: {reason}")
    if layer.merged:
        raise RuntimeError("a merged layer cannot be cut over ranks, since its adapter would be lost; unmerge it first")
    layer.check_intact("tensor parallelism")
    if layer.quant_state is not None:
        layer.hold(codes.cut(layer.codes(), direction, mesh.get_local_rank(), mesh.size()))
    for name in ("weight", "bias", *ADAPTER_NAMES):
        old = layer._parameters.get(name)
        if old is None or is_part(old):
            continue
        if (new := _MADE.get(old)) is None:
            placement = cut.placement(name, layer.config, layer._transposed)
            part = distribute_tensor(old.detach(), mesh, (placement,), src_data_rank=src_data_rank)
            new = _MADE[old] = nn.Parameter(part, requires_grad=old.requires_grad)
        layer._parameters[name] = new
        if (holders := layer._holders.get(name)) is not None:
            holders.replace(old, new)
    layer._cut = cut
    settle_before_steps()


def reason_against(layer: Any, cut: Cut) -> str | None:
    """The reason why a layer cannot be cut; None where it can."""
    config, shape, ranks = layer.config, (layer.out_features, layer.in_features), cut.mesh.size()
    if layer._cut is not None:
        return "it is cut already"
    if reason := refusal(cut.direction, config, shape, ranks):
        return reason
    if layer.quant_state is not None and (reason := codes.refusal(layer.codes(), cut.direction, ranks)):
        return reason
    if layer.named():
        return f"it has adapters beside the first ({', '.join(layer.named())}); cut the model first, or delete them"
    siblings = layer._siblings
    if siblings is not None and siblings.fused:
        return (
            f"it is fused with its siblings {siblings.names} (fuse_siblings), which one call computes; take them apart "
            "by split_siblings(model). torch's PrepareModuleInput on their parent gives them one input, whose "
            "gradient is then summed over the ranks once"
        )
    if siblings is not None and siblings.tied and config.dropout:
        return (
            f"it has one dropout mask with its siblings {siblings.names} (tie_siblings=True), which read different "
            "DTensors; take dropout=0 or tie_siblings=False"
        )
    for name in ADAPTER_NAMES:
        parameter = layer._parameters.get(name)
        if parameter is None or not is_part(parameter := _MADE.get(parameter, parameter)):
            continue
        wanted = cut.placement(name, config)
        if parameter.placements != (wanted,) or parameter.device_mesh != cut.mesh:
            return (
                f"its {name} is shared with a layer that is cut in another way ({parameter.placements}, here "
                f"{wanted}): layers that share a factor are all colwise or all rowwise, over one mesh. Share in each "
                "kind apart (two ShareLoRAConfigs), or not"
            )
    return None
