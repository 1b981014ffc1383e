"""The gradients of parameters that every rank has whole: parts of a sum, added up once, when a step needs them.

Backward leaves such a gradient as a DTensor whose placement is Partial, so gradients accumulate over several backwards
without communication. An optimizer would reduce it in each of its operations; `settle` does it once, for many
parameters in one collective.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from glora_kernels.nn.ranks import is_part

BUCKET = 32 * 2**20
"""The bytes of gradients that one collective adds up, or those of one gradient that is larger."""


@torch.no_grad()
def settle(parameters: Iterable[Tensor]) -> None:
    """Add up over the ranks the gradients that are parts of a sum; every rank must call it with the same ones."""
    waiting: dict[Any, list[Any]] = {}
    for parameter in dict.fromkeys(parameters):
        grad: Any = parameter.grad
        if grad is None or not is_part(grad) or grad.placements == parameter.placements:  # type: ignore[attr-defined]
            continue
        if grad.device_mesh.ndim == 1 and grad.placements[0].is_partial("sum"):
            waiting.setdefault((grad.device_mesh, grad.dtype), []).append(parameter)
        else:
            parameter.grad = grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    for alike in waiting.values():
        for bucket in _buckets(alike):
            _add_up(bucket)


def _buckets(parameters: list[Any]) -> Iterable[list[Any]]:
    bucket: list[Any] = []
    size = 0
    for parameter in parameters:
        own = parameter.grad.nbytes
        if bucket and size + own > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += own
    yield bucket


def _add_up(parameters: list[Any]) -> None:
    from torch.distributed.tensor import DTensor

    mesh = parameters[0].grad.device_mesh
    parts = [parameter.grad.to_local() for parameter in parameters]
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat, group=mesh.get_group())
    for parameter, part, total in zip(parameters, parts, flat.split([part.numel() for part in parts]), strict=True):
        parameter.grad = DTensor.from_local(total.view(part.shape), mesh, parameter.placements, run_check=False)


def settle_before_steps() -> None:
    """From now on every optimizer of PyTorch settles the gradients of its parameters before it steps."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_settle_groups))


_hooks: list[Any] = []


def _settle_groups(optimizer: Optimizer, *_: Any) -> None:
    settle(parameter for group in optimizer.param_groups for parameter in group["params"])
