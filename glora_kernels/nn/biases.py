"""Biases that merging adds to layers without one, and the configuration flags that keep them when the model is loaded.

A transformers model is built from its configuration, and drops biases that this does not ask for. The flag that does
is found by trying: for each boolean flag with "bias" in its name a model is built on the meta device.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.spec import GLoRAConfig


@dataclass
class AddedBiases:
    """New biases that a model would drop when it is loaded again, and the flags that keep them.

    Attributes:
        paths: the layers that get such a bias.
        flags: what to set: (module with the configuration, flag, value).
        lost: the paths for which no flag was found.
        gained: name → shape of every bias that the flags add to the model, also to other layers.
    """

    paths: list[str]
    flags: list[tuple[Any, str, bool]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    gained: dict[str, torch.Size] = field(default_factory=dict)


def added_biases(root: nn.Module, paths: Iterable[str]) -> AddedBiases:
    """Find the flags that keep new biases of the layers at `paths`.

    Greedy: each flag is flipped in turn, and stays so if the model gains a wanted bias and loses none.
    """
    found = AddedBiases(list(paths))
    if not found.paths:
        return found
    wanted = dict.fromkeys(f"{path}.bias" for path in found.paths)
    for prefix, module in _architectures(root):
        built = _biases(module, prefix, module.config)
        if built is None:
            continue
        for name in built.keys() & wanted.keys():
            del wanted[name]  # the configuration has changed since the model was built
        for flag, value in _flags(module.config):
            if not any(name.startswith(prefix) for name in wanted):
                break
            config = copy.deepcopy(module.config)
            _set(config, flag, not value)
            more = _biases(module, prefix, config)
            if more is None or not built.keys() <= more.keys() or not wanted.keys() & more.keys():
                continue
            found.flags.append((module, flag, not value))
            found.gained |= {name: shape for name, shape in more.items() if name not in built}
            wanted = {name: None for name in wanted if name not in more}
    kept = {name.removesuffix(".bias") for name in found.gained}
    found.lost = [name.removesuffix(".bias") for name in wanted]
    found.paths = [path for path in found.paths if path in kept or path in found.lost]
    return found


def warn_of_biases(caller: str, found: AddedBiases, stacklevel: int) -> None:
    """Warn of layers that get a bias which is dropped when the model is loaded again, and say what to do."""
    if not found.paths:
        return
    parts = [
        f"{caller}: layers without a bias have one now, from C and E ({len(found.paths)} of them, {found.paths[0]!r} "
        "first); a new model built from this configuration has no place for it, and drops it or refuses the checkpoint"
    ]
    if found.flags:
        settings = ", ".join(f"config.{flag} = {value}" for _, flag, value in found.flags)
        parts.append(f"set {settings} before you save it (merge_and_unload does)")
    if found.lost:
        none = "no flag of a configuration keeps" if found.flags else "no flag of a configuration was found that keeps"
        parts.append(f"{none} the bias of {found.lost[:4]}: train with C='none' and E='none' to deploy it elsewhere")
    warnings.warn("; ".join(parts), stacklevel=stacklevel + 1)


@torch.no_grad()
def keep_biases(modules: Mapping[str, nn.Module], found: AddedBiases) -> None:
    """Set the flags, and add biases of zeros to the other layers they affect: the model then fits its configuration."""
    for name, shape in found.gained.items():
        path, _, own = name.rpartition(".")
        module = modules.get(path)
        weight = getattr(module, "weight", None)
        if module is not None and isinstance(weight, Tensor) and getattr(module, own, None) is None:
            dtype = weight.dtype if weight.is_floating_point() else None
            zeros = torch.zeros(shape, dtype=dtype, device=weight.device)
            module.register_parameter(own, nn.Parameter(zeros, requires_grad=weight.requires_grad))
    for module, flag, value in found.flags:
        _set(module.config, flag, value)


def _architectures(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost modules that are built from a configuration, as (prefix of their parameters' names, module)."""
    inside: tuple[str, ...] = ()
    for path, module in root.named_modules():
        prefix, config = f"{path}." if path else "", getattr(module, "config", None)
        if isinstance(config, GLoRAConfig):
            continue
        if not prefix.startswith(inside) and hasattr(config, "to_dict"):
            inside = (*inside, prefix)
            yield prefix, module
            if not prefix:
                return


def _biases(module: nn.Module, prefix: str, config: Any) -> dict[str, torch.Size] | None:
    """The biases of a fresh module of this class, by name; None where it cannot be built from a configuration alone."""
    try:
        with torch.device("meta"):
            fresh = type(module)(config)
    except Exception:  # a foreign constructor may raise anything
        return None
    names = fresh.named_parameters(remove_duplicate=False)
    return {prefix + name: parameter.shape for name, parameter in names if name.rpartition(".")[2] == "bias"}


def _flags(config: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The booleans with "bias" in their name, of a configuration and of the configurations nested in it."""
    for name, value in vars(config).items():
        if isinstance(value, bool) and "bias" in name:
            yield prefix + name, value
        elif hasattr(value, "to_dict") and not name.startswith("_"):
            yield from _flags(value, f"{prefix}{name}.")


def _set(config: Any, flag: str, value: bool) -> None:
    *parents, name = flag.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, value)
