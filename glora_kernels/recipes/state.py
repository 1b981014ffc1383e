"""The state of a recipe and its model in the middle of a run: taken, checked, brought back, and a file of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glora_kernels.methods.edit import set_rank
from glora_kernels.methods.factors import LowRank, low_rank
from glora_kernels.methods.mids import mids
from glora_kernels.methods.restart import chain_ranks, make_chain
from glora_kernels.nn.file import digest, host_copy, save_tensors
from glora_kernels.nn.model import clean, unwrap


class Resumable:
    """A model whose ranks, maps and links may be others than at the start, its optimizer and the step it is at."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer: torch.optim.Optimizer | None = None
        self.step = 0
        self._order: list[list[str]] | None = None  # of the optimizer whose state is loaded next

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
        committed = _committed(layers)
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        names = self._names()
        about = {
            "recipe": type(self).__name__,
            "step": self.step,
            "ranks": {path: len(own.down.parameter) for path, own in layers.items()},
            "chains": chain_ranks(self.model),
            "committed": committed,
            "order": [[names.get(p, "") for p in group["params"]] for group in groups],
            "values": self.values(),
        }
        trained = {f"model/{name}": value.detach() for name, value in self._trained(committed).items()}
        return {"about": about, "tensors": trained | {f"own/{name}": value for name, value in self.tensors().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring the model to the state of `state_dict`; then load the optimizer's. The model may be a fresh one.

        Raises:
            ValueError: the state of another recipe, or of another model (named); one from before a merge for good that
                this model has behind it.
        """
        about, tensors = state["about"], state["tensors"]
        if about["recipe"] != type(self).__name__:
            raise ValueError(f"this is the state of {about['recipe']}, not of {type(self).__name__}")
        layers = low_rank(self.model, "load_state_dict")
        if layers.keys() != about["ranks"].keys():
            other = sorted(layers.keys() ^ about["ranks"].keys())[0]
            raise ValueError(f"the state is that of another model: {other!r} is a low-rank layer of one of them only")
        if ahead := {*_committed(layers), *chain_ranks(self.model)} - {*about["committed"], *about["chains"]}:
            raise ValueError(f"{min(ahead)!r} was restarted after this state was made: load it into a fresh model")
        given = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
        self._check(layers, about, given)
        present = {path: len(own.down.parameter) for path, own in layers.items()}
        if changed := {path: rank for path, rank in about["ranks"].items() if rank != present[path]}:
            set_rank(self.model, changed, self.optimizer)
        make_chain(self.model, about["chains"])
        for path in about["committed"]:
            layers[path].committed = True
            base = layers[path].base
            if base.bias is None and f"{path}.bias" in given:  # C or E have given it one
                base.bias = nn.Parameter(torch.empty_like(given[f"{path}.bias"]).to(base.weight), requires_grad=False)
        mine = self._trained(about["committed"])
        with torch.no_grad():
            for name, value in given.items():
                mine[name].copy_(value)
        self.step, self._order = about["step"], about["order"] or None
        self._reorder()
        self.restore(
            about["values"], {name.removeprefix("own/"): v for name, v in tensors.items() if name.startswith("own/")}
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `state_dict` to a safetensors file, complete or not at all."""
        state = self.state_dict()
        tensors = {name: host_copy(value) for name, value in state["tensors"].items()}
        header = {"recipe": json.dumps(state["about"])}
        save_tensors(Path(path), tensors, header | {"sha256": digest(header, tensors)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a file of `save`. With a Trainer, do it before `trainer.train(resume_from_checkpoint=...)`.

        Raises:
            ValueError: no file of a recipe, a damaged one, and the errors of `load_state_dict`.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)!r} is truncated or no safetensors file: {error}") from error
        if "recipe" not in header:
            raise ValueError(f"{os.fspath(path)!r} is no file of a recipe")
        if header.pop("sha256", None) != digest(header, tensors):
            raise ValueError(f"{os.fspath(path)!r} was altered or damaged: its SHA-256 does not match its contents")
        self.load_state_dict({"about": json.loads(header["recipe"]), "tensors": tensors})

    def _names(self) -> dict[Tensor, str]:
        """The name of each parameter, whatever maps are on it."""
        return {p: _plain(name) for name, p in unwrap(self.model).named_parameters()}

    def _trained(self, committed: list[str]) -> dict[str, Tensor]:
        """What a state holds of the model: trained parameters, maps, frozen links, changed bases."""
        root = unwrap(self.model)
        layers = low_rank(self.model, "state_dict")
        held = {id(factor.parameter) for own in layers.values() for factor in own.factors()}
        held |= {id(p) for one in mids(self.model).values() for p in one.parameters()}
        found: dict[str, Tensor] = {
            clean(name): p for name, p in root.named_parameters() if p.requires_grad or id(p) in held
        }
        found |= {clean(name): b for name, b in root.named_buffers() if _is_link(name)}
        for path in committed:
            base = layers[path].base
            found |= {
                f"{path}.{name}": getattr(base, name) for name in ("weight", "bias") if getattr(base, name) is not None
            }
        return found

    def _check(self, layers: Mapping[str, LowRank], about: Mapping[str, Any], given: Mapping[str, Tensor]) -> None:
        """Raise a ValueError where a state does not fit, before anything is changed by it."""
        shapes = {
            _plain(name): list(value.shape)
            for name, value in self._trained(about["committed"]).items()
            if not _is_link(name)
        }
        names = self._names()
        for path, own in layers.items():
            for factor in own.factors():
                size = factor.parameter.shape[factor.dim] // len(own.down.parameter)  # n for a U of n tasks' maps
                shapes[names[factor.parameter]][factor.dim] = size * about["ranks"][path]
        theirs = {_plain(name): list(value.shape) for name, value in given.items() if not _is_link(name)}
        made = {f"{path}.bias" for path in about["committed"]}
        if other := sorted((shapes.keys() ^ theirs.keys()) - made):
            raise ValueError(f"the state is that of another model: {other[0]!r} is in one of them only")
        if wrong := [name for name in theirs if theirs[name] != shapes.get(name, theirs[name])]:
            raise ValueError(f"{wrong[0]!r} has shape {theirs[wrong[0]]} in the state, {shapes[wrong[0]]} here")

    def _reorder(self) -> None:
        """Give parameters the loaded state of the optimizer that was theirs.

        An optimizer's state is loaded by the order of the parameters, and a parameter that gets a map (frozen links)
        comes after those without one: the order of a fresh model is another than that of a loaded one.
        """
        optimizer, order = self.optimizer, self._order
        if optimizer is None or order is None or not optimizer.state:
            return
        self._order = None
        names = self._names()
        mine = [[names.get(p, "") for p in group["params"]] for group in optimizer.param_groups]
        if mine == order:
            return
        if [sorted(group) for group in mine] != [sorted(group) for group in order]:
            raise ValueError("bind: the optimizer has other parameters, or groups of them, than the one of the state")
        of_name = {name: p for p, name in names.items()}
        state = dict(optimizer.state)
        for theirs, group in zip(order, optimizer.param_groups, strict=True):
            for name, p in zip(theirs, group["params"], strict=True):
                optimizer.state.pop(of_name[name], None)
                if p in state:
                    optimizer.state[of_name[name]] = state[p]


def _committed(layers: Mapping[str, LowRank]) -> list[str]:
    """The layers whose base was changed for good."""
    return [path for path, own in layers.items() if own.committed]


def _is_link(name: str) -> bool:
    return name.endswith(".frozen") and "parametrizations" in name


def _plain(name: str) -> str:
    """The name of a parameter without the map that may be on it."""
    return clean(name).replace("parametrizations.", "").removesuffix(".original")
