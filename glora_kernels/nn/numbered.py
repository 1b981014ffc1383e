"""Which modules of a model are numbered by their place in its depth: `encoder_layer_7` is, `fc2` and `attn2` are not.

A part of a path that is all digits is such a number by itself (`spec.projection_type`). Here are the names with a
number inside.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from glora_kernels.nn.model import all_paths

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def numbered(root: nn.Module) -> frozenset[str]:
    """The paths of the modules whose names differ from those of others beside them by their depth alone.

    These are modules of one class and one parent, with names that differ by numbers only, where the parent is

    - a container (`nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`): `layers.encoder_layer_0`, `blocks.block3a`; or
    - outside of any numbered module, and there are three or more, or two counted from 0: `h_0`, `h_1` of a model.

    Inside a block numbers tell roles apart (`attn1` and `attn2`, self- and cross-attention), and so do those in the
    name of a linear layer itself (`fc1`, `fc2`; `wi_0`, `wi_1`), which has no layers in it.
    """
    modules = dict(all_paths(root))
    families: dict[tuple[str, str, type], list[str]] = {}
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        has_number = any(character.isdecimal() for character in name) and not name.isdecimal()
        if has_number and any(True for _ in module.children()):
            families.setdefault((parent, re.sub(r"\d+", "#", name), type(module)), []).append(path)
    found: set[str] = set()
    for (parent, _, _), paths in families.items():  # parents come before their children
        counts = [int(number) for path in paths for number in re.findall(r"\d+", path.rpartition(".")[2])]
        enough = len(paths) > 2 or (len(paths) == 2 and min(counts) == 0)
        if (len(paths) > 1 and isinstance(modules[parent], _CONTAINERS)) or (enough and not _inside(parent, found)):
            found.update(paths)
    return frozenset(found)


def _inside(path: str, found: Collection[str]) -> bool:
    """Whether a path is, or leads through, a module with a number for its depth."""
    parts = path.split(".")
    return any(part.isdecimal() or ".".join(parts[: i + 1]) in found for i, part in enumerate(parts))
