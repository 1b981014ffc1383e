"""BeamLoRA: ranks compete by a gain each; now and then the weakest make room for copies of the strongest.

Source: Gu et al., "BeamLoRA: Beam-Constraint Low-Rank Adaptation", 2025 (arXiv 2502.13604).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.methods.edit import Kept, edit_ranks, snapshot
from glora_kernels.methods.factors import low_rank
from glora_kernels.methods.mids import set_mid
from glora_kernels.recipes.recipe import Recipe


class BeamLoRA(Recipe):
    """y = x Wᵀ + s·(g∘h)·Uᵀ with g = R·softmax(z/τ), and every T steps a beam search over the ranks.

    Every T = `period` steps, while at least T remain: the gains of all layers are sorted; from the first place where
    their cumulative sum exceeds p times the number of all ranks, ranks are pruned. In a layer with q of them each takes
    a copy of one of the layer's q strongest, drawn at random: its D, U and moments as they were half a period ago, and
    both z become their mean, without moments. 1 − p falls by a cosine from `pruned`
    to 0 at step `horizon`. Equal to LoRA at the start; merging and saving fold g into D.

    Differs from the authors' code in two places: copied moments do arrive (there they are written to a copy), and at
    most half of a layer's ranks are pruned at once, so that no rank is winner and loser.

    Args:
        model: with low-rank adapters, before the optimizer is made: it gets a gain z (R,) a layer.
        steps: of the whole training.
        period: T.
        pruned: 1 − p at the start.
        horizon: the step at which 1 − p is 0.
        temperature: τ; 0.03 where the learning rate is below 1e-4.
        seed: of the pairing.

    Raises:
        ValueError: a number that cannot be, and the errors of `set_mid`.
    """

    edits = True

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        period: int = 3000,
        pruned: float = 0.05,
        horizon: int = 24_688,
        temperature: float = 0.05,
        seed: int = 0,
    ) -> None:
        if min(steps, period, horizon) < 1 or not 0 <= pruned <= 1:
            raise ValueError(
                f"steps, period and horizon must be at least 1 and pruned in [0, 1]; got {steps}, {period}, {horizon} "
                f"and {pruned}"
            )
        super().__init__(model)
        self.steps, self.period, self.pruned, self.horizon, self.seed = steps, period, pruned, horizon, seed
        self.gains = set_mid(model, "gain", temperature=temperature)
        self.before: Mapping[str, Mapping[str, Kept]] = {}

    def share_kept(self) -> float:
        """p at this step."""
        return 1 - self.pruned * 0.5 * (1 + math.cos(math.pi * min(self.step / self.horizon, 1)))

    def act(self) -> None:
        if self.step % self.period == self.period // 2:
            self.before = snapshot(self.model, self.optimizer)
        if self.step % self.period == 0 and self.steps - self.step >= self.period and self.before:
            self.expand(self.weakest(self.share_kept()))

    def weakest(self, kept: float) -> dict[str, list[int]]:
        """The ranks of each layer that come after the share `kept` of the sum of all gains, the weakest last."""
        gains = [(g, path, r) for path in self.gains for r, g in enumerate(self._gain(path))]
        gains.sort(key=lambda one: (-one[0], one[1], one[2]))
        pruned: dict[str, list[int]] = {}
        total = 0.0
        for gain, path, rank in gains:
            total += gain
            if total > kept * len(gains) + 1e-6 * len(gains):
                pruned.setdefault(path, []).append(rank)
        return {
            path: ranks[-(len(self.gains[path].z) // 2) :]
            for path, ranks in pruned.items()
            if len(self.gains[path].z) > 1
        }

    @torch.no_grad()
    def expand(self, pruned: Mapping[str, list[int]]) -> None:
        """Put copies of the strongest ranks of each layer in the places of the pruned ones."""
        edits, pairs = {}, {}
        for path, losers in pruned.items():
            gain = self._gain(path)
            top = sorted(range(len(gain)), key=lambda r: (-gain[r], r))[: len(losers)]
            winners = self.random(self.step, path).sample(top, len(top))
            index: list[int | None] = list(range(len(gain)))
            for loser, winner in zip(losers, winners, strict=True):
                index[loser] = winner
            edits[path], pairs[path] = index, list(zip(losers, winners, strict=True))
        if not edits:
            return
        z_before = {path: self.gains[path].z.detach().clone() for path in edits}
        edit_ranks(self.model, edits, self.optimizer, source=self.before)
        for path, both in pairs.items():
            z = self.gains[path].z
            for loser, winner in both:
                z[[loser, winner]] = z_before[path][[loser, winner]].mean()
                for moment in self._moments(z):
                    moment[[loser, winner]] = 0

    def _gain(self, path: str) -> list[float]:
        """g of a layer in double precision: rounded to 16 bits, their sum is not R, and p = 1 would prune."""
        mid = self.gains[path]
        gain: list[float] = (len(mid.z) * torch.softmax(mid.z.detach().double() / mid.temperature, 0)).tolist()
        return gain

    def _moments(self, z: nn.Parameter) -> list[Tensor]:
        state = {} if self.optimizer is None else self.optimizer.state.get(z, {})
        return [value for value in state.values() if isinstance(value, Tensor) and value.shape == z.shape]

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for path, own in self.before.items():
            for name, kept in own.items():
                found[f"{path}/{name}/values"] = kept.values
                found |= {f"{path}/{name}/{key}": value for key, value in kept.moments.items()}
        return found

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        before: dict[str, dict[str, Kept]] = {}
        devices = {path: own.down.parameter.device for path, own in low_rank(self.model, "BeamLoRA").items()}
        for key, value in tensors.items():
            path, name, what = key.rsplit("/", 2)
            kept = before.setdefault(path, {}).setdefault(name, Kept(value, {}))
            value = value.to(devices[path])
            before[path][name] = (
                Kept(value, kept.moments) if what == "values" else Kept(kept.values, kept.moments | {what: value})
            )
        self.before = before
