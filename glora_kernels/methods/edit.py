"""Ranks of live layers: kept, copied, dropped and added during training, with the optimizer's state.

An index says what the ranks of a layer become. Position i with the number j has rank j of before, None a fresh one:

    edit_ranks(model, {"*.q_proj": [0, 1, 3, 3, None]}, optimizer)      # R = 4 → 5: rank 2 goes, 3 comes twice

A fresh rank has a random row in D and zeros in U, so the layer computes what it did. The factor s stays: with alpha
left as it is, another R would change it and so the function.
"""

from __future__ import annotations

import copy
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.methods.factors import Factor, LowRank, Peft, check_changeable, empty, low_rank, put, refuse_wrapped
from glora_kernels.nn.model import all_paths, unwrap
from glora_kernels.nn.patterns import unmatched
from glora_kernels.nn.undo import all_or_none
from glora_kernels.spec import assign

Index = Sequence[int | None]
"""What the ranks of a layer become: the number of a former one, or None for a fresh one."""


class Kept(NamedTuple):
    """The values of a parameter at some time, and the tensors of its shape that the optimizer had for it."""

    values: Tensor
    moments: dict[str, Tensor]


Snapshot = Mapping[str, Mapping[str, Kept]]
"""Layer → parameter → its values and moments."""


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside the wrappers of accelerate and Lightning.

    Raises:
        TypeError: there is none.
        ValueError: one whose state does not belong to parameters.
    """
    found = optimizer
    while found is not None and not isinstance(found, torch.optim.Optimizer):
        found = getattr(found, "optimizer", None)
    while isinstance(inside := getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = inside
    if found is None and optimizer is not None:
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    if found is not None and (names := [key for key in found.state if not isinstance(key, Tensor)]):
        raise ValueError(
            f"{type(found).__name__} keeps its state by names ({names[0]!r}) and not by parameters, so that of a layer "
            "cannot be found; do this without the optimizer, and make a new one"
        )
    return found


def snapshot(model: nn.Module, optimizer: Any = None) -> dict[str, dict[str, Kept]]:
    """A copy of the factors of every low-rank layer and of their moments, for `edit_ranks(source=...)`.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> before = gk.snapshot(model)
        >>> gk.edit_ranks(model, {"0": [0, 0, 1, 2]}, source=before)  # rank 0 twice, as it was then
    """
    found = inner_optimizer(optimizer)
    return {
        path: {
            _name(factor): Kept(
                factor.parameter.detach().clone(),
                {key: value.clone() for key, value in _moments(found, factor.parameter, path).items()},
            )
            for factor in own.factors()
        }
        for path, own in low_rank(model, "snapshot").items()
    }


@torch.inference_mode(False)  # what is made here is trained later
@torch.no_grad()
def edit_ranks(
    model: nn.Module,
    edits: Mapping[str, Index],
    optimizer: Any = None,
    source: Snapshot | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Change the ranks of layers in place. Parameters stay the same objects, gradients are cleared.

    A fresh rank changes no output, except under a gain (`set_mid`), whose sum is R: there only while all z are equal.
    A rank that stays keeps its moments, a copied one takes those of the original, a fresh one has zeros. Where a number
    comes twice, the rank stays at its own place (else at the first), and is copied to the others. All low-rank supports
    of a layer (A, B, C) change together. A factor that layers share (ShareLoRA) is changed for all of them, with one
    index. torch.compile compiles again; captured CUDA graphs have to be captured again.

    Args:
        model: with GLoRA layers, or LoRA layers of PEFT, of which the active adapter is changed.
        edits: path or pattern → index; paths win, then the first match.
        optimizer: whose state is changed along; None where there is none yet.
        source: what copies are made of (`snapshot`); None: what the layers hold now.
        generator: of the fresh rows.

    Raises:
        TypeError: an index that is no sequence of integers and None; an optimizer that is none.
        ValueError: an index that is empty or names a rank that is not there; a pattern without a layer; a layer that is
            sharded, merged or fused, or whose model is wrapped in DistributedDataParallel; layers of one shared factor
            with different indices; an optimizer whose state has not the parameter's shape; a factor with a map on it
            that has no ranks of its own (a chain, tasks). The message names the layer. Nothing has changed then.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> gk.edit_ranks(model, {"0": [3, 0, None]})  # the last rank, the first, and a fresh one
        >>> model[0].config.rank
        3
    """
    refuse_wrapped(model, "edit_ranks")
    layers = low_rank(model, "edit_ranks")
    plan = {path: _checked(layers[path], index) for path, index in _assigned(edits, layers).items()}
    _check_shared(layers, plan)
    found = inner_optimizer(optimizer)
    new: dict[nn.Parameter, tuple[Tensor, dict[str, Tensor]]] = {}
    for path, index in plan.items():
        for factor in layers[path].factors():
            if factor.parameter not in new:
                new[factor.parameter] = _edited(layers[path], factor, index, found, source, generator)
    with all_or_none() as undo:
        for path, index in plan.items():
            undo.callback(layers[path].note_rank, layers[path].rank)
            layers[path].note_rank(len(index))
        for parameter, (values, moments) in new.items():
            undo.callback(_put, parameter, parameter.data, parameter.grad, found, _state_of(found, parameter))
            _put(parameter, values, None, found, moments)
    note_patterns(model, [layers[path] for path in plan])


def set_rank(model: nn.Module, ranks: Mapping[str, int], optimizer: Any = None) -> None:
    """Give layers other ranks: the first ranks stay, further ones are fresh, as by `edit_ranks`.

    Raises:
        ValueError: a rank below 1, and the errors of `edit_ranks`.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=8), target_modules=["0"])
        >>> gk.set_rank(model, {"0": 4})
        >>> model[0].config.rank
        4
    """
    layers = low_rank(model, "set_rank")
    edits = {}
    for path, rank in _assigned(ranks, layers).items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"set_rank: the rank of {path!r} must be an integer >= 1, got {rank!r}")
        edits[path] = [i if i < layers[path].rank else None for i in range(rank)]
    edit_ranks(model, edits, optimizer)


def note_patterns(model: nn.Module, layers: Sequence[LowRank]) -> None:
    """Write the ranks of PEFT's layers into the configuration that PEFT saves with the adapter.

    The model gets a configuration of its own: the given one may be that of other models, too. PEFT takes the first
    pattern that matches the end of a path, in the order of a sorted file. So a path stands for itself alone ("^"), and
    where a pattern of the user's matches as well, the paths of all layers take the place of the patterns.
    """
    root = unwrap(model)
    configs: dict[str, Any] = getattr(root, "peft_config", {})
    for name in {own.name for own in layers if isinstance(own, Peft)} & set(configs):
        config = copy.copy(configs[name])
        held: dict[str, Any] = {
            _pattern(path): one for path, one in all_paths(root) if name in (getattr(one, "r", None) or ())
        }
        edited = {_pattern(own.path) for own in layers}
        given = {*config.rank_pattern, *config.alpha_pattern} - held.keys()
        if any(re.match(rf"(.*\.)?({key})$", path[1:]) for key in given for path in edited):
            edited, config.rank_pattern, config.alpha_pattern = set(held), {}, {}
        config.rank_pattern = config.rank_pattern | {path: held[path].r[name] for path in edited}
        config.alpha_pattern = config.alpha_pattern | {path: held[path].lora_alpha[name] for path in edited}
        configs[name] = config


def _pattern(path: str) -> str:
    return "^" + path.removeprefix("base_model.model.")


def _assigned(given: Mapping[str, Any], layers: Mapping[str, LowRank]) -> dict[str, Any]:
    """What each layer gets, by path."""
    if not isinstance(given, Mapping):
        raise TypeError(f"give a mapping of paths or patterns, got {type(given).__name__}")
    found = assign(given, layers.keys())
    for pattern in given:
        if pattern not in found.values():
            raise unmatched("edit_ranks", pattern, "matches no low-rank layer", "low-rank layer", dict(layers))
    return {path: given[pattern] for path, pattern in found.items()}


def _checked(own: LowRank, index: Index) -> list[int | None]:
    check_changeable(own, "edit_ranks")
    try:
        if isinstance(index, str) or any(isinstance(j, bool) for j in index):
            raise TypeError
        index = [None if j is None else operator.index(j) for j in index]
    except TypeError:
        raise TypeError(f"edit_ranks: the index of {own.path!r} must hold integers and None, got {index!r}") from None
    if not index:
        raise ValueError(f"edit_ranks: the index of {own.path!r} is empty: a layer keeps at least one rank")
    for j in index:
        if j is not None and not 0 <= j < own.rank:
            raise ValueError(f"edit_ranks: {own.path!r} has ranks 0 to {own.rank - 1}; got {j!r} in its index")
    for factor in own.factors():
        if fixed := [one for one in factor.maps if not hasattr(one, "of_rank")]:
            raise ValueError(
                f"edit_ranks: {own.path!r} has a map on {factor.name} that has no ranks of its own "
                f"({type(fixed[0]).__name__})"
            )
    return index


def _check_shared(layers: Mapping[str, LowRank], plan: dict[str, list[int | None]]) -> None:
    """Take the layers that share a factor with those of the plan into it."""
    holders: dict[nn.Parameter, list[str]] = {}
    for path, own in layers.items():
        for factor in own.factors():
            holders.setdefault(factor.parameter, []).append(path)
    waiting = list(plan)
    while waiting:
        path = waiting.pop()
        for factor in layers[path].factors():
            for other in holders[factor.parameter]:
                if other not in plan:
                    plan[other] = _checked(layers[other], plan[path])
                    waiting.append(other)
                elif plan[other] != plan[path]:
                    raise ValueError(
                        f"edit_ranks: {path!r} and {other!r} share {factor.name}, and need the same index; got "
                        f"{plan[path]} and {plan[other]}"
                    )


def _edited(
    own: LowRank,
    factor: Factor,
    index: list[int | None],
    optimizer: torch.optim.Optimizer | None,
    source: Snapshot | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The new values of a parameter, and the optimizer's new state for it."""
    parameter = factor.parameter
    moments = _moments(optimizer, parameter, own.path)
    taken = Kept(parameter.detach(), moments)
    if source is not None:
        try:
            taken = source[own.path][_name(factor)]
        except KeyError:
            raise ValueError(f"edit_ranks: source has no {factor.name!r} of {own.path!r}") from None
        if taken.values.shape != parameter.shape or taken.moments.keys() != moments.keys():
            raise ValueError(f"edit_ranks: source has another {factor.name!r} of {own.path!r}: ranks or moments differ")
    fresh = _fresh(own, factor, len(index), generator)
    stay = _stay(index)

    def made(live: Tensor, copied: Tensor, new: Tensor) -> Tensor:
        parts = [
            new.select(factor.dim, i) if j is None else (live if i in stay else copied).select(factor.dim, j)
            for i, j in enumerate(index)
        ]
        return torch.stack(parts, factor.dim)

    values = made(parameter.detach(), taken.values, fresh)
    state = dict(_state_of(optimizer, parameter) or {})
    for key, moment in moments.items():
        state[key] = made(moment, taken.moments[key], torch.zeros_like(fresh, dtype=moment.dtype))
    return values, state


def _fresh(own: LowRank, factor: Factor, rank: int, generator: torch.Generator | None) -> Tensor:
    """A fresh parameter of this rank: random rows in D, zeros elsewhere."""
    fresh = empty(factor, rank)
    if factor.dim or fresh.ndim < 2:
        return fresh
    r, k = fresh.shape
    bound = math.sqrt(6 / (r + k)) if own.init == "xavier" else 1 / math.sqrt(k)
    return torch.empty(r, k, dtype=torch.float32).uniform_(-bound, bound, generator=generator).to(fresh)


def _stay(index: list[int | None]) -> set[int]:
    """The positions at which a rank stays; at other positions it is a copy."""
    places: dict[int, int] = {}
    for i, j in enumerate(index):
        if j is not None and (j not in places or i == j):
            places[j] = i
    return set(places.values())


def _name(factor: Factor) -> str:
    """The name of a parameter among those of a layer; PEFT's two factors are both called weight."""
    return f"{factor.name}.{factor.dim}"


def _state_of(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> dict[str, Any] | None:
    return None if optimizer is None else optimizer.state.get(parameter)


def _moments(optimizer: torch.optim.Optimizer | None, parameter: Tensor, path: str) -> dict[str, Tensor]:
    """The tensors of the optimizer's state that have an entry for each of the parameter."""
    found = {}
    for key, value in (_state_of(optimizer, parameter) or {}).items():
        if not isinstance(value, Tensor) or key == "step" or (value.numel() == 1 and value.shape != parameter.shape):
            continue
        if value.shape != parameter.shape or not value.is_floating_point():
            raise ValueError(
                f"edit_ranks: the state {key!r} of {type(optimizer).__name__} for {path!r} has shape "
                f"{tuple(value.shape)} and dtype {value.dtype}, not those of its parameter, and cannot be cut by "
                "ranks; use an optimizer whose moments have the parameter's shape (AdamW), or edit without it and make "
                "a new one"
            )
        found[key] = value
    return found


def _put(
    parameter: nn.Parameter,
    values: Tensor,
    grad: Tensor | None,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any] | None,
) -> None:
    put(parameter, values)
    parameter.grad = grad
    if optimizer is not None and state:
        optimizer.state[parameter] = state
