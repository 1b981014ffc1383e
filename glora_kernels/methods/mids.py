"""Maps on h = x·Dᵀ between the factors of a layer: a gain for each rank, a gate for the layer, a map for each task.

    y = x Wᵀ + b + s·μ(h)·Uᵀ

A map that is linear in h is one on D: μ(x·Dᵀ) = x·μ(D)ᵀ, row by row. So each is registered as a parametrization
(`torch.nn.utils.parametrize`) of D, and the kernels, merging and `save_adapter` take μ(D) for D: what is saved is a
plain low-rank adapter. A map for each task depends on the row of x; inside `tasks`, a batch of several tasks is one of
as many adapters (`ops.multi_glora_linear`), which copies no weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.methods.edit import note_patterns
from glora_kernels.methods.factors import (
    check_changeable,
    low_rank,
    put,
    refuse_shared,
    refuse_wrapped,
    register,
    undo_put,
    unregister,
)
from glora_kernels.nn.adapted import Operands
from glora_kernels.nn.mixed import BatchRows, TakesRows, refuse_inside
from glora_kernels.nn.undo import all_or_none


class Gain(nn.Module):
    """g∘h with g = R·softmax(z/τ): the ranks compete. z (R,) begins at 0, where g = 1.

    Source: Gu et al., "BeamLoRA: Beam-Constraint Low-Rank Adaptation", 2025.
    """

    of_rank = ("z",)

    def __init__(self, like: Tensor, temperature: float = 0.05) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        self.temperature = temperature
        self.z = nn.Parameter(like.new_zeros(len(like)))

    @property
    def gain(self) -> Tensor:
        """g (R,); its sum is R."""
        return len(self.z) * torch.softmax(self.z / self.temperature, 0)

    def forward(self, down: Tensor) -> Tensor:
        return self.gain[:, None] * down


class Gate(nn.Module):
    """γ·h with γ = sigmoid(a): whether the layer is adapted at all. a begins at 0, where γ = ½."""

    of_rank = ()

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(like.new_zeros(1))

    @property
    def gate(self) -> Tensor:
        """γ (1,)."""
        return torch.sigmoid(self.a)

    def forward(self, down: Tensor) -> Tensor:
        return self.gate * down


class TaskMid(nn.Module):
    """w_t ⊗ (Λ_t·h) with w_t = softmax(θ_t/τ), for the task t of each row.

    With U = [U_1 … U_n] (N, n·R) that is ΔW_t = s·(Σᵢ w_{t,i}·U_i)·Λ_t·D. Λ_t (R, R) begins as the identity, θ (T, n)
    is random.

    Attributes:
        task: the task that is computed; None outside `tasks`.

    Source: Yang et al., "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", 2024.
    """

    def __init__(self, like: Tensor, tasks: int, ups: int = 3, temperature: float = 0.1) -> None:
        super().__init__()
        for name, value in (("tasks", tasks), ("ups", ups)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        self.tasks, self.ups, self.temperature = tasks, ups, temperature
        self.task: int | None = None
        self.lambdas = nn.Parameter(torch.eye(len(like)).to(like).repeat(tasks, 1, 1))
        self.theta = nn.Parameter(like.new_empty(tasks, ups))
        nn.init.kaiming_uniform_(self.theta, a=math.sqrt(5))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"task": None}  # a copy is outside of the context

    def weights(self, task: int) -> Tensor:
        """w_t (n,); its sum is 1."""
        return torch.softmax(self.theta[task] / self.temperature, 0)

    def forward(self, down: Tensor) -> Tensor:
        if self.task is None:
            raise RuntimeError(
                f"this layer has a map for each of {self.tasks} tasks, and was not told which: call, merge or save it "
                "inside `with gk.tasks(model, ids):`"
            )
        own = self.lambdas[self.task] @ down
        return (self.weights(self.task)[:, None, None] * own).flatten(0, 1)


NOT_SHARED = "use a configuration that shares nothing (share='none')"

MIDS: Mapping[str, type[Any]] = {"gain": Gain, "gate": Gate, "tasks": TaskMid}


@torch.inference_mode(False)  # the maps are trained later
def set_mid(model: nn.Module, kind: str, **options: Any) -> dict[str, Any]:
    """Put a map on h into every low-rank layer. Gains and tasks change no output, gates halve the adapter's.

    Do it before the optimizer is made: the maps have parameters, which are trained. PEFT's `save_pretrained` does not
    know them; call `fold_mids` first.

    Args:
        model: with GLoRA layers, or LoRA layers of PEFT, of which the active adapter gets it.
        kind: "gain" (`Gain`: temperature), "gate" (`Gate`) or "tasks" (`TaskMid`: tasks, ups, temperature). With
            "tasks" every U becomes n copies of itself side by side, and the layer's rank is n·R.
        options: of that kind.

    Returns:
        The maps by the paths of their layers.

    Raises:
        ValueError: no low-rank layer; another kind; a layer that has a map, or whose D is shared (a map would be one of
            all its layers), or that is merged, fused or sharded. Nothing has changed then.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> list(gk.set_mid(model, "gain"))
        ['0']
    """
    if kind not in MIDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, MIDS))}; got {kind!r}")
    refuse_wrapped(model, "set_mid")
    layers = low_rank(model, "set_mid")
    made = {path: MIDS[kind](own.down.parameter.detach(), **options) for path, own in layers.items()}
    for path, own in layers.items():
        check_changeable(own, "set_mid")
        refuse_shared(layers, own, "set_mid", NOT_SHARED)
        if own.down.maps or own.up.maps:
            raise ValueError(f"set_mid: {path!r} has a map already; call fold_mids(model) first")
    with all_or_none() as undo:
        for path, own in layers.items():
            register(undo, own.down, made[path])
            if kind == "tasks":
                up, rank = own.up.parameter, own.rank
                undo.callback(own.note_rank, rank)
                undo_put(undo, up)
                put(up, up.data.repeat(1, made[path].ups))
                own.note_rank(made[path].ups * rank)
    note_patterns(model, list(layers.values()))
    return made


def mids(model: nn.Module) -> dict[str, Any]:
    """The maps of `set_mid` by the paths of their layers.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> gates = gk.set_mid(model, "gate")
        >>> gk.mids(model) == gates
        True
    """
    found = {path: own.down.maps for path, own in low_rank(model, "mids").items()}
    return {path: one for path, ones in found.items() for one in ones if isinstance(one, tuple(MIDS.values()))}


@torch.inference_mode(False)
@torch.no_grad()
def fold_mids(model: nn.Module) -> None:
    """Take the maps out and write μ(D) into D, so that the layers are plain ones that compute the same.

    Make a new optimizer then: the moments are those of another D.

    Raises:
        ValueError: the model is sharded or wrapped in DistributedDataParallel.
        RuntimeError: maps for tasks, outside `tasks`.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> gates = gk.set_mid(model, "gate")
        >>> gk.fold_mids(model)
        >>> gk.mids(model)
        {}
    """
    refuse_wrapped(model, "fold_mids")
    layers = low_rank(model, "fold_mids")
    downs = [layers[path].down for path in mids(model)]
    folded = [(down, down.parameter, down.value.detach().clone()) for down in downs]

    with all_or_none() as undo:
        for down, parameter, values in folded:
            unregister(undo, down)
            undo_put(undo, parameter)
            put(parameter, values)


class TaskRows(BatchRows):
    """The tasks of a batch's rows, as the layers of one model are told them."""

    called, given, inside = "tasks", "ids", "tasks(model, ...); leave that context first"

    def __init__(self, index: Tensor, own: Mapping[int, tuple[TaskMid, str]], paths: Mapping[int, str]) -> None:
        tasks = max(mid.tasks for mid, _ in own.values())
        super().__init__(tuple(f"task {t}" for t in range(tasks)), index, None, paths)
        self._own = own

    def operands(self, layer: Any) -> list[Operands]:
        """The layer's adapter under each task."""
        (mid, name), found = self._own[id(layer)], []
        try:
            for task in range(mid.tasks):
                mid.task = task
                own = layer.operands(name)
                if isinstance(own, str):
                    raise RuntimeError(self.refused(layer, own))
                found.append(own)
        finally:
            mid.task = None
        return found


@contextlib.contextmanager
def tasks(model: nn.Module, ids: int | Tensor) -> Iterator[None]:
    """Inside, every layer with a map for each task uses that of its rows' tasks.

    Call backward inside where activations are checkpointed.

    Args:
        model: after `set_mid(model, "tasks", ...)`.
        ids: one task for all, under which the model can be merged and saved too; or an integer tensor with one for each
            example of a batch (B,), or for each of its rows (B, ...).

    Raises:
        ValueError: no layer has tasks; an id out of range.
        TypeError: ids that are no integers.
        RuntimeError: inside `rows` or another `tasks`; layers of PEFT that are not accelerated, with a tensor.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=4), target_modules=["0"])
        >>> maps = gk.set_mid(model, "tasks", tasks=3, ups=2)
        >>> with gk.tasks(model, torch.tensor([0, 2, 1])):
        ...     y = model(torch.randn(3, 16))
    """
    layers = low_rank(model, "tasks")
    own = {path: mid for path, mid in mids(model).items() if isinstance(mid, TaskMid)}
    if not own:
        raise ValueError("tasks: no layer has a map for each task; call set_mid(model, 'tasks', tasks=...) first")
    count = next(iter(own.values())).tasks
    if isinstance(ids, bool) or not isinstance(ids, (int, Tensor)):
        raise TypeError(f"tasks: ids must be an int or an integer tensor, got {type(ids).__name__}")
    if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise TypeError(f"tasks: ids must be integers, got {ids.dtype}")
    least, most = (ids, ids) if isinstance(ids, int) else (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    if not 0 <= least <= most < count:
        raise ValueError(
            f"tasks: ids must be from 0 to {count - 1}, for the model has {count} tasks; got {least} to {most}"
        )
    if any(mid.task is not None for mid in own.values()):
        raise RuntimeError("tasks() was called inside tasks(model, ...); leave that context first")
    modules: list[Any] = [layers[path].layer for path in own]
    takers = [module for module in modules if isinstance(module, TakesRows)]
    refuse_inside(takers, "tasks")
    rows = None
    if isinstance(ids, Tensor):
        if len(takers) < len(modules):
            raise RuntimeError("tasks: several tasks in a batch need PEFT's layers accelerated; call accelerate(model)")
        by_layer = {id(layers[path].layer): (mid, layers[path].name) for path, mid in own.items()}
        rows = TaskRows(ids, by_layer, {id(layers[path].layer): path for path in own})
    try:
        for mid, module in zip(own.values(), modules, strict=True):
            if rows is None:
                mid.task = int(ids)
            else:
                module._rows = rows
        yield
    finally:
        for mid, module in zip(own.values(), modules, strict=True):
            mid.task = None
            if rows is not None:
                module._rows = None
