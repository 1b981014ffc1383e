"""What the operators share: the tensors of a call by name, the vector β, checks of sizes, and autocast."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.quant import NestedState, QuantizedWeight, QuantState
from glora_kernels.quant.codes import QUANT_TYPES
from glora_kernels.quant.weight import DTYPES
from glora_kernels.runtime import environment

Weight = Tensor | QuantizedWeight
"""W (N, K) of a call: a matrix, or the 4-bit codes of one."""


class Codes(NamedTuple):
    """What operators take beside the packed codes of a 4-bit weight; the defaults beside a matrix.

    form: N, K, type, dtype, blocksize, nested blocksize.
    """

    absmax: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    form: Sequence[int] = ()


_MATRIX = Codes()


@functools.cache
def path_of(operator: str, route: str) -> Any:
    """The module that serves a route of an operator: its `eager`, or its `triton`, loaded with the kernels when asked.

    Raises:
        RuntimeError: triton is not installed, or half of it is interpreted.
    """
    if route != "eager":
        environment.require_triton()
    return importlib.import_module(f"glora_kernels.{operator}.{'eager' if route == 'eager' else 'triton'}")


class Supports(NamedTuple):
    """The tensors of one call beside x and W; an absent one is None.

    a (N,) or (1,): A as a vector or constant. a_up (N,R), a_down (R,K): A=lora (in the product variant a_up is
    (K,R)). b (N,) or (1,): B as a vector or constant. b_up (N,R), b_down (R,K): B=lora. bias (N,): of the base.
    wc (N,): W·c, normally in fp32 (`glora.wc`). d (N,) or (1,), only beside a bias. e (N,) or (1,).
    """

    a: Tensor | None = None
    a_up: Tensor | None = None
    a_down: Tensor | None = None
    b: Tensor | None = None
    b_up: Tensor | None = None
    b_down: Tensor | None = None
    bias: Tensor | None = None
    wc: Tensor | None = None
    d: Tensor | None = None
    e: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients a backward must produce, in the order it returns them: x, then the order of `Supports`."""

    x: bool = False
    a: bool = False
    a_up: bool = False
    a_down: bool = False
    b: bool = False
    b_up: bool = False
    b_down: bool = False
    bias: bool = False
    wc: bool = False
    d: bool = False
    e: bool = False


class Call(NamedTuple):
    """The values of one call that are no tensors, and the dropout seed.

    scale: s on the low-rank B path. dropout_p: p of that path. seed: one int64 on the CPU or the device of x, or
    None where p = 0; on the eager path also the mask that it stands for, (M,K) bool.
    matmul: A=lora is the product variant. route: "eager", "triton", or over a 4-bit weight also "cuda" and "auto"
    (`four_bit.kinds`).
    """

    scale: float
    dropout_p: float
    seed: Tensor | None
    matmul: bool
    route: str


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that the call's own rules say is there: anything else is a fault of ours, and no silent None."""
    if tensor is None:
        raise AssertionError("a tensor that backward needs was not saved by forward")
    return tensor


def stored(weight: Weight) -> Tensor:
    """The tensor that holds the weight: itself, or the packed codes."""
    return weight.packed if isinstance(weight, QuantizedWeight) else weight


def codes_of(weight: Weight) -> Codes:
    if not isinstance(weight, QuantizedWeight):
        return _MATRIX
    state = weight.state
    found: Codes | None = vars(state).get("_codes")
    if found is None:  # a state cannot change: worked out once
        nested = state.nested
        form = (*state.shape, QUANT_TYPES.index(state.quant_type), DTYPES.index(state.dtype), state.blocksize)
        if nested is None:
            found = Codes(state.absmax, form=(*form, 0))
        else:
            found = Codes(state.absmax, nested.absmax, nested.code, nested.offset, (*form, nested.blocksize))
        vars(state)["_codes"] = found
    return found


def weight_of(tensor: Tensor, codes: Codes) -> Weight:
    """The weight of an operator's arguments."""
    if codes.absmax is None:
        return tensor
    n, k, quant_type, dtype, blocksize, nested_blocksize = codes.form
    nested = None
    if codes.nested_absmax is not None:
        nested = NestedState(
            codes.nested_absmax, given(codes.nested_code), nested_blocksize, given(codes.nested_offset)
        )  # fmt: skip
    state = QuantState(codes.absmax, QUANT_TYPES[quant_type], blocksize, (n, k), DTYPES[dtype], nested)
    return QuantizedWeight(tensor, state)


def flat(tensor: Tensor) -> Tensor:
    """(..., C) as the matrix of its rows."""
    return tensor if tensor.ndim == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def unflat(y: Tensor, lead: Sequence[int]) -> Tensor:
    """(M, C) as (*lead, C): no view, since PyTorch refuses to change one in place that came out of a Function."""
    return y if len(lead) == 1 else torch.ops.aten._unsafe_view(y, [*lead, y.shape[-1]])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a `to` that does nothing costs a microsecond


def shift(s: Supports, dtype: torch.dtype) -> Tensor | None:
    """β = bias∘(1+d) + e + wc of a computation in `dtype`: what is added to every row of y.

    (N,), or (1,) where it is a constant e alone; in fp32 over 16 bits, where a small e must survive its addition to
    the bias. The bias itself where d, e and wc are absent, None where all are.
    """
    if s.d is None and s.e is None and s.wc is None:
        return s.bias
    wide = wide_dtype(dtype)
    beta = None if s.bias is None else cast(s.bias, wide)
    if beta is not None and s.d is not None:
        beta = torch.addcmul(beta, beta, cast(s.d, wide))
    for term in (s.e, s.wc):
        if term is not None:
            beta = cast(term, wide) if beta is None else beta + cast(term, wide)
    return beta


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and scales are taken in: fp32 for 16-bit values."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def factor_dtype(dtype: torch.dtype, s: Supports) -> torch.dtype:
    """The dtype of h, S and U in a computation in `dtype`: fp32 where that has 16 bits and a factor is wider.

    fp32 adapters mean fp32 arithmetic in everything that multiplies them; the large products keep `dtype`.
    """
    factors = (s.a_up, s.a_down, s.b_up, s.b_down)
    widens = dtype.itemsize == 2 and any(t is not None and t.dtype.itemsize > 2 for t in factors)
    return torch.float32 if widens else dtype


def wc_dtype(weight: Weight, c: Tensor | None, c_up: Tensor | None) -> torch.dtype:
    """The dtype of W·c: the wide one of W; beside a 4-bit W, which is exact in any, float64 for a float64 c."""
    factor = given(c if c_up is None else c_up)
    if isinstance(weight, QuantizedWeight) and factor.dtype == torch.float64:
        return torch.float64
    return wide_dtype(weight.dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants for a matrix product of x, or None: the rule F.linear follows."""
    if not torch._C._is_any_autocast_enabled():  # a third of the price of asking for a device
        return None
    device_type = x.device.type
    if (
        device_type != "meta"
        and torch.is_autocast_enabled(device_type)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside an operator the dtypes are settled: a product in fp32 must stay one."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
