"""Optimizers for low-rank factors, built from well-kept libraries; what is ours is which parameter goes where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from glora_kernels.integrations.optimizers import lora_fa_optimizer
from glora_kernels.methods.factors import LowRank, low_rank, refuse_shared
from glora_kernels.nn.model import unwrap
from glora_kernels.nn.ranks import refuse_sharded

KINDS = ("rite", "lora+", "lora-fa")


def optimizer(model: nn.Module, kind: str, lr: float, ratio: float = 16.0, **options: Any) -> torch.optim.Optimizer:
    """An optimizer for the trained parameters of a model.

    | kind      | what                                                                          | from              |
    |-----------|-------------------------------------------------------------------------------|-------------------|
    | "rite"    | LoRA-RITE: the same change of W for every choice of the factors D and U       | pytorch-optimizer |
    | "lora+"   | AdamW with the learning rate ratio·lr for U                                   | PyTorch           |
    | "lora-fa" | D is frozen, U takes g_U·(D·Dᵀ)⁻¹/s² by Adam                                  | PEFT              |

    LoRA-RITE leaves out steps whose gradient, per element and in the basis of the other factor, is above 1 (root mean
    square): for losses that are sums, scale them or give `update_skipping=0.0`. It diverges where U begins at 0 and the
    gradient of the layer's output has a rank below R (right under a head of R classes or fewer): take a smaller R.

    What is not a low-rank factor (vectors, heads) is in a group of its own: AdamW's for "lora+", and AdamW-like for
    "lora-fa"; "rite" has no rule for it and refuses.

    Args:
        model: with GLoRA layers, or LoRA layers of PEFT.
        kind: "rite", "lora+" or "lora-fa".
        lr: the learning rate; "lora+": of D.
        ratio: "lora+": of U's learning rate to D's, usually 16.
        options: of the optimizer (betas, eps, weight_decay, ...).

    Raises:
        ValueError: another kind; "rite" or "lora-fa" with shared or sharded factors, or with maps on them; "rite" with
            trained parameters that are no factors, or with 16-bit factors on a CPU, whose QR decomposition PyTorch has
            not.
        ImportError: the library is not installed (`pip install 'glora_kernels[recipes]'`).

    Source: Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", 2024;
    Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024; Zhang et al., "LoRA-FA: Memory-efficient
    Low-rank Adaptation for Large Language Models Fine-tuning", 2023.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> optimizer = gk.optimizer(model, "lora+", lr=1e-4, ratio=16)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0001, 0.0016]
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
    layers = low_rank(model, "optimizer")
    if kind != "lora+":
        refuse_sharded(unwrap(model), f"optimizer: {kind!r}", "it needs whole factors; use kind='lora+'")
        for own in layers.values():
            refuse_shared(layers, own, f"optimizer: {kind!r}", "use share='none', or kind='lora+'")
            if own.of_experts:
                raise ValueError(
                    f"optimizer: {own.path!r} adapts the parameters of experts, which {kind!r} cannot pair"
                )
            if own.up.maps or own.down.maps:
                raise ValueError(f"optimizer: {kind!r} takes factors as they are, and {own.path!r} has a map on them")
    return _MAKE[kind](layers, _others(model, layers), lr, ratio, options)


def _others(model: nn.Module, layers: dict[str, LowRank]) -> dict[str, nn.Parameter]:
    """The trained parameters that are neither U nor D of a layer, by name."""
    factors = {id(p) for own in layers.values() for p in (own.up.parameter, own.down.parameter)}
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad and id(p) not in factors}


def _rite(
    layers: dict[str, LowRank], others: dict[str, nn.Parameter], lr: float, ratio: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import LoRARite
    except ImportError as error:
        raise ImportError("LoRA-RITE needs pytorch-optimizer: pip install 'glora_kernels[recipes]'") from error
    if others:
        raise ValueError(
            f"optimizer: 'rite' has a rule for pairs of factors only, and {next(iter(others))!r} is trained as "
            "well: freeze it, or give it an optimizer of its own"
        )
    pairs = [(own.path, (own.down.parameter, own.up.parameter)) for own in layers.values()]
    for path, pair in pairs:
        if any(p.device.type == "cpu" and p.dtype in (torch.bfloat16, torch.float16) for p in pair):
            raise ValueError(
                f"optimizer: 'rite' takes QR decompositions, which PyTorch has not for {pair[0].dtype} on a CPU "
                f"({path!r}); use adapter_dtype=torch.float32"
            )
        if not all(p.requires_grad for p in pair):
            raise ValueError(f"optimizer: 'rite' trains both factors, and one of {path!r} is frozen")
    return LoRARite([p for _, pair in pairs for p in pair], lr=lr, **options)  # D before U: it pairs them by order


def _plus(
    layers: dict[str, LowRank], others: dict[str, nn.Parameter], lr: float, ratio: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    if not ratio > 0:
        raise ValueError(f"optimizer: ratio must be positive, got {ratio!r}")
    ups = dict.fromkeys(own.up.parameter for own in layers.values() if own.up.parameter.requires_grad)
    downs = dict.fromkeys(own.down.parameter for own in layers.values() if own.down.parameter.requires_grad)
    groups = [
        {"params": list(downs), "lr": lr},
        {"params": list(ups), "lr": ratio * lr},
        {"params": list(others.values()), "lr": lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], **options)


def _fa(
    layers: dict[str, LowRank], others: dict[str, nn.Parameter], lr: float, ratio: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    pairs = [(own.down.parameter, own.up.parameter, own.scale) for own in layers.values()]
    made = lora_fa_optimizer(pairs, list(others.values()), lr, options)
    for down, _, _ in pairs:
        down.requires_grad_(False)
    return made


_MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {"rite": _rite, "lora+": _plus, "lora-fa": _fa}
