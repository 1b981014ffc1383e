"""What a layer with an adapter does to be merged: values, the base that is kept meanwhile, plain modules, its state.

While merged, `weight` and `bias` hold W_eff and the full bias, and the host keeps W and b bit for bit.
"""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.dispatch.common import wide_dtype, without_autocast
from glora_kernels.nn.base import HOOKS
from glora_kernels.nn.frozen import FrozenBase, QuantizedLinear, check_dtype, plain_linear
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.requantize import (
    Kept,
    MergeReport,
    check_finite,
    copied_weight,
    keep,
    refusal,
    requantized,
    write,
)
from glora_kernels.nn.ties import overlaps
from glora_kernels.nn.undo import finish
from glora_kernels.quant import QuantizedWeight, dequantize
from glora_kernels.quant.bnb import is_linear4bit
from glora_kernels.reference import effective_bias, effective_weight
from glora_kernels.spec import GLoRAConfig

ADAPTER_NAMES: tuple[str, ...] = (
    "A",
    "A_up",
    "A_down",
    "B",
    "B_up",
    "B_down",
    "C",
    "C_up",
    "C_down",
    "D",
    "E",
)
"""Every name a parameter of an adapter can have; those that a configuration lacks are registered as None."""

NAMES = ("weight", "bias", *ADAPTER_NAMES)
_INTACT = {False: frozenset(NAMES), True: frozenset(NAMES[1:])}
"""The parameters of a layer as it was made; over 4 bits (True) the weight is none."""
FROZEN = "_glora_frozen"
"""The attribute that holds the names of those parameters of a module that adapting a model has frozen."""

MERGED = "glora_merged"
"""What the metadata of a merged layer's state says; torch.save keeps it, files of tensors alone do not."""
_MERGED: weakref.WeakSet[Mergeable] = weakref.WeakSet()  # the layers that hold merged values
UNSHARD = "save the adapter, load it into a model in one piece and merge that"


class Mergeable(FrozenBase):
    """A frozen base and an adapter that can be merged into it, and taken out again."""

    config: GLoRAConfig
    in_features: int
    out_features: int
    _base: Kept | None
    _disabled: tuple[object, ...]
    _origin: nn.Module | None
    _holders: Mapping[str, Any]

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters that exist, by name; one that is computed from others, as it is now."""
        if not self.is_intact:  # pruning and legacy weight_norm compute at the next forward what they change now
            for hook in self._forward_pre_hooks.values():
                if type(hook).__module__.startswith("torch.nn.utils."):
                    hook(self, ())
        found = {name: getattr(self, name) for name in ADAPTER_NAMES}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

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

    @torch.no_grad()
    def merge(self, requantize: bool = False) -> MergeReport | None:
        """Write W_eff into `weight` and b + b∘D + E + W·C into `bias`, in place; the host keeps the base.

        Both are computed in fp32 (float64 for a float64 base) and rounded once. A layer without a bias that
        needs one gets it until `unmerge`. A weight shared with another module changes there too;
        `merge(model)` refuses that.

        Over a 4-bit base W_eff is rounded to 4 bits again, in the same type, blocks and nesting, and most of a small
        adapter is lost in that: it needs `requantize=True`, and the report says what is left (`nn.requantize`). A
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
        merged, report = self.merged_values()
        if report is not None and not requantize:
            raise RuntimeError(f"merge: {refusal(self, report)}")
        self.write_merged(merged)
        return report

    @torch.no_grad()
    def merged_values(self) -> tuple[Kept, MergeReport | None]:
        """What `merge` would write, and what rounding to 4 bits would do; its errors but those of `check_mergeable`."""
        refuse_sharded(self, "merge", UNSHARD)
        if self.quant_state is not None:
            return requantized(self)
        weight, bias = self._effective()
        return Kept(weight.t() if self._transposed else weight, bias), None

    def check_mergeable(self) -> None:
        """The errors of `merge` that depend on the state of the layer, and of those that share its memory."""
        if self._base is not None:
            raise RuntimeError("merge() was called on a layer that is merged already; call unmerge() first")
        if self._disabled:
            raise RuntimeError("merge() was called inside disabled(model); leave that context first")
        self.check_intact("merge", ("weight", "bias"))
        mine = self._written()
        for other in _MERGED:
            if other.merged and any(overlaps(*pair) for pair in itertools.product(mine, other._written())):
                raise RuntimeError(
                    "merge() was called on a layer whose weight or bias is that of another layer, which is merged; "
                    "call unmerge() on that first, or untie them"
                )

    def _written(self) -> list[Tensor]:
        """What merging writes to."""
        absmax = None if self.quant_state is None else self.quant_state.absmax
        return [tensor for tensor in (self.weight, absmax, self.bias) if tensor is not None]

    @torch.no_grad()
    def write_merged(self, values: Kept) -> None:
        """Put merged values in the place of the base, which the host keeps; if interrupted, the base is back."""
        base = keep(self)
        try:
            self.keep_base(base)
            write(self, values)
        except BaseException:
            self._restore(base)
            raise

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

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base back as it was, bit for bit.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if self._base is None:
            raise RuntimeError("unmerge() was called on a layer that is not merged")
        finish(partial(self._restore, self._base))

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain `nn.Linear` (N, K) with W_eff and the full bias: frozen, nothing shared with this layer.

        W_eff is computed in fp32 and rounded once, also from a 4-bit base.

        Args:
            dtype: of the weight; None means the base's, of a 4-bit base the dtype that is computed in.
        """
        if dtype is not None:
            check_dtype("dtype", dtype)
        weight, bias = self._effective(dtype)
        contiguous = torch.contiguous_format
        bias = None if bias is None else bias.clone(memory_format=contiguous)
        return plain_linear(weight.clone(memory_format=contiguous), bias).train(self.training)

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
        bias = None if self.bias is None else self.bias.clone()
        return QuantizedLinear(copied_weight(self), bias, self.compute_dtype).train(self.training)

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
            packed = QuantizedLinear(QuantizedWeight(self.weight, self.quant_state), self.bias, self.compute_dtype)
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

    def _effective(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """W_eff (N, K) and the full bias (N,), in `dtype` or those of the base; may alias them."""
        refuse_sharded(self, "merge", UNSHARD)
        weight, bias = self.base_weight(), self.bias
        beta_dtype = dtype or (self.base_dtype if bias is None else bias.dtype)
        dtype = dtype or self.base_dtype
        wide = wide_dtype(self.base_dtype)
        dense = dequantize(weight, wide) if isinstance(weight, QuantizedWeight) else weight.to(wide)
        if self._base is not None:
            return dense.to(dtype), None if bias is None else bias.to(beta_dtype)
        adapter: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self.adapter().items()}
        with without_autocast(dense.device.type):
            merged = effective_weight(dense, adapter, self.config).to(dtype)
            beta = effective_bias(dense, bias, adapter, self.config)
        beta = None if beta is None else beta.to(beta_dtype)
        check_finite(Kept(merged, beta), Kept(dense, bias))
        return merged, beta

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """While merged the state is that of the plain layer with these weights, marked in its metadata."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base is None:
            return
        for name in ADAPTER_NAMES:
            destination.pop(prefix + name, None)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {})[MERGED] = True

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: Any,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        given = {name for name in NAMES if prefix + name in state_dict}
        where = prefix.removesuffix(".") or "the layer"
        # Loaded into a merged layer, a base would be lost at unmerge and an adapter would have no effect.
        if self._base is not None and given:
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
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _changes_something(self) -> bool:
        """Whether a parameter of the layer's own that starts at zero is not zero any more."""
        # A shared one may stand in the state under another layer's name alone.
        own = ((name, p) for name, p in self.adapter().items() if name not in self._holders)
        zeros = [p for name, p in own if not name.endswith("_down") and not p.is_meta]
        return any(bool(parameter.any()) for parameter in zeros)

    def rejoin_merged(self) -> None:
        """For a copy of a merged layer: it counts as one too."""
        if self._base is not None:
            _MERGED.add(self)
