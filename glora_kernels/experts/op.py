"""Experts as an operator: the public function, its checks, and what PyTorch is told of it.

    y[i] = x[token(i)] (W_e + W_e∘A_e + s·B_e)ᵀ + bias_e∘(1+d_e) + e_e + W_e·c_e,   e the expert of row i

What it computes: `experts.eager`. C and A=lora of the product variant are made part of β and of the low-rank path here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from glora_kernels.dispatch.operator import Operator
from glora_kernels.dispatch.prepared import Prepared
from glora_kernels.dispatch.signature import Row, Signature, Values
from glora_kernels.dispatch.ways import is_plain
from glora_kernels.experts import composite
from glora_kernels.experts.call import Call, Inputs, Made, Needs, Terms, groups_of
from glora_kernels.experts.groups import Groups
from glora_kernels.experts.products import of_expert, thin_of_each
from glora_kernels.glora.eager import dropped, mask_of
from glora_kernels.glora.op import glora_linear
from glora_kernels.quant import QuantizedWeight
from glora_kernels.runtime import routes
from glora_kernels.runtime.workspace import workspace_lock
from glora_kernels.spec import VARIANTS

Adapters = Mapping[str, Any]
_TENSORS = ("a", "a_up", "a_down", "b", "b_up", "b_down", "c", "c_up", "c_down", "d", "e")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_NUMBERS: dict[str, Any] = {"scale": 1.0, "dropout_p": 0.0, "seed": None, "variant": "hadamard"}


def expert_glora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    adapters: Adapters | None = None,
    *,
    index: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """The linear layers of E experts, each with its adapter, over the rows that each expert has.

    Row i of expert e has y[i] = glora_linear(x[token(i)], weight[e], bias[e], **adapters of e): a token is read by each
    of its experts, and dx is the sum over them. Gradients of an expert's adapter are sums over its rows, zero where it
    has none; those of a tensor that all experts share are sums over all. Sums have a fixed order. No tensor of E·N·K
    elements is made in either pass, and of the size of rows backward keeps h (M, R) alone; besides y where a vector or
    constant A is trained.

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
            the last have no expert.

    Returns:
        (T, N) or (T, k, N) with `index`, (M, N) with `offsets`, in the dtype of x (of autocast where it is on).

    Raises:
        ValueError: sizes, devices or a combination of arguments that do not fit, or a weight that requires grad.
        TypeError: an argument that `glora_linear` has not, or a dtype that differs from the weight's.

    On a GPU a hadamard A=lora and `batch_invariant` wait for the sizes of the groups: each expert is a call of
    `glora_linear` there.

    Source: the grouped product with tokens read through an index follows Tan et al., "Scattered Mixture-of-Experts
    Implementation", 2024; the adapters of each expert are ours.
    """
    if (index is None) == (offsets is None):
        raise ValueError("give one of index (the experts of each token) and offsets (where the rows of experts end)")
    if not isinstance(x, Tensor) or not is_plain(x) or x.ndim != 2:
        raise ValueError(f"x must be a matrix, of tokens (T, K) or of rows (M, K); got {_shape(x)}")
    experts = _experts(weight, bias, adapters or {})
    if index is not None:
        check_numbers("index", index, x)
        if index.ndim not in (1, 2) or len(index) != len(x):
            raise ValueError(f"index must be ({len(x)},) or ({len(x)}, k), one row a token; got {tuple(index.shape)}")
        y = expert_rows(x, weight, bias, adapters, Groups.of(index, experts), of_tokens=True, is_sorted=False)
        return y.view(*index.shape, y.shape[1])
    check_numbers("offsets", given(offsets), x)
    if given(offsets).shape != (experts,):
        raise ValueError(f"offsets must be ({experts},), one an expert; got {tuple(given(offsets).shape)}")
    return expert_rows(x, weight, bias, adapters, Groups.sorted_by(given(offsets), len(x)), of_tokens=False)


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
    numbers = {name: given_.get(name, default) for name, default in _NUMBERS.items()}
    t = {name: given_.get(name) for name in _TENSORS}
    if numbers["variant"] not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}; got {numbers['variant']!r}")
    product = numbers["variant"] == "matmul"
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
            own = thin_of_each(weight, cast(given(t["a_up"]), narrow))
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
        route = routes.route(own.device.type, own.dtype, four_bit=isinstance(weight, QuantizedWeight))
        return Values((scale, p, groups.each, of_tokens, is_sorted, route, codes.form))

    return EXPERTS.call(row, key, check)[0]


def check_numbers(name: str, tensor: Any, x: Tensor) -> None:
    """The numbers of experts, or of rows, are integers on the device of x."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.dtype.is_floating_point
        or tensor.dtype in (torch.bool, torch.complex64)
    ):
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of integers; got {got}")
    if tensor.device != x.device:
        raise ValueError(f"x and {name} must be on one device; got x on {x.device} and {name} on {tensor.device}")


def _experts(weight: Weight, bias: Tensor | None, adapters: Adapters) -> int:
    """E: of a dense W its first size; beside a 4-bit one the largest first size of another operand."""
    if isinstance(weight, Tensor):
        return weight.shape[0] if weight.ndim else 0
    others = [t for t in (bias, *(adapters.get(name) for name in _TENSORS)) if isinstance(t, Tensor) and t.ndim]
    found = max((t.shape[0] for t in others), default=1)
    if weight.shape[0] % max(1, found):
        raise ValueError(f"a 4-bit weight of {found} experts has {found}·N rows; got {weight.shape[0]}")
    return found


def _check(
    x: Tensor, weight: Weight, bias: Tensor | None, t: Mapping[str, Tensor | None], experts: int, product: bool,
    numbers: Mapping[str, Any],
) -> None:  # fmt: skip
    if isinstance(weight, Tensor) and weight.ndim != 3:
        raise ValueError(f"weight must be (E, N, K); got {tuple(weight.shape)}")
    if isinstance(weight, QuantizedWeight) and weight.shape[0] % experts:
        raise ValueError(f"a 4-bit weight of {experts} experts has {experts}·N rows; got {weight.shape[0]}")
    one = weight[0] if isinstance(weight, Tensor) else weight
    checks.check_product("x", x, "weight[e]", one)
    k, n = one.shape[1], one.shape[0] if isinstance(weight, Tensor) else one.shape[0] // experts
    checks.check_devices(("x", x.device), [("weight", weight), ("bias", bias), *t.items()])
    for name, own in (("bias", bias), *t.items()):
        if own is not None and (own.ndim < 2 or own.shape[0] not in (1, experts)):
            raise ValueError(f"{name} must have {experts} (one an expert) or 1 in front; got {_shape(own)}")
    if bias is not None and bias.shape != (experts, n):
        raise ValueError(f"bias must be ({experts}, {n}); got {tuple(bias.shape)}")
    s = {name: None if own is None else own[0] for name, own in t.items()}
    checks.check_form("a", n, True, (k if product else n, k), s["a"], s["a_up"], s["a_down"])
    if product and s["a"] is not None:
        raise ValueError("variant='matmul' accepts a_up and a_down, not a")
    checks.check_form("b", n, True, (n, k), s["b"], s["b_up"], s["b_down"])
    checks.check_form("c", k, False, (k, 1), s["c"], s["c_up"], s["c_down"])
    if s["d"] is not None and bias is None:
        raise ValueError("d scales the bias: it cannot be given where bias is None")
    for name in ("d", "e"):
        if s[name] is not None:
            checks.check_vector(name, given(s[name]), n, constant=True)
    checks.check_dropout(numbers["dropout_p"])
    if numbers["dropout_p"] and s["b_up"] is not None:
        if numbers["seed"] is None:
            raise ValueError(f"dropout_p={numbers['dropout_p']} needs a seed: pass seed=dropout_seed(x.device)")
        checks.check_seed("seed", numbers["seed"], x.device)


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
        parts.append(cast(thin_of_each(weight, column).squeeze(2), wide))
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
        kept = dropped(x, mask_of(p, numbers["seed"], x.shape[0], x.shape[1], x.device)) * (
            numbers["scale"] / (1.0 - p)
        )
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
            y = (y + linear(low, cast(given(up)[e], narrow))).to(y.dtype)
        found.append(y)
    rest = len(rows) - sum(map(len, found))
    y = torch.cat([*found, found[0].new_zeros(rest, found[0].shape[1])])
    return y if is_sorted else groups.unsort(y)


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
        keeps_x = needs.a or needs.down or (not eager and (needs.up or needs.b))
        kept = Made(
            y=needs.a and (eager or registered),
            h=(needs.up or (needs.a and t.up is not None)) and (eager or registered),
            sigma=t.b is not None and (needs.b or needs.a) and (eager or registered),
        )
        saved = [i for i, keep in enumerate((keeps_x, *[t is not None for t in row[1:]], *kept)) if keep]
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
_PLACES = [EXPERTS.signature.tensors.index(name) for name in EXPERTS.trained]


def _needs(wanted: Sequence[bool]) -> Needs:
    return Needs(*(wanted[place] for place in _PLACES))


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
