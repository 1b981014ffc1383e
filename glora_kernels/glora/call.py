"""The data of a `glora_linear` call: its tensors, its numbers, the results of forward and the wanted gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.dispatch.common import Weight, cast, given, wide_dtype
from glora_kernels.quant import QuantizedWeight


class Supports(NamedTuple):
    """The tensors of one call other than x and W; an absent one is None.

    a (N,) or (1,): A as a vector or constant. a_up (N,R), a_down (R,K): A=lora (in the product variant a_up is
    (K,R)). b (N,) or (1,): B as a vector or constant. b_up (N,R), b_down (R,K): B=lora. bias (N,): of the base.
    wc (N,): W·c, normally in fp32 (`glora.wc`). d (N,) or (1,), only with a bias. e (N,) or (1,).
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

    @property
    def factors(self) -> tuple[Tensor | None, ...]:
        """The low-rank factors, from whose dtypes `common.factor_dtype` follows."""
        return self.a_up, self.a_down, self.b_up, self.b_down


class C(NamedTuple):
    """The support C: c (K,), or C=lora as c_up (K,R) and c_down (R,1)."""

    c: Tensor | None = None
    c_up: Tensor | None = None
    c_down: Tensor | None = None


class Call(NamedTuple):
    """The numbers of one call, and the dropout seed.

    scale: s on the low-rank B path. dropout_p: p of that path. seed: one int64 on the CPU or the device of x, or
    None where p = 0. matmul: A=lora is the product variant. route: as `runtime.routes.route` says. columns_before: of
    the dropout mask, where x is a part of the columns of a matrix.
    """

    scale: float
    dropout_p: float
    seed: Tensor | None
    matmul: bool
    route: str
    columns_before: int = 0


class Made(NamedTuple):
    """The results of forward: y (M,N), and what backward may read; None where backward does not.

    h (M,·) = [P | s·x̃·B_downᵀ]; sigma (M,), σ; u (N,P), U; mask: the dropout mask, on the eager path only; wc: W·c, in
    a call that has C.
    """

    y: Any
    h: Any = None
    sigma: Any = None
    u: Any = None
    mask: Any = None
    wc: Any = None


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

    @property
    def shift(self) -> bool:
        """Whether any of the terms of β needs a gradient."""
        return self.bias or self.wc or self.d or self.e


def shift(s: Supports, dtype: torch.dtype) -> Tensor | None:
    """β = bias∘(1+d) + e + wc, which is added to every row of y, for a computation in `dtype`.

    (N,), or (1,) where only a constant e is given. In fp32 for 16-bit dtypes, so that a small e is not lost when added
    to the bias. Returns the bias itself where d, e and wc are None, and None where all are.
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


def wc_dtype(weight: Weight, c: C) -> torch.dtype:
    """The dtype of W·c: `wide_dtype` of W's; but float64 for a 4-bit W (its codes fit any dtype) and a float64 c."""
    factor = given(c.c if c.c_up is None else c.c_up)
    if isinstance(weight, QuantizedWeight) and factor.dtype == torch.float64:
        return torch.float64
    return wide_dtype(weight.dtype)
