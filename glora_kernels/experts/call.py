"""The data of a call over experts: its tensors, its numbers, the results of forward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from glora_kernels.experts.groups import Groups


class Inputs(NamedTuple):
    """x: of the tokens (T, K), or of sorted rows (M, K). weight: W (E, N, K), or the codes of one (E·N, K).

    starts, order: see `Groups`.
    """

    x: Tensor
    weight: Tensor
    starts: Tensor
    order: Tensor | None


class Terms(NamedTuple):
    """What each expert adds; None where absent.

    a (E,N) or (E,1): A as vectors or constants. up (E,N,R), down (E,R,K). b (E,N) or (E,1): B as vectors or constants.
    beta (E,N) or (E,1): β. seed: one int64, where p > 0.
    """

    a: Tensor | None
    up: Tensor | None
    down: Tensor | None
    b: Tensor | None
    beta: Tensor | None
    seed: Tensor | None


class Call(NamedTuple):
    """scale: s. dropout_p: p. each: rows of a token. of_tokens: x is that of the tokens. is_sorted: so are y's rows."""

    scale: float
    dropout_p: float
    each: int
    of_tokens: bool
    is_sorted: bool
    route: str

    @property
    def low_scale(self) -> float:
        """s / (1-p), the factor of h and of S."""
        return self.scale / (1.0 - self.dropout_p)


class Made(NamedTuple):
    """The results of forward: y (M,N), and what backward may read: h (M,R) and sigma (M,), of sorted rows."""

    y: Any
    h: Any = None
    sigma: Any = None


class Needs(NamedTuple):
    """Which gradients a backward must produce, in the order it returns them."""

    x: bool = False
    a: bool = False
    up: bool = False
    down: bool = False
    b: bool = False
    beta: bool = False


def groups_of(inputs: Inputs, call: Call) -> Groups:
    return Groups(inputs.starts, inputs.order, call.each)
