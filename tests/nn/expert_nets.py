"""Nets with one experts module, GLoRA layers over its products, and the same by the letter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import literal
from small_mixtures import CLASSES, EACH, HIDDEN, Mixture, config_of, filled
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig
from glora_kernels.nn.model import named_layers

UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
BOTH = (UP, DOWN)
FULL = GLoRAConfig("vector", "lora", "vector", "vector", "vector", rank=3, alpha=5)
X = torch.randn(2, 4, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(family: str = "mixtral", dtype: torch.dtype = torch.float64, count: int | None = None) -> Mixture:
    torch.manual_seed(0)
    made = Mixture(family, count=count).to(dtype)
    made.experts.config._experts_implementation = "eager"
    return made


def language_model(family: str) -> Any:
    torch.manual_seed(0)
    return filled(CLASSES[family](config_of(family)))


def adapted(family: str = "mixtral", config: Any = FULL, targets: Any = BOTH, seed: int = 3, **more: Any) -> Mixture:
    """A net whose experts have adapters away from zero."""
    return drawn(gk.inject(net(family), config, target_modules=[], target_parameters=targets, **more), seed)


def drawn(model: nn.Module, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in named_layers(model).values():
            for parameter in layer.all_adapters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


class Literal(nn.Module):
    """The same net by the letter: every row of every token with the dense matrices of its expert.

    It has the adapters of an injected net as parameters under the same names, and its router and experts.
    """

    def __init__(self, model: Mixture) -> None:
        super().__init__()
        layers = named_layers(model)
        self.configs = {path: layer.config for path, layer in layers.items()}
        self.adapters = nn.ParameterDict({
            f"{path}.{name}".replace(".", "/"): nn.Parameter(p.detach().clone())
            for path, layer in layers.items() for name, p in layer.adapter().items()
        })  # fmt: skip
        plain = gk.unload(copy.deepcopy(model))
        self.router, self.experts = plain.router.requires_grad_(False), plain.experts.requires_grad_(False)

    def of(self, path: str) -> dict[str, Tensor]:
        prefix = f"{path}.".replace(".", "/")
        return {name.removeprefix(prefix): p for name, p in self.adapters.items() if name.startswith(prefix)}

    def product(self, path: str, x: Tensor, e: int) -> Tensor:
        name = path.rpartition(".")[2]
        weight = getattr(self.experts, name)[e]
        weight = weight.t() if self.experts.is_transposed else weight
        bias = getattr(self.experts, f"{name}_bias")[e] if self.experts.has_bias else None
        own = {name: p[e if len(p) > 1 else 0] for name, p in self.of(path).items()}
        return literal(x, weight, bias, own, self.configs.get(path, GLoRAConfig("none", "none")))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weights, index = self.router(rows).softmax(-1).topk(EACH, -1)
        out = []
        for row, own, chosen in zip(rows, weights, index.tolist(), strict=True):
            parts = [
                weight * self.product(DOWN, self.experts._apply_gate(self.product(UP, row[None], e)), e)[0]
                for weight, e in zip(own, chosen, strict=True)
            ]
            out.append(torch.stack(parts).sum(0))
        return x + torch.stack(out).view(x.shape)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of either net, by name."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("adapters.").replace("/", "."): p for name, p in found.items()}


SHARED = {share: ShareLoRAConfig(rank=3, alpha=2, share=share, C="vector") for share in ("A", "B", "AB")}
CONFIGS: dict[str, Any] = {
    "lora": GLoRAConfig.lora(rank=4, alpha=3),
    "everything": FULL,
    "constants": GLoRAConfig("constant", "constant", "lora", "constant", "constant", rank=2),
    "hadamard": GLoRAConfig("lora", "lora", "lora", rank=2),
    "product": GLoRAConfig("lora", "vector", "none", "none", "vector", rank=2, variant="matmul"),
    "share A": SHARED["A"],
    "share AB": SHARED["AB"],
}
