"""A signal at any line while PEFT's layers are moved, or ours are merged: the old state or the new one."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "nn"))
from test_interrupts import at_every_line, copies, equal

peft = pytest.importorskip("peft")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def built(config, quantized=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    net[2].weight = net[0].weight
    if quantized:
        gk.quantize(net, target_modules=["0", "2"])
    model = peft.get_peft_model(net, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name and parameter.is_floating_point() and "base_layer" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("act", ["accelerate", "decelerate"])
def test_moving_layers(act):
    model = built(peft.LoraConfig(r=2, target_modules=["0", "2"]))
    y = model(X)
    calls = {"accelerate": lambda m: gk.accelerate(m, verbose=False), "decelerate": gk.decelerate}

    def check(m):
        assert len({gk.acceleration(m).accelerated.get("lora.Linear")} - {None, 2}) == 0
        torch.testing.assert_close(m(X), y)
        if gk.acceleration(m).accelerated:
            gk.decelerate(m)
        gk.accelerate(m, verbose=False)
        torch.testing.assert_close(m(X), y)

    at_every_line(copies(model if act == "accelerate" else calls["accelerate"](model)), calls[act], check, most=8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("act", ["merge_adapter", "unmerge_adapter"])
def test_merging_our_methods_over_tied_weights(act, quantized):

    def make():
        made = built(GLoRAPeftConfig(r=2, C="vector", E="vector", target_modules=["0", "2"]), quantized)
        if act == "unmerge_adapter":
            made.merge_adapter()
        return made

    model = make()
    if act == "unmerge_adapter":
        model.unmerge_adapter()
    before, y = copy.deepcopy(model.state_dict()), model(X)

    def check(m):
        m.unmerge_adapter()
        assert equal(m.state_dict(), before)
        assert torch.equal(m(X), y)
        m.merge_adapter()
        m.unmerge_adapter()
        assert equal(m.state_dict(), before)

    at_every_line(make, lambda m: getattr(m, act)(), check, most=8)
