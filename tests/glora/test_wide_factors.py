"""fp32 adapters over 16 bits: every small product that multiplies a factor keeps fp32.

What is asked is far less than the rounding to 16 bits of any of h, S, U, P or G∘W would leave (4e-3 in bfloat16).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import ours, problem, truth
from torch import nn

import glora_kernels as gk
from glora_kernels.ops import grouped_lora_linear
from glora_kernels.quant import dequantize, quantize_weight
from glora_kernels.reference.random import keep_mask
from glora_kernels.spec import GLoRAConfig

LIMIT = 1e-5
FORMS = [("none", "lora", "hadamard"), ("vector", "lora", "hadamard"), ("lora", "lora", "hadamard"),
         ("lora", "vector", "hadamard"), ("lora", "lora", "matmul"), ("lora", "none", "matmul")]  # fmt: skip
forms = pytest.mark.parametrize(("a", "b", "variant"), FORMS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def built(a, b, variant, dtype, dropout=0.0, ups=0.3, dys=1.0, xs=1.0, four_bit=False):
    """A problem whose `_up` factors, dy and x have the given sizes; and for the operator the codes of its weight."""
    drops = dropout if b == "lora" else 0.0
    config = GLoRAConfig(a, b, "lora", "none", "none", rank=8, variant=variant, dropout=drops)
    p = problem(config, (64,), 64, 48, dtype=dtype, adapters=torch.float32)
    for name in p.params.keys() & {"A_up", "B_up"}:
        p.params[name].mul_(ups / 0.3)
    p = replace(p, dy=(p.dy.double() * dys).to(dtype), x=(p.x.double() * xs).to(dtype))
    if not four_bit:
        return p, p
    codes = quantize_weight(p.weight, "nf4", 64, True)
    return replace(p, weight=dequantize(codes, dtype)), replace(p, weight=codes)


def factors_are_right(dense, got):
    values, _ = truth(dense)
    for name in dense.params:
        if name != "A":  # recovered from a y of 16 bits
            error = (got[name].double() - values[name]).norm() / values[name].norm()
            assert error < LIMIT, (name, float(error))


@forms
@dtypes
@pytest.mark.parametrize(("ups", "dys", "xs"), [(1e-4, 1.0, 1.0), (1e-6, 1e-5, 1.0), (0.3, 1.0, 1.0), (1e-3, 1e3, 1e3)])
def test_gradients_of_factors(a, b, variant, dtype, ups, dys, xs):
    p, _ = built(a, b, variant, dtype, 0.3, ups, dys, xs)
    factors_are_right(p, ours(p))


@forms
@dtypes
def test_gradients_of_factors_over_4_bits(a, b, variant, dtype):
    dense, packed = built(a, b, variant, dtype, 0.3, 1e-4, 1e-3, four_bit=True)
    factors_are_right(dense, ours(packed, "eager"))


@forms
@dtypes
def test_gradients_of_factors_under_autocast(a, b, variant, dtype):
    """x and W in fp32, of values that the dtype of autocast holds."""
    p, _ = built(a, b, variant, dtype, 0.3, 1e-4, 1e-3)
    wide = replace(p, x=p.x.float(), weight=p.weight.float(), bias=p.bias.float(), dy=p.dy.float())
    factors_are_right(p, ours(wide, autocast=dtype))


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float16])
def test_16_bit_factors_keep_16_bits(adapters):
    """What backward is given stays of the size it was: h in the dtype of x."""
    p = problem(GLoRAConfig.lora(rank=3), (9,), 40, 50, dtype=adapters)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(p)
    assert {t.dtype for t in kept} == {adapters}


@dtypes
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_group(dtype, dropout):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, std=1.0, dtype=torch.float32):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    x, weights = draw(64, 32, dtype=dtype), [draw(24, 32, std=0.2, dtype=dtype), draw(16, 32, std=0.2, dtype=dtype)]
    down, ups = draw(4, 32).requires_grad_(), [draw(24, 4, std=1e-4).requires_grad_(), draw(16, 4).requires_grad_()]
    dys = [draw(64, 24, std=1e-4, dtype=dtype), draw(64, 16, std=1e-4, dtype=dtype)]
    seed = torch.tensor([2**62 + 5])
    ys = grouped_lora_linear(x, weights, down, ups, scales=2.0, dropout_p=dropout, seeds=seed)
    got = torch.autograd.grad(ys, [down, *ups], dys)
    kept = x.double() * keep_mask(seed, 64, 32, dropout) / (1 - dropout)
    exact = [t.detach().double().requires_grad_() for t in (down, *ups)]
    outputs = [2.0 * kept @ exact[0].t() @ up.t() for up in exact[1:]]
    expected = torch.autograd.grad(outputs, exact, [dy.double() for dy in dys])
    for value, right in zip(got, expected, strict=True):
        assert (value.double() - right).norm() < LIMIT * right.norm()


@dtypes
@pytest.mark.parametrize("share", ["A", "B", "AB"])
def test_deferred_sums_of_shared_factors(dtype, share):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(32, 32)}) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer["up"](x)
            return x

    config = gk.ShareLoRAConfig(rank=4, alpha=4.0, share=share)
    model = gk.inject(Net().to(dtype), config, adapter_dtype=torch.float32)
    shared = [p for p in model.parameters() if p.requires_grad]
    for p in shared:
        nn.init.normal_(p, std=1e-3)
    x, found = torch.randn(64, 32).to(dtype), []
    for defer in (False, True):
        model.zero_grad()
        if defer:
            with gk.deferred_shared_grads(model):
                (1e-3 * model(x)).sum().backward()
        else:
            (1e-3 * model(x)).sum().backward()
        found.append([p.grad.clone() for p in shared])
    for deferred, plain in zip(found[1], found[0], strict=True):
        assert (deferred - plain).norm() < LIMIT * plain.norm()
