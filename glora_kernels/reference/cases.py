"""The models, configurations and awkward shapes that are compiled ahead of time, measured and tested."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

from glora_kernels.spec import CHOICES, SUPPORTS, GLoRAConfig

LLAMA_3_8B = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
    "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
}  # fmt: skip
"""N and K of the seven linears of a decoder layer."""
VIT_B_16 = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
"""N and K of the linears of an encoder layer, which have a bias."""
QWEN3_30B_A3B = {"q": (4096, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 4096)}
"""N and K of the dense linears of a decoder layer, without the experts."""


class Mixture(NamedTuple):
    """The experts of a model: their number, how many read a token, and sizes.

    up: (2·inner, hidden); down: (hidden, inner). transposed: stored as (in, out), and with a bias, as gpt-oss does.
    """

    experts: int
    each: int
    hidden: int
    inner: int
    transposed: bool = False


MIXTURES = {
    "Qwen3-30B-A3B": Mixture(128, 8, 2048, 768), "gpt-oss-20b": Mixture(32, 4, 2880, 2880, transposed=True),
    "DeepSeek-V2-Lite": Mixture(64, 6, 2048, 1408),
}  # fmt: skip
MODELS = {"LLaMA-3-8B": LLAMA_3_8B, "ViT-B/16": VIT_B_16, "Qwen3-30B-A3B": QWEN3_30B_A3B}
SIBLINGS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""The linears of a decoder layer that read one input."""

LORA = GLoRAConfig.lora(16, 32.0)
DROPPING = GLoRAConfig.lora(16, 32.0, dropout=0.1)
VECTORS = GLoRAConfig("vector", "lora", "vector", "vector", "vector", 16)
BOTH = GLoRAConfig("lora", "lora", "none", "none", "none", 16)
PRODUCT = GLoRAConfig("lora", "lora", "none", "none", "none", 16, variant="matmul")
CONSTANTS = GLoRAConfig("constant", "constant", "lora", "constant", "constant", 16)
EVERYTHING = GLoRAConfig("vector", "lora", "lora", "vector", "vector", 16, dropout=0.1)
CONFIGS = {"LoRA": LORA, "LoRA, dropout": DROPPING, "A=vector B=lora C=D=E=vector": VECTORS, "A=B=lora": BOTH}
"""The configurations that every layer of the models is compiled with."""

FORMS = [
    *((a, b, "hadamard") for a, b in itertools.product(CHOICES["A"], CHOICES["B"])),
    *(("lora", b, "matmul") for b in CHOICES["B"]),
]
"""Every form of (A, B, variant) in which A acts."""

AWKWARD = (((37,), 70, 45, 3), ((1,), 70, 45, 16), ((37,), 16, 129, 1), ((3, 11), 40, 33, 65), ((70,), 129, 16, 4))
"""(leading dimensions of x, K, N, R): each of them has an awkward value in turn."""


def distinct(layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The layers without those whose size an earlier one has."""
    return {name: size for name, size in layers.items() if name == next(n for n in layers if layers[n] == size)}


def case_of(config: GLoRAConfig) -> str:
    """A configuration's name: "lora", "glora:<A>,<B>,<C>,<D>,<E>", or "glora-matmul:…" for the product variant."""
    forms = [getattr(config, name) for name in SUPPORTS]
    if forms == ["none", "lora", "none", "none", "none"]:
        return "lora"
    return ("glora:" if config.variant == "hadamard" else "glora-matmul:") + ",".join(forms)
