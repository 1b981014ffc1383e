"""The gradients of parameters that every rank has whole: parts of a sum, added up once, when a step needs them.

Backward leaves such a gradient as a DTensor whose placement is Partial, so gradients accumulate over several backwards
without communication. An optimizer would reduce it in each of its operations; `settle` does it once a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from glora_kernels.nn.ranks import is_part


@torch.no_grad()
def settle(parameters: Iterable[Tensor]) -> None:
    """Add up over the ranks the gradients that are parts of a sum; every rank must call it with the same ones."""
    for parameter in parameters:
        grad: Any = parameter.grad
        if grad is not None and is_part(grad) and grad.placements != parameter.placements:  # type: ignore[attr-defined]
            parameter.grad = grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def settle_before_steps() -> None:
    """From now on every optimizer of PyTorch settles the gradients of its parameters before it steps."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_settle_groups))


_hooks: list[Any] = []


def _settle_groups(optimizer: Optimizer, *_: Any) -> None:
    settle(parameter for group in optimizer.param_groups for parameter in group["params"])
