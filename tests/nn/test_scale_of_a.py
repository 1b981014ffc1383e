"""alpha_A, a scale on a low-rank A: the equation in float64, however a layer is called, merged, saved and edited."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig

CASES = {
    variant: GLoRAConfig("lora", "lora", C, rank=3, alpha=2, variant=variant, alpha_A=5)
    for variant, C in (("hadamard", "vector"), ("matmul", "none"))
}
X = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model_of(config):
    torch.manual_seed(0)
    model = gk.inject(nn.Sequential(nn.Linear(10, 8)).double(), config, target_modules=["0"])
    return filled(model)


def filled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def literal(layer, p, variant):
    """y by the equation, s_A = 5/3 and s = 2/3."""
    w = layer.weight
    a = 5 / 3 * (p["A_up"] @ p["A_down"])
    weight = w + (w @ a if variant == "matmul" else w * a) + 2 / 3 * (p["B_up"] @ p["B_down"])
    return X @ weight.T + layer.bias + (w @ p["C"] if "C" in p else 0.0)


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", CASES)
def test_outputs_and_gradients(variant):
    model = model_of(CASES[variant])
    layer = model[0]
    own = {name: p.detach().clone().requires_grad_() for name, p in layer.adapter().items()}
    y, expected = model(X), literal(layer, own, variant)
    near(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for name, parameter in layer.adapter().items():
        near(parameter.grad, own[name].grad)
    assert "scale_A=1.66667" in repr(layer)


@pytest.mark.parametrize("variant", CASES)
def test_merged_deployed_and_beside_others(variant):
    model = model_of(CASES[variant])
    y = model(X).detach()
    near(model[0].to_linear()(X), y)
    near(gk.merge_and_unload(copy.deepcopy(model))(X), y)
    for merge in (gk.merge, lambda one: one[0].merge()):
        merged = copy.deepcopy(model).eval()
        merge(merged)
        near(merged(X), y)
    host = model_of(GLoRAConfig.lora(2))
    before = host(X).detach()
    gk.add_adapter(host, "b", CASES[variant])
    with torch.no_grad():
        for name, value in model[0].adapter().items():
            host[0].named()["b"].get_parameter(name).copy_(value)
    with gk.rows(host, ["b", None, "default", "b", "b", None]):
        mixed = host(X)
    gk.set_adapter(host, "b")
    near(host(X), y)
    near(mixed[[0, 3, 4]], y[[0, 3, 4]])
    near(mixed[2], before[2])


def test_compiled():
    model = model_of(CASES["matmul"])
    near(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))


def test_saved_and_loaded_and_left_out_of_files_without_it(tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    model = model_of(CASES["matmul"])
    gk.save_adapter(model, path)
    back = gk.load_adapter(model_of(CASES["matmul"]), path)
    assert torch.equal(back(X), model(X))
    plain = nn.Sequential(nn.Linear(10, 8)).double()
    plain[0].load_state_dict({name: getattr(model[0], name) for name in ("weight", "bias")})
    loaded = gk.load_adapter(plain, path)
    assert loaded[0].config == CASES["matmul"]
    assert torch.equal(loaded(X), model(X))
    gk.save_adapter(model_of(GLoRAConfig("lora", "lora", rank=3, variant="matmul")), other)
    with safe_open(other, "pt") as file:  # as earlier versions read it
        assert "alpha_A" not in json.loads(file.metadata()["config"])["layers"]["0"]["config"]
    with pytest.raises(ValueError, match=r"alpha=2 \(the model: None\), alpha_A=5 \(the model: None\)"):
        gk.load_adapter(model_of(GLoRAConfig("lora", "lora", rank=3, variant="matmul")), path)


def test_the_scale_stays_when_the_rank_changes():
    model = model_of(CASES["hadamard"])
    y = model(X).detach()
    gk.set_rank(model, {"0": 5})
    near(model(X), y)
    assert (model[0].config.rank, model[0].config.scale_A) == (5, 5 / 3)
    ranks = gk.with_ranks(CASES["hadamard"], {"0": 6})
    assert ranks["0"].alpha_A == pytest.approx(10)


@pytest.mark.parametrize("forms", [("vector", "lora"), ("none", "lora"), ("constant", "none")])
def test_of_another_a_it_is_an_error(forms):
    with pytest.raises(ValueError, match="alpha_A scales A='lora' only; got alpha_A=4 with A="):
        GLoRAConfig(*forms, alpha_A=4)


@pytest.mark.parametrize("value", [0, float("inf"), True, "4"])
def test_values_that_are_none(value):
    with pytest.raises(ValueError, match="alpha_A must"):
        GLoRAConfig("lora", alpha_A=value)


def test_plain_json_of_earlier_versions():
    config = GLoRAConfig("lora", "lora", rank=3)
    assert "alpha_A" not in config.to_dict()
    assert GLoRAConfig.from_dict(config.to_dict()) == config
    assert GLoRAConfig.from_json(CASES["matmul"].to_json()) == CASES["matmul"]
