"""The models that --config names: published ones that are known by name, and any config.json of transformers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glora_kernels.integrations.configs import from_config
from glora_kernels.reference.cases import VIT_B_16
from glora_kernels.tools.commands.printing import Refused


@dataclass(frozen=True)
class Sizes:
    """The sizes that determine a LLaMA-style model's linear layers. kv: out_features of k_proj and v_proj."""

    hidden: int
    intermediate: int
    layers: int
    kv: int


MODELS = {
    "llama-7b": Sizes(4096, 11008, 32, 4096),
    "llama-13b": Sizes(5120, 13824, 40, 5120),
    "llama-3-8b": Sizes(4096, 14336, 32, 1024),
    "llama-3-70b": Sizes(8192, 28672, 80, 1024),
}
VIT = "vit-b-16"
NAMES = (*MODELS, VIT)


def add_config(parser: argparse.ArgumentParser, words: str, several: bool = False) -> None:
    """Add --config; `words` say what it is for."""
    options: dict[str, Any] = {"nargs": "+"} if several else {}
    parser.add_argument(
        "--config", metavar="PATH_OR_NAME", **options,
        help=f"{words}: a config.json of transformers, a folder with one, or one of {', '.join(NAMES)}; nothing is "
        "downloaded",
    )  # fmt: skip


def build(config: str, dtype: torch.dtype) -> nn.Module:
    """The model that --config names, on the meta device. One that is known by name is its linear layers alone.

    Raises:
        Refused: there is no such file and no model of that name, or the file makes no model.
    """
    if config in MODELS:
        return skeleton(MODELS[config], dtype)
    if config == VIT:
        return blocks({"": VIT_B_16}, 12, True, dtype)
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise Refused(
            f"--config {config!r} is no file, no folder with a config.json, and none of {', '.join(NAMES)}; a model on "
            "a hub is not looked for: download its config.json and give its path"
        )
    try:
        return from_config(path, dtype)
    except (RuntimeError, ValueError) as error:
        raise Refused(f"--config: {error}") from error


def skeleton(sizes: Sizes, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The linear layers of the decoder, under LLaMA's names, on the meta device. It cannot be called."""
    h, f, kv = sizes.hidden, sizes.intermediate, sizes.kv
    shapes = {
        "self_attn": {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)},
        "mlp": {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)},
    }
    return nn.ModuleDict({"model": blocks(shapes, sizes.layers, False, dtype)})


def blocks(
    parts: Mapping[str, Mapping[str, tuple[int, int]]], count: int, bias: bool, dtype: torch.dtype
) -> nn.ModuleDict:
    """`layers.0`, `layers.1` ... with linear layers of these (N, K), in the parts of a block."""

    def linears(shapes: Mapping[str, tuple[int, int]]) -> nn.ModuleDict:
        return nn.ModuleDict(
            {name: nn.Linear(k, n, bias, device="meta", dtype=dtype) for name, (n, k) in shapes.items()}
        )

    def block() -> nn.ModuleDict:
        return linears(parts[""]) if "" in parts else nn.ModuleDict({name: linears(of) for name, of in parts.items()})

    return nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(count))})
