"""The GLoRA convolution: a frozen `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` and its adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.nn.adapted import Frozen
from glora_kernels.nn.base import FROZEN, base_of, convolution_class, shell, unsupported
from glora_kernels.nn.convolutions.forms import NO_ROWS, adapted_conv
from glora_kernels.nn.convolutions.geometry import Geometry
from glora_kernels.nn.frozen import check_dtype
from glora_kernels.nn.linear import GLoRALinear
from glora_kernels.nn.named import FIRST
from glora_kernels.spec import GLoRAConfig


class GLoRAConv(GLoRALinear):
    """y = x∗(W + W∘A + s·B) + b + b∘D + E + W·C with W and b frozen; a new layer equals its base.

    ∗ is the convolution of the base. W (N, C, *kernel) is flattened to (N, K) in the equation, with K = C times the
    size of the kernel, and the parameters are those of `GLoRALinear` with these N and K. But variant="matmul" is the
    product over the channels, W·A with A_up (C, R) and A_down (R, C), as in LyCORIS. No dense W∘A + s·B is built,
    except W∘A of A="lora", the elementwise variant, where it is not a linear layer (`nn.convolutions.forms`).

    Shapes: x (B, C, *sizes) or (C, *sizes), y (B, N, *sizes) or (N, *sizes).

    Args:
        conv: a convolution for which `from_conv` has no objection; the layer takes over its parameters.
        config: which supports exist, rank, scale, dropout.
        adapter_dtype: of the adapter; None means the weight's.

    Examples:
        >>> layer = gk.GLoRAConv(nn.Conv2d(3, 8, 3, stride=2, padding=1), gk.GLoRAConfig.lora(rank=2))
        >>> layer(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 8, 8, 8])
    """

    def __init__(self, conv: nn.Module, config: GLoRAConfig, *, adapter_dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        thawed = tuple(name for name, parameter in conv.named_parameters() if parameter.requires_grad)
        self._register(base_of(conv), config, adapter_dtype)
        vars(self).update({"_origin": shell(conv), FROZEN: thawed})
        self.geometry = Geometry.of(conv)
        self.reset_adapter()
        self.train(conv.training)

    @classmethod
    def from_conv(cls, conv: nn.Module, config: GLoRAConfig, *, adapter_dtype: torch.dtype | None = None) -> GLoRAConv:
        """A layer on the parameters of a convolution: the same objects, no copy; this freezes them.

        Args:
            conv: an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with groups=1, of any kernel, stride, padding, dilation and
                padding mode.
            config: which supports exist, rank, scale, dropout.
            adapter_dtype: of the adapter; None means the weight's.

        Raises:
            TypeError: `conv` is no such convolution (a transposed one, say), or `config` is not a GLoRAConfig.
            ValueError: one that cannot be replaced (grouped, hooks, its own forward, ...); the message says why.
        """
        if convolution_class(conv) is None:
            raise TypeError(f"from_conv takes an nn.Conv1d, nn.Conv2d or nn.Conv3d; got {type(conv).__name__}")
        if reason := unsupported(conv):
            raise ValueError(f"from_conv cannot take this {type(conv).__name__}: {reason}")
        return cls(conv, config, adapter_dtype=adapter_dtype)

    @classmethod
    def from_linear(cls, *args: Any, **kwargs: Any) -> GLoRALinear:
        """Raise a TypeError: see `GLoRALinear.from_linear`, and `from_conv`."""
        raise TypeError("GLoRAConv.from_linear: a linear layer becomes a GLoRALinear; from_conv takes convolutions")

    def base_weight(self) -> Tensor:
        """W (N, K), flattened."""
        return self.weight.flatten(1)

    def frozen(self) -> Frozen:
        """The base in the form that `adapted_conv` takes."""
        return Frozen(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output y of x.

        Raises:
            RuntimeError: the layer is merged, in training mode, and gradients are enabled; or it is inside `gk.rows`.
            ValueError, TypeError: those of `nn.convolutions.forms.adapted_conv`.
        """
        if self._disabled or self.merged:
            self.refuse_merged_training()
            return self._base_alone(x)
        if self._rows is not None:
            return self._rows.linear(self, x, self.frozen())
        adapter = self.operands(self._active or FIRST)
        return self._base_alone(x) if adapter is None else adapted_conv(x, self.frozen(), adapter, self.geometry)

    def _base_alone(self, x: Tensor) -> Tensor:
        conv: Any = self._origin
        return conv._conv_forward(x, self.weight, self.bias)

    def refusal_of_rows(self) -> str:
        return NO_ROWS

    @torch.no_grad()
    def to_conv(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A frozen convolution of the class of the base with W_eff and the full bias, which shares no memory with this.

        W_eff is computed in fp32 (float64 for a float64 base) and rounded once.

        Args:
            dtype: of the weight; None means the base's.
        """
        check_dtype("dtype", dtype)
        values, _ = self.merged_values(dtype=dtype)
        plain = shell(self._origin) if self._origin is not None else None
        assert plain is not None
        for name, tensor in (("weight", values.weight), ("bias", values.bias)):
            plain._parameters[name] = None if tensor is None else nn.Parameter(tensor.clone(), requires_grad=False)
        return plain.train(self.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Raise a TypeError: `to_conv` gives the convolution."""
        raise TypeError("to_linear: this layer is over a convolution; to_conv() gives a plain one")

    def extra_repr(self) -> str:
        kernel, stride, padding, dilation, outside, mode = self.geometry
        parts = [f"kernel_size={kernel}, stride={stride}"]
        parts += [f"padding={padding}"] if any(padding) else []
        parts += [f"dilation={dilation}"] if set(dilation) != {1} else []
        parts += [f"padded outside={outside}, {mode}"] if outside else []
        return f"{', '.join(parts)}, {super().extra_repr()}"
