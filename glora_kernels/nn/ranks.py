"""Work on a sharded model that its ranks do together: gather parameters, let the first rank act for all.

A parameter sharded by FSDP2, or cut by tensor parallelism, is a DTensor, whose `full_tensor()` gathers it on every
rank; all ranks must call the functions here that communicate, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # the import takes a second, and only sharded models need it
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    # The class is compared first because a failing hasattr on a Tensor is slow.
    return tensor.__class__ not in _WHOLE and hasattr(tensor, "full_tensor")


_WHOLE = (Tensor, nn.Parameter)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of the module are sharded; also True while FSDP has gathered them for a forward."""
    return is_in_fsdp(module) or any(is_part(parameter) for parameter in module.parameters())


def is_in_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 manages parameters of the module."""
    return any(vars(inner).get("_is_fsdp_managed_module") for inner in module.modules())


def refuse_fsdp(module: nn.Module, caller: str, instead: str) -> None:
    """Raise a ValueError where FSDP2 holds the model; one that is cut by tensor parallelism alone is accepted."""
    if is_in_fsdp(module):
        raise ValueError(f"{caller}: the model is sharded, each rank holds a part of its parameters; {instead}")


def refuse_sharded(module: nn.Module, caller: str, instead: str) -> None:
    """Raise a ValueError where the model is sharded. instead: what to do under FSDP2, for the message."""
    refuse_fsdp(module, caller, instead)
    if is_sharded(module):
        raise ValueError(
            f"{caller}: the model is cut over ranks by tensor parallelism; do it in a model in one piece, into which "
            "the file that save_adapter writes loads"
        )


def mesh_of(root: nn.Module) -> DeviceMesh | None:
    """The mesh over which the model is sharded, or None; parameters that a forward left gathered are sharded again.

    Of several meshes (FSDP over tensor parallelism, which only some parameters are cut by) the one of all dimensions.
    """
    if not is_sharded(root):
        return None
    from torch.distributed.fsdp import FSDPModule

    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    meshes = [parameter.device_mesh for parameter in root.parameters() if is_part(parameter)]  # type: ignore[attr-defined]
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the full tensor gathered from all ranks; every rank must call this."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or the memory of the part that this rank holds."""
    with torch.no_grad():
        return tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, or this rank's part of it where `like` is a part; without communication."""
    if not is_part(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None).to_local()


def on_first_rank(mesh: DeviceMesh | None, caller: str, act: Callable[[], T]) -> T | None:
    """Call `act` on the first rank of the mesh while the others wait; without a mesh, call it.

    Returns:
        The result of `act` on the first rank, None on the others.

    Raises:
        Exception: on the first rank, the exception of `act`.
        RuntimeError: on the others, if `act` failed.
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
