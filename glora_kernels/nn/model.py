"""Whole models: unwrapping them, the paths of their modules, their GLoRA layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from glora_kernels.nn.linear import GLoRALinear

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
"""The attributes in which wrappers hold the wrapped module; `clean` removes them from paths."""

TRAINED = "_glora_trained"
"""The attribute that marks a module trained whole; copies and pickles keep it."""


def wrapped(model: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of torch.compile, data parallelism, AveragedModel, Fabric or DeepSpeed, or None."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)):
        return model.module
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__):
        return model._modules["module"]
    return next((model._modules[name] for name in _WRAPPERS if name in model._modules), None)


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model, the module inside its wrapper, and so on down to the innermost, which is no wrapper."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        inner = wrapped(inner)


def is_in_ddp(model: nn.Module) -> bool:
    return any(isinstance(wrapper, nn.parallel.DistributedDataParallel) for wrapper in wrappers(model))


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a layer or a model of a PEFT method, ours among them."""
    return any(kind.__module__.startswith("peft.tuners.") for kind in type(module).__mro__)


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all its wrappers."""
    check_module(model)
    *_, inside = wrappers(model)
    return inside


def clean(path: str) -> str:
    """A module path without the names that wrappers put into it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def join(path: str, name: str) -> str:
    """The full name of a parameter; `path` is empty where the model is itself a layer."""
    return f"{path}.{name}" if path else name


def named_layers(model: nn.Module) -> dict[str, GLoRALinear]:
    """The GLoRA layers of an unwrapped model by path; one with several paths appears under the first."""
    return {clean(path): m for path, m in model.named_modules() if isinstance(m, GLoRALinear)}


def layers_of(model: nn.Module, caller: str) -> dict[str, GLoRALinear]:
    layers = named_layers(unwrap(model))
    if not layers:
        raise ValueError(f"{caller}: the model has no GLoRA layer; call inject(model, config) first")
    return layers


def trained_of(root: nn.Module) -> dict[str, nn.Module]:
    """The modules trained whole of an unwrapped model, by path."""
    return {clean(path): module for path, module in root.named_modules() if vars(module).get(TRAINED)}


def trainable_parameters(model: nn.Module) -> int:
    """The number of parameter elements that require a gradient; a shared parameter counts once.

    Examples:
        >>> gk.trainable_parameters(gk.inject(nn.Sequential(nn.Linear(16, 4)), gk.GLoRAConfig.lora(rank=2), ["0"]))
        40
    """
    check_module(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def all_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (path, module) of an unwrapped model; a module with several paths comes once for each."""
    for path, module in model.named_modules(remove_duplicate=False):
        yield clean(path), module


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; after it, each of its modules in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
