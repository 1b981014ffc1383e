"""The GLoRA layer of experts: one product of an experts module, with an adapter for each expert.

    y[i] = x[token(i)] (W_e + W_e∘A_e + s·B_e)ᵀ + [ b_e + b_e∘D_e + E_e + W_e·C_e ],   e the expert of row i

The mathematics is in `experts.op`; merging goes expert by expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.experts.groups import Groups
from glora_kernels.experts.products import of_expert
from glora_kernels.nn.adapted import ADAPTER_NAMES, Frozen, Operands, adapted_linear
from glora_kernels.nn.base import FROZEN, HOOKS, base_of
from glora_kernels.nn.experts import ExpertLinear, over
from glora_kernels.nn.frozen import FrozenBase, check_dtype
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.merging.layer import UNSHARD
from glora_kernels.nn.merging.rounding import MergeReport, rounded
from glora_kernels.nn.merging.values import Kept, ToMerge, check_finite, merged
from glora_kernels.nn.named import FIRST, NONE
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.quant import QuantizedWeight, dequantize
from glora_kernels.spec import GLoRAConfig


class GLoRAExpertLinear(GLoRALinear):
    """`GLoRALinear` over the weights W (E, N, K) of E experts; a new layer equals its base.

    The parameters have the names of `GLoRAConfig.parameter_shapes`, with E in front of their shapes, or with 1 where
    all experts share one. The weight lies as the experts module stores it: (E, N, K), or (E, K, N).

    Args:
        plain: the product that it is made from, whose parameters it takes over and freezes.
        config: which supports exist, rank, scale, dropout.
        common: the names of the parameters that all experts share.
        adapter_dtype: of the adapter; None means the weight's.
    """

    def __init__(
        self,
        plain: ExpertLinear,
        config: GLoRAConfig,
        *,
        common: Collection[str] = (),
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        thawed = tuple(name for name, parameter in plain.named_parameters() if parameter.requires_grad)
        self.experts = plain.experts
        self._register(base_of(plain), config, adapter_dtype, common)
        vars(self)[FROZEN] = thawed
        self.reset_adapter()
        self.train(plain.training)

    def forward(self, x: Tensor, groups: Groups, of_tokens: bool) -> Tensor:  # type: ignore[override]
        """The sorted rows of y (M, N), from the tokens x (T, K) or from sorted rows (M, K).

        Raises:
            RuntimeError: the layer is merged, in training mode, and gradients are enabled; or it is inside `gk.rows`.
            ValueError, TypeError: those of `experts.op.expert_rows`.
        """
        base, linear = self.frozen(), over(groups, of_tokens)
        if self._disabled or self.merged:
            self.refuse_merged_training()
            return adapted_linear(x, base, Operands(), linear=linear)
        if self._rows is not None:
            return self._rows.linear(self, x, Frozen(*base))
        adapter = self.operands(self._active or FIRST)
        return adapted_linear(x, base, adapter or Operands(), linear=linear)

    def reset_parameters(self) -> None:
        """Raise a RuntimeError: a base of experts is initialised by their module."""
        raise RuntimeError(
            "reset_parameters: the base belongs to an experts module, which initialises it; reset_adapter() leaves it "
            "as it is"
        )

    def refusal_of_rows(self) -> str:
        return "it is a layer of experts, whose adapters cannot differ by row"

    def merged_values(
        self, *, dense: bool = False, dtype: torch.dtype | None = None
    ) -> tuple[Kept, MergeReport | None]:
        refuse_sharded(self, "merge", UNSHARD)
        is_quantized, biases = self.quant_state is not None and not dense, []
        weight = None
        for e, own in enumerate(self._of_each()):
            values, _ = merged(own, dense=True, dtype=torch.float32 if is_quantized else dtype)
            check_finite(own, values)
            if weight is None:
                weight = values.weight.new_empty(self.experts, *values.weight.shape)
            weight[e] = values.weight
            biases.append(values.bias)
        assert weight is not None
        bias = None if biases[0] is None else torch.stack([own for own in biases if own is not None])
        if not is_quantized:
            return Kept(weight.mT if self._transposed else weight, bias), None
        if bias is not None:
            bias = bias.to(self.base_dtype if self.bias is None else self.bias.dtype)
        codes = self.codes()
        made, report = rounded(codes, dequantize(codes, torch.float32), weight.view(codes.shape))
        return Kept(made.packed.view(self.weight.shape), bias, made.state), report

    def _of_each(self) -> Iterator[ToMerge]:
        """Each expert as a linear layer, with the adapter to merge."""
        supports, config = ({}, NONE) if self.merged else self.active_adapter()
        for e in range(self.experts):
            one = FrozenBase()
            weight = of_expert(self.base_weight(), e, self.experts)
            if isinstance(weight, QuantizedWeight):
                one.hold(weight)
            else:
                one.weight, one.quant_state = weight.detach(), None
            one._transposed, one.compute_dtype = False, self.compute_dtype
            one.bias = None if self.bias is None else self.bias.detach()[e]  # type: ignore[assignment]
            own = {name: tensor[e if len(tensor) > 1 else 0] for name, tensor in supports.items()}
            yield ToMerge(one, Kept(one.weight, one.bias, one.quant_state), [(own, config)])

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> ExpertLinear:  # type: ignore[override]
        """A frozen `ExpertLinear` (E, N, K) with every W_eff and full bias; it shares no memory with this layer."""
        check_dtype("dtype", dtype)
        (weight, bias, _), _ = self.merged_values(dense=True, dtype=dtype)
        return ExpertLinear(weight.mT if self._transposed else weight, bias, self.experts).train(self.training)

    @torch.no_grad()
    def to_quantized(self) -> ExpertLinear:  # type: ignore[override]
        bias = None if self.bias is None else self.bias.clone()
        made = ExpertLinear(self.copied_codes(), bias, self.experts, compute_dtype=self.compute_dtype)
        return made.train(self.training)

    def as_plain(self) -> ExpertLinear:
        weight = self.weight if self.quant_state is None else self.codes()
        plain = ExpertLinear(weight, self.bias, self.experts, self._transposed, self.compute_dtype)
        thawed = vars(self).get(FROZEN, ())
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(("weight" if self.base_bias is None else name) in thawed)
        for name in HOOKS:
            vars(plain)[name] = vars(self)[name]
        return plain.train(self.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """While merged, save the weights under the names that they have in an experts module without layers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and self.quant_state is None and prefix:
            for here, plain in (("weight", ""), ("bias", "_bias")):
                if prefix + here in destination:
                    destination[prefix[:-1] + plain] = destination.pop(prefix + here)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


def common_of(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of an adapter's parameters that all experts of a layer share."""
    return tuple(name for name in ADAPTER_NAMES if name in tensors and len(tensors[name]) == 1)
