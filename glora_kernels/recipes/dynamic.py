"""Dynamic LoRA-style: ranks move to the layers whose parameters matter, under a fixed budget, during training.

Source of the idea: Liao et al., "Dynamic Adaptation of LoRA Fine-Tuning for Efficient and Task-Specific Optimization of
Large Language Models", 2025 (arXiv 2501.14859). Its code was not found; what the text leaves open is chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.methods.allocate import allocate
from glora_kernels.methods.edit import edit_ranks
from glora_kernels.methods.factors import LowRank, low_rank, refuse_shared
from glora_kernels.methods.mids import NOT_SHARED
from glora_kernels.recipes.recipe import Recipe


class DynamicLoRA(Recipe):
    """Every `period` steps the sum of all ranks is given out anew, in proportion to a running mean of Σ abs(p·∂p).

    A layer that loses ranks loses those with the smallest ‖U_r‖·‖D_r‖; one that gains gets fresh ones, which change
    nothing. The sum of the ranks stays exactly what it is at the start. s stays.
    Steps whose gradients are not finite (a gradient scaler's first ones) do not count.

    Args:
        model: with low-rank adapters.
        period: steps between allocations.
        until: the last step at which ranks move; None: no last one.
        low, high: bounds of a layer's rank; high None: twice its largest rank at the start.
        decay: of the running mean, a step.

    Raises:
        ValueError: a number that cannot be; layers that share a factor, and so their rank.
    """

    edits = True

    def __init__(
        self,
        model: nn.Module,
        period: int = 100,
        until: int | None = None,
        low: int = 1,
        high: int | None = None,
        decay: float = 0.9,
    ) -> None:
        if period < 1 or low < 1 or not 0 <= decay < 1:
            raise ValueError(f"period and low must be at least 1 and decay in [0, 1), got {period}, {low} and {decay}")
        super().__init__(model)
        self.period, self.until, self.low, self.decay = period, until, low, decay
        layers = low_rank(model, "DynamicLoRA")
        for own in layers.values():
            refuse_shared(layers, own, "DynamicLoRA", NOT_SHARED)
        ranks = {path: own.rank for path, own in layers.items()}
        self.high = 2 * max(ranks.values()) if high is None else high
        self.budget = sum(ranks.values())
        allocate(dict.fromkeys(ranks, 1.0), self.budget, low, self.high)  # its errors now and not in the middle
        self.scores = dict.fromkeys(ranks, 0.0)
        self._seen = self.watch("sensitivity")

    def act(self) -> None:
        seen = {path: float(value) for path, value in self._seen.items()}
        self._seen.clear()
        if all(map(math.isfinite, seen.values())):
            for path, value in seen.items():
                self.scores[path] = self.decay * self.scores[path] + (1 - self.decay) * value
        due = self.step % self.period == 0 and (self.until is None or self.step <= self.until)
        if due and any(self.scores.values()):  # while all U are 0, nothing ranks a layer above another
            self.reallocate()

    def reallocate(self) -> dict[str, int]:
        """Give the ranks out by the present scores; returns them."""
        layers = low_rank(self.model, "DynamicLoRA")
        ranks = allocate(self.scores, self.budget, self.low, self.high)
        edits = {path: _index(layers[path], rank) for path, rank in ranks.items() if rank != layers[path].rank}
        if edits:
            edit_ranks(self.model, edits, self.optimizer)
        return ranks

    def values(self) -> dict[str, Any]:
        return {"scores": self.scores, "budget": self.budget}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.scores, self.budget = dict(values["scores"]), values["budget"]


@torch.no_grad()
def _index(own: LowRank, rank: int) -> list[int | None]:
    """The ranks of a layer that stay, the strongest, and fresh ones behind."""
    strength = own.up.value.norm(dim=0) * own.down.value.norm(dim=1)
    best = sorted(strength.argsort(descending=True, stable=True)[:rank].tolist())
    return best + [None] * (rank - len(best))
