"""What quantizing a model leaves alone, and who owns what afterwards."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import glora_kernels as gk


def test_a_loaded_state_is_its_own():
    """Neither the other model nor the checkpoint changes when the one that loaded it is merged."""
    torch.manual_seed(0)
    first, second = (gk.quantize(nn.Linear(64, 48), "nf4", double_quant=True) for _ in range(2))
    checkpoint = first.state_dict()
    kept = {name: value.clone() for name, value in checkpoint.items()}
    addresses = [tensor.data_ptr() for tensor in second.quant_state.tensors()]
    second.load_state_dict(checkpoint)
    assert [tensor.data_ptr() for tensor in second.quant_state.tensors()] == addresses
    x = torch.randn(3, 64)
    before = first(x)
    assert torch.equal(before, second(x))
    layer = gk.GLoRALinear.from_linear(second, gk.GLoRAConfig(A="vector", B="none", E="none"))
    nn.init.constant_(layer.A, 0.5)
    layer.merge(requantize=True)
    assert torch.equal(first(x), before)
    assert all(torch.equal(checkpoint[name], value) for name, value in kept.items())


def test_quantizing_that_fails_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    nn.init.constant_(model[1].weight, 3e38)
    with pytest.raises(ValueError, match=r"'1'.*too large"):
        gk.quantize(model, "nf4", double_quant=True)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_an_integer_x_is_refused_before_any_cast(compute_dtype):
    layer = gk.quantize(nn.Linear(64, 32), "nf4", compute_dtype=compute_dtype)
    x = torch.ones(2, 64, dtype=torch.uint8)
    for module in (layer, gk.GLoRALinear.from_linear(layer, gk.GLoRAConfig.lora(rank=2))):
        with pytest.raises(TypeError, match=r"uint8.*wo"):
            module(x)


def test_the_layer_that_was_quantized_keeps_its_own_bias():
    linear = nn.Linear(64, 32)
    assert gk.quantize(linear).bias.data_ptr() != linear.bias.data_ptr()


def test_t5_keeps_its_wo():
    config = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=32, decoder_start_token_id=0
    )
    model = gk.quantize(transformers.T5ForConditionalGeneration(config), "nf4")
    kinds = {path.rpartition(".")[2]: type(module) for path, module in model.named_modules()}
    assert kinds["wo"] is nn.Linear
    assert kinds["wi"] is kinds["q"] is gk.QuantizedLinear
    ids = torch.tensor([[1, 2, 3]])
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)
