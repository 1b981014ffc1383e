"""Choosing linear layers of a model: those that patterns name, or every one but the head."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from glora_kernels.nn.base import Base, base_of, is_linear
from glora_kernels.nn.frozen import FrozenBase, QuantizedLinear
from glora_kernels.nn.model import all_paths
from glora_kernels.nn.patterns import patterns_of, unmatched
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.spec import is_exact, select

HEAD_NAMES: tuple[str, ...] = ("lm_head", "head", "classifier", "score", "embed_out")
"""The names of a head, or of the module that holds its linear layers ("classifier.3", "head.fc")."""

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear layer but the head."""


@dataclass(eq=False)
class Linear:
    """One linear layer of the model and every place where it is used."""

    module: nn.Module
    paths: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module | None, str]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.paths[0]

    @functools.cached_property
    def base(self) -> Base:
        return base_of(self.module)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The default dtype of an adapter: fp32 over a 16-bit base, else that of the base."""
        return torch.float32 if self.base.dtype.itemsize == 2 else self.base.dtype


def linears(root: nn.Module, adapted: bool = False) -> list[Linear]:
    """The linear layers of a model, each once, in the order of their first paths; `adapted`: GLoRA layers too."""
    modules = dict(root.named_modules(remove_duplicate=False))
    found: dict[nn.Module, Linear] = {}
    for (raw, module), (path, _) in zip(modules.items(), all_paths(root), strict=True):
        if is_linear(module) or (adapted and isinstance(module, FrozenBase)):
            item = found.setdefault(module, Linear(module))
            prefix, _, name = raw.rpartition(".")
            item.paths.append(path)
            item.parents.append((modules[prefix] if raw else None, name))
    return list(found.values())


def targets_of(given: str | Iterable[str] | None) -> list[str] | None:
    """The patterns of `target_modules`; None for every linear layer but the head."""
    if given is None or given == ALL_LINEAR:
        return None
    targets = patterns_of("target_modules", given)
    if not targets:
        raise ValueError(
            f"target_modules is empty; give at least one pattern, or None ({ALL_LINEAR!r}) for every layer but the head"
        )
    return targets


def find_targets(
    root: nn.Module,
    targets: list[str] | None,
    trained: Mapping[str, nn.Module],
    excluded: list[str],
    adapted: bool = False,
) -> tuple[list[Linear], list[Linear]]:
    """(all linear layers, the chosen ones): named by `targets`, not by `excluded`, and in no module of `trained`.

    targets None: all but the head. adapted: among them GLoRA layers.

    Raises:
        ValueError: a pattern that matches no linear layer, or only layers that are trained whole or excluded.
    """
    every = linears(root, adapted)
    owners = {module: path for path, top in trained.items() for module in top.modules()}
    out: set[Linear] = set()
    for pattern in excluded:
        if not (named := named_by(pattern, every)):
            raise unmatched("exclude_modules", pattern, "matches no linear layer", *some(every))
        out.update(named)
    if targets is None:
        heads = _heads(root)
        chosen = {linear for linear in every if not _is_head(linear, heads)}
    else:
        chosen = {linear for pattern in targets for linear in _targeted(root, pattern, every, owners, out)}
    return every, [linear for linear in every if linear in chosen - out and linear.module not in owners]


def named_by(pattern: str, among: list[Linear]) -> list[Linear]:
    """The linear layers that a pattern names."""
    selected = select(pattern, {path for linear in among for path in linear.paths})
    return [linear for linear in among if not selected.isdisjoint(linear.paths)]


def some(among: list[Linear]) -> tuple[str, list[str]]:
    """The choices to list in an error: the arguments of `patterns.listed`."""
    return "linear layer", [path for linear in among for path in linear.paths]


def _targeted(
    root: nn.Module, pattern: str, every: list[Linear], owners: Mapping[nn.Module, str], out: set[Linear]
) -> list[Linear]:
    """The layers that a target pattern names; an error for none, or where it is at odds with `train` or `exclude`."""
    named = named_by(pattern, every)
    if not named:
        modules = dict(all_paths(root))
        selected = select(pattern, modules.keys())
        other = next((f"{path!r} is a {type(m).__name__}" for path, m in modules.items() if path in selected), None)
        what = "matches no module" if other is None else f"matches no linear layer ({other})"
        raise unmatched("target_modules", pattern, what, *some(every))
    taken = [linear for linear in named if linear.module in owners]
    if taken and (is_exact(pattern) or len(taken) == len(named)):
        raise ValueError(
            f"target_modules: the pattern {pattern!r} names {taken[0].path!r}, which is trained whole with "
            f"{owners[taken[0].module]!r} (train=...); name it in one of the two"
        )
    if out.issuperset(named):
        raise ValueError(f"target_modules: all that the pattern {pattern!r} matches is in exclude_modules")
    return named


def _heads(root: nn.Module) -> set[nn.Module]:
    """The linear layers of the head, as the model itself returns it (transformers, timm); empty where it does not."""
    for name in ("get_output_embeddings", "get_classifier"):
        try:
            given: object = getattr(root, name, tuple)()
        except NotImplementedError:
            continue
        heads = [head for head in (given if isinstance(given, tuple) else (given,)) if isinstance(head, nn.Module)]
        if found := {inner for head in heads for inner in head.modules() if is_linear(inner)}:
            return found
    return set()


def _is_head(linear: Linear, heads: set[nn.Module]) -> bool:
    if heads:
        return linear.module in heads
    return any(path == "fc" or not set(path.split(".")[-2:]).isdisjoint(HEAD_NAMES) for path in linear.paths)


def trained_modules(root: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    """The modules that `train` names, by first path; an error for 4-bit ones, or where none has parameters."""
    found: dict[nn.Module, str] = {}
    modules = {path: module for path, module in all_paths(root) if path}
    for pattern in patterns:
        selected = select(pattern, modules.keys())
        hits = {path: module for path, module in modules.items() if path in selected}
        if not any(True for module in hits.values() for _ in module.parameters()):
            what = "matches no module" if not hits else f"matches modules without parameters only: {list(hits)[:4]}"
            raise unmatched("train", pattern, what, "module", modules)
        for path, module in hits.items():
            refuse_4bit(path, module)
            found.setdefault(module, path)
    return {path: module for module, path in found.items()}


def refuse_4bit(path: str, module: nn.Module) -> None:
    """Raise a ValueError where a module to be trained whole is or contains a 4-bit layer."""
    packed = next((m for m in module.modules() if isinstance(m, QuantizedLinear) or is_linear4bit(m)), None)
    if packed is not None:
        raise ValueError(
            f"train: {path!r} is or holds a layer in 4 bits ({type(packed).__name__}), which cannot be trained "
            "whole; leave it out of quantize(target_modules=...), or name other modules"
        )
