"""Quantizing whole models: which layers, what is left alone, and who owns what afterwards."""

from __future__ import annotations

import pytest
import torch
import transformers
from packed import FULL, TARGETS, packed_layers
from torch import nn

import glora_kernels as gk
from glora_kernels.quant import dequantize

QUANTIZED = {"embed", *(f"blocks.{i}.{n}" for i in range(2) for n in
             ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.0", "mlp.2"))}  # fmt: skip


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


def test_a_model_is_quantized_in_place_but_its_head(vit):
    model = vit()
    weights = {path: m.weight.clone() for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = model.classifier[1]
    assert gk.quantize(model, "nf4", double_quant=True, target_modules=TARGETS) is model
    assert set(packed_layers(model)) == QUANTIZED
    assert model.classifier[1] is head
    for path, layer in packed_layers(model).items():
        dense = dequantize(layer.base_weight(), torch.float32)
        assert (dense - weights[path]).norm() < 0.15 * weights[path].norm()
        assert not any(p.requires_grad for p in layer.parameters())
    assert model(torch.randn(2, 4, 12)).isfinite().all()


def test_default_targets_skip_the_head(llama):
    for tied in (False, True):
        model = llama(tied)
        gk.quantize(model)
        assert type(model.lm_head) is nn.Linear
        assert len(packed_layers(model)) == 14
        assert not model.training
        assert not any(layer.training for layer in packed_layers(model).values())


def test_conv1d_is_quantized_as_the_matrix_it_computes_with(gpt2):
    model = gpt2()
    conv = model.transformer.h[0].attn.c_attn
    weight, bias = conv.weight.t().clone(), conv.bias
    gk.quantize(model)
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.out_features, layer.in_features) == tuple(weight.shape)
    assert layer.bias is not None
    assert torch.equal(layer.bias, bias)
    expected = gk.quantize(linear_of(weight, bias), "nf4")
    assert torch.equal(layer.weight, expected.weight)


def linear_of(weight, bias):
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.detach().clone())
    return linear


def test_a_shared_layer_is_quantized_once():
    linear = nn.Linear(8, 8)
    model = gk.quantize(nn.Sequential(linear, nn.ReLU(), linear))
    assert model[0] is model[2]


@pytest.mark.parametrize(("change", "words"), [
    ({"quant_type": "int4"}, "quant_type"), ({"blocksize": 63}, "blocksize"),
    ({"compute_dtype": torch.int8}, "compute_dtype"),
    ({"target_modules": ["nothing"]}, "matches no module"), ({"target_modules": ["norm"]}, "no linear layer"),
])  # fmt: skip
def test_bad_arguments_leave_the_model(change, words):
    model = nn.Sequential()
    model.add_module("a", nn.Linear(8, 8))
    model.add_module("norm", nn.LayerNorm(8))
    with pytest.raises(ValueError, match=words):
        gk.quantize(model, **change)
    assert type(model.a) is nn.Linear


@pytest.mark.parametrize(("spoil", "error", "words"), [
    (lambda m: m[1].weight.data.fill_(float("nan")), ValueError, r"'1'.*NaN"),
    (lambda m: m[1].weight.data[0].fill_(float("inf")), ValueError, r"'1'.*NaN or inf"),
    (lambda m: m[1].double(), TypeError, r"'1'.*float64"),
    (lambda m: m[1].to("meta"), ValueError, r"'1'.*meta"),
    (lambda m: m[1].register_forward_hook(print), ValueError, r"'1'.*hooks"),
    (lambda m: m.__setitem__(1, gk.quantize(m[1])), ValueError, r"'1'.*4 bits already"),
    (lambda m: gk.inject(m[1:], FULL), ValueError, "GLoRA layers"),
])  # fmt: skip
def test_a_layer_that_cannot_be_quantized_leaves_the_whole_model(spoil, error, words):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    spoil(model)
    if "GLoRA" in words:
        model[1] = gk.inject(nn.Linear(8, 8), FULL)
    first, weight = model[0], model[0].weight.clone()
    with pytest.raises(error, match=words):
        gk.quantize(model)
    assert model[0] is first
    assert torch.equal(model[0].weight, weight)


def test_adapters_are_no_layers_to_quantize():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"quantize: the model has PEFT layers.*merge_and_unload"):
        gk.quantize(model)
    other = nn.ModuleDict({"wrapped": nn.Linear(64, 64), "lora_a": nn.Linear(64, 4), "lora_b": nn.Linear(4, 64)})
    with pytest.raises(ValueError, match=r"low-rank adapters.*lora_a"):
        gk.quantize(other)
    assert all(type(layer) is nn.Linear for layer in other.values())


def test_targets_and_exclusions_are_those_of_inject(vit):
    model = gk.quantize(vit(), target_modules="all-linear", exclude_modules=["embed", r"blocks\.0\..*"])
    assert set(packed_layers(model)) == {path for path in QUANTIZED if path.startswith("blocks.1")}
    with pytest.raises(ValueError, match="target_modules is empty"):
        gk.quantize(vit(), target_modules=[])
    with pytest.raises(ValueError, match=r"MultiheadAttention\.forward .* reads its weight"):
        gk.quantize(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)}))
