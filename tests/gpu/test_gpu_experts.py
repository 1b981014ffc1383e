"""Experts on a card: real launches, equal bits, and a graph whose routing is data. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from routed import Routed, routed

from glora_kernels.quant import quantize_weight
from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.gpu
CONFIGS = {
    "LoRA": GLoRAConfig.lora(16, 32.0), "rank 1, dropout": GLoRAConfig.lora(1, 2.0, dropout=0.1),
    "everything": GLoRAConfig("vector", "lora", "none", "none", "vector", 16),
}  # fmt: skip


def on_card(config: str, dtype: torch.dtype, tokens: int) -> Routed:
    index = torch.randint(-1, 16, (tokens, 4), generator=torch.Generator().manual_seed(tokens))
    return routed(CONFIGS[config], index, 16, k=512, n=384, dtype=dtype, size=0.05).on("cuda")


@pytest.mark.parametrize("tokens", [1, 64, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_against_truth(config, dtype, tokens):
    problem = on_card(config, dtype, tokens)
    found = problem.ours()
    problem.check(found, dtype)
    again = problem.ours()
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("nested", [False, True])
def test_over_4_bits(nested):
    problem = on_card("everything", torch.bfloat16, 64)
    problem.weight = quantize_weight(problem.weight.view(-1, 512), "nf4", double_quant=nested)
    problem.check(problem.ours(), torch.bfloat16)


def test_a_graph_takes_another_routing():
    problem = on_card("LoRA", torch.bfloat16, 64)
    with torch.no_grad():
        problem.call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = problem.call()
        problem.index.copy_(problem.index.flip(0))
        graph.replay()
        assert torch.equal(y, problem.call())
