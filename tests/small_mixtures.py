"""Small mixtures of experts of transformers: configurations, and a net of one experts module of any family."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
import transformers
from torch import Tensor, nn

EXPERTS, HIDDEN, EACH = 4, 32, 2
_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def config_of(family: str) -> Any:
    """A small configuration of a family."""
    if family == "mixtral":
        return transformers.MixtralConfig(**_COMMON, num_local_experts=EXPERTS, num_experts_per_tok=EACH)
    if family == "qwen3":
        return transformers.Qwen3MoeConfig(
            **_COMMON, head_dim=8, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3
        )
    if family == "gpt-oss":
        return transformers.GptOssConfig(
            **_COMMON, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=EACH,
            layer_types=["full_attention"] * 2, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )  # fmt: skip
    assert family == "deepseek-v3"
    return transformers.DeepseekV3Config(
        **{**_COMMON, "num_key_value_heads": 4}, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
    )  # fmt: skip


CLASSES = {
    "mixtral": transformers.MixtralForCausalLM,
    "qwen3": transformers.Qwen3MoeForCausalLM,
    "gpt-oss": transformers.GptOssForCausalLM,
    "deepseek-v3": transformers.DeepseekV3ForCausalLM,
}


def filled(module: nn.Module) -> nn.Module:
    """The model, what its class left at zero drawn at random."""
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


def experts_of(family: str, count: int | None = None) -> Any:
    """The experts module of a family, its weights not set."""
    module, name = {
        "mixtral": ("mixtral", "MixtralExperts"), "qwen3": ("qwen3_moe", "Qwen3MoeExperts"),
        "gpt-oss": ("gpt_oss", "GptOssExperts"), "deepseek-v3": ("deepseek_v3", "DeepseekV3Experts"),
    }[family]  # fmt: skip
    config = copy.deepcopy(config_of(family))
    if count is not None:
        config.num_local_experts = count
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)(config)


class Mixture(nn.Module):
    """A router and an experts module of transformers."""

    def __init__(self, family: str = "mixtral", experts: nn.Module | None = None, count: int | None = None) -> None:
        super().__init__()
        if experts is None:
            experts = experts_of(family, count)
        self.router, self.experts = nn.Linear(HIDDEN, count or getattr(experts, "num_experts", EXPERTS)), experts
        for parameter in experts.parameters():  # its class leaves them empty
            nn.init.normal_(parameter, std=0.2)
        self.each = min(EACH, self.router.out_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weights, index = self.router(rows).softmax(-1).topk(self.each, -1)
        return x + self.experts(rows, index, weights).view(x.shape)
