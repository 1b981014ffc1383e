"""The tiny language models that PEFT's tests load from the hub, made of configurations: each in a folder of its id.

`from_pretrained("trl-internal-testing/tiny-GptOssForCausalLM")` takes a folder of this path before it asks the hub, so
tests that run where such folders are need no hub. Weights are random, as those on the hub are.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
OPT: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 32}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4Text",
        {**GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOss", {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 2, "dtype": "bfloat16"},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", {}),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", {}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("Mistral", GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3Text", GROUPED),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2", GPT),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2", GPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJ", {**GPT, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT", OPT),
    "peft-internal-testing/opt-125m": ("OPT", OPT),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2", GPT),
}  # fmt: skip
"""The model type in transformers' class names, and what its configuration has besides `SIZES`, by id."""


def named_in(files: Iterable[Path]) -> list[str]:
    """Those of the models that test files load."""
    text = "".join(file.read_text() for file in files)
    return [name for name in MODELS if f'"{name}"' in text]


def build(names: Iterable[str], folder: Path) -> None:
    """Save the models of these ids below a folder."""
    import torch
    import transformers

    for name in names:
        kind, more = MODELS[name]
        config = getattr(transformers, f"{kind}Config")(**SIZES | more)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        model.save_pretrained(folder / name)
