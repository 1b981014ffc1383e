"""Plans calls of the operators for a card that need not be here: the launches that they would make on it.

A call is planned by the functions that a real call uses: its class is prepared (`dispatch.prepared`), and both of its
passes are recorded from a run on meta tensors (`runtime.program`). So calls that are planned here ask for exactly the
forms of kernels that real calls ask for. The tensors of a call are on the meta device, or on a real `device` random,
to be measured with (`tools.trials`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glora_kernels.depth.table import Layer, SharedFactor, SharedProduct
from glora_kernels.dispatch.common import Codes, codes_of, given, path_of, stored, wide_dtype
from glora_kernels.dispatch.prepared import AskedPass, Prepared
from glora_kernels.dispatch.signature import Row, Values
from glora_kernels.experts import op as expert_layers
from glora_kernels.experts.call import Terms
from glora_kernels.glora import op as operator
from glora_kernels.glora.call import Supports
from glora_kernels.grouped import op as grouped
from glora_kernels.grouped.group import ABSENT
from glora_kernels.multi import op as multis
from glora_kernels.multi.adapter_set import AdapterSet
from glora_kernels.quant import NestedState, QuantizedWeight, QuantState, quantize_weight
from glora_kernels.runtime import program, routes, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.planning import planning
from glora_kernels.runtime.recording import Recording
from glora_kernels.spec import GLoRAConfig

SEED = 2**62 + 1
_C = ("c", "c_up", "c_down")


class Linear(NamedTuple):
    """A layer: y (M,N) of x (M,K).

    Attributes:
        config: the configuration of its adapter.
        n, k: out_features and in_features.
        bias: whether the base has a bias.
        adapter: the dtype of the adapter; None: that of x.
        quant_type: of a 4-bit base (in blocks of 64); "": the base is dense.
        nested: whether the absmax values of a 4-bit base are themselves quantized, to 8 bits.
        transposed: W is stored as (K,N).
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
        m: the number of tokens.
        dtype: of x.
        arch: the card's architecture.
        training: whether the adapter needs gradients. first: x needs none, as in a model's first layer.
        route: the kernels of a 4-bit base: "triton", "cuda" or "auto".
        device_seed: the seed of a dropout mask is on the device, as under a CUDA graph.
        weight: the dtype of W, which under autocast may differ; None: that of x.
        device: of the tensors; "meta": they have no memory.
    """

    m: int
    dtype: torch.dtype
    arch: str
    training: bool = True
    first: bool = False
    route: str = "triton"
    device_seed: bool = False
    weight: torch.dtype | None = None
    device: str = "meta"


class Planned(NamedTuple):
    """The steps of a call's passes: `Launch`, `LibraryProduct` and `CudaLaunch`."""

    forward: list[Any]
    backward: list[Any]


class LinearCall(NamedTuple):
    """A call of `ops.glora_linear`: its class, its row of tensors with their names, and the arguments behind them."""

    prepared: Prepared
    row: Row
    names: tuple[str, ...]
    x: Tensor
    weight: Any
    supports: Supports
    scale: float


def linear_call(layer: Linear, how: How) -> LinearCall:
    """The call of a layer, prepared for training or inference."""
    config = layer.config
    adapter = {name.lower(): tensor for name, tensor in _adapter(layer, how).items()}
    cs = [adapter.pop(name, None) for name in _C]
    s = Supports(bias=_tensor(how, layer.n, dtype=how.weight) if layer.bias else None, **adapter)
    x, weight = _tensor(how, how.m, layer.k), weight_of(layer, how)
    p = config.dropout if config.B == "lora" else 0.0
    settings = operator.Settings(config.scale, p, _seed(how) if p else None, config.variant)
    row = operator.row_of(
        x, stored(weight), s, settings.seed, codes_of(weight), cs if any(c is not None for c in cs) else ()
    )
    values = operator.values_of(weight, settings, how.route)
    frozen = {"weight", "bias", "seed", *Codes._fields, *(("x",) if how.first else ())}
    names = (*operator.GLORA.signature.tensors, *_C)
    wanted = [how.training and t is not None and name not in frozen for name, t in zip(names, row, strict=False)]
    prepared = operator.GLORA.prepare(row, values, wanted)
    return LinearCall(prepared, row, names, x, weight, s, config.scale)


def linear(layer: Linear, how: How) -> Planned:
    """The steps of `ops.glora_linear` for a layer."""
    call = linear_call(layer, how)
    return _passes(call.prepared, call.row, how)


def group(layers: Sequence[Linear], how: How, frozen: int = 0) -> Planned:
    """The steps of `ops.grouped_lora_linear` for LoRAs that read one x; the first `frozen` have a frozen B_down."""
    first, count = layers[0], len(layers)
    pairs = [_adapter(layer, how) for layer in layers]
    weights = [weight_of(layer, how) for layer in layers]
    biases = [_tensor(how, layer.n, dtype=how.weight) for layer in layers if layer.bias]
    p = first.config.dropout
    row = (
        _tensor(how, how.m, first.k), *weights, *(pair["B_down"] for pair in pairs),
        *(pair["B_up"] for pair in pairs), *biases, *(_seed(how) for _ in layers if p),
    )  # fmt: skip
    sizes = 1, count, count, count, len(biases), count if p else 0
    each = tuple(range(count))
    absent = (ABSENT,) * count
    numbers = (
        (0,) * count, each, each, each, each if biases else absent, each if p else absent,
        tuple(layer.config.scale for layer in layers), p, "triton",
    )  # fmt: skip
    trains = how.training
    wanted = [trains and not how.first, *[False] * (count + frozen), *[trains] * (2 * count - frozen)]
    wanted += [False] * (len(row) - len(wanted))
    return _passes(grouped.GROUPED.prepare(row, Values(numbers, sizes), wanted), row, how)


class Decided(NamedTuple):
    """A choice that a call made: before which of its steps, for what, at which shape, and the source of the choice."""

    before: int
    what: str
    shape: Shape
    choice: Any
    source: str


class Traced(NamedTuple):
    """The steps of a module's call, how many of them are in forward, and the choices made for them."""

    steps: list[Any]
    forward: int
    decided: list[Decided]


def of_module(module: Callable[[Tensor], Any], x: Tensor, arch: str, backend: routes.Backend = "auto") -> Traced:
    """The steps of a module, or any function of x, in forward and backward: it is called on the meta device.

    It may contain anything (layers of GLoRA or PEFT, 4-bit or fused ones, contexts over depth): the operators inside
    plan for the card and do not run.
    """
    decided: list[Decided] = []
    steps: list[Any]
    with (
        planning(arch) as steps,
        routes.backend(backend),
        tables.watching(lambda *found: decided.append(Decided(len(steps), *found))),
    ):
        ys = module(x)
        count, ys = len(steps), [ys] if isinstance(ys, Tensor) else list(ys)
        torch.autograd.backward(ys, [torch.empty_like(y) for y in ys])
    return Traced(steps, count, decided)


def multi(layer: Linear, configs: Sequence[GLoRAConfig], how: How) -> Planned:
    """What `ops.multi_glora_linear` launches for the base of a layer under adapters of these configurations."""
    x, bias = _tensor(how, how.m, layer.k), _tensor(how, layer.n, dtype=how.weight) if layer.bias else None
    rows, weight = torch.zeros(how.m, dtype=torch.int64, device=how.device), weight_of(layer, how)
    chosen = AdapterSet([
        {name.lower(): tensor for name, tensor in _adapter(layer._replace(config=config), how).items()}
        | {"scale": config.scale, "dropout_p": config.dropout, "variant": config.variant}
        | {"seed": _seed(how) if config.dropout else None}
        for config in configs
    ])  # fmt: skip
    row, sizes = multis.row_of(x, rows, weight, bias, chosen)
    trains, shared = how.training, sum(sizes[: len(multis.Shared._fields)])
    wanted = [trains and not how.first, *[False] * (shared - 1), *[trains] * (len(row) - shared)]
    wanted = [want and tensor.dtype.is_floating_point for want, tensor in zip(wanted, row, strict=True)]
    return _passes(
        multis.MULTI.prepare(row, multis.values_of(weight, chosen.numbers, sizes, how.route), wanted), row, how
    )


class Experts(NamedTuple):
    """How many experts a layer has, how many of them read a token, and whether x is that of the tokens, or sorted."""

    number: int
    each: int = 1
    of_tokens: bool = False


def experts(layer: Linear, among: Experts, how: How) -> Planned:
    """What `ops.expert_glora_linear` launches for experts of a layer's sizes, which have `how.m` rows in all.

    A and B are the configuration's; the base's bias, C, D and E are parts of β, which PyTorch computes.
    """
    e, n, k, config = among.number, layer.n, layer.k, layer.config
    adapter = _adapter(layer._replace(config=replace(config, C="none", D="none", E="none")), how)
    own = {name: _tensor(how, e, *t.shape, dtype=t.dtype, std=0.1) for name, t in adapter.items()}
    beta = _tensor(how, e, n, dtype=wide_dtype(how.dtype)) if layer.bias or config.E != "none" else None
    stacked = weight_of(layer._replace(n=e * n, transposed=False), how)
    if isinstance(stacked, Tensor):
        stacked = stacked.view(e, k, n).mT if layer.transposed else stacked.view(e, n, k)
    p = config.dropout if config.B == "lora" else 0.0
    a, up, down, b = map(own.get, ("A", "B_up", "B_down", "B"))
    terms = Terms(a, up, down, b, beta, _seed(how) if p else None)
    order = torch.zeros(how.m, dtype=torch.int64, device=how.device) if among.of_tokens else None
    row = (
        _tensor(how, how.m // among.each, k), stored(stacked), torch.zeros(e + 2, dtype=torch.int32, device=how.device),
        order, *terms, *codes_of(stacked)[:4],
    )  # fmt: skip
    values = Values((config.scale, p, among.each, among.of_tokens, True, how.route, codes_of(stacked).form))
    frozen = {"weight", "starts", "order", "seed", *Codes._fields, *(("x",) if how.first else ())}
    names = expert_layers.EXPERTS.signature.tensors
    wanted = [how.training and t is not None and name not in frozen for name, t in zip(names, row, strict=True)]
    return _passes(expert_layers.EXPERTS.prepare(row, values, wanted), row, how)


def over_depth(layer: Linear, how: How) -> list[Any]:
    """The steps of merging, restoring, `shift_once` and `deferred_shared_grads` for layers of this kind."""
    rank = layer.config.rank
    weight, bias = weight_of(layer, how), _tensor(how, layer.n) if layer.bias else None
    made = Layer(weight, bias, _adapter(layer, how), layer.config.scale, layer.config.variant == "matmul")
    depth = path_of("depth", "triton")
    with planning(how.arch) as steps:
        depth.merge([made], [None if bias is None else torch.empty_like(bias)])
        depth.restore([(made.dense, made.dense, bias, bias)])
        shifting = made.shifting()
        if shifting.adapter:
            key = depth.key_of([shifting])
            betas = depth.shifts(key, [shifting])
            depth.shift_gradients(key, [shifting], {0: torch.empty_like(betas[0])}, {0: [*shifting.adapter]})
        if layer.config.B == "lora":
            left, x, dy = (_tensor(how, how.m, size) for size in (rank, layer.k, layer.n))
            p = layer.config.dropout
            product = SharedProduct(left, x, layer.config.scale, p, _seed(how) if p else None)
            depth.shared_gradients([SharedFactor(_tensor(how, rank, layer.k, dtype=layer.adapter), [product])])
            product = SharedProduct(left, dy, 1.0, 0.0, None)
            depth.shared_gradients([SharedFactor(_tensor(how, layer.n, rank, dtype=layer.adapter).t(), [product])])
    return steps


def _passes(prepared: Prepared, row: Row, how: How) -> Planned:
    """Record both passes of a class of calls, as their programs are recorded."""
    with_rows = frozenset(place for place in prepared.with_rows if place < len(row))
    forward, results = _recorded(prepared.forward_pass(program.PassInputs(tuple(row), with_rows, how.m, -1)), how)
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
    return {name: _tensor(how, *shape, dtype=layer.adapter, std=0.1) for name, shape in shapes.items()}


def weight_of(layer: Linear, how: How) -> Any:
    """The weight of a layer, dense or 4-bit."""
    (n, k), dtype = (layer.n, layer.k), how.weight or how.dtype
    if not layer.quant_type or how.device != "meta":
        shape = (k, n) if layer.transposed else (n, k)
        w = _tensor(how, *shape, dtype=dtype, std=k**-0.5)
        w = w.t() if layer.transposed else w
        return quantize_weight(w, layer.quant_type, double_quant=layer.nested) if layer.quant_type else w
    single = how._replace(dtype=torch.float32)
    blocks, nested = -(-n * k // 64), None
    absmax = _tensor(single, blocks)
    if layer.nested:
        beside = [_tensor(single, *shape) for shape in ((-(-blocks // 256),), (256,), ())]
        absmax, nested = absmax.to(torch.uint8), NestedState(beside[0], beside[1], 256, beside[2])
    packed = _tensor(how, -(-n * k // 2), 1, dtype=torch.uint8)
    return QuantizedWeight(packed, QuantState(absmax, layer.quant_type, 64, (n, k), dtype, nested))


def _seed(how: How) -> Tensor:
    return torch.tensor([SEED], device="meta" if how.device_seed else "cpu")


def _tensor(how: How, *shape: int, dtype: torch.dtype | None = None, std: float = 1.0) -> Tensor:
    """A random tensor with standard deviation `std`, in the dtype of x where none is given; no values on "meta"."""
    made = torch.empty(shape, dtype=dtype or how.dtype, device=how.device)
    return made if made.is_meta else made.normal_(std=std)
