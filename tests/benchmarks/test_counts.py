"""Products of a layer, what it keeps for backward, and what of a small adapter arrives in 16 bits."""

from __future__ import annotations

import math

import pytest
import torch

import glora_kernels as gk
from benchmarks import bench_counts, peers, problems, tables
from benchmarks.cases import Entry
from benchmarks.problems import DTYPES, Problem
from glora_kernels import GLoRAConfig, backend
from glora_kernels.reference.cases import case_of

CONFIGS = bench_counts.configurations(bench_counts.SHAPE.r)
NAMES = [case_of(config) for config in CONFIGS]
SHAPE = bench_counts.SHAPE


def _problem(*forms: str, **extra: str) -> Problem:
    return problems.make_problem(SHAPE, config=GLoRAConfig(*forms, rank=SHAPE.r, **extra))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_products_stay_below_the_limit(config: GLoRAConfig) -> None:
    problem = problems.make_problem(SHAPE, config=config)
    count = bench_counts.gemm_equivalents(peers.ours(problem), problem)
    assert 2.0 <= count <= bench_counts.limit(config)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_no_dense_weight_is_saved(config: GLoRAConfig) -> None:
    problem = problems.make_problem(SHAPE, config=config)
    saved = bench_counts.saved_tensors(peers.ours(problem), problem)
    dense = [t.shape for t in saved if t.kind == "other" and math.prod(t.shape) >= SHAPE.n * SHAPE.k]
    assert not dense


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_saved_bytes_have_the_size_of_the_rank(config: GLoRAConfig) -> None:
    """Of h (M, ≤2R), U (N,R), σ (M,) and β (N,) at most; nothing of M·K, M·N or N·K but x and y."""
    problem = problems.make_problem(SHAPE, config=config)
    saved = bench_counts.saved_tensors(peers.ours(problem), problem)
    small = SHAPE.m * 2 * SHAPE.r + SHAPE.n * SHAPE.r + SHAPE.m + SHAPE.n + SHAPE.k
    assert bench_counts.bytes_of(saved, "other") <= small * DTYPES[SHAPE.dtype].itemsize


@pytest.mark.parametrize("alpha", [None, 16.0])
def test_lora_keeps_h_and_x_only(alpha: float | None) -> None:
    problem = problems.make_problem(SHAPE, config=GLoRAConfig.lora(rank=SHAPE.r, alpha=alpha))
    saved = bench_counts.saved_tensors(peers.ours(problem), problem)
    others = [tensor for tensor in saved if tensor.kind == "other"]
    assert [tensor.shape for tensor in others] == [(SHAPE.m, SHAPE.r)]
    assert bench_counts.bytes_of(saved, "other") == SHAPE.m * SHAPE.r * DTYPES[SHAPE.dtype].itemsize
    assert any(tensor.kind == "x" for tensor in saved)
    assert not any(tensor.kind == "y" for tensor in saved)


@pytest.mark.parametrize("a", ["none", "vector"])
def test_x_is_kept_for_a_alone_where_b_down_is_frozen(a: str) -> None:
    """LoRA-FA: dB_up needs h alone; a trained A keeps x beside y, for rows where y holds little of xWᵀ."""
    problem = _problem(a, "lora", "none", "none", "none")
    layer = peers.ours(problem)
    layer.params["B_down"].requires_grad_(False)
    saved = bench_counts.saved_tensors(layer, problem)
    assert any(tensor.kind == "x" for tensor in saved) == (a == "vector")
    assert (SHAPE.m, SHAPE.r) in [tensor.shape for tensor in saved if tensor.kind == "other"]


@pytest.mark.parametrize("b", ["vector", "constant", "none"])
def test_a_vector_keeps_x_and_y_instead_of_z(b: str) -> None:
    problem = _problem("vector", b, "none", "none", "none")
    saved = bench_counts.saved_tensors(peers.ours(problem), problem)
    kinds = {tensor.kind for tensor in saved}
    assert kinds >= {"x", "y"}
    assert (SHAPE.m, SHAPE.n) not in [tensor.shape for tensor in saved if tensor.kind == "other"]


def test_a_frozen_adapter_keeps_nothing() -> None:
    problem = _problem("vector", "lora", "none", "none", "none")
    layer = peers.ours(problem)
    for parameter in layer.params.values():
        parameter.requires_grad_(False)
    saved = bench_counts.saved_tensors(layer, problem)
    assert {tensor.kind for tensor in saved} <= {"parameter"}


def test_launches_of_a_decoder_layer() -> None:
    """Fused, q/k/v and gate/up are one launch each; PEFT's LoRA is base, A, B, scale and add of each linear."""
    found = bench_counts.launches()
    assert found["sets"] == {"q/k/v": 1, "gate/up": 1, "o": 2, "down": 2}
    assert found["rows"] == {"frozen": 7, "ours": 6, "peft": 35}
    assert (
        "7 frozen; 6 here (planned for sm_90: q/k/v 1, gate/up 1, o 2, down 2); 35 in PEFT" in tables.launches(found)[0]
    )


def test_in_place_products_are_counted() -> None:
    """What a profiler counts as zero: addmm_, baddbmm_, and out=."""
    a, b, out = torch.ones(3, 5), torch.ones(5, 7), torch.zeros(3, 7)
    with bench_counts.ProductCounter() as counter:
        out.addmm_(a, b)
        torch.mm(a, b, out=out)
        torch.addmm(out, a, b, out=out)
        out[None].baddbmm_(a[None], b[None])
        torch.nn.functional.linear(a, b.t())
        torch.mv(b.t(), torch.ones(5))
    assert counter.total() == 5 * (2 * 3 * 5 * 7) + 2 * 5 * 7


def test_an_unknown_product_is_an_error() -> None:
    x, kernel = torch.ones(1, 1, 4), torch.ones(1, 1, 2)
    with bench_counts.ProductCounter(), pytest.raises(NotImplementedError, match="conv"):
        torch.nn.functional.conv1d(x, kernel)


def test_the_literal_formula_is_what_the_limits_exclude() -> None:
    """A dense W_eff: a third product, and N·K kept. The tests above would fail on it."""
    problem = _problem("vector", "lora", "none", "none", "none")
    literal = peers.eager(problem)
    assert bench_counts.gemm_equivalents(literal, problem) > bench_counts.limit(problem.config)
    saved = bench_counts.saved_tensors(literal, problem)
    assert any(t.kind == "other" and math.prod(t.shape) >= SHAPE.n * SHAPE.k for t in saved)


HALF = Entry("frozen", "ours", m=256, n=384, k=512, r=8, dtype="bf16")
SUPPORTS = [(support, form) for support, forms in bench_counts.FORMS.items() for form in forms]


@pytest.mark.parametrize(("support", "form"), SUPPORTS)
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_ours_keeps_the_contribution(support: str, form: str, size: float) -> None:
    case = bench_counts.small_problem(support, form, size, HALF)
    with backend("eager"):
        found = bench_counts.survival(case, peers.ours(case))
    assert 0.9 <= found["y"].share <= 1.1
    assert 0.9 <= found["dx"].share <= 1.1


@pytest.mark.parametrize("form", ["vector", "constant", "lora"])
def test_the_plain_way_loses_it(form: str) -> None:
    """The measure discriminates: a W_eff in bfloat16 has lost most of |A| = 1e-3."""
    case = bench_counts.small_problem("A", form, 1e-3, HALF)
    found = bench_counts.survival(case, peers.eager(case))
    assert found["y"].share < 0.5
    assert found["dx"].share < 0.5


@pytest.mark.parametrize(("support", "form"), SUPPORTS)
def test_the_error_is_near_its_floor(support: str, form: str) -> None:
    """Nothing beats the rounding of y itself; a dither before it costs at most a factor of two."""
    case = bench_counts.small_problem(support, form, 1e-2, HALF)
    with backend("eager"):
        found = bench_counts.survival(case, peers.ours(case))
    assert found["y"].error <= 2.0 * bench_counts.survival_floor(case)["y"].error
    assert found["dx"].error <= 2.0 * bench_counts.survival_floor(case)["dx"].error


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
