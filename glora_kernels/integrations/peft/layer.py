"""The layers that PEFT puts around a frozen linear layer for the two methods.

y = x (W + Σᵢ (W∘Aᵢ + sᵢ·Bᵢ))ᵀ + b + Σᵢ (b∘Dᵢ + Eᵢ + W·Cᵢ)        over the active adapters i
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from glora_kernels.integrations.bases import (
    LAYOUT,
    NESTED,
    ON_META,
    RANK,
    SHARDED_ADAPTER,
    TRAINED_BASE,
    TRANSFORMED,
    OverBase,
    before_its_own_forward,
    frozen_base,
    peft_linear,
    read_base,
    refusal_of_x,
    total,
)
from glora_kernels.nn.adapted import Frozen, Operands, mixed_linear
from glora_kernels.nn.base import base_of, is_linear, unsupported
from glora_kernels.nn.merging.values import (
    Kept,
    ToMerge,
    check_finite,
    check_writable,
    is_tied,
    keep,
    merged,
    without_adapters,
    write,
)
from glora_kernels.nn.named import NamedAdapter
from glora_kernels.nn.undo import all_or_none, finish
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.spec import GLoRAConfig

BASE = "__base__"
"""The adapter name for rows without an adapter, in a batch of several adapters."""

_MERGED: weakref.WeakSet[AdaptedLinear] = weakref.WeakSet()  # the layers that have or had merged values


def unfit(module: nn.Module) -> str | None:
    """The reason why a module cannot be adapted, or None."""
    if isinstance(module, AdaptedLinear):
        return None
    if isinstance(module, BaseTunerLayer):
        return NESTED
    if not is_linear(module):
        return f"it is a {type(module).__name__}, not an nn.Linear, Conv1D, Linear4bit or QuantizedLinear"
    found = frozen_base(module, {})
    if isinstance(found, str) and found not in (ON_META, TRAINED_BASE):  # PEFT freezes the base later
        return found
    return unsupported(module)


class AdaptedLinear(OverBase, nn.Module, BaseTunerLayer):
    """A frozen linear layer and its adapters by name, on the operators of this package.

    Its base is an `nn.Linear`, a transformers `Conv1D`, a bitsandbytes `Linear4bit` or a `QuantizedLinear`, with or
    without a bias. Shapes: x (..., K), y (..., N). Adapters have the dtype of the base, or the compute dtype of a 4-bit
    base, until PEFT casts them.

    Args:
        base_layer: the layer to adapt; PEFT freezes it.

    Raises:
        ValueError: a base that the operators do not take; the message says why.
    """

    base_layer: Any
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if reason := unfit(base_layer):
            raise ValueError(f"{type(self).__name__}: this layer cannot be adapted: {reason}")
        base = base_of(base_layer)
        self.base_layer = base_layer
        self.out_features, self.in_features = base.shape
        self._modules[self.adapter_layer_names[0]] = nn.ModuleDict()
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._original: Kept | None = None  # while merged: the base, in host memory
        self._glora_kept = read_base(base_layer)
        self.train(base_layer.training)

    @property
    def adapters(self) -> Any:
        """The adapters of this layer by name: an `nn.ModuleDict` of `NamedAdapter`."""
        return self._modules[self.adapter_layer_names[0]]

    def update_layer(
        self,
        name: str,
        config: GLoRAConfig,
        owners: Mapping[str, NamedAdapter] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Add an adapter that changes nothing yet; it replaces one of the same name.

        Args:
            owners: for each parameter that belongs to another layer's adapter, that adapter.
            dtypes: of parameters whose dtype is not that of the base.
        """
        base = base_of(self.base_layer)
        # A merged base may have a bias that was added by merging.
        bias = base.bias if self._original is None else self._original.bias
        shapes = config.parameter_shapes(self.in_features, self.out_features, bias is not None)
        adapter = NamedAdapter(config, shapes, base.weight.device, base.dtype, dtypes, owners)
        self.adapters[name] = adapter.train(self.training)

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """The output y (..., N) of x (..., K).

        Args:
            x: the input.
            adapter_names: for a batch of several adapters, the adapter of each row of x; "__base__" means none.

        Raises:
            RuntimeError: the base cannot be used as it is now (offloaded, trained, wrapped), or the adapter has no
                values yet.
            TypeError: x is not floating point, in another dtype than the base, or no plain tensor.
            ValueError: adapter_names that do not fit x, or while merged.
        """
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self._base(x)
        if self._rows is not None:
            return self.rowed(x, self._rows, adapter_names)
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        if self.merged_adapters:
            return self._base(x)
        return self._adapted(x, self.active_adapters)

    def _base(self, x: Tensor) -> Tensor:
        """y of the base alone."""
        # Not by the forward of bitsandbytes, which is not always as exact, and casts the bias.
        if is_linear4bit(self.base_layer) and isinstance(frozen := self.frozen(x), Frozen):
            return _called(x, frozen, Operands())
        before_its_own_forward(self.base_layer, (x,))
        return self.base_layer(x)

    def operands(self, name: str) -> Operands | None:
        return self.adapters[name].operands() if name in self.adapters else None

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        adapters = [self.adapters[name].operands() for name in names if name in self.adapters]
        if not adapters:
            return self._base(x)
        frozen = self.frozen(x)
        if isinstance(frozen, str):
            raise RuntimeError(f"this layer cannot be computed: {frozen}")
        together = total(adapters)
        if not isinstance(together, str) and (len(adapters) == 1 or refusal_of_x(x, frozen, together) != RANK):
            return _called(x, frozen, together)
        # Where one call cannot take all adapters, add up their changes.
        y = base = _called(x, frozen, Operands())
        for one in adapters:
            y = y + (_called(x, frozen, one) - base)
        return y

    def _mixed(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """Compute each example with its own adapter: in one call, or where the operators refuse one call an adapter."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        found = self.mixed_parts(x, adapter_names)
        if not isinstance(found, str):
            return mixed_linear(x, *found)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name if name in self.adapters else BASE, []).append(row)
        y = torch.cat([self._adapted(x[picked], [name]) for name, picked in rows.items()])
        order = [row for picked in rows.values() for row in picked]
        return y[sorted(range(len(order)), key=order.__getitem__)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W_eff and the full bias into the base, in place, rounded once; the host keeps the base.

        With adapters merged already, all are merged together, starting from the unmerged base. A base without a bias
        gets one if an adapter needs it. With a 4-bit base W_eff is rounded to 4 bits again, and a warning reports how
        much of the adapter survives. A weight that other layers have too (tied weights) gets the sum of the changes of
        all of them, and all see it, as with PEFT's own methods.

        Args:
            safe_merge: raise an error, and leave the base unchanged, where the merged values hold NaN or inf.
            adapter_names: the adapters to merge; None means the active ones.

        Raises:
            RuntimeError: an adapter has no values yet.
            ValueError: merged values that cannot be stored, that hold NaN or inf where the base does not (an overflow
                of fp16, say), or with `safe_merge` anywhere.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        check_writable(self.base_layer)
        now, others = keep(self.base_layer), self._tied()
        original = self._original or without_adapters(self.base_layer, now, others)
        own = self._merging(original, names)
        values, report = merged(own, others)
        if safe_merge and not values.is_finite:
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        check_finite(own, values)
        with all_or_none() as undo:
            undo.callback(self._hold, now, self._original, self.merged_adapters)
            self._hold(values, original, names)
        if report is not None:
            warnings.warn(f"merged weights were rounded to 4 bits:\n{report}", stacklevel=2)

    def unmerge(self) -> None:
        """Restore the base bit for bit; warn if nothing is merged.

        A tied weight keeps the changes that other layers have merged into it until these are unmerged too.
        """
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        values, others = self._original, self._tied()
        if others:
            values, _ = merged(self._merging(values, []), others)
        finish(partial(self._hold, values))

    def _hold(self, values: Kept, original: Kept | None = None, names: Sequence[str] = ()) -> None:
        """Write the values into the base. original, names: the unmerged values and the merged adapters, if any."""
        write(self.base_layer, values)
        self._original, self.merged_adapters = original, list(names)
        _MERGED.add(self)

    def _merging(self, original: Kept, names: Sequence[str]) -> ToMerge:
        adapters = [self.adapters[name] for name in names if name in self.adapters]
        return ToMerge(self.base_layer, original, [(adapter.tensors(), adapter.config) for adapter in adapters])

    def _tied(self) -> list[ToMerge]:
        """The other layers that have merged into the memory of this one's base."""
        return [
            other._merging(other._original, other.merged_adapters)
            for other in _MERGED
            if other is not self and other._original is not None and is_tied(self.base_layer, other.base_layer)
        ]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor on an adapter's change, 1 as it was trained; nothing happens if the layer does not have it.

        Raises:
            TypeError, ValueError: `scale` is no finite number.
        """
        _check_scale(scale)
        if adapter in self.adapters:
            self.adapters[adapter].scaling = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors on the active adapters' changes by `scale`; the errors of `set_scale`."""
        _check_scale(scale)
        for adapter in self._active():
            adapter.scaling *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors on the active adapters' changes by `scale`; None: set them to 1.

        Raises:
            TypeError, ValueError: `scale` is no finite number, or 0.
        """
        if scale is not None:
            _check_scale(scale)
            if scale == 0:
                raise ValueError("scale must not be 0: nothing can be divided by it; set_scale sets another")
        for adapter in self._active():
            adapter.scaling = 1.0 if scale is None else adapter.scaling / scale

    def _active(self) -> list[NamedAdapter]:
        return [self.adapters[name] for name in self.active_adapters if name in self.adapters]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own method also casts to the dtype of the base, which would round fp32 adapters as they are loaded.
        if adapter_name in self.adapters:
            adapter = self.adapters[adapter_name]
            if not any(parameter.is_meta for parameter in adapter.parameters()):
                adapter.to(device if device is not None else self.base_layer.weight.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._original is not None:
            _MERGED.add(self)


class GLoRAPeftLinear(AdaptedLinear):
    """A layer of "GKGLORA". For "all-linear" PEFT looks for "Linear" in the name of the class."""

    adapter_layer_names = ("gkglora_adapter",)

    def __repr__(self) -> str:
        return "gkglora." + super().__repr__()


class ShareLoRAPeftLinear(AdaptedLinear):
    """A layer of "GKSHARELORA"."""

    adapter_layer_names = ("gksharelora_adapter",)

    def __repr__(self) -> str:
        return "gksharelora." + super().__repr__()


def _check_scale(scale: object) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}")


def _called(x: Tensor, frozen: Frozen, operands: Operands) -> Tensor:
    reason = refusal_of_x(x, frozen, operands)
    if reason is not None and reason not in (TRANSFORMED, LAYOUT):  # these the operators handle
        if reason == SHARDED_ADAPTER:
            raise RuntimeError(
                f"{reason}: a DTensor, as a factor is that several groups of FSDP2 share; use DDP, or "
                "glora_kernels.inject with glora_kernels.fully_shard"
            )
        given = f"{x.dtype} on a base in {frozen.weight.dtype}"
        raise TypeError(f"this layer cannot be called with this x ({given}): {reason}")
    return peft_linear(x, frozen, operands)
