"""The GLoRA layer: a frozen linear layer and its adapter, in place of `nn.Linear` or a transformers `Conv1D`.

    y = x (W + W∘A + s·B)ᵀ + [ b + b∘D + E + W·C ]

The layer owns parameters and state (merged, disabled); the mathematics is in `ops`. The base keeps the names
`weight` and `bias`, so base checkpoints load; the adapter's parameters are A, A_up, A_down, ... E.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from glora_kernels.depth.deferred import DeferredLinear
from glora_kernels.dispatch.common import Weight
from glora_kernels.modes import ordinary
from glora_kernels.nn.adapted import (
    ADAPTER_NAMES,
    Frozen,
    Operands,
    adapted_linear,
    base_linear,
    initialize,
    with_scale_A,
)  # fmt: skip
from glora_kernels.nn.base import FROZEN, Base, base_of, check_config, is_linear, shell, unsupported
from glora_kernels.nn.frozen import check_dtype, describe
from glora_kernels.nn.merging.layer import MERGED, NAMES, Mergeable
from glora_kernels.nn.mixed import TakesRows, refuse_inside
from glora_kernels.nn.named import FIRST, NONE, NamedAdapter
from glora_kernels.ops import glora_linear
from glora_kernels.parallel.found import is_cut
from glora_kernels.quant import QuantizedWeight
from glora_kernels.spec import SUPPORTS, GLoRAConfig


class FullBias(Protocol):
    """β of a layer, computed before its forward (`nn.depth.shift_once`)."""

    def current(self, layer: GLoRALinear) -> Tensor | None: ...


class Parallel(Protocol):
    """The part of `parallel.call.Cut`, how a layer is cut over ranks, that a layer uses."""

    def linear(
        self, x: Tensor, base: tuple[Weight, Tensor | None, torch.dtype | None], config: GLoRAConfig | None,
        tensors: Mapping[str, Tensor | None], training: bool,
    ) -> Tensor: ...  # fmt: skip


class Siblings(Protocol):
    """The part of `nn.siblings.SiblingGroup`, layers that read one input, that a layer uses."""

    names: tuple[str, ...]
    members: list[GLoRALinear | None]
    fused: bool

    @property
    def tied(self) -> bool: ...
    def output(self, layer: GLoRALinear, x: Tensor) -> Tensor | None: ...
    def seed(self, layer: GLoRALinear, x: Tensor) -> Tensor: ...
    def tied_to(self, place: int) -> list[int]: ...
    def join(self, layer: GLoRALinear) -> None: ...
    def dissolve(self) -> None: ...


class Holders:
    """The layers with one shared factor: where PyTorch replaces the parameter in one of them, all get the new one.

    References to the layers are weak. A copy of a model, or of a part, gets a `Holders` of its own for its layers.
    """

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[GLoRALinear] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def join(self, layer: GLoRALinear) -> None:
        """Add a layer that has the factor."""
        self._layers.add(layer)

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Put the new parameter into every layer that has the old one."""
        for layer in self._layers:
            for name in layer._holders:
                if layer._parameters.get(name) is old:
                    layer._parameters[name] = new


def _frozen(parameter: Tensor) -> nn.Parameter:
    """Freeze the parameter and return it.

    One made in inference mode cannot be saved for backward: for that, return a new Parameter on the same memory.
    """
    if parameter.is_inference():
        return nn.Parameter(ordinary(parameter.detach()), requires_grad=False)
    return parameter.requires_grad_(False)  # type: ignore[return-value]


class GLoRALinear(TakesRows, Mergeable):
    """y = x (W + W∘A + s·B)ᵀ + b + b∘D + E + W·C with W and b frozen; a new layer equals its base.

    The adapter's parameters are A, A_up, ... of the layer itself; it is called "default". Further ones (`add_adapter`)
    stand in `adapters`, an `nn.ModuleDict` of `NamedAdapter`, whichever of all is in use.

    Shapes: x (..., K), y (..., N), bias (N,). weight is (N, K); (K, N) if the base was a `Conv1D`; the packed codes
    (P, 1) of a 4-bit base. The adapter's parameters are those of `GLoRAConfig.parameter_shapes`; without a bias there
    is no D.

    Args:
        in_features: K.
        out_features: N.
        config: which supports exist, rank, scale, dropout.
        bias: whether the base has a bias b.
        device: of all parameters.
        dtype: of the base: float32, bfloat16, float16 or float64.
        adapter_dtype: of the adapter; None means the base's. fp32 adapters over a 16-bit base are served.

    Raises:
        TypeError: `config` is not a GLoRAConfig.
        ValueError: a size below 1 or a dtype that is not supported.

    Examples:
        >>> layer = gk.GLoRALinear.from_linear(nn.Linear(16, 32), gk.GLoRAConfig("vector", "lora", rank=4))
        >>> layer(torch.randn(2, 16)).shape
        torch.Size([2, 32])
    """

    config: GLoRAConfig
    D: nn.Parameter | None
    adapters: nn.ModuleDict
    _cut: Parallel | None  # how it is cut over ranks; None where it is not

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: GLoRAConfig,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        b = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._register(Base(weight, b, (out_features, in_features), weight.dtype), config, adapter_dtype)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: GLoRAConfig, *, adapter_dtype: torch.dtype | None = None
    ) -> GLoRALinear:
        """A layer on the parameters of `linear`: the same objects, no copy; this freezes them.

        Args:
            linear: an `nn.Linear`; a `Conv1D` of transformers, whose weight stays as stored, (K, N); or a 4-bit layer:
                a `QuantizedLinear` (`quantize`) or a bitsandbytes `Linear4bit`, whose codes stay where they are.
            config: which supports exist, rank, scale, dropout.
            adapter_dtype: of the adapter; None means the weight's, for a 4-bit base the dtype it computes in.

        Raises:
            TypeError: `linear` is no linear layer, or `config` is not a GLoRAConfig.
            ValueError: a linear layer that cannot be replaced (hooks, its own forward, a `Linear4bit` that is not
                quantized yet, ...); the message says why.
        """
        if not is_linear(linear):
            raise TypeError(
                "from_linear takes an nn.Linear, a Linear4bit, a QuantizedLinear or a transformers Conv1D; "
                f"got {type(linear).__name__}"
            )
        if reason := unsupported(linear):
            raise ValueError(f"from_linear cannot take this {type(linear).__name__}: {reason}")
        if is_cut(linear):
            raise ValueError("from_linear cannot take this Linear: it is cut over ranks; inject(model, ...) takes it")
        return cls.in_place_of(linear, config, adapter_dtype)

    @classmethod
    def in_place_of(cls, linear: nn.Module, config: GLoRAConfig, adapter_dtype: torch.dtype | None) -> GLoRALinear:
        """`from_linear` without its checks. Of a layer that is cut over ranks, only the base is (`parallel.attach`)."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        thawed = tuple(name for name, parameter in linear.named_parameters() if parameter.requires_grad)
        layer._register(base_of(linear), config, adapter_dtype)
        vars(layer).update({"_origin": shell(linear), FROZEN: thawed})
        layer.reset_adapter()
        return layer.train(linear.training)

    @torch.inference_mode(False)  # the layer may be trained later
    def _register(
        self, base: Base, config: GLoRAConfig, adapter_dtype: torch.dtype | None, common: Collection[str] = ()
    ) -> None:
        check_config(config)
        weight, bias = base.weight, base.bias
        check_dtype("dtype", base.dtype)
        check_dtype("adapter_dtype", adapter_dtype)
        (self.out_features, self.in_features), self.kernel = base.shape, base.kernel
        self.config = config
        shapes = config.parameter_shapes(*base.shape[::-1], bias is not None, self.experts, common, base.kernel)
        made = {
            name: nn.Parameter(torch.empty(shape, device=weight.device, dtype=adapter_dtype or base.dtype))
            for name, shape in shapes.items()
        }
        self.quant_state, self.compute_dtype = None, base.compute_dtype
        if base.quant_state is not None:
            self.hold(QuantizedWeight(weight, base.quant_state))
        else:
            self.weight = _frozen(weight)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        for name in ADAPTER_NAMES:
            self.register_parameter(name, made.get(name))
        self._transposed = base.transposed
        vars(self)["_origin"] = None  # the module it was made from, without tensors; not registered as a submodule
        self._base = None  # while merged: W and b, in host memory
        self._disabled = ()  # the `disabled` contexts that the layer is in
        self._beta: FullBias | None = None  # inside `shift_once`
        self._deferred: DeferredLinear | None = None  # inside `deferred_shared_grads`: called instead of glora_linear
        self._holders: dict[str, Holders] = {}  # by name of a shared factor: all layers that have it
        self._siblings: Siblings | None = None  # layers that read one input, this one among them ...
        self._place = 0  # ... and which of them it is
        self.has_first = True  # False: the layer was made for adapters beside the first, which does not adapt it
        self._active: str | None = None  # the name of the adapter that calls use; None: the layer's own parameters
        self._mixed: dict[str, Any] = {}
        # Kept here, since computing them in each forward costs host time.
        _, self._scale, self._dropout, self._variant = Operands.of(config, {}, training=True)
        self._scale_A = config.scale_A

    def _apply(self, fn: Any, recurse: bool = True) -> GLoRALinear:
        """PyTorch's `_apply`, after which factors stay shared where it had to make a new parameter (from meta, say)."""
        with self._staying_shared():
            super()._apply(fn, recurse)
        return self

    @contextlib.contextmanager
    def _staying_shared(self) -> Iterator[None]:
        """Where a shared factor of this layer is replaced inside, replace it in all layers that share it."""
        before = {name: self._parameters.get(name) for name in self._holders}
        yield
        for name, old in before.items():
            new = self._parameters.get(name)
            if old is not None and new is not None and new is not old:
                self._holders[name].replace(old, new)

    def reset_parameters(self) -> None:
        """Initialise the base as `nn.Linear` does, and the adapter. Overwrites a pretrained base.

        Raises:
            RuntimeError: the base is in 4 bits, and cannot be initialised.
        """
        if self.quant_state is not None:
            raise RuntimeError("reset_parameters: the base is in 4 bits; reset_adapter() leaves it as it is")
        nn.init.kaiming_uniform_(self.weight.t() if self._transposed else self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self.in_features * math.prod(self.kernel))
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Make the layer equal to its base: `_down` factors random (`config.init`), everything else zero."""
        self.check_intact("reset_adapter", ADAPTER_NAMES)
        initialize(self.adapter(), self.config.init)

    def shapes_of(self, config: GLoRAConfig, common: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
        """The shapes of an adapter on this layer; `common`: of what the experts of a layer of experts share."""
        sizes = self.in_features, self.out_features, self.base_bias is not None
        return config.parameter_shapes(*sizes, self.experts, common, self.kernel)

    def named(self) -> Mapping[str, NamedAdapter]:
        """The adapters beside the first, by name."""
        held: Any = self._modules.get("adapters")
        return {} if held is None else held._modules

    def add_named(self, name: str, adapter: NamedAdapter) -> None:
        """Hold an adapter beside the first."""
        if "adapters" not in self._modules:
            self.adapters = nn.ModuleDict()
        self.adapters[name] = adapter

    def drop_named(self, name: str) -> None:
        """Hold no adapter of this name beside the first."""
        self._mixed.clear()
        if name in self.named():
            del self.adapters[name]
        if not self.named():
            self._modules.pop("adapters", None)

    def adapter_names(self) -> dict[str, int]:
        return ({FIRST: 0} if self.has_first else {}) | {name: own.place for name, own in self.named().items()}

    def saved_adapter(self, name: str) -> tuple[Mapping[str, Tensor], GLoRAConfig]:
        """The tensors, as they are saved, and the configuration of an adapter that the layer has."""
        if name == FIRST:
            return self.adapter(), self.config
        own = self.named()[name]
        return own.values(), own.config

    def active_adapter(self) -> tuple[Mapping[str, Tensor], GLoRAConfig]:
        if self._active is None:
            return self.adapter(), self.config
        own = self.named().get(self._active)
        return ({}, NONE) if own is None else (own.tensors(), own.config)

    def all_adapters(self) -> Iterator[nn.Parameter]:
        """The parameters of all adapters."""
        yield from self.adapter().values()
        for own in self.named().values():
            yield from own.parameters()

    def operands(self, name: str) -> Operands | None:
        if name == FIRST:
            return Operands.of(self.config, self.adapter(), self.training)
        return own.operands() if (own := self.named().get(name)) is not None else None

    @property
    def kept(self) -> dict[str, Any]:
        return self._mixed

    def refusal_of_rows(self) -> str | None:
        if self.merged:
            return "it is merged; call unmerge(model) first"
        if self.training and self._dropout and self._siblings is not None and self._siblings.tied:
            return "it has one dropout mask with its siblings (tie_siblings=True), which rows of a batch cannot have"
        return None

    def check_mergeable(self) -> None:
        super().check_mergeable()
        refuse_inside([self], "merge")

    def kept_shift(self) -> Tensor | None:
        """β as `shift_once` computed it; None outside of that context, or where something β depends on has changed."""
        kept = self._beta
        return None if kept is None or torch.compiler.is_compiling() else kept.current(self)

    def forward(self, x: Tensor) -> Tensor:
        """The output y (..., N) of x (..., K).

        Raises:
            RuntimeError: the layer is merged, in training mode, and gradients are enabled; or it is grouped with
                siblings (`fuse_siblings`), and one of them was called with another tensor. Other errors are those of
                `ops.glora_linear`.
        """
        if self._cut is not None:
            return self._parallel(self._cut, x)
        siblings, is_alone = self._siblings, self._rows is None and self._active is None
        if siblings is not None and is_alone and (y := siblings.output(self, x)) is not None:
            return y
        # Looked up in the dictionary: attribute access on a module costs ten times as much.
        tensors: dict[str, Any] = self._parameters
        if not self.is_intact:  # pruned, normalised, parametrized; data parallel replicas
            is_adapted = is_alone and not self._disabled and self._base is None
            tensors = {name: getattr(self, name) for name in (NAMES if is_adapted else NAMES[:2])}
        if (state := self.quant_state) is not None:
            weight: Weight = QuantizedWeight(self.weight, state)
        else:
            weight = tensors["weight"].t() if self._transposed else tensors["weight"]
        base = weight, tensors["bias"], self.compute_dtype  # a plain tuple, cheaper than a `Frozen`
        if self._disabled or self._base is not None:
            self.refuse_merged_training()
            return base_linear(x, base)
        if not is_alone:
            return self._chosen(x, Frozen(*base))
        dropout_p, seed = self._dropout if self.training else 0.0, None
        if dropout_p and siblings is not None:
            seed = siblings.seed(self, x)
        if self._scale_A != 1.0:
            tensors = {**with_scale_A(tensors, self._scale_A)}
        adapter = tensors, self._scale, dropout_p, self._variant
        return adapted_linear(x, base, adapter, seed, self._deferred or glora_linear, self.kept_shift())

    def refuse_merged_training(self) -> None:
        """Raise a RuntimeError where a layer is called that is merged, in training mode, with gradients enabled."""
        if self.merged and not self._disabled and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "this layer is merged: its adapter takes no part in forward and would not be trained. To "
                "train, call unmerge(); to run the merged weights, call eval() or use torch.no_grad()"
            )

    def _parallel(self, cut: Parallel, x: Tensor) -> Tensor:
        """y by this rank's parts of the parameters."""
        if self._rows is not None or self._active is not None:
            raise RuntimeError("a layer that is cut over ranks has one adapter: rows and set_adapter cannot be used")
        own: dict[str, Any] = self._parameters
        base = self.base_weight(), own["bias"], self.compute_dtype
        if self._disabled:
            return cut.linear(x, base, None, {}, False)
        return cut.linear(x, base, self.config, {name: own[name] for name in ADAPTER_NAMES}, self.training)

    def _chosen(self, x: Tensor, base: Frozen) -> Tensor:
        """y by the adapters of `gk.rows`, or by an active one beside the first."""
        if (rows := self._rows) is not None:
            return rows.linear(self, x, base)
        own = self.named().get(self._active or FIRST)
        return base_linear(x, base) if own is None else adapted_linear(x, base, own.operands())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """PyTorch's; while merged, that of a plain layer with the merged weights."""
        state = super().state_dict(*args, **kwargs)
        if self.merged:
            prefix = kwargs.get("prefix", "")
            for key in [key for key in state if key.startswith(f"{prefix}adapters.")]:
                del state[key]
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """While merged, save the state of a plain layer with the merged weights, and mark it in the metadata."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        for name in ADAPTER_NAMES:
            destination.pop(prefix + name, None)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[MERGED] = True

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *found: Any) -> None:
        given = {name for name in NAMES if prefix + name in state_dict}
        *_, errors = found
        where = prefix.removesuffix(".") or "the layer"
        # In a merged layer a loaded base would be lost at unmerge, and a loaded adapter would have no effect.
        if self.merged and (given or any(key.startswith(f"{prefix}adapters.") for key in state_dict)):
            errors.append(f"{where} is merged; call unmerge() before loading")
            return
        if given and metadata.get(MERGED):
            errors.append(
                f"{where}: the state is that of a merged layer, whose adapter would be applied twice; load it into the "
                "model without GLoRA layers (before inject), or save the state after unmerge()"
            )
            return
        if "weight" in given and given.isdisjoint(ADAPTER_NAMES) and self._changes_something():
            warnings.warn(
                "a state without an adapter was loaded into GLoRA layers whose own adapter is not zero. If it is the "
                "state of a merged model, an adapter is applied twice now; load that into a model without GLoRA layers",
                stacklevel=2,
            )
        with self._staying_shared():  # assign=True
            super()._load_from_state_dict(state_dict, prefix, metadata, *found)

    def _changes_something(self) -> bool:
        """Whether an unshared parameter that was initialised to zero is not zero any more."""
        # Shared ones do not count: the state may hold them under another layer's name alone.
        own = ((name, p) for name, p in self.adapter().items() if name not in self._holders)
        return any(bool(p.any()) for name, p in own if not name.endswith("_down") and not p.is_meta)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a copy made inside a context (`disabled(model)`, say) is outside of it."""
        state = self.__dict__ | {"_disabled": (), "_beta": None, "_deferred": None, "_mixed": {}}
        state.pop("_rows", None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> GLoRALinear:
        """As without this method: a parametrized class has one of PyTorch's, which passes `__getstate__` by."""
        kind = type(self)
        replica = kind.__new__(kind)
        memo[id(self)] = replica
        own: Any = kind.__mro__[is_parametrized(self)]
        replica.__setstate__(copy.deepcopy(own.__getstate__(self), memo))
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for holders in self._holders.values():
            holders.join(self)
        if self._siblings is not None:
            self._siblings.join(self)

    def extra_repr(self) -> str:
        config = self.config
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.base_bias is not None}"]
        parts += [] if self.quant_state is None else [describe(self.quant_state)]
        forms = {name: getattr(config, name) for name in SUPPORTS if name != "D" or self.D is not None}
        parts += [f"{name}={form}" for name, form in forms.items() if form != "none"]
        details = {
            f"rank={config.rank}": "lora" in (config.A, config.B, config.C),
            f"scale={config.scale:g}": config.B == "lora",
            f"scale_A={config.scale_A:g}": config.alpha_A is not None,
            f"dropout={config.dropout:g}": self._dropout,
            f"variant={config.variant}": config.variant != "hadamard",
            f"siblings={len(self._siblings.names) if self._siblings else 0}": self._siblings and self._siblings.fused,
            "merged": self.merged,
            "disabled": self._disabled,
            f"active={self._active!r}": self._active is not None,
        }
        return ", ".join(parts + [text for text, applies in details.items() if applies])
