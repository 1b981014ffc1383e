"""Small models in float64 for the tests of `methods`, and what they compute by the letter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from helpers import EVERYTHING, interrupted
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
LORA = GLoRAConfig.lora(4, 8)  # s = 2
ALL_LOW_RANK = GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=4, alpha=6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v(torch.tanh(self.q(x)))


class Net(nn.Module):
    """Two blocks with q (8, 6) and v (6, 8)."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


PATHS = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")


def plain(blocks: int = 2) -> Net:
    torch.manual_seed(0)
    return Net(blocks).double()


def random_(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random values in everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * values)
    return model


def net(config: object = LORA, blocks: int = 2) -> nn.Module:
    return random_(gk.inject(plain(blocks), config))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: model.get_submodule(path) for path in PATHS}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: nn.Module, steps: int = 2, **options: object) -> torch.optim.Optimizer:
    """AdamW that has taken some steps, so that there are moments."""
    optimizer = torch.optim.AdamW(trained(model), lr=0.01, **options)
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - 1).square().sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss


def forward(weights: dict[str, tuple[Tensor, Tensor]], x: Tensor = X) -> Tensor:
    """A `Net` by the letter. weights: (weight, bias) by path."""
    for block in range(len(weights) // 2):
        q, v = weights[f"layers.{block}.q"], weights[f"layers.{block}.v"]
        x = x + torch.tanh(x @ q[0].t() + q[1]) @ v[0].t() + v[1]
    return x


def state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[object]:
    """All that a failed call must leave alone, to compare with `unchanged`."""
    found: list[object] = [(name, id(p), p.detach().clone(), p.grad) for name, p in model.named_parameters()]
    found += [(name, id(b), b.clone(), None) for name, b in model.named_buffers()]
    found += [(path, type(m), vars(m).get("config")) for path, m in model.named_modules()]
    if optimizer is not None:
        for parameter, own in optimizer.state.items():
            found += [(id(parameter), key, copy.deepcopy(value)) for key, value in own.items()]
    return found


def unchanged(before: list[object], after: list[object]) -> bool:
    def equal(a: object, b: object) -> bool:
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b

    return len(before) == len(after) and all(map(equal, before, after))


def at_every_line(make: Callable, act: Callable, check: Callable, most: int = 40) -> None:
    """`check(model)` where `act(model)` was interrupted at line 1, 2, ..., to its last line."""
    lines = 1
    while interrupted(partial(act, make()), lines):
        lines *= 2
    step = 1 if EVERYTHING else max(1, lines // 2 // most)
    line = 1
    while interrupted(partial(act, model := make()), line):
        check(model)
        line += step
    assert line > 10
