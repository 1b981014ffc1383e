"""Modules that copy the weights of their projections into one layer, as diffusers' `fuse_qkv_projections` does.

The copy has the weights alone: adapters on the projections would have no effect from then on, and nothing says so. So
such a method of a module with adapters is covered, on that module alone, by a `Guard`, which raises an error while a
layer whose weight the method reads has an adapter that is not merged.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from glora_kernels.nn.mixed import TakesRows
from glora_kernels.nn.model import is_tuner
from glora_kernels.nn.reads import read_by

COPYING = "fuse_projections"
"""diffusers' name of the method, of an attention module, that makes the copy."""
_METHODS = (COPYING, "fuse_qkv_projections")
"""That, and the method of a whole model that calls it for every attention module inside."""


class Guard:
    """In the place of a module's method `name`, which it calls.

    Raises:
        RuntimeError: adapters would have no effect afterwards; nothing was fused.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for path, inner in self.module.named_modules():
            if _has(inner, COPYING) and (lost := _lost(inner)):
                where = f"{path}.{lost[0]}".removeprefix(".")
                raise RuntimeError(
                    f"{self.name} copies the weight of {where!r} without its adapter, which would have no effect from "
                    "then on. Merge first (glora_kernels.merge_and_unload, or PEFT's merging, diffusers' fuse_lora), "
                    "or fuse the base model before adapters are put into it, and adapt to_qkv"
                )
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


def guard(root: nn.Module, undo: ExitStack) -> None:
    """Cover these methods of the modules in `root` that have adapters inside."""
    for module in root.modules():
        for name in _METHODS:
            if _has(module, name) and any(map(_is_adapted, module.modules())):
                undo.callback(vars(module).pop, name, None)
                vars(module)[name] = Guard(module, name)


def unguard(root: nn.Module) -> None:
    """Uncover them again."""
    for module in root.modules():
        for name in _METHODS:
            if isinstance(vars(module).get(name), Guard):
                del vars(module)[name]


def _has(module: nn.Module, name: str) -> bool:
    return callable(getattr(type(module), name, None))


def _is_adapted(module: nn.Module) -> bool:
    if isinstance(module, TakesRows):
        return bool(module.adapter_names())
    return is_tuner(module) and hasattr(module, "merged")


def _lost(module: nn.Module) -> list[str]:
    """The paths of the adapted layers inside, not merged, whose weight the copying method reads."""
    adapted = {path: m for path, m in module.named_modules() if _is_adapted(m) and not m.merged}
    read = read_by(module, COPYING) if adapted else set()
    return [path for path, layer in adapted.items() if not read.isdisjoint(layer.modules())]
