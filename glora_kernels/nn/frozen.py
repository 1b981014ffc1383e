"""The frozen base of a layer, dense or 4-bit: its weight, its state dict, its moves between devices.

A 4-bit base holds the packed codes as its attribute `weight`, uint8 (P, 1), and their metadata (absmax, ...) as
`quant_state`. These are plain tensors, neither parameters nor buffers, because codes must not be averaged, cast,
decayed, pruned or broadcast, and code that does so goes through a module's parameters and buffers. The module
itself moves them between devices, saves and loads them. Only `fully_shard` makes the codes a frozen parameter, of which
FSDP2 keeps a part on each rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.dispatch.common import Weight
from glora_kernels.modes import ordinary
from glora_kernels.nn.adapted import Frozen, base_linear
from glora_kernels.quant import QuantizedWeight, QuantState, dequantize
from glora_kernels.quant.bnb import from_linear4bit, packed_bytes, to_linear4bit
from glora_kernels.quant.checkpoint import NAMES, state_from_tensors, state_tensors

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that a base and an adapter may have."""

_METADATA_NAMES = SimpleNamespace(
    **dict.fromkeys(name for name in NAMES if "." not in name),
    quant_state=SimpleNamespace(**{name.partition(".")[2]: None for name in NAMES if "." in name}),
)
"""An object with an attribute for each of `NAMES`, dotted ones nested; see `_fqn_modifiers`."""


class FrozenBase(nn.Module):
    """A module with a frozen weight (N, K), dense or 4-bit, and a bias (N,) or none.

    Attributes:
        experts: E in a layer of experts, whose weight is (E, N, K), or in 4 bits (E·N, K), and whose bias is (E, N);
            0 in a linear layer.
        kernel: of a convolution, whose weight is (N, channels, *kernel); empty in a linear layer.
        quant_state: the metadata of the packed codes; None where the weight is dense.
        compute_dtype: the dtype that x is cast to; y is cast back. None: x stays as it is.
    """

    experts = 0
    kernel: tuple[int, ...] = ()
    in_features: int
    out_features: int
    weight: Tensor
    bias: nn.Parameter | None
    quant_state: QuantState | None
    compute_dtype: torch.dtype | None
    _transposed: bool
    _cut: Any = None  # where codes are the part of one rank (`parallel.attach`), which no state dict holds
    _entries = SimpleNamespace(weight=_METADATA_NAMES)

    def hold(self, weight: QuantizedWeight) -> None:
        """Make this 4-bit weight the base, on the same memory and where possible with the same tensor objects.

        Tied layers then hold one tensor object and one state object, so that pickle and deepcopy keep them tied.
        """
        packed = weight.packed
        if packed.shape != (packed.numel(), 1) or type(packed) is not Tensor or packed.requires_grad:
            packed = packed.detach().view(-1, 1)
        self.quant_state = weight.state.map(ordinary)
        self.weight = ordinary(packed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and (state := self.__dict__.get("quant_state")) is not None:
            _check_codes(value, state, self.has_codes_as_parameter)
        super().__setattr__(name, value)

    @property
    def has_codes_as_parameter(self) -> bool:
        """Whether the codes are a parameter, as `fully_shard` makes them."""
        return self.quant_state is not None and "weight" in self._parameters

    def make_codes_a_parameter(self, parameter: nn.Parameter) -> None:
        """Put a frozen parameter on the memory of the codes in their place; layers on the same codes are given one."""
        del self.__dict__["weight"]
        self.register_parameter("weight", parameter)

    @property
    def is_linear(self) -> bool:
        """Whether a call is one product of rows with W: neither experts nor a convolution."""
        return not self.experts and not self.kernel

    def base_weight(self) -> Weight:
        """W (N, K): the parameter, transposed if it is stored as (K, N), or the 4-bit weight."""
        if self.quant_state is not None:
            return self.codes()
        return self.weight.mT if self._transposed else self.weight

    def codes(self) -> QuantizedWeight:
        """The 4-bit weight; the base must be 4-bit."""
        assert self.quant_state is not None
        return QuantizedWeight(self.weight, self.quant_state)

    def frozen(self) -> Frozen:
        """The base in the form that `adapted_linear` takes."""
        return Frozen(self.base_weight(), self.bias, self.compute_dtype)

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype computed in without autocast: that of W, for a 4-bit base `compute_dtype` if it is set."""
        if self.quant_state is not None:
            return self.compute_dtype or self.quant_state.dtype
        return self.weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.change_codes(lambda tensor: _moved(tensor, fn))
        return self

    def change_codes(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the codes and every tensor of their metadata by `change(tensor)`; a dense base is left alone."""
        if self.has_codes_as_parameter:
            self.quant_state = self.quant_state.map(change)  # type: ignore[union-attr]
        elif self.quant_state is not None:
            self.hold(QuantizedWeight(change(self.weight), self.quant_state.map(change)))

    def _fqn_modifiers(self) -> dict[str, str]:
        """For `torch.distributed.checkpoint`, which resolves keys by `getattr`: look up "weight.*" in `_entries`."""
        return {} if self.quant_state is None else {"weight": "_entries"}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.quant_state is not None and self._cut is None:
            destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quant_state is not None and self._cut is None:
            destination |= {f"{prefix}weight.{k}": v for k, v in state_tensors(self.quant_state).items()}
        if self._cut is not None and self.has_codes_as_parameter:
            del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *found: Any) -> None:
        _, missing, unexpected, errors = found
        name = prefix + "weight"
        parts = {part: state_dict[f"{name}.{part}"] for part in NAMES if f"{name}.{part}" in state_dict}
        known = {f"{name}.{part}" for part in parts}
        if (state := self.quant_state) is None:
            if parts:
                errors.append(f"{name} is in 4 bits and this layer's is dense; build the layer with quantize()")
                return
        elif self._cut is not None:
            if name in state_dict:
                errors.append(f"{name}: the codes of this layer are cut over ranks; load them before the model is cut")
                return
        elif name in state_dict:
            known.add(name)
            try:
                if self.has_codes_as_parameter:  # which `nn.Module` loads as any other
                    self.quant_state = state.written(_like(state, state_from_tensors(parts, state.absmax.device)))
                else:
                    self._load_codes(state, state_dict[name], parts, metadata.get("assign_to_params_buffers", False))
            except (ValueError, TypeError, RuntimeError) as error:
                errors.append(f"{name}: {error}")
                return
        else:
            own = [name, *(f"{name}.{part}" for part in state_tensors(state))]
            missing.extend(key for key in own if key not in state_dict)
        super()._load_from_state_dict(state_dict, prefix, metadata, *found)
        unexpected[:] = [key for key in unexpected if key not in known]
        if self._cut is not None and self.has_codes_as_parameter:
            missing[:] = [key for key in missing if key != name]

    def _load_codes(self, mine: QuantState, given: Tensor, parts: dict[str, Tensor], assign: bool) -> None:
        """Load the codes of a state dict, in place unless `assign`; an error changes nothing."""
        if self.weight.is_meta and not assign:
            warnings.warn(
                "a 4-bit layer on the meta device has no memory to load into; use to_empty(device=...) first, or "
                "load_state_dict(assign=True)",
                stacklevel=2,
            )
            return
        if not parts and given.dtype != torch.uint8:
            raise ValueError(f"it is dense ({given.dtype}) and this layer's is in 4 bits; load first, then quantize()")
        codes = packed_bytes(given).to(given.device if assign else self.weight.device)
        new = QuantizedWeight(codes, state_from_tensors(parts, codes.device))
        _like(mine, new.state)
        if assign:
            self.hold(new)
        else:
            self.quant_state = mine.written(new.state)
            self.weight.copy_(codes.view(-1, 1))


class QuantizedLinear(FrozenBase):
    """y = xWᵀ + b with W in 4 bits: a frozen linear layer, made by `quantize` or from a bitsandbytes `Linear4bit`.

    Shapes: x (..., K), y (..., N). Each call dequantizes W into a reused workspace; at small M on a GPU a kernel reads
    the codes directly. The state dict is that of a `Linear4bit`.

    Args:
        weight: the codes and their metadata.
        bias: (N,), or None.
        compute_dtype: the dtype that x is cast to; y is cast back. None: x stays as it is.

    Examples:
        >>> gk.quantize(nn.Linear(64, 32), "nf4")
        QuantizedLinear(in_features=64, out_features=32, bias=True, nf4, blocksize=64)
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"weight must be a QuantizedWeight, got {type(weight).__name__}; see quantize()")
        self.out_features, self.in_features = weight.shape
        check_dtype("compute_dtype", compute_dtype)
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must have shape ({self.out_features},); got {tuple(bias.shape)}")
        self.hold(weight)
        with torch.inference_mode(False):
            self.bias = None if bias is None else nn.Parameter(ordinary(bias.detach()), requires_grad=False)
        self.compute_dtype, self._transposed = compute_dtype, False

    @classmethod
    def from_linear4bit(cls, linear: nn.Module) -> QuantizedLinear:
        """A layer on the memory of a bitsandbytes `Linear4bit`; a ValueError where its weight cannot be taken."""
        layer = cls(from_linear4bit(linear), linear.bias, getattr(linear, "compute_dtype", None))  # type: ignore[arg-type]
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) in the dtype of x; the errors of `ops.glora_linear`."""
        return base_linear(x, self.frozen())

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A frozen `nn.Linear` with the dequantized weight. dtype None: `base_dtype`."""
        dtype = dtype or self.base_dtype
        check_dtype("dtype", dtype)
        bias = None if self.bias is None else self.bias.to(dtype, copy=True)
        return plain_linear(dequantize(self.codes(), dtype), bias).train(self.training)

    def to_linear4bit(self) -> Any:
        """A bitsandbytes `Linear4bit` on the same memory.

        Raises:
            ImportError: bitsandbytes is not installed.
        """
        return to_linear4bit(self.codes(), self.bias, self.compute_dtype).train(self.training)

    def extra_repr(self) -> str:
        assert self.quant_state is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{describe(self.quant_state)}"
        )


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply the function of `Module._apply` to a tensor, but keep its dtype and shape: only the device may change."""
    moved = fn(tensor)
    return moved if (moved.dtype, moved.shape) == (tensor.dtype, tensor.shape) else tensor.to(moved.device)


def _like(mine: QuantState, given: QuantState) -> QuantState:
    """The given state, if it is of a weight of the same shape; else a ValueError."""
    if given.shape != mine.shape:
        raise ValueError(f"it has shape {given.shape}, the layer {mine.shape}")
    return given


def _check_codes(value: Any, state: QuantState, as_parameter: bool) -> None:
    """Raise an error where something other than codes is assigned to the weight of a 4-bit layer."""
    if isinstance(value, Tensor) and isinstance(value, nn.Parameter) is as_parameter and value.dtype == torch.uint8:
        QuantizedWeight(value, state)
        return
    given = type(value).__name__
    if isinstance(value, Tensor):
        given += f" of {dtype_name(value.dtype)}, shape {tuple(value.shape)}"
    raise TypeError(
        f"the weight of this layer is in 4 bits ({describe(state)}, {state.shape[0]}x{state.shape[1]}) and takes "
        f"uint8 codes, no {given}. If it is to share the weight of another module (tie_weights() of transformers: "
        "the head and the embedding), leave it out of quantize(target_modules=...)"
    )


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen `nn.Linear` on these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def check_dtype(argument: str, dtype: torch.dtype | None) -> None:
    """Raise a ValueError for a dtype that is not supported; None is accepted."""
    if dtype not in (None, *DTYPES):
        given = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ValueError(f"{argument} must be one of {', '.join(map(dtype_name, DTYPES))}; got {given}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(state: QuantState) -> str:
    """A quantization in a few words, for `repr`."""
    nested = ", double_quant" if state.nested is not None else ""
    return f"{state.quant_type}, blocksize={state.blocksize}{nested}"
