"""What the operators share: the weight as an argument, paths, rows, dtypes and autocast."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterable, Sequence
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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and scales are taken in: fp32 for 16-bit values."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def factor_dtype(dtype: torch.dtype, factors: Iterable[Tensor | None]) -> torch.dtype:
    """The dtype of thin products in a computation in `dtype`: fp32 where that has 16 bits and a factor is wider.

    fp32 adapters mean fp32 arithmetic in everything that multiplies them; the large products keep `dtype`.
    """
    widens = dtype.itemsize == 2 and any(t is not None and t.dtype.itemsize > 2 for t in factors)
    return torch.float32 if widens else dtype


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
