"""Which rank each layer gets, as mappings path → rank: by depth, by scores under a budget, by intrinsic dimensions.

ranks = gk.linear_ranks(model, 4, 12)
gk.inject(model, gk.with_ranks(gk.GLoRAConfig.lora(8, 16), ranks), list(ranks))      # or LoraConfig(rank_pattern=ranks)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.methods.observe import blocks, observe
from glora_kernels.nn.inject import targets_of
from glora_kernels.nn.model import unwrap
from glora_kernels.nn.targets import find_targets
from glora_kernels.spec import GLoRAConfig


def with_ranks(config: GLoRAConfig, ranks: Mapping[str, int]) -> dict[str, GLoRAConfig | None]:
    """A mapping for `inject`: the configuration with each layer's rank and the same s; None for a rank of 0.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        >>> model = gk.inject(model, gk.with_ranks(gk.GLoRAConfig.lora(rank=8), {"0": 12, "1": 4}))
        >>> [layer.config.rank for layer in model]
        [12, 4]
    """
    return {path: config.with_rank(rank) if rank else None for path, rank in ranks.items()}


def linear_ranks(
    model: nn.Module, low: int, high: int, target_modules: str | Iterable[str] | None = None
) -> dict[str, int]:
    """Ranks that rise by depth: r_l = low + (high − low)·(l−1)/(L−1), rounded, in block l of L.

    Args:
        model: before `inject`.
        low, high: the ranks of the first and the last block; high may be the smaller one.
        target_modules: patterns of linear layers as for `inject`; layers outside the blocks are left out.

    Raises:
        ValueError: a rank below 1, or a model without blocks.

    Source: Benedek and Wolf, "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation", 2024.

    Examples:
        >>> blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
        >>> gk.linear_ranks(blocks, low=4, high=12)
        {'0.0': 4, '1.0': 8, '2.0': 12}
    """
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    found = by_block(model, target_modules)
    steps = max(len(found) - 1, 1)
    return {
        path: math.floor(low + (high - low) * place / steps + 0.5)
        for place, paths in enumerate(found)
        for path in paths
    }


def by_block(model: nn.Module, target_modules: str | Iterable[str] | None = None) -> list[list[str]]:
    """The paths of the linear layers to adapt, block by block."""
    _, chosen = find_targets(unwrap(model), targets_of(target_modules), {}, [])
    paths = [linear.path for linear in chosen]
    if not paths:
        raise ValueError("the model has no linear layer to adapt; were adapters injected before?")
    found = [[path for path in paths if f"{path}.".startswith(f"{block}.")] for block in blocks(model)]
    if not any(found):
        raise ValueError(f"none of the layers to adapt ({', '.join(paths[:3])} ...) is inside a block of the model")
    return found


def allocate(scores: Mapping[str, float], budget: int, low: int = 1, high: int | None = None) -> dict[str, int]:
    """Ranks in proportion to scores whose sum is the budget exactly, each between `low` and `high`.

    What proportion leaves over goes to the largest remainders (Hamilton's method); equal scores in the order given.

    Args:
        scores: of each layer; not negative.
        budget: the sum of all ranks.
        low, high: bounds of a rank; high None: no upper one.

    Raises:
        ValueError: no scores, one that is NaN, infinite or negative (named), or a budget outside
            len(scores)·[low, high]. All-zero scores are refused as well: they say nothing.

    Examples:
        >>> gk.allocate({"q": 3.0, "v": 1.0}, budget=16, low=2)
        {'q': 12, 'v': 4}
    """
    names = list(scores)
    values = [float(scores[name]) for name in names]
    if not names:
        raise ValueError("allocate: there are no scores")
    if wrong := [name for name, value in zip(names, values, strict=True) if not math.isfinite(value) or value < 0]:
        raise ValueError(
            f"allocate: scores must be finite and not negative; {wrong[0]!r} has {scores[wrong[0]]!r}"
            + (f" ({len(wrong)} of {len(names)} are such)" if len(wrong) > 1 else "")
        )
    if not any(values):
        raise ValueError("allocate: all scores are 0, which ranks no layer above another; observe some steps first")
    top = budget if high is None else high
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in (budget, low, top)):
        raise ValueError(f"allocate: budget, low and high must be integers, got {budget!r}, {low!r} and {high!r}")
    if low < 0 or (high is not None and high < low):
        raise ValueError(f"allocate: low and high must be integers with 0 <= low <= high, got {low!r} and {high!r}")
    if not len(names) * low <= budget <= len(names) * top:
        raise ValueError(
            f"allocate: {len(names)} layers with ranks from {low} to {top} can have {len(names) * low} to "
            f"{len(names) * top} in all; got budget={budget}"
        )
    most = max(values)
    values = [value / most for value in values]  # so that no sum overflows
    fixed: dict[int, int] = {}  # layers at a bound
    while True:
        free = [i for i in range(len(names)) if i not in fixed]
        left, weight = budget - sum(fixed.values()), sum(values[i] for i in free)
        share = {i: left * values[i] / weight if weight else left / max(len(free), 1) for i in free}
        # Those that would be pushed down free ranks, those pushed up take some: only the larger of the two is certain.
        over, under = sum(max(s - top, 0) for s in share.values()), sum(max(low - s, 0) for s in share.values())
        bound = {i: top for i in free if share[i] > top} if over >= under else {i: low for i in free if share[i] < low}
        if not bound:
            break
        fixed |= bound
    whole = {i: math.floor(s) for i, s in share.items()}
    rest = budget - sum(fixed.values()) - sum(whole.values())
    first = sorted((i for i in share if whole[i] < top), key=lambda i: (whole[i] - share[i], i))
    for i in first[:rest]:
        whole[i] += 1
    ranks = fixed | whole
    return {name: ranks[i] for i, name in enumerate(names)}


@torch.no_grad()
def intrinsic_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    target_modules: str | Iterable[str] | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, int]:
    """r_i = max(d_{i+1} − d_i, 0) + 1 for block i, d_i the intrinsic dimension of the hidden states that enter it.

    d is TwoNN's estimate (scikit-dimension); the difference is rounded.

    Args:
        model: before `inject`; put it in eval mode.
        batches: what the model is called with: a tensor, a tuple or a dict of arguments each.
        target_modules: as for `linear_ranks`.
        samples: hidden states a block that are looked at, drawn at random; the estimate takes their neighbours.
        seed: of the drawing.

    Raises:
        ImportError: scikit-dimension is not installed (`pip install 'glora_kernels[recipes]'`).
        ValueError: there are fewer than 20 distinct hidden states.

    Source: Ed-dib et al., "GeLoRA: Geometric Adaptive Ranks For Efficient LoRA Fine-tuning", 2024; Facco et al.,
    "Estimating the intrinsic dimension of datasets by a minimal neighborhood information", 2017.
    """
    found = by_block(model, target_modules)
    dimensions = intrinsic_dimensions(model, batches, samples, seed)
    return {
        path: max(round(dimensions[i + 1] - dimensions[i]), 0) + 1 for i, paths in enumerate(found) for path in paths
    }


@torch.no_grad()
def intrinsic_dimensions(model: nn.Module, batches: Iterable[Any], samples: int = 2000, seed: int = 0) -> list[float]:
    """TwoNN's estimate for the hidden states that enter each block, and for the last one's output; see above."""
    try:
        from skdim.id import TwoNN
    except ImportError as error:
        raise ImportError("intrinsic dimensions need scikit-dimension: pip install 'glora_kernels[recipes]'") from error
    with observe(model, "hidden") as seen:
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*((batch,) if isinstance(batch, Tensor) else batch))
    if not seen:
        raise ValueError("intrinsic_ranks: batches is empty")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for path in seen:
        rows = torch.unique(seen[path], dim=0)  # TwoNN divides by the distance to the nearest neighbour
        if len(rows) < 20:
            raise ValueError(f"intrinsic_ranks: {path!r} has {len(rows)} distinct hidden states, and needs at least 20")
        chosen = rows[torch.randperm(len(rows), generator=generator)[:samples]]
        found.append(float(TwoNN().fit(chosen.double().numpy()).dimension_))
    return found
