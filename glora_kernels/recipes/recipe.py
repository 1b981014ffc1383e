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

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from glora_kernels.methods.edit import inner_optimizer, set_rank
from glora_kernels.methods.factors import Ours, low_rank
from glora_kernels.methods.mids import fold_mids, mids
from glora_kernels.methods.restart import chain_ranks, make_chain
from glora_kernels.nn.file import host_copy, save_tensors
from glora_kernels.nn.model import unwrap


class Recipe:
    """A method at work on one model.

    Attributes:
        model: with its adapters.
        optimizer: whose moments are changed along with the factors; `bind` sets it.
        step: the optimizer steps so far.
        seed: of what is drawn.
    """

    seed = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer: torch.optim.Optimizer | None = None
        self.step = 0

    def bind(self, optimizer: Any) -> None:
        """Tell the optimizer, also one that accelerate or Lightning has wrapped; it holds the present parameters."""
        self.optimizer = inner_optimizer(optimizer)

    def after_step(self, step: int | None = None) -> None:
        """Do what the method does after an optimizer step. step: its number, from 1; None: the next one."""
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
        if mids(self.model):
            fold_mids(self.model)

    def values(self) -> dict[str, Any]:
        """The method's own state that is no tensor, as JSON."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The method's own tensors."""
        return {}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take `values` and `tensors` back."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer's state: ranks and links, what is trained, bases that were changed for good."""
        layers = low_rank(self.model, "state_dict")
        committed = [path for path, own in layers.items() if _is_committed(own)]
        about = {
            "recipe": type(self).__name__,
            "step": self.step,
            "ranks": {path: len(own.down.parameter) for path, own in layers.items()},
            "chains": chain_ranks(self.model),
            "committed": committed,
            "values": self.values(),
        }
        trained = {f"model/{name}": value.detach() for name, value in self._trained(committed).items()}
        return {"about": about, "tensors": trained | {f"own/{name}": value for name, value in self.tensors().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring the model to the state of `state_dict`; then load the optimizer's. The model may be a fresh one.

        Raises:
            ValueError: the state of another recipe, or of another model (named).
        """
        about, tensors = state["about"], state["tensors"]
        if about["recipe"] != type(self).__name__:
            raise ValueError(f"this is the state of {about['recipe']}, not of {type(self).__name__}")
        layers = low_rank(self.model, "load_state_dict")
        if layers.keys() != about["ranks"].keys():
            other = sorted(layers.keys() ^ about["ranks"].keys())[0]
            raise ValueError(f"the state is that of another model: {other!r} is a low-rank layer of one of them only")
        present = {path: len(own.down.parameter) for path, own in layers.items()}
        if changed := {path: rank for path, rank in about["ranks"].items() if rank != present[path]}:
            set_rank(self.model, changed, self.optimizer)
        make_chain(self.model, about["chains"])
        for path in about["committed"]:
            if isinstance(own := layers[path], Ours):
                own.layer.committed = True
        mine = self._trained(about["committed"])
        given = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
        if mine.keys() != given.keys():
            raise ValueError(f"the state is that of another model: {sorted(mine.keys() ^ given.keys())[0]!r} differs")
        for name, value in given.items():
            if value.shape != mine[name].shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(value.shape)} in the state, {tuple(mine[name].shape)} here"
                )
        with torch.no_grad():
            for name, value in given.items():
                mine[name].copy_(value)
        self.step = about["step"]
        self.restore(
            about["values"], {name.removeprefix("own/"): v for name, v in tensors.items() if name.startswith("own/")}
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a safetensors file, complete or not at all."""
        state = self.state_dict()
        tensors = {name: host_copy(value) for name, value in state["tensors"].items()}
        save_tensors(Path(path), tensors, {"recipe": json.dumps(state["about"])})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a file of `save`. With a Trainer, do it before `trainer.train(resume_from_checkpoint=...)`.

        Raises:
            ValueError: no file of a recipe, and the errors of `load_state_dict`.
        """
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("recipe")
            if about is None:
                raise ValueError(f"{os.fspath(path)!r} is no file of a recipe")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        self.load_state_dict({"about": json.loads(about), "tensors": tensors})

    def random(self, *what: object) -> random.Random:
        """Random numbers that depend on the recipe's seed and on `what` alone."""
        return random.Random(f"{self.seed}/{'/'.join(map(str, what))}")

    def _trained(self, committed: list[str]) -> dict[str, Tensor]:
        """What a state holds of the model: trained parameters, maps, frozen links, changed bases."""
        root = unwrap(self.model)
        layers = low_rank(self.model, "state_dict")
        adapters = {id(p) for own in layers.values() for factor in own.factors() for p in (factor.parameter,)}
        own_maps = {id(p) for one in mids(self.model).values() for p in one.parameters()}
        found: dict[str, Tensor] = {
            name: p for name, p in root.named_parameters() if p.requires_grad or id(p) in adapters or id(p) in own_maps
        }
        found |= {
            name: b for name, b in root.named_buffers() if name.endswith(".frozen") and "parametrizations" in name
        }
        for path in committed:
            base = layers[path].layer
            found |= {
                f"{path}.{name}": getattr(base, name) for name in ("weight", "bias") if getattr(base, name) is not None
            }
        return found


def _is_committed(own: Any) -> bool:
    return isinstance(own, Ours) and own.layer.committed
