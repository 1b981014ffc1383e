"""PRILoRA: ranks that rise with depth, and a D that is pruned while it trains by what its inputs are.

Source: Benedek and Wolf, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation", 2024 (arXiv 2401.11316).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.methods.allocate import linear_ranks, with_ranks
from glora_kernels.methods.factors import low_rank, refuse_shared
from glora_kernels.methods.mids import NOT_SHARED
from glora_kernels.nn.inject import inject
from glora_kernels.recipes.recipe import Recipe
from glora_kernels.spec import GLoRAConfig


def inject_prilora(
    model: nn.Module,
    low: int = 4,
    high: int = 12,
    config: GLoRAConfig | None = None,
    target_modules: str | Iterable[str] | None = None,
    train: str | Iterable[str] = (),
) -> dict[str, int]:
    """Inject adapters whose rank rises linearly from `low` in the first block to `high` in the last; returns ranks."""
    ranks = linear_ranks(model, low, high, target_modules)
    inject(model, with_ranks(config or GLoRAConfig.lora(8, 16), ranks), list(ranks), train)
    return ranks


class PRILoRA(Recipe):
    """Every `period` steps the share `pruned` of each row of D with the smallest abs(D_ij)·x̄_j becomes zero.

    x̄_j is the running mean of abs(x_j) over the inputs of the layer, in calls with gradients. Zeroed entries train on
    (what the authors do with them is not said).

    Args:
        model: with low-rank adapters (`inject_prilora`, or PEFT's LoRA with rank_pattern=linear_ranks(...)).
        period: steps between prunings.
        pruned: the share of a row.
        decay: of the running mean, a step.

    Raises:
        ValueError: a number that cannot be; layers that share a factor, whose D would be pruned for each of them.
    """

    def __init__(self, model: nn.Module, period: int = 40, pruned: float = 0.5, decay: float = 0.9) -> None:
        if period < 1 or not 0 <= pruned < 1 or not 0 <= decay < 1:
            raise ValueError(
                f"period must be at least 1, pruned and decay in [0, 1); got {period}, {pruned} and {decay}"
            )
        super().__init__(model)
        self.period, self.pruned, self.decay = period, pruned, decay
        self.means: dict[str, Tensor] = {}
        layers = low_rank(model, "PRILoRA")
        for own in layers.values():
            refuse_shared(layers, own, "PRILoRA", NOT_SHARED)
        self._seen = self.watch("input_norm", training=True)

    def act(self) -> None:
        for path, value in self._seen.items():
            before = self.means.get(path)
            self.means[path] = value if before is None else self.decay * before + (1 - self.decay) * value
        self._seen.clear()
        if self.step % self.period == 0:
            self.prune()

    @torch.no_grad()
    def prune(self) -> None:
        """Zero the entries of every D that matter least now.

        Raises:
            RuntimeError: no layer was seen: the model was compiled before, or is not the one that trains.
        """
        if not self.means:
            raise RuntimeError(
                "PRILoRA has seen no input of any layer; make it of what trains, before that is compiled or captured"
            )
        for path, own in low_rank(self.model, "PRILoRA").items():
            down = own.down.parameter
            if path in self.means:
                count = int(self.pruned * down.shape[1])
                least = (down.abs() * self.means[path].to(down)).topk(count, dim=1, largest=False).indices
                down.scatter_(1, least, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        return self.means

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        layers = low_rank(self.model, "PRILoRA")
        self.means = {path: value.to(layers[path].down.parameter.device) for path, value in tensors.items()}
