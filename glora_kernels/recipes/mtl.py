"""MTL-LoRA: one adapter for several tasks, with a small map and a mixture of its own for each.

Source: Yang et al., "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", 2024 (arXiv 2410.09437).
"""

from __future__ import annotations

from torch import nn

from glora_kernels.methods.mids import set_mid
from glora_kernels.recipes.recipe import Recipe


class MTLLoRA(Recipe):
    """ΔW_t = s·(Σᵢ w_{t,i}·U_i)·Λ_t·D with w_t = softmax(θ_t/τ): D and the U_i are common, Λ_t and w_t the task's.

    Calls are made inside `gk.tasks(model, ids)`, with the task of each example; a batch of several tasks goes through
    `ops.multi_glora_linear` and copies no weight. Merging and saving are for one task:

        MTLLoRA(model, tasks=3)
        with gk.tasks(model, ids):
            loss(model(x), y).backward()
        with gk.tasks(model, 2):
            gk.save_adapter(model, "task2.safetensors")         # a plain LoRA of rank n·R

    Args:
        model: with low-rank adapters, before the optimizer is made.
        tasks: T.
        ups: n, how many U; 3, in vision-language 2.
        temperature: τ; 0.1, in vision-language 0.8.
    """

    several_processes = True

    def __init__(self, model: nn.Module, tasks: int, ups: int = 3, temperature: float = 0.1) -> None:
        super().__init__(model)
        self.maps = set_mid(model, "tasks", tasks=tasks, ups=ups, temperature=temperature)

    def finish(self) -> None:
        """Nothing: a plain adapter is one task's; call `fold_mids` inside `tasks(model, t)` for that."""
