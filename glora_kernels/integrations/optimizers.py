"""Optimizers of PEFT, over parameters that need not be PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def lora_fa_optimizer(
    pairs: Sequence[tuple[nn.Parameter, nn.Parameter, float]],
    others: Sequence[nn.Parameter],
    lr: float,
    options: dict[str, Any],
) -> torch.optim.Optimizer:
    """PEFT's `LoraFAOptimizer` over pairs (D, U, s) and other parameters.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        from peft.optimizers.lorafa import LoraFAOptimizer
    except ImportError as error:
        raise ImportError("LoRA-FA needs PEFT: pip install 'glora_kernels[peft]'") from error
    # It tells pairs by "lora" in their names, and keeps its state by what stands before that.
    parameters = [p for down, up, _ in pairs for p in (down, up)] + list(others)
    names = [name for i in range(len(pairs)) for name in (f"{i}.lora_A", f"{i}.lora_B")]
    names += [f"{len(pairs) + i}.other" for i in range(len(others))]
    scales = [s for _, _, scale in pairs for s in (scale, scale)] + [1.0] * len(others)
    group: Any = {"params": parameters, "names": names, "scaling_factors": scales}
    return LoraFAOptimizer([group], lr=lr, **options)
