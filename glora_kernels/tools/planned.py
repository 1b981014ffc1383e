"""Calls of the operators, planned for a card that need not be here: the launches that it would be given.

What is planned is what a real call records (`runtime.program`), by the same functions: the class of the call prepared
(`dispatch.prepared`), and both of its passes run on twins of its tensors. So a form of a kernel that is asked for here
is one that a call asks for, and the other way around.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.depth import op as depth
from glora_kernels.depth.deferred import _launch as shared_grad
from glora_kernels.depth.table import Layer, SharedFactor, SharedProduct
from glora_kernels.dispatch.common import Call, Supports, given
from glora_kernels.dispatch.prepared import AskedPass, Prepared, Row
from glora_kernels.glora import op as operator
from glora_kernels.grouped import op as grouped
from glora_kernels.grouped.group import ABSENT, Group
from glora_kernels.quant import NestedState, QuantizedWeight, QuantState
from glora_kernels.runtime import program
from glora_kernels.runtime.planning import planning
from glora_kernels.runtime.recording import Recording
from glora_kernels.spec import GLoRAConfig

SEED = 2**62 + 1


class Linear(NamedTuple):
    """A layer: y (M,N) of x (M,K).

    Attributes:
        config: of its adapter.
        n, k: out_features and in_features.
        bias: whether the base has one.
        adapter: the dtype of the adapter; None: that of x.
        quant_type: of a base in 4 bits, in blocks of 64; "" where it is dense.
        nested: whether its absmax is in 8 bits.
        transposed: W is stored (K,N).
    """

    config: GLoRAConfig
    n: int
    k: int
    bias: bool = False
    adapter: torch.dtype | None = None
    quant_type: str = ""
    nested: bool = False
    transposed: bool = False


class How(NamedTuple):
    """How layers are called.

    Attributes:
        m: the tokens.
        dtype: of x.
        arch: the card's architecture.
        training: whether the adapter wants gradients; `first`: and x does not, as that of a model's first layer.
        route: whose kernels serve a 4-bit base: "triton", "cuda", or "auto".
        device_seed: the key of a dropout mask is on the device, as under a CUDA graph.
        weight: the dtype of W, under autocast; None: that of x.
    """

    m: int
    dtype: torch.dtype
    arch: str
    training: bool = True
    first: bool = False
    route: str = "triton"
    device_seed: bool = False
    weight: torch.dtype | None = None


class Planned(NamedTuple):
    """The steps of a call's passes: `Launch`, `LibraryProduct` and `CudaLaunch`."""

    forward: list[Any]
    backward: list[Any]


def linear(layer: Linear, how: How) -> Planned:
    """What `ops.glora_linear` launches for a layer."""
    config, n, k = layer.config, layer.n, layer.k
    adapter = _adapter(layer, how)
    cs = [adapter.pop(name, None) for name in ("C", "C_up", "C_down")]
    s = Supports(bias=_meta(n, dtype=how.weight or how.dtype) if layer.bias else None,
                 **{name.lower(): tensor for name, tensor in adapter.items()})  # fmt: skip
    x = _meta(how.m, k, dtype=how.dtype)
    p = config.dropout if config.B == "lora" else 0.0
    row, form = operator.row_of(x, _weight(layer, how), s, _seed(how) if p else None, cs)
    trains = [how.training and t is not None and name != "bias" for name, t in zip(Supports._fields, s, strict=True)]
    call = Call(config.scale, p, None, config.variant == "matmul", how.route)
    wanted = (how.training and not how.first, *trains, *(how.training and c is not None for c in cs))
    return _passes(operator.prepare(row, form, call, *wanted), row, how)


def group(layers: Sequence[Linear], how: How, frozen: int = 0) -> Planned:
    """What `ops.grouped_lora_linear` launches for layers that take one x, each a LoRA; of `frozen` ones B_up alone."""
    first, count = layers[0], len(layers)
    pairs = [_adapter(layer, how) for layer in layers]
    weights = [_weight(layer, how) for layer in layers]
    biases = [_meta(layer.n, dtype=how.weight or how.dtype) for layer in layers if layer.bias]
    p = first.config.dropout
    row = (
        _meta(how.m, first.k, dtype=how.dtype), *weights, *(pair["B_down"] for pair in pairs),
        *(pair["B_up"] for pair in pairs), *biases, *(_seed(how) for _ in layers if p),
    )  # fmt: skip
    sizes = 1, count, count, count, len(biases), count if p else 0
    each = tuple(range(count))
    absent = (ABSENT,) * count
    made = Group(
        (0,) * count, each, each, each, each if biases else absent, each if p else absent,
        tuple(layer.config.scale for layer in layers), p, "triton",
    )  # fmt: skip
    trains = how.training
    wanted = [trains and not how.first, *[False] * (count + frozen), *[trains] * (2 * count - frozen)]
    wanted += [False] * (len(row) - len(wanted))
    return _passes(grouped._prepare(row, sizes, made, wanted, even=True, registered=False), row, how)


def over_depth(layer: Linear, how: How) -> list[Any]:
    """What merging, restoring, `shift_once` and `deferred_shared_grads` launch for layers of this kind."""
    rank, dtype = layer.config.rank, how.dtype
    weight, bias = _weight(layer, how), _meta(layer.n, dtype=dtype) if layer.bias else None
    made = Layer(weight, bias, _adapter(layer, how), layer.config.scale, layer.config.variant == "matmul")
    with planning(how.arch) as steps:
        depth.merge([made], [None if bias is None else torch.empty_like(bias)])
        depth.restore([(made.dense, made.dense, bias, bias)])
        shifting = depth._shift_only(made)
        if shifting.adapter:
            key = depth.given_key([shifting])
            betas = depth._triton_shifts(key, [shifting])
            asked = {(0, name) for name in depth._names(shifting) if name != "bias"}
            depth._triton_shift_grads(key, [shifting], {0: torch.empty_like(betas[0])}, asked)
        if layer.config.B == "lora":
            left, x, dy = (_meta(how.m, size, dtype=dtype) for size in (rank, layer.k, layer.n))
            p = layer.config.dropout
            product = SharedProduct(left, x, layer.config.scale, p, _seed(how) if p else None)
            shared_grad([SharedFactor(_meta(rank, layer.k, dtype=layer.adapter or dtype), [product])])
            product = SharedProduct(left, dy, 1.0, 0.0, None)
            shared_grad([SharedFactor(_meta(layer.n, rank, dtype=layer.adapter or dtype).t(), [product])])
    return steps


def _passes(prepared: Prepared, row: Row, how: How) -> Planned:
    """Both passes of a class of calls, recorded as their programs are."""
    with_rows = frozenset(place for place in prepared.with_rows if place < len(row))
    forward, results = _recorded(prepared.forward_pass(program.Operands(tuple(row), with_rows, how.m, -1)), how)
    if not prepared.trained:
        return Planned(forward.steps, [])
    everything = (*row, *results)
    dys = [torch.empty_like(given(y)) for y in results[: prepared.outputs]]
    backward, _ = _recorded(prepared.backward_pass(dys, [given(everything[i]) for i in prepared.saved]), how)
    return Planned(forward.steps, backward.steps)


def _recorded(asked: AskedPass, how: How) -> tuple[Recording, program.Results]:
    return program.record(asked.function, asked.operands, asked.values, how.arch)


def _adapter(layer: Linear, how: How) -> dict[str, Tensor]:
    shapes = layer.config.parameter_shapes(layer.k, layer.n, layer.bias)
    return {name: _meta(*shape, dtype=layer.adapter or how.dtype) for name, shape in shapes.items()}


def _weight(layer: Linear, how: How) -> Any:
    n, k = layer.n, layer.k
    if not layer.quant_type:
        dtype = how.weight or how.dtype
        return _meta(k, n, dtype=dtype).t() if layer.transposed else _meta(n, k, dtype=dtype)
    blocks, nested = -(-n * k // 64), None
    absmax = _meta(blocks, dtype=torch.float32)
    if layer.nested:
        beside = [_meta(*shape, dtype=torch.float32) for shape in ((-(-blocks // 256),), (256,), ())]
        absmax, nested = _meta(blocks, dtype=torch.uint8), NestedState(beside[0], beside[1], 256, beside[2])
    packed = _meta(-(-n * k // 2), 1, dtype=torch.uint8)
    return QuantizedWeight(packed, QuantState(absmax, layer.quant_type, 64, (n, k), how.weight or how.dtype, nested))


def _seed(how: How) -> Tensor:
    return torch.tensor([SEED], device="meta" if how.device_seed else "cpu")


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
