"""GLoRA, literally: build W_eff and the bias, then apply one linear layer. Slow, dense, differentiable by autograd.

    y = x (W + s_A·W∘A + s·B)ᵀ + [ b + b∘D + E + W·C ]        variant "hadamard"
    y = x (W + s_A·W·A + s·B)ᵀ + [ b + b∘D + E + W·C ]        variant "matmul", A = A_up·A_down (K,K)

The weight of a convolution, (N, channels, *kernel), stands for the (N,K) that it is flattened to; there W·A is the
product over the channels.

Nothing here is clever, on purpose: in float64 it is the truth that the factored path and the kernels are compared
with, and in 16 bits it is the plain computation (a dense W_eff) that bounds their error (`tolerance`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from glora_kernels.spec import GLoRAConfig


def effective_weight(weight: Tensor, params: Mapping[str, Tensor], config: GLoRAConfig) -> Tensor:
    """W + s_A·W∘A + s·B (or W + s_A·W·A + s·B), a tensor of the shape and dtype of `weight`.

    Args:
        weight: W, (N, K), or (N, channels, *kernel) of a convolution.
        params: the supports by the names of `GLoRAConfig.parameter_shapes`.
        config: which supports exist; its scale s multiplies B="lora" only, s_A A="lora" only.
    """
    params = {name: value.to(weight.dtype) for name, value in params.items()}
    effective, rows = weight, (-1, *[1] * (weight.ndim - 1))
    if config.A == "lora":
        a = config.scale_A * (params["A_up"] @ params["A_down"])
        is_product = config.variant == "matmul"
        wa = (weight.movedim(1, -1) @ a).movedim(-1, 1) if is_product else weight * a.view(weight.shape)
        effective = effective + wa
    elif config.A == "vector":
        effective = effective + weight * params["A"].view(rows)
    elif config.A == "constant":
        effective = effective + weight * params["A"]
    if config.B == "lora":
        effective = effective + config.scale * (params["B_up"] @ params["B_down"]).view(weight.shape)
    elif config.B == "vector":
        effective = effective + params["B"].view(rows)
    elif config.B == "constant":
        effective = effective + params["B"]
    return effective


def effective_bias(
    weight: Tensor, bias: Tensor | None, params: Mapping[str, Tensor], config: GLoRAConfig
) -> Tensor | None:
    """b + b∘D + E + W·C, an (N,) tensor; None where there is neither a bias nor C nor E. C multiplies the base W."""
    params = {name: value.to(weight.dtype) for name, value in params.items()}
    effective = None if bias is None else bias.to(weight.dtype)
    if effective is not None and config.D != "none":
        effective = effective + effective * params["D"]
    if config.E != "none":
        e = params["E"].expand(weight.shape[0])
        effective = e if effective is None else effective + e
    if config.C != "none":
        c = (params["C_up"] @ params["C_down"]).squeeze(-1) if config.C == "lora" else params["C"]
        wc = weight.flatten(1) @ c
        effective = wc if effective is None else effective + wc
    return effective


def glora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    params: Mapping[str, Tensor],
    config: GLoRAConfig,
    keep: Tensor | None = None,
) -> Tensor:
    """y = x W_effᵀ + bias, (..., N).

    Args:
        x: (..., K).
        weight: W, (N, K).
        bias: b, (N,), or None.
        params: the supports by name.
        config: which supports exist.
        keep: the boolean dropout mask, of x's shape: B=lora then acts on x̃ = keep·x/(1-p), not on x. None: no dropout.
    """
    full_bias = effective_bias(weight, bias, params, config)
    if keep is None or config.B != "lora":
        return torch.nn.functional.linear(x, effective_weight(weight, params, config), full_bias)
    without_b = replace(config, B="none", alpha=None, dropout=0.0)
    y = torch.nn.functional.linear(x, effective_weight(weight, params, without_b), full_bias)
    dropped = torch.where(keep, x / (1.0 - config.dropout), torch.zeros_like(x))
    b = (params["B_up"] @ params["B_down"]).to(x.dtype)
    return y + config.scale * torch.nn.functional.linear(dropped, b)
