"""What adapters add to the communication of a step: counted from the sharding table, not measured.

A step over T tensor-parallel ranks and D data-parallel ones sends, for adapters alone,

    over T:  one sum of the gradient of each parameter that a rank has whole (`layout`): Σ size
    over D:  one average of the gradients of a rank's parts:  Σ cut size / T + Σ whole size

where a parameter that layers share counts once. Nothing depends on the number of tokens. The frozen layers' own sums,
of y in forward and dx in backward, are the same with and without adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from glora_kernels.nn.model import layers_of, unwrap
from glora_kernels.parallel.layout import COLUMN, ONCE, ROW, cut_dim
from glora_kernels.spec import select


@dataclass(frozen=True)
class Traffic:
    """The communication of adapters in one step, on one rank.

    Attributes:
        tensor_sums: gradients added up over the tensor-parallel ranks, one a parameter that each of them has whole; a
            collective takes many of them (`grads.BUCKET`).
        tensor_bytes: the size of what they add up.
        data_bytes: the size of the gradients that are averaged over the data-parallel ranks.
        trained: numbers in the adapters of the whole model.
    """

    tensor_sums: int
    tensor_bytes: int
    data_bytes: int
    trained: int


def traffic(model: nn.Module, directions: Mapping[str, str], ranks: int) -> Traffic:
    """The communication that the adapters of a model add to a step of tensor parallelism over so many ranks.

    Args:
        model: with GLoRA layers, not cut; it may be on the meta device.
        directions: pattern of paths → "column" or "row"; layers that none matches are on every rank as they are.
        ranks: T.

    Raises:
        ValueError: the model has no GLoRA layer; a pattern that matches none; another direction.
    """
    layers = layers_of(unwrap(model), "traffic")
    chosen: dict[str, str] = {}
    for pattern, direction in directions.items():
        if direction not in (COLUMN, ROW):
            raise ValueError(f"directions[{pattern!r}] must be {COLUMN!r} or {ROW!r}, got {direction!r}")
        if not (found := select(pattern, layers.keys())):
            raise ValueError(f"directions: the pattern {pattern!r} matches no GLoRA layer")
        chosen |= dict.fromkeys(found, direction)
    seen: set[nn.Parameter] = set()
    sums = summed = averaged = trained = 0
    for path, layer in layers.items():
        for name, parameter in layer.adapter().items():
            if parameter in seen:
                continue
            seen.add(parameter)
            size, own = parameter.numel() * parameter.element_size(), chosen.get(path)
            is_cut = own is not None and cut_dim(own, name, layer.config) is not None
            trained += parameter.numel()
            averaged += size // ranks if is_cut else size
            if own is not None and not is_cut and not (own == ROW and name in ONCE):
                sums, summed = sums + 1, summed + size
    return Traffic(sums, summed, averaged, trained)


LLAMA = {
    "*.q_proj": COLUMN, "*.k_proj": COLUMN, "*.v_proj": COLUMN, "*.o_proj": ROW,
    "*.gate_proj": COLUMN, "*.up_proj": COLUMN, "*.down_proj": ROW,
}  # fmt: skip
"""The directions of the projections of LLaMA and of models built like it."""
