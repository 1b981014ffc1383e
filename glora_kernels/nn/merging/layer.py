"""A layer whose adapter can be merged into its base and taken out again, and the plain modules that it becomes.

While merged, `weight` and `bias` hold W_eff and the full bias, and the host keeps W and b bit for bit.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.nn.adapted import ADAPTER_NAMES, SHIFTS
from glora_kernels.nn.base import FROZEN, HOOKS
from glora_kernels.nn.frozen import FrozenBase, QuantizedLinear, check_dtype, plain_linear
from glora_kernels.nn.merging.rounding import MergeReport, refusal
from glora_kernels.nn.merging.values import Kept, ToMerge, check_finite, keep, merged, write
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.ties import overlaps
from glora_kernels.nn.undo import all_or_none, finish
from glora_kernels.quant import QuantizedWeight
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.spec import GLoRAConfig

NAMES = ("weight", "bias", *ADAPTER_NAMES)
_INTACT = {False: frozenset(NAMES), True: frozenset(NAMES[1:])}
"""The parameters of a layer as it was made; over 4 bits (True) the weight is none."""
MERGED = "glora_merged"
"""What the metadata of a merged layer's state says; torch.save keeps it, files of tensors alone do not."""
_MERGED: weakref.WeakSet[Mergeable] = weakref.WeakSet()  # the layers that hold merged values
UNSHARD = "save the adapter, load it into a model in one piece and merge that"


class Mergeable(FrozenBase):
    """A frozen base and an adapter that can be merged into it, and taken out again."""

    config: GLoRAConfig
    _base: Kept | None
    _disabled: tuple[object, ...]
    _origin: nn.Module | None

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters that exist, by name; one that is computed from others, as it is now."""
        if not self.is_intact:  # pruning and legacy weight_norm compute at the next forward what they change now
            for hook in self._forward_pre_hooks.values():
                if type(hook).__module__.startswith("torch.nn.utils."):
                    hook(self, ())
        found = {name: getattr(self, name) for name in ADAPTER_NAMES}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    @property
    def has_shift(self) -> bool:
        """Whether the adapter makes the full bias another than that of the base."""
        return not SHIFTS.isdisjoint(self.adapter())

    @property
    def is_intact(self) -> bool:
        """Whether the parameters have their own names: none is pruned, normalised, parametrized or a replica's."""
        return self._parameters.keys() == _INTACT[self.quant_state is not None]

    def check_intact(self, caller: str, names: Collection[str] = NAMES) -> None:
        """An error where one of these parameters is computed from others, so that writing to it would be lost."""
        own = _INTACT[self.quant_state is not None]
        if computed := [name for name in names if name in own and name not in self._parameters]:
            raise RuntimeError(
                f"{caller}: {computed[0]} of this layer is computed from other parameters (pruned, normalised or "
                "parametrized), and a new value would be lost; make it permanent first (prune.remove, "
                "remove_weight_norm, remove_parametrizations)"
            )

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

        Both are computed in fp32 (float64 for a float64 base) and rounded once. A layer without a bias that
        needs one gets it until `unmerge`. A weight shared with another module changes there too;
        `merge(model)` refuses that.

        Over a 4-bit base W_eff is rounded to 4 bits again, in the same type, blocks and nesting, and most of a small
        adapter is lost in that: it needs `requantize=True`, and the report says what is left (`nn.merging.rounding`). A
        weight that the adapter does not change keeps its codes.

        Args:
            requantize: round to 4 bits where the base is in 4 bits; a dense base is merged as ever.

        Returns:
            What rounding to 4 bits has done; None where the base is dense.

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
        """The errors of `merge` that depend on the state of the layer, and of those that share its memory."""
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
        """What merging writes to."""
        tensors = {
            "weight": self.weight,
            "absmax": None if self.quant_state is None else self.quant_state.absmax,
            "bias": self.bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def merged_values(
        self, *, dense: bool = False, dtype: torch.dtype | None = None
    ) -> tuple[Kept, MergeReport | None]:
        """`values.merged` of this layer, which stays as it is; an error where it is sharded, or they are not finite."""
        refuse_sharded(self, "merge", UNSHARD)
        values = Kept(self.weight, self.bias, self.quant_state)
        own = ToMerge(self, values, [] if self.merged else [(self.adapter(), self.config)])
        values, report = merged(own, dense=dense, dtype=dtype)
        check_finite(own, values)
        return values, report

    def write_merged(self, values: Kept) -> None:
        """Put merged values in the place of the base, which the host keeps; if interrupted, the base is back."""
        base = keep(self)
        with all_or_none() as undo:
            undo.callback(self._restore, base)
            self.keep_base(base)
            write(self, values)

    def keep_base(self, base: Kept) -> None:
        """From here on the layer counts as merged, and `unmerge` restores these values: before they are overwritten."""
        self._base = base
        _MERGED.add(self)

    def forget_base(self) -> None:
        """The base is back in `weight`: the layer is not merged any more."""
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
        """What merges a merged layer again after `unmerge`; one in 4 bits with the codes that it has now, bit for bit.

        Unless its adapter was changed in between: then it is merged anew, as a dense layer always is. It does nothing
        to a layer that is merged.
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
        """Changes with every change of the adapter; tensors of inference mode count none."""
        return [(id(p), 0 if p.is_inference() else p._version) for p in self.adapter().values()]

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain `nn.Linear` (N, K) with W_eff and the full bias: frozen, nothing shared with this layer.

        W_eff is computed in fp32 and rounded once, also from a 4-bit base.

        Args:
            dtype: of the weight; None means the base's, of a 4-bit base the dtype that is computed in.
        """
        check_dtype("dtype", dtype)
        (weight, bias, _), _ = self.merged_values(dense=True, dtype=dtype)
        weight = (weight.t() if self._transposed else weight).clone(memory_format=torch.contiguous_format)
        bias = None if bias is None else bias.clone(memory_format=torch.contiguous_format)
        return plain_linear(weight, bias).train(self.training)

    @torch.no_grad()
    def to_quantized(self) -> QuantizedLinear:
        """A frozen `QuantizedLinear` with the merged codes and the full bias; nothing is shared with this layer.

        Raises:
            RuntimeError: the base is dense, or the layer is not merged.
        """
        if self.quant_state is None:
            raise RuntimeError("to_quantized: the base is dense; quantize(layer.to_linear()) gives a 4-bit layer")
        if self._base is None:
            raise RuntimeError(
                "to_quantized: the layer is not merged; call merge(requantize=True) first, which reports what rounding "
                "to 4 bits loses"
            )
        state = self.quant_state.copied("cpu").to(self.weight.device)
        bias = None if self.bias is None else self.bias.clone()
        codes = QuantizedWeight(self.weight.detach().clone(), state)
        return QuantizedLinear(codes, bias, self.compute_dtype).train(self.training)

    def to_plain(self) -> nn.Module:
        """The module that this merged layer was made from, with the merged values: on the layer's own Parameters.

        An `nn.Linear` or `Conv1D` of the class that it was, a `QuantizedLinear` or a bitsandbytes `Linear4bit`. Hooks
        on this layer go on to it, and what was frozen to adapt it requires a gradient again.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if self._base is None:
            raise RuntimeError("to_plain: the layer is not merged; call merge() first")
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
        if self._base is not None:  # a copy of a merged layer is one too
            _MERGED.add(self)
