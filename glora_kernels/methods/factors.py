"""The low-rank adapters of a model as the methods here see them: a `GLoRALinear`, or a LoRA layer of PEFT.

    y = x Wᵀ + b + s·h·Uᵀ + ...,   h = x·Dᵀ,   U = B_up (N, R), D = B_down (R, K)

`low_rank` finds them. What a method changes is a parameter as it is stored: where a map is registered on a factor
(`set_mid`, `restart(into="chain")`), that is the parameter under the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.model import all_paths, is_in_ddp, unwrap
from glora_kernels.nn.named import FIRST
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.spec import GLoRAConfig

PAIRS = ("B", "A", "C")
"""The supports that can be low-rank, the one whose factors are U and D first."""


@dataclass(frozen=True)
class Factor:
    """A parameter that has the rank as one of its dimensions.

    Attributes:
        holder: the module that it belongs to.
        name: under which the holder has it.
        dim: which of its dimensions the rank is.
    """

    holder: nn.Module
    name: str
    dim: int

    @property
    def parameter(self) -> nn.Parameter:
        """As it is stored: under a map, if there is one."""
        maps = self.holder._modules.get("parametrizations")
        if maps is not None and self.name in maps._modules:
            return maps[self.name].original  # type: ignore[index]
        return self.holder._parameters[self.name]  # type: ignore[return-value]

    @property
    def maps(self) -> list[nn.Module]:
        """The maps on it, in the order in which they are applied."""
        if not parametrize.is_parametrized(self.holder, self.name):
            return []
        return list(self.holder.parametrizations[self.name])  # type: ignore[index]

    @property
    def value(self) -> Tensor:
        """As the layer computes with it."""
        return getattr(self.holder, self.name)


class LowRank:
    """A layer with a low-rank adapter. `up` and `down` are U and D.

    Attributes:
        path: of the layer in the model.
        layer: the module.
    """

    name: str
    """Of the adapter."""

    of_experts = False
    """Whether it adapts the parameters of experts, whose factors stand side by side."""

    def __init__(self, path: str, layer: Any) -> None:
        self.path, self.layer = path, layer

    def pairs(self) -> dict[str, tuple[Factor, Factor]]:
        """The factors (up, down) of every low-rank support, by its letter."""
        raise NotImplementedError

    @property
    def up(self) -> Factor:
        return self.pairs()["B"][0]

    @property
    def down(self) -> Factor:
        return self.pairs()["B"][1]

    @property
    def rank(self) -> int:
        """R that the layer computes with."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """s."""
        raise NotImplementedError

    @property
    def base(self) -> Any:
        """The module with the frozen weight and bias."""
        raise NotImplementedError

    @property
    def committed(self) -> bool:
        """Whether an adapter was merged into the base for good."""
        return getattr(self.layer, "committed", False)

    @committed.setter
    def committed(self, value: bool) -> None:
        self.layer.committed = value

    def note_rank(self, rank: int) -> None:
        """Write down the rank of factors that have changed; s stays as it is."""
        raise NotImplementedError

    def reset(self) -> None:
        """Fresh values, which change nothing."""
        raise NotImplementedError

    @property
    def init(self) -> str:
        """How fresh rows of D are drawn: "kaiming" or "xavier"."""
        return "kaiming"

    def refusal(self) -> str | None:
        """The reason why the layer's parameters cannot be changed now, or None."""
        raise NotImplementedError

    def factors(self) -> list[Factor]:
        """Every parameter with the rank as a dimension: the factors, and those of maps on h."""
        found = [factor for pair in self.pairs().values() for factor in pair]
        return found + [own for factor in list(found) for one in factor.maps for own in _of_rank(one)]


def _of_rank(one: nn.Module) -> list[Factor]:
    """The parameters of a map that have the rank as their dimension."""
    return [Factor(one, name, 0) for name in getattr(one, "of_rank", ())]


class Ours(LowRank):
    """A `GLoRALinear`, by its own adapter."""

    layer: GLoRALinear
    name = FIRST

    @property
    def base(self) -> Any:
        return self.layer

    def pairs(self) -> dict[str, tuple[Factor, Factor]]:
        config: GLoRAConfig = self.layer.config
        return {
            name: (Factor(self.layer, f"{name}_up", 1), Factor(self.layer, f"{name}_down", 0))
            for name in PAIRS
            if getattr(config, name) == "lora"
        }

    @property
    def rank(self) -> int:
        return self.layer.config.rank

    @property
    def scale(self) -> float:
        return self.layer._scale

    @property
    def init(self) -> str:
        return self.layer.config.init

    def note_rank(self, rank: int) -> None:
        self.layer.config = self.layer.config.with_rank(rank)
        self.layer._mixed.clear()

    def reset(self) -> None:
        self.layer.reset_adapter()

    def refusal(self) -> str | None:
        if self.layer.merged:
            return "it is merged; call unmerge(model) first"
        if (group := self.layer._siblings) is not None and group.fused:
            return "it is computed together with its siblings; call split_siblings(model) first"
        if self.layer._active is not None:
            return f"its active adapter is {self.layer._active!r}; call set_adapter(model, 'default') first"
        return None


class Peft(LowRank):
    """A LoRA layer of PEFT, accelerated or not, by its active adapter."""

    def __init__(self, path: str, layer: Any) -> None:
        super().__init__(path, layer)
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        self.name = names[0] if names else ""
        self.active = names
        self.of_experts = hasattr(layer, "num_experts")

    @property
    def base(self) -> Any:
        return self.layer.base_layer

    def pairs(self) -> dict[str, tuple[Factor, Factor]]:
        down, up = self._modules()
        return {"B": (Factor(up, "weight", 1), Factor(down, "weight", 0))}

    @property
    def rank(self) -> int:
        return self.layer.r[self.name]

    @property
    def scale(self) -> float:
        return float(self.layer.scaling[self.name])

    def note_rank(self, rank: int) -> None:
        layer, name = self.layer, self.name
        root = layer.use_rslora.get(name, False) if isinstance(getattr(layer, "use_rslora", None), dict) else False
        layer.r[name] = rank
        layer.lora_alpha[name] = self.scale * (rank**0.5 if root else rank)
        layer.lora_A[name].out_features = layer.lora_B[name].in_features = rank

    def reset(self) -> None:
        self.layer.reset_lora_parameters(self.name, True)

    def refusal(self) -> str | None:
        if self.layer.merged:
            return "it is merged; call unmerge_adapter() of the PEFT model first"
        if len(self.active) != 1:
            return f"it has {len(self.active)} active adapters, and only one can be changed; call set_adapter(name)"
        if self.of_experts:
            return "it adapts the parameters of experts, whose factors stand side by side; name other layers"
        if self.name in getattr(self.layer, "lora_variant", {}):
            return "its adapter is a variant of LoRA (DoRA, say)"
        kinds = {type(module).__mro__[bool(parametrize.is_parametrized(module))] for module in self._modules()}
        return None if kinds == {nn.Linear} else "its factors are no linear layers (an embedding, a convolution)"

    def _modules(self) -> Iterator[nn.Module]:
        yield self.layer.lora_A[self.name]
        yield self.layer.lora_B[self.name]


def low_rank(model: nn.Module, caller: str) -> dict[str, LowRank]:
    """Every layer of a model with a low-rank B, by path: ours, and those with an active LoRA of PEFT.

    Raises:
        ValueError: there is none.
    """
    found: dict[str, LowRank] = {}
    seen: set[int] = set()
    for path, module in all_paths(unwrap(model)):
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, GLoRALinear):
            if not module.is_linear:
                kind = "layer of experts, whose factors are stacks of matrices" if module.experts else "convolution"
                raise ValueError(
                    f"{caller}: {path!r} is a {kind}; accepted are models whose GLoRA layers are over linear layers"
                )
            if module.config.B == "lora":
                found[path] = Ours(path, module)
        elif _is_peft_lora(module) and (own := Peft(path, module)).active:
            found[path] = own
    if not found:
        raise ValueError(
            f"{caller}: the model has no low-rank adapter: no GLoRALinear with B='lora', no active LoRA layer of PEFT"
        )
    return found


def _is_peft_lora(module: nn.Module) -> bool:
    parts = module._modules
    return "base_layer" in parts and "lora_A" in parts and bool(parts["lora_A"]._modules)  # type: ignore[union-attr]


def refuse_wrapped(model: nn.Module, caller: str) -> None:
    """Raise a ValueError where the model is sharded or wrapped in DistributedDataParallel."""
    refuse_sharded(unwrap(model), caller, "do it before fully_shard")
    if is_in_ddp(model):
        raise ValueError(
            f"{caller}: the model is wrapped in DistributedDataParallel, whose buckets hold the old parameters; do it "
            "on every rank with the model inside, then wrap that again"
        )


def check_changeable(own: LowRank, caller: str) -> None:
    """Raise a ValueError where the parameters of a layer cannot be changed now."""
    if reason := own.refusal():
        raise ValueError(f"{caller}: {own.path!r} cannot be changed: {reason}")


def refuse_shared(layers: Mapping[str, LowRank], own: LowRank, caller: str, instead: str) -> None:
    """Raise a ValueError where a factor of a layer is that of another one, too. instead: what to do."""
    mine = {id(factor.parameter) for factor in own.factors()}
    for other in layers.values():
        if other is not own and mine & {id(factor.parameter) for factor in other.factors()}:
            raise ValueError(
                f"{caller}: {own.path!r} and {other.path!r} share a factor, and each needs one of its own; {instead}"
            )


def put(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape, and no gradient; it stays the same object, with its hooks.

    While a graph lives (that of a loss that was not deleted), autograd keeps the node that adds to the gradient, with
    the shape from before. It makes a new one where the dtype changes: hence the step in between.
    """
    parameter.grad = None
    other = torch.float32 if values.dtype != torch.float32 else torch.float64
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data = values


def undo_put(undo: ExitStack, parameter: nn.Parameter) -> None:
    """Register what undoes a `put` that follows."""
    undo.callback(setattr, parameter, "grad", parameter.grad)
    undo.callback(put, parameter, parameter.data)


def register(undo: ExitStack, factor: Factor, one: nn.Module) -> None:
    """Put a map on a parameter. What it gives may have another shape."""
    _own_class(undo, factor.holder)
    parametrize.register_parametrization(factor.holder, factor.name, one, unsafe=True)


def empty(factor: Factor, rank: int) -> Tensor:
    """Zeros like the stored parameter, of this rank."""
    shape = list(factor.parameter.shape)
    shape[factor.dim] = rank
    return factor.parameter.detach().new_zeros(shape)


def unregister(undo: ExitStack, factor: Factor) -> None:
    """Take the maps off a parameter, and leave what is stored."""
    _own_class(undo, factor.holder)
    stored, trained = factor.parameter, factor.parameter.requires_grad
    parametrize.remove_parametrizations(factor.holder, factor.name, leave_parametrized=False)
    stored.requires_grad_(trained)
    factor.holder.register_parameter(factor.name, stored)


def _own_class(undo: ExitStack, module: nn.Module) -> None:
    """Give a module with maps a class of its own: its copies have the same one, whose properties PyTorch changes.

    What undoes any change of its maps is registered before. PyTorch makes one in several steps, between which it calls
    code of the module's, and an interrupt there leaves a module without the parameter.
    """
    kind = type(module)
    maps = module._modules.get("parametrizations")
    undo.callback(_restore, module, kind, dict(module._parameters), maps, {} if maps is None else dict(maps._modules))
    if parametrize.is_parametrized(module):
        body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, body)


def _restore(
    module: nn.Module,
    kind: type[Any],
    parameters: dict[str, nn.Parameter | None],
    maps: nn.Module | None,
    held: dict[str, nn.Module | None],
) -> None:
    module.__class__ = kind
    module._parameters.clear()
    module._parameters.update(parameters)
    if maps is None:
        module._modules.pop("parametrizations", None)
    else:
        maps._modules.clear()
        maps._modules.update(held)
        module._modules["parametrizations"] = maps
