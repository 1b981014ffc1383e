"""Rows of many adapters on a card: real launches, equal bits, and a graph whose assignment is data. `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapters import Mixed, mixed

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
