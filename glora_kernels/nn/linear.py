"""The GLoRA layer: a frozen linear layer and its adapter, in place of `nn.Linear` or a transformers `Conv1D`.

    y = x (W + W∘A + s·B)ᵀ + [ b + b∘D + E + W·C ]

The layer owns parameters and state (merged, disabled); the mathematics is in `ops`. The base keeps the names
`weight` and `bias`, so base checkpoints load; beside them are A, A_up, A_down, ... E.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glora_kernels.nn.base import Base, base_of, check_config, is_linear, unsupported
from glora_kernels.nn.frozen import (
    FrozenBase,
    QuantizedLinear,
    check_dtype,
    check_floating,
    describe,
    plain_linear,
)
from glora_kernels.nn.ranks import refuse_sharded
from glora_kernels.nn.requantize import Kept, MergeReport, copied_weight, keep, refusal, requantized, write
from glora_kernels.ops import glora_linear, glora_wc
from glora_kernels.ops.common import Weight, wide_dtype, without_autocast
from glora_kernels.ops.glora import dropout_seed
from glora_kernels.quant import QuantizedWeight, dequantize
from glora_kernels.reference import effective_bias, effective_weight
from glora_kernels.spec import GLoRAConfig

if TYPE_CHECKING:
    from glora_kernels.nn.siblings import SiblingGroup
    from glora_kernels.ops.deferred import DeferredLinear

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

_NAMES = ("weight", "bias", *ADAPTER_NAMES)
UNSHARD = "save the adapter, load it into a model in one piece and merge that"


@torch.no_grad()
def initialize(adapter: Mapping[str, nn.Parameter], init: str) -> None:
    """Make an adapter (name → parameter) change nothing: `_down` factors random (`init`), everything else zero."""
    for name, parameter in adapter.items():
        if not name.endswith("_down"):
            nn.init.zeros_(parameter)
        elif init == "kaiming":
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        else:
            nn.init.xavier_uniform_(parameter)


class GLoRALinear(FrozenBase):
    """y = x (W + W∘A + s·B)ᵀ + b + b∘D + E + W·C with W and b frozen; a fresh layer equals its base.

    Shapes: x (..., K), y (..., N), weight (N, K), or (K, N) as stored where the base was a `Conv1D`, or the packed
    codes of a 4-bit base (P, 1); bias (N,). The adapter's parameters are those of `GLoRAConfig.parameter_shapes`;
    without a bias there is no D.

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
        ValueError: a size below 1 or a dtype that is not served.
    """

    config: GLoRAConfig
    D: nn.Parameter | None

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
        """A layer on the parameters of `linear` (the same objects, no copy), which are frozen by this.

        Args:
            linear: an `nn.Linear`; a `Conv1D` of transformers, whose weight stays as stored, (K, N); or one in 4
                bits: a `QuantizedLinear` (`quantize`) or a bitsandbytes `Linear4bit`, whose codes stay where they are.
            config: which supports exist, rank, scale, dropout.
            adapter_dtype: of the adapter; None means the weight's, over 4 bits the dtype that is computed in.

        Raises:
            TypeError: `linear` is no linear layer, or `config` is not a GLoRAConfig.
            ValueError: a linear layer that cannot be replaced (hooks, its own forward, a `Linear4bit` that is not
                quantized yet, ...), and why.
        """
        if not is_linear(linear):
            raise TypeError(
                "from_linear takes an nn.Linear, a Linear4bit, a QuantizedLinear or a transformers Conv1D; "
                f"got {type(linear).__name__}"
            )
        if reason := unsupported(linear):
            raise ValueError(f"from_linear cannot take this {type(linear).__name__}: {reason}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._register(base_of(linear), config, adapter_dtype)
        layer.reset_adapter()
        return layer.train(linear.training)

    def _register(self, base: Base | None, config: GLoRAConfig, adapter_dtype: torch.dtype | None) -> None:
        check_config(config)
        if base is None:
            raise ValueError("a linear layer without a weight cannot be adapted")
        weight, bias = base.weight, base.bias
        for name, dtype in (("dtype", base.dtype), ("adapter_dtype", adapter_dtype or base.dtype)):
            check_dtype(name, dtype)
        self.out_features, self.in_features = base.shape
        self.config = config
        shapes = config.parameter_shapes(self.in_features, self.out_features, bias is not None)
        parameters: dict[str, nn.Parameter | None] = {
            name: nn.Parameter(torch.empty(shapes[name], device=weight.device, dtype=adapter_dtype or base.dtype))
            if name in shapes
            else None
            for name in ADAPTER_NAMES
        }
        for frozen in (weight, bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self._transposed = base.transposed
        self.quant_state, self.compute_dtype = base.quant_state, base.compute_dtype
        self._base: Kept | None = None  # while merged: W and b, in host memory
        self._disabled = 0  # how many `disabled` contexts the layer is in
        self._beta: Tensor | None = None  # inside `shift_once`: the full bias
        self._deferred: DeferredLinear | None = None  # inside `deferred_shared_grads`: what to call
        self._siblings: SiblingGroup | None = None  # the layers that read the same input, this one among them ...
        self._place = 0  # ... and which of them it is
        # What a forward would otherwise work out each time.
        self._scale = config.scale
        self._dropout = config.dropout if config.B == "lora" else 0.0
        self._variant = config.variant

    def _apply(self, fn: Any, recurse: bool = True) -> GLoRALinear:
        """As PyTorch's, but a factor that layers share stays one.

        Where a parameter cannot be changed in place (to and from the meta device) PyTorch makes a new one for each
        module that has it.
        """
        before = dict(self._parameters)
        super()._apply(fn, recurse)
        for name in ADAPTER_NAMES:
            old, new = before[name], self._parameters[name]
            if old is not None and new is not None and new is not old:
                self._parameters[name] = vars(old).setdefault("_glora_moved", new)
        return self

    def reset_parameters(self) -> None:
        """Initialise the base as `nn.Linear` does, and the adapter. Overwrites a pretrained base.

        Raises:
            RuntimeError: the base is in 4 bits, which no random numbers are written to.
        """
        if self.quant_state is not None:
            raise RuntimeError("reset_parameters: the base is in 4 bits; reset_adapter() leaves it as it is")
        nn.init.kaiming_uniform_(self.weight.t() if self._transposed else self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Make the layer equal to its base: `_down` factors random (`config.init`), everything else zero."""
        initialize(self.adapter(), self.config.init)

    def adapter(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters that exist, by name."""
        found = {name: getattr(self, name) for name in ADAPTER_NAMES}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    @property
    def merged(self) -> bool:
        """Whether `weight` and `bias` hold the merged values."""
        return self._base is not None

    @property
    def base_bias(self) -> Tensor | None:
        """b, the bias of the base: `bias`, or while merged the copy of it in host memory."""
        return self.bias if self._base is None else self._base.bias

    def forward(self, x: Tensor) -> Tensor:
        """The output y, (..., N), of an x (..., K); the errors of `ops.glora_linear`, and one of its own.

        Raises:
            RuntimeError: the layer is merged, in training mode, and gradients are enabled; or it is grouped with
                siblings (`fuse_siblings`), and one of them was called with another tensor.
        """
        siblings = self._siblings
        if siblings is not None and (y := siblings.output(self, x)) is not None:
            return y
        # One dictionary look-up a parameter: attribute access on a module costs ten times as much.
        p: dict[str, Tensor | None] = self._parameters  # type: ignore[assignment]
        if len(p) < len(_NAMES):  # data parallel replicas keep their parameters as attributes
            p = {name: getattr(self, name) for name in _NAMES}
        stored, bias = p["weight"], p["bias"]
        assert stored is not None
        state, dtype = self.quant_state, None
        weight: Weight = stored
        if state is not None:
            weight = QuantizedWeight(stored, state)
            check_floating(x)
            if self.compute_dtype is not None:
                x, bias, dtype = (
                    x.to(self.compute_dtype),
                    None if bias is None else bias.to(self.compute_dtype),
                    x.dtype,
                )
        elif self._transposed:
            weight = stored.t()
        if self._disabled or self._base is not None:
            if not self._disabled and self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "this layer is merged: its adapter takes no part in forward and would not be trained. To "
                    "train, call unmerge(); to run the merged weights, call eval() or use torch.no_grad()"
                )
            if isinstance(weight, Tensor):
                return F.linear(x, weight, bias)
            y = glora_linear(x, weight, bias)
            return y if dtype is None else y.to(dtype)
        c, c_up, d, e, wc = p["C"], p["C_up"], p["D"], p["E"], None
        if self._beta is not None:  # of which all of these are part
            bias, d, e = self._beta, None, None
        elif c is not None or c_up is not None:
            wc = glora_wc(weight, c, c_up=c_up, c_down=p["C_down"])
        dropout_p, seed = self._dropout if self.training else 0.0, None
        if dropout_p:
            seed = dropout_seed(x.device) if siblings is None else siblings.seed(self, x)
        linear = glora_linear if self._deferred is None else self._deferred
        y = linear(
            x,
            weight,
            bias,
            a=p["A"],
            a_up=p["A_up"],
            a_down=p["A_down"],
            b=p["B"],
            b_up=p["B_up"],
            b_down=p["B_down"],
            wc=wc,
            d=d,
            e=e,
            scale=self._scale,
            dropout_p=dropout_p,
            seed=seed,
            variant=self._variant,
        )
        return y if dtype is None else y.to(dtype)

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
            RuntimeError: the layer is merged already, or disabled; or the base is in 4 bits, without `requantize`.
            ValueError: the layer is sharded; or its base is in 4 bits and W_eff holds NaN or inf.
        """
        self.check_mergeable()
        if self.quant_state is None:
            weight, bias = self._effective()
            merged, report = Kept(weight.t() if self._transposed else weight, bias), None
        else:
            refuse_sharded(self, "merge", UNSHARD)
            merged, report = requantized(self)
            if not requantize:
                raise RuntimeError(f"merge: {refusal(self, report)}")
        base = keep(self)
        # Nothing below can fail: a layer is never half merged.
        write(self, merged)
        self._base = base
        return report

    def check_mergeable(self) -> None:
        """The errors of `merge` that depend on the state of the layer."""
        if self._base is not None:
            raise RuntimeError("merge() was called on a layer that is merged already; call unmerge() first")
        if self._disabled:
            raise RuntimeError("merge() was called inside disabled(model); leave that context first")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base back as it was, bit for bit.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if self._base is None:
            raise RuntimeError("unmerge() was called on a layer that is not merged")
        write(self, self._base)
        self._base = None

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
        return merged, None if beta is None else beta.to(beta_dtype)

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
        # Loaded into a merged layer, a base would be lost at unmerge and an adapter would have no effect.
        if self._base is not None and any(prefix + name in state_dict for name in _NAMES):
            errors.append(f"{prefix.removesuffix('.') or 'the layer'} is merged; call unmerge() before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: one made inside a context (`disabled(model)`, say) would otherwise never leave it."""
        return self.__dict__ | {"_disabled": 0, "_beta": None, "_deferred": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._siblings is not None:
            self._siblings.join(self)

    def extra_repr(self) -> str:
        config = self.config
        parts = [f"in_features={self.in_features}, out_features={self.out_features}"]
        parts.append(f"bias={self.base_bias is not None}")
        if self.quant_state is not None:
            parts.append(describe(self.quant_state))
        supports = [f"{name}={getattr(config, name)}" for name in "ABCDE" if getattr(config, name) != "none"]
        if self.D is None:
            supports = [part for part in supports if not part.startswith("D=")]
        parts += supports
        if "lora" in (config.A, config.B, config.C):
            parts.append(f"rank={config.rank}")
        if config.B == "lora":
            parts.append(f"scale={config.scale:g}")
        if self._dropout:
            parts.append(f"dropout={config.dropout:g}")
        if config.variant != "hadamard":
            parts.append(f"variant={config.variant}")
        if self._siblings is not None and self._siblings.fused:
            parts.append(f"siblings={len(self._siblings.names)}")
        if self.merged:
            parts.append("merged")
        if self._disabled:
            parts.append("disabled")
        return ", ".join(parts)
