"""Layers as people make them, on the dry card, through public names alone; in bf16, unless said otherwise."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import glora_kernels as gk
import glora_kernels.ops
from glora_kernels import GLoRAConfig
from glora_kernels.reference import cases
from glora_kernels.reference.cases import LORA

CONFIGS = cases.CONFIGS | {"product variant": cases.PRODUCT}


def tensor(*shape: int, device: str = "cuda", grad: bool = False) -> Tensor:
    """Of memory that nobody touches."""
    return torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=grad)


def linear(k: int = 4096, n: int = 4096, bias: bool = False, device: str = "cuda") -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, k, n, bias=bias, device=device, dtype=torch.bfloat16)


def layer(config: GLoRAConfig = LORA, k: int = 4096, n: int = 4096, device: str = "cuda") -> gk.GLoRALinear:
    """One with a bias where the configuration scales it."""
    return gk.GLoRALinear.from_linear(linear(k, n, config.D != "none", device), config)


@functools.cache
def codes(k: int = 4096, n: int = 4096) -> gk.QuantizedLinear:
    """A 4-bit base, of all layers of its size: a CPU takes a second to quantize it."""
    return gk.quantize(linear(k, n))


def nf4(config: GLoRAConfig = LORA) -> gk.GLoRALinear:
    return gk.GLoRALinear.from_linear(codes(), config)


class Attention(nn.Module):
    """q, k and v of LLaMA-3-8B, which take one x."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = layer(), layer(n=1024), layer(n=1024)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


def fused() -> Attention:
    attention = Attention()
    gk.fuse_siblings(attention)
    return attention


class One(nn.Module):
    """A model for PEFT, which takes models alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def peft(linear: nn.Linear, **config: Any) -> nn.Module:
    """PEFT's LoRA layer around a linear layer, its adapters in the dtype of the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        chosen = LoraConfig(target_modules=["linear"], **{"r": 16, "lora_alpha": 32, **config})
        return get_peft_model(One(linear), chosen, autocast_adapter_dtype=False)


def accelerated() -> nn.Module:
    return gk.accelerate(peft(linear()), verbose=False).base_model.model.linear


TRAINED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: ((lambda config=config: layer(config)), 512) for name, config in CONFIGS.items()},
    "q/k/v fused": (fused, 512),
    "PEFT, accelerated": (accelerated, 512),
    "NF4": (nf4, 2048),
    "64 experts": (lambda: Experts(), 512),
}
"""What is trained: how it is made, and M."""


class Many(nn.Module):
    """A base under LoRA adapters, of which each row has another; as a set, or as a list."""

    def __init__(self, count: int, kept: bool = True) -> None:
        super().__init__()
        adapters = [{"b_up": tensor(4096, 16), "b_down": tensor(16, 4096), "scale": 2.0} for _ in range(count)]
        self.weight, self.adapters = tensor(4096, 4096), gk.ops.AdapterSet(adapters) if kept else adapters

    def forward(self, x: Tensor) -> Tensor:
        return gk.ops.multi_glora_linear(x, self.weight, None, self.adapters, _rows(len(x)))


@functools.cache
def _rows(count: int) -> Tensor:
    """The assignment, which all layers of a step share."""
    return torch.arange(count, device="cuda")


class Experts(nn.Module):
    """The product of experts of a mixture, each with a LoRA: every row has one."""

    def __init__(self, count: int = 64) -> None:
        super().__init__()
        self.weight, self.count = tensor(1, 4096, 4096).expand(count, -1, -1), count
        self.up, self.down = (nn.Parameter(tensor(*size)) for size in ((count, 4096, 16), (count, 16, 4096)))

    def forward(self, x: Tensor) -> Tensor:
        adapters = {"b_up": self.up, "b_down": self.down, "scale": 2.0}
        return gk.ops.expert_glora_linear(x, self.weight, None, adapters, index=_rows(len(x)) % self.count)


DECODED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "decode": (layer, 1),
    "decode, NF4": (nf4, 1),
    "decode, 64 experts": (Experts, 8),
    **{f"decode, {j} adapters": ((lambda j=j: Many(j)), j) for j in (1, 8, 32, 128)},
    **{f"decode, {j} adapters as a list": ((lambda j=j: Many(j, kept=False)), j) for j in (1, 8, 32, 128)},
}
"""What is asked for a token, without gradients, and M."""


def forward(module: nn.Module, x: Tensor) -> list[Tensor]:
    y = module(x)
    return [y] if isinstance(y, Tensor) else list(y)


def step(module: nn.Module, x: Tensor) -> None:
    """Forward and backward, and no gradients left."""
    ys = forward(module, x)
    torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    x.grad = None
    module.zero_grad()
