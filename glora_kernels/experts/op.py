"""Experts as an operator: the public function, its checks, and what PyTorch is told of it.

    y[i] = x[token(i)] (W_e + W_e∘A_e + s·B_e)ᵀ + bias_e∘(1+d_e) + e_e + W_e·c_e,   e the expert of row i

What it computes: `experts.eager`. C and A=lora of the product variant are made part of β and of the low-rank path here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from glora_kernels.dispatch import checks
from glora_kernels.dispatch.common import (
    Codes,
    Weight,
    autocast_dtype,
    cast,
    codes_of,
    factor_dtype,
    given,
    path_of,
    stored,
    weight_of,
    wide_dtype,
    without_autocast,
)
from glora_kernels.dispatch.operator import LIBRARY, NAMESPACE, OPS, Operator
from glora_kernels.dispatch.prepared import Prepared
from glora_kernels.dispatch.signature import Row, Signature, Values
from glora_kernels.dispatch.ways import is_batched, is_elsewhere, is_plain, is_watched
from glora_kernels.experts import composite
from glora_kernels.experts.call import Call, Inputs, Made, Needs, Terms, groups_of
from glora_kernels.experts.groups import Groups
from glora_kernels.experts.products import of_expert
from glora_kernels.experts.wc import expert_wc
from glora_kernels.glora.eager import dropped, mask_of
from glora_kernels.glora.op import glora_linear
from glora_kernels.quant import QuantizedWeight
from glora_kernels.reference.random import round_dithered
from glora_kernels.runtime import routes
from glora_kernels.runtime.workspace import workspace_lock
from glora_kernels.spec import VARIANTS

Adapters = Mapping[str, Any]
_TENSORS = ("a", "a_up", "a_down", "b", "b_up", "b_down", "c", "c_up", "c_down", "d", "e")
_DIRECT = ("a", "b", "b_up", "b_down")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_NUMBERS = ("scale", "dropout_p", "seed", "variant")


def expert_glora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    adapters: Adapters | None = None,
    *,
    index: Tensor | None = None,
    offsets: Tensor | None = None,
    experts: int | None = None,
) -> Tensor:
    """The linear layers of E experts, each with its adapter, over the rows that each expert has.

    Row i of expert e has y[i] = glora_linear(x[token(i)], weight[e], bias[e], **adapters of e): a token is read by each
    of its experts, and dx is the sum over them. Gradients of an expert's adapter are sums over its rows, zero where it
    has none; those of a tensor that all experts share are sums over all. Sums have a fixed order. No tensor of E·N·K
    elements is made in either pass, and of the size of rows backward keeps h (M, R) alone; besides y where a vector or
    constant A is trained, and with a hadamard A=lora the rows of x.

    Args:
        x: with `index` the tokens (T, K); with `offsets` the rows (M, K), those of an expert together.
        weight: W (E, N, K), frozen, in any order of storage; or a `QuantizedWeight` of (E·N, K).
        bias: (E, N), or None.
        adapters: the keyword arguments of `glora_linear` but wc, each tensor with E in front, or with 1 where all
            experts share it: a (E, N) or (E, 1), b_up (E, N, R), b_down (E, R, K), c_up (E, K, R), d, e …; scale,
            dropout_p, seed and variant are of all. A dropout mask goes by the row of x: the experts of a token see it
            alike. None: the base alone.
        index: the experts of each token, (T,) or (T, k), integers. A number outside of 0 … E-1 is that of no expert:
            such a row of y is zero, and gives no gradient.
        offsets: (E,) integers, where the rows of each expert end, as in `torch.nn.functional.grouped_mm`. Rows behind
            the last have no expert. They rise, to the number of rows at most, which is checked on a CPU alone: a GPU
            would have to be waited for.
        experts: E, which a weight in 4 bits does not say. Needed beside one where neither offsets nor the bias nor an
            adapter has E in front.

    Returns:
        (T, N) or (T, k, N) with `index`, (M, N) with `offsets`, in the dtype of x (of autocast where it is on).

    Raises:
        ValueError: sizes, devices or a combination of arguments that do not fit, or a weight that requires grad. On the
            eager path also a weight in 4 bits of whose blocks one lies in two experts, and inside `batch_invariant` a
            dropout.
        TypeError: an argument that `glora_linear` has not, one of another type, or a dtype that differs from the
            weight's.
        RuntimeError: see `glora_linear`; and under torch.jit.trace.

    On a GPU a hadamard A=lora and `batch_invariant` wait for the sizes of the groups: each expert is a call of
    `glora_linear` there.

    Source: the grouped product with tokens read through an index follows Tan et al., "Scattered Mixture-of-Experts
    Implementation", 2024; the adapters of each expert are ours.

    Examples:
        >>> from glora_kernels.ops import expert_glora_linear
        >>> x, weight = torch.randn(4, 16), torch.randn(3, 32, 16)  # three experts
        >>> adapters = {"b_up": torch.zeros(3, 32, 4), "b_down": torch.randn(3, 4, 16)}
        >>> expert_glora_linear(x, weight, adapters=adapters, index=torch.tensor([0, 2, 2, 1])).shape
        torch.Size([4, 32])
    """
    if (index is None) == (offsets is None):
        raise ValueError("give one of index (the experts of each token) and offsets (where the rows of experts end)")
    if not isinstance(x, Tensor) or not is_plain(x) or x.ndim != 2:
        raise ValueError(f"x must be a matrix, of tokens (T, K) or of rows (M, K); got {_shape(x)}")
    _check_types(weight, bias, adapters)
    if index is not None:
        check_numbers("index", index, x)
        experts = _experts(weight, bias, adapters or {}, experts)
        if index.ndim not in (1, 2) or index.shape[0] != x.shape[0] or 0 in index.shape[1:]:
            raise ValueError(
                f"index must be ({x.shape[0]},) or ({x.shape[0]}, k), one row a token, k >= 1; got {tuple(index.shape)}"
            )
        y = expert_rows(x, weight, bias, adapters, Groups.of(index, experts), of_tokens=True, is_sorted=False)
        return y.view(*index.shape, y.shape[1])
    ends = given(offsets)
    check_numbers("offsets", ends, x)
    if experts is None and isinstance(weight, QuantizedWeight) and ends.ndim == 1:
        experts = ends.shape[0]
    experts = _experts(weight, bias, adapters or {}, experts)
    if ends.shape != (experts,):
        raise ValueError(f"offsets must be ({experts},), one an expert; got {tuple(ends.shape)}")
    if ends.device.type == "cpu" and not is_elsewhere(x):
        _check_ends(ends.tolist(), x.shape[0])
    return expert_rows(x, weight, bias, adapters, Groups.sorted_by(ends, x.shape[0]), of_tokens=False)


def expert_rows(
    x: Tensor, weight: Weight, bias: Tensor | None, adapters: Adapters | None, groups: Groups,
    of_tokens: bool, is_sorted: bool = True,
) -> Tensor:  # fmt: skip
    """`expert_glora_linear` of groups that are known, as layers have them: (M, N).

    Args:
        x: of the tokens (T, K), or with of_tokens False of the sorted rows (M, K).
        is_sorted: whether the rows of y are sorted by expert, or in their places.
    """
    given_ = {name: value for name, value in (adapters or {}).items() if value is not None}
    if unknown := sorted(given_.keys() - {*_TENSORS, *_NUMBERS}):
        raise TypeError(f"adapters has {unknown[0]!r}; accepted are {', '.join((*_TENSORS, *_NUMBERS))}")
    numbers: dict[str, Any] = {
        "scale": given_.get("scale", 1.0), "dropout_p": given_.get("dropout_p", 0.0), "seed": given_.get("seed"),
        "variant": given_.get("variant", "hadamard"),
    }  # fmt: skip
    t = {name: given_.get(name) for name in _TENSORS}
    if numbers["variant"] not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}; got {numbers['variant']!r}")
    product = numbers["variant"] == "matmul"
    # What goes to the operator as it is, is checked once for each class of calls; what is made of others, in each call.
    is_direct = (
        bias is None
        and isinstance(numbers["seed"], (Tensor, NoneType))
        and all(
            own is None or (name in _DIRECT and own.ndim > 1 and own.shape[0] == groups.experts)
            for name, own in t.items()
        )
    )
    if not is_direct:
        _check(x, weight, bias, t, groups.experts, product, numbers)
        t = {name: None if own is None else own.expand(groups.experts, *own.shape[1:]) for name, own in t.items()}
    drops = numbers["dropout_p"] > 0.0 and t["b_up"] is not None
    if routes.invariant() or (t["a_up"] is not None and (drops or not product)):  # the input of A is not dropped
        return _apart(x, weight, bias, t, numbers, groups, of_tokens, is_sorted)
    dtype = autocast_dtype(x) or x.dtype
    up, down = t["b_up"], t["b_down"]
    scale = float(numbers["scale"])
    with without_autocast(x.device.type):
        if t["a_up"] is not None:
            narrow = factor_dtype(dtype, (t["a_up"], t["a_down"], up))
            own = expert_wc(weight, cast(given(t["a_up"]), narrow))
            pairs = [(own, cast(given(t["a_down"]), narrow))]
            if up is not None:
                pairs.append((cast(up, narrow) * scale, cast(given(down), narrow)))
            up, down = torch.cat([u for u, _ in pairs], 2), torch.cat([d for _, d in pairs], 1)
            scale = 1.0
        beta = _beta(weight, bias, t, dtype)
    terms = Terms(t["a"], up, down, t["b"], beta, numbers["seed"] if numbers["dropout_p"] and up is not None else None)
    p = float(numbers["dropout_p"]) if up is not None else 0.0
    codes = codes_of(weight)
    row = (x, stored(weight), groups.starts, groups.order, *terms, *codes[:4])
    key = (codes.form, scale, p, groups.each, of_tokens, is_sorted)

    def check(row: Row) -> Values:
        own = given(row[0])
        if is_direct:
            _check(own, weight, bias, t, groups.experts, product, numbers)
        route = routes.route(own.device.type, own.dtype, four_bit=isinstance(weight, QuantizedWeight))
        return Values((scale, p, groups.each, of_tokens, is_sorted, route, codes.form))

    return EXPERTS.call(row, key, check)[0]


def check_numbers(name: str, tensor: Any, x: Tensor) -> None:
    """The numbers of experts, or of rows, are integers on the device of x."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of integers; got {got}")
    if tensor.device != x.device:
        raise ValueError(f"x and {name} must be on one device; got x on {x.device} and {name} on {tensor.device}")
    if not torch.compiler.is_compiling() and is_batched(tensor):
        raise ValueError(f"{name} must be one for the whole batch of torch.func.vmap; got one for each entry")


def _check_types(weight: Any, bias: Any, adapters: Any) -> None:
    if not isinstance(weight, (Tensor, QuantizedWeight)):
        raise TypeError(f"weight must be a tensor or a QuantizedWeight; got {type(weight).__name__}")
    if adapters is not None and not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must be a mapping of names to tensors, or None; got {type(adapters).__name__}")
    for name, own in (("bias", bias), *((name, (adapters or {}).get(name)) for name in _TENSORS)):
        if own is not None and not isinstance(own, Tensor):
            raise TypeError(f"{name} must be a tensor or None; got {type(own).__name__}")


def _check_ends(ends: list[int], rows: int) -> None:
    if any(after < before for before, after in itertools.pairwise((0, *ends, rows))):
        raise ValueError(f"offsets must rise from 0 on to {rows}, the number of rows, at most; got {ends}")


def _experts(weight: Weight, bias: Tensor | None, adapters: Adapters, experts: int | None) -> int:
    """E: of a dense W its first size; beside a 4-bit one what is given, or what an operand has in front."""
    if isinstance(weight, Tensor):
        if weight.ndim != 3 or weight.shape[0] == 0:
            raise ValueError(f"weight must be (E, N, K) with E >= 1; got {tuple(weight.shape)}")
        if experts not in (None, weight.shape[0]):
            raise ValueError(f"experts must be {weight.shape[0]}, as weight {tuple(weight.shape)} says; got {experts}")
        return weight.shape[0]
    if experts is None:
        own = [bias] if bias is not None else [adapters.get(name) for name in _TENSORS]
        found = [t.shape[0] for t in own if isinstance(t, Tensor) and t.ndim]
        experts = max(found, default=0)
        if not experts or (bias is None and experts == 1):  # what is there may be shared by all
            raise ValueError(
                "a 4-bit weight (E·N, K) does not say how many experts it has, nor does an operand with E in front: "
                "give experts=E"
            )
    if experts < 1 or weight.shape[0] % experts:
        raise ValueError(f"a 4-bit weight of E experts has E·N rows; got {weight.shape[0]} rows and E = {experts}")
    return experts


def _check(
    x: Tensor, weight: Weight, bias: Tensor | None, t: Mapping[str, Tensor | None], experts: int, product: bool,
    numbers: Mapping[str, Any],
) -> None:  # fmt: skip
    if isinstance(weight, Tensor) and (weight.ndim != 3 or weight.shape[0] != experts):
        raise ValueError(f"weight must be ({experts}, N, K); got {tuple(weight.shape)}")
    checks.check_frozen("weight", weight)
    one = _one(weight) if isinstance(weight, Tensor) else weight
    checks.check_product("x", x, "weight[e]", one)
    k, n = one.shape[1], one.shape[0] if isinstance(weight, Tensor) else one.shape[0] // experts
    checks.check_devices(("x", x.device), [("weight", weight), ("bias", bias), *t.items()])
    for name, own in t.items():
        if own is not None and (own.ndim < 2 or own.shape[0] not in (1, experts)):
            raise ValueError(f"{name} must have {experts} (one an expert) or 1 in front; got {_shape(own)}")
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(f"bias must be ({experts}, {n}); got {tuple(bias.shape)}")
    try:
        _check_one(n, k, {name: None if own is None else _one(own) for name, own in t.items()}, product)
    except ValueError as error:
        raise ValueError(f"of one expert: {error}") from None
    if t["d"] is not None and bias is None:
        raise ValueError("d scales the bias: it cannot be given where bias is None")
    checks.check_dropout(numbers["dropout_p"])
    if numbers["dropout_p"] and t["b_up"] is not None:
        if numbers["seed"] is None:
            raise ValueError(f"dropout_p={numbers['dropout_p']} needs a seed: pass seed=dropout_seed(x.device)")
        checks.check_seed("seed", numbers["seed"], x.device)


def _one(stacked: Tensor) -> Tensor:
    """What one expert has of it, without values: an index would be an operation on a tensor that may be watched."""
    return torch.empty(stacked.shape[1:], dtype=stacked.dtype, device="meta")


def _check_one(n: int, k: int, s: Mapping[str, Tensor | None], product: bool) -> None:
    """The adapter of one expert."""
    checks.check_form("a", n, True, (k if product else n, k), s["a"], s["a_up"], s["a_down"])
    if product and s["a"] is not None:
        raise ValueError("variant='matmul' accepts a_up and a_down, not a")
    checks.check_form("b", n, True, (n, k), s["b"], s["b_up"], s["b_down"])
    checks.check_form("c", k, False, (k, 1), s["c"], s["c_up"], s["c_down"])
    for name in ("d", "e"):
        if s[name] is not None:
            checks.check_vector(name, given(s[name]), n, constant=True)


def _beta(weight: Weight, bias: Tensor | None, t: Mapping[str, Any], dtype: torch.dtype) -> Tensor | None:
    """β of each expert (E, N), in fp32 for 16-bit dtypes; None where nothing is added."""
    wide = wide_dtype(dtype)
    found = None if bias is None else cast(bias, wide)
    if t["d"] is not None:
        found = given(found) * (1 + cast(t["d"], wide))
    parts = [] if t["e"] is None else [cast(t["e"], wide)]
    if t["c"] is not None or t["c_up"] is not None:
        of_w = (
            torch.float64
            if isinstance(weight, QuantizedWeight) and dtype == torch.float64
            else wide_dtype(weight.dtype)
        )
        column = (
            cast(t["c"], of_w)[..., None] if t["c"] is not None else cast(t["c_up"], of_w) @ cast(t["c_down"], of_w)
        )
        parts.append(cast(expert_wc(weight, column).squeeze(2), wide))
    for part in parts:
        found = part if found is None else found + part
    return found


def _apart(
    x: Tensor, weight: Weight, bias: Tensor | None, t: Mapping[str, Any], numbers: Mapping[str, Any], groups: Groups,
    of_tokens: bool, is_sorted: bool,
) -> Tensor:  # fmt: skip
    """Each expert as a call of `glora_linear`."""
    p, (up, down) = numbers["dropout_p"] if t["b_up"] is not None else 0.0, (t["b_up"], t["b_down"])
    rows, kept = groups.gather(x) if of_tokens else x, None
    if p:
        if routes.invariant():
            raise ValueError("dropout_p must be 0 for experts inside batch_invariant(), whose masks go by the row of x")
        mask = OPS.expert_mask if is_watched(x) else _mask
        kept = dropped(x, mask(given(numbers["seed"]), x.detach(), p)) * (numbers["scale"] / (1.0 - p))
        kept, t = groups.gather(kept) if of_tokens else kept, {**t, "b_up": None, "b_down": None}
    found = []
    for e, span in enumerate(groups.spans()):
        own: dict[str, Any] = {name: None if tensor is None else tensor[e] for name, tensor in t.items()}
        y = glora_linear(
            rows[span], of_expert(weight, e, groups.experts), None if bias is None else bias[e], **own,
            scale=numbers["scale"], variant=numbers["variant"],
        )  # fmt: skip
        if kept is not None:
            narrow = factor_dtype(y.dtype, (up, down))
            low = linear(cast(kept[span], narrow), cast(given(down)[e], narrow))
            y = _added(y, linear(low, cast(given(up)[e], narrow)))
        found.append(y)
    rest = rows.shape[0] - sum(y.shape[0] for y in found)
    y = torch.cat([*found, found[0].new_zeros(rest, found[0].shape[1])])
    return y if is_sorted else groups.unsort(y)


def _mask(seed: Tensor, x: Tensor, p: float) -> Tensor:
    """The dropout mask of x; as an operator one node, whose work in place no selective checkpoint sees."""
    return given(mask_of(p, seed, x.shape[0], x.shape[1], x.device))


LIBRARY.define("expert_mask(Tensor seed, Tensor x, float p) -> Tensor")
LIBRARY.impl("expert_mask", _mask, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{NAMESPACE}::expert_mask", lambda seed, x, p: x.new_empty(x.shape, dtype=torch.bool), lib=LIBRARY
)


def _added(y: Tensor, low: Tensor) -> Tensor:
    """y + low in the dtype of y, to 16 bits with a dither, as `experts.eager` has it."""
    if y.dtype.itemsize > 2 or is_elsewhere(y):
        return (y + low).to(y.dtype)
    found: Tensor = _Added.apply(y, low)
    return found


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, low: Tensor) -> Tensor:
        ctx.dtype = low.dtype
        return round_dithered(y.float() + low, y.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, cast(dy, ctx.dtype)


class _ExpertGLoRALinear(Operator):
    name = "expert_glora_linear"
    signature = Signature(Inputs, Terms, Call, Codes)
    results = reads = Made._fields
    trained = ("x", "a", "up", "down", "b", "beta")

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        wanted = self.graded(wanted)
        needs, count = _needs(wanted), len(row)
        weight, _, t, call = self.read(row, values)
        eager = routes.is_eager(call.route)  # kernels make h, σ and Z again from x
        keeps_shift = needs.a or needs.beta
        keeps_x = needs.a or needs.down or (not eager and (needs.up or needs.b))
        kept = Made(
            y=needs.a and (eager or registered),
            h=(needs.up or (needs.a and t.up is not None)) and (eager or registered),
            sigma=t.b is not None and (needs.b or needs.a) and (eager or registered),
        )
        own = [t is not None and (keeps_shift or i != _BETA) for i, t in enumerate(row)]
        saved = [i for i, keep in enumerate((keeps_x, *own[1:], *kept)) if keep]
        builds = isinstance(weight, QuantizedWeight) or weight.dtype != given(row[0]).dtype
        return Prepared(
            self, values, wanted, saved, size=count + len(kept), with_rows=(0,), has_kernels=False, keeps=registered,
            guard=workspace_lock if given(row[0]).is_cuda and builds else None,
        )  # fmt: skip

    def read(self, row: Row, values: Values) -> tuple[Weight, Groups, Terms, Call]:
        inputs, t, call, codes = self.signature.read(row, values)
        return weight_of(inputs.weight, codes), groups_of(inputs, call), t, call

    def forward(self, row: Row, values: Values) -> Made:
        weight, groups, t, call = self.read(row, values)
        return path_of("experts", call.route).forward(given(row[0]), weight, groups, t, call)

    def backward(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
        own, made = row[: len(wanted)], Made(*row[len(wanted) :])
        weight, groups, t, call = self.read(own, values)
        needs = _needs(wanted)
        found = path_of("experts", call.route).backward(dys[0], own[0], weight, groups, t, made, call, needs)
        grads = dict(zip(_PLACES, found, strict=True))
        # x is not here where dx alone is made, which has its dtype.
        return [
            grad if (grad := grads[i]) is None or (tensor := own[i]) is None else cast(grad, tensor.dtype)
            for i, want in enumerate(wanted)
            if want
        ]

    def composite(self, row: Row, values: Values) -> tuple[Tensor]:
        weight, groups, t, call = self.read(row, values)
        _, h, sigma = row[self.count :] or (None,) * 3
        return (composite.expert_linear(given(row[0]), weight, groups, t, call, h, sigma),)

    def fake(self, inputs: Inputs, t: Terms, call: Call, codes: Codes) -> Made:
        x, (n, _) = inputs.x, self._sizes(inputs.weight.shape, inputs.starts.shape, codes)
        m = x.shape[0] if inputs.order is None else inputs.order.shape[0]
        rank = 0 if t.up is None else t.up.shape[2]
        return Made(
            y=x.new_empty(m, n),
            h=x.new_empty(m, rank, dtype=factor_dtype(x.dtype, (t.up, t.down))) if rank else None,
            sigma=x.new_empty(m, dtype=wide_dtype(x.dtype)) if t.b is not None else None,
        )

    @staticmethod
    def _sizes(weight: Any, starts: Any, codes: Codes) -> tuple[int, int]:
        """N and K of one expert."""
        if not codes.form:
            return weight[1], weight[2]
        return codes.form[0] // (starts[0] - 2), codes.form[1]

    def input_shapes(self, dys: Sequence[Tensor], inputs: Inputs, t: Any, call: Call, codes: Codes) -> list[Any]:
        k = self._sizes(inputs.weight.shape, inputs.starts.shape, codes)[1]
        return [(dys[0].shape[0] // (call.each if call.of_tokens else 1), k)]

    def flops(self, inputs: Any, t: Any, call: Call, codes: Codes) -> int:
        n, k = self._sizes(inputs.weight, inputs.starts, codes)
        m = inputs.x[0] if inputs.order is None else inputs.order[0]
        return 2 * m * (n * k + (0 if t.up is None else t.up[2] * (n + k)))

    def backward_flops(self, dy: Any, needs: Sequence[bool], inputs: Any, t: Any, call: Call, codes: Codes) -> int:
        (n, k), m, need = self._sizes(inputs.weight, inputs.starts, codes), dy[0], Needs(*needs)
        rank = 0 if t.up is None else t.up[2]
        low = n * (need.up + (need.x or need.down)) + k * (need.x + need.down)
        return 2 * m * (n * k * need.x + rank * low)


EXPERTS = _ExpertGLoRALinear()
EXPERTS.register()
_BETA = EXPERTS.signature.tensors.index("beta")
_PLACES = [EXPERTS.signature.tensors.index(name) for name in EXPERTS.trained]


def _needs(wanted: Sequence[bool]) -> Needs:
    return Needs(*(wanted[place] for place in _PLACES))


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
