"""Several GLoRA layers on one input as one module and one launch, for models that call it with x once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glora_kernels.nn.base import check_config
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.share import keep_tied
from glora_kernels.nn.siblings import install, refusal
from glora_kernels.nn.undo import all_or_none
from glora_kernels.spec import GLoRAConfig


class GroupedLoRALinear(nn.Module):
    """y_i = x (W_i + s·B_i)ᵀ + b_i + b_i∘D_i + E_i + W_i·C_i of several layers on one x; when new, it equals its bases.

    Shapes: x (..., K), y_i (..., N_i). The parameters are those of `members`, an `nn.ModuleList` of GLoRALinear:
    "members.0.weight", "members.0.B_down", ... so that `merge`, `disabled`, `save_adapter` and all other functions for
    models find them. How they compute together: `nn.siblings.SiblingGroup`.

    Args:
        in_features: K.
        out_features: N_i of each layer; two or more.
        config: of every layer, with A = none and B = lora or none.
        bias: whether the bases have a bias.
        device: of all parameters.
        dtype: of the bases: float32, bfloat16, float16 or float64.
        adapter_dtype: of the adapters; None means the bases'. fp32 adapters over a 16-bit base are served.
        tied: one B_down for all layers, and one dropout mask; x̃·B_downᵀ is computed once.

    Raises:
        TypeError: `config` is not a GLoRAConfig, or `out_features` no sequence.
        ValueError: fewer than two layers, a size below 1, a dtype or form of A or B that is not supported, or `tied`
            without B = lora.

    Examples:
        >>> qkv = gk.GroupedLoRALinear(16, [16, 8, 8], gk.GLoRAConfig.lora(rank=4))
        >>> [y.shape[-1] for y in qkv(torch.randn(2, 16))]
        [16, 8, 8]
    """

    members: nn.ModuleList

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        config: GLoRAConfig,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        _check_tied(config, tied)
        if not isinstance(out_features, Sequence) or isinstance(out_features, str):
            raise TypeError(f"out_features must be a sequence, one size a layer such as (64, 16), got {out_features!r}")
        layers = [
            GLoRALinear(in_features, n, config, bias, device, dtype, adapter_dtype=adapter_dtype) for n in out_features
        ]
        self._group(layers, tied)

    @classmethod
    def from_linears(
        cls,
        linears: Sequence[nn.Module],
        config: GLoRAConfig,
        *,
        adapter_dtype: torch.dtype | None = None,
        tied: bool = False,
    ) -> GroupedLoRALinear:
        """Layers on the parameters of `linears`: the same objects, no copy; this freezes them.

        Args:
            linears: two or more `nn.Linear`, or `Conv1D` of transformers, that read one x; with or without a bias.
            config: of every layer, with A = none and B = lora or none.
            adapter_dtype: of the adapters; None means each weight's.
            tied: one B_down for all layers, and one dropout mask.

        Raises:
            TypeError: one of them is no linear layer, or `config` is not a GLoRAConfig.
            ValueError: linear layers that cannot be replaced, or that cannot be one group; the message says why.
                Nothing has changed then.
        """
        _check_tied(config, tied)
        grouped = cls.__new__(cls)
        nn.Module.__init__(grouped)
        with all_or_none() as undo:
            for linear in linears:
                for parameter in linear.parameters() if isinstance(linear, nn.Module) else ():
                    undo.callback(parameter.requires_grad_, parameter.requires_grad)
            layers = [GLoRALinear.from_linear(linear, config, adapter_dtype=adapter_dtype) for linear in linears]
            grouped._group(layers, tied)
        return grouped.train(all(linear.training for linear in linears))

    def _group(self, layers: list[GLoRALinear], tied: bool) -> None:
        members = {f"members.{i}": layer for i, layer in enumerate(layers)}
        if reason := refusal(members):
            raise ValueError(f"{type(self).__name__}: {reason}")
        if tied:
            for layer in layers[1:]:
                layer.B_down = layers[0].B_down
        install(members)
        self.members = nn.ModuleList(layers)
        if tied:
            keep_tied(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs y_i, (..., N_i), of an x (..., K), in the order of the members."""
        return tuple([member(x) for member in self.members])


def _check_tied(config: GLoRAConfig, tied: bool) -> None:
    check_config(config)
    if tied and config.B != "lora":
        raise ValueError(f"tied=True gives the layers one B_down, which exists where B is 'lora'; got B={config.B!r}")
