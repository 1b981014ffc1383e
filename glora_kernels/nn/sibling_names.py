"""Finding siblings by name: the layers of a model that read one input (q, k and v; gate and up)."""

from __future__ import annotations

import re
from typing import Any

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


def sibling_sets(root: nn.Module) -> list[list[str]]:
    """The linear and GLoRA layers of an unwrapped model that read the same input, as full paths, set by set.

    Found by their last names among those of one parent (`ATTENTION`, `GATED`), with equal in_features. In
    cross-attention k and v are siblings and q is not: it reads the decoder's state. Cross-attention is what its parent
    (`is_cross_attention`, its class's name) or its path (EncDecAttention, encoder_attn, crossattention, ...) says.
    """
    return [paths for paths, _ in _sets(root)]


def cross_attention_sets(root: nn.Module) -> list[list[str]]:
    """Those of `sibling_sets` that are k and v of cross-attention, which read the encoder's state."""
    return [paths for paths, cross in _sets(root) if cross]


def _sets(root: nn.Module) -> list[tuple[list[str], bool]]:
    """Every set of siblings, and whether it is one of cross-attention."""
    paths = {id(module): clean(path) for path, module in root.named_modules()}
    found = []
    for path, parent in root.named_modules():
        children = {name: child for name, child in parent.named_children() if _is_layer(child)}
        cross = _is_cross(clean(path), parent)
        for attention in ATTENTION:
            readers = [children[name] for name in (attention[1:] if cross else attention) if name in children]
            for size in dict.fromkeys(_shape(layer)[1] for layer in readers):
                found.append(([paths[id(layer)] for layer in readers if _shape(layer)[1] == size], cross))
        for gated in GATED:
            layers = [children[name] for name in gated if name in children]
            if len({_shape(layer) for layer in layers}) == 1:
                found.append(([paths[id(layer)] for layer in layers], False))
    return [(alike, cross) for alike, cross in found if len(alike) > 1]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, GLoRALinear) or is_linear(module)


def _shape(layer: Any) -> tuple[int, int]:
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
