"""Finding siblings by name: the layers of a model that read one input (q, k and v; gate and up)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from glora_kernels.nn.base import is_linear
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import clean

ATTENTION: tuple[tuple[str, str, str], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
)
"""Last names of the projections that attention starts with, queries first."""

GATED: tuple[tuple[str, str], ...] = (("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"), ("fc1_g", "fc1_x"))
"""Last names of the two projections that a gated MLP multiplies with each other."""

_CROSS = re.compile("cross_?att|encoder_attn|encdec|enc_dec|encoder_decoder_att|^attn2$", re.IGNORECASE)
_SELF = re.compile("self_?att", re.IGNORECASE)


class Readers(NamedTuple):
    """Layers of one parent that by their names read one input: paths, sizes (N, K), and whether in cross-attention."""

    paths: list[str]
    sizes: list[tuple[int, int]]
    is_cross: bool
    are_gated: bool


def readers(root: nn.Module) -> Iterator[Readers]:
    """The linear and GLoRA layers of an unwrapped model that have the names of siblings (`ATTENTION`, `GATED`).

    In cross-attention k and v are siblings and q is not: it reads the decoder's state. Cross-attention is what its
    parent (`is_cross_attention`, its class's name) or its path (EncDecAttention, encoder_attn, crossattention, ...)
    says.
    """
    paths = {module: clean(path) for path, module in root.named_modules()}
    for module, path in paths.items():
        layers = {name: m for name, m in module.named_children() if isinstance(m, GLoRALinear) or is_linear(m)}
        cross = _is_cross(path, module)
        for names in (*ATTENTION, *GATED):
            own = [layers[name] for name in (names[1:] if cross and names in ATTENTION else names) if name in layers]
            if len(own) > 1:
                yield Readers([paths[one] for one in own], list(map(_size, own)), cross, names in GATED)


def sibling_sets(root: nn.Module) -> list[list[str]]:
    """The `readers` of an unwrapped model with equal in_features, of a gated MLP of equal sizes: full paths by set."""
    return [paths for paths, _ in _sets(root)]


def cross_attention_sets(root: nn.Module) -> list[list[str]]:
    """Those of `sibling_sets` that are k and v of cross-attention, which read the encoder's state."""
    return [paths for paths, cross in _sets(root) if cross]


def _sets(root: nn.Module) -> Iterator[tuple[list[str], bool]]:
    for paths, sizes, is_cross, are_gated in readers(root):
        if are_gated:
            if len(set(sizes)) == 1:
                yield paths, False
            continue
        for width in dict.fromkeys(k for _, k in sizes):
            alike = [path for path, (_, k) in zip(paths, sizes, strict=True) if k == width]
            if len(alike) > 1:
                yield alike, is_cross


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
