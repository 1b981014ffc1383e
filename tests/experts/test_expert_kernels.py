"""The kernels of experts against the truth, through the operator: interpreted (on a card: tests/gpu)."""

from __future__ import annotations

import pytest
import torch
from routed import RAGGED, routed

from glora_kernels.quant import quantize_weight
from glora_kernels.runtime import configs
from glora_kernels.runtime.program import launching
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these run in the interpreter; see tests/gpu"),
]
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
LORA, DROPPING = GLoRAConfig.lora(3, 6.0), GLoRAConfig.lora(16, 8.0, dropout=0.4)
VECTORS = GLoRAConfig("vector", "lora", "vector", "vector", "vector", 3, 2.0, dropout=0.25)
CONSTANTS = GLoRAConfig("constant", "constant", "lora", "none", "constant", 1)
SUMS = GLoRAConfig("vector", "vector", "none", "none", "none")
PRODUCT = GLoRAConfig("lora", "lora", "none", "none", "vector", 2, variant="matmul")
SORTED = RAGGED.flatten().clamp(min=0, max=4).sort().values


@pytest.fixture(autouse=True)
def on_triton():
    with backend("triton"):
        yield


@pytest.mark.parametrize(("config", "dtype", "adapters"), [
    (LORA, SINGLE, None), (VECTORS, SINGLE, None), (CONSTANTS, HALF, None), (SUMS, SINGLE, None),
    (PRODUCT, SINGLE, None), (DROPPING, HALF, SINGLE), (VECTORS, BRAIN, SINGLE), (LORA, BRAIN, None),
], ids=str)  # fmt: skip
def test_against_truth(config, dtype, adapters):
    problem = routed(config, RAGGED, bias=config in (VECTORS, LORA), dtype=dtype, adapters=adapters, size=0.2)
    problem.check(problem.ours(), dtype)


@pytest.mark.parametrize("index", [
    torch.tensor([[4, 2]]), torch.full((7, 1), 3), torch.arange(5).flip(0), torch.full((3, 2), -1),
], ids=["one token", "all on one expert", "a row each", "no expert"])  # fmt: skip
def test_groups_of_every_size(index):
    problem = routed(VECTORS, index)
    for _ in range(2):  # as it is planned, and as its program repeats it
        problem.check(problem.ours(), SINGLE)


@pytest.mark.parametrize("config", [LORA, VECTORS, SUMS], ids=str)
def test_sorted_rows(config):
    rows = torch.cat([SORTED, torch.full((3,), 5)])
    problem = routed(config, rows, is_sorted=True, bias=True)
    problem.check(problem.ours(), SINGLE)


def test_many_rows_larger_ranks_and_bands(monkeypatch):
    """Several tiles of one expert, blocks of ranks, sums over several bands."""
    monkeypatch.setitem(configs.PROGRAMS, "cpu", 64)
    index = torch.randint(-1, 3, (50, 2), generator=torch.Generator().manual_seed(1))
    problem = routed(GLoRAConfig("vector", "lora", "none", "none", "none", 70, dropout=0.2), index, 3, k=72, n=70)
    with launching(cached=False):
        problem.check(problem.ours(), SINGLE)


@pytest.mark.parametrize(("quant_type", "nested", "k", "n"), [("nf4", False, 64, 20), ("fp4", True, 40, 24)])
def test_over_4_bits(quant_type, nested, k, n):
    """Of 40 columns, blocks of 64 codes do not begin where rows do."""
    problem = routed(VECTORS, RAGGED, k=k, n=n)
    problem.weight = quantize_weight(problem.weight.view(-1, k), quant_type, double_quant=nested)
    problem.check(problem.ours(), SINGLE)


def test_strides():
    """x, W and dy of any, as gpt-oss stores W; factors that all experts share."""
    problem = routed(LORA, RAGGED)
    with torch.no_grad():
        wide = torch.full((len(RAGGED), 49), float("nan"))
        wide[:, 1::2] = problem.x
        problem.x = wide[:, 1::2].requires_grad_()
        problem.weight = problem.weight.mT.contiguous().mT
        problem.dy = problem.dy.t().contiguous().t()
        problem.adapters["B_down"] = problem.adapters["B_down"][:1].expand(5, -1, -1).requires_grad_()
    problem.check(problem.ours(), SINGLE)


def test_what_is_not_wanted_is_left_out(launched):
    problem = routed(VECTORS, RAGGED)
    for trained in (["x"], ["E"], ["A"], ["B_down"], ["B_up"]):
        for name, leaf in {"x": problem.x, **problem.adapters}.items():
            leaf.requires_grad_(name in trained)
        found = problem.ours()
        assert found.keys() == {"y", *(f"d{name}" for name in trained)}
        problem.check(found, SINGLE)


def test_the_same_bits_every_time_and_for_every_m_of_a_class():
    index = torch.randint(5, (30, 2), generator=torch.Generator().manual_seed(2))
    for count in (30, 24):
        problem = routed(VECTORS, index[:count], dtype=HALF, size=0.2)
        with launching(cached=False):
            anew = problem.ours()
        repeated = problem.ours()
        assert all(torch.equal(anew[name], repeated[name]) for name in anew)


def test_a_mask_that_was_wrong_would_show():
    problem = routed(DROPPING, RAGGED)
    found = problem.ours()
    problem.seed = problem.seed + 1
    with pytest.raises(AssertionError):
        problem.check(found, SINGLE)
