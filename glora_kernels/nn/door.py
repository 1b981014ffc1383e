"""Checks before layers are replaced, made by `inject`, `quantize`, `accelerate` and our PEFT methods.

One error names all layers that must not be replaced: those unfit by themselves, and those whose replacement would have
no effect, because other code reads their weight without calling them (`nn.reads`) or torch.compile wraps them alone.
A warning says where most of the model is in no linear layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from glora_kernels.nn.base import is_linear, unsupported
from glora_kernels.nn.reads import reads

_MOST = 12
"""The most paths that an error names for one reason."""
_SKIPPED = 0.5
"""The largest share of a model's weights outside linear layers that goes without a warning."""
_EXPERTS = 0.1
"""The same limit for experts in one tensor."""


def refusals(
    root: nn.Module, modules: Iterable[nn.Module], unfit: Callable[[nn.Module], str | None] = unsupported
) -> dict[nn.Module, str]:
    """The reasons why some of these modules cannot be replaced, by module.

    Args:
        root: the whole model, whose code may read the weights.
        modules: the modules to replace.
        unfit: the reason against a module by itself, or None.
    """
    read = reads(root)
    wrapped = {
        child: "torch.compile wraps this layer alone, so an adapter would have no effect; compile the model afterwards"
        for parent in root.modules()
        if (child := parent._modules.get("_orig_mod")) is not None
    }
    found: dict[nn.Module, str] = {}
    for module in modules:
        if module in read:
            found[module] = f"{read[module]}, so an adapter would have no effect there"
        elif module in wrapped:
            found[module] = wrapped[module]
        elif reason := unfit(module):
            found[module] = reason
    return found


def refuse(
    root: nn.Module, modules: Mapping[str, nn.Module], what: str, unfit: Callable[[nn.Module], str | None] = unsupported
) -> None:
    """Raise one error for all of these modules (by path) that `refusals` names. what: a participle, such as "replaced".

    Raises:
        ValueError: with the reasons, the paths for each, and what to exclude.
    """
    found = refusals(root, modules.values(), unfit)
    groups: dict[str, list[str]] = {}
    for path, module in modules.items():
        if module in found:
            groups.setdefault(f"({type(module).__name__}) cannot be {what}: {found[module]}", []).append(path)
    if not groups:
        return
    refused = [path for paths in groups.values() for path in paths]
    lines = []
    for reason, paths in groups.items():
        more = f" and {len(paths) - _MOST} more" if len(paths) > _MOST else ""
        lines.append(f"{', '.join(map(repr, paths[:_MOST]))}{more} {reason}")
    count = f"{len(refused)} of {len(modules)} layers cannot be {what}:\n  " if len(refused) > 1 else ""
    separator = "\n  "
    end = "\n" if len(refused) > 1 else "; "
    raise ValueError(
        f"{count}{separator.join(lines)}{end}exclude what is refused: exclude_modules={_names(refused, modules)}, "
        "or name other layers in target_modules=[...]"
    )


def _names(refused: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Patterns that match the refused paths alone: last names, or whole paths where another layer has the same name."""
    kept = {path.rpartition(".")[2] for path in modules.keys() - set(refused)}
    names = (path if (name := path.rpartition(".")[2]) in kept or name.isdecimal() else name for path in refused)
    return sorted(set(names))


def warn_skipped(caller: str, root: nn.Module, left: Iterable[nn.Module]) -> None:
    """Warn where "every linear layer" is much less than the model, because of experts or convolutions.

    Args:
        caller: the public function, for the message.
        root: the model.
        left: modules that do not count: adapted ones, and those left out on purpose (the head, modules trained whole).
    """
    share, parts = _skipped(root, left)
    if sum(parts.values()) > _SKIPPED or parts.get(_STACKED, 0) > _EXPERTS:
        warnings.warn(
            f"{caller}: {share}, and stay as they are: only linear layers (nn.Linear, Conv1D) are adapted. Name what "
            "you want in target_modules=[...], convolutions too, experts in target_parameters=[...], or train other "
            "modules whole (train=[...])",
            UserWarning,
            stacklevel=3,
        )


def skipped_share(root: nn.Module) -> str:
    """The share of a model that is in no linear layer, as text: "81% of the model's weights are in no linear ..."."""
    return _skipped(root, ())[0]


def _skipped(root: nn.Module, left: Iterable[nn.Module]) -> tuple[str, dict[str, float]]:
    """The share of the weights in no linear layer, as text and by kind; vectors and embeddings do not count."""
    inside = {id(inner) for module in left for inner in module.modules()}
    sizes: dict[str, int] = {}
    total = 0
    for module in root.modules():
        features = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(features[0], int) and isinstance(features[1], int):  # not numel(): 4-bit codes are packed
            parts = max(1, getattr(module, "experts", 0)) * math.prod(getattr(module, "kernel", ()))
            total += features[0] * features[1] * parts
            continue
        for parameter in module._parameters.values():
            if parameter is None or parameter.ndim < 2 or isinstance(module, nn.Embedding):
                continue
            total += parameter.numel()
            if id(module) not in inside and not is_linear(module):
                kind = _kind(module, parameter)
                sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    if total == 0:
        return "it has embeddings, norms and vectors alone", {}
    parts = {kind: size / total for kind, size in sorted(sizes.items(), key=lambda item: -item[1])}
    listed = ", ".join(f"{part:.0%} {kind}" for kind, part in parts.items())
    return f"{sum(parts.values()):.0%} of the model's weights are in no linear layer ({listed or 'nothing'})", parts


_STACKED = "experts or other matrices in one tensor"


def _kind(module: nn.Module, parameter: nn.Parameter) -> str:
    if "Conv" in type(module).__name__:
        return "convolutions"
    return _STACKED if parameter.ndim == 3 else type(module).__name__
