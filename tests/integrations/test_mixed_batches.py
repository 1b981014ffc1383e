"""Batches whose examples have different adapters (adapter_names): each as its adapter alone has it, in one call."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from twins import randomized

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig

NAMES = ["default", "wide", "__base__", "rs", "default", "dropping"]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def with_adapters(method):
    """A model with adapters that differ in rank, scale, dropout and forms, none of them zero."""
    if method == "lora":
        more = {
            "wide": LoraConfig(r=12, lora_alpha=6, target_modules=TARGETS),
            "rs": LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS[:2]),
            "dropping": LoraConfig(r=2, lora_dropout=0.5, target_modules=TARGETS),
        }
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS), autocast_adapter_dtype=False)
    else:
        more = {
            "wide": GLoRAPeftConfig(r=12, A="vector", B="lora", C="lora", E="vector", target_modules=TARGETS),
            "rs": GLoRAPeftConfig(r=4, A="lora", B="vector", target_modules=TARGETS[:2]),
            "dropping": GLoRAPeftConfig(r=2, B="lora", dropout=0.5, target_modules=TARGETS),
        }
        model = get_peft_model(llama(), GLoRAPeftConfig(r=4, target_modules=TARGETS), autocast_adapter_dtype=False)
    for name, config in more.items():
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    return gk.accelerate(randomized(model).eval(), verbose=False)


def alone(model, call):
    """What `call(model, example)` gives for each example with its adapter active for the whole model."""
    found = []
    for i, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                found.append(call(model, i))
        else:
            model.set_adapter(name)
            found.append(call(model, i))
    return found


@pytest.mark.parametrize("method", ["lora", "glora"])
def test_every_example_as_its_adapter_alone(method):
    model, tokens = with_adapters(method), torch.randint(2, 50, (6, 7), generator=torch.Generator().manual_seed(0))
    wanted = alone(model, lambda m, i: m(tokens[i : i + 1]).logits)
    mixed = model(tokens, adapter_names=NAMES).logits
    assert torch.allclose(mixed, torch.cat(wanted), rtol=0, atol=1e-10)
    assert not torch.allclose(mixed[0], model(tokens, adapter_names=NAMES[::-1]).logits[0], atol=1e-4)
    assert not any("adapter_names" in str(key) for key in gk.acceleration(model).fallbacks)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("method", ["lora", "glora"])
def test_generate(method, beams):
    model, tokens = with_adapters(method), torch.randint(2, 50, (6, 4), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    attend = torch.ones_like(tokens)
    wanted = alone(model, lambda m, i: m.generate(input_ids=tokens[i : i + 1], attention_mask=attend[i : i + 1], **how))
    mixed = model.generate(input_ids=tokens, attention_mask=attend, adapter_names=NAMES, **how)
    assert torch.equal(mixed, torch.cat(wanted))


def test_what_pefts_own_forward_answers():
    model, tokens = with_adapters("lora"), torch.randint(2, 50, (6, 3))
    only = model(tokens, adapter_names=["__base__"] * 6).logits
    with model.disable_adapter():
        assert torch.allclose(only, model(tokens).logits, rtol=0, atol=1e-12)
    merged = copy.deepcopy(model)
    merged.set_adapter("wide")
    merged.merge_adapter()
    refused = {
        "Length of `adapter_names`": (model, NAMES[:3]), "nobody": (model, ["nobody"] * 6), "merged": (merged, NAMES),
        "training mode": (copy.deepcopy(model).train(), NAMES),
    }  # fmt: skip
    for message, (each, names) in refused.items():
        with pytest.raises(ValueError, match=message):
            copy.deepcopy(each)(tokens, adapter_names=names)  # PEFT leaves its hooks behind an error
