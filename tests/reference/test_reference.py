"""The oracle itself: against einsum of the equation, its corners, and gradcheck. (The golden file: tests/glora.)"""

from __future__ import annotations

import pytest
import torch
from helpers import eager, problem, truth

from glora_kernels import reference
from glora_kernels.reference.tolerance import allowed_error, largest_error, literal_step
from glora_kernels.spec import GLoRAConfig, all_configs

LARGE = GLoRAConfig("lora", "lora", "lora", "vector", "constant", rank=3, alpha=5.0, dropout=0.25)


@pytest.mark.parametrize("a", ["lora", "vector", "constant", "none"])
def test_effective_weight_and_bias_give_y(a):
    for config in all_configs(rank=3):
        if config.A != a:  # noqa: SIM300
            continue
        for bias in (True, False):
            p = problem(config, (5,), 20, 11, bias)
            weight = reference.effective_weight(p.weight, p.params, config)
            b = reference.effective_bias(p.weight, p.bias, p.params, config)
            y = p.x @ weight.t() if b is None else p.x @ weight.t() + b
            assert torch.allclose(y, truth(p)[0]["y"], rtol=1e-12, atol=1e-12)
            assert (b is None) == (not bias and config.C == config.E == "none")


def test_dropout_leaves_the_other_terms_alone():
    """With nothing kept, y is the layer without its low-rank B."""
    p = problem(LARGE, (5,), 20, 11)
    nothing = torch.zeros(5, 20, dtype=torch.bool)
    y = reference.glora_linear(p.x, p.weight, p.bias, p.params, LARGE, nothing)
    without = GLoRAConfig("lora", "none", "lora", "vector", "constant", rank=3)
    assert torch.allclose(y, reference.glora_linear(p.x, p.weight, p.bias, p.params, without))
    everything = reference.glora_linear(p.x, p.weight, p.bias, p.params, LARGE, ~nothing)
    scaled = {**p.params, "B_up": p.params["B_up"] / 0.75}
    assert torch.allclose(everything, reference.glora_linear(p.x, p.weight, p.bias, scaled, LARGE))


@pytest.mark.parametrize("variant", ["hadamard", "matmul"])
def test_gradcheck(variant):
    config = GLoRAConfig("lora", "lora", "lora", "vector", "constant", rank=2, alpha=5.0, variant=variant)
    p = problem(config, (3,), 5, 4)
    names = sorted(p.leaves())

    def function(*values):
        of = dict(zip(names, values, strict=True))
        return reference.glora_linear(of["x"], p.weight, of["bias"], {n: of[n] for n in p.params}, config)

    assert torch.autograd.gradcheck(function, [p.leaves()[n].requires_grad_() for n in names])


def test_literal_step_is_the_literal_layer():
    p = problem(LARGE, (5,), 20, 11)
    got, expected = literal_step(p.x, p.weight, p.bias, p.params, LARGE, p.dy, torch.float64, p.keep()), truth(p)[0]
    assert got.keys() == {"y", "dx", "dbias", *(f"d{n}" for n in p.params)}
    for name, value in eager(p).items():
        assert torch.equal(got[name if name == "y" else f"d{name}"], value)
        assert torch.allclose(value, expected[name], rtol=1e-12, atol=1e-12)


def test_the_tolerance_can_fail():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(50, 50, generator=generator, dtype=torch.float64)
    literal = true.to(torch.bfloat16)
    bound = allowed_error(true, literal, torch.bfloat16)
    assert largest_error(literal, true) <= bound / 2
    assert 0 < bound < 0.25
    assert largest_error(true * 1.1, true) > bound
    assert largest_error(torch.full_like(true, torch.nan), true) == float("inf")
    assert allowed_error(true, literal, torch.float64) < 1e-11
    assert allowed_error(true[:0], literal[:0], torch.bfloat16) == 0
