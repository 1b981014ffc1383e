"""Over a base of 16 bits, PEFT's fp32 adapters get gradients as good as PEFT's, however small the factors or dy are.

The truth is float64 over the same rounded numbers. PEFT multiplies the factors in fp32 there, so that what a layer's
own rounding to 16 bits leaves of a gradient is what ours may leave of it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import GloraConfig, HiraConfig, LoraConfig, get_peft_model
from torch import nn
from twins import Twins, step

import glora_kernels as gk

CONFIGS = {
    "lora": lambda **more: LoraConfig(r=4, **more),
    "hira": lambda **more: HiraConfig(r=4, **more),
    "glora": lambda **more: GloraConfig(r=4, **more),
    "glora, vectors": lambda **more: GloraConfig(r=4, config_A_B="vector", config_C="vector", **more),
}
UPS = ("lora_B", "hira_B", ".Xd", ".X")
"""Of the parameters that start at zero."""


def drawn(model, size):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                std = size if any(part in name for part in UPS) and not name.endswith("Xu") else 0.3
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def error(got, truth):
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("size", "dy_size"), [(1e-3, 1.0), (1e-4, 1e-5), (1e-6, 1e-5), (30.0, 1.0)])
def test_gradients_of_one_layer(calls, method, dtype, size, dy_size):
    torch.manual_seed(0)
    base = nn.ModuleDict({"up": nn.Linear(64, 32)}).to(dtype)
    model = drawn(get_peft_model(base, CONFIGS[method](target_modules=["up"])), size)
    layer = model.base_model.model["up"]
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    pair = Twins(layer, calls)
    x, dy = torch.randn(3, 20, 64).to(dtype), (dy_size * torch.randn(3, 20, 32)).to(dtype)
    truth = step(copy.deepcopy(layer).double(), x.double(), dy.double())
    expected, got = step(pair.plain, x, dy), step(pair.fast, x, dy)
    assert len(calls) == 1
    # A product with W in 16 bits is rounded, PEFT's as ours; what W has no part in is exact to fp32.
    through_w = {"lora": (), "hira": ("hira",), "glora": ("glora_A", "glora_C")}[method.partition(",")[0]]
    for name in truth.keys() - {"x", "y"}:
        bits = torch.finfo(dtype).eps if any(part in name for part in through_w) else 1e-5
        bound = max(2 * error(expected[name], truth[name]), bits)
        assert bool(got[name].isfinite().all()), name
        assert error(got[name], truth[name]) <= bound, (name, bound)


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5, 1e-6])
def test_gradients_of_a_small_llama_in_fp16(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    plain = get_peft_model(LlamaForCausalLM(config).half(), LoraConfig(r=4, target_modules="all-linear"))
    drawn(plain, size)
    fast, exact = gk.accelerate(copy.deepcopy(plain), verbose=False), copy.deepcopy(plain).double()
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    for model in (plain, fast, exact):
        (model(input_ids=tokens, labels=tokens).loss * 128).backward()
    assert gk.acceleration(fast).fallbacks == {}
    for part in ("lora_A", "lora_B"):
        pefts, got, truth = (
            torch.cat([p.grad.flatten().double() for name, p in model.named_parameters() if part in name])
            for model in (plain, fast, exact)
        )
        assert error(got, truth) <= 2 * error(pefts, truth), part
