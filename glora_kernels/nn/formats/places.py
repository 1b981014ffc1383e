"""Which layer of a model a name in a file means, and the name of a layer.

A name is a prefix and the layer's path, which LyCORIS and kohya write with `_` for `.`: what was a `.` cannot be told
from the name alone, so it is looked up among the paths of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from glora_kernels.nn.base import convolution_class
from glora_kernels.nn.formats.layouts import PREFIXES
from glora_kernels.nn.model import all_paths, join
from glora_kernels.nn.patterns import some_of
from glora_kernels.nn.targets import Linear, linears

Prefix = str | Mapping[str, str] | None
"""`prefix` as users give it: of all names, or a mapping from the path of a part of the model to its names' prefix."""


def check_prefix(prefix: object) -> None:
    """Raise a TypeError or ValueError where `prefix` is none that is accepted."""
    accepted = (
        "prefix must be None, a str, or a mapping from the path of a part of the model to the prefix of its names"
    )
    if isinstance(prefix, Mapping):
        if not prefix or not all(isinstance(text, str) for pair in prefix.items() for text in pair):
            raise TypeError(f"{accepted}; got {prefix!r}")
        if len({*prefix.values()}) < len(prefix):
            raise ValueError(f"prefix gives two parts of the model the same prefix: {dict(prefix)!r}")
    elif prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"{accepted}; got {prefix!r}")


def name_of(path: str, prefix: str | Mapping[str, str], separator: str) -> str:
    """The name of a layer in a file.

    Raises:
        ValueError: the layer is the model itself, or in no part of the model that `prefix` names.
    """
    parts = {"": prefix} if isinstance(prefix, str) else prefix
    around = [part for part in parts if part in ("", path) or path.startswith(f"{part}.")]
    if not around:
        raise ValueError(f"prefix names {some_of(sorted(parts))}, and {path!r} is in none of these parts of the model")
    part = max(around, key=len)
    if part == path:
        raise ValueError("the adapted layer is the model itself, which has no name; give a module that contains it")
    return parts[part] + path[len(part) + bool(part) :].replace(".", separator)


class Places:
    """The layers of a model by the names that a file may give them.

    Args:
        root: the unwrapped model; it may have GLoRA layers.
        names: of the file.
        prefix: as users give it.

    Raises:
        ValueError: no prefix is given, and the names have none that is known, or several.
    """

    def __init__(self, root: nn.Module, names: Iterable[str], prefix: Prefix) -> None:
        names = list(names)
        if prefix is None:
            prefix = _only_prefix(names)
        self._parts = {prefix: ""} if isinstance(prefix, str) else {text: part for part, text in prefix.items()}
        self._linear: dict[str, Linear] = {
            path: one for one in linears(root, adapted=True) if not one.experts for path in one.paths
        }
        self._modules = dict(all_paths(root))
        if absent := [part for part in self._parts.values() if part not in self._modules]:
            raise ValueError(f"prefix names {absent[0]!r}, which the model does not have")
        self._flat: dict[str, list[str]] = {}
        for path in self._modules:
            self._flat.setdefault(_flat(path), []).append(path)
        for flat, paths in self._flat.items():
            self._flat[flat] = self._distinct(paths)

    def find(self, name: str) -> Linear | None:
        """The linear layer, convolution or GLoRA layer of this name; None for a name of another part of a pipeline.

        Raises:
            ValueError: there is no such module, or more than one, or it is no such layer or a grouped convolution.
        """
        prefix = max((text for text in self._parts if name.startswith(text)), key=len, default=None)
        if prefix is None:
            if re.match(PREFIXES, name):
                return None
            given = some_of(sorted(self._parts))
            raise ValueError(f"the name {name!r} begins neither with {given} nor with a known prefix of another model")
        paths = self._flat.get(_flat(join(self._parts[prefix], name[len(prefix) :])), [])
        if not paths:
            near = ", ".join(repr(prefix + _flat(path)) for path in [*self._linear][:3])
            raise ValueError(f"{name!r} is no layer of this model: its layers are called {near}, ... there")
        linear_paths = [path for path in paths if path in self._linear]
        if len(paths) > 1 and len(linear_paths) != 1:
            raise ValueError(f"{name!r} may mean {some_of(paths)} of this model, and a file cannot tell them apart")
        path = (linear_paths or paths)[0]
        if path not in self._linear:
            kind = type(self._modules[path]).__name__
            raise ValueError(f"{name!r} is a {kind}; accepted are linear layers and convolutions (nn.Conv1d to Conv3d)")
        found = self._linear[path]
        if convolution_class(found.module) is not None and (reason := found.refusal()):
            raise ValueError(f"{name!r} is {path!r} of this model, which cannot be adapted: {reason}")
        return found

    def _distinct(self, paths: list[str]) -> list[str]:
        """One path for each of the modules that have these."""
        return list({id(self._modules[path]): path for path in reversed(paths)}.values())[::-1]


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _only_prefix(names: Iterable[str]) -> str:
    """The known prefix that all names have."""
    counts: dict[str, int] = {}
    for name in names:
        found = re.match(PREFIXES, name)
        if found is None:
            raise ValueError(
                f"the name {name!r} has no prefix that is known (lycoris_, lora_unet_, lora_te1_, transformer., ...); "
                "say what comes before the path of a layer: prefix="
            )
        counts[found[0]] = counts.get(found[0], 0) + 1
    if len(counts) > 1:
        listed = ", ".join(f"{count} layers of {prefix!r}" for prefix, count in sorted(counts.items()))
        raise ValueError(
            f"it has {listed}, which are several models: say which this one is, prefix={min(counts)!r}, or where they "
            'are in it, prefix={"unet": "lora_unet_", ...}'
        )
    return next(iter(counts))
