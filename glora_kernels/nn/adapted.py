"""One adapted call: what a frozen base and its adapter are made of, and the output y of an x.

    y = x (W + W∘A + s·B)ᵀ + b + b∘D + E + W·C

`GLoRALinear` and the layers of PEFT collect a `Frozen` and `Operands`, each in its own way; the call is one function.
The parameters of an adapter have the names and shapes of `GLoRAConfig.parameter_shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glora_kernels.dispatch.common import Weight
from glora_kernels.glora.op import dropout_seed
from glora_kernels.ops import glora_linear
from glora_kernels.quant import QuantizedWeight
from glora_kernels.spec import GLoRAConfig

ADAPTER_NAMES: tuple[str, ...] = ("A", "A_up", "A_down", "B", "B_up", "B_down", "C", "C_up", "C_down", "D", "E")
"""Every name that a parameter of an adapter can have, in the order in which a layer registers them."""

ABSENT: Mapping[str, Tensor | None] = dict.fromkeys(ADAPTER_NAMES)

SHIFTS = frozenset(name for name in ADAPTER_NAMES if name[0] in "CDE")
"""Those that make the full bias of a layer another than its base's."""


class Frozen(NamedTuple):
    """A base of shape (N, K). `compute_dtype`: what x is cast to over 4 bits, and y back from; None: x decides."""

    weight: Weight
    bias: Tensor | None
    compute_dtype: torch.dtype | None = None


class Operands(NamedTuple):
    """An adapter in a call. tensors: by parameter name, None where it has none (`ABSENT` with its own in their places).

    scale: s. dropout_p: of the low-rank B path; already 0 outside training.
    """

    tensors: Mapping[str, Tensor | None] = ABSENT
    scale: float = 1.0
    dropout_p: float = 0.0
    variant: str = "hadamard"

    @classmethod
    def of(cls, config: GLoRAConfig, tensors: Mapping[str, Tensor], training: bool) -> Operands:
        """An adapter of this configuration, of those tensors that it has, in training mode or not."""
        dropout_p = config.dropout if training and config.B == "lora" else 0.0
        return cls({**ABSENT, **tensors}, config.scale, dropout_p, config.variant)


def adapted_linear(
    x: Tensor,
    base: tuple[Weight, Tensor | None, torch.dtype | None],
    adapter: tuple[Mapping[str, Tensor | None], float, float, str],
    seed: Tensor | None = None,
    linear: Callable[..., Tensor] = glora_linear,
    beta: Tensor | None = None,
) -> Tensor:
    """y (..., N) of an x (..., K), in the dtype of x, under autocast in that of autocast.

    Args:
        x: the input.
        base: the fields of a `Frozen`.
        adapter: the fields of `Operands`.
        seed: the key of the dropout mask; None: one is drawn, where there is dropout.
        linear: the operator, or what stands for it.
        beta: the full bias as it is computed once for many calls, in fp32, in the place of b, C, D and E.

    Raises:
        The errors of `ops.glora_linear`.
    """
    weight, bias, compute_dtype = base
    p, scale, dropout_p, variant = adapter
    dtype = None
    if isinstance(weight, QuantizedWeight):
        check_floating(x)
        if compute_dtype is not None:
            x, bias, dtype = x.to(compute_dtype), None if bias is None else bias.to(compute_dtype), x.dtype
    if beta is not None:
        bias, p = beta, {**p, **dict.fromkeys(SHIFTS)}
    if dropout_p and seed is None:
        seed = dropout_seed(x.device)
    y = linear(
        x, weight, bias,
        a=p["A"], a_up=p["A_up"], a_down=p["A_down"],
        b=p["B"], b_up=p["B_up"], b_down=p["B_down"], scale=scale, dropout_p=dropout_p, seed=seed,
        c=p["C"], c_up=p["C_up"], c_down=p["C_down"],
        d=p["D"], e=p["E"], variant=variant,
    )  # fmt: skip
    return y if dtype is None else y.to(dtype)


def base_linear(x: Tensor, base: tuple[Weight, Tensor | None, torch.dtype | None]) -> Tensor:
    """y of the base alone, where it is dense by PyTorch's own operator."""
    weight, bias, _ = base
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else adapted_linear(x, base, Operands())


def check_floating(x: Tensor) -> None:
    """An error for an x that a cast to the dtype of computation would hide.

    Some models cast x to the dtype of the next layer's weight, which over a 4-bit base is that of its codes.
    """
    if not x.is_floating_point():
        hint = "; a model that casts x to the dtype of a layer's weight (T5's wo) must keep that layer dense"
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}{hint if x.dtype == torch.uint8 else ''}")


def weighted_sum(adapters: Sequence[Operands], weights: Iterable[float]) -> dict[str, Tensor | None]:
    """The tensors of Σ_i w_i·(W∘A_i + s_i·B_i) and Σ_i w_i·(b∘D_i + E_i + W·C_i), to be called with s = 1.

    Vectors and constants are added; factors are put side by side: [w_1·s_1·up_1, w_2·s_2·up_2, ...]·[down_1; down_2;
    ...], with s_i the scale of B, 1 of A and C. The ranks add up.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ABSENT}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, tensor in adapter.tensors.items():
            if tensor is None:
                continue
            factor = 1.0 if name.endswith("_down") else weight * (adapter.scale if name == "B_up" else 1.0)
            parts[name].append(tensor if factor == 1.0 else tensor * factor)
    tensors = dict(ABSENT)
    for name, several in parts.items():
        if several and name.endswith(("_up", "_down")):
            tensors[name] = torch.cat(several, dim=1 if name.endswith("_up") else 0)
        elif several:
            tensors[name] = sum(several[1:], several[0])
    return tensors


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
