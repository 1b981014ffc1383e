"""PEFT's layers with a forward on our operators. State, parameters and names stay PEFT's.

An accelerated layer is the same object: `accelerate` changes its class to one of these, a subclass of the original one,
and `decelerate` changes it back. Every call checks whether the operators can take it, because adapters are switched,
merged and disabled, and hooks come and go; where they cannot, PEFT's forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.glora.layer import GloraEmptyPath, GloraLinear, GloraLoraPath, GloraScalarPath, GloraVectorPath
from peft.tuners.hira.layer import Linear as PeftHiraLinear
from peft.tuners.lora.layer import Conv1d as PeftLoraConv1d
from peft.tuners.lora.layer import Conv2d as PeftLoraConv2d
from peft.tuners.lora.layer import Conv3d as PeftLoraConv3d
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from glora_kernels.integrations import bases
from glora_kernels.integrations.accelerated import dora, parallel
from glora_kernels.integrations.accelerated.experts import Experts
from glora_kernels.integrations.bases import HOOKED, IDLE, ON_META, is_plain, peft_linear, tensor_of
from glora_kernels.nn.adapted import ABSENT, Operands, mixed_linear
from glora_kernels.nn.base import convolution_class
from glora_kernels.nn.convolutions.forms import NO_ROWS, adapted_conv
from glora_kernels.nn.convolutions.geometry import Geometry
from glora_kernels.runtime.planning import is_planning
from glora_kernels.spec import SUPPORTS

VARIANT = "a variant of LoRA"
SEVERAL_WITH_DORA = "several active adapters, of which one is DoRA: it scales what the others give"
FOREIGN = "its adapter is made of other modules than PEFT's own"
INPUT_DROPOUT = "dropout acts on the input of its product with W"
MIXED_BATCH = "a batch of several adapters (adapter_names)"
ARGUMENTS = "it is called with more than x"
GROUPED = "its base is a grouped convolution"
GEOMETRY = "the convolutions of its adapter are not those of its base (PEFT gives them no dilation and no padding_mode)"


class Accelerated(bases.OverBase):
    """The base class of accelerated layers, with their forward."""

    plain: ClassVar[Any]
    _glora_fallbacks: dict[str, int]  # reason → number of calls in which PEFT's forward ran

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._rows is not None and not self._disable_adapters:
            return self.rowed(x, self._rows, *args, *kwargs.values())
        call: Any = self.call(x, args, kwargs)
        if isinstance(call, str):
            if call == bases.TENSOR_PARALLEL and isinstance(call := self.in_parts(x), Tensor):
                return call
            if not torch.compiler.is_compiling():
                self._glora_fallbacks[call] = self._glora_fallbacks.get(call, 0) + 1
            bases.before_its_own_forward(self.get_base_layer(), (x, *(() if call == IDLE else self.parameters())))
            return self.plain.forward(self, x, *args, **kwargs)
        return mixed_linear(x, *call) if len(call) == 4 else self.run(x, *call)

    def run(self, x: Tensor, base: bases.Frozen, operands: Operands) -> Tensor:
        """y on our operators."""
        return peft_linear(x, base, operands)

    def refusal_of_x(self, x: Tensor, base: bases.Frozen, operands: Operands) -> str | None:
        return bases.refusal_of_x(x, base, operands)

    def in_parts(self, x: Tensor | None) -> Tensor | str | None:
        """y over a tensor-parallel base, or the reason why PEFT's forward runs. x None: that reason alone, or None."""
        return bases.TENSOR_PARALLEL

    def mixed(self, x: Tensor, names: Sequence[str]) -> bases.Mixed | str:
        """The arguments of `mixed_linear` for examples with these adapters, or the reason why PEFT's forward runs."""
        return MIXED_BATCH

    def call(self, x: Tensor, args: tuple[Any, ...] = (), kwargs: Any = None) -> tuple[Any, ...] | str:
        """The arguments of `peft_linear` for this x, or with adapter_names of `mixed_linear`.

        Or the reason why PEFT's forward runs instead.

        Raises:
            RuntimeError: weights are on the meta device, without values, and x is not.
        """
        names = None
        if args or kwargs:
            given = {name for name, value in kwargs.items() if value is not None}
            if args or given - {"adapter_names"}:
                return MIXED_BATCH if "adapter_names" in given else ARGUMENTS
            names = kwargs.get("adapter_names")
        found: Any = self.parts(x) if names is None else self.mixed(x, names)
        if isinstance(found, str):
            unwritten = found == ON_META or (found != IDLE and names is None and self._is_unwritten())
            if unwritten and not getattr(x, "is_meta", True):
                # On a CPU F.linear accepts a meta weight silently, and returns uninitialised memory.
                raise RuntimeError(f"a {type(self).__name__} cannot run: {ON_META}, x is on {x.device}")
            return found
        if names is not None:
            return found  # `mixed` has looked at x
        if found[1].dropout_p and bases.IN_A_TRAINED_UNIT in self._glora_kept:
            # With gradients enabled PEFT's path runs, with its own dropout mask. A reentrant checkpoint runs forward
            # first without gradients and then with them, and needs the same mask both times: use PEFT's path for both.
            # The flag is kept, because in between FSDP may have put the parameter back in place of the view.
            return bases.TRAINED_BASE
        return self.refusal_of_x(x, *found) or found

    def _is_unwritten(self) -> bool:
        """Whether an active adapter is on the meta device, other than by accelerate's offloading hooks."""
        if any("_hf_hook" in vars(module) for module in self.modules()):
            return False
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        parts = [container[name] for container in containers for name in self.active_adapters if name in container]
        tensors = [tensor for part in parts for tensor in ([part] if isinstance(part, Tensor) else part.parameters())]
        return any(tensor.is_meta for tensor in tensors)

    def standing_refusal(self) -> str | None:
        """The reason why PEFT's forward runs whatever the call, or None."""
        parts = self.active_parts()
        if parts == bases.TENSOR_PARALLEL:
            reason = self.in_parts(None)
            return reason if isinstance(reason, str) else None
        if isinstance(parts, str):
            return parts
        return bases.RANK if bases.is_above_rank(parts[1], self.base_layer.weight.is_cuda) else None

    def accelerated(self) -> None:
        """Set up the layer after its class was changed to this one."""
        self.__dict__.pop("forward", None)  # that of the former class, which accelerate's hooks leave behind
        self._glora_kept, self._glora_fallbacks = bases.read_base(self.base_layer), {}

    def decelerated(self) -> None:
        """Clean up the layer before its class is changed back."""
        self.__dict__.pop("forward", None)
        del self._glora_kept, self._glora_fallbacks

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_glora_fallbacks": {}}  # a copy was not called yet


class Scales(dict[str, float]):
    """PEFT's `scaling`, with each number also as a tensor.

    torch.compile treats a number in a module as a constant, and would compile again for each new scale.
    """

    def __init__(self, values: dict[str, float], tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        super().__init__()
        self.update(values)

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        if isinstance(value, Tensor):  # PEFT's hot swapping makes it one, and writes to it
            self.tensors[name] = value
        elif name in self.tensors:
            self.tensors[name].fill_(value)
        else:
            self.tensors[name] = _scale_tensor(value, torch.device("cpu"))

    def update(self, *values: Any, **named: float) -> None:
        for name, value in dict(*values, **named).items():
            self[name] = value

    def __ior__(self, values: Any) -> Scales:  # type: ignore[override,misc]
        self.update(values)
        return self

    def __copy__(self) -> dict[str, float]:
        return dict(self)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        del self.tensors[name]

    def __reduce__(self) -> Any:
        return Scales, (dict(self), self.tensors)


def _scale_tensor(scale: float, device: torch.device) -> Tensor:
    """The scale as a 1-d tensor: torch.compile treats a 0-d one as a Python number, and traces everything twice."""
    with torch.inference_mode(False):  # it is overwritten when the scale changes, in any mode
        return torch.tensor([scale], dtype=torch.float64, device=device)


def dropout_of(dropout: nn.Module) -> float | str:
    """The present p of PEFT's dropout module, 0 outside training; or the reason why it cannot be taken."""
    if not is_plain(dropout):
        return HOOKED
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or not 0.0 <= dropout.p < 1.0:
        return FOREIGN
    return dropout.p if dropout.training else 0.0


def _is_linear(module: nn.Module) -> bool:
    """Whether it is PEFT's own kind of factor, an `nn.Linear`, maybe with a map registered on its weight."""
    kind = type(module)
    return kind is nn.Linear or (is_parametrized(module) and kind.__mro__[1] is nn.Linear)


class LoraOperands(Accelerated):
    """LoRA: B=lora; if it has a bias, that is E. DoRA: A=vector as well (`accelerated.dora`)."""

    scaling: dict[str, float]

    def accelerated(self) -> None:
        super().accelerated()
        self._glora_scales: dict[str, Tensor] = {}
        self.scaling = Scales(self.scaling, self._glora_scales)
        self._place_scales()

    def decelerated(self) -> None:
        super().decelerated()
        self.__dict__["scaling"] = dict(self.scaling)
        del self._glora_scales

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scaling" and type(value) is not Scales:  # PEFT's rescale_adapter_scale assigns its own dict
            value = Scales(value, self._glora_scales)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_scales()
        return self

    def _place_scales(self) -> None:
        for name, scale in self._glora_scales.items():
            if isinstance(self.scaling.get(name), Tensor) or name not in self.lora_B:
                continue  # PEFT's own tensor, which hot swapping writes to
            device = self.lora_B[name].weight.device
            if scale.device != device and device.type != "meta":  # FSDP2 loads through meta, and moves nothing after
                self._glora_scales[name] = _scale_tensor(self.scaling[name], device)

    def mixed(self, x: Tensor, names: Sequence[str]) -> bases.Mixed | str:
        if self._disable_adapters or self.merged or len(names) != len(x):  # for PEFT to answer, or to refuse
            return MIXED_BATCH
        return self.mixed_parts(x, names)

    def in_parts(self, x: Tensor | None) -> Tensor | str | None:
        return parallel.refusal(self) if x is None else parallel.linear(self, x)

    def operands(self, name: str) -> Operands | str | None:
        # Not self.lora_A[name]: nn.Module.__getattr__ costs more than all of this method.
        downs, ups, dropouts = (self._modules[part]._modules for part in ("lora_A", "lora_B", "lora_dropout"))
        if name not in downs:
            return None
        is_dora = name in self.lora_variant
        if is_dora and type(self.lora_variant[name]) is not DoraLinearVariant:
            return f"{VARIANT} ({type(self.lora_variant[name]).__name__.removesuffix('Variant')})"
        down, up, dropout = downs[name], ups[name], dropouts[name]
        if reason := self.refusal_of_factors(down, up):
            return reason
        if not (is_plain(down) and is_plain(up)) and not bases.is_tensor_parallel(self.base_layer):
            return HOOKED
        p = dropout_of(dropout)
        if isinstance(p, str):
            return p
        b_down, b_up, bias = tensor_of(down, "weight"), tensor_of(up, "weight"), tensor_of(up, "bias")
        if b_down is None or b_up is None or tensor_of(down, "bias") is not None:
            return FOREIGN
        if (b_up.is_meta or b_down.is_meta) and not is_planning():
            return ON_META
        compiling = torch.compiler.is_compiling()
        scale: float | Tensor = self._glora_scales[name].reshape(()) if compiling else self.scaling[name]
        e = None if bias is None else bias * scale
        if is_dora:
            return self._dora(name, b_up, b_down, scale, p)
        if isinstance(scale, Tensor):
            b_up, scale = b_up * scale, 1.0
        return Operands({**ABSENT, "B_up": b_up, "B_down": b_down, "E": e}, scale, p)

    def refusal_of_factors(self, down: nn.Module, up: nn.Module) -> str | None:
        """The reason why modules are no factors of this kind of layer, or None."""
        return None if _is_linear(down) and _is_linear(up) else FOREIGN

    def _dora(self, name: str, up: Tensor, down: Tensor, scale: float | Tensor, p: float) -> Operands | str:
        """A DoRA adapter: its magnitude as a vector A, and in U."""
        if p:
            return INPUT_DROPOUT
        layer = self.lora_magnitude_vector[name]
        if not is_plain(layer):
            return HOOKED
        base = self.frozen()
        if isinstance(base, str):
            return base
        if layer.weight.is_meta and not is_planning():
            return ON_META
        if any(type(tensor) not in bases.PLAIN for tensor in (up, down, layer.weight)):
            return bases.SHARDED_ADAPTER
        a, up = dora.scaled(base, up, down, scale, layer.weight, self._glora_kept)
        if isinstance(scale, Tensor):
            up, scale = up * scale, 1.0
        return Operands({**ABSENT, "A": a, "B_up": up, "B_down": down}, scale)

    def active_parts(self, x: Tensor | None = None) -> tuple[bases.Frozen, Operands] | str:
        if len(names := self.active_adapters) > 1 and not self.lora_variant.keys().isdisjoint(names):
            found = [type(self.lora_variant.get(name)) for name in names if name in self.lora_A]
            if len(found) > 1 and DoraLinearVariant in found:
                return SEVERAL_WITH_DORA
        return super().active_parts(x)


class HiraOperands(Accelerated):
    """HiRA, W + W∘(up·down): A=lora alone."""

    def call(self, x: Tensor, args: tuple[Any, ...] = (), kwargs: Any = None) -> tuple[Any, ...] | str:
        """As in `Accelerated`, but PEFT's forward runs where the adapter is wider: it multiplies in that dtype."""
        found = super().call(x, args, kwargs)
        return bases.NARROW if not isinstance(found, str) and bases.is_wider(x, *found) else found

    def operands(self, name: str) -> Operands | str | None:
        if name not in self.hira_A:
            return None
        p = dropout_of(self.hira_dropout[name])
        if p != 0.0:
            return p if isinstance(p, str) else INPUT_DROPOUT
        up, down = self.hira_B[name], self.hira_A[name]
        if (up.is_meta or down.is_meta) and not is_planning():
            return ON_META
        return Operands({**ABSENT, "A_up": up, "A_down": down})


class LoraConvOperands(LoraOperands):
    """LoRA over a convolution: B=lora, a convolution like the base and one of 1 x 1; see `nn.convolutions`."""

    def run(self, x: Tensor, base: bases.Frozen, operands: Operands) -> Tensor:
        return adapted_conv(x, base, operands, Geometry.of(self.base_layer))

    def refusal_of_x(self, x: Tensor, base: bases.Frozen, operands: Operands) -> str | None:
        sizes = self._kernel_dim - 2
        if x.ndim > sizes + 2:
            return bases.MISFIT
        return bases.refusal_of_x(x, base, operands, channels=-1 - sizes)

    def refusal_of_factors(self, down: nn.Module, up: nn.Module) -> str | None:
        base: Any = self.base_layer
        if any(type(module) is not type(base) for module in (down, up)):  # PEFT makes them of its class
            return FOREIGN
        if base.groups != 1:
            return GROUPED
        own = Geometry.of(base)
        return None if (Geometry.of(down), Geometry.of(up)) == (own, own.of_channels) else GEOMETRY

    def operands(self, name: str) -> Operands | str | None:
        if convolution_class(self.base_layer) is None:
            return bases.NESTED if hasattr(self.base_layer, "base_layer") else FOREIGN
        found = super().operands(name)
        if not isinstance(found, Operands):
            return found
        factors = {name: found.tensors[name] for name in ("B_up", "B_down")}
        flat = {name: None if tensor is None else tensor.flatten(1) for name, tensor in factors.items()}
        return found._replace(tensors={**found.tensors, **flat})

    def mixed(self, x: Tensor, names: Sequence[str]) -> bases.Mixed | str:
        return MIXED_BATCH

    def refusal_of_rows(self) -> str:
        return NO_ROWS

    def warmup_form(self) -> None:
        return None


class LoraConv1d(LoraConvOperands, PeftLoraConv1d):
    """`peft.tuners.lora.Conv1d`."""

    plain = PeftLoraConv1d


class LoraConv2d(LoraConvOperands, PeftLoraConv2d):
    """`peft.tuners.lora.Conv2d`."""

    plain = PeftLoraConv2d


class LoraConv3d(LoraConvOperands, PeftLoraConv3d):
    """`peft.tuners.lora.Conv3d`."""

    plain = PeftLoraConv3d


class LoraLinear(LoraOperands, PeftLoraLinear):
    """`peft.tuners.lora.Linear` over `nn.Linear` or `Conv1D`."""

    plain = PeftLoraLinear


class HiraLinear(HiraOperands, PeftHiraLinear):
    """`peft.tuners.hira.Linear` over `nn.Linear` or `Conv1D`."""

    plain = PeftHiraLinear


class Glora(Accelerated, GloraLinear):
    """`peft.tuners.glora.GloraLinear`, in every form of its five paths."""

    plain = GloraLinear

    def operands(self, name: str) -> Operands | str | None:
        if name not in self.glora_A:
            return None
        tensors = dict(ABSENT)
        for letter in SUPPORTS:
            path = getattr(self, f"glora_{letter}")[name]
            if not is_plain(path):
                return HOOKED
            kind = type(path)
            if kind is GloraLoraPath:
                tensors[f"{letter}_up"], tensors[f"{letter}_down"] = path.Xd, path.Xu
            elif kind is GloraVectorPath:
                tensors[letter] = path.X.view(-1)  # (N, 1) or (K, 1) as stored
            elif kind is GloraScalarPath:
                tensors[letter] = path.X
            elif kind is not GloraEmptyPath:
                return FOREIGN
        if any(tensor is not None and tensor.is_meta for tensor in tensors.values()) and not is_planning():
            return ON_META
        return Operands(tensors)


_KINDS: list[Any] = [LoraLinear, LoraConv1d, LoraConv2d, LoraConv3d, HiraLinear, Glora, Experts]

if is_bnb_4bit_available():
    from peft.tuners.hira.bnb import Linear4bit as PeftHiraLinear4bit
    from peft.tuners.lora.bnb import Linear4bit as PeftLoraLinear4bit

    class LoraLinear4bit(LoraOperands, PeftLoraLinear4bit):
        """`peft.tuners.lora.bnb.Linear4bit`."""

        plain = PeftLoraLinear4bit

    class HiraLinear4bit(HiraOperands, PeftHiraLinear4bit):
        """`peft.tuners.hira.bnb.Linear4bit`."""

        plain = PeftHiraLinear4bit

    _KINDS += [LoraLinear4bit, HiraLinear4bit]

for _kind in _KINDS:  # printing, and looking classes up by name, work as before
    _kind.__qualname__, _kind.__name__ = _kind.__name__, _kind.plain.__name__

KINDS: dict[type, Any] = {kind.plain: kind for kind in _KINDS}
"""PEFT's class → the accelerated class."""
