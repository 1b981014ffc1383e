"""The codes of a `Linear4bit` stay as they are, on processors on which bitsandbytes repacks them in eval mode.

What it repacks has lost bits of its absmax for good, and lets no gradient through. Here every processor is such a one.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import nn

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig
from glora_kernels.quant.bnb import REPACKED

bnb = pytest.importorskip("bitsandbytes")
SIZE = 64


@pytest.fixture(autouse=True)
def _repacking(monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Unm|M)erge lora module|merged weights were rounded")
        yield


class Net(nn.Module):
    """Three quantized layers and one in fp32; the residual keeps a gradient where a layer swallows its own."""

    is_loaded_in_4bit = True

    def __init__(self):
        super().__init__()
        for name in ("first", "second", "third"):
            setattr(self, name, bnb.nn.Linear4bit(SIZE, SIZE, compute_dtype=torch.float32))
        self.head = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        for layer in (self.first, self.second, self.third):
            x = x + layer(x)
        return self.head(x)


METHODS = {"lora": LoraConfig, "hira": HiraConfig, "gkglora": GLoRAPeftConfig}
methods = pytest.mark.parametrize("method", METHODS)


def adapted(method, targets=("first", "second", "third"), **settings):
    torch.manual_seed(0)
    model = get_peft_model(Net().to("cpu"), METHODS[method](r=4, target_modules=list(targets), **settings))
    randomized(model)
    return model if method == "gkglora" else gk.accelerate(model, verbose=False)


def randomized(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)


def rows(requires_grad=False):
    return torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


def bases(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def gradients(model):
    model.train()
    model.set_adapter("default")
    model.zero_grad()
    model(rows()).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def disabled(model):
    with model.disable_adapter():
        model(rows())


def disabled_layers(model):
    model.base_model.disable_adapter_layers()
    model(rows())
    model.base_model.enable_adapter_layers()


def a_smaller_adapter(model):
    model.add_adapter("small", METHODS[method_of(model)](r=2, target_modules=["first"]))
    model.set_adapter("small")
    model(rows())


def no_adapter(model):
    model.base_model.set_adapter([])
    model(rows())


def mixed(model):
    model(rows(), adapter_names=["default", "__base__", "default", "__base__"])


def hooked(model):
    handles = [base.register_forward_hook(lambda *_: None) for base in bases(model)]
    with model.disable_adapter():
        model(rows())
    for handle in handles:
        handle.remove()


def called_alone(model):
    for base in bases(model):
        base(rows())


def method_of(model):
    return model.peft_config["default"].peft_type.lower()


CALLS = {
    function.__name__: function
    for function in (disabled, disabled_layers, a_smaller_adapter, no_adapter, mixed, hooked, called_alone)
}


@methods
@pytest.mark.parametrize("call", [*CALLS, "active"])
def test_a_call_in_eval_mode_changes_no_gradient(method, call):
    if (method, call) == ("hira", "mixed"):
        pytest.skip("PEFT's HiRA has no mixed batches")
    model = adapted(method)
    before, codes = gradients(model), [base.weight.data.clone() for base in bases(model)]
    model.eval()
    with torch.no_grad():
        CALLS.get(call, lambda model: model(rows()))(model)
    assert all(torch.equal(base.weight.data, kept) for base, kept in zip(bases(model), codes, strict=True))
    after = gradients(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-8)


@methods
def test_layers_without_an_adapter_keep_theirs(method):
    """The gradient of the first layer comes through the others."""
    model = adapted(method, targets=["first"])
    before = gradients(model)
    with torch.no_grad():
        model.eval()(rows())
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-8)


def test_layers_beside_those_of_inject_keep_theirs():
    torch.manual_seed(0)
    model = gk.inject(Net().to("cpu"), gk.GLoRAConfig(rank=4), target_modules=["first"])
    randomized(model)
    found = []
    for _ in range(2):
        model.zero_grad()
        model.train()(rows()).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        with torch.no_grad():
            model.eval()(rows())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)


@methods
def test_what_is_merged_is_not_repacked(method):
    model = adapted(method).eval()
    with torch.no_grad():
        model.merge_adapter()
        model(rows())
        assert not any(hasattr(base.weight.quant_state, "packing_format_for_cpu") for base in bases(model))
        model.unmerge_adapter()
        y = model(rows())
    torch.testing.assert_close(model.train()(rows()), y)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["head"]}])
def test_layers_on_pefts_path(settings):
    model = adapted("lora", **settings)
    before = gradients(model)
    with torch.no_grad():
        model.eval()(rows())
        model(rows().as_subclass(type("Tagged", (torch.Tensor,), {})))
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-8)


def test_decelerate_allows_it_again():
    """And what bitsandbytes has repacked trains no more, once it is ours: its gradients would be wrong."""
    model = gk.decelerate(adapted("lora")).eval()
    layer = model.base_model.model.first
    with torch.no_grad():
        layer.base_layer(rows())
    assert layer.base_layer.weight.quant_state.packing_format_for_cpu
    gk.accelerate(model, verbose=False)
    assert ("lora.Linear4bit", REPACKED) in gk.acceleration(model).kept
    with pytest.raises(RuntimeError, match=r"no gradient can be computed.*load the model again"):
        layer.train()(rows())
    for idle in (False, True):
        layer.enable_adapters(not idle)
        with pytest.raises(RuntimeError, match="no gradient can be computed"):
            layer(rows(requires_grad=True))


def test_our_methods_refuse_what_was_repacked():
    model = adapted("gkglora")
    layer = model.base_model.model.first
    weight = layer.base_layer.weight
    convert = bnb.functional._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = convert(weight.data, weight.quant_state)
    with pytest.raises(RuntimeError, match="repacked"):
        layer(rows())
    layer.enable_adapters(False)
    with pytest.raises(RuntimeError, match="no gradient can be computed"):
        layer(rows(requires_grad=True))


@methods
def test_merging_and_calls_in_inference_mode(method):
    """What is read of a base there is of use to backward afterwards."""
    model = adapted(method)
    with torch.inference_mode():
        model.merge_adapter()
        model.unmerge_adapter()
        model(rows())
    gradients(model)
    model.merge_adapter()
    model.unmerge_adapter()
    with torch.inference_mode():
        model(rows())
    assert all(bool(value.isfinite().all()) for value in gradients(model).values())
