"""A group of siblings: what it computes in one call, and what is no group."""

import contextlib

import pytest
import torch
from broods import DROPS, LORA, RICH, agree, masks, outputs, step, waiting
from torch import nn

from glora_kernels import GLoRAConfig, GLoRALinear, reference
from glora_kernels.nn.depth import KeptShift
from glora_kernels.nn.siblings import install, tied_sets
from glora_kernels.reference.tolerance import allowed_error, largest_error

GROUPS = {
    "lora": [LORA] * 3,
    "rich": [RICH] * 2,
    "ragged": [
        GLoRAConfig("none", "lora", "vector", "constant", "none", rank=5, alpha=5),
        GLoRAConfig("none", "none", "none", "none", "vector"),
        LORA,
    ],
}


@pytest.mark.parametrize("configs", GROUPS.values(), ids=GROUPS.keys())
def test_values_and_gradients_are_those_of_the_reference_in_one_call(configs, brood, calls):
    layers = brood(configs)
    x, dys = torch.randn(2, 5, 12).double(), [torch.randn(2, 5, 7 + i).double() for i in range(len(configs))]
    expected = step(layers, x, dys, keeps=[None] * len(configs))
    agree(step(layers, x, dys), expected)
    assert not calls
    install(layers)
    for _ in range(2):
        agree(step(layers, x, dys), expected)
        assert not waiting(layers)
    assert calls == [len(configs)] * 2


def test_a_beta_computed_beforehand_takes_the_place_of_its_terms(brood):
    layers = brood([RICH] * 2)
    x = torch.randn(4, 12).double()
    expected, betas = outputs(layers, x), []
    for layer in layers.values():
        weight = layer.weight.t() if layer._transposed else layer.weight
        betas.append(reference.effective_bias(weight, layer.bias, layer.adapter(), RICH))
        layer._beta = KeptShift(layer, 3 * betas[-1].detach().requires_grad_())
    install(layers)
    for got, y, beta in zip(outputs(layers, x), expected, betas, strict=True):
        torch.testing.assert_close(got, y + 2 * beta, rtol=1e-12, atol=1e-12)


def test_every_sibling_draws_the_mask_it_would_draw_alone(brood, calls, seeds):
    layers = brood([DROPS] * 3)
    x, dys = torch.randn(6, 12).double(), [torch.randn(6, 7 + i).double() for i in range(3)]
    torch.manual_seed(1)
    alone = step(layers, x, dys)
    install(layers)
    torch.manual_seed(1)
    agree(step(layers, x, dys), alone)
    assert [int(seed) for seed in seeds[:3]] == [int(seed) for seed in seeds[3:]]
    assert len({int(seed) for seed in seeds}) == 3
    agree(step(layers, x, dys, keeps=masks(seeds[3:])), alone)
    layers.eval()
    outputs(layers, x)
    assert (len(seeds), calls) == (6, [3, 3])


@pytest.mark.parametrize("a", ["none", "vector"])
def test_tied_siblings_have_one_mask_in_one_call_and_alone(a, brood, calls, seeds):
    layers = brood([GLoRAConfig(a, "lora", "none", "none", "none", rank=3, dropout=0.5)] * 3, tied=True)
    x, dys = torch.randn(6, 12).double(), [torch.randn(6, 7 + i).double() for i in range(3)]
    assert tied_sets(layers) == []
    group = install(layers, fused=a == "none")
    assert group.tied
    assert tied_sets(layers) == [["layer0", "layer1", "layer2"]]
    for count in (1, 2):
        got = step(layers, x, dys)
        assert len(seeds) == count
        expected = step(layers, x, dys, keeps=masks(seeds[-1:] * 3))
        shared = sum(expected[f"B_down{i}"] for i in range(3))  # the reference's leaves are one each
        agree(got, expected | {f"B_down{i}": shared for i in range(3)})
    assert calls == ([3, 3] if a == "none" else [])
    assert not waiting(layers)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_no_worse_than_alone_and_gradients_keep_their_dtype(autocast, brood, calls):
    layers = brood([RICH] * 3, k=64)
    x = torch.randn(16, 64).double()
    exact = outputs(layers, x)
    for layer in layers.values():
        layer.float()
        if not autocast:
            layer.weight.data = layer.weight.data.bfloat16()
    x = x.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        alone = outputs(layers, x)
        install(layers)
        ys = outputs(layers, x)
    for y, other, truth in zip(ys, alone, exact, strict=True):
        assert y.dtype == torch.bfloat16
        assert largest_error(y, truth) <= allowed_error(truth.detach(), other, torch.bfloat16)
    sum(y.float().sum() for y in ys).backward()
    assert {p.grad.dtype for layer in layers.values() for p in layer.adapter().values()} == {torch.float32}
    assert calls == [3]


REFUSED = {
    "one": ([LORA], {}, "2 to 64 members, got 1"),
    "A": ([LORA, GLoRAConfig()], {}, "'layer1' has A='vector'; A must be 'none'"),
    "B": ([LORA, GLoRAConfig("none", "constant")], {}, "'layer1' has B='constant'"),
    "dropout": ([LORA, DROPS], {}, "dropout differs: 0.0 of 'layer0', 0.5 of 'layer1'"),
    "adapter_dtype": (
        [LORA] * 2,
        {"adapter_dtype": torch.float32},
        "adapter_dtype differs: torch.float64 of 'layer0', torch.float32 of 'layer1'; give adapter_dtype in inject",
    ),
    "in_features": ([LORA] * 2, {"k": 5}, "in_features differs: 12 of 'layer0', 5 of 'layer1'"),
    "dtype": ([LORA] * 2, {"dtype": torch.float32}, "the dtype differs: torch.float64 of 'layer0', torch.float32"),
    "device": ([LORA] * 2, {"device": "meta"}, "the device differs: cpu of 'layer0', meta of 'layer1'"),
}


@pytest.mark.parametrize(("configs", "other", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_layers_that_are_no_group_are_refused_by_name(configs, other, reason, brood):
    layers = brood(configs)
    if other:
        sizes = {"k": 12, "dtype": torch.float64, "device": "cpu"} | other
        layers["layer1"] = GLoRALinear(sizes.pop("k"), 8, configs[1], bias=False, **sizes)
    with pytest.raises(ValueError, match=reason):
        install(layers)
    assert all(layer._siblings is None for layer in layers.values())


def test_a_layer_is_in_one_group(brood):
    layers = brood([LORA] * 3)
    q, k, v = layers.values()
    install({"q": q, "k": k})
    with pytest.raises(ValueError, match=r"\['k'\] are in a group"):
        install({"k": k, "v": v})
    with pytest.raises(ValueError, match="twice"):
        install({"v": v, "w": v})
    with pytest.raises(TypeError, match="'w' must be a GLoRALinear, got Linear"):
        install({"v": v, "w": nn.Linear(12, 4)})
    assert v._siblings is None
    assert "siblings=2" in repr(q)
