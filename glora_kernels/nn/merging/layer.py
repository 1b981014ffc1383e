"""A layer whose adapter can be merged into its base and taken out again, and its conversion to plain modules.

While merged, `weight` and `bias` hold W_eff and the full bias, and the host keeps W and b bit for bit.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.nn.adapted import ADAPTER_NAMES, SHIFTS
from glora_kernels.nn.base import FROZEN, HOOKS
from glora_kernels.nn.frozen import FrozenBase, QuantizedLinear, check_dtype, plain_linear
from glora_kernels.nn.merging.rounding import MergeReport, refusal
from glora_kernels.nn.merging.values import Kept, ToMerge, check_finite, keep, merged, write
from glora_kernels.nn.named import check_registered, update_computed
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.ties import overlaps
from glora_kernels.nn.undo import all_or_none, finish
from glora_kernels.quant import QuantizedWeight
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.spec import GLoRAConfig

NAMES = ("weight", "bias", *ADAPTER_NAMES)
_INTACT = {False: frozenset(NAMES), True: frozenset(NAMES[1:])}
"""Is the base 4-bit → the names of a layer's parameters as registered; 4-bit codes are not a parameter."""
MERGED = "glora_merged"
"""The key that marks a merged layer in a state dict's metadata; torch.save keeps that, safetensors files do not."""
_MERGED: weakref.WeakSet[Mergeable] = weakref.WeakSet()  # the layers that hold merged values
UNSHARD = "save the adapter, load it into a model in one piece and merge that"


class Mergeable(FrozenBase):
    """A frozen base and an adapter that can be merged into it, and taken out again."""

    config: GLoRAConfig
    _base: Kept | None
    _disabled: tuple[object, ...]
    _origin: nn.Module | None
    committed = False  # whether an adapter was merged into the base for good

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters that exist, by name, with the current values of computed (pruned, ...) ones."""
        if not self.is_intact:
            update_computed(self)
        found = {name: getattr(self, name) for name in ADAPTER_NAMES}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def active_adapter(self) -> tuple[Mapping[str, Tensor], GLoRAConfig]:
        """The tensors by name and the configuration of the adapter that calls use, and that is merged."""
        raise NotImplementedError

    @property
    def has_shift(self) -> bool:
        """Whether the active adapter has C, D or E, which change the bias."""
        return not SHIFTS.isdisjoint(self.active_adapter()[0])

    @property
    def is_intact(self) -> bool:
        """Whether all parameters are registered under their names: none is pruned, parametrized or a replica's."""
        return self._parameters.keys() == _INTACT[self.quant_state is not None]

    def check_intact(self, caller: str, names: Collection[str] = NAMES) -> None:
        """Raise a RuntimeError where one of these parameters is computed from others: writing to it would be lost."""
        own = _INTACT[self.quant_state is not None]
        check_registered(caller, self, [name for name in names if name in own])

    @property
    def merged(self) -> bool:
        """Whether `weight` and `bias` hold the merged values."""
        return self._base is not None

    @property
    def base_bias(self) -> Tensor | None:
        """b, the bias of the base: `bias`, or while merged the copy of it in host memory."""
        return self.bias if self._base is None else self._base.bias

    def merge(self, requantize: bool = False) -> MergeReport | None:
        """Write W_eff into `weight` and b + b∘D + E + W·C into `bias`, in place; the host keeps the base.

        Both are computed in fp32 (float64 for a float64 base) and rounded once. A layer without a bias that needs one
        has it until `unmerge`. A weight that another module has too changes there as well; `merge(model)` refuses that.

        With a 4-bit base W_eff is rounded to 4 bits again, in the same type, blocks and nesting. This loses most of a
        small adapter, so it needs `requantize=True`, and the report says what survives (`nn.merging.rounding`). A
        weight that the adapter does not change keeps its codes.

        Args:
            requantize: allow rounding to 4 bits; no effect on a dense base.

        Returns:
            The report on rounding to 4 bits; None where the base is dense.

        Raises:
            RuntimeError: the layer is merged already, or disabled, or shares memory with one that is merged; or the
                base is in 4 bits, without `requantize`.
            ValueError: the layer is sharded; or the merged values hold NaN or inf where the base does not, after
                rounding to its dtype. Nothing has changed then.
        """
        self.check_mergeable()
        values, report = self.merged_values()
        if report is not None and not requantize:
            assert self.quant_state is not None
            raise RuntimeError(f"merge: {refusal(self.quant_state, report)}")
        self.write_merged(values)
        return report

    def check_mergeable(self) -> None:
        """Raise the errors of `merge` that depend on the state of this layer and of layers that share its memory."""
        refuse_sharded(self, "merge", UNSHARD)  # before asking for memory, which a DTensor does not have
        if self._base is not None:
            raise RuntimeError("merge() was called on a layer that is merged already; call unmerge() first")
        if self._disabled:
            raise RuntimeError("merge() was called inside disabled(model); leave that context first")
        self.check_intact("merge", ("weight", "bias"))
        for other in _MERGED:
            pairs = itertools.product(self.written().values(), other.written().values())
            if other.merged and any(overlaps(*pair) for pair in pairs):
                raise RuntimeError(
                    "merge() was called on a layer whose weight or bias is that of another layer, which is merged; "
                    "call unmerge() on that first, or untie them"
                )

    def written(self) -> dict[str, Tensor]:
        """The tensors that merging writes to, by name."""
        tensors = {
            "weight": self.weight,
            "absmax": None if self.quant_state is None else self.quant_state.absmax,
            "bias": self.bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def merged_values(
        self, *, dense: bool = False, dtype: torch.dtype | None = None
    ) -> tuple[Kept, MergeReport | None]:
        """The merged values, without changing the layer; a ValueError where it is sharded or they are not finite."""
        refuse_sharded(self, "merge", UNSHARD)
        values = Kept(self.weight, self.bias, self.quant_state)
        own = ToMerge(self, values, [] if self.merged else [self.active_adapter()])
        values, report = merged(own, dense=dense, dtype=dtype)
        check_finite(own, values)
        return values, report

    def write_merged(self, values: Kept) -> None:
        """Write merged values over the base, of which the host keeps a copy; after an error the base is restored."""
        base = keep(self)
        with all_or_none() as undo:
            undo.callback(self._restore, base)
            self.keep_base(base)
            write(self, values)

    def commit(self, values: Kept) -> None:
        """Make merged values the base for good. The adapter is still there, and has to be reset.

        From here on an adapter's file says only a part of what the layer has learned, and `save_adapter` refuses.
        """
        self.committed = True
        write(self, values)

    def keep_base(self, base: Kept) -> None:
        """Count the layer as merged, with these values for `unmerge`; call this before overwriting the weight."""
        self._base = base
        _MERGED.add(self)

    def forget_base(self) -> None:
        """Count the layer as not merged, after the base was written back to `weight`."""
        if self.base_bias is None:
            self.bias = None
        self._base = None
        _MERGED.discard(self)

    def _restore(self, base: Kept) -> None:
        write(self, base)
        self.forget_base()

    def unmerge(self) -> None:
        """Put the base back as it was, bit for bit.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if self._base is None:
            raise RuntimeError("unmerge() was called on a layer that is not merged")
        finish(partial(self._restore, self._base))

    def remerging(self) -> Callable[[], object]:
        """A function that merges this merged layer again after `unmerge`; it does nothing to a layer that is merged.

        A 4-bit layer gets its present codes back bit for bit, unless its adapter has changed in between. Then, and for
        a dense layer always, the merged values are computed again.
        """
        values = None if self.quant_state is None else keep(self)
        versions = self._versions()

        def again() -> None:
            if self.merged:
                return
            if values is None or self._versions() != versions:
                self.merge(requantize=True)
            else:
                self.write_merged(values)

        return again

    def _versions(self) -> list[tuple[int, int]]:
        """A value that changes with the adapter; inference tensors have no version counter and are not noticed."""
        return [(id(p), 0 if p.is_inference() else p._version) for p in self.active_adapter()[0].values()]

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A frozen `nn.Linear` (N, K) with W_eff and the full bias; it shares no memory with this layer.

        W_eff is computed in fp32 and rounded once, also from a 4-bit base.

        Args:
            dtype: of the weight; None means the base's, for a 4-bit base the dtype it computes in.
        """
        check_dtype("dtype", dtype)
        (weight, bias, _), _ = self.merged_values(dense=True, dtype=dtype)
        weight = (weight.t() if self._transposed else weight).clone(memory_format=torch.contiguous_format)
        bias = None if bias is None else bias.clone(memory_format=torch.contiguous_format)
        return plain_linear(weight, bias).train(self.training)

    @torch.no_grad()
    def to_quantized(self) -> QuantizedLinear:
        """A frozen `QuantizedLinear` with the merged codes and the full bias; it shares no memory with this layer.

        Raises:
            RuntimeError: the base is dense, or the layer is not merged.
        """
        bias = None if self.bias is None else self.bias.clone()
        return QuantizedLinear(self.copied_codes(), bias, self.compute_dtype).train(self.training)

    def copied_codes(self) -> QuantizedWeight:
        """The merged codes in memory of their own; the errors of `to_quantized`."""
        if self.quant_state is None:
            raise RuntimeError("to_quantized: the base is dense; quantize(layer.to_linear()) gives a 4-bit layer")
        if self._base is None:
            raise RuntimeError(
                "to_quantized: the layer is not merged; call merge(requantize=True) first, which reports what rounding "
                "to 4 bits loses"
            )
        state = self.quant_state.copied("cpu").to(self.weight.device)
        return QuantizedWeight(self.weight.detach().clone(), state)

    def to_plain(self) -> nn.Module:
        """A module of the class that this layer was made from, on this merged layer's own Parameters.

        An `nn.Linear` or `Conv1D` of the same class, a `QuantizedLinear` or a bitsandbytes `Linear4bit`. It takes over
        the hooks of this layer, and parameters that were frozen to adapt it require a gradient again.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if self._base is None:
            raise RuntimeError("to_plain: the layer is not merged; call merge() first")
        return self.as_plain()

    def as_plain(self) -> nn.Module:
        """`to_plain` of this layer, with the weights that it has now, merged or not."""
        if self.quant_state is not None:
            packed = QuantizedLinear(self.codes(), self.bias, self.compute_dtype)
            plain = packed.to_linear4bit() if is_linear4bit(self._origin) else packed
        elif self._origin is None:
            plain = plain_linear(self.weight, self.bias)
        else:
            plain = copy.copy(self._origin)
        parameters = {"weight": self.weight, "bias": self.bias} if self.quant_state is None else plain._parameters
        thawed = vars(self).get(FROZEN, ())
        for name, parameter in parameters.items():
            if parameter is not None and parameter.is_floating_point():
                parameter.requires_grad_(("weight" if self.base_bias is None else name) in thawed)
        vars(plain)["_parameters"] = parameters
        for name in HOOKS:
            vars(plain)[name] = vars(self)[name]
        return plain.train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._base is not None:  # a copy of a merged layer is merged too
            _MERGED.add(self)
