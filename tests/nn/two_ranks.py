"""What the cases of two processes share: the model, its batches and steps, and how two of them are compared.

The oracle is the same model in one piece on the whole batch, in float64, whose gradient a sum over ranks can differ
from by rounding only: 1e-12 in tensors of the size of one.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels.nn.ranks import whole

EXACT = 1e-12
RANKS = 2


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.q_proj, self.v_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Linear(dim, dim)

    def forward(self, x):
        z = self.ln(x)
        x = x + (self.q_proj(z) @ z.transpose(-1, -2)).softmax(-1) @ self.v_proj(z)
        return x + F.gelu(self.mlp(x))


class Classifier(nn.Module):
    """Embedding, three blocks, head; `reentrant` None runs the blocks without activation checkpointing."""

    def __init__(self, dim=16, depth=3):
        super().__init__()
        self.embed = nn.Linear(8, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 5)
        self.reentrant = None

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


def plain(dtype=torch.float64):
    torch.manual_seed(0)
    return Classifier().to(dtype)


def build(share="A", reentrant=None, dtype=torch.float64, seed=1, onto="cpu"):
    """The model, its adapters away from zero; `seed` decides their values. E is one number: a rank's part is empty."""
    config = gk.ShareLoRAConfig(rank=3, alpha=6, share=share, E="constant")
    model = gk.inject(plain(dtype).to(onto), config, train=["head"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith("head."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    model.reentrant = reentrant
    return model


def batch(step, rank=None, dtype=torch.float64):
    """Eight samples, different at each step; a rank has its half of them."""
    x = torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64).to(dtype)
    target = (torch.arange(8) * 3 + step) % 5
    half = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    return x[half], target[half]


def backward(model, step, rank=None, dtype=torch.float64):
    x, target = batch(step, rank, dtype)
    loss = F.cross_entropy(model(x).float() if dtype != torch.float64 else model(x), target)
    loss.backward()
    return loss.detach()


def sgd(model):
    return torch.optim.SGD(gk.parameter_groups(model), lr=0.1, momentum=0.9)


def train(model, optimizer, steps, rank=None, max_norm=0.5):
    """Losses of the steps; on a rank, averaged over the ranks."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, step, rank)
        gk.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if rank is not None:
            dist.all_reduce(loss)
            loss /= RANKS
        losses.append(loss.item())
    return losses


def gradients(model):
    return {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad}


def values(model):
    return {n: whole(p.detach()).clone() for n, p in model.named_parameters()}


def assert_alike(ours, theirs, tolerance=EXACT):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, ours_ in ours.items():
        torch.testing.assert_close(ours_, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def shared_factors(model):
    """The parameters that several blocks have, each once."""
    every = [p for block in model.blocks for p in block.parameters()]
    return list({p: None for p in every if sum(p is other for other in every) > 1})


def raises(kind, text, act):
    with pytest.raises(kind, match=re.escape(text)):
        act()
