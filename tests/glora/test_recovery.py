"""dA of a vector or constant A, which the kernels recover from y: right for data as language models have it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import check, ours, problem, thinned

from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sinks(config: GLoRAConfig, length: int, place: int, dtype: torch.dtype, device: str, **sizes):
    """Sequences of `length` tokens; the one at `place` is a hundred times larger, and its gradient so much smaller."""
    p = problem(config, (64 // length, length), 64, 32, True, dtype, device=device, size=0.05, **sizes)
    p.x[:, place] *= 100
    p.dy[:, place] /= 100
    bias = torch.empty(32, dtype=torch.float64).uniform_(-100, 100, generator=torch.Generator().manual_seed(1))
    return replace(p, bias=bias.to(p.bias))


@pytest.mark.parametrize(("b", "length", "place", "dtype"), thinned(5, [
    (b, length, place, dtype)
    for dtype in DTYPES
    for b in ("lora", "vector", "none")
    for length, place in ((16, 0), (2, 1), (16, 7), (32, 31))
]))  # fmt: skip
def test_sinks_beside_a_large_bias(b, length, place, dtype, device):
    """y is mostly bias where dy is large, and mostly Z in one token of each sequence: no sample of rows may decide."""
    p = sinks(GLoRAConfig("vector", b, "vector", "constant", "vector", rank=4), length, place, dtype, device)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("b", "dtype"), thinned(2, itertools.product(["constant", "lora"], DTYPES)))
def test_sinks_beside_constants(b, dtype, device):
    p = sinks(GLoRAConfig("constant", b, E="constant", rank=4), 16, 0, dtype, device)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("b", "rank", "dtype"), thinned(2, [
    (b, rank, dtype) for b, rank in (("lora", 4), ("lora", 40), ("vector", 4)) for dtype in DTYPES
]))  # fmt: skip
def test_what_is_beside_z_may_be_anything_that_is_added(b, rank, dtype, device):
    """No bias: here h·B_upᵀ and σ·bᵀ are much larger than Z, in every row but the first of each sequence."""
    p = sinks(GLoRAConfig("vector", b, E="none", rank=rank), 16, 0, dtype, device)
    name = "B_up" if b == "lora" else "B"
    params = {**p.params, name: p.params[name] * (1000 if b == "lora" else 100)}
    p = replace(p, bias=None, params=params)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("trained", "dtype"), thinned(2, itertools.product(
    [["A"], ["A", "B_down"], ["A", "x", "bias"]], DTYPES
)))  # fmt: skip
def test_a_is_trained_beside_frozen_factors(trained, dtype, device):
    """Neither dyᵀh nor Σ dy is wanted, and A needs neither."""
    p = sinks(GLoRAConfig("vector", "lora", E="vector", rank=40), 16, 0, dtype, device)
    p = replace(p, trained=frozenset(trained))
    check(p, ours(p, "triton"), "triton")


def test_one_row_in_need_does_not_make_another_worse(device):
    """1+a = 0 in one row of W, an enormous bias in another: Z for these, y for the rest of the block."""
    p = problem(GLoRAConfig("vector", "none"), (48,), 40, 24, True, torch.bfloat16, device=device, size=0.05)
    p.params["A"][3] = -1.0
    p.bias[5] = 1e4
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_that_cancel_each_other(dtype, device):
    """h·B_upᵀ takes the bias away again: y is no larger than Z, but was found through sums that are."""
    p = problem(GLoRAConfig("vector", "lora", rank=4), (48,), 40, 24, True, dtype, device=device, size=0.05)
    p.x[:, 0] = 1
    up, down = 100 * p.params["B_up"].sign(), torch.zeros_like(p.params["B_down"])
    down[:, 0] = 1
    p = replace(p, bias=-p.config.scale * up.sum(1), params={**p.params, "B_up": up, "B_down": down})
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize("bias", [True, False])
def test_an_overflow_of_y_does_not_reach_da(bias, device):
    """y overflows where dy is zero: from Z the product is 0, from y it would be no number."""
    p = problem(GLoRAConfig("vector", "none"), (48,), 40, 24, bias, torch.float16, device=device, size=0.05)
    p.params["A"][3] = 6e4
    p.dy[:, 3] = 0
    p = replace(p, trained=frozenset(["A"]))
    grads = ours(p, "triton")
    assert grads["y"].isinf().any()
    assert grads["A"].isfinite().all()
    assert grads["A"][3] == 0
