"""FSDP2 for models with shared factors: sharding, the parameters as an optimizer takes them, clipping.

FSDP2 shards parameters in groups (usually one for each block) and refuses a parameter that belongs to several groups,
as a factor shared over depth does. Such a factor stays whole on every rank, and a hook averages its gradient:

    .grad ← .grad + 1/P · Σ_p g_p        (P ranks)

where g is what autograd is about to add: from a backward or a segment of a reentrant checkpoint, and from earlier ones
while FSDP's gradient sync was off. What `.grad` already holds was averaged before, and is not averaged again.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glora_kernels.nn.base import M
from glora_kernels.nn.frozen import FrozenBase
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import all_paths, check_module, clean, layers_of, named_layers, unwrap
from glora_kernels.nn.named import FIRST
from glora_kernels.nn.ranks import is_part, own_part, refuse_fsdp, whole
from glora_kernels.parallel.grads import settle
from glora_kernels.spec import select

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy


def fully_shard(
    model: M,
    blocks: str | nn.Module | Iterable[str | nn.Module] | None = None,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> M:
    """Shard a model with GLoRA layers by `torch.distributed.fsdp.fully_shard`, shared factors included.

    Every block becomes an FSDP group, and the model a group of all other parameters. A parameter that several groups
    have (a factor shared over depth, say) belongs to none: it is whole on every rank, gets the values of the mesh's
    first rank, and its gradient is averaged over the mesh in backward. The codes of a 4-bit base become a frozen
    parameter and are sharded as others, byte by byte; every rank keeps their scales (absmax). Both must be equal on all
    ranks before. Gradient accumulation (`model.set_requires_gradient_sync(False)`), both kinds of activation
    checkpointing and 2-D (hybrid) meshes work as for any FSDP model. Inject and load before this call, make the
    optimizer after it. A model that is cut by tensor parallelism is sharded over the other dimension of the mesh; a
    factor that is whole is averaged over that one alone.

        model = gk.inject(build(), gk.ShareLoRAConfig(rank=64, share="A"))     # on every rank
        gk.fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW(gk.parameter_groups(model), lr=1e-4)
        for x, target in batches_of_this_rank:
            loss(model(x), target).backward()
            gk.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        gk.save_adapter(model, "adapter.safetensors")                          # on every rank; the first one writes

    Each rank's loss is the mean over its own samples. `torch.distributed.checkpoint`, with `get_model_state_dict`
    and `get_optimizer_state_dict`, saves and resumes a run. For dropout masks that differ between ranks, seed the
    ranks differently: `torch.manual_seed(seed + rank)` before training. `set_gradient_divide_factor` has no effect on
    the factors that are whole.

    Args:
        model: the model, not wrapped, its parameters in memory on every rank; changed in place.
        blocks: modules of the model, or patterns of their paths. None means the elements of the outermost
            `nn.ModuleList`s with GLoRA layers in them; an empty list, that the model is the only group.
        mesh: the ranks: 1-D, or 2-D to replicate over the first dimension and shard over the second. None means all
            ranks, on the accelerator if there is one; a model cut by tensor parallelism needs one.
        reshard_after_forward: this and the other arguments are those of `torch.distributed.fsdp.fully_shard`.
        mp_policy: the dtypes to gather and reduce in. A shared factor keeps its dtype (fp32 over 16-bit weights, say);
            its gradient is averaged in `reduce_dtype`.
        offload_policy: where the shards are kept. A shared factor stays on the device.

    Returns:
        The model.

    Raises:
        TypeError: `model` or a block is of the wrong kind.
        ValueError: a model that is wrapped, sharded already, without a GLoRA layer, cut by tensor parallelism without
            `mesh`, or has a shared parameter on the meta device, or an adapter beside the first that shares factors;
            blocks that are not in the model, that are lists, or (with None) are not found; trained parameters of
            several dtypes in one group.
        RuntimeError: a layer is merged.
    """
    from torch.distributed.fsdp import fully_shard as shard

    if unwrap(model) is not model:
        raise ValueError(f"fully_shard: the model is wrapped ({type(model).__name__}); shard it first, then wrap it")
    refuse_fsdp(model, "fully_shard", "call it once")
    if mesh is None and any(is_part(parameter) for parameter in model.parameters()):
        raise ValueError(
            "fully_shard: the model is cut by tensor parallelism; give mesh=, the data-parallel dimension of the mesh "
            'that both have in common: init_device_mesh(..., mesh_dim_names=("dp", "tp")), tensor parallelism over '
            'mesh["tp"], and fully_shard(model, mesh=mesh["dp"])'
        )
    if merged := [path for path, layer in layers_of(model, "fully_shard").items() if layer.merged]:
        raise RuntimeError(f"fully_shard: {merged[0]!r} is merged; call unmerge(model) first")
    for path, layer in named_layers(model).items():
        if layer.experts:
            raise ValueError(
                f"fully_shard: {path!r} is a layer of experts, which cannot be sharded; use DistributedDataParallel, "
                "or adapt linear layers alone"
            )
        for name, own in layer.named().items():
            if own.shares:
                raise ValueError(
                    f"fully_shard: the adapter {name!r} of {path!r} shares factors with other layers, which only the "
                    f"first adapter ({FIRST!r}) can do in a sharded model"
                )
    chosen = _own_blocks(model) if blocks is None else _named_blocks(model, blocks)
    groups = _groups(model, chosen)
    common = _common(model, groups)
    for parameters in groups:
        _check_dtypes(model, parameters - set(common))

    given = {"mp_policy": mp_policy, "offload_policy": offload_policy, "reshard_after_forward": reshard_after_forward}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    mesh = mesh or _every_rank()
    casts_codes = mp_policy is not None and mp_policy.param_dtype is not None and _CASTS_ALL
    packed = _of_codes(model)
    if packed and casts_codes:
        warnings.warn(
            "fully_shard: FSDP2 of this torch would cast 4-bit codes to param_dtype, so every rank keeps all of them; "
            "torch 2.12 shards them, or leave param_dtype out and use autocast",
            stacklevel=2,
        )
    elif packed:
        _make_codes_parameters(packed)
        groups = _groups(model, chosen)
        common = _common(model, groups)
    everything: list[nn.Module] = [*chosen, model]
    for module in everything:
        shard(module, mesh=mesh, ignored_params=set(common), **options)
    for module in model.modules():
        if isinstance(module, FrozenBase):
            module.change_codes(lambda codes: codes.to(mesh.device_type))
    _replicate(model, common, mesh, None if mp_policy is None else mp_policy.reduce_dtype)
    return model


_CASTS_ALL = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
"""Whether FSDP2 of this torch casts all parameters to `param_dtype`, not the floating-point ones alone."""


def _of_codes(model: nn.Module) -> list[FrozenBase]:
    return [module for module in model.modules() if isinstance(module, FrozenBase) and module.quant_state is not None]


def _make_codes_parameters(layers: Iterable[FrozenBase]) -> None:
    """Make the codes of 4-bit layers parameters, one for layers on the same codes."""
    made: dict[Tensor, nn.Parameter] = {}
    for layer in layers:
        codes = layer.weight
        if codes not in made:
            made[codes] = nn.Parameter(codes, requires_grad=False)
        layer.make_codes_a_parameter(made[codes])


def parameter_groups(model: nn.Module, by_adapter: bool = False) -> list[dict[str, Any]]:
    """The trained parameters as parameter groups for an optimizer: one of whole ones, one of sharded ones a mesh.

    by_adapter: such groups for each adapter of the model (`adapters`), with its name under the key "adapter"; what
    belongs to none (modules trained whole) has None there. Set learning rates by it, say:

        groups = gk.parameter_groups(model, by_adapter=True)
        optimizer = torch.optim.AdamW([{**group, "lr": rates[group["adapter"]]} for group in groups])

    The list operations that optimizers use ("foreach", the default on a GPU, and "fused") cannot mix the two kinds. A
    shared parameter appears once. A model that is not sharded has one group.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"])
        >>> optimizer = torch.optim.AdamW(gk.parameter_groups(model), lr=1e-3)
    """
    check_module(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not by_adapter:
        return [{"params": alike} for alike in _by_kind(trained)]
    owners: dict[nn.Parameter, str] = {}
    for layer in named_layers(unwrap(model)).values():
        for name, own in layer.named().items():
            owners |= dict.fromkeys(own.parameters(), name)
        for parameter in layer.parameters():
            if parameter is not layer.bias:
                owners.setdefault(parameter, FIRST)
    groups: dict[str | None, list[nn.Parameter]] = {}
    for parameter in trained:
        groups.setdefault(owners.get(parameter), []).append(parameter)
    return [{"params": alike, "adapter": name} for name, own in groups.items() for alike in _by_kind(own)]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for sharded and whole parameters together; every rank must call it.

    Returns:
        The norm of all gradients as one vector, before clipping; the same on every rank.

    Raises:
        RuntimeError: `error_if_nonfinite`, and the norm is not finite.

    Examples:
        >>> model = gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig(), target_modules=["0"])
        >>> model(torch.randn(2, 16)).sum().backward()
        >>> norm = gk.clip_grad_norm_(model.parameters(), 1.0)
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    settle(given)
    clipped = [parameter for parameter in given if parameter.grad is not None]
    grads = [parameter.grad for parameter in clipped if parameter.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    if math.isinf(norm_type):  # an empty part has no largest element
        grads = [whole(grad) if _is_uneven(grad) else grad for grad in grads]
    norms = [whole(nn.utils.get_total_norm(alike, norm_type, foreach=foreach)) for alike in _by_kind(grads)]
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"clip_grad_norm_: the norm of order {norm_type} is {total.item()}; nothing was clipped")
    for alike in _by_kind(clipped):
        nn.utils.clip_grads_with_norm_(alike, max_norm, total, foreach)
    return total


class _Average:
    """Averages what autograd adds to the gradients of parameters over the ranks of a mesh, in `dtype`.

    While `on` is False, gradients are held back and added to the next average, as FSDP does for sharded parameters.
    """

    def __init__(self, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
        self.groups, self.ranks, self.dtype, self.on = mesh.get_all_groups(), mesh.size(), dtype, True
        self._watched: set[nn.Parameter] = set()
        self._kept: dict[nn.Parameter, Tensor] = {}

    def watch(self, parameter: nn.Parameter) -> None:
        """Average the gradients of a parameter from now on, also if it is trained only later; may be called again."""
        if parameter in self._watched:
            return
        trained = parameter.requires_grad
        parameter.requires_grad_(parameter.is_floating_point())  # hooks need requires_grad
        if parameter.requires_grad:
            parameter.register_hook(partial(self._mean, parameter))
        parameter.requires_grad_(trained)
        self._watched.add(parameter)

    @torch.no_grad()
    def _mean(self, parameter: nn.Parameter, given: Tensor) -> Tensor:
        grad = own_part(given)
        if (kept := self._kept.pop(parameter, None)) is not None:
            grad = grad + kept
        if not self.on:
            self._kept[parameter] = grad
            return _with_part(given, torch.zeros_like(grad))
        mean = (grad / self.ranks).to(self.dtype or grad.dtype).contiguous()
        for group in self.groups:
            dist.all_reduce(mean, group=group)
        return _with_part(given, mean.to(grad.dtype))


def _with_part(given: Any, part: Tensor) -> Tensor:
    """The part itself, or where `given` is a DTensor one like it with this part."""
    if not is_part(given):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, given.device_mesh, given.placements, run_check=False, shape=given.shape, stride=given.stride()
    )


def _replicate(model: Any, common: list[nn.Parameter], mesh: DeviceMesh, reduce_dtype: torch.dtype | None) -> None:
    """Move the parameters that FSDP ignores to the mesh's device, broadcast their values, average their gradients."""
    average = _Average(mesh, reduce_dtype)
    for parameter in common:
        if not is_part(parameter):
            parameter.data = parameter.data.to(mesh.device_type)
        for group in mesh.get_all_groups():
            dist.broadcast(own_part(parameter.data), group=group, group_src=0)
        average.watch(parameter)
    shared = set(common)
    places = [(m, name) for m in model.modules() for name, parameter in m._parameters.items() if parameter in shared]

    def watch_new_ones(*_: object) -> None:
        for module, name in places:
            if (parameter := module._parameters.get(name)) is not None:
                average.watch(parameter)  # another one after load_state_dict(assign=True), say

    if places:
        model.register_forward_pre_hook(watch_new_ones)
    native = model.set_requires_gradient_sync

    def set_requires_gradient_sync(requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """FSDP's switch, extended to the gradients averaged here."""
        native(requires_gradient_sync, recurse=recurse)
        if recurse:
            average.on = requires_gradient_sync

    model.set_requires_gradient_sync = set_requires_gradient_sync


def _every_rank() -> DeviceMesh:
    """A 1-D mesh of all ranks, as torch's default: on the accelerator, or on the CPU where there is none."""
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return init_device_mesh("cpu" if accelerator is None else accelerator.type, (dist.get_world_size(),))


def _own_blocks(model: nn.Module) -> list[nn.Module]:
    """The elements of the outermost ModuleLists that have GLoRA layers; for a list of lists, the inner elements."""
    found: dict[nn.Module, None] = {}

    def search(module: nn.Module, inside: bool = False) -> None:
        for child in module.children():
            is_list = isinstance(child, nn.ModuleList) and _is_container(child)
            if not inside or _is_container(child):
                search(child, is_list and (inside or _adapted(child)))
            elif any(True for _ in child.parameters()):
                found[child] = None

    search(model)
    if not found:
        raise ValueError(
            "fully_shard: no nn.ModuleList of the model holds GLoRA layers; name the blocks to be sharded one by one, "
            'blocks=["encoder.layer?"] say, or give blocks=[] to shard the model as one'
        )
    return list(found)


def _named_blocks(model: nn.Module, blocks: str | nn.Module | Iterable[str | nn.Module]) -> list[nn.Module]:
    """The given modules and those that patterns match; inner modules come before outer ones, as FSDP demands."""
    paths = [(path, module) for path, module in all_paths(model) if path]
    found: dict[nn.Module, int] = {}
    for item in [blocks] if isinstance(blocks, (str, nn.Module)) else blocks:
        if not isinstance(item, (str, nn.Module)):
            raise TypeError(f"blocks takes patterns (str) and modules, got {item!r}")
        named = select(item, {path for path, _ in paths}) if isinstance(item, str) else ()
        hits = [(path, module) for path, module in paths if path in named or module is item]
        if not hits:
            what = f"the pattern {item!r} matches no module" if isinstance(item, str) else f"{item} is not a module"
            raise ValueError(f"blocks: {what} of the model")
        for path, module in hits:
            if _is_container(module):
                kind = type(module).__name__
                raise ValueError(f"blocks: {path!r} is a {kind}, which is never called; name its elements")
            found[module] = max(found.get(module, 0), path.count("."))
    return sorted(found, key=lambda module: -found[module])


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward


def _adapted(module: nn.Module) -> bool:
    return any(isinstance(inner, GLoRALinear) for inner in module.modules())


def _groups(model: nn.Module, blocks: list[nn.Module]) -> list[set[nn.Parameter]]:
    """The parameters of each group: those of a block in no inner block, and those of the model in no block."""
    groups: dict[nn.Module, set[nn.Parameter]] = {module: set() for module in (*blocks, model)}

    def walk(module: nn.Module, group: nn.Module) -> None:
        group = module if module in groups else group
        groups[group] |= set(module.parameters(recurse=False))
        for child in module.children():
            walk(child, group)

    walk(model, model)
    return list(groups.values())


def _common(model: nn.Module, groups: list[set[nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters that several groups have, in the same order on all ranks."""
    counts = Counter(parameter for parameters in groups for parameter in parameters)
    common = [parameter for parameter in model.parameters() if counts[parameter] > 1]
    for parameter in common:
        if parameter.is_meta:
            raise ValueError(
                f"fully_shard: {_name(model, parameter)!r}, which several blocks share, is on the meta device and has "
                "no values to send to the other ranks; give the model memory and load it first"
            )
    return common


def _check_dtypes(model: nn.Module, group: set[nn.Parameter]) -> None:
    """Raise a ValueError where trained parameters of a group differ in dtype; FSDP would only at the first forward."""
    trained = [parameter for parameter in model.parameters() if parameter in group and parameter.requires_grad]
    different = {parameter.dtype: parameter for parameter in reversed(trained)}
    if len(different) > 1:
        some = ", ".join(f"{_name(model, parameter)!r} ({dtype})" for dtype, parameter in different.items())
        raise ValueError(
            f"fully_shard: the trained parameters of a group must have one dtype, got {some}; give them one "
            "(adapter_dtype in inject), or name one of their modules in blocks"
        )


def _name(model: nn.Module, wanted: nn.Parameter) -> str:
    return next(clean(name) for name, parameter in model.named_parameters() if parameter is wanted)


def _is_uneven(tensor: Any) -> bool:
    """Whether the ranks' parts of a tensor may differ in size or be empty."""
    return is_part(tensor) and tensor.shape[0] % tensor.device_mesh.size() != 0


def _by_kind(parameters: list[Any]) -> list[list[Any]]:
    """The sharded parameters, by their meshes, and the whole ones, as lists."""
    kinds: dict[object, list[Any]] = {}
    for parameter in sorted(parameters, key=lambda p: not is_part(p)):
        kinds.setdefault(parameter.device_mesh if is_part(parameter) else None, []).append(parameter)
    return list(kinds.values())
