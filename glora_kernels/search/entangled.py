"""One layer of a supernet: every example of the batch under a configuration of its own, all from one set of parameters.

    y[m] = Z[m]∘(1 + a) + s·h̃[m]·B_upᵀ + σ[m]·b + β,   Z = x·Wᵀ, h̃ = (x·B_downᵀ) with the ranks of the example alone

The supports are entangled: a configuration of rank r has the first r columns of `_up` and rows of `_down`, "vector" is
the first column of `_up`, "constant" its first element; D and E likewise. So nothing is gathered for a configuration:
a and β are products of flags with a few vectors, the low-rank path is one product with masked ranks. Only where A is
lora has an example another weight, W∘(1 + A_up[:, :r]·A_down[:r]), which depends on the rank alone: the rows of one
rank are one product, and all of them together as many as one layer has.

Source: Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023; one configuration for
each example is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glora_kernels.dispatch.common import wide_dtype, without_autocast
from glora_kernels.nn.adapted import Frozen, Operands, adapted_linear, base_linear
from glora_kernels.ops import glora_linear, glora_wc
from glora_kernels.spec import GLoRAConfig


def part_of(adapter: Mapping[str, Tensor], config: GLoRAConfig) -> dict[str, Tensor]:
    """The parameters of a configuration, as views of a supernet's (name → tensor).

    Args:
        adapter: the parameters of a layer of the supernet.
        config: one of its configurations.
    """
    found: dict[str, Tensor] = {}
    for name in ("A", "B", "C"):
        form = getattr(config, name)
        if form == "lora":
            found[f"{name}_up"] = adapter[f"{name}_up"][:, : config.rank]
            found[f"{name}_down"] = adapter[f"{name}_down"][: config.rank]
        elif form != "none":
            found[name] = _vector(adapter, name, form)
    for name in ("D", "E"):
        if (form := getattr(config, name)) != "none" and name in adapter:
            found[name] = _vector(adapter, name, form)
    return found


def alone(x: Tensor, base: Frozen, adapter: Mapping[str, Tensor], config: GLoRAConfig, training: bool) -> Tensor:
    """y of an x whose examples all have this configuration: a layer of its own."""
    if config.is_empty:
        return base_linear(x, base)
    return adapted_linear(x, base, Operands.of(config, part_of(adapter, config), training))


def mixed(x: Tensor, base: Frozen, adapter: Mapping[str, Tensor], configs: Sequence[GLoRAConfig]) -> Tensor:
    """y (B, ..., N) of an x (B, ..., K) whose examples have a configuration each.

    Args:
        x: the input.
        base: W and b, dense or in 4 bits.
        adapter: the parameters of the layer in the supernet.
        configs: B of them.
    """
    weight, back_to = base.weight, x.dtype
    if base.compute_dtype is not None:
        x = x.to(base.compute_dtype)
    y = _products(x, base, adapter, configs)
    dtype, wide = y.dtype if base.compute_dtype is None else back_to, wide_dtype(y.dtype)
    lead = (len(configs), *[1] * (x.ndim - 1))

    def flags(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=x.device, dtype=wide).view(lead)

    scales = _sums(_of_form(adapter, configs, "A"), y.shape[-1], wide)
    beta = _sums(_shifts(weight, base.bias, adapter, configs), y.shape[-1], wide)
    if base.bias is not None:
        beta = base.bias.to(wide) if beta is None else beta + base.bias.to(wide)
    if beta is not None and beta.ndim == 2:
        beta = beta.view(*lead[:-1], -1)
    if scales is not None:
        scales = 1 + scales.view(*lead[:-1], -1)
        y = y * scales if beta is None else torch.addcmul(beta, y.to(wide), scales)
    elif beta is not None:
        y = y + beta
    left, right = _low_rank(x, y.shape[-1], adapter, configs, flags)
    if left is not None and right is not None:
        common = torch.promote_types(y.dtype, left.dtype)
        added = left.flatten(0, -2).to(common), right.t().to(common)
        y = torch.addmm(y.flatten(0, -2).to(common), *added).view(y.shape)
    return y.to(dtype)


def _products(x: Tensor, base: Frozen, adapter: Mapping[str, Tensor], configs: Sequence[GLoRAConfig]) -> Tensor:
    """Z, or x·W_effᵀ where A is lora: one product for each rank among the examples, over their rows."""
    groups: dict[int, list[int]] = {}
    for place, config in enumerate(configs):
        groups.setdefault(config.rank if config.A == "lora" else 0, []).append(place)
    parts = []
    for rank, places in groups.items():
        own = x if len(groups) == 1 else x[torch.tensor(places, device=x.device)]
        ups: dict[str, Any] = (
            {} if rank == 0 else {"a_up": adapter["A_up"][:, :rank], "a_down": adapter["A_down"][:rank]}
        )
        parts.append(glora_linear(own, base.weight, None, **ups))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([place for places in groups.values() for place in places], device=x.device)
    return torch.cat(parts)[order.argsort()]


def _low_rank(
    x: Tensor, n: int, adapter: Mapping[str, Tensor], configs: Sequence[GLoRAConfig], flags: Any
) -> tuple[Tensor | None, Tensor | None]:
    """What B adds, as left·rightᵀ: s·h̃, in which an example has its own ranks, and σ for vector and constant."""
    lefts, rights = [], []
    ranks = [config.rank if config.B == "lora" else 0 for config in configs]
    if rank := max(ranks):
        up, down = adapter["B_up"][:, :rank], adapter["B_down"][:rank]
        common = torch.promote_types(x.dtype, up.dtype)
        has = torch.arange(rank, device=x.device) < flags(ranks)
        scales = flags([config.scale for config in configs])
        lefts.append((x.to(common) @ down.t().to(common)) * (has * scales).to(common))
        rights.append(up)
    for own, vector in _of_form(adapter, configs, "B"):
        weights = flags(own)
        lefts.append(weights * x.to(weights.dtype).sum(-1, keepdim=True))
        rights.append(vector.expand(n).unsqueeze(1))
    if not lefts:
        return None, None
    return torch.cat(lefts, -1), torch.cat(rights, 1)


Term = tuple[Sequence[float], Tensor]
"""How much each example takes of a vector (N,) or constant (1,)."""


def _sums(terms: Sequence[Term], n: int, wide: torch.dtype) -> Tensor | None:
    """The sum of what each example takes, (B,N)."""
    if not terms:
        return None
    vectors = torch.stack([vector.to(wide).expand(n) for _, vector in terms])
    flags = torch.tensor([own for own, _ in terms], device=vectors.device, dtype=wide)
    with without_autocast(vectors.device.type):
        return flags.t() @ vectors


def _of_form(adapter: Mapping[str, Tensor], configs: Sequence[GLoRAConfig], name: str) -> list[Term]:
    """A support as a vector and as a constant, for the examples that have it so."""
    found: list[Term] = []
    for form in ("vector", "constant"):
        own = [float(getattr(config, name) == form) for config in configs]
        if any(own):
            found.append((own, _vector(adapter, name, form)))
    return found


def _shifts(
    weight: Any, bias: Tensor | None, adapter: Mapping[str, Tensor], configs: Sequence[GLoRAConfig]
) -> list[Term]:
    """b∘D, E and W·c of the examples that have them; one W·c for each form of C and rank."""
    found = _of_form(adapter, configs, "E")
    if bias is not None:
        found += [(own, bias * vector) for own, vector in _of_form(adapter, configs, "D")]
    forms = [(c.C, c.rank if c.C == "lora" else 0) for c in configs]
    for form in dict.fromkeys(own for own in forms if own[0] != "none"):
        c = part_of(adapter, configs[forms.index(form)])
        wc = glora_wc(weight, c.get("C"), c_up=c.get("C_up"), c_down=c.get("C_down"))
        found.append(([float(own == form) for own in forms], wc))
    return found


def _vector(adapter: Mapping[str, Tensor], name: str, form: str) -> Tensor:
    """The vector or constant of a support: of a low-rank one the first column of `_up`, or its first element."""
    whole = adapter[name] if name in adapter else adapter[f"{name}_up"][:, 0]
    return whole[:1] if form == "constant" else whole
