"""A small model, PEFT's copy and ours of it, and one step of both."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import glora_kernels as gk

EXACT = 1e-12
ADAPTERS = ("lora_", "glora_", "hira_", "modules_to_save")


class Net(nn.Module):
    """Two linear layers around a transformers `Conv1D`, which stores its weight transposed."""

    def __init__(self, bias: bool = True):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.up, self.mix, self.down = nn.Linear(20, 12, bias=bias), Conv1D(9, 12), nn.Linear(9, 7, bias=bias)
        nn.init.normal_(self.mix.weight, std=0.3)
        nn.init.normal_(self.mix.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.mix(torch.tanh(self.up(x)))))


def randomized(model: nn.Module, size: float = 0.3) -> nn.Module:
    """The model, each parameter of an adapter away from zero: the same one for the same name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ADAPTERS) and not parameter.is_meta:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_((noise * size).to(parameter.dtype))
    return model


def step(model: nn.Module, x: Tensor, dy: Tensor | None = None, **more: Any) -> dict[str, Tensor]:
    """y, dx and the gradient of every parameter that gets one; the parameters' own are cleared before and after."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x, **more)
    if dy is None:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    y.backward(dy.to(y))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        if value.numel():
            error = float((got[name].detach().double() - value.detach().double()).abs().max())
            assert error <= tolerance * max(1.0, float(value.detach().double().abs().max())), f"{name}: {error}"


def reasons(model: nn.Module) -> set[str]:
    """Why layers of the model keep PEFT's path, by the summary."""
    return {reason for _, reason in gk.acceleration(model).kept}


class Twins:
    """One model twice: as PEFT runs it, and accelerated. `calls` holds the operands of each call on our operators."""

    def __init__(self, model: nn.Module, calls: list[Any]):
        self.plain, self.calls = model, calls
        self.fast = gk.accelerate(copy.deepcopy(model), verbose=False)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.plain, self.fast))

    def both(self, change: Callable[[Any], Any]) -> list[Any]:
        """The same change to both, the adapters it adds away from zero."""
        found = [change(model) for model in self]
        for model in self:
            randomized(model)
        return found

    def check(self, x: Tensor, ours: int, tolerance: float = EXACT, **more: Any) -> None:
        """One step of both is the same, and `ours` layers of the accelerated one ran on our operators."""
        expected = step(self.plain, x, **more)
        self.calls.clear()
        got = step(self.fast, x, **more)
        assert len(self.calls) == ours
        assert_same(got, expected, tolerance)
