"""Tensor parallelism: layers whose parameters are cut over the ranks of a mesh, by torch's or transformers' plans.

The public names are looked up when asked for, since `torch.distributed.tensor` takes a second to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glora_kernels.parallel.cost import traffic
    from glora_kernels.parallel.plans import plan
    from glora_kernels.parallel.styles import GLoRAColwise, GLoRARowwise

__all__ = ["GLoRAColwise", "GLoRARowwise", "plan", "traffic"]

_WHERE = {"GLoRAColwise": "styles", "GLoRARowwise": "styles", "plan": "plans", "traffic": "cost"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
