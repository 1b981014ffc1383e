"""Modules trained whole in fp32 inside a 16-bit model, since 16-bit numbers round away most of an optimizer's step.

Each widened module casts its inputs to fp32, and its outputs back to the 16-bit dtype of the model's other parameters,
so that the layers around it see the same dtypes as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.nn.reads import reads
from glora_kernels.nn.ties import owned

_REFERENCE = "_glora_beside"
"""Set on a widened module: (a 16-bit parameter of the model, to whose dtype outputs are cast; the widened names).

It is a tuple, so that nn.Module does not register the parameter.
"""


def to_widen(root: nn.Module, trained: Iterable[nn.Module]) -> dict[nn.Module, nn.Parameter]:
    """The modules inside `trained` to make fp32, each with a 16-bit parameter outside whose dtype its outputs keep.

    A module of `trained` stays 16-bit where casts at its input and output are not enough: parameters inside are shared
    with a module outside (a head tied to an embedding), are read without a call, or belong to a module with children.
    """
    tops = list(trained)
    inside = {module for top in tops for module in top.modules()}
    outside = {id(p): p for module in root.modules() if module not in inside for p in module.parameters(recurse=False)}
    reference = next((parameter for parameter in outside.values() if _is_narrow(parameter)), None)
    if reference is None or not tops:
        return {}
    read = reads(root)
    found: dict[nn.Module, nn.Parameter] = {}
    for top in tops:
        holders = [m for m in top.modules() if any(map(_is_narrow, m.parameters(recurse=False)))]
        if all(
            module not in read and not module._modules and outside.keys().isdisjoint(map(id, module.parameters()))
            for module in holders
        ):
            found |= dict.fromkeys(holders, reference)
    return found


def widened(modules: Iterable[nn.Module]) -> dict[Tensor, Tensor]:
    """The fp32 values of the 16-bit tensors in these modules; separate from `widen` because allocation can fail."""
    held = (tensor for module in modules for _, tensor in owned(module))
    return {tensor: tensor.detach().float() for tensor in held if _is_narrow(tensor)}


def widen(modules: Mapping[nn.Module, nn.Parameter], values: Mapping[Tensor, Tensor], undo: ExitStack) -> None:
    """Give the parameters and buffers of the modules their fp32 values, and add casts at their inputs and outputs."""
    names = {module: [name for name, tensor in owned(module) if tensor in values] for module in modules}
    for tensor, value in values.items():
        undo.callback(setattr, tensor, "data", tensor.data)
        tensor.data = value
    for module, reference in modules.items():
        undo.callback(_without_casts, module)
        setattr(module, _REFERENCE, (reference, names[module]))
        module.register_forward_pre_hook(_cast_in, with_kwargs=True)
        module.register_forward_hook(_cast_out)


def narrowed(root: nn.Module) -> dict[Tensor, Tensor]:
    """The values of widened tensors, cast back to 16 bits; a ValueError where one overflows."""
    values: dict[Tensor, Tensor] = {}
    for path, module in root.named_modules():
        reference, names = vars(module).get(_REFERENCE, (None, ()))
        for name, tensor in owned(module):
            if name in names:
                values[tensor] = value = tensor.detach().to(reference.dtype)
                if bool((torch.isfinite(value) != torch.isfinite(tensor)).any()):
                    raise ValueError(
                        f"{path}.{name}, trained in {tensor.dtype}, holds numbers beyond {reference.dtype}"
                    )
    return values


def narrow(root: nn.Module, values: Mapping[Tensor, Tensor]) -> None:
    """Undo `widen`: give the widened tensors these values, and remove the casts."""
    for tensor, value in values.items():
        tensor.data = value
    for module in root.modules():
        _without_casts(module)


def _without_casts(module: nn.Module) -> None:
    vars(module).pop(_REFERENCE, None)
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
    return _cast(output, _dtype_of(module), getattr(module, _REFERENCE)[0].dtype)


def _cast(given: Any, source: torch.dtype | None, dtype: torch.dtype) -> Any:
    """Cast tensors of dtype `source` (None: any floating-point one) to `dtype`, also inside tuples, lists and dicts."""
    if isinstance(given, Tensor):
        casts = given.is_floating_point() and (source is None or given.dtype == source)
        return given.to(dtype) if casts else given
    if isinstance(given, dict):
        return type(given)({key: _cast(value, source, dtype) for key, value in given.items()})
    if type(given) in (tuple, list):
        return type(given)(_cast(value, source, dtype) for value in given)
    return given
