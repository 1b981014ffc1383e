"""Factors in fp32 over 16 bits: everything that multiplies them keeps fp32, in every kernel."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from glora.test_fused import choose_route, interpreted, plan
from groups import build
from helpers import check, ours, problem, thinned, truth

from glora_kernels.depth.deferred import Deferred, DeferredLinear, ticket
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.four_bit.served import why_not
from glora_kernels.glora import triton as triton_path
from glora_kernels.ops import glora_linear
from glora_kernels.quant import dequantize, quantize_weight
from glora_kernels.reference import cases
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.usefixtures("poison")

SIXTEEN = [torch.float16, torch.bfloat16]
FORMS = [(*ab, variant) for *ab, variant in cases.FORMS if "lora" in ab and (variant == "hadamard" or ab[1] == "lora")]
ERROR = 2e-4
"""Of the gradient of a factor, relative to its norm: a sixteenth of a rounding to 16 bits, and less than the 5e-4
promised."""


def close(name: str, value: torch.Tensor, true: torch.Tensor) -> None:
    assert value.dtype == torch.float32
    error = float((value.double() - true).norm() / true.norm())
    assert error < ERROR, f"{name}: {error:.1e}"


def check_factors(p) -> None:
    got, (true, _) = ours(p, "triton"), truth(p)
    for name in p.params:
        if name.endswith(("_up", "_down")):
            close(name, got[name], true[name])
    check(p, got, "triton")


@pytest.mark.parametrize(("form", "dtype"), thinned(3, itertools.product(FORMS, SIXTEEN)))
def test_gradients_of_factors(form, dtype, device):
    a, b, variant = form
    config = GLoRAConfig(a, b, E="vector", rank=3, variant=variant, dropout=0.25 if b == "lora" else 0.0)
    check_factors(problem(config, (23,), 40, 33, True, dtype, torch.float32, device, size=0.1))


@pytest.mark.parametrize(("form", "dtype"), thinned(3, itertools.product(FORMS, SIXTEEN)))
def test_by_the_library(form, dtype, device, monkeypatch):
    choose_route(monkeypatch, "library")
    a, b, variant = form
    config = GLoRAConfig(a, b, E="none", rank=5, variant=variant, dropout=0.25 if b == "lora" else 0.0)
    check_factors(problem(config, (23,), 40, 33, False, dtype, torch.float32, device, size=0.1))


@pytest.mark.parametrize(("a", "variant"), [("vector", "hadamard"), ("lora", "matmul")])
def test_large_ranks(a, variant, device):
    """dyᵀh by a read of its own."""
    config = GLoRAConfig(a, "lora", E="none", rank=40, variant=variant)
    check_factors(problem(config, (23,), 48, 40, True, torch.bfloat16, torch.float32, device, size=0.05))


@interpreted
def test_a_frozen_factor_of_16_bits_beside_one_of_fp32(monkeypatch):
    """Whoever sizes the partial sums and whoever fills them must see the same blocks."""
    monkeypatch.setattr(triton_path, "arch_of", lambda tensor: "sm_90")
    p = problem(GLoRAConfig("lora", "lora", E="vector", rank=3), (300,), 72, 48, True, torch.float16, size=0.1)
    params = {name: t.float() if name.startswith("A") else t for name, t in p.params.items()}
    p = replace(p, params=params, trained=frozenset(["x", "A_up", "A_down", "B_down", "E"]))
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("up", "x", "dy"), [(1e-5, 1.0, 1e-5), (1e-5, 1e-3, 1e-4), (0.1, 1e3, 1e3)])
@pytest.mark.parametrize(("a", "variant"), [("none", "hadamard"), ("lora", "hadamard"), ("lora", "matmul")])
def test_what_fp16_does_not_hold(a, variant, up, x, dy, device):
    """S ~ 1e-10 would be zero, dyᵀx ~ 1e6 infinite."""
    config = GLoRAConfig(a, "lora", E="none", rank=4, variant=variant)
    p = problem(config, (16,), 32, 24, False, torch.float16, torch.float32, device)
    params = {name: t * up if name in ("B_up", "A_up") else t for name, t in p.params.items()}
    p = replace(p, x=p.x * x, dy=p.dy * dy, params=params)
    got, (true, _) = ours(p, "triton"), truth(p)
    for name in params:
        close(name, got[name], true[name])


@interpreted
@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float16, 0.25), (torch.bfloat16, 0.0)])
def test_a_group(dtype, dropout):
    group = build(dtype=dtype, dropout=dropout, adapters=torch.float32)
    got, true = group.ours("triton"), group.literal(torch.float64)
    for name in true:
        if name.startswith(("downs", "ups")):
            close(name, got[name], true[name])


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("a", ["vector", "lora"])
def test_over_four_bits(a, m, device):
    """A few tokens, whose codes the product reads itself where A is no lora, and many."""
    config = GLoRAConfig(a, "lora", E="none", rank=4)
    p = problem(config, (m,), 64, 40, True, torch.float16, torch.float32, device, size=0.1)
    codes = quantize_weight(p.weight, "nf4")
    p = replace(p, weight=dequantize(codes, torch.float16))
    leaves = {name: t.detach().requires_grad_() for name, t in p.params.items()}
    arguments = {{"A": "a"}.get(name, name.lower()): t for name, t in leaves.items()}
    with backend("triton"):
        glora_linear(p.x, codes, p.bias, **arguments).backward(p.dy)
    true, _ = truth(p)
    for name in ("B_up", "B_down") + (("A_up", "A_down") if a == "lora" else ()):
        close(name, leaves[name].grad, true[name])


def test_a_shared_factor(device):
    """The part of a shared factor that waits: S = dy·B_up is kept in fp32 too."""
    config = GLoRAConfig.lora(rank=4, dropout=0.25)
    p = problem(config, (16,), 32, 24, False, torch.float16, torch.float32, device)
    p = replace(p, dy=p.dy * 1e-5, params={**p.params, "B_up": p.params["B_up"] * 1e-5})
    down, up = (torch.nn.Parameter(p.params[name]) for name in ("B_down", "B_up"))
    deferred = Deferred()
    with backend("triton"):
        layer = DeferredLinear(deferred, ticket(deferred, [down, up]), 0, {"b_down": down, "b_up": up})
        y = layer(p.x, p.weight, b_up=up, b_down=down, scale=config.scale, dropout_p=0.25, seed=p.seed)
    y.backward(p.dy)
    true, _ = truth(p)
    close("B_down", down.grad, true["B_down"])
    close("B_up", up.grad, true["B_up"])


def test_csrc_leaves_them_to_another(monkeypatch):
    """Its product of few tokens rounds h to 16 bits; the dense workspace, or Triton's, does not."""
    codes = quantize_weight(torch.randn(64, 64).half(), "nf4")
    x = torch.zeros(4, 64, dtype=torch.float16)
    assert why_not("cuda", x, codes, 8) is None
    assert "torch.float32" in str(why_not("cuda", x, codes, 8, torch.float32))
    assert four_bit.small_m(x, codes, 8, factors=torch.float32, route="cuda", arch="sm_90") is None


@pytest.mark.parametrize("name", ["lora", "vector"])
def test_adapters_of_16_bits_are_multiplied_as_before(name):
    steps = itertools.chain(*plan(GLoRAConfig(name, "lora", rank=16), 2048, 4096, 4096, False))
    numbers = [step.args["NUMERICS"] for step in steps if "NUMERICS" in getattr(step, "args", {})]
    assert len(numbers) >= 5
    assert {(n.factor_name, n.factor_precision) for n in numbers} == {("bfloat16", "ieee")}
