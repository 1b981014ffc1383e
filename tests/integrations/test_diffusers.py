"""diffusers' models: accelerated they compute what PEFT computes, injected what the formula says, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers_models import (
    MODELS,
    PROJECTIONS,
    base_model,
    convolution_paths,
    dense,
    gradients,
    linear_paths,
    moved_away,
    output,
)
from peft import GloraConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from twins import assert_same

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig

PRODUCT = {"A": "lora", "B": "lora", "C": "none", "D": "none", "E": "none", "variant": "matmul"}
every_model = pytest.mark.parametrize("name", MODELS)


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, name, **more):
    y = output(model, name, **more)
    return {"y": y.detach(), **gradients(y, trained(model))}


@every_model
def test_accelerated_one_step_is_pefts(name):
    model = base_model(name)
    paths = [path for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m is not model]
    paths = [path for path in paths if getattr(model.get_submodule(path), "groups", 1) == 1]
    model.add_adapter(LoraConfig(r=3, lora_alpha=4, target_modules=paths))
    moved_away(model)
    fast = gk.accelerate(copy.deepcopy(model), verbose=False)
    assert gk.acceleration(fast).accelerated["lora.Linear"] == len(linear_paths(base_model(name)))
    assert_same(step(fast, name), step(model, name))
    assert not [reason for (path, reason) in gk.acceleration(fast).fallbacks if "conv" not in path.lower()]


@every_model
def test_injected_it_computes_what_the_formula_says(name):
    """Linear layers and, but for grouped ones, convolutions: W·A and B of a kernel are products over its channels."""
    base = base_model(name)
    config = gk.GLoRAConfig(rank=3, alpha=4, alpha_A=5, **PRODUCT)
    paths = [*linear_paths(base), *convolution_paths(base)]
    model = moved_away(gk.inject(copy.deepcopy(base), config, paths))
    assert sum(isinstance(module, (gk.GLoRALinear, gk.GLoRAConv)) for module in model.modules()) == len(paths)
    values = {path: parameter.detach().clone().requires_grad_() for path, parameter in trained(model).items()}

    def change(path):
        up_a, down_a, up_b, down_b = (values[f"{path}.{factor}"] for factor in ("A_up", "A_down", "B_up", "B_down"))
        weight = base.get_submodule(path).weight.detach()
        of_a = torch.einsum("nc...,cr,rd->nd...", weight, up_a.flatten(1), down_a.flatten(1))
        return 5 / 3 * of_a + 4 / 3 * torch.einsum("nr,r...->n...", up_b.flatten(1), down_b).view_as(weight), 0

    y = dense(base, name, {path: change(path) for path in paths})
    assert_same(step(model, name), {"y": y.detach(), **gradients(y, values)})


# Strengths


FULL = {"A": "vector", "B": "lora", "C": "vector", "D": "vector", "E": "vector"}


def two_adapters(name):
    """A model with our adapters "product" and "full", and the change that each makes to a layer's W and b."""
    base = base_model(name)
    for path, linear in base.named_modules():  # with a bias, so that D, E and C have a place in the truth
        if path.endswith(tuple(PROJECTIONS)) and linear.bias is None:
            linear.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=torch.float64))
    model = copy.deepcopy(base)
    model.add_adapter(GLoRAPeftConfig(r=3, target_modules=PROJECTIONS, **PRODUCT), "product")
    model.add_adapter(GLoRAPeftConfig(r=2, alpha=3, target_modules=PROJECTIONS, **FULL), "full")
    for path, parameter in model.named_parameters():
        if "gkglora_adapter" in path:
            parameter.data = 0.2 * torch.randn_like(parameter)

    parts = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "gkglora_adapter"):
            p, f = layer.adapters["product"], layer.adapters["full"]
            w, b = layer.base_layer.weight, layer.base_layer.bias
            of_product = w @ p.A_up @ p.A_down + p.B_up @ p.B_down
            of_full = w * f.A[:, None] + 1.5 * f.B_up @ f.B_down
            parts[path] = of_product.detach(), of_full.detach(), (b * f.D + f.E + w @ f.C).detach()

    def changes(product, full):
        return {path: (product * p + full * f, full * bias) for path, (p, f, bias) in parts.items()}

    return base, model, changes


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_a_strength_multiplies_what_an_adapter_changes(name):
    base, model, changes = two_adapters(name)

    def is_truth(product, full, **more):
        torch.testing.assert_close(
            output(model, name, **more), dense(base, name, changes(product, full)), rtol=0, atol=1e-12
        )

    model.set_adapters(["product"], [0.5])
    is_truth(0.5, 0)
    model.set_adapters(["product", "full"], [-2.0, 0.25])
    is_truth(-2.0, 0.25)
    scale = {"cross_attention_kwargs" if name == "unet" else "joint_attention_kwargs": {"scale": 0.5}}
    is_truth(-1.0, 0.125, **scale)
    is_truth(-2.0, 0.25)
    model.fuse_lora(adapter_names=["full"])
    is_truth(0, 0.25)
    model.unfuse_lora()
    model.set_adapters(["full", "product"])
    is_truth(1, 1)
    model.disable_lora()
    is_truth(0, 0)
    model.enable_lora()
    model.delete_adapters("full")
    is_truth(1, 0)
    model.unload_lora()
    assert torch.equal(output(model, name), output(base, name))


def test_strengths_by_block():
    base, model, changes = two_adapters("unet")
    model.set_adapters(["product"], [{"down": 0.5, "mid": 0.0, "up": 2.0}])
    by_path = {}
    for part, strength in (("down", 0.5), ("mid", 0.0), ("up", 2.0)):
        by_path |= {path: change for path, change in changes(strength, 0).items() if path.startswith(part)}
    torch.testing.assert_close(output(model, "unet"), dense(base, "unet", by_path), rtol=0, atol=1e-12)


# Files


@pytest.mark.parametrize(
    "config",
    [GLoRAPeftConfig(r=3, target_modules=PROJECTIONS, **PRODUCT), GloraConfig(r=3, target_modules=PROJECTIONS)],
)
def test_the_road_for_methods_that_load_lora_adapter_does_not_know(config, tmp_path):
    model = base_model("flux")
    model.add_adapter(config)
    moved_away(model)
    model.save_lora_adapter(tmp_path, weight_name="adapter.safetensors")
    state = get_peft_model_state_dict(model)
    with pytest.raises((TypeError, ValueError, IndexError, KeyError)):
        base_model("flux").load_lora_adapter(tmp_path, prefix=None, weight_name="adapter.safetensors")
    again = inject_adapter_in_model(config, base_model("flux"))
    set_peft_model_state_dict(again, state)
    assert torch.equal(output(again, "flux"), output(model, "flux"))


def test_diffusers_loads_a_lora_that_we_save(tmp_path):
    model = moved_away(gk.inject(base_model("flux"), gk.GLoRAConfig.lora(3, alpha=4), PROJECTIONS))
    gk.save_adapter(model, tmp_path / "lora.safetensors", format="peft", prefix="transformer.")
    again = base_model("flux")
    again.load_lora_adapter(tmp_path, weight_name="lora.safetensors", adapter_name="ours", prefix="transformer")
    torch.testing.assert_close(output(again, "flux"), output(model, "flux"), rtol=0, atol=1e-12)
    fast = gk.accelerate(copy.deepcopy(again), verbose=False)
    for one in (again, fast):
        one.set_adapters(["ours"], [0.5])
    torch.testing.assert_close(output(fast, "flux"), output(again, "flux"), rtol=0, atol=1e-12)
