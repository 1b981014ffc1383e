"""Injection: which linear layers of a model become GLoRA layers, of which configuration, and the replacement.

Everything is worked out and checked before the model is touched (`_plan`), then done (`replace`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import nn

from glora_kernels.nn.base import M, base_of, is_linear
from glora_kernels.nn.door import refuse, skipped_share, warn_skipped
from glora_kernels.nn.frozen import QuantizedLinear, check_dtype
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.mergeable import FROZEN
from glora_kernels.nn.model import TRAINED, all_paths, listed, named_layers, unwrap, wrapped
from glora_kernels.nn.share import Member, Sharing, forget_tied, keep_tied, plan_sharing, tie
from glora_kernels.nn.undo import all_or_none
from glora_kernels.nn.wide import to_widen, widen, widened
from glora_kernels.quant.bnb import free_codes, is_linear4bit, keep_codes
from glora_kernels.spec import GLoRAConfig, ShareLoRAConfig, assign, is_exact, select

HEAD_NAMES: tuple[str, ...] = ("lm_head", "head", "classifier", "score", "embed_out")
"""The names of a head, or of the module that holds its linear layers ("classifier.3", "head.fc")."""

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear layer but the head."""

Config = GLoRAConfig | ShareLoRAConfig


@dataclass
class Linear:
    """One linear layer of the model and every place where it is used."""

    module: nn.Module
    paths: list[str] = field(default_factory=list)
    parents: list[tuple[nn.Module | None, str]] = field(default_factory=list)


@overload
def inject(
    model: nn.Linear | QuantizedLinear,
    config: Config | Mapping[str, Config | None],
    target_modules: str | Iterable[str] | None = None,
    train: str | Iterable[str] = (),
    adapter_dtype: torch.dtype | None = None,
    *,
    exclude_modules: str | Iterable[str] = (),
) -> GLoRALinear: ...
@overload
def inject(
    model: M,
    config: Config | Mapping[str, Config | None],
    target_modules: str | Iterable[str] | None = None,
    train: str | Iterable[str] = (),
    adapter_dtype: torch.dtype | None = None,
    *,
    exclude_modules: str | Iterable[str] = (),
) -> M: ...
def inject(
    model: nn.Module,
    config: Config | Mapping[str, Config | None],
    target_modules: str | Iterable[str] | None = None,
    train: str | Iterable[str] = (),
    adapter_dtype: torch.dtype | None = None,
    *,
    exclude_modules: str | Iterable[str] = (),
) -> nn.Module:
    r"""Replace linear layers of a model by GLoRA layers and freeze everything but the adapters and `train`.

    A pattern is a module path, the end of one ("q_proj", "attn.q_proj"), a glob on the path or on its last name
    ("blocks.0.*", "*.attn.?_proj"), or a regular expression that matches whole paths (r".*\.(q|v)_proj"); the first of
    these that finds a module is what it means.

    The layers that get one ShareLoRAConfig, or equal ones, share factors by projection type; `shared(model)` shows
    which. A shared factor is one parameter with several names: copies and optimizers treat it as one, a
    `state_dict` has all names, and Hugging Face's `save_pretrained` and Trainer store the first. From here on
    `load_state_dict` refuses a state with different values for them. An average kept by hand over
    `state_dict().values()` would decay it once for each name: average over `parameters()`, or use `AveragedModel`.

    Args:
        model: any module; changed in place. Wrap it in DistributedDataParallel after this, not before.
        config: one configuration for every target, a GLoRAConfig or a ShareLoRAConfig, or a mapping
            pattern → configuration in which a path wins, then the first match; None leaves a layer alone, and a layer
            that nothing matches is no target.
        target_modules: patterns of linear layers. None or "all-linear" means every linear layer but the head: what
            `get_output_embeddings()` or timm's `get_classifier()` returns, else those named lm_head, head, classifier,
            score or embed_out or directly inside a module of these names, and an "fc" of the model itself.
        train: patterns of modules that are trained whole and saved with the adapter. Linear layers in them
            are no targets.
        adapter_dtype: of the adapters. None means each weight's own, and fp32 over a 16-bit base, as PEFT has it: a
            step of an optimizer on 16-bit numbers rounds most of it away. Modules in `train` follow: they are fp32 in a
            16-bit model and cast what goes in and comes out (but for those that share parameters with a module
            outside, as a tied head does).

    Returns:
        The model; where the model is itself a linear layer, the GLoRALinear in its place.

    Raises:
        ValueError: a pattern that matches nothing or that others take everything from, a model that has GLoRA layers
            already, layers that cannot be replaced or whose weight a module around them reads without calling them
            (all of them in one error), layers on several devices or of several dtypes that were to share a factor,
            and anything else that would not do what was asked. Nothing has changed then.
        TypeError: an argument of the wrong kind.

    Warns:
        UserWarning: of every linear layer, where much of the model is in none: experts in one tensor, convolutions.
    """
    root = unwrap(model)
    refuse_adapted("inject", root)
    if adapter_dtype is not None:
        check_dtype("adapter_dtype", adapter_dtype)
    configs = _checked_configs(config)
    trained = _trained_modules(root, patterns_of("train", train))
    targets, excluded = targets_of(target_modules), patterns_of("exclude_modules", exclude_modules)
    plan = _plan(root, configs, targets, trained, excluded)
    check_replaceable(root, [linear for linear, _ in plan])
    members = [_member(linear, chosen) for linear, chosen in plan if isinstance(chosen, ShareLoRAConfig)]
    sharing = plan_sharing(root, members, adapter_dtype)
    layer_configs = [(linear, _layer_config(chosen), adapter_dtype or _wide_dtype(linear)) for linear, chosen in plan]
    wide = trained.values() if adapter_dtype in (None, torch.float32) else ()
    with all_or_none() as undo:
        model = replace(model, layer_configs, trained, sharing, undo, wide)
        if targets is None:
            linear_layers = [linear.module for linear in linears(root)]
            warn_skipped("inject", root, [*named_layers(root).values(), *linear_layers, *trained.values()])
    return model


def refuse_adapted(caller: str, root: nn.Module) -> None:
    """An error where the model has layers with adapters already, ours or PEFT's."""
    if layers := named_layers(root):
        raise ValueError(
            f"{caller}: the model has GLoRA layers already ({next(iter(layers))!r}, ...), and a model gets them once: "
            "build or load the base model again and take that (in a notebook, in the same cell)"
        )
    if tuner := next((m for m in root.modules() if _is_tuner(m)), None):
        raise ValueError(
            f"{caller}: the model has PEFT layers ({type(tuner).__name__}), whose own factors are linear layers too; "
            "call merge_and_unload() or unload() on it first"
        )
    if low_rank := next((p for linear in linears(root) for p in linear.paths if "lora_" in p.lower()), None):
        raise ValueError(f"{caller}: the model has low-rank adapters of another kind ({low_rank!r}); merge them first")


def _is_tuner(module: nn.Module) -> bool:
    """Whether a module is a layer or a model of a PEFT method, ours among them."""
    return any(kind.__module__.startswith("peft.tuners.") for kind in type(module).__mro__)


def replace(
    model: nn.Module,
    plan: list[tuple[Linear, GLoRAConfig, torch.dtype | None]],
    trained: Mapping[str, nn.Module],
    sharing: Sharing,
    undo: ExitStack,
    wide: Iterable[nn.Module] = (),
) -> nn.Module:
    """Put GLoRA layers in the places of the plan's linear layers, tie, freeze, mark and unfreeze `trained`.

    `undo` is given what undoes each change, before it is made. Of the modules trained whole, those in `wide` become
    fp32.
    """
    root = unwrap(model)
    check_replaceable(root, [linear for linear, _, _ in plan])
    check_wrapper(model, root)
    _check_trained(plan, trained)
    for parameter in root.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    frozen = {module: _trained_names(module) for module in root.modules()}
    layers = [GLoRALinear.from_linear(item.module, config, adapter_dtype=dtype) for item, config, dtype in plan]
    tie({item.paths[0]: layer for (item, _, _), layer in zip(plan, layers, strict=True)}, sharing)
    casting = to_widen(root, wide)
    values = widened(casting)
    for module, names in frozen.items():
        undo.callback(vars(module).pop, FROZEN, None)
        vars(module)[FROZEN] = names
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    undo.callback(free_codes, root)
    keep_codes(root)  # of the layers that stay as they are: through repacked ones no gradient comes back
    for module in trained.values():
        undo.callback(vars(module).pop, TRAINED, None)
        setattr(module, TRAINED, True)
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    widen(casting, values, undo)
    for (linear, _, _), layer in zip(plan, layers, strict=True):
        put(linear, layer, undo)
    if sharing.ties:
        undo.callback(forget_tied, root)
        keep_tied(root)
    return layers[0] if is_linear(root) else model


def put(linear: Linear, layer: nn.Module, undo: ExitStack) -> None:
    """Put a layer in every place of a linear layer, which `undo` puts back."""
    for parent, name in linear.parents:
        if parent is not None:
            undo.callback(parent._modules.__setitem__, name, linear.module)
            parent._modules[name] = layer


def _trained_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(
        name for name, parameter in module._parameters.items() if parameter is not None and parameter.requires_grad
    )


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
    root: nn.Module, targets: list[str] | None, trained: Mapping[str, nn.Module], excluded: list[str]
) -> tuple[list[Linear], list[Linear]]:
    """(every linear layer, those that `targets` names, `excluded` does not, and no module of `trained` holds).

    `targets` None means all but the head.

    Raises:
        ValueError: a pattern that matches no linear layer, or only such that are trained whole or excluded.
    """
    every = linears(root)
    inside = {id(module): path for path, top in trained.items() for module in top.modules()}
    out: set[int] = set()
    for pattern in excluded:
        if not (named := _named(every, pattern)):
            raise ValueError(f"exclude_modules: the pattern {pattern!r} matches no linear layer. {_some(every)}")
        out |= named
    if targets is None:
        chosen = {id(linear) for linear in every if not _is_head(linear, _heads(root))}
    else:
        chosen = {found for pattern in targets for found in _check_target(root, pattern, every, inside, out)}
    free = (linear for linear in every if id(linear.module) not in inside and id(linear) not in out)
    return every, [linear for linear in free if id(linear) in chosen]


def _named(every: list[Linear], pattern: str) -> set[int]:
    """The linear layers, by identity, that a pattern names."""
    selected = select(pattern, {path for linear in every for path in linear.paths})
    return {id(linear) for linear in every if not selected.isdisjoint(linear.paths)}


def _plan(
    root: nn.Module,
    configs: Mapping[str, Config | None],
    targets: list[str] | None,
    trained: Mapping[str, nn.Module],
    excluded: list[str],
) -> list[tuple[Linear, Config]]:
    every, candidates = find_targets(root, targets, trained, excluded)
    nothing = f"inject: no linear layer is left to adapt ({skipped_share(root)}). {_some(every)}"
    if not candidates:
        raise ValueError(nothing)
    for pattern, chosen in configs.items():
        named = _named(every, pattern)
        # A layer that is no candidate anyway may be excluded once more.
        if not any(id(linear) in named for linear in (every if chosen is None else candidates)):
            hint = ""
            if named:
                hint = "; it matches only the head, layers inside train modules, or layers not in target_modules"
            raise ValueError(
                f"config: the pattern {pattern!r} matches no linear layer to adapt{hint}. {_some(candidates)}"
            )
    try:
        patterns = assign(configs, {path for linear in every for path in linear.paths})
    except ValueError as error:
        raise ValueError(f"config: {error}") from error
    plan = []
    for linear in candidates:
        choices = [configs[patterns[path]] if path in patterns else None for path in linear.paths]
        if any(choice != choices[0] for choice in choices):
            raise ValueError(f"config: {linear.paths} are one module, but get different configurations")
        if choices[0] is not None:
            plan.append((linear, choices[0]))
    if not plan:
        raise ValueError(nothing)
    if all(_trains_nothing(linear, chosen) for linear, chosen in plan):
        raise ValueError(
            f"config: no layer of the {len(plan)} gets a parameter: every support that they could have is 'none', or D "
            "without a bias; choose another configuration, or None for layers to leave alone"
        )
    return plan


def _trains_nothing(linear: Linear, config: Config) -> bool:
    return not isinstance(config, ShareLoRAConfig) and (
        config.is_empty or not config.parameter_shapes(1, 1, linear.module._parameters.get("bias") is not None)
    )


def _member(linear: Linear, config: ShareLoRAConfig) -> Member:
    base = base_of(linear.module)
    assert base is not None
    return Member(linear.paths, base.weight.device, base.dtype, base.shape, config)


def _wide_dtype(linear: Linear) -> torch.dtype | None:
    """fp32 over a 16-bit base."""
    base = base_of(linear.module)
    assert base is not None
    return torch.float32 if base.dtype.itemsize == 2 else None


def _layer_config(config: Config) -> GLoRAConfig:
    return config.layer_config() if isinstance(config, ShareLoRAConfig) else config


def _check_target(
    root: nn.Module, pattern: str, every: list[Linear], inside: Mapping[int, str], out: set[int]
) -> set[int]:
    """The layers that a target pattern names: at least one, and without wildcards none inside `train`."""
    named = _named(every, pattern)
    matched = [linear for linear in every if id(linear) in named]
    if not matched:
        modules = dict(all_paths(root))
        selected = select(pattern, modules.keys())
        other = next((f"{path!r} is a {type(m).__name__}" for path, m in modules.items() if path in selected), None)
        found = "matches no module" if other is None else f"matches no linear layer ({other})"
        raise ValueError(f"target_modules: the pattern {pattern!r} {found}. {_some(every)}")
    taken = [linear for linear in matched if id(linear.module) in inside]
    if taken and (is_exact(pattern) or len(taken) == len(matched)):
        path, owner = taken[0].paths[0], inside[id(taken[0].module)]
        raise ValueError(
            f"target_modules: the pattern {pattern!r} names {path!r}, which is trained whole with {owner!r} "
            "(train=...); name it in one of the two"
        )
    if named <= out:
        raise ValueError(f"target_modules: all that the pattern {pattern!r} matches is in exclude_modules")
    return named


def _trained_modules(root: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    modules = {path: module for path, module in all_paths(root) if path}
    for pattern in patterns:
        selected = select(pattern, modules.keys())
        hits = {path: module for path, module in modules.items() if path in selected}
        if not any(True for module in hits.values() for _ in module.parameters()):
            what = "matches no module" if not hits else f"matches modules without parameters only: {list(hits)[:4]}"
            names = sorted({path.rpartition(".")[2] for path in modules})
            raise ValueError(f"train: the pattern {pattern!r} {what}. {listed('module', names)}")
        for path, module in hits.items():
            refuse_4bit(path, module)
            if all(module is not known for known in found.values()):
                found[path] = module
    return found


def refuse_4bit(path: str, module: nn.Module) -> None:
    """An error where a module that is to be trained whole is or holds a layer in 4 bits."""
    packed = next((m for m in module.modules() if isinstance(m, QuantizedLinear) or is_linear4bit(m)), None)
    if packed is not None:
        raise ValueError(
            f"train: {path!r} is or holds a layer in 4 bits ({type(packed).__name__}), which cannot be trained "
            "whole; leave it out of quantize(target_modules=...), or name other modules"
        )


def check_replaceable(root: nn.Module, chosen: list[Linear]) -> None:
    """One error for all layers in whose place another module would have no effect, or that cannot be replaced."""
    refuse(root, {linear.paths[0]: linear.module for linear in chosen}, "replaced")


def check_wrapper(model: nn.Module, root: nn.Module) -> None:
    """An error where the model is wrapped in what must come after a replacement of layers."""
    if model is not root and is_linear(root):
        raise ValueError("a single wrapped linear layer cannot be replaced; inject first, then wrap it")
    inner: nn.Module | None = model
    while inner is not root and inner is not None:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, which would not reduce the gradients of "
                "parameters that come later; inject first, then wrap it"
            )
        inner = wrapped(inner)


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
                    f"the base of a GLoRA layer is frozen; leave it out by exclude_modules=[...]"
                )


def _heads(root: nn.Module) -> set[int] | None:
    """The modules that a model names as its head (transformers, timm), by identity; None where it names none."""
    for name in ("get_output_embeddings", "get_classifier"):
        get = getattr(root, name, None)
        if get is None:
            continue
        try:
            given = get()
        except NotImplementedError:
            continue
        heads = [
            module for module in (given if isinstance(given, tuple) else (given,)) if isinstance(module, nn.Module)
        ]
        if found := {id(inner) for head in heads for inner in head.modules() if is_linear(inner)}:
            return found
    return None


def _is_head(linear: Linear, heads: set[int] | None) -> bool:
    if heads is not None:
        return id(linear.module) in heads
    return any(path == "fc" or not set(path.split(".")[-2:]).isdisjoint(HEAD_NAMES) for path in linear.paths)


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


def targets_of(given: str | Iterable[str] | None) -> list[str] | None:
    """The patterns of `target_modules`; None for every linear layer but the head."""
    if given is None or given == ALL_LINEAR:
        return None
    targets = patterns_of("target_modules", given)
    if not targets:
        raise ValueError(
            f"target_modules is empty; give at least one pattern, or None ({ALL_LINEAR!r}) for every layer but the head"
        )
    return targets


def patterns_of(argument: str, given: str | Iterable[str]) -> list[str]:
    """A pattern or several, as a list."""
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{argument} takes a pattern (str) or several, got {given!r}")
    patterns = [given] if isinstance(given, str) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} takes patterns (str), got {pattern!r}")
    return patterns


def _some(candidates: list[Linear]) -> str:
    return listed("linear layer", sorted({path.rpartition(".")[2] for item in candidates for path in item.paths}))
