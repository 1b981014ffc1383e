"""Injection: which linear layers of a model become GLoRA layers, of which configuration, and the replacement.

Everything is worked out and checked before the model is touched (`_plan`), then done (`replace`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from glora_kernels.nn.base import base_of, is_linear, unsupported
from glora_kernels.nn.frozen import QuantizedLinear, check_dtype
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import all_paths, listed, named_layers, unwrap
from glora_kernels.nn.share import Member, Sharing, keep_tied, plan_sharing, tie
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.spec import GLoRAConfig, ShareLoRAConfig, first_match, matches

HEAD_NAMES: tuple[str, ...] = ("lm_head", "head", "classifier", "score", "embed_out")
"""The last names of a head, where the model has no `get_output_embeddings()` that names one."""

TRAINED = "_glora_trained"
"""The attribute that marks a module trained whole: it travels with the module through copies and pickles."""

Config = GLoRAConfig | ShareLoRAConfig

_EXCLUDE = "exclude it: name other layers in target_modules=[...], or map its path to None in the configuration"


@dataclass
class Linear:
    """One linear layer of the model and every place where it is used."""

    module: nn.Module
    paths: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module | None, str]] = field(default_factory=list)

    def matches(self, pattern: str) -> bool:
        return any(matches(path, pattern) for path in self.paths)


def inject(
    model: nn.Module,
    config: Config | Mapping[str, Config | None],
    target_modules: str | Iterable[str] | None = None,
    train: str | Iterable[str] = (),
    adapter_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replace linear layers of a model by GLoRA layers and freeze everything but the adapters and `train`.

    A pattern is a glob on the module path, or on its last name: "q_proj", "blocks.0.*", "*.attn.?_proj".

    The layers that get one ShareLoRAConfig, or equal ones, share factors by projection type; `shared(model)` shows
    which. A shared factor is one parameter with several names: copies and optimizers treat it as one, a
    `state_dict` has all names, and Hugging Face's `save_pretrained` and Trainer store the first. From here on
    `load_state_dict` refuses a state with different values for them. An average kept by hand over
    `state_dict().values()` would decay it once for each name: average over `parameters()`, or use `AveragedModel`.

    Args:
        model: any module; changed in place. Wrap it in DistributedDataParallel after this, not before.
        config: one configuration for every target, a GLoRAConfig or a ShareLoRAConfig, or a mapping
            pattern → configuration in which the first match wins, None leaves a layer alone, and a layer that
            nothing matches is no target.
        target_modules: patterns of linear layers. None means every linear layer but the head: the module
            that `get_output_embeddings()` returns, else those whose last name is lm_head, head, classifier,
            score or embed_out.
        train: patterns of modules that are trained whole and saved with the adapter. Linear layers in them
            are no targets.
        adapter_dtype: of the adapters; None means each weight's own, but over a 16-bit base fp32 for a shared
            factor: its gradient is a sum over layers, which autograd accumulates in its dtype. Where a
            ShareLoRAConfig has B_down (or B_up) shared by some layers, it is fp32 in all layers of it.

    Returns:
        The model; where the model is itself a linear layer, the GLoRALinear in its place.

    Raises:
        ValueError: a pattern that matches nothing, a model that has GLoRA layers already, a layer that
            cannot be replaced or whose replacement its parent would never call, layers on several devices or of
            several dtypes that were to share a factor, and anything else that would not do what was asked.
            Nothing has changed then.
        TypeError: an argument of the wrong kind.
    """
    root = unwrap(model)
    if named_layers(root):
        raise ValueError(f"inject: the model has GLoRA layers already ({next(iter(named_layers(root)))!r}, ...)")
    if tuner := next((m for m in root.modules() if type(m).__module__.startswith("peft.tuners.")), None):
        raise ValueError(
            f"inject: the model has PEFT layers ({type(tuner).__name__}), whose own factors are linear layers too; "
            "call merge_and_unload() or unload() on it first"
        )
    if adapter_dtype is not None:
        check_dtype("adapter_dtype", adapter_dtype)
    configs = _checked_configs(config)
    trained = _trained_modules(root, patterns_of("train", train))
    targets = None if target_modules is None else patterns_of("target_modules", target_modules)
    if targets == []:
        raise ValueError("target_modules is empty; give at least one pattern, or None for every layer but the head")
    plan = _plan(root, configs, targets, trained)
    members = []
    for linear, chosen in plan:
        if isinstance(chosen, ShareLoRAConfig):
            check_replaceable(linear)
            members.append(_member(linear, chosen))
    sharing = plan_sharing(root, members, adapter_dtype)
    layer_configs = [(linear, _layer_config(chosen), adapter_dtype) for linear, chosen in plan]
    return replace(model, layer_configs, trained, sharing)


def replace(
    model: nn.Module,
    plan: list[tuple[Linear, GLoRAConfig, torch.dtype | None]],
    trained: Mapping[str, nn.Module],
    sharing: Sharing,
) -> nn.Module:
    """Put GLoRA layers in the places of the plan's linear layers, tie, freeze, mark and unfreeze `trained`."""
    root = unwrap(model)
    for linear, _, _ in plan:
        check_replaceable(linear)
    check_wrapper(model, root)
    _check_trained(plan, trained)
    before = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        layers = [GLoRALinear.from_linear(item.module, config, adapter_dtype=dtype) for item, config, dtype in plan]
        tie({item.paths[0]: layer for (item, _, _), layer in zip(plan, layers, strict=True)}, sharing)
    except BaseException:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        raise
    for parameter, _ in before:
        parameter.requires_grad_(False)
    for module in trained.values():
        setattr(module, TRAINED, True)
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    for (linear, _, _), layer in zip(plan, layers, strict=True):
        for parent, name in linear.parents:
            if parent is not None:
                parent._modules[name] = layer
    if sharing.ties:
        keep_tied(root)
    return layers[0] if is_linear(root) else model


def linears(root: nn.Module) -> list[Linear]:
    """The linear layers of a model, each once, in the order of their first paths."""
    modules = dict(root.named_modules(remove_duplicate=False))
    found: dict[int, Linear] = {}
    for (raw, module), (path, _) in zip(modules.items(), all_paths(root), strict=True):
        if is_linear(module):
            item = found.setdefault(id(module), Linear(module))
            prefix, _, name = raw.rpartition(".")
            item.paths.append(path)
            item.parents.append((modules[prefix] if raw else None, name))
    return list(found.values())


def find_targets(
    root: nn.Module, targets: list[str] | None, trained: Mapping[str, nn.Module]
) -> tuple[list[Linear], list[Linear]]:
    """(every linear layer, those that `targets` names and no module of `trained` holds); None means all but the head.

    Raises:
        ValueError: a pattern that matches no linear layer, or only such that are trained whole.
    """
    every = linears(root)
    inside = {id(module): path for path, top in trained.items() for module in top.modules()}
    free = [linear for linear in every if id(linear.module) not in inside]
    if targets is None:
        head = _head(root)
        return every, [linear for linear in free if not _is_head(linear, head)]
    for pattern in targets:
        _check_target(root, pattern, every, inside)
    return every, [linear for linear in free if any(linear.matches(pattern) for pattern in targets)]


def _plan(
    root: nn.Module,
    configs: Mapping[str, Config | None],
    targets: list[str] | None,
    trained: Mapping[str, nn.Module],
) -> list[tuple[Linear, Config]]:
    every, candidates = find_targets(root, targets, trained)
    for pattern, chosen in configs.items():
        # A layer that is no candidate anyway may be excluded once more.
        pool = every if chosen is None else candidates
        if not any(linear.matches(pattern) for linear in pool):
            hint = ""
            if any(linear.matches(pattern) for linear in every):
                hint = "; it matches only the head, layers inside train modules, or layers not in target_modules"
            raise ValueError(
                f"config: the pattern {pattern!r} matches no linear layer to adapt{hint}. {_some(candidates)}"
            )
    plan = []
    for linear in candidates:
        chosen = _choice(linear, configs)
        if chosen is not None:
            plan.append((linear, chosen))
    if not plan:
        raise ValueError(f"inject: no linear layer is left to adapt. {_some(every)}")
    return plan


def _choice(linear: Linear, configs: Mapping[str, Config | None]) -> Config | None:
    choices = []
    for path in linear.paths:
        pattern = first_match(path, configs)
        choices.append(None if pattern is None else configs[pattern])
    if any(choice != choices[0] for choice in choices):
        raise ValueError(f"config: {linear.paths} are one module, but get different configurations")
    return choices[0]


def _member(linear: Linear, config: ShareLoRAConfig) -> Member:
    base = base_of(linear.module)
    assert base is not None
    return Member(linear.paths, base.weight.device, base.dtype, base.shape, config)


def _layer_config(config: Config) -> GLoRAConfig:
    return config.layer_config() if isinstance(config, ShareLoRAConfig) else config


def _check_target(root: nn.Module, pattern: str, every: list[Linear], inside: Mapping[int, str]) -> None:
    """A target pattern must match a linear layer; without wildcards, it may not name one inside `train`."""
    matched = [linear for linear in every if linear.matches(pattern)]
    if not matched:
        other = next(
            (f"{path!r} is a {type(m).__name__}" for path, m in all_paths(root) if matches(path, pattern)),
            None,
        )
        found = "matches no module" if other is None else f"matches no linear layer ({other})"
        raise ValueError(f"target_modules: the pattern {pattern!r} {found}. {_some(every)}")
    taken = [linear for linear in matched if id(linear.module) in inside]
    exact = not any(character in pattern for character in "*?[")
    if taken and (exact or len(taken) == len(matched)):
        path, owner = taken[0].paths[0], inside[id(taken[0].module)]
        raise ValueError(
            f"target_modules: the pattern {pattern!r} names {path!r}, which is trained whole with {owner!r} "
            "(train=...); name it in one of the two"
        )


def _trained_modules(root: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = {path: m for path, m in all_paths(root) if path and matches(path, pattern)}
        if not any(True for module in hits.values() for _ in module.parameters()):
            what = "matches no module" if not hits else f"matches modules without parameters only: {list(hits)[:4]}"
            names = sorted({path.rpartition(".")[2] for path, _ in all_paths(root) if path})
            raise ValueError(f"train: the pattern {pattern!r} {what}. {listed('module', names)}")
        for path, module in hits.items():
            packed = next((m for m in module.modules() if isinstance(m, QuantizedLinear) or is_linear4bit(m)), None)
            if packed is not None:
                raise ValueError(
                    f"train: {path!r} is or holds a layer in 4 bits ({type(packed).__name__}), which cannot be trained "
                    "whole; leave it out of quantize(target_modules=...), or name other modules"
                )
            if all(module is not known for known in found.values()):
                found[path] = module
    return found


def check_replaceable(linear: Linear) -> None:
    """An error where another module in the place of a linear layer would not be called, or it cannot be replaced."""
    path = linear.paths[0]
    for parent, name in linear.parents:
        if isinstance(parent, nn.MultiheadAttention):
            reason = f"nn.MultiheadAttention reads the weights of {name!r} and never calls it"
        elif isinstance(parent, nn.TransformerEncoderLayer):
            reason = f"nn.TransformerEncoderLayer reads the weights of {name!r} in its fused inference path"
        elif parent is not None and "_orig_mod" in parent._modules:
            reason = "torch.compile wraps this layer alone; compile the model after injection"
        else:
            continue
        raise ValueError(f"{path!r} cannot be replaced: {reason}, so an adapter would have no effect; {_EXCLUDE}")
    if reason := unsupported(linear.module) or "":
        raise ValueError(f"{path!r} ({type(linear.module).__name__}) cannot be replaced: {reason}; {_EXCLUDE}")


def check_wrapper(model: nn.Module, root: nn.Module) -> None:
    """An error where the model is wrapped in what must come after a replacement of layers."""
    if model is not root and is_linear(root):
        raise ValueError("a single wrapped linear layer cannot be replaced; inject first, then wrap it")
    while model is not root:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, which would not reduce the gradients of "
                "parameters that come later; inject first, then wrap it"
            )
        model = model._modules["_orig_mod" if "_orig_mod" in model._modules else "module"]  # type: ignore[assignment]


def _check_trained(
    plan: list[tuple[Linear, GLoRAConfig, torch.dtype | None]], trained: Mapping[str, nn.Module]
) -> None:
    owners = {id(parameter): path for path, module in trained.items() for parameter in module.parameters()}
    for linear, _, _ in plan:
        for name, parameter in linear.module._parameters.items():
            if id(parameter) in owners:
                owner = owners[id(parameter)]
                raise ValueError(
                    f"the {name} of {linear.paths[0]!r} is shared with {owner!r}, which is trained (train=...), but "
                    f"the base of a GLoRA layer is frozen; {_EXCLUDE}"
                )


def _head(root: nn.Module) -> nn.Module | None:
    get = getattr(root, "get_output_embeddings", None)
    if get is None:
        return None
    try:
        head = get()
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


def _is_head(linear: Linear, head: nn.Module | None) -> bool:
    if head is not None:
        return linear.module is head
    return any(path.rpartition(".")[2] in HEAD_NAMES for path in linear.paths)


def _checked_configs(config: object) -> Mapping[str, Config | None]:
    if isinstance(config, Config):
        return {"*": config}
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping, a ShareLoRAConfig or a GLoRAConfig, got {type(config).__name__}")
    if not config:
        raise ValueError("config is an empty mapping; give at least one pattern")
    for pattern, value in config.items():
        if not isinstance(pattern, str):
            raise TypeError(f"config: a pattern must be a str, got {pattern!r}")
        if value is not None and not isinstance(value, Config):
            raise TypeError(
                f"config[{pattern!r}] must be a GLoRAConfig, a ShareLoRAConfig or None, got {type(value).__name__}"
            )
    return config


def patterns_of(argument: str, given: str | Iterable[str]) -> list[str]:
    """A pattern or several, as a list."""
    patterns = [given] if isinstance(given, str) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} takes patterns (str), got {pattern!r}")
    return patterns


def _some(candidates: list[Linear]) -> str:
    return listed("linear layer", sorted({path.rpartition(".")[2] for item in candidates for path in item.paths}))
