"""LoRA-RITE: an optimizer under which the change of W does not depend on how U·D is written.

Source: Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", 2024 (arXiv
2410.20625).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from glora_kernels.methods.optimizers import optimizer


def lora_rite(model: nn.Module, lr: float = 1e-3, **options: Any) -> torch.optim.Optimizer:
    """pytorch-optimizer's `LoRARite` over the pairs of factors of a model; see `optimizer`, kind "rite".

    Any rewriting U → U·M, D → M⁻¹·D of the factors leaves the trained ΔW what it is, where Adam's depends on it.
    """
    return optimizer(model, "rite", lr, **options)
