"""XGBLoRA: gradient boosting by rank-1 adapters, each in a few random layers, merged before the next.

Source: Zhang et al., "Less is More: Extremely Gradient Boosted Rank-1 Adaption for Efficient Finetuning of LLMs", 2024
(arXiv 2410.19694).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from glora_kernels.methods.factors import low_rank, refuse_shared
from glora_kernels.methods.mids import NOT_SHARED
from glora_kernels.methods.restart import planned, restart
from glora_kernels.recipes.recipe import Recipe


class XGBLoRA(Recipe):
    """Booster t: `layers` layers at random with a fresh adapter, `steps` optimizer steps, W ← W + s·U·D; repeat.

    Inject adapters of rank 1 first. Only the booster's layers train; the others keep a fresh adapter, which changes
    nothing. The authors' L2 on the factors is the weight_decay of Adam (AdamW's is decoupled). On LLaMA-3-8B 11
    layers were best.

    Args:
        model: with low-rank adapters.
        layers: L_s, how many train at a time.
        steps: κ, of each booster.
        into: where boosters go: "base", "chain", or None, as for `restart`.
        seed: of the choice.
    """

    edits = True

    def __init__(
        self,
        model: nn.Module,
        layers: int = 11,
        steps: int = 100,
        into: Literal["base", "chain"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        planned(model, None, into)  # its errors, at the beginning
        self._all = low_rank(model, "XGBLoRA")
        if not 1 <= layers <= len(self._all) or steps < 1:
            raise ValueError(
                f"layers must be from 1 to {len(self._all)}, the number of low-rank layers, and steps at least 1; got "
                f"{layers} and {steps}"
            )
        for own in self._all.values():
            refuse_shared(self._all, own, "XGBLoRA", NOT_SHARED)
        self.layers, self.steps, self.into, self.seed = layers, steps, into, seed
        self.booster = 0
        self._factors = [factor for own in self._all.values() for factor in own.factors()]
        self.choose()

    def choose(self) -> list[str]:
        """The layers of this booster; they train, and no others."""
        self.chosen = sorted(self.random(self.booster).sample(list(self._all), self.layers))
        trained = {id(factor.parameter) for path in self.chosen for factor in self._all[path].factors()}
        for factor in self._factors:
            factor.parameter.requires_grad_(id(factor.parameter) in trained)
            if id(factor.parameter) not in trained:
                factor.parameter.grad = None
        return self.chosen

    def bind(self, optimizer: Any) -> None:
        """The optimizer must hold the factors of all layers; give it `parameters()`."""
        super().bind(optimizer)
        assert self.optimizer is not None
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if missing := [path for path, own in self._all.items() for f in own.factors() if id(f.parameter) not in held]:
            raise ValueError(
                f"XGBLoRA: the optimizer does not hold the factors of {missing[0]!r}, which a later booster trains; "
                "make it over recipe.parameters()"
            )

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer must hold: everything trained now, and the factors of all layers, in the model's order.

        The order is the same whichever booster trains: an optimizer's state is loaded by it.
        """
        factors = {id(factor.parameter) for factor in self._factors}
        return [p for p in self.model.parameters() if p.requires_grad or id(p) in factors]

    def act(self) -> None:
        if self.step % self.steps == 0:
            restart(self.model, self.optimizer, self.chosen, into=self.into)
            self.booster += 1
            self.choose()

    def values(self) -> dict[str, Any]:
        return {"booster": self.booster}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.booster = values["booster"]
        self.choose()
