"""DiffoRA-style: gates that are trained on held-out batches say which layers are worth an adapter.

Source of the idea: Jiang et al., "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank
Matrix Adaptation", 2025 (arXiv 2502.08905). Its code was not at hand: what the summary leaves open is chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.methods.mids import set_mid
from glora_kernels.recipes.recipe import Recipe


class DiffoRA(Recipe):
    """A gate γ = sigmoid(a) a layer, trained on held-out batches in turn with D and U on training batches.

    After each step of the optimizer, which trains D and U alone, the gates take an Adam step on a held-out loss (first
    order: D and U are taken as they are). `chosen` are the layers with the largest gates, the top share of each type
    (the last name of a path: "q_proj"); inject a fresh model there:

        recipe = DiffoRA(model, held_out=lambda: loss(model, next(validation)))
        ...                                                             # train, calling recipe.after_step()
        gk.inject(fresh, config, recipe.chosen(share=0.5))

    Args:
        model: with low-rank adapters, before the optimizer is made.
        held_out: → the loss of the model on a held-out batch, with its graph. A resumed run is the same where it draws
            the same batches: by `recipe.step`, say.
        lr: of the gates.
        every: training steps a step of the gates.
    """

    def __init__(self, model: nn.Module, held_out: Callable[[], Tensor], lr: float = 0.05, every: int = 1) -> None:
        if every < 1 or not lr > 0:
            raise ValueError(f"every must be at least 1 and lr positive, got {every} and {lr}")
        super().__init__(model)
        self.held_out, self.every = held_out, every
        self.gates = set_mid(model, "gate")
        self.parameters = [gate.a for gate in self.gates.values()]
        self.gate_optimizer = torch.optim.Adam(self.parameters, lr=lr)
        for a in self.parameters:
            a.requires_grad_(False)  # the model's own optimizer does not train it

    def act(self) -> None:
        if self.step % self.every:
            return
        try:
            for a in self.parameters:
                a.requires_grad_(True)
            with torch.enable_grad():
                grads = torch.autograd.grad(self.held_out(), self.parameters, allow_unused=True)
        finally:
            for a in self.parameters:
                a.requires_grad_(False)
        for a, grad in zip(self.parameters, grads, strict=True):
            a.grad = grad
        self.gate_optimizer.step()
        self.gate_optimizer.zero_grad()

    def gate_values(self) -> dict[str, float]:
        """γ of each layer."""
        return {path: float(gate.gate.detach()) for path, gate in self.gates.items()}

    def chosen(self, share: float = 0.5) -> list[str]:
        """The paths of the top share of each type of layers, at least one, in the model's order."""
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share!r}")
        gates = self.gate_values()
        if wrong := next((path for path, gate in gates.items() if not math.isfinite(gate)), None):
            raise ValueError(f"DiffoRA: the gate of {wrong!r} is {gates[wrong]}; lower lr, or the learning rate")
        if len(gates) > 1 and len(set(gates.values())) == 1:
            raise ValueError("DiffoRA: all gates are equal, which ranks no layer above another; train some steps first")
        types: dict[str, list[str]] = {}
        for path in gates:
            types.setdefault(path.rpartition(".")[2], []).append(path)
        best = {
            path
            for paths in types.values()
            for path in sorted(paths, key=lambda path: -gates[path])[: max(1, round(share * len(paths)))]
        }
        return [path for path in gates if path in best]

    def tensors(self) -> dict[str, Tensor]:
        state = [self.gate_optimizer.state.get(a, {}) for a in self.parameters]
        return {f"{i}/{key}": value for i, own in enumerate(state) for key, value in own.items()}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for key, value in tensors.items():
            i, _, name = key.partition("/")
            self.gate_optimizer.state[self.parameters[int(i)]][name] = value.clone()
