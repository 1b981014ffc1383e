"""Fixtures of the tests of accelerated PEFT models; `twins` holds what they are made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import Net, Twins, randomized


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Trainers of older releases leave their precision behind, in the environment and in accelerate's state."""
    before = set(os.environ)
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in os.environ.keys() - before:
        if name.startswith("ACCELERATE_"):
            del os.environ[name]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The operands of every call that reached our operators from an accelerated layer."""
    from glora_kernels.integrations.accelerated import layers

    seen: list[Any] = []
    real = layers.peft_linear

    def counted(x: Tensor, base: Any, operands: Any) -> Tensor:
        seen.append(operands)
        return real(x, base, operands)

    mixed = layers.mixed_linear

    def counted_mixed(x: Tensor, base: Any, adapters: Any, *others: Any) -> Tensor:
        seen.append(adapters)
        return mixed(x, base, adapters, *others)

    monkeypatch.setattr(layers, "peft_linear", counted)
    monkeypatch.setattr(layers, "mixed_linear", counted_mixed)
    return seen


@pytest.fixture
def adapted() -> Callable[..., Any]:
    """Builds a PEFT model over `Net` in float64, adapters away from zero."""

    def build(config: Any, bias: bool = True, dtype: torch.dtype = torch.float64, net: Any = None) -> Any:
        from peft import get_peft_model

        torch.manual_seed(0)
        net = (Net(bias) if net is None else net).to(dtype)
        return randomized(get_peft_model(net, config, autocast_adapter_dtype=False))

    return build


@pytest.fixture
def twins(adapted: Callable[..., Any], calls: list[Any]) -> Callable[..., Twins]:
    """Builds `Twins` of a PEFT configuration over `Net`, or another model."""
    return lambda config, **more: Twins(adapted(config, **more), calls)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
