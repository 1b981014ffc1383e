"""Modules trained whole in fp32 inside a 16-bit model: a step of an optimizer on 16-bit numbers rounds most of it away.

Each module with parameters of its own casts what it is called with to their dtype, and what it returns back to that of
the frozen parameters beside it, so that the layers around it see what they saw before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.nn.reads import reads
from glora_kernels.nn.ties import owned

_BESIDE = "_glora_beside"
"""On a widened module: a frozen parameter of the model (in a tuple, since it is none of the module), widened names."""


def to_widen(root: nn.Module, trained: Iterable[nn.Module]) -> dict[nn.Module, nn.Parameter]:
    """The modules inside `trained` that hold 16-bit parameters and can be in fp32, each with one that stays as it is.

    A module of `trained` stays as it is where there is no place for a cast: it shares parameters with a module outside
    (a head tied to an embedding), or code reads them without a call, or beside what modules inside it return.
    """
    tops = list(trained)
    inside = {module for top in tops for module in top.modules()}
    outside = {id(p): p for module in root.modules() if module not in inside for p in module.parameters(recurse=False)}
    beside = next((parameter for parameter in outside.values() if _is_narrow(parameter)), None)
    if beside is None or not tops:
        return {}
    read = reads(root)
    found: dict[nn.Module, nn.Parameter] = {}
    for top in tops:
        holders = [m for m in top.modules() if any(map(_is_narrow, m.parameters(recurse=False)))]
        if all(
            module not in read and not module._modules and outside.keys().isdisjoint(map(id, module.parameters()))
            for module in holders
        ):
            found |= dict.fromkeys(holders, beside)
    return found


def widened(modules: Iterable[nn.Module]) -> dict[Tensor, Tensor]:
    """The values in fp32 of what is to be widened: the step that can fail."""
    held = (tensor for module in modules for _, tensor in owned(module))
    return {tensor: tensor.detach().float() for tensor in held if _is_narrow(tensor)}


def widen(modules: Mapping[nn.Module, nn.Parameter], values: Mapping[Tensor, Tensor], undo: ExitStack) -> None:
    """Give the parameters and buffers of the modules their values in fp32, and the casts around them."""
    names = {module: [name for name, tensor in owned(module) if tensor in values] for module in modules}
    for tensor, value in values.items():
        undo.callback(setattr, tensor, "data", tensor.data)
        tensor.data = value
    for module, beside in modules.items():
        undo.callback(_without_casts, module)
        setattr(module, _BESIDE, (beside, names[module]))
        module.register_forward_pre_hook(_cast_in, with_kwargs=True)
        module.register_forward_hook(_cast_out)


def narrowed(root: nn.Module) -> dict[Tensor, Tensor]:
    """The values of what was widened, in the dtype of what is beside it; an error where one is beyond that dtype."""
    values: dict[Tensor, Tensor] = {}
    for path, module in root.named_modules():
        beside, names = vars(module).get(_BESIDE, (None, ()))
        for name, tensor in owned(module):
            if name in names:
                values[tensor] = value = tensor.detach().to(beside.dtype)
                if bool((torch.isfinite(value) != torch.isfinite(tensor)).any()):
                    raise ValueError(f"{path}.{name}, trained in {tensor.dtype}, holds numbers beyond {beside.dtype}")
    return values


def narrow(root: nn.Module, values: Mapping[Tensor, Tensor]) -> None:
    """Undo `widen`: what was widened gets these values, and nothing is cast any more."""
    for tensor, value in values.items():
        tensor.data = value
    for module in root.modules():
        _without_casts(module)


def _without_casts(module: nn.Module) -> None:
    vars(module).pop(_BESIDE, None)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_cast_in, _cast_out)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 2


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module._parameters.values() if p is not None and p.is_floating_point())


def _cast_in(module: nn.Module, args: Any, kwargs: Any) -> Any:
    dtype = _dtype_of(module)
    return _cast(args, None, dtype), _cast(kwargs, None, dtype)


def _cast_out(module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, _dtype_of(module), getattr(module, _BESIDE)[0].dtype)


def _cast(given: Any, source: torch.dtype | None, dtype: torch.dtype) -> Any:
    """Tensors of the dtype `source` (None: any floating-point one) in `dtype`, also inside tuples, lists and dicts."""
    if isinstance(given, Tensor):
        casts = given.is_floating_point() and (source is None or given.dtype == source)
        return given.to(dtype) if casts else given
    if isinstance(given, dict):
        return type(given)({key: _cast(value, source, dtype) for key, value in given.items()})
    if type(given) in (tuple, list):
        return type(given)(_cast(value, source, dtype) for value in given)
    return given
