"""Rows of many adapters on a card: real launches, equal bits, and a graph whose assignment is data. `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import Mixed, mixed

from glora_kernels.ops import glora_linear
from glora_kernels.runtime.routes import batch_invariant
from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.gpu
CONFIGS = [
    GLoRAConfig.lora(16, 32.0), GLoRAConfig.lora(8, 8.0, dropout=0.1), GLoRAConfig.lora(64, 64.0),
    GLoRAConfig("vector", "lora", "vector", "vector", "vector", 16), GLoRAConfig.lora(16, 32.0),
    GLoRAConfig("none", "vector", "none", "none", "none"),
]  # fmt: skip


def on_card(dtype: torch.dtype, m: int, count: int = len(CONFIGS)) -> Mixed:
    rows = torch.randint(-1, count, (m,), generator=torch.Generator().manual_seed(m))
    made = mixed(CONFIGS[:count], rows, k=512, n=384, dtype=dtype, size=0.05)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cuda().requires_grad_(tensor.requires_grad)

    return replace(
        made, x=moved(made.x), weight=moved(made.weight), bias=moved(made.bias), seeds=[s.cuda() for s in made.seeds],
        adapters=[{name: moved(t) for name, t in own.items()} for own in made.adapters], rows=rows.cuda(),
        dy=made.dy.cuda(),
    )  # fmt: skip


@pytest.mark.parametrize("m", [1, 32, 700, 4500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_truth(dtype, m):
    problem = on_card(dtype, m)
    found = problem.ours()
    problem.check(found, dtype)
    again = problem.ours()
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_graph_takes_another_assignment():
    problem = on_card(torch.bfloat16, 32)
    with torch.no_grad():
        problem.call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = problem.call()
        problem.rows.copy_(problem.rows.flip(0))
        graph.replay()
        assert torch.equal(y, problem.call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_batch_invariant_the_bits_are_those_of_each_adapter_alone(dtype):
    problem = on_card(dtype, 700)
    with batch_invariant():
        found, wanted = problem.ours(), problem.loop()
        problem.check(found, dtype)
        for m in (1, 33):  # of adapters without dropout, whose masks go by the number of a row
            few = replace(problem, x=problem.x[-m:], rows=problem.rows[-m:], dy=problem.dy[-m:])
            kept = (few.rows != 1).nonzero().squeeze(1)
            assert torch.equal(few.ours()["y"][kept], found["y"][-m:][kept])
            assert torch.equal(few.ours()["dx"][kept], found["dx"][-m:][kept])
    assert [name for name in found if name != "dbias" and not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [CONFIGS[0], CONFIGS[3], GLoRAConfig("lora", "lora", "none", "none", "none", 16)], ids=str
)
def test_inside_batch_invariant_a_row_has_the_same_bits_in_any_batch(config, dtype):
    problem = replace(on_card(dtype, 8192, 1), configs=[config])
    one = mixed([config], [0], k=512, n=384, dtype=dtype, size=0.05)
    adapter = {name.lower(): t.detach().cuda() for name, t in one.adapters[0].items()}

    def results(rows):
        x = problem.x[rows].detach().requires_grad_()
        y = glora_linear(x, problem.weight, problem.bias, **adapter, scale=config.scale)
        return y.detach(), torch.autograd.grad(y, x, problem.dy[rows])[0]

    with batch_invariant():
        whole = results(slice(None))
        for rows in (slice(5, 6), slice(8191, 8192), slice(100, 107), slice(3, 515), slice(1, 3000)):
            for found, wanted in zip(results(rows), whole, strict=True):
                assert torch.equal(found, wanted[rows])
