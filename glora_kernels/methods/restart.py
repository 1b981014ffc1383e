"""Merge and restart: what an adapter has learned is put away, and a fresh one is trained on top of it.

    into="base"     W ← W + W∘A + s·U·D,  b ← b + b∘D + E + W·C,  for good
    into="chain"    U ← [U_1 … U_i, fresh],  D ← [D_1; …; D_i; fresh]: the former factors stay beside, frozen

The base costs nothing in a step, but rounds: a 16-bit one loses changes that are small beside its weights, a 4-bit one
nearly all. The chain loses nothing, its rank grows by R with each link, and its adapter file describes the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glora_kernels.methods.edit import edit_ranks, inner_optimizer, note_patterns
from glora_kernels.methods.factors import (
    Factor,
    LowRank,
    Ours,
    Peft,
    check_changeable,
    empty,
    low_rank,
    put,
    refuse_shared,
    refuse_wrapped,
    register,
    undo_put,
)
from glora_kernels.nn.adapted import initialize
from glora_kernels.nn.merging.models import refuse_tied
from glora_kernels.nn.merging.values import keep, write
from glora_kernels.nn.model import unwrap
from glora_kernels.nn.patterns import patterns_of, unmatched
from glora_kernels.nn.undo import all_or_none
from glora_kernels.spec import select

LOST = 0.05
"""The most of a change that a base may lose by rounding: ‖(W_new − W) − ΔW‖ / ‖ΔW‖."""


INSTEAD = "use into='chain', which loses nothing"


class Chain(nn.Module):
    """A factor of former links, frozen, with the one that is trained at its end."""

    frozen: Tensor

    def __init__(self, frozen: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("frozen", frozen)

    def forward(self, factor: Tensor) -> Tensor:
        return torch.cat([self.frozen, factor], self.dim)


@torch.inference_mode(False)  # what is made here is trained later
def restart(
    model: nn.Module,
    optimizer: Any = None,
    layers: str | Iterable[str] | None = None,
    rank: int | None = None,
    into: Literal["base", "chain"] | None = None,
) -> str:
    """Put the adapters of layers away and give the layers fresh ones, which change nothing.

    The output of the model stays: with "chain" to rounding of the sum, with "base" to that of the merged weights. The
    moments of the restarted parameters are dropped; a learning rate schedule is yours to restart. "base" puts all
    supports of a layer away, "chain" the low-rank ones; vectors and constants, of which a fresh one would be added,
    train on.

    After "base", `save_adapter` refuses: its file would not say what is in the base. Save the model. PEFT's
    `save_pretrained` does not refuse, and leaves it out: save the base as well.

    Args:
        model: with GLoRA layers, or ("base" only) LoRA layers of PEFT.
        optimizer: whose state for the restarted parameters is dropped.
        layers: paths or patterns of the layers to restart; None for all.
        rank: of the fresh adapters; None: as before. s stays.
        into: None: "base" where every restarted base keeps the change, else "chain".

    Returns:
        "base" or "chain": what was done.

    Raises:
        ValueError: `into="base"` over a 4-bit base, or a base that would lose more than 5% of a change by rounding (the
            message has the figure); "chain" with a shared factor or a map, or over PEFT's layers, whose files could not
            hold it; "base" for some only of the layers that share a factor; a layer that is sharded, merged or fused.
            The message names the layer. Nothing has changed then.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> gk.restart(model)
        'base'
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
    chosen, where = planned(model, layers, into)
    found = inner_optimizer(optimizer)
    if where == "base":
        _into_base(model, chosen)
    else:
        _into_chain(chosen, rank)
    for own in chosen.values():
        for parameter in _parameters(own) if where == "base" else [factor.parameter for factor in own.factors()]:
            parameter.grad = None
            if found is not None:
                found.state.pop(parameter, None)
    if where == "base" and rank is not None:  # what is there changes nothing: no rank of it need be kept
        edit_ranks(model, {path: [None] * rank for path in chosen})
    note_patterns(model, list(chosen.values()))
    if where == "base" and any(isinstance(own, Peft) for own in chosen.values()):
        warnings.warn(
            "restart: adapters were merged into the base of PEFT layers, and PEFT's save_pretrained leaves it out: "
            "save the base as well",
            UserWarning,
            stacklevel=2,
        )
    return where


def planned(
    model: nn.Module, layers: str | Iterable[str] | None, into: str | None
) -> tuple[dict[str, LowRank], Literal["base", "chain"]]:
    """The layers that `restart` takes, by path, and where their adapters go; its errors, before anything changes."""
    if into not in (None, "base", "chain"):
        raise ValueError(f"into must be 'base', 'chain' or None, got {into!r}")
    refuse_wrapped(model, "restart")
    every = low_rank(model, "restart")
    chosen = _chosen(every, layers)
    for own in chosen.values():
        check_changeable(own, "restart")
    refusals = {path: reason for path, own in chosen.items() if (reason := _refuses_base(own))}
    if into == "base" and refusals:
        path, reason = next(iter(refusals.items()))
        raise ValueError(f"restart: {path!r} {reason}")
    if into == "base" or (into is None and not refusals):
        _check_whole(every, chosen)
        return chosen, "base"
    for own in chosen.values():
        _check_chain(every, own, refusals.get(own.path))
    return chosen, "chain"


def chain_ranks(model: nn.Module) -> dict[str, int]:
    """The rank of the frozen links of each layer that has some."""
    frozen = {path: _frozen(own.down) for path, own in low_rank(model, "chain_ranks").items()}
    return {path: len(links) for path, links in frozen.items() if links is not None}


def make_chain(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give layers frozen links of these ranks, of zeros, for a state that is loaded after this."""
    layers = low_rank(model, "make_chain")
    with all_or_none() as undo:
        for path, rank in ranks.items():
            undo.callback(layers[path].note_rank, layers[path].rank)
            for pair in layers[path].pairs().values():
                for factor in pair:
                    _put_links(undo, factor, empty(factor, rank), factor.parameter.data)
            layers[path].note_rank(layers[path].up.value.shape[1])


def _chosen(every: dict[str, LowRank], layers: str | Iterable[str] | None) -> dict[str, LowRank]:
    if layers is None:
        return every
    found: set[str] = set()
    for pattern in patterns_of("layers", layers):
        if not (selected := select(pattern, every.keys())):
            raise unmatched("restart: layers", pattern, "matches no low-rank layer", "low-rank layer", every)
        found |= selected
    return {path: own for path, own in every.items() if path in found}


@torch.no_grad()
def _refuses_base(own: LowRank) -> str | None:
    """Why a merge into the base would not keep the change of the adapter, or None."""
    if _link(own.down) is not None:
        return f"has frozen links of a chain; {INSTEAD}"
    if own.down.maps or own.up.maps:
        return "has a map on its factors; call fold_mids(model) first"
    if isinstance(own, Ours) and (others := own.layer.named()):
        return (
            f"has further adapters on its base ({next(iter(others))!r}), which would change; delete them, or {INSTEAD}"
        )
    base = own.base
    if not base.weight.is_floating_point():
        return f"has a base in 4 bits, whose rounding loses most of an adapter's change; {INSTEAD}"
    weight: Tensor = base.weight
    if weight.dtype in (torch.float32, torch.float64):
        return None
    if isinstance(own, Ours):
        wide, _ = own.layer.merged_values(dense=True, dtype=torch.float32)
        lost = max(_lost(weight, wide.weight), _lost(base.bias, wide.bias))
    else:
        change = own.scale * own.up.value.float() @ own.down.value.float()
        lost = _lost(weight, weight.float() + (change if weight.shape == change.shape else change.t()))
    if lost <= LOST:
        return None
    return f"has a base in {weight.dtype}, whose rounding would lose {100 * lost:.0f}% of the change; {INSTEAD}"


def _lost(before: Tensor | None, after: Tensor | None) -> float:
    """‖round(after) − after‖ / ‖after − before‖; `after` is in fp32, and is rounded to the dtype of `before`."""
    if before is None or after is None:
        return 0.0
    size = (after - before.float()).norm()
    return float((after.to(before.dtype).float() - after).norm() / size) if size > 0 else 0.0


def _check_whole(every: dict[str, LowRank], chosen: dict[str, LowRank]) -> None:
    """Layers that share a factor are restarted together: a fresh factor would be one of the others, too."""
    mine = {id(factor.parameter): path for path, own in chosen.items() for factor in own.factors()}
    for path, own in every.items():
        if path not in chosen and (shared := [f for f in own.factors() if id(f.parameter) in mine]):
            raise ValueError(
                f"restart: {mine[id(shared[0].parameter)]!r} shares {shared[0].name} with {path!r}, which is not "
                "restarted: restart all of them"
            )


def _check_chain(every: dict[str, LowRank], own: LowRank, no_base: str | None) -> None:
    if isinstance(own, Peft):
        instead = "use into='base', or" if no_base is None else f"and it {no_base.partition(';')[0]}: use"
        raise ValueError(
            f"restart: {own.path!r} is a layer of PEFT, whose adapter files cannot hold frozen links; {instead} GLoRA "
            "layers (inject)"
        )
    refuse_shared(every, own, "restart", "use into='base'")
    if other := [one for one in own.down.maps if not isinstance(one, Chain)]:
        raise ValueError(f"restart: {own.path!r} has a {type(other[0]).__name__} on its D; call fold_mids(model) first")


@torch.no_grad()
def _into_base(model: nn.Module, chosen: dict[str, LowRank]) -> None:
    """Merge for good. Layers that share a factor are all done or none; an interrupt leaves each such group valid."""
    ours = {path: own.layer for path, own in chosen.items() if isinstance(own, Ours)}
    refuse_tied("restart", unwrap(model), ours)
    for group in _groups(chosen):
        with all_or_none() as undo:
            for own in group:
                for parameter in _parameters(own):
                    undo.callback(parameter.copy_, parameter.detach().clone())
                base = own.base
                undo.callback(write, base, keep(base))
                undo.callback(setattr, own, "committed", own.committed)
                if isinstance(own, Ours):
                    own.layer.commit(own.layer.merged_values()[0])
                elif isinstance(own, Peft):
                    undo.callback(own.layer.merged_adapters.clear)
                    own.layer.merge(safe_merge=True, adapter_names=[own.name])
                    own.layer.merged_adapters.clear()
                    own.committed = True
            for own in group:
                own.reset()


def _groups(chosen: dict[str, LowRank]) -> list[list[LowRank]]:
    """The layers, those that share a factor together."""
    groups: list[tuple[set[int], list[LowRank]]] = []
    for own in chosen.values():
        ids, layers = {id(parameter) for parameter in _parameters(own)}, [own]
        for group in [group for group in groups if group[0] & ids]:
            groups.remove(group)
            ids, layers = ids | group[0], group[1] + layers
        groups.append((ids, layers))
    return [layers for _, layers in groups]


@torch.no_grad()
def _into_chain(chosen: dict[str, LowRank], rank: int | None) -> None:
    """Add the present factors to the frozen links, and make fresh ones."""
    with all_or_none() as undo:
        for own in chosen.values():
            undo.callback(own.note_rank, own.rank)
            fresh = rank or own.down.parameter.shape[0]
            for pair in own.pairs().values():
                for factor in pair:
                    made = empty(factor, fresh)
                    initialize({factor.name: nn.Parameter(made)}, own.init)
                    _put_links(undo, factor, factor.value.detach().clone(), made)
            own.note_rank(own.up.value.shape[1])


def _link(factor: Factor) -> Chain | None:
    return next((one for one in factor.maps if isinstance(one, Chain)), None)


def _frozen(factor: Factor) -> Tensor | None:
    link = _link(factor)
    return None if link is None else link.frozen


def _put_links(undo: ExitStack, factor: Factor, frozen: Tensor, trained: Tensor) -> None:
    """Make these the frozen links and the trained one of a factor."""
    undo_put(undo, factor.parameter)
    put(factor.parameter, trained)
    if (link := _link(factor)) is not None:
        undo.callback(setattr, link, "frozen", link.frozen)
        link.frozen = frozen
    else:
        register(undo, factor, Chain(frozen, factor.dim))


def _parameters(own: LowRank) -> list[nn.Parameter]:
    """Everything that a merge puts away."""
    if isinstance(own, Ours):
        return list(own.layer.adapter().values())
    bias = own.up.holder._parameters.get("bias")
    return [*(factor.parameter for factor in own.factors()), *([] if bias is None else [bias])]
