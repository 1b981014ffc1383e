"""How many matrix products a layer takes, and what it keeps for backward."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import cases, products
from benchmarks.cases import Problem
from glora_kernels import GLoRAConfig

CONFIGS = products.configurations(products.SHAPE.r)
NAMES = [cases.config_case(config) for config in CONFIGS]
SHAPE = products.SHAPE


def _problem(*forms: str, **extra: str) -> Problem:
    return cases.make_problem(SHAPE, GLoRAConfig(*forms, rank=SHAPE.r, **extra))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_products_stay_below_the_limit(config: GLoRAConfig) -> None:
    problem = cases.make_problem(SHAPE, config)
    count = products.gemm_equivalents(cases.ours(problem), problem)
    assert 2.0 <= count <= products.limit(config)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_no_dense_weight_is_saved(config: GLoRAConfig) -> None:
    problem = cases.make_problem(SHAPE, config)
    saved = products.saved_tensors(cases.ours(problem), problem)
    dense = [t.shape for t in saved if t.kind == "other" and math.prod(t.shape) >= SHAPE.n * SHAPE.k]
    assert not dense


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_saved_bytes_have_the_size_of_the_rank(config: GLoRAConfig) -> None:
    """Of h (M, ≤2R), U (N,R), σ (M,) and β (N,) at most; nothing of M·K, M·N or N·K but x and y."""
    problem = cases.make_problem(SHAPE, config)
    saved = products.saved_tensors(cases.ours(problem), problem)
    small = SHAPE.m * 2 * SHAPE.r + SHAPE.n * SHAPE.r + SHAPE.m + SHAPE.n + SHAPE.k
    assert products.bytes_of(saved, "other") <= small * SHAPE.dtype.itemsize


@pytest.mark.parametrize("alpha", [None, 16.0])
def test_lora_keeps_h_and_x_only(alpha: float | None) -> None:
    problem = cases.make_problem(SHAPE, GLoRAConfig.lora(rank=SHAPE.r, alpha=alpha))
    saved = products.saved_tensors(cases.ours(problem), problem)
    others = [tensor for tensor in saved if tensor.kind == "other"]
    assert [tensor.shape for tensor in others] == [(SHAPE.m, SHAPE.r)]
    assert products.bytes_of(saved, "other") == SHAPE.m * SHAPE.r * SHAPE.dtype.itemsize
    assert any(tensor.kind == "x" for tensor in saved)
    assert not any(tensor.kind == "y" for tensor in saved)


@pytest.mark.parametrize("a", ["none", "vector"])
def test_x_is_kept_for_a_alone_where_b_down_is_frozen(a: str) -> None:
    """LoRA-FA: dB_up needs h alone; a trained A keeps x beside y, for rows where y holds little of xWᵀ."""
    problem = _problem(a, "lora", "none", "none", "none")
    layer = cases.ours(problem)
    layer.params["B_down"].requires_grad_(False)
    saved = products.saved_tensors(layer, problem)
    assert any(tensor.kind == "x" for tensor in saved) == (a == "vector")
    assert (SHAPE.m, SHAPE.r) in [tensor.shape for tensor in saved if tensor.kind == "other"]


@pytest.mark.parametrize("b", ["vector", "constant", "none"])
def test_a_vector_keeps_x_and_y_instead_of_z(b: str) -> None:
    problem = _problem("vector", b, "none", "none", "none")
    saved = products.saved_tensors(cases.ours(problem), problem)
    kinds = {tensor.kind for tensor in saved}
    assert kinds >= {"x", "y"}
    assert (SHAPE.m, SHAPE.n) not in [tensor.shape for tensor in saved if tensor.kind == "other"]


def test_a_frozen_adapter_keeps_nothing() -> None:
    problem = _problem("vector", "lora", "none", "none", "none")
    layer = cases.ours(problem)
    for parameter in layer.params.values():
        parameter.requires_grad_(False)
    saved = products.saved_tensors(layer, problem)
    assert {tensor.kind for tensor in saved} <= {"parameter"}


def test_in_place_products_are_counted() -> None:
    """What a profiler counts as zero: addmm_, baddbmm_, and out=."""
    a, b, out = torch.ones(3, 5), torch.ones(5, 7), torch.zeros(3, 7)
    with products.ProductCounter() as counter:
        out.addmm_(a, b)
        torch.mm(a, b, out=out)
        torch.addmm(out, a, b, out=out)
        out[None].baddbmm_(a[None], b[None])
        torch.nn.functional.linear(a, b.t())
        torch.mv(b.t(), torch.ones(5))
    assert counter.total() == 5 * (2 * 3 * 5 * 7) + 2 * 5 * 7


def test_an_unknown_product_is_an_error() -> None:
    x, kernel = torch.ones(1, 1, 4), torch.ones(1, 1, 2)
    with products.ProductCounter(), pytest.raises(NotImplementedError, match="conv"):
        torch.nn.functional.conv1d(x, kernel)


def test_the_literal_formula_is_what_the_limits_exclude() -> None:
    """A dense W_eff: a third product, and N·K kept. The tests above would fail on it."""
    problem = _problem("vector", "lora", "none", "none", "none")
    literal = cases.eager(problem)
    assert products.gemm_equivalents(literal, problem) > products.limit(problem.config)
    saved = products.saved_tensors(literal, problem)
    assert any(t.kind == "other" and math.prod(t.shape) >= SHAPE.n * SHAPE.k for t in saved)
