"""`warmup` runs the layers of PEFT models that are on our operators, as a step would, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreted, warmup
from peft import LoraConfig, get_peft_model
from torch import nn

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig, ShareLoRAPeftConfig

pytestmark = interpreted
CONFIGS = {
    "accelerated": LoraConfig(r=4, target_modules=["0", "1", "2"], lora_dropout=0.5),
    "gkglora": GLoRAPeftConfig(r=4, target_modules=["0", "1", "2"]),
    "gksharelora": ShareLoRAPeftConfig(r=4, target_modules=["0", "1", "2"]),
}


def made(method, four_bit=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    if four_bit:
        net = gk.quantize(net, target_modules=["0", "1", "2"])
    model = get_peft_model(net, CONFIGS[method])
    return gk.accelerate(model, verbose=False) if method == "accelerated" else model


@pytest.mark.parametrize("method", CONFIGS)
def test_what_it_launches_is_what_a_step_launches(method, launched):
    model = made(method)
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    lines = warmup(model, [16])
    assert [line.split()[0] for line in lines] == ["2", "1"]
    assert "forward and backward with 16 tokens" in lines[0]
    warmed = {name for name, _ in launched}
    launched.clear()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    with gk.backend("triton"):
        model(torch.randn(16, 64, requires_grad=True)).sum().backward()
    assert warmed == {name for name, _ in launched} != set()


def test_over_4_bits_and_in_evaluation(launched):
    model = made("gkglora", four_bit=True)
    assert len(warmup(model, [16], training=False)) == 2
    assert launched
    launched.clear()
    with model.disable_adapter():
        assert warmup(model, [16]) == []
    model.merge_adapter()
    assert warmup(model, [16]) == []
    assert not launched


def test_models_without_such_layers():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"or accelerate\(model\) on a model of PEFT"):
        gk.warmup(model)
