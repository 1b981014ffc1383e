"""Groups of layers on a card: real launches through descriptors and addresses, graphs, equal bits. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import glora_kernels as gk
from glora_kernels.glora.op import dropout_seed
from glora_kernels.ops import grouped_lora_linear
from glora_kernels.reference import keep_mask
from glora_kernels.reference.tolerance import allowed_error, largest_error

pytestmark = pytest.mark.gpu

SCALE = 0.5
GROUPS = {"q, k, v": (4096, 1024, 1024), "gate, up": (1536, 1536), "by addresses": (264, 520, 136, 264, 264)}
groups = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


class Group:
    """The tensors of one call: one x for all, a pair of factors each."""

    def __init__(
        self, m: int, k: int, sizes: tuple[int, ...], rank: int, dtype: torch.dtype, tied: bool = False
    ) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)

        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device="cuda") * std).to(dtype)

        self.x = draw(m, k).requires_grad_()
        self.weights = [draw(n, k, std=k**-0.5) for n in sizes]
        first = draw(rank, k, std=k**-0.5).requires_grad_()
        self.downs = [first if tied else draw(rank, k, std=k**-0.5).requires_grad_() for _ in sizes]
        self.ups = [draw(n, rank, std=0.05).requires_grad_() for n in sizes]
        self.biases = [draw(n).requires_grad_() for n in sizes]
        self.dys = [draw(m, n) for n in sizes]
        self.leaves = list(dict.fromkeys([self.x, *self.downs, *self.ups, *self.biases]))

    def ours(self, p: float = 0.0, seeds: list[Tensor] | None = None) -> list[Tensor]:
        ys = grouped_lora_linear(
            self.x, self.weights, self.downs, self.ups, self.biases, scales=SCALE, dropout_p=p, seeds=seeds
        )  # fmt: skip
        grads = torch.autograd.grad(ys, self.leaves, self.dys)
        return [*(y.detach() for y in ys), *grads]

    def literal(self, dtype: torch.dtype, p: float = 0.0, seeds: list[Tensor] | None = None) -> list[Tensor]:
        copies = {leaf: leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves}
        x, ys = copies[self.x], []
        for i, weight in enumerate(self.weights):
            dropped = x if seeds is None else x * keep_mask(seeds[i].cuda(), *x.shape, p) / (1 - p)
            h = dropped @ copies[self.downs[i]].t()
            ys.append(x @ weight.to(dtype).t() + SCALE * h @ copies[self.ups[i]].t() + copies[self.biases[i]])
        grads = torch.autograd.grad(ys, list(copies.values()), [dy.to(dtype) for dy in self.dys])
        return [*(y.detach() for y in ys), *grads]

    def check(self, dtype: torch.dtype, p: float = 0.0, seeds: list[Tensor] | None = None) -> None:
        found = self.ours(p, seeds)
        for value, truth, eager in zip(
            found, self.literal(torch.float64, p, seeds), self.literal(dtype, p, seeds), strict=True
        ):
            assert largest_error(value, truth) <= allowed_error(truth, eager, dtype)


@dtypes
@groups
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_a_group_is_right(sizes, rank, dtype):
    Group(517, 1024, sizes, rank, dtype).check(dtype)


@dtypes
@pytest.mark.parametrize("tied", [False, True])
def test_a_group_with_dropout_is_right(tied, dtype):
    seed = dropout_seed(torch.device("cuda"))
    seeds = [seed] * 3 if tied else [dropout_seed(torch.device("cuda")) for _ in range(3)]
    Group(517, 1024, (512, 256, 256), 16, dtype, tied).check(dtype, 0.1, seeds)


@groups
def test_a_model_size_in_bf16(sizes):
    Group(8192, 4096, sizes, 16, torch.bfloat16).check(torch.bfloat16)


@groups
def test_twenty_runs_give_the_same_bits(sizes):
    group = Group(517, 1024, sizes, 16, torch.bfloat16)
    first = group.ours()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, group.ours(), strict=True))


@groups
def test_cuda_graph(sizes):
    """Captured once; a replay sees new inputs."""
    group = Group(256, 1024, sizes, 16, torch.bfloat16)
    group.ours()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group.ours()
    with torch.no_grad():
        group.x.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, group.ours(), strict=True))


def test_fused_siblings_equal_the_layers_one_by_one():
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(256, n) for n in (256, 128, 128))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    torch.manual_seed(0)
    model = gk.inject(Attention().cuda(), gk.GLoRAConfig.lora(rank=8, alpha=16), adapter_dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    x = torch.randn(64, 256, device="cuda")
    alone = model(x)
    gk.fuse_siblings(model)
    together = model(x)
    assert largest_error(together, alone) <= 8 * torch.finfo(torch.float32).eps * float(alone.abs().max())
