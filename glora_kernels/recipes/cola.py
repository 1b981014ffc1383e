"""Chain of LoRA: train an adapter, put it away, start afresh on what it has left; repeat.

Source: Xia et al., "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning", 2024 (arXiv
2401.04151).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from glora_kernels.methods.edit import set_rank
from glora_kernels.methods.restart import planned, restart
from glora_kernels.recipes.recipe import Recipe


class ChainOfLoRA(Recipe):
    """W ← W + s·U·D at each of `knots`, a fresh adapter and an empty optimizer state behind it.

    Args:
        model: with low-rank adapters; the authors take R = 8, alpha = 16 on q and v.
        knots: the steps after which a link ends; the authors' chains have 1 to 3 links.
        ranks: of the links behind the knots, of which there is one more than knots; the model gets the first of them
            now. A "step-down" chain lowers them. None: all the same.
        into: where links go: "base", "chain", or None, as for `restart`.
    """

    edits = True

    def __init__(
        self,
        model: nn.Module,
        knots: Sequence[int],
        ranks: Sequence[int] | None = None,
        into: Literal["base", "chain"] | None = None,
    ) -> None:
        knots = list(knots)
        if knots != sorted(set(knots)) or not all(type(knot) is int and knot >= 1 for knot in knots):
            raise ValueError(f"knots must be rising steps from 1, got {knots!r}")
        if ranks is not None and len(ranks) != len(knots) + 1:
            raise ValueError(f"ranks must be one more than the {len(knots)} knots, got {list(ranks)!r}")
        if wrong := [rank for rank in ranks or () if type(rank) is not int or rank < 1]:
            raise ValueError(f"ranks must be integers >= 1, got {wrong[0]!r}")
        super().__init__(model)
        self.knots, self.ranks, self.into = knots, ranks, into
        self.links = 1
        planned(model, None, into)  # its errors, at the beginning
        if ranks is not None:
            set_rank(model, {"*": ranks[0]})

    def act(self) -> None:
        if self.step in self.knots:
            rank = None if self.ranks is None else self.ranks[self.knots.index(self.step) + 1]
            restart(self.model, self.optimizer, rank=rank, into=self.into)
            self.links += 1

    def values(self) -> dict[str, Any]:
        return {"links": self.links}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.links = values["links"]
