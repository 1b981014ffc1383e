"""Linear layers that torch or transformers have cut over the ranks of a mesh: recognised, and their hooks moved.

torch's styles put hooks on the layer that make DTensors of its input and local tensors of its output; those of
transformers replace its `forward` by a function around it. Both are put around the GLoRA layer in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from glora_kernels.nn.ranks import is_part
from glora_kernels.parallel.layout import COLUMN, ROW

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OTHER_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
_OF_TRANSFORMERS = {"ColwiseParallel": COLUMN, "RowwiseParallel": ROW}


class Found(NamedTuple):
    """A layer's mesh, its direction, and a function that gives another layer in its place the same hooks."""

    mesh: DeviceMesh
    direction: str
    hook: Callable[[Any], None]


def is_cut(linear: nn.Module) -> bool:
    """Whether the weight of a linear layer is a DTensor."""
    weight = linear._parameters.get("weight")
    return weight is not None and is_part(weight)


def found_in(linear: nn.Module) -> Found | str:
    """How a linear layer for which `is_cut` is cut, or the reason why a GLoRA layer cannot take its place."""
    from torch.distributed.tensor import Shard

    weight: Any = linear._parameters["weight"]
    over = f"its weight is a DTensor {weight.placements} over {weight.device_mesh}"
    if weight.device_mesh.ndim != 1:
        return f"{over}, as FSDP makes it; inject after tensor parallelism and before fully_shard"
    if weight.placements not in ((Shard(0),), (Shard(1),)):
        return f"{over}, and only rows (colwise) and columns (rowwise) of a linear layer's weight can be cut"
    direction = COLUMN if weight.placements == (Shard(0),) else ROW
    if type(linear) is not nn.Linear:
        return f"{over}, and it is a {type(linear).__name__}; of cut layers an nn.Linear can be replaced"
    bias, size = linear._parameters.get("bias"), weight.device_mesh.size()
    if bias is not None and not (is_part(bias) and bias.placements == _of_bias(direction)):  # type: ignore[attr-defined]
        return f"{over}, but its bias is not cut with it"
    if weight.shape[0 if direction == COLUMN else 1] % size:
        return f"{over}, in parts of different sizes"
    hook = _by_hooks(linear) or _by_forward(linear, direction)
    if hook is None:
        return f"{over}, but its hooks or its forward are not those of a parallel style of torch or transformers"
    return Found(weight.device_mesh, direction, hook)


def _of_bias(direction: str) -> tuple[Any, ...]:
    from torch.distributed.tensor import Replicate, Shard

    return (Shard(0),) if direction == COLUMN else (Replicate(),)


def _by_hooks(linear: nn.Module) -> Callable[[Any], None] | None:
    """What moves the hooks of torch's `distribute_module`; None where the layer has others, or a forward of its own."""
    if "forward" in vars(linear) or any(getattr(linear, hooks) for hooks in _OTHER_HOOKS):
        return None
    kept = {name: dict(getattr(linear, name)) for name in _HOOKS}
    for hooks in kept.values():
        if len(hooks) != 1 or not all(_is_of_torch(hook) for hook in hooks.values()):
            return None

    def move(layer: nn.Module) -> None:
        for name, hooks in kept.items():
            getattr(layer, name).update(hooks)

    return move


def _is_of_torch(hook: Any) -> bool:
    return bool(
        getattr(hook, "__module__", None) == "torch.distributed.tensor._api"
        and hook.__qualname__.startswith("distribute_module.")
    )


def _by_forward(linear: nn.Module, direction: str) -> Callable[[Any], None] | None:
    """What puts a style of transformers around another layer; None where the forward is not one of theirs."""
    forward = vars(linear).get("forward")
    if forward is None or any(getattr(linear, hooks) for hooks in (*_HOOKS, *_OTHER_HOOKS)):
        return None
    code, cells = getattr(forward, "__code__", None), getattr(forward, "__closure__", None)
    if code is None or not cells:
        return None
    inside = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    style: Any = inside.get("self")
    mesh, around = inside.get("mesh"), inside.get("original_forward")
    if type(style).__module__ != "transformers.distributed.tensor_parallel" or mesh is None:
        return None
    if _OF_TRANSFORMERS.get(type(style).__name__) != direction or getattr(around, "__self__", None) is not linear:
        return None

    def install(layer: nn.Module) -> None:
        style.install_forward(layer, mesh)
        layer._is_hooked = True  # type: ignore[assignment]

    return install
