"""`merge_and_unload` leaves the plain modules that a model had, and what other tools do with such modules works."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, QuantizedLinear
from glora_kernels.nn.model import named_layers

SHIFTED = GLoRAConfig("vector", "lora", "vector", "none", "vector", rank=2)
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class OwnLinear(nn.Linear):
    """A subclass that computes as `nn.Linear` does."""


def net():
    torch.manual_seed(0)
    return nn.Sequential(OwnLinear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def kinds(model):
    return [(path, type(module)) for path, module in model.named_modules()]


def near(left, right):
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_the_modules_are_those_that_the_model_had(full, randomize):
    model = net()
    model[2].bias.requires_grad_(False)
    before, weight = kinds(model), model[0].weight
    randomize(gk.inject(model, full)).eval()
    y = model(X)
    assert gk.merge_and_unload(model) is model
    assert kinds(model) == before
    assert model[0].weight is weight
    near(model(X), y)
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert not model[0].training
    assert b"glora" not in pickle.dumps(model.state_dict())
    assert not any("glora" in k for m in model for k in vars(m))
    net().load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="no GLoRA layer"):
        gk.merge_and_unload(model)


def test_a_merged_model_a_layer_alone_and_one_used_twice(full, randomize):
    model = randomize(gk.inject(net(), full)).eval()
    y = model(X)
    gk.merge(model)
    near(gk.merge_and_unload(model)(X), y)
    layer = randomize(gk.inject(nn.Linear(8, 8), full)).eval()
    y = layer(X)
    plain = gk.merge_and_unload(layer)
    assert type(plain) is nn.Linear
    near(plain(X), y)
    linear = nn.Linear(8, 8)
    model = randomize(gk.inject(nn.Sequential(linear, nn.Tanh(), linear), full)).eval()
    y = model(X)
    gk.merge_and_unload(model)
    assert model[0] is model[2]
    near(model(X), y)


def test_what_inject_put_on_other_modules_is_gone(vit, randomize):
    model = randomize(gk.inject(vit(), gk.ShareLoRAConfig(rank=2, tie_siblings=True), train=["classifier"])).eval()
    gk.fuse_siblings(model)
    x = torch.randn(3, 4, 12)
    y = model(x)
    gk.merge_and_unload(model)
    near(model(x), y)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert b"glora_kernels" not in pickle.dumps(model)
    again = gk.inject(model, GLoRAConfig(rank=2))
    assert named_layers(again)


def test_hooks_go_on_to_the_plain_module(full):
    model, calls = gk.inject(net(), full), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    gk.merge_and_unload(model)
    model(X)
    assert calls == [1]
    handle.remove()
    model(X)
    assert calls == [1]


@pytest.mark.parametrize("kind", ["QuantizedLinear", "Linear4bit"])
def test_layers_in_4_bits(kind, randomize):
    model = gk.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), double_quant=True)
    if kind == "Linear4bit":
        pytest.importorskip("bitsandbytes")
        model = nn.Sequential(*(layer.to_linear4bit() for layer in model))
    x = torch.randn(3, 64)
    randomize(gk.inject(model, GLoRAConfig(rank=2)))
    model.eval()
    y = model(x)
    with pytest.raises(RuntimeError, match=r"2 of 2 layers are in 4 bits"):
        gk.merge_and_unload(model)
    assert torch.equal(model(x), y)
    gk.merge(model, requantize=True)
    y = model(x)
    gk.unmerge(model)
    with pytest.warns(UserWarning, match="rounded to 4 bits"):
        gk.merge_and_unload(model, requantize=True)
    assert [type(layer).__name__ for layer in model] == [kind, kind]
    assert not any(isinstance(layer, QuantizedLinear) for layer in model) or kind == "QuantizedLinear"
    near((model if kind == "QuantizedLinear" else nn.Sequential(*map(QuantizedLinear.from_linear4bit, model)))(x), y)


def test_it_is_refused_before_anything_changes(full, randomize):
    model = randomize(gk.inject(net().half(), full)).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[2].B_up[0, 0] = before["2.B_up"][0, 0] = 6e4
        model[2].B_down[0, 0] = before["2.B_down"][0, 0] = 6e4
    for act in (gk.merge, gk.merge_and_unload):
        with pytest.raises(ValueError, match=r"'2': the merged weight holds .* beyond torch.float16 in 2 places"):
            act(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.merged for layer in named_layers(model).values())
    model[2].forward = model[2].forward
    with pytest.raises(ValueError, match="the forward of '2' was replaced"):
        gk.merge_and_unload(model)


def test_llama_keeps_its_new_biases(llama, randomize, tmp_path):
    model, ids = llama(), torch.arange(6)[None]
    randomize(gk.inject(model, SHIFTED, target_modules=["q_proj", "up_proj"]), std=0.1)
    y = model(ids).logits
    with pytest.warns(UserWarning, match=r"config\.attention_bias = True, config\.mlp_bias = True"):
        gk.merge(model)
    assert not model.config.attention_bias
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = gk.merge_and_unload(model)
    near(model(ids).logits, y)
    model.save_pretrained(tmp_path)
    near(type(model).from_pretrained(tmp_path)(ids).logits, y)


def test_where_no_flag_keeps_a_bias_it_is_said(randomize):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = randomize(gk.inject(transformers.T5EncoderModel(config), SHIFTED, target_modules=["q"]))
    with pytest.warns(UserWarning, match=r"no flag of a configuration was found .*\.q'.*E='none'"):
        gk.merge(model)
    model = gk.inject(nn.Sequential(nn.Linear(4, 4, bias=False)), SHIFTED)
    with pytest.warns(UserWarning, match="1 of them, '0' first"):
        gk.merge_and_unload(model)


def test_gpt2_has_its_conv1d_again(gpt2, full, randomize, tmp_path):
    model, ids = gpt2(), torch.arange(6)[None]
    before = kinds(model)
    randomize(gk.inject(model, full), std=0.05)
    y = model(ids).logits
    model = gk.merge_and_unload(model)
    assert kinds(model) == before
    model.save_pretrained(tmp_path)
    near(type(model).from_pretrained(tmp_path)(ids).logits, y)


def test_other_tools_take_the_result(full, randomize):
    model = randomize(gk.inject(net(), full)).eval()
    y = model(X)
    model = gk.merge_and_unload(model)
    near(torch.jit.trace(model, X)(X), y)
    near(torch.export.export(model, (X,)).module()(X), y)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear, OwnLinear})
    assert "quantized" in type(quantized[2]).__module__


def test_onnx(full):
    pytest.importorskip("onnxscript")
    model = gk.merge_and_unload(gk.inject(net(), full)).eval()
    torch.onnx.export(model, (X,), io.BytesIO())


def test_what_was_trained_in_fp32_is_in_16_bits_again(randomize):
    model = gk.inject(net().bfloat16(), GLoRAConfig.lora(rank=2), target_modules=["0"], train=["2"])
    randomize(model).eval()
    weight, y = model[2].weight, model(X.bfloat16())
    assert weight.dtype == torch.float32
    gk.merge_and_unload(model)
    assert model[2].weight is weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(X.bfloat16()), y, rtol=0.05, atol=0.05)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "glora" in "".join(vars(m)) for m in model)


def test_what_16_bits_cannot_hold_is_refused(full):
    model = gk.inject(net().half(), full, target_modules=["0"], train=["2"])
    with torch.no_grad():
        model[2].weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"2\.weight, trained in torch\.float32, holds numbers beyond torch\.float16"):
        gk.merge_and_unload(model)
    assert not model[0].merged
    assert model[2].weight.dtype == torch.float32


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bits", [32, 4])
def test_unload_gives_the_model_as_it_was(bits, merged, randomize):
    model = net()
    model[2].bias.requires_grad_(False)
    if bits == 4:
        model = gk.quantize(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8)))
    x = torch.randn(3, model[0].in_features)
    before, state, y = kinds(model), copy.deepcopy(model.state_dict()), model(x)
    grads = [p.requires_grad for p in model.parameters()]
    randomize(gk.inject(model, SHIFTED)).eval()
    gk.add_adapter(model, "b", GLoRAConfig(rank=3))
    if merged:
        gk.merge(model, requantize=True)
    assert gk.unload(model) is model
    assert kinds(model) == before
    assert model[0].bias is not None if bits == 32 else model[0].bias is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(model(x), y)


def test_unload_is_refused_inside_a_context(full):
    model = gk.inject(net(), full)
    with gk.disabled(model), pytest.raises(RuntimeError, match="inside a context"):
        gk.unload(model)
    with gk.rows(model, [None] * 3), pytest.raises(RuntimeError, match="inside a context"):
        gk.unload(model)
    assert type(gk.unload(gk.inject(nn.Linear(4, 4), full))) is nn.Linear
