"""diffusers' models, tiny and random, in float64: their inputs, a step, the truth by dense weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

from diffusers import (
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    ),
    "flux": lambda: FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=12,
        pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), **HEADS,
    ),
    "sd3": lambda: SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8, **HEADS,
    ),
    "sana": lambda: SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=12, mlp_ratio=1.5, sample_size=8, patch_size=1, **HEADS,
    ),
    "wan": lambda: WanTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=12, freq_dim=16, ffn_dim=20, num_layers=1,
        cross_attn_norm=True, rope_max_seq_len=32, num_attention_heads=2, attention_head_dim=12,
    ),
}  # fmt: skip
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def base_model(name: str) -> Any:
    """The model; what is initialised to zero or one, output layers and norms, is random too."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    shapes = {
        "unet": (2, 4, 8, 8),
        "flux": (2, 6, 4),
        "sd3": (2, 4, 8, 8),
        "sana": (2, 4, 8, 8),
        "wan": (2, 4, 2, 8, 8),
    }
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    found = {"sample" if name == "unet" else "hidden_states": random(*shapes[name])}
    found |= {"encoder_hidden_states": random(2, 5, 12), "timestep": torch.tensor([3, 7])}
    if name in ("flux", "sd3"):
        found["pooled_projections"] = random(2, 10)
    if name == "flux":
        found |= {"timestep": random(2), "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}
    return found


def output(model: nn.Module, name: str, dtype: torch.dtype = torch.float64, **more: Any) -> Tensor:
    return model(**inputs(name, dtype), **more).sample


def gradients(y: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of these tensors, for a random gradient of y; zeros where y does not depend on one."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y)
    found = torch.autograd.grad(y, list(tensors.values()), dy, materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def linear_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def convolution_paths(model: nn.Module) -> list[str]:
    """Those that are not grouped."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [path for path, module in model.named_modules() if isinstance(module, kinds) and module.groups == 1]


def moved_away(model: Any, size: float = 0.2) -> Any:
    """The model, every trained parameter away from zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(size * torch.randn_like(parameter))
    return model


def dense(base: nn.Module, name: str, changes: Mapping[str, tuple[Any, Any]]) -> Tensor:
    """The output of the base with other weights: path → (ΔW, Δb), as the formula says."""
    changed: dict[str, Tensor] = {}
    for path, (weight, bias) in changes.items():
        linear: Any = base.get_submodule(path)
        changed[f"{path}.weight"] = linear.weight.detach() + weight
        if linear.bias is not None:
            changed[f"{path}.bias"] = linear.bias.detach() + bias
    return functional_call(base, changed, (), inputs(name)).sample
