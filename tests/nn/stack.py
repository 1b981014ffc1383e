"""Small models of the tests of what is done for all layers at once, and one training step of them."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import GLoRAConfig


def names(steps):
    return [step.kernel.__name__ for step in steps if hasattr(step, "kernel")]


class Stack(nn.Module):
    """Residual blocks of two layers each, through activation checkpoints if asked for."""

    def __init__(self, dim=12, depth=3, dtype=torch.float32):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim + 7), nn.GELU(), nn.Linear(dim + 7, dim, bias=False)) for _ in range(depth)
        ).to(dtype)
        self.reentrant = None

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


SHIFTS = {
    "*.0": GLoRAConfig("vector", "lora", "lora", "vector", "constant", rank=3, dropout=0.25),
    "*.2": GLoRAConfig("none", "none", "vector", "none", "vector"),
}


def shifted(randomize, dtype=torch.float32, depth=3):
    return randomize(gk.inject(Stack(depth=depth, dtype=dtype), SHIFTS, target_modules=["0", "2"]))


def step(model, x, context=None):
    """y and every gradient of one training step, and what the context gave."""
    model.zero_grad()
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    if context is None:
        given, y = None, model(leaf)
        y.square().sum().backward()
    else:
        with context(model) as given:
            y = model(leaf)
            y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **grads}, given


def close(got, expected, rtol=1e-5):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        size = float(expected[name].abs().max())
        assert float((value.double() - expected[name].double()).abs().max()) <= rtol * size, name
