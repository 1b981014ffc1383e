"""Small mixtures of experts of transformers: whole models, and a net of one experts module of any family."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from twins import randomized

BOTH = ("gate_up_proj", "down_proj")
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


class Mixture(nn.Module):
    """A router and an experts module of transformers."""

    def __init__(self, family: str = "mixtral", experts: nn.Module | None = None, count: int = EXPERTS) -> None:
        super().__init__()
        if experts is None:
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
            from transformers.models.mixtral.modeling_mixtral import MixtralExperts

            config = copy.deepcopy(config_of(family))
            config.num_local_experts = count
            experts = {"mixtral": MixtralExperts, "gpt-oss": GptOssExperts}[family](config)
        self.router, self.experts = nn.Linear(HIDDEN, count), experts
        for parameter in experts.parameters():  # its class leaves them empty
            nn.init.normal_(parameter, std=0.2)
        self.each = min(EACH, count)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        weights, index = self.router(rows).softmax(-1).topk(self.each, -1)
        return x + self.experts(rows, index, weights).view(x.shape)


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
