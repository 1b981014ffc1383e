"""Parameters that PyTorch's tools compute from others: pruned, normalised, parametrized ones are what forward reads."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear

FULL = GLoRAConfig("vector", "lora", "vector", "vector", "vector", rank=3)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def pruned(layer, name):
    prune.random_unstructured(layer, name, 0.5)


def weight_normed(layer, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, name)


def spectrally_normed(layer, name):
    nn.utils.spectral_norm(layer, name)


def parametrized(layer, name):
    parametrize.register_parametrization(layer, name, Doubled())


CASES = [
    *((change, name) for change in (pruned, parametrized) for name in ("A", "B_down", "B_up", "E", "weight", "bias")),
    *((change, name) for change in (weight_normed, spectrally_normed) for name in ("B_down", "B_up", "weight")),
]


def layer_of(randomize, config=FULL) -> GLoRALinear:
    return randomize(GLoRALinear(8, 6, config)).eval()


def plain_of(layer: GLoRALinear) -> GLoRALinear:
    """A layer with the values that the other one has now, under their own names."""
    plain = GLoRALinear(8, 6, layer.config).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(getattr(layer, name))
    return plain


@pytest.mark.parametrize(("change", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_forward_reads_what_is_computed(change, name, randomize):
    layer, x = layer_of(randomize), torch.randn(5, 8)
    before = layer(x)
    change(layer, name)
    for parameter_name, parameter in layer.named_parameters():
        if parameter_name.startswith(("weight", "bias")):  # weight_norm makes new parameters, which are trained
            parameter.requires_grad_(False)
    y = layer(x)
    plain = plain_of(layer)
    torch.testing.assert_close(y, plain(x))
    assert change is weight_normed or not torch.allclose(y, before)
    y.sum().backward()
    trained = [p.grad for n, p in layer.named_parameters() if name in n and p.requires_grad]
    assert name in ("weight", "bias") or all(grad is not None and grad.isfinite().all() for grad in trained)
    if change is parametrized:  # PyTorch copies no others after a forward
        torch.testing.assert_close(copy.deepcopy(layer)(x), y)


@pytest.mark.parametrize(("change", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_merging_takes_what_is_computed_or_says_why_it_cannot(change, name, randomize):
    model, x = nn.Sequential(layer_of(randomize)), torch.randn(5, 8)
    change(model[0], name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # as an optimizer does after the last forward
    expected = copy.deepcopy(model.state_dict())
    if name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=rf"merge: '0': {name} of this layer is computed.*prune\.remove"):
            gk.merge(model)
        assert not model[0].merged
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        return
    gk.merge(model)
    merged = model(x)
    gk.unmerge(model)
    torch.testing.assert_close(merged, model(x))


def test_a_pruned_adapter_is_saved_as_it_acts_and_is_not_loaded_into(randomize, tmp_path):
    model, x = nn.Sequential(layer_of(randomize)), torch.randn(5, 8)
    base = nn.Linear(8, 6)
    base.load_state_dict({name: getattr(model[0], name) for name in ("weight", "bias")})
    pruned(model[0], "B_down")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.save_adapter(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(gk.load_adapter(nn.Sequential(base), tmp_path / "a.safetensors")(x), model(x))
    with pytest.raises(RuntimeError, match=r"load_adapter: '0': B_down .* is computed"):
        gk.load_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="reset_adapter: B_down"):
        model[0].reset_adapter()
    prune.remove(model[0], "B_down")
    gk.load_adapter(model, tmp_path / "a.safetensors")


def test_pruned_siblings_and_whole_models_compute(vit, randomize):
    model = randomize(gk.inject(vit(), GLoRAConfig.lora(rank=2), ["q_proj", "k_proj", "v_proj"])).eval()
    gk.fuse_siblings(model)
    x = torch.randn(2, 4, 12)
    layers = [m for m in model.modules() if isinstance(m, GLoRALinear)]
    for layer in layers[:2]:
        prune.random_unstructured(layer, "B_down", 0.5)
    y = model(x)
    gk.merge(model)
    torch.testing.assert_close(model(x), y)
    # What Lightning's ModelPruning does by default: the weights and biases of all layers together.
    model = randomize(gk.inject(vit(), FULL))
    everything = [
        (m, n) for m in model.modules() for n in ("weight", "bias") if isinstance(getattr(m, n, None), nn.Parameter)
    ]
    prune.global_unstructured(everything, prune.L1Unstructured, amount=0.5)
    model(x).sum().backward()
    assert all(
        p.grad is not None
        for layer in model.modules()
        if isinstance(layer, GLoRALinear)
        for p in layer.adapter().values()
    )
