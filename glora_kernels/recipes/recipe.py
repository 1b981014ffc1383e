"""What all recipes have in common: they act after optimizer steps, and can be saved and resumed in the middle of a run.

    recipe = BeamLoRA(model, steps=10_000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    recipe.bind(optimizer)
    for batch in batches:
        ...
        optimizer.step()
        recipe.after_step()
    recipe.finish()                    # a plain adapter: save_adapter, merge

A transformers Trainer and a Lightning Trainer take `trainer_callback(recipe)` and `lightning_callback(recipe)`.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch
from torch import nn

from glora_kernels.methods.edit import inner_optimizer
from glora_kernels.methods.factors import low_rank, refuse_wrapped
from glora_kernels.methods.mids import fold_mids, mids
from glora_kernels.methods.observe import Seen, observe
from glora_kernels.recipes.state import Resumable


class Recipe(Resumable):
    """A method at work on one model.

    Attributes:
        model: with its adapters.
        optimizer: whose moments are changed along with the factors; `bind` sets it.
        step: the optimizer steps so far.
        seed: of what is drawn.
    """

    seed = 0
    several_processes = False
    """Whether every process of a data-parallel run may have one."""
    edits = False
    """Whether it changes the optimizer's state, and so must be told the optimizer."""

    def __init__(self, model: nn.Module) -> None:
        refuse_wrapped(model, type(self).__name__)
        super().__init__(model)
        self._watching = contextlib.ExitStack()

    def watch(self, kind: str, training: bool = False) -> Seen:
        """`observe` the model until `finish`."""
        return self._watching.enter_context(observe(self.model, kind, training))

    def bind(self, optimizer: Any) -> None:
        """Tell the optimizer, also one that accelerate or Lightning has wrapped; after its state was loaded.

        Raises:
            RuntimeError: there are several processes, where each would act on what it alone has seen, and
                DistributedDataParallel would not notice that parameters become others.
        """
        distributed = torch.distributed
        count = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if count > 1 and not self.several_processes:
            raise RuntimeError(f"{type(self).__name__} trains in one process, and this is one of {count}")
        found = inner_optimizer(optimizer)
        held = {id(p) for group in found.param_groups for p in group["params"]} if found is not None else set()
        for path, own in low_rank(self.model, type(self).__name__).items():
            trained = [p for factor in own.factors() if (p := factor.parameter).requires_grad]
            trained += [p for one in own.down.maps for p in one.parameters() if p.requires_grad]
            if any(id(p) not in held for p in trained):
                raise ValueError(
                    f"{type(self).__name__}: the optimizer does not hold all that is trained of {path!r}; make it "
                    "after the recipe, which adds parameters"
                )
        self.optimizer = found
        self._reorder()

    def after_step(self, step: int | None = None) -> None:
        """Do what the method does after an optimizer step. step: its number, from 1; None: the next one."""
        if self.edits and self.optimizer is None:
            raise RuntimeError(
                f"{type(self).__name__} changes the optimizer's state with the parameters: call bind(optimizer) first"
            )
        self.step = self.step + 1 if step is None else step
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # What a step draws depends on its number alone: a resumed run draws the same.
            seed = self.random(self.step).getrandbits(63)
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.default_generators[device.index].manual_seed(seed)
            self.act()

    def act(self) -> None:
        """What the method does after step `self.step`."""

    def finish(self) -> None:
        """End the method: take out its hooks, and fold its maps, so that plain adapters are left."""
        self._watching.close()
        if mids(self.model):
            fold_mids(self.model)

    def random(self, *what: object) -> random.Random:
        """Random numbers that depend on the recipe's seed and on `what` alone."""
        return random.Random(f"{self.seed}/{'/'.join(map(str, what))}")
