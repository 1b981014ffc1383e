"""Our PEFT methods over weights that several layers have: merged as PEFT merges them, and undone bit for bit."""

import copy
import itertools

import pytest
import torch
from torch import nn

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
LORA = {"A": "none", "B": "lora"}
FULL = {"A": "vector", "B": "lora", "C": "vector", "D": "vector", "E": "vector"}


def net(base="dense"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    if base == "views":
        model[2].weight = nn.Parameter(model[0].weight.data)
    else:
        model[2].weight = model[0].weight
    if base == "biases":
        model[2].bias = model[0].bias
    if base == "quantized":
        gk.quantize(model, double_quant=True, target_modules=["0", "2"])
    if base == "Linear4bit":
        pytest.importorskip("bitsandbytes")
        gk.quantize(model, double_quant=True, target_modules=["0", "2"])
        for i in (0, 2):
            model[i] = model[i].to_linear4bit()
        model[2].weight = model[0].weight
    return model


def perturb(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and "base_layer" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def layers_of(model):
    return [layer for layer in model.modules() if hasattr(layer, "merged_adapters")]


def bits(layers):
    return [{name: value.clone() for name, value in layer.base_layer.state_dict().items()} for layer in layers]


def equal(left, right):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("forms", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("base", ["dense", "views", "biases", "quantized", "Linear4bit"])
def test_unmerging_in_any_order_restores_the_base(base, forms):
    model = peft.get_peft_model(net(base), GLoRAPeftConfig(r=4, target_modules=["0", "2"], **forms))
    model.add_adapter("other", GLoRAPeftConfig(r=2, target_modules=["0", "2"], **LORA))
    perturb(model)
    layers, y = layers_of(model), model(X)
    before = bits(layers)
    for first, last in itertools.permutations(layers):
        last.merge()
        alone = last.base_layer.weight.clone()
        last.unmerge()
        assert equal(bits(layers), before)
        model.merge_adapter(safe_merge=True)
        first.unmerge()
        assert torch.equal(last.base_layer.weight, alone), "what the other layer has merged stays"
        first.merge(adapter_names=["other"])
        last.unmerge()
        first.unmerge()
        assert equal(bits(layers), before)
        assert torch.equal(model(X), y)


def test_merged_is_what_peft_makes_of_it():
    ours = perturb(peft.get_peft_model(net(), GLoRAPeftConfig(r=4, target_modules=["0", "2"], **LORA)))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0", "2"])).eval()
    with torch.no_grad():
        for mine, layer in zip(layers_of(ours), layers_of(theirs), strict=True):
            layer.lora_A["default"].weight.copy_(mine.adapters["default"].B_down)
            layer.lora_B["default"].weight.copy_(mine.adapters["default"].B_up)
    for model in (ours, theirs):
        model.merge_adapter()
    torch.testing.assert_close(ours(X), theirs(X))
    torch.testing.assert_close(ours.merge_and_unload()(X), theirs.merge_and_unload()(X))


def test_a_copy_of_a_merged_model_is_undone_alone():
    model = perturb(peft.get_peft_model(net(), GLoRAPeftConfig(r=4, target_modules=["0", "2"], **FULL)))
    y = model(X)
    model.merge_adapter()
    copied, merged = copy.deepcopy(model), model(X)
    copied.unmerge_adapter()
    assert torch.equal(copied(X), y)
    assert torch.equal(model(X), merged)
    model.unmerge_adapter()
    assert torch.equal(model(X), y)


def test_a_part_of_a_weight_is_refused_while_the_whole_is_merged():
    model = net()
    model[2] = nn.Linear(64, 32)
    model[2].weight = nn.Parameter(model[0].weight.data[:32])
    adapted = perturb(peft.get_peft_model(model, GLoRAPeftConfig(r=4, target_modules=["0", "2"], **LORA)))
    whole, part = layers_of(adapted)
    whole.merge()
    with pytest.raises(ValueError, match="overlaps with that of another layer"):
        part.merge()
    whole.unmerge()
    part.merge()


def test_an_overflow_of_fp16_is_an_error_and_changes_nothing():
    model = perturb(peft.get_peft_model(net().half(), GLoRAPeftConfig(r=4, target_modules=["0", "2"], **LORA)))
    layer = layers_of(model)[0]
    before = bits([layer])
    with torch.no_grad():
        layer.adapters["default"].B_up.fill_(6e4)
        layer.adapters["default"].B_down.fill_(6e4)
    with pytest.raises(ValueError, match=r"beyond torch\.float16"):
        layer.merge()
    assert not layer.merged
    assert equal(bits([layer]), before)
