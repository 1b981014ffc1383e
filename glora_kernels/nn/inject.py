"""Injection: choosing the linear layers to adapt and their configurations, and replacing them by GLoRA layers.

Everything is decided and checked (`_chosen`, `check_replaceable`) before the model is changed (`replace`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace as changed
from typing import Literal, get_args, overload

import torch
from torch import nn

from glora_kernels.nn.base import FROZEN, M, convolution_class, is_linear
from glora_kernels.nn.convolutions.layer import GLoRAConv
from glora_kernels.nn.door import refuse, skipped_share, warn_skipped
from glora_kernels.nn.expert_linear import GLoRAExpertLinear
from glora_kernels.nn.experts import ExpertLinear, keep_names
from glora_kernels.nn.frozen import QuantizedLinear, check_dtype
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import TRAINED, is_in_ddp, is_tuner, named_layers, unwrap
from glora_kernels.nn.patterns import listed, patterns_of, unmatched
from glora_kernels.nn.projections import guard
from glora_kernels.nn.share import Sharing, forget_tied, keep_tied, plan_sharing, tie
from glora_kernels.nn.targets import (
    Linear,
    find_targets,
    linears,
    named_by,
    put,
    some,
    targets_of,
    top_k_of,
    trained_modules,
)  # fmt: skip
from glora_kernels.nn.undo import all_or_none
from glora_kernels.nn.wide import to_widen, widen, widened
from glora_kernels.parallel.found import found_in, is_cut
from glora_kernels.quant.bnb import free_codes, keep_codes
from glora_kernels.spec import GLoRAConfig, ShareLoRAConfig, assign, check_choice

Config = GLoRAConfig | ShareLoRAConfig
ExpertRank = Literal["rank", "rank // top_k"]
"""What rank the adapter of each expert has, from the rank of its configuration."""
Planned = tuple[Linear, GLoRAConfig, torch.dtype]
"""A linear layer to replace, the configuration of its adapter, and the adapter's dtype."""


@overload
def inject(
    model: nn.Linear | QuantizedLinear | nn.Conv1d | nn.Conv2d | nn.Conv3d,
    config: Config | Mapping[str, Config | None],
    target_modules: str | Iterable[str] | None = None,
    train: str | Iterable[str] = (),
    adapter_dtype: torch.dtype | None = None,
    *,
    exclude_modules: str | Iterable[str] = (),
    target_parameters: str | Iterable[str] = (),
    expert_rank: ExpertRank = "rank",
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
    target_parameters: str | Iterable[str] = (),
    expert_rank: ExpertRank = "rank",
) -> M: ...
def inject(
    model: nn.Module,
    config: Config | Mapping[str, Config | None],
    target_modules: str | Iterable[str] | None = None,
    train: str | Iterable[str] = (),
    adapter_dtype: torch.dtype | None = None,
    *,
    exclude_modules: str | Iterable[str] = (),
    target_parameters: str | Iterable[str] = (),
    expert_rank: ExpertRank = "rank",
) -> nn.Module:
    r"""Replace linear layers and convolutions by GLoRA layers and freeze everything but the adapters and `train`.

    A pattern is a module path, the end of one ("q_proj", "attn.q_proj"), a glob on the path or on its last name
    (`"blocks.0.*"`, `"*.attn.?_proj"`), or a regular expression that matches whole paths (`r".*\.(q|v)_proj"`); the
    first of these that finds a module is what it means.

    Layers with equal ShareLoRAConfigs share factors by projection type; `shared(model)` shows which. A shared factor is
    one parameter with several names: copies and optimizers treat it as one, a `state_dict` has all names, and Hugging
    Face's `save_pretrained` and Trainer store the first. From here on `load_state_dict` refuses a state whose values
    under these names differ. A hand-written moving average over `state_dict().values()` would decay the factor once for
    each name: average over `parameters()`, or use `AveragedModel`.

    Args:
        model: any module; changed in place. Wrap it in DistributedDataParallel after this, not before.
        config: one configuration for every target, a GLoRAConfig or a ShareLoRAConfig, or a mapping
            pattern → configuration: an exact path wins, then the first match. A layer whose configuration is None, or
            that no pattern matches, is not adapted.
        target_modules: patterns of linear layers. None or "all-linear" means every linear layer but the head: what
            `get_output_embeddings()` or timm's `get_classifier()` returns, else those named lm_head, head, classifier,
            score or embed_out or directly inside a module of these names, and an "fc" of the model itself. A pattern
            that matches no linear layer means convolutions (`nn.Conv1d`, 2d, 3d): "conv1", `r".*resnets.*conv\d"`.
        train: patterns of modules that are trained whole and saved with the adapter. Linear layers in them are not
            adapted.
        target_parameters: patterns of the weights of experts ("experts.gate_up_proj", "experts.down_proj"), which
            transformers' mixtures of experts hold as one parameter for all experts; they are adapted beside
            target_modules, which may be [] then. Each expert gets an adapter, but factors that a ShareLoRAConfig shares
            are one for all experts, and over depth as for linear layers. No other argument takes experts, except a
            pattern of target_modules that matches no linear layer and no convolution.
        expert_rank: of the adapter of each expert: "rank" is that of its configuration, as in PEFT; "rank // top_k"
            divides it by the number of experts that a token has (`num_experts_per_tok`), as NeMo's
            `normalize_moe_lora` does, so that a token meets about as much rank as in a dense layer. alpha stays, and
            s = alpha/rank with the rank of the expert.
        adapter_dtype: of the adapters. None means the dtype of the weight, but fp32 over a 16-bit base, as in PEFT:
            16-bit numbers round away most of an optimizer's step. Modules in `train` then become fp32 too and cast
            their inputs and outputs, except those that share parameters with a module outside (a tied head).

    Returns:
        The model; where the model is itself a linear layer or a convolution, the GLoRA layer in its place.

    Raises:
        ValueError: a pattern that matches nothing, or only layers that other arguments take out; a model that has GLoRA
            layers already; layers that cannot be replaced, or whose weight is read by code that does not call them
            (one error names them all); a ShareLoRAConfig for a convolution; a factor to be shared over several devices
            or dtypes; and any other argument that would have no effect. The model is unchanged.
        TypeError: an argument of the wrong kind.

    Warns:
        UserWarning: target_modules is None and much of the model is in no linear layer: experts in one tensor,
            convolutions.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
        >>> model = gk.inject(model, gk.GLoRAConfig(A="vector", B="lora", rank=4), target_modules=["0"], train=["2"])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.A', '0.B_up', '0.B_down', '2.weight', '2.bias']
    """
    root = unwrap(model)
    refuse_adapted("inject", root)
    check_dtype("adapter_dtype", adapter_dtype)
    configs = checked_configs(config)
    trained = trained_modules(root, patterns_of("train", train))
    parameters = patterns_of("target_parameters", target_parameters)
    targets, excluded = targets_of(target_modules, parameters), patterns_of("exclude_modules", exclude_modules)
    chosen = chosen_layers("inject", root, configs, targets, trained, excluded, parameters=parameters)
    chosen = with_expert_ranks(chosen, expert_rank)
    check_replaceable(root, list(chosen))
    sharers = {linear: own for linear, own in chosen.items() if isinstance(own, ShareLoRAConfig)}
    sharing = plan_sharing(root, sharers, adapter_dtype)
    plan: list[Planned] = [
        (linear, own.layer_config() if isinstance(own, ShareLoRAConfig) else own, adapter_dtype or linear.adapter_dtype)
        for linear, own in chosen.items()
    ]
    wide = trained.values() if adapter_dtype in (None, torch.float32) else ()
    with all_or_none() as undo:
        model = replace(model, plan, trained, sharing, undo, wide)
        if targets is None and not _is_layer(root):
            every = (linear.module for linear in linears(root) if not linear.is_convolution)
            left = [*named_layers(root).values(), *every, *trained.values()]
            warn_skipped("inject", root, left)
    return model


def refuse_adapted(caller: str, root: nn.Module) -> None:
    """Raise a ValueError where the model has adapters already, ours or PEFT's."""
    if layers := named_layers(root):
        raise ValueError(
            f"{caller}: the model has GLoRA layers already ({next(iter(layers))!r}, ...), and a model gets them once: "
            "build or load the base model again and take that (in a notebook, in the same cell)"
        )
    if tuner := next((m for m in root.modules() if is_tuner(m)), None):
        raise ValueError(
            f"{caller}: the model has PEFT layers ({type(tuner).__name__}), whose own factors are linear layers too; "
            "call merge_and_unload() or unload() on it first"
        )
    if low_rank := next((p for linear in linears(root) for p in linear.paths if "lora_" in p.lower()), None):
        raise ValueError(f"{caller}: the model has low-rank adapters of another kind ({low_rank!r}); merge them first")


def replace(
    model: nn.Module,
    plan: list[Planned],
    trained: Mapping[str, nn.Module],
    sharing: Sharing,
    undo: ExitStack,
    wide: Iterable[nn.Module] = (),
) -> nn.Module:
    """Replace the plan's linear layers by GLoRA layers, tie shared factors, freeze all else, mark and train `trained`.

    Each change is preceded by a callback in `undo` that reverts it. The modules of `trained` in `wide` become fp32.
    """
    root = unwrap(model)
    check_wrapper(model, root)
    check_trained((linear for linear, _, _ in plan), trained)
    for parameter in root.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    thawed = {
        module: tuple(name for name, own in module._parameters.items() if own is not None and own.requires_grad)
        for module in root.modules()
    }
    layers = [layer_over(item, config, dtype, sharing.common.get(item.path, ())) for item, config, dtype in plan]
    tie({item.path: layer for (item, _, _), layer in zip(plan, layers, strict=True)}, sharing)
    cut_as_before({item.path: (item.module, layer) for (item, _, _), layer in zip(plan, layers, strict=True)})
    casting = to_widen(root, wide)
    values = widened(casting)
    for module, names in thawed.items():
        undo.callback(vars(module).pop, FROZEN, None)
        vars(module)[FROZEN] = names
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    undo.callback(free_codes, root)
    keep_codes(root)  # of Linear4bit layers that stay: repacked codes pass no gradient back
    for module in trained.values():
        undo.callback(vars(module).pop, TRAINED, None)
        setattr(module, TRAINED, True)
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    widen(casting, values, undo)
    undo.callback(keep_names, root)
    for (linear, _, _), layer in zip(plan, layers, strict=True):
        put(linear, layer, undo)
    keep_names(root)
    if sharing.ties:
        undo.callback(forget_tied, root)
        keep_tied(root)
    guard(root, undo)
    return layers[0] if _is_layer(root) else model


def _is_layer(root: nn.Module) -> bool:
    """Whether a model is itself a layer to replace."""
    return is_linear(root) or convolution_class(root) is not None


def layer_over(item: Linear, config: GLoRAConfig, dtype: torch.dtype, common: Collection[str] = ()) -> GLoRALinear:
    """The GLoRA layer for a linear layer, convolution or product of experts; common: what all its experts share."""
    if isinstance(item.module, ExpertLinear):
        return GLoRAExpertLinear(item.module, config, common=common, adapter_dtype=dtype)
    if item.is_convolution:
        return GLoRAConv(item.module, config, adapter_dtype=dtype)
    return GLoRALinear.in_place_of(item.module, config, dtype)


def with_expert_ranks(chosen: Mapping[Linear, Config], expert_rank: str) -> dict[Linear, Config]:
    """The configurations, those of experts with the rank that `expert_rank` says; the errors of `inject`."""
    check_choice("expert_rank", expert_rank, get_args(ExpertRank))
    if expert_rank == "rank":
        return dict(chosen)
    if not any(linear.experts for linear in chosen):
        raise ValueError(f"expert_rank={expert_rank!r} has no effect: no experts are adapted (target_parameters=[...])")
    found: dict[Linear, Config] = {}
    for linear, config in chosen.items():
        if linear.experts:
            if (rank := config.rank // (each := top_k_of(linear))) < 1:
                raise ValueError(
                    f"expert_rank={expert_rank!r}: the rank of {linear.path!r} would be {config.rank} // {each} = 0; "
                    f"accepted are ranks of {each} and more"
                )
            config = changed(config, rank=rank)
        found[linear] = config
    return found


def cut_as_before(places: Mapping[str, tuple[nn.Module, GLoRALinear]]) -> None:
    """Cut layers over the ranks that the linear layers were cut over in whose places they come."""
    cut = {path: place for path, place in places.items() if is_cut(place[0])}
    if not cut:
        return
    from glora_kernels.parallel.attach import attach  # torch.distributed.tensor takes a second to import

    for path, (linear, layer) in cut.items():
        found = found_in(linear)
        assert not isinstance(found, str), found
        try:
            attach(layer, found.mesh, found.direction)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        found.hook(layer)


def chosen_layers(
    caller: str,
    root: nn.Module,
    configs: Mapping[str, Config | None],
    targets: list[str] | None,
    trained: Mapping[str, nn.Module],
    excluded: list[str],
    adapted: bool = False,
    parameters: Iterable[str] = (),
) -> dict[Linear, Config]:
    """The layers to adapt, and the configuration of each; `adapted`: GLoRA layers may be among them."""
    every, candidates = find_targets(root, targets, trained, excluded, adapted, parameters)
    nothing = f"{caller}: no linear layer is left to adapt ({skipped_share(root)}). {listed(*some(every))}"
    if not candidates:
        raise ValueError(nothing)
    for pattern, config in configs.items():
        named = named_by(pattern, every)
        # A pattern whose configuration is None may name layers that are not adapted anyway.
        if not named or (config is not None and set(candidates).isdisjoint(named)):
            others = (
                "; it matches only the head, layers inside train modules, or layers not in target_modules or "
                "target_parameters"
            )
            what = f"matches no linear layer to adapt{others if named else ''}"
            raise unmatched("config", pattern, what, *some(candidates))
    try:
        patterns = assign(configs, {path for linear in every for path in linear.paths})
    except ValueError as error:
        raise ValueError(f"config: {error}") from error
    chosen: dict[Linear, Config] = {}
    for linear in candidates:
        choices = [configs[patterns[path]] if path in patterns else None for path in linear.paths]
        if any(choice != choices[0] for choice in choices):
            raise ValueError(f"config: {linear.paths} are one module, but get different configurations")
        if choices[0] is not None:
            chosen[linear] = choices[0]
    if not chosen:
        raise ValueError(nothing)
    if all(_trains_nothing(linear, config) for linear, config in chosen.items()):
        raise ValueError(
            f"config: no layer of the {len(chosen)} gets a parameter: every support that they could have is 'none', or "
            "D without a bias; choose another configuration, or None for layers to leave alone"
        )
    return chosen


def _trains_nothing(linear: Linear, config: Config) -> bool:
    has_bias = linear.module._parameters.get("bias") is not None
    return isinstance(config, GLoRAConfig) and not config.parameter_shapes(1, 1, has_bias)


def check_replaceable(root: nn.Module, chosen: list[Linear]) -> None:
    """Raise one ValueError for all layers that cannot be replaced, or whose replacement would have no effect."""
    items: dict[nn.Module, list[Linear]] = {}
    for linear in chosen:
        items.setdefault(linear.owner, []).append(linear)

    def unfit(owner: nn.Module) -> str | None:
        return next(filter(None, (linear.refusal() for linear in items[owner])), None)

    refuse(root, {linear.path: linear.owner for linear in chosen}, "replaced", unfit)


def check_wrapper(model: nn.Module, root: nn.Module) -> None:
    """Raise a ValueError where the model is in a wrapper that must be applied after layers are replaced."""
    if model is not root and _is_layer(root):
        raise ValueError("a single wrapped linear layer cannot be replaced; inject first, then wrap it")
    if is_in_ddp(model):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which would not reduce the gradients of "
            "parameters that come later; inject first, then wrap it"
        )


def check_trained(chosen: Iterable[Linear], trained: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError where a layer to adapt shares a parameter with a module that is trained whole."""
    owners = {id(parameter): path for path, module in trained.items() for parameter in module.parameters()}
    for linear in chosen:
        for name, parameter in linear.module._parameters.items():
            if (owner := owners.get(id(parameter))) is not None:
                raise ValueError(
                    f"the {name} of {linear.path!r} is shared with {owner!r}, which is trained (train=...), but "
                    f"the base of a GLoRA layer is frozen; leave it out by exclude_modules=[...]"
                )


def checked_configs(config: object) -> Mapping[str, Config | None]:
    if isinstance(config, Config):
        return {"*": config}
    if not isinstance(config, Mapping):
        ours = "; GLoRAConfig.lora(rank, alpha, dropout) is LoRA" if "lora" in type(config).__name__.lower() else ""
        raise TypeError(
            f"config must be a GLoRAConfig, a ShareLoRAConfig or a mapping, got {type(config).__name__}{ours}"
        )
    if not config:
        raise ValueError("config is an empty mapping; give at least one pattern")
    for pattern, value in config.items():
        if not isinstance(pattern, str):
            raise TypeError(f"config: a pattern must be a str, got {pattern!r}")
        if value is not None and not isinstance(value, Config):
            fields = GLoRAConfig.__dataclass_fields__
            one = ". To make one configuration of it: GLoRAConfig(**config)" if config.keys() <= fields.keys() else ""
            raise TypeError(
                f"config[{pattern!r}] must be a GLoRAConfig, a ShareLoRAConfig or None, got {type(value).__name__}: a "
                f"mapping gives layers, by the pattern of their path, their configuration{one}"
            )
    return config
