"""`ops.expert_glora_linear` against the equation, row by row in float64; and what is no such call."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from expert_problems import BIG, FORMS, OFFSETS, problem
from helpers import thinned
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels.ops import expert_glora_linear
from glora_kernels.quant import quantize_weight
from glora_kernels.spec import CHOICES, GLoRAConfig, all_configs

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
forms = pytest.mark.parametrize("form", FORMS)
EVERY = [
    *(GLoRAConfig.of((c.A, c.B, c.C, c.D, c.E), rank=1 + i % 5, alpha=4.0) for i, c in enumerate(all_configs())),
    *(
        GLoRAConfig.of(("lora", *others), rank=1 + i % 5, alpha=4.0, variant="matmul")
        for i, others in enumerate(itertools.product(*(CHOICES[name] for name in "BCDE")))
    ),
]
"""All 432 forms, and the 108 of the product variant with an A."""
ROWS: dict[str, dict[str, Any]] = {
    "offsets": {"offsets": (OFFSETS, 14)},
    "offsets, no row": {"offsets": ([0, 0, 0, 0], 0)},
    "offsets, none has an expert": {"offsets": ([0, 0, 0, 0], 3)},
    "offsets, all have one": {"offsets": ([0, 2, 2, 6], 6)},
    "one expert a token": {"index": [0, 3, -1, 2, 2]},
    "one token": {"index": [[4, 2]]},
    "no token": {"index": torch.zeros(0, 2)},
    "all on one expert": {"index": [[2]] * 5},
    "none has an expert": {"index": [[-1, 4], [70, -9]]},
    "one expert": {"index": [[0], [0], [-1]], "experts": 1},
    "one row of W": {"n": 1},
    "one column of W": {"k": 1},
    "one of each": {"n": 1, "k": 1, "experts": 1, "index": [0]},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", thinned(7, EVERY), ids=str)
def test_every_form_by_the_letter(config, bias):
    p = problem(config, bias=bias)
    p.exact(p.ours())


@forms
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_every_kind(rows, form):
    p = problem(FORMS[form], **ROWS[rows])
    p.exact(p.ours())
    for dtype in DTYPES[:2]:
        p = problem(FORMS[form], dtype=dtype, **ROWS[rows])
        p.check(p.ours(), dtype)


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integers_of_any_size(kind):
    for how in ({"index": [[0, 3], [3, 9]]}, {"offsets": (OFFSETS, 14)}):
        p = problem(FORMS["LoRA"], **how)
        p.where = {name: own.to(kind) for name, own in p.where.items()}
        p.exact(p.ours())


@forms
def test_adapters_that_all_experts_share(form):
    """The gradient is the sum over all, and what is shared may be any of the tensors."""
    names = [*problem(FORMS[form]).adapters]
    for shared in (names, names[::2], names[1::2]):
        p = problem(FORMS[form], shared=tuple(shared))
        p.exact(p.ours())


def drawn(*shape: int) -> Tensor:
    """An index with rows that have no expert."""
    return torch.randint(-1, 5, shape, generator=torch.Generator().manual_seed(0))


def odd(tensor: Tensor) -> Tensor:
    """The same numbers, with other strides and at an address that is no multiple of 16 bytes."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def turned(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [odd, turned])
@forms
def test_tensors_of_any_layout(form, layout, dtype):
    p = problem(FORMS[form], dtype=dtype)
    p.x, p.weight, p.dy, p.bias = map(layout, (p.x, p.weight, p.dy, p.bias))
    p.adapters = {name: layout(own) for name, own in p.adapters.items()}
    p.where["index"] = turned(p.where["index"])
    p.exact(p.ours()) if dtype == torch.float64 else p.check(p.ours(), dtype)


def test_expanded_tensors():
    p = problem(FORMS["A vector, B lora, C, D, E"])
    p.x, p.weight, p.dy = p.x[:1].expand(7, -1), p.weight[:1].expand(4, -1, -1), p.dy[:1, :1].expand(7, 2, -1)
    p.adapters["b_up"] = p.adapters["b_up"][:, :1].expand(-1, 11, -1)
    p.exact(p.ours())


@pytest.mark.parametrize("rate", [1e-6, 0.3, 0.9])
@pytest.mark.parametrize("form", [name for name, own in FORMS.items() if own.B == "lora"])
def test_dropout_goes_by_the_row_of_x(form, rate):
    """One mask a call, in forward, in backward and where a checkpoint computes it again."""
    config = replace(FORMS[form], dropout=rate)
    for rows in ({}, ROWS["offsets"], ROWS["one expert a token"]):
        p = problem(config, **rows)
        p.exact(p.ours())
        p.exact(p.ours(lambda leaves, p=p: checkpoint(p.call, leaves, use_reentrant=False)))
    for dtype, adapters in itertools.product(DTYPES, (None, torch.float32)):
        p = problem(config, dtype=dtype, adapters=adapters)
        p.check(p.ours(), dtype)


@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@forms
def test_other_dtypes_are_as_near_as_the_letter(form, dtype, adapters):
    p = problem(FORMS[form], dtype=dtype, adapters=adapters, index=drawn(40, 2), k=70, n=33)
    p.check(p.ours(), dtype)


SMALL = {
    "A": GLoRAConfig("vector", "none"), "B": GLoRAConfig("none", "vector"),
    "B constant": GLoRAConfig("none", "constant"), "C": GLoRAConfig("none", "none", "vector"),
    "D": GLoRAConfig("none", "none", D="vector"), "E": GLoRAConfig("none", "none", E="constant"),
    "LoRA": GLoRAConfig.lora(4), "LoRA, dropout": GLoRAConfig.lora(4, dropout=0.3),
    "A lora": GLoRAConfig("lora", "none", rank=4), "A lora, B lora": GLoRAConfig("lora", "lora", rank=4, dropout=0.3),
    "product variant": GLoRAConfig("lora", "none", rank=4, variant="matmul"),
}  # fmt: skip


@pytest.mark.parametrize("form", SMALL)
def test_small_fp32_adapters_are_not_rounded_away(form):
    """What they add to results in bf16, a thirtieth of half a unit in the last place, is there on average."""
    config = SMALL[form]
    index = torch.randint(4, (300, 2), generator=torch.Generator().manual_seed(0))
    size = 5e-3 if "lora" in (config.A, config.B) else 1e-4
    p = problem(config, dtype=torch.bfloat16, adapters=torch.float32, index=index, size=size, n=64, k=48)
    base = replace(p, adapters={name: own * 0 for name, own in p.adapters.items()})
    found, plain, wanted, without = p.ours(), base.ours(), p.literal(), base.literal()
    for name in ("y", "x"):
        truth = wanted[name] - without[name]
        if truth.any() and not (name == "x" and config.A == "lora" and config.variant == "hadamard"):
            share = float(((found[name].double() - plain[name].double()) * truth).sum() / truth.square().sum())
            assert abs(share - 1) < 0.2, (name, share)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", BIG)
def test_a_base_in_4_bits(form, dtype, nested, quant_type):
    """300 blocks an expert: those of nested absmax, of 256, lie in two of them. A row of W is no whole number."""
    quant = {"quant_type": quant_type, "blocksize": 64, "double_quant": nested}
    p = problem(BIG[form], dtype=dtype, quant=quant, n=12, k=1600 if nested else 16)
    p.exact(p.ours()) if dtype == torch.float64 else p.check(p.ours(), dtype)


def test_how_many_experts_a_4_bit_weight_has():
    """From the bias, offsets, an adapter or `experts`, and never a guess."""
    p = problem(FORMS["base"], quant={"quant_type": "nf4", "blocksize": 64}, n=16, k=16, bias=True)
    wanted = p.literal()["y"]
    index, up, down = p.where["index"], torch.randn(1, 16, 2).double(), torch.randn(4, 2, 16).double()
    call = partial(expert_glora_linear, p.x, p.weight)
    plain = call(experts=4, index=index)
    assert plain.shape == wanted.shape
    assert torch.allclose(call(p.bias, index=index), wanted)
    assert torch.equal(call(None, {"e": p.bias * 0}, index=index), plain)
    assert torch.equal(call(None, {"b_up": up * 0, "b_down": down}, index=index), plain)
    assert torch.equal(call(offsets=torch.tensor([0, 2, 2, 7])), call(offsets=torch.tensor([0, 2, 2, 7]), experts=4))
    for adapters in (None, {"a": torch.zeros(1, 1).double()}, {"b_up": up, "b_down": down[:1]}):
        with pytest.raises(ValueError, match=r"does not say how many experts it has.*give experts=E"):
            call(None, adapters, index=index)


NAMES = ("x", "bias", "a", "b_down", "c")


@pytest.mark.parametrize("wanted", [s for r in range(6) for s in itertools.combinations(NAMES, r)], ids=str)
def test_every_subset_of_gradients(wanted):
    p = problem(FORMS["A vector, B lora, C, D, E"])
    truth = p.literal()
    leaves = {name: own.detach().requires_grad_(name in wanted) for name, own in p.leaves().items()}
    y = p.call(leaves)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(p.dy)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        assert leaf.grad is None or torch.allclose(leaf.grad, truth[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", BIG)
def test_each_gradient_alone(form):
    p = problem(BIG[form])
    truth = p.literal()
    for name, own in p.leaves().items():
        leaf = own.detach().requires_grad_()
        (found,) = torch.autograd.grad(p.call({name: leaf}), leaf, p.dy)
        assert torch.allclose(found, truth[name], rtol=1e-12, atol=1e-12), name
    with torch.inference_mode():
        y = p.call()
    assert y.is_inference()
    assert torch.allclose(y, truth["y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", BIG)
def test_autocast_casts_x_and_w_alone(form):
    p = problem(BIG[form], dtype=torch.float32, size=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = p.ours()
    assert found["y"].dtype == torch.bfloat16
    halves = replace(p, x=p.x.bfloat16(), weight=p.weight.bfloat16())
    plain = halves.ours()
    for name, value in found.items():
        assert name == "y" or value.dtype == torch.float32
        assert torch.allclose(value.float(), plain[name].float(), rtol=2**-7, atol=2**-7), name
    with torch.autocast("cpu", torch.bfloat16):
        q = problem(BIG[form])
        q.exact(q.ours())  # float64 stays


KEPT = {
    "base": 0, "LoRA": 3, "A vector, B lora, C, D, E": 11 + 5, "A constant, B vector, C lora": 11 + 1,
    "product variant": 6,
}  # fmt: skip


@pytest.mark.parametrize("form", KEPT)
def test_what_backward_keeps(form):
    """Of the size of rows h, σ, and where A is trained y; x is the caller's own, and nothing is of the size of W."""
    p = problem(FORMS[form], index=drawn(500, 2))
    leaves = {name: own.detach().requires_grad_() for name, own in p.leaves().items()}
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        p.call(leaves)
    known = {t.untyped_storage().data_ptr() for t in (*leaves.values(), p.weight)}
    storages = {t.untyped_storage().data_ptr(): t for t in kept.values() if t.is_floating_point()}
    rows = [t for address, t in storages.items() if address not in known and len(t) == 1000]
    assert sum(t.untyped_storage().nbytes() for t in rows) == KEPT[form] * 1000 * 8
    others = [t for address, t in storages.items() if address not in known and len(t) != 1000]
    assert all(t.numel() <= 4 * 20 * 6 for t in others)  # β, U·s and what is joined of two pairs
    assert any(t.data_ptr() == p.x.data_ptr() for t in kept.values()) == (p.config.A != "none" or p.config.B == "lora")


@pytest.mark.parametrize("form", ["LoRA", "A vector, B lora, C, D, E"])
def test_overwritten_operands_are_noticed(form):
    for name in ("x", "b_up", "b_down"):
        p = problem(FORMS[form])
        leaves = {each: own.detach().clone().requires_grad_() for each, own in p.leaves().items()}
        y = p.call(leaves)
        with torch.no_grad():
            leaves[name].add_(1.0)
        with pytest.raises(RuntimeError, match="overwritten in place between the forward of a layer and its backward"):
            y.backward(p.dy)


def test_what_backward_does_not_read_may_be_overwritten():
    p = problem(FORMS["LoRA"], dtype=torch.float32)
    wanted, bias = p.ours()["b_up"], p.bias.clone()
    up = p.adapters["b_up"].detach().requires_grad_()
    y = p.call({"bias": bias, "b_up": up})
    bias.add_(1.0)
    y.backward(p.dy)
    assert torch.equal(up.grad, wanted)


@forms
def test_the_same_bits_every_time_and_on_the_eager_path(form):
    p = problem(FORMS[form], dtype=torch.bfloat16, index=drawn(64, 3))
    first = p.ours()
    for _ in range(2):
        assert all(torch.equal(first[name], own) for name, own in p.ours().items())
    with gk.backend("eager"):
        assert all(torch.equal(first[name], own) for name, own in p.ours().items())


@forms
def test_batch_invariant(form):
    p = problem(FORMS[form], dtype=torch.float32)
    with gk.batch_invariant():
        whole = p.ours()
        p.check(whole, torch.float32)
        for part in (slice(0, 1), slice(2, 3), slice(4, 7)):
            own = replace(p, x=p.x[part], dy=p.dy[part], where={"index": p.where["index"][part]}).ours()
            assert torch.equal(own["y"], whole["y"][part])
            assert torch.equal(own["x"], whole["x"][part])
        if p.config.B == "lora":
            with pytest.raises(ValueError, match="dropout_p must be 0 for experts inside batch_invariant"):
                replace(p, config=replace(p.config, dropout=0.5)).call()


def of(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(*shape, **how)


INDEX = torch.zeros(3, 2, dtype=torch.int64)
CODES = quantize_weight(torch.randn(4 * 16, 16), "nf4", 64)
PAIR = {"b_up": of(4, 11, 2), "b_down": of(4, 2, 20)}
ERRORS: dict[str, dict[str, Any]] = {
    "give one of index (the experts of each token) and offsets": {"offsets": INDEX[0]},
    "give one of index (the experts of each token) and offsets (where": {"index": None},
    "index must be (3,) or (3, k), one row a token, k >= 1; got (2, 2)": {"index": INDEX[:2]},
    "one row a token, k >= 1; got (3, 0)": {"index": INDEX[:, :0]},
    "one row a token, k >= 1; got (3, 1, 2)": {"index": INDEX[:, None]},
    "index must be a tensor of integers; got torch.float32": {"index": of(3, 2)},
    "index must be a tensor of integers; got torch.bool": {"index": INDEX > 0},
    "index must be a tensor of integers; got torch.complex128": {"index": of(3, dtype=torch.complex128)},
    "index must be a tensor of integers; got list": {"index": [0, 1, 2]},
    "x and index must be on one device; got x on cpu and index on meta": {"index": INDEX.to("meta")},
    "offsets must be (4,), one an expert; got (3,)": {"index": None, "offsets": INDEX[:, 0]},
    "offsets must rise from 0 on to 3, the number of rows, at most; got [0, 2, 2, 4]": {
        "index": None, "offsets": torch.tensor([0, 2, 2, 4])
    },
    "at most; got [1, 0, 2, 3]": {"index": None, "offsets": torch.tensor([1, 0, 2, 3])},
    "at most; got [-1, 0, 2, 3]": {"index": None, "offsets": torch.tensor([-1, 0, 2, 3])},
    "x must be a matrix, of tokens (T, K) or of rows (M, K); got (3, 4, 20)": {"x": of(3, 4, 20)},
    "of rows (M, K); got list": {"x": [[0.0]]},
    "x must be a floating-point tensor, got torch.int64": {"x": torch.zeros(3, 20, dtype=torch.int64)},
    "x (..., K) and weight[e] (N, K) do not fit: (3, 19), (11, 20)": {"x": of(3, 19)},
    "x and weight[e] must have one dtype outside autocast; got torch.float64, torch.float32": {"x": of(3, 20).double()},
    "weight must be (E, N, K) with E >= 1; got (11, 20)": {"weight": of(11, 20)},
    "weight must be (E, N, K) with E >= 1; got (0, 11, 20)": {"weight": of(0, 11, 20)},
    "weight must be a tensor or a QuantizedWeight; got list": {"weight": [of(11, 20)]},
    "call weight.requires_grad_(False)": {"weight": of(4, 11, 20, requires_grad=True)},
    "experts must be 4, as weight (4, 11, 20) says; got 3": {"experts": 3},
    "E·N rows; got 64 rows and E = 3": {"weight": CODES, "experts": 3, "x": of(3, 16)},
    "whole blocks of 64 for each; got 32 numbers an expert": {"weight": CODES, "experts": 32, "x": of(3, 16)},
    "weight is on meta and x on cpu": {"weight": of(4, 11, 20, device="meta")},
    "bias must be (4, 11); got (1, 11)": {"bias": of(1, 11)},
    "bias must be a tensor or None; got float": {"bias": 1.0},
    "adapters must be a mapping of names to tensors, or None; got list": {"adapters": [PAIR]},
    "adapters has 'wc'; accepted are a, a_up": {"adapters": {"wc": of(4, 11)}},
    "a must be a tensor or None; got float": {"adapters": {"a": 1.0}},
    "a must have 4 (one an expert) or 1 in front; got (3, 11)": {"adapters": {"a": of(3, 11)}},
    "e must have 4 (one an expert) or 1 in front; got (11,)": {"adapters": {"e": of(11)}},
    "of one expert: a must have shape (11,) or (1,); got (12,)": {"adapters": {"a": of(4, 12)}},
    "of one expert: c must have shape (20,); got (11,)": {"adapters": {"c": of(4, 11)}},
    "of one expert: b_down must be (R, 20) and b_up (11, R)": {"adapters": PAIR | {"b_down": of(4, 2, 3)}},
    "b_up is missing": {"adapters": {"b_down": PAIR["b_down"]}},
    "two forms of one support": {"adapters": PAIR | {"b": of(4, 11)}},
    "variant='matmul' accepts a_up and a_down, not a": {"adapters": {"a": of(4, 11), "variant": "matmul"}},
    "variant must be one of 'hadamard', 'matmul'; got 'product'": {"adapters": {"variant": "product"}},
    "d scales the bias: it cannot be given where bias is None": {"adapters": {"d": of(4, 11)}},
    "dropout_p must be in [0, 1), got 1.0": {"adapters": PAIR | {"dropout_p": 1.0}},
    "dropout_p=0.5 needs a seed": {"adapters": PAIR | {"dropout_p": 0.5}},
    "seed must be one int64 in a tensor (`dropout_seed`); got int": {"adapters": PAIR | {"dropout_p": 0.5, "seed": 1}},
    "seed must be one int64 on the CPU or on the device of x": {"adapters": PAIR | {"dropout_p": 0.5, "seed": of(1)}},
    "a is on meta and x on cpu": {"adapters": {"a": of(4, 11, device="meta")}},
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_accepted(message):
    given = {"x": of(3, 20), "weight": of(4, 11, 20), "index": INDEX} | ERRORS[message]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        expert_glora_linear(**given)
