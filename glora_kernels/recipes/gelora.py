"""GeLoRA: a layer's rank from how much the intrinsic dimension of the hidden states grows across its block.

Source: Ed-dib et al., "GeLoRA: Geometric Adaptive Ranks For Efficient LoRA Fine-tuning", 2024 (arXiv 2412.09250).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from glora_kernels.methods.allocate import intrinsic_ranks, with_ranks
from glora_kernels.nn.inject import inject
from glora_kernels.nn.model import evaluating
from glora_kernels.spec import GLoRAConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def gelora(
    model: nn.Module,
    batches: Iterable[Any],
    config: GLoRAConfig | None = None,
    target_modules: str | Iterable[str] = ATTENTION,
    train: str | Iterable[str] = (),
    samples: int = 2000,
) -> dict[str, int]:
    """Inject adapters of rank r_i = max(d_{i+1} − d_i, 0) + 1 into block i; alpha/r is the same everywhere.

    Args:
        model: before `inject`.
        batches: of the data to fine-tune on; what the model is called with.
        config: of the adapters, with any rank; None: LoRA with s = 2.
        target_modules, train: as for `inject`.
        samples: hidden states a block.

    Returns:
        The ranks by path.

    Raises:
        ImportError, ValueError: those of `intrinsic_ranks` and `inject`.
    """
    with evaluating(model):
        ranks = intrinsic_ranks(model, batches, target_modules, samples)
    inject(model, with_ranks(config or GLoRAConfig.lora(8, 16), ranks), list(ranks), train)
    return ranks
