"""What the processes that hold the parts of one sharded model do together: put it in order, let one of them act.

A parameter sharded by FSDP2 is a DTensor, whose `full_tensor()` gathers it on every rank; all ranks must call the
functions here that communicate, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # importing it takes a second, and only sharded models need it
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is one rank's part of a tensor: a DTensor."""
    # A tensor without the attribute is slow to ask for it.
    return tensor.__class__ not in _WHOLE and hasattr(tensor, "full_tensor")


_WHOLE = (Tensor, nn.Parameter)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of the module are sharded, also while FSDP has them gathered for a forward."""
    managed = any(vars(inner).get("_is_fsdp_managed_module") for inner in module.modules())
    return managed or any(is_part(parameter) for parameter in module.parameters())


def refuse_sharded(module: nn.Module, caller: str, instead: str) -> None:
    """An error where a sharded model cannot be served; `instead` says what to do."""
    if is_sharded(module):
        raise ValueError(f"{caller}: the model is sharded, each rank holds a part of its parameters; {instead}")


def mesh_of(root: nn.Module) -> DeviceMesh | None:
    """The mesh over which the model is sharded, None where it is not; what a forward left gathered is given back."""
    if not is_sharded(root):
        return None
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return next((parameter.device_mesh for parameter in root.parameters() if is_part(parameter)), None)  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The tensor, or what a sharded one is a part of; every rank must call this."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def on_first_rank(mesh: DeviceMesh | None, caller: str, act: Callable[[], T]) -> T | None:
    """What `act` returns on the first rank of the mesh, None on the others, which wait; without a mesh, just `act`.

    Raises:
        Exception: on the first rank, what `act` raised.
        RuntimeError: on the others, where `act` failed.
    """
    if mesh is None:
        return act()
    result, failure = None, None
    if not any(mesh.get_coordinate() or ()):
        try:
            result = act()
        except Exception as error:
            failure = error
    failed = torch.tensor(int(failure is not None), device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(failed, dist.ReduceOp.MAX, group)
    if failure is not None:
        raise failure
    if failed.item():
        raise RuntimeError(f"{caller}: the first rank failed, and says why")
    return result
