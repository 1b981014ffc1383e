"""One call of an adapted layer: the frozen base and the adapter as a call takes them, and the function that computes y.

    y = x (W + W∘A + s·B)ᵀ + b + b∘D + E + W·C

`GLoRALinear` and our layers for PEFT each collect the fields of a `Frozen` and of `Operands`; both call
`adapted_linear`. The parameters of an adapter have the names and shapes of `GLoRAConfig.parameter_shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glora_kernels.dispatch.common import Weight
from glora_kernels.glora.op import dropout_seed
from glora_kernels.ops import AdapterSet, glora_linear, multi_glora_linear
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import routes
from glora_kernels.runtime.environment import is_capturing
from glora_kernels.spec import GLoRAConfig

ADAPTER_NAMES: tuple[str, ...] = ("A", "A_up", "A_down", "B", "B_up", "B_down", "C", "C_up", "C_down", "D", "E")
"""Every name that a parameter of an adapter can have, in the order in which a layer registers them."""

ABSENT: Mapping[str, Tensor | None] = dict.fromkeys(ADAPTER_NAMES)

SHIFTS = frozenset(name for name in ADAPTER_NAMES if name[0] in "CDE")
"""The names of the parameters that change the full bias β = b + b∘D + E + W·C."""


class Frozen(NamedTuple):
    """A frozen base: weight W (N, K), dense or 4-bit, and bias (N,) or None.

    compute_dtype: with a 4-bit weight, x is cast to it and y back to the dtype of x. None: x keeps its dtype.
    """

    weight: Weight
    bias: Tensor | None
    compute_dtype: torch.dtype | None = None


class Operands(NamedTuple):
    """The adapter in one call.

    tensors: every name of `ADAPTER_NAMES` is a key; None where the adapter has no such parameter. scale: s. There is
    no s_A: A_up comes multiplied by it (`with_scale_A`).
    dropout_p: dropout on x in the low-rank B path; the caller passes 0 in eval mode.
    """

    tensors: Mapping[str, Tensor | None] = ABSENT
    scale: float = 1.0
    dropout_p: float = 0.0
    variant: str = "hadamard"

    @classmethod
    def of(cls, config: GLoRAConfig, tensors: Mapping[str, Tensor], training: bool) -> Operands:
        """The operands of an adapter with this configuration; `tensors` holds only the parameters that it has."""
        dropout_p = config.dropout if training and config.B == "lora" else 0.0
        return cls({**ABSENT, **with_scale_A(tensors, config.scale_A)}, config.scale, dropout_p, config.variant)


def with_scale_A(tensors: Mapping[str, Any], scale_A: float) -> Mapping[str, Any]:
    """The supports with s_A·A_up in the place of A_up, which is all that a scale of A is to a call."""
    if scale_A == 1.0 or tensors.get("A_up") is None:
        return tensors
    return {**tensors, "A_up": tensors["A_up"] * scale_A}


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
        base: a `Frozen`, or a plain tuple of its fields, which costs less host time.
        adapter: `Operands`, or a plain tuple of its fields.
        seed: of the dropout mask; None: one is drawn if there is dropout.
        linear: `glora_linear`, or a callable with its signature (`DeferredLinear`, inside deferred_shared_grads).
        beta: the full bias in fp32, computed beforehand (`shift_once`); it replaces b, C, D and E.

    Raises:
        The errors of `ops.glora_linear`.
    """
    weight, bias, compute_dtype = base
    tensors, scale, dropout_p, variant = adapter
    back_to = None
    if isinstance(weight, QuantizedWeight):
        x, bias, back_to = _for_codes(x, bias, compute_dtype)
    if beta is not None:
        bias, tensors = beta, {**tensors, **dict.fromkeys(SHIFTS)}
    if dropout_p and seed is None:
        seed = dropout_seed(x.device)
    y = linear(
        x, weight, bias,
        a=tensors["A"], a_up=tensors["A_up"], a_down=tensors["A_down"],
        b=tensors["B"], b_up=tensors["B_up"], b_down=tensors["B_down"], scale=scale, dropout_p=dropout_p, seed=seed,
        c=tensors["C"], c_up=tensors["C_up"], c_down=tensors["C_down"],
        d=tensors["D"], e=tensors["E"], variant=variant,
    )  # fmt: skip
    return y if back_to is None else y.to(back_to)


def mixed_linear(
    x: Tensor, base: Frozen, adapters: Sequence[Operands], rows: Tensor, kept: dict[str, Any] | None = None
) -> Tensor:
    """y (..., N) of an x (..., K) whose rows have an adapter each, in the dtype of x.

    Args:
        x: the input.
        base: under all of them.
        adapters: each with dropout draws a mask of its own.
        rows: the number of the adapter of each row of x, of shape (...); -1: the base alone.
        kept: the layer's own, in which the adapters stay as they were laid out, until they are others.

    Raises:
        The errors of `ops.multi_glora_linear`.
    """
    weight, bias, compute_dtype = base
    back_to = None
    if isinstance(weight, QuantizedWeight):
        x, bias, back_to = _for_codes(x, bias, compute_dtype)
    if kept is None or torch.compiler.is_compiling():
        chosen = _set_of(adapters)
    else:
        chosen = _kept_set(adapters, kept)
    if any(adapter.dropout_p for adapter in adapters):
        chosen = chosen.with_seeds([dropout_seed(x.device) for adapter in adapters if adapter.dropout_p])
    y = multi_glora_linear(x, weight, bias, chosen, rows)
    return y if back_to is None else y.to(back_to)


def _set_of(adapters: Sequence[Operands]) -> AdapterSet:
    return AdapterSet([
        {name.lower(): tensor for name, tensor in tensors.items() if tensor is not None}
        | {"scale": scale, "variant": variant, "dropout_p": dropout_p}
        for tensors, scale, dropout_p, variant in adapters
    ])  # fmt: skip


def _kept_set(adapters: Sequence[Operands], kept: dict[str, Any]) -> AdapterSet:
    """`_set_of`, the one that is kept where these adapters are those of the call before."""
    numbers = [adapter[1:] for adapter in adapters]
    tensors = [tensor for adapter in adapters for tensor in adapter.tensors.values()]
    known: tuple[Any, list[Tensor | None], AdapterSet] | None = kept.get(_SET)
    if known and known[0] == numbers and len(known[1]) == len(tensors) and all(map(is_, known[1], tensors)):
        return known[2]
    chosen = _set_of(adapters)
    if all(tensor.is_leaf for tensor in chosen.tensors):  # others are new in each call, and hold a graph
        kept[_SET] = numbers, tensors, chosen
    return chosen


_SET = "adapter set"
"""Key of `mixed_linear` in what a layer keeps."""


def rows_of_examples(examples: tuple[int, ...], x: Tensor) -> Tensor:
    """The adapter of each row of x (B, ..., K) from that of each of its B examples.

    The same tensor for all layers that ask the same: kernels sort the rows of an assignment once.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the assignment was not used before.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return _rows_of_examples(examples, x.shape[:-1], x.device)
    key = examples, x.shape[:-1], x.device
    capturing = is_capturing(x.device)
    found = _assignments.get(key)
    if found is None:
        if capturing:
            raise RuntimeError(
                "these adapters of a batch (adapter_names) were not used before the CUDA graph that is being captured: "
                "call the model once with the same names and shape first"
            )
        if len(_assignments) >= _KEPT_ASSIGNMENTS:
            _assignments.pop(next(iter(_assignments)))
        with torch.inference_mode(False):
            found = _assignments[key] = _rows_of_examples(*key)
    if capturing:
        _captured.append(found)
    elif x.is_cuda:  # it may be dropped while another stream still reads it
        found.record_stream(torch.cuda.current_stream(x.device))
    return found


def _rows_of_examples(examples: tuple[int, ...], lead: torch.Size, device: torch.device) -> Tensor:
    """Made on the host: a copy from there is complete for every stream."""
    index = torch.tensor(examples, dtype=torch.int64)
    return expanded(index, lead).contiguous().to(device)


def expanded(index: Tensor, lead: torch.Size) -> Tensor:
    """A view of shape `lead` with each entry of an index, of its first dimensions, repeated over the others."""
    return index.view(*index.shape, *[1] * (len(lead) - index.ndim)).expand(lead)


_assignments: dict[tuple[tuple[int, ...], torch.Size, torch.device], Tensor] = {}
_KEPT_ASSIGNMENTS = 64
_captured: list[Tensor] = []
"""What captured graphs read, kept for as long as the process lives."""


def _for_codes(
    x: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None, torch.dtype | None]:
    """x and the bias as they are computed with over 4-bit codes, and the dtype that y goes back to, or None."""
    check_floating(x)
    if compute_dtype is None:
        return x, bias, None
    return x.to(compute_dtype), None if bias is None else bias.to(compute_dtype), x.dtype


def base_linear(x: Tensor, base: tuple[Weight, Tensor | None, torch.dtype | None]) -> Tensor:
    """y of the base alone; a dense base uses PyTorch's `F.linear`, except inside `batch_invariant`."""
    weight, bias, _ = base
    if isinstance(weight, Tensor) and not routes.invariant():
        return F.linear(x, weight, bias)
    return adapted_linear(x, base, Operands())


def check_floating(x: Tensor) -> None:
    """Raise a TypeError for an integer x, which the cast to the compute dtype would hide.

    Some models cast x to the dtype of the next layer's weight; the weight of a 4-bit layer is uint8 codes.
    """
    if not x.is_floating_point():
        hint = "; a model that casts x to the dtype of a layer's weight (T5's wo) must keep that layer dense"
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}{hint if x.dtype == torch.uint8 else ''}")


def weighted_sum(adapters: Sequence[Operands], weights: Iterable[float]) -> dict[str, Tensor | None]:
    """The tensors of one adapter, with scale 1, equal to Σ_i w_i·(W∘A_i + s_i·B_i) and Σ_i w_i·(b∘D_i + E_i + W·C_i).

    Vectors and constants are added. Factors are concatenated along the rank: [w_1·s_1·up_1, w_2·s_2·up_2, ...] and
    [down_1; down_2; ...], where s_i is the scale for B and 1 for A and C. The ranks add up.
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
    """Make an adapter (name → parameter) change nothing: `_down` factors random (`init`), everything else zero.

    Those of experts, (E, ...), are drawn one expert after the other.
    """
    for name, parameter in adapter.items():
        if not name.endswith("_down"):
            nn.init.zeros_(parameter)
            continue
        for own in parameter if parameter.ndim == 3 else (parameter,):
            if init == "kaiming":
                nn.init.kaiming_uniform_(own, a=math.sqrt(5))
            else:
                nn.init.xavier_uniform_(own)
