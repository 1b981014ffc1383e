"""Choosing layers of a model: those that patterns name, or every linear one but the head.

Convolutions, and the products of experts, which are parameters of an experts module, are chosen as linear layers are,
but only where a pattern names them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from glora_kernels.nn import mixture
from glora_kernels.nn.base import Base, base_of, convolution_class, is_linear, unsupported
from glora_kernels.nn.experts import ExpertLinear, install, refusal
from glora_kernels.nn.frozen import DTYPES, FrozenBase, QuantizedLinear, dtype_name
from glora_kernels.nn.model import all_paths, join
from glora_kernels.nn.patterns import listed, patterns_of, unmatched
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.spec import is_exact, select

HEAD_NAMES: tuple[str, ...] = ("lm_head", "head", "classifier", "score", "embed_out")
"""The names of a head, or of the module that holds its linear layers ("classifier.3", "head.fc")."""

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear layer but the head."""


@dataclass(eq=False)
class Linear:
    """One linear layer of the model and every place where it is used; or a convolution, or a product of experts.

    Where a product is not a layer yet, `module` is one that the model does not have, on the experts' parameters.
    """

    module: nn.Module
    paths: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module | None, str]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def experts(self) -> int:
        """E of a product of experts; 0 for others."""
        return self.module.experts if isinstance(self.module, FrozenBase) else 0

    @property
    def is_convolution(self) -> bool:
        if isinstance(self.module, FrozenBase):
            return bool(self.module.kernel)
        return convolution_class(self.module) is not None

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, plain or adapted: what patterns mean first."""
        return not self.experts and not self.is_convolution

    @property
    def owner(self) -> nn.Module:
        """What the model has: the layer, or the experts module that has the product."""
        parent = self.parents[0][0]
        return parent if self.experts and parent is not None else self.module

    def refusal(self) -> str | None:
        """The reason why it cannot be replaced by itself, or None."""
        if not self.experts:
            return unsupported(self.module)
        if reason := refusal(self.owner):
            return reason
        base = self.base
        for name, tensor in (("weight", base.weight), ("bias", base.bias)):
            if tensor is not None and base.quant_state is None and type(tensor) not in (torch.Tensor, nn.Parameter):
                return f"its {name} is a {type(tensor).__name__}, not a plain tensor"
        if base.quant_state is None and base.dtype not in DTYPES:
            return f"its weight is {dtype_name(base.dtype)}; accepted: {', '.join(map(dtype_name, DTYPES))}"
        return None

    @functools.cached_property
    def base(self) -> Base:
        return base_of(self.module)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """The default dtype of an adapter: fp32 over a 16-bit base, else that of the base."""
        return torch.float32 if self.base.dtype.itemsize == 2 else self.base.dtype


def linears(root: nn.Module, adapted: bool = False) -> list[Linear]:
    """The linear layers of a model, each once, in the order of their first paths; `adapted`: GLoRA layers too.

    Convolutions and the products of experts are among them (`Linear.is_linear`).
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    found: dict[object, Linear] = {}
    for (raw, module), (path, _) in zip(modules.items(), all_paths(root), strict=True):
        for name in mixture.products(module):
            item = found.get((module, name))
            if item is None:
                item = found[module, name] = Linear(ExpertLinear.of(module, name), parents=[(module, name)])
            item.paths.append(join(path, name))
        is_plain = is_linear(module) or isinstance(module, ExpertLinear) or convolution_class(module) is not None
        if is_plain or (adapted and isinstance(module, FrozenBase)):
            item = found.setdefault(module, Linear(module))
            prefix, _, name = raw.rpartition(".")
            item.paths.append(path)
            item.parents.append((modules[prefix] if raw else None, name))
    return list(found.values())


def put(linear: Linear, layer: nn.Module, undo: ExitStack) -> None:
    """Put a layer in every place of a linear layer; `undo` gets callbacks that put the linear layer back."""
    for parent, name in linear.parents:
        if parent is not None and name in parent._modules:
            undo.callback(parent._modules.__setitem__, name, linear.module)
            parent._modules[name] = layer
        elif parent is not None:
            install(parent, name, layer, undo)


def targets_of(given: str | Iterable[str] | None, parameters: Collection[str] = ()) -> list[str] | None:
    """The patterns of `target_modules`; None for every linear layer but the head. parameters: `target_parameters`."""
    if given is None or given == ALL_LINEAR:
        return None
    targets = patterns_of("target_modules", given)
    if not targets and not parameters:
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
    parameters: Iterable[str] = (),
) -> tuple[list[Linear], list[Linear]]:
    """(all linear layers, the chosen ones): named by `targets`, not by `excluded`, and in no module of `trained`.

    targets None: all but the head, no convolutions and no experts; of a model that is itself a convolution, this. A
    pattern of `targets` that names no linear layer may name convolutions, and one that names none of these products of
    experts; one of `parameters` names the last alone. adapted: among them GLoRA layers.

    Raises:
        ValueError: a pattern that matches no layer, or only layers that are trained whole or excluded.
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
        chosen = {one for one in every if (one.is_linear or one.module is root) and not _is_head(one, heads)}
    else:
        chosen = {linear for pattern in targets for linear in _targeted(root, pattern, every, owners, out)}
    experts = [linear for linear in every if linear.experts]
    for pattern in parameters:
        if not named_by(pattern, experts):
            raise _no_experts(root, pattern, experts)
        chosen.update(_targeted(root, pattern, experts, owners, out, "target_parameters"))
    return every, [linear for linear in every if linear in chosen - out and linear.owner not in owners]


def named_by(pattern: str, among: list[Linear]) -> list[Linear]:
    """The linear layers that a pattern names."""
    selected = select(pattern, {path for linear in among for path in linear.paths})
    return [linear for linear in among if not selected.isdisjoint(linear.paths)]


def some(among: list[Linear]) -> tuple[str, list[str]]:
    """The choices to list in an error: the arguments of `patterns.listed`."""
    kind = "linear layer" if all(linear.is_linear for linear in among) else "layer"
    return kind, [path for linear in among for path in linear.paths]


def _targeted(
    root: nn.Module, pattern: str, every: list[Linear], owners: Mapping[nn.Module, str], out: set[Linear],
    argument: str = "target_modules",
) -> list[Linear]:  # fmt: skip
    """The layers that a target pattern names; an error for none, or where it is at odds with `train` or `exclude`."""
    kinds = [linear for linear in every if linear.is_linear], [linear for linear in every if not linear.experts], every
    named = next(filter(None, (named_by(pattern, kind) for kind in kinds)), [])
    if not named:
        modules = dict(all_paths(root))
        selected = select(pattern, modules.keys())
        other = next(
            (f"{path!r} is of class {type(m).__name__}" for path, m in modules.items() if path in selected), None
        )
        what = "matches no module" if other is None else f"matches no linear layer or convolution ({other})"
        raise unmatched(argument, pattern, what, *some(every))
    taken = [linear for linear in named if linear.owner in owners]
    if taken and (is_exact(pattern) or len(taken) == len(named)):
        raise ValueError(
            f"{argument}: the pattern {pattern!r} names {taken[0].path!r}, which is trained whole with "
            f"{owners[taken[0].owner]!r} (train=...); name it in one of the two"
        )
    if out.issuperset(named):
        raise ValueError(f"{argument}: all that the pattern {pattern!r} matches is in exclude_modules")
    return named


def _no_experts(root: nn.Module, pattern: str, experts: list[Linear]) -> ValueError:
    """The error for a pattern of `target_parameters` that names no product of experts."""
    owners = {join(path, name): m for path, m in all_paths(root) for name in m._parameters}
    if not (selected := sorted(select(pattern, owners.keys()))):
        return unmatched("target_parameters", pattern, "matches no parameter", "parameter of experts", some(experts)[1])
    module = owners[selected[0]]
    if mixture.has_interface(module):
        reason = "a parameter of experts that is no weight (E, N, K) of a product"
    elif getattr(module, selected[0].rpartition(".")[2]).ndim == 3:
        reason = mixture.LAYOUT
    else:
        reason = (
            "not one of experts; train its module whole (train=[...]), or name it in target_modules if it is linear"
        )
    return ValueError(
        f"target_parameters: the pattern {pattern!r} names {selected[0]!r} of a {type(module).__name__}, which is "
        f"{reason}. Accepted are the weights of the products (gate_up_proj, up_proj, down_proj) of such experts. "
        f"{listed('parameter of experts', some(experts)[1])}"
    )


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


def top_k_of(linear: Linear) -> int:
    """How many experts a token has, by the configuration of the experts module of a product.

    Raises:
        ValueError: it does not say that.
    """
    found = getattr(getattr(linear.owner, "config", None), "num_experts_per_tok", None)
    if not isinstance(found, int) or found < 1:
        raise ValueError(
            f"expert_rank: the configuration of {linear.path!r} has no num_experts_per_tok; leave expert_rank at "
            "'rank' and give experts a configuration of their own, with the rank that you want"
        )
    return found


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
    kinds = (QuantizedLinear, ExpertLinear)  # the latter stays in a model in 4 bits alone
    packed = next((m for m in module.modules() if isinstance(m, kinds) or is_linear4bit(m)), None)
    if packed is not None:
        raise ValueError(
            f"train: {path!r} is or holds a layer in 4 bits ({type(packed).__name__}), which cannot be trained "
            "whole; leave it out of quantize(target_modules=...), or name other modules"
        )
