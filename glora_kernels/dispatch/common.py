"""What the operators share: the tensors of a call by name, the vector β, checks of sizes, and autocast."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.quant import NestedState, QuantizedWeight, QuantState
from glora_kernels.quant.codes import QUANT_TYPES
from glora_kernels.quant.weight import DTYPES
from glora_kernels.runtime import environment

LIBRARY = torch.library.Library("glora_kernels", "DEF")
"""Every operator of the package is defined in this one namespace: torch.ops.glora_kernels."""


Weight = Tensor | QuantizedWeight
"""W (N, K) of a call: a matrix, or the 4-bit codes of one."""

QUANT_ARGUMENTS = (
    "Tensor? absmax=None, Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? nested_offset=None, "
    "int[] form=[]"
)
"""What the operators take beside the packed codes of a 4-bit weight ..."""
NO_QUANT: tuple[Any, ...] = (None, None, None, None, ())
"""... and beside a matrix, for which PyTorch leaves these defaults out."""


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

    x: bool
    a: bool
    a_up: bool
    a_down: bool
    b: bool
    b_up: bool
    b_down: bool
    bias: bool
    wc: bool
    d: bool
    e: bool


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


def quant_arguments(weight: Weight) -> tuple[Any, ...]:
    """The `QUANT_ARGUMENTS` of a weight; the form is N, K, type, dtype, blocksize, nested blocksize."""
    if not isinstance(weight, QuantizedWeight):
        return NO_QUANT
    state = weight.state
    found: tuple[Any, ...] | None = vars(state).get("_arguments")
    if found is None:  # a state cannot change: worked out once
        nested = state.nested
        form = (*state.shape, QUANT_TYPES.index(state.quant_type), DTYPES.index(state.dtype), state.blocksize)
        if nested is None:
            found = (state.absmax, None, None, None, (*form, 0))
        else:
            found = (state.absmax, nested.absmax, nested.code, nested.offset, (*form, nested.blocksize))
        vars(state)["_arguments"] = found
    return found


def weight_of(
    tensor: Tensor,
    absmax: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    form: Sequence[int] = (),
) -> Weight:
    """The weight of an operator's arguments; PyTorch leaves out those with their default."""
    if absmax is None:
        return tensor
    n, k, quant_type, dtype, blocksize, nested_blocksize = form
    nested = None
    if nested_absmax is not None:
        nested = NestedState(nested_absmax, given(nested_code), nested_blocksize, given(nested_offset))
    state = QuantState(absmax, QUANT_TYPES[quant_type], blocksize, (n, k), DTYPES[dtype], nested)
    return QuantizedWeight(tensor, state)


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


def check_vector(name: str, tensor: Tensor, size: int, constant: bool) -> None:
    """A vector of the given size, or where `constant` allows it one number."""
    if tensor.shape != (size,) and not (constant and tensor.shape == (1,)):
        accepted = f"{(size,)} or (1,)" if constant else f"{(size,)}"
        raise ValueError(f"{name} must have shape {accepted}; got {tuple(tensor.shape)}")


def check_form(
    name: str,
    size: int,
    constant: bool,
    rows: int,
    cols: int,
    vector: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
) -> None:
    """One support comes as a vector of `size` (or a constant), or as a pair of factors (rows, R) and (R, cols)."""
    if vector is not None:
        if up is not None or down is not None:
            raise ValueError(f"{name} and {name}_up, {name}_down are two forms of one support; give one of them")
        check_vector(name, vector, size, constant)
    elif up is not None or down is not None:
        if up is None or down is None:
            missing = f"{name}_up" if up is None else f"{name}_down"
            raise ValueError(f"{name}_up and {name}_down come together; {missing} is missing")
        if (
            up.ndim != 2
            or down.ndim != 2
            or up.shape != (rows, down.shape[0])
            or down.shape[1] != cols
            or not len(down)
        ):
            raise ValueError(
                f"{name}_up must be ({rows}, R) and {name}_down (R, {cols}) with one rank R >= 1; "
                f"got {tuple(up.shape)} and {tuple(down.shape)}"
            )


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


def read_saved(ctx: Any, with_y: bool = False) -> tuple[Any, ...]:
    """What forward saved; where a tensor of it was overwritten meanwhile, an error that says what to write instead.

    with_y: backward reads the output of the layer as well, for a trained vector or constant A.
    """
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        output = (
            "; or its output, which a trained vector or constant A needs (an activation or dropout with inplace=True)"
        )
        raise RuntimeError(
            "a tensor was overwritten in place between the forward of a layer and its backward, which needs it as it "
            "was: the layer's input (h += layer(h); write h = h + layer(h)), one of its parameters (a step of the "
            f"optimizer before backward){output if with_y else ''}; use the out-of-place form. PyTorch says: {error}"
        ) from error


def owned(grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Each gradient in memory of its own: results of an operator may share none, and ∂bias, ∂wc and ∂e may be one."""
    taken = set()
    for i, grad in enumerate(grads):
        grad = grad.contiguous()
        storage = grad.untyped_storage()
        if storage.nbytes() != grad.numel() * grad.element_size() or storage.data_ptr() in taken:
            grad = grad.clone()
        grads[i] = grad
        taken.add(grad.untyped_storage().data_ptr())
    return tuple(grads)
