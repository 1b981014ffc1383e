"""The Triton path over depth: builds tables of pointers, allocates results and launches the kernels.

Imported at the first call that needs it (`dispatch.common.path_of`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glora_kernels.depth.merge import merge_launch, restore_launch, restore_table
from glora_kernels.depth.rows import layer_table
from glora_kernels.depth.shared import shared_grad_launch, shared_grad_tables
from glora_kernels.depth.shift import shift_down_launch, shift_grad_launch, shift_launch
from glora_kernels.depth.table import Copy, GroupKey, Layer, SharedFactor, group_key
from glora_kernels.runtime.planning import arch_of


def merge(layers: Sequence[Layer], betas: Sequence[Tensor | None]) -> None:
    """See `depth.op.merge`."""
    table = layer_table(layers, key_of(layers), [{"beta": beta} for beta in betas])
    merge_launch(table, arch=arch_of(layers[0].dense)).run()


def restore(copies: Sequence[Copy]) -> None:
    """See `depth.op.restore`, without waiting."""
    restore_launch(restore_table(copies), copies, arch=arch_of(copies[0][0])).run()


def shifts(key: GroupKey, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """β of every layer: see `depth.op.shifts`."""
    weight, sizes = layers[0].dense, [len(layer.dense) for layer in layers]
    betas = weight.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    shift_launch(layer_table(layers, key, [{"beta": beta} for beta in betas]), arch=arch_of(weight)).run()
    return betas


def shift_gradients(
    key: GroupKey, layers: Sequence[Layer], gs: Mapping[int, Tensor], asked: Mapping[int, Sequence[str]]
) -> dict[tuple[int, str], Tensor]:
    """The gradients named in `asked`, by layer and name, from the g of some layers; C_down takes a second launch."""
    columns: list[dict[str, Tensor | None]] = []
    grads: dict[tuple[int, str], Tensor] = {}
    for i, g in gs.items():
        own = {
            name: torch.empty_like(
                layers[i].tensor(name),
                dtype=key.bias if name == "bias" else key.adapter,
                memory_format=torch.contiguous_format,
            )
            for name in asked[i]
        }
        grads |= {(i, name): grad for name, grad in own.items()}
        wide = g.new_empty(layers[i].dense.shape[1], dtype=torch.float32) if "C_down" in own else None
        places = {f"d{name.lower()}": grad for name, grad in own.items()}
        columns.append({"g": g.to(torch.float32).contiguous(), "dc_wide": wide, **places})
    members = [layers[i] for i in gs]
    table, arch = layer_table(members, key, columns), arch_of(members[0].dense)
    shift_grad_launch(table, arch=arch).run()
    if any("C_down" in names for names in asked.values()):
        shift_down_launch(table, arch=arch).run()
    return grads


def shared_gradients(factors: Sequence[SharedFactor]) -> None:
    """Compute every factor's gradient into its `out`."""
    shared_grad_launch(shared_grad_tables(factors), factors, arch=arch_of(factors[0].out)).run()


def key_of(layers: Sequence[Layer]) -> GroupKey:
    """The key that all layers of a launch have.

    Raises:
        ValueError: there is no layer, one that no kernel takes, or several keys.
    """
    keys = {group_key(layer) for layer in layers}
    key = keys.pop() if len(keys) == 1 else None
    if key is None:
        raise ValueError("one launch takes layers of one device, dtype and order of storage, which `served` tells")
    return key
