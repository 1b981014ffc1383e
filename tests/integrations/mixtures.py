"""Small mixtures of experts of transformers with PEFT's adapters."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from small_mixtures import CLASSES, EXPERTS, HIDDEN, Mixture, config_of, filled
from torch import nn
from twins import randomized

__all__ = [
    "BOTH",
    "CLASSES",
    "EXPERTS",
    "HIDDEN",
    "Mixture",
    "config_of",
    "filled",
    "language_model",
    "lora",
    "mixture",
]

BOTH = ("gate_up_proj", "down_proj")


def lora(targets: tuple[str, ...] = BOTH, prefix: str = "experts", **more: Any) -> LoraConfig:
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": [], **more}
    return LoraConfig(**given, target_parameters=[f"{prefix}.{target}" for target in targets])


def language_model(family: str, dtype: torch.dtype = torch.float64, adapter: LoraConfig | None = None) -> Any:
    """A causal language model with adapters over its experts and its attention."""
    torch.manual_seed(0)
    model = filled(CLASSES[family](config_of(family))).to(dtype)
    if dtype == torch.float64:
        for module in model.modules():  # DeepSeek asks for an fp32 buffer of the router
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.double() if buffer.is_floating_point() else buffer)
    model.config._experts_implementation = "eager" if dtype == torch.float64 else "grouped_mm"
    attention = ["q_a_proj" if family == "deepseek-v3" else "q_proj"]
    adapter = lora(prefix="mlp.experts", target_modules=attention) if adapter is None else adapter
    return randomized(get_peft_model(model, adapter, autocast_adapter_dtype=False))


def mixture(
    adapter: LoraConfig | None = None,
    dtype: torch.dtype = torch.float64,
    family: str = "mixtral",
    net: nn.Module | None = None,
    **more: Any,
) -> Any:
    torch.manual_seed(0)
    net = Mixture(family) if net is None else net
    net.experts.config._experts_implementation = "eager" if dtype == torch.float64 else "grouped_mm"  # type: ignore
    adapter = lora() if adapter is None else adapter
    return randomized(get_peft_model(net.to(dtype), adapter, **{"autocast_adapter_dtype": False, **more}))
