"""A small adapter's contribution arrives whole in 16 bits, where a dense W_eff loses it."""

from __future__ import annotations

import pytest
import torch

import glora_kernels as gk
from benchmarks import small_adapters
from benchmarks.cases import DTYPES, Shape
from glora_kernels import backend

SHAPE = Shape(m=256, k=512, n=384, r=8, dtype=DTYPES["bf16"])
SUPPORTS = [("A", "vector"), ("A", "constant"), ("A", "lora"), ("B", "lora"), ("B", "vector")]


@pytest.mark.parametrize(("support", "form"), SUPPORTS)
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_ours_keeps_the_contribution(support: str, form: str, size: float) -> None:
    case = small_adapters.problem(support, form, size, SHAPE)
    with backend("eager"):
        found = small_adapters.survival(case, small_adapters.ways(case)["ours"])
    assert 0.9 <= found["y"].share <= 1.1
    assert 0.9 <= found["dx"].share <= 1.1


@pytest.mark.parametrize("form", ["vector", "constant", "lora"])
def test_the_plain_way_loses_it(form: str) -> None:
    """The measure discriminates: a W_eff in bfloat16 has lost most of |A| = 1e-3."""
    case = small_adapters.problem("A", form, 1e-3, SHAPE)
    found = small_adapters.survival(case, small_adapters.ways(case)["plain"])
    assert found["y"].share < 0.5
    assert found["dx"].share < 0.5


@pytest.mark.parametrize(("support", "form"), SUPPORTS)
def test_the_error_is_near_its_floor(support: str, form: str) -> None:
    """Nothing beats the rounding of y itself; a dither before it costs at most a factor of two."""
    case = small_adapters.problem(support, form, 1e-2, SHAPE)
    with backend("eager"):
        found = small_adapters.survival(case, small_adapters.ways(case)["ours"])
    assert found["y"].error <= 2.0 * small_adapters.floor(case)["y"].error
    assert found["dx"].error <= 2.0 * small_adapters.floor(case)["dx"].error


@pytest.mark.parametrize("support", ["E", "B"])
def test_a_small_adapter_beside_a_large_bias_survives(support: str) -> None:
    """β is rounded inside the sum with everything else, or with the dither: rounding b + E by itself loses E."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96).bfloat16()
    with torch.no_grad():
        linear.bias.normal_(std=10.0)
    x = torch.randn(512, 64).bfloat16()
    base = linear(x).double()
    layer = gk.GLoRALinear.from_linear(linear, gk.GLoRAConfig("none", "lora" if support == "B" else "none", E="vector"))
    with torch.no_grad():
        if support == "E":
            layer.E.fill_(1e-2)
            delta = layer.E.double().expand(512, 96)
        else:
            layer.B_up.normal_(std=1e-2)
            delta = x.double() @ (layer.B_up.double() @ layer.B_down.double()).t()
        arrived = layer(x).double() - base
    share = float((arrived * delta).sum() / (delta * delta).sum())
    assert 0.85 < share < 1.15
