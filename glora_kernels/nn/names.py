"""Conclusions from the names of a model's modules: which are numbered by depth, and which layers are siblings.

The number in `encoder_layer_7` is a depth, those in `fc2` and `attn2` are not. A part of a path that is all digits is
always a depth (`spec.projection_type` handles it); this module decides about names that contain a number. Siblings are
layers that read one input: q, k and v; gate and up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import nn

from glora_kernels.nn.base import is_linear
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import all_paths, clean

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def numbered(root: nn.Module) -> frozenset[str]:
    """The paths of the modules whose names contain their depth.

    These are modules of one class and one parent, with names that differ by numbers only, where the parent is

    - a container (`nn.Sequential`, `nn.ModuleList`, `nn.ModuleDict`): `layers.encoder_layer_0`, `blocks.block3a`; or
    - outside of any numbered module, and there are three or more, or two counted from 0: `h_0`, `h_1` of a model.

    Other numbers tell roles apart: those inside a block (`attn1` and `attn2`, self- and cross-attention), and those of
    modules without children, such as linear layers (`fc1`, `fc2`; `wi_0`, `wi_1`).
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
    """Whether a path is, or leads through, a module numbered by depth."""
    parts = path.split(".")
    return any(part.isdecimal() or ".".join(parts[: i + 1]) in found for i, part in enumerate(parts))


ATTENTION: tuple[tuple[str, str, str], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
)
"""Last names of the input projections of attention: query, key, value."""

GATED: tuple[tuple[str, str], ...] = (("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"), ("fc1_g", "fc1_x"))
"""Last names of the two projections whose outputs a gated MLP multiplies."""

_CROSS = re.compile("cross_?att|encoder_attn|encdec|enc_dec|encoder_decoder_att|^attn2$", re.IGNORECASE)
_SELF = re.compile("self_?att", re.IGNORECASE)


class Readers(NamedTuple):
    """Layers of one parent whose names say that they read one input: paths, sizes (N, K), and what they belong to."""

    paths: list[str]
    sizes: list[tuple[int, int]]
    is_cross: bool
    are_gated: bool


def readers(root: nn.Module) -> Iterator[Readers]:
    """The linear and GLoRA layers of an unwrapped model that have the names of siblings (`ATTENTION`, `GATED`).

    In cross-attention k and v are siblings and q is not: it reads the decoder's state. Cross-attention is recognised
    by the parent (its `is_cross_attention` or class name) or the path (EncDecAttention, encoder_attn, ...).
    """
    paths = {module: clean(path) for path, module in root.named_modules()}
    for module, path in paths.items():
        layers = {
            name: m for name, m in module.named_children()
            if (isinstance(m, GLoRALinear) and m.is_linear) or is_linear(m)
        }  # fmt: skip
        cross = _is_cross(path, module)
        for names in (*ATTENTION, *GATED):
            own = [layers[name] for name in (names[1:] if cross and names in ATTENTION else names) if name in layers]
            if len(own) > 1:
                yield Readers([paths[one] for one in own], list(map(_size, own)), cross, names in GATED)


def sibling_sets(root: nn.Module, cross_attention_alone: bool = False) -> list[list[str]]:
    """The sets of `readers` with equal in_features, in a gated MLP also equal out_features, as lists of full paths.

    Args:
        cross_attention_alone: only k and v of cross-attention, which read the encoder's state.
    """
    sets: list[list[str]] = []
    for paths, sizes, is_cross, are_gated in readers(root):
        if cross_attention_alone and (are_gated or not is_cross):
            continue
        alike: dict[object, list[str]] = {}
        for path, (n, k) in zip(paths, sizes, strict=True):
            alike.setdefault((n, k) if are_gated else k, []).append(path)
        sets += [group for group in alike.values() if len(group) > 1]
    return sets


def _size(layer: Any) -> tuple[int, int]:
    """(N, K) of a linear or GLoRA layer; a Conv1D stores its weight as (K, N)."""
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    k, n = layer.weight.shape
    return n, k


def _is_cross(path: str, parent: nn.Module) -> bool:
    if getattr(parent, "is_cross_attention", False) is True or _CROSS.search(type(parent).__name__):
        return True
    for part in reversed(path.split(".")):
        if _SELF.search(part):
            return False
        if _CROSS.search(part):
            return True
    return False
