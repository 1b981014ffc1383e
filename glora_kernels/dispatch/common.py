"""Helpers that all operators share: the weight as an argument, choosing a module, reshaping, dtypes and autocast."""

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
from glora_kernels.runtime import environment, routes

Weight = Tensor | QuantizedWeight
"""The weight W (N, K) of a call: a dense matrix, or 4-bit codes."""


class Codes(NamedTuple):
    """The metadata that operators take with the packed codes of a 4-bit weight; a dense weight has the defaults.

    form: N, K, type, dtype, blocksize, nested blocksize.
    """

    absmax: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    form: Sequence[int] = ()


_MATRIX = Codes()


_INVARIANT = {
    ("glora", "eager"): "by_rows",
    **dict.fromkeys([(operator, path) for operator in ("grouped", "multi") for path in ("eager", "triton")], "apart"),
}
"""The modules that take the place of these inside `batch_invariant`; `glora.triton` serves both."""


@functools.cache
def path_of(operator: str, route: str) -> Any:
    """The module that computes an operator on a route: its `eager`, or its `triton`, which is imported here only.

    Raises:
        RuntimeError: triton is not installed, or half of it is interpreted.
    """
    name = "eager" if routes.is_eager(route) else "triton"
    if name == "triton":
        environment.require_triton()
    if routes.is_invariant(route):
        name = _INVARIANT.get((operator, name), name)
    return importlib.import_module(f"..{operator}.{name}", __package__)


LINE = 64
"""Bytes: what PyTorch's allocators align to, and processors load at once."""


def settled(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it does not lie as fresh memory does: contiguous, from a multiple of 64 bytes on."""
    plain = tensor.stride() == torch.empty(tensor.shape, device="meta").stride() and tensor.data_ptr() % LINE == 0
    return tensor if plain else tensor.clone(memory_format=torch.contiguous_format)


def given(tensor: Tensor | None) -> Tensor:
    """The tensor itself, which this call must have; None is an error of this package."""
    if tensor is None:
        raise AssertionError("an operand that this call must have is None: an error in glora_kernels")
    return tensor


def stored(weight: Weight) -> Tensor:
    """The tensor that holds the weight: the matrix itself, or the packed codes."""
    return weight.packed if isinstance(weight, QuantizedWeight) else weight


def codes_of(weight: Weight) -> Codes:
    """The metadata of a weight as arguments of an operator."""
    if not isinstance(weight, QuantizedWeight):
        return _MATRIX
    state = weight.state
    found: Codes | None = vars(state).get("_codes")
    if found is None:  # computed once, since a state cannot change
        nested = state.nested
        form = (*state.shape, QUANT_TYPES.index(state.quant_type), DTYPES.index(state.dtype), state.blocksize)
        if nested is None:
            found = Codes(state.absmax, form=(*form, 0))
        else:
            found = Codes(state.absmax, nested.absmax, nested.code, nested.offset, (*form, nested.blocksize))
        vars(state)["_codes"] = found
    return found


def weight_of(tensor: Tensor, codes: Codes) -> Weight:
    """The weight, from an operator's arguments; the inverse of `stored` and `codes_of`."""
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
    """(..., C) reshaped to (M, C)."""
    return tensor if tensor.ndim == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def unflat(y: Tensor, lead: Sequence[int]) -> Tensor:
    """(M, C) as (*lead, C), not by `view`: PyTorch forbids in-place changes of a view that a Function returned."""
    return y if len(lead) == 1 else torch.ops.aten._unsafe_view(y, [*lead, y.shape[-1]])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a `to` that does nothing costs a microsecond


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and scales: fp32 for 16-bit values, else `dtype` itself."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def factor_dtype(dtype: torch.dtype, factors: Iterable[Tensor | None]) -> torch.dtype:
    """The dtype of products with low-rank factors: fp32 where `dtype` has 16 bits and a factor is wider, else `dtype`.

    So everything that multiplies an fp32 adapter is computed in fp32; the large products keep `dtype`.
    """
    widens = dtype.itemsize == 2 and any(t is not None and t.dtype.itemsize > 2 for t in factors)
    return torch.float32 if widens else dtype


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast wants for a matrix product of x, or None: the rule F.linear follows."""
    if not torch._C._is_any_autocast_enabled():  # a third of the time that asking about one device takes
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
    """Autocast off: inside an operator the dtypes are already chosen, and an fp32 product must stay fp32."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
