"""Rows of many adapters as one call: each row as its adapter alone would have it, in float64 to 1e-12."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest
import torch
from adapters import Mixed, mixed
from torch.utils.flop_counter import FlopCounterMode

from glora_kernels.ops import glora_linear, multi_glora_linear
from glora_kernels.quant import quantize_weight
from glora_kernels.reference.tolerance import largest_error
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig, all_configs

pytestmark = pytest.mark.usefixtures("poison")
OPS = torch.ops.glora_kernels
EVERY = [GLoRAConfig.of((c.A, c.B, c.C, c.D, c.E), rank=1 + i % 5, alpha=4.0) for i, c in enumerate(all_configs())]
"""All 432 forms, of ranks 1 to 5."""
random.Random(0).shuffle(EVERY)
SOME = [
    GLoRAConfig.lora(3, 6.0), GLoRAConfig("vector", "lora", "vector", "vector", "vector", 5, 2.0),
    GLoRAConfig("lora", "lora", "none", "none", "constant", 2),
    GLoRAConfig("constant", "vector", "lora", "none", "none", 1),
    GLoRAConfig("none", "none", "none", "none", "vector"), GLoRAConfig.lora(1, 3.0, dropout=0.3),
    GLoRAConfig("lora", "constant", "none", "none", "none", 3, variant="matmul"),
    GLoRAConfig("vector", "lora", "none", "none", "none", 4, dropout=0.5),
]  # fmt: skip
ROWS = [0, 5, 1, -1, 2, 2, 2, 3, 5, 7, 0, 6, 1, -1, 3, 5, 2, 6, 7, 7]
"""Nothing for adapter 4."""


def close(found, wanted, tolerance=1e-12):
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype
        size = max(1.0, float(wanted[name].abs().max()) if wanted[name].numel() else 0.0)
        assert largest_error(value, wanted[name]) <= tolerance * size, name


@pytest.mark.parametrize(
    ("first", "bias"),
    [*((first, True) for first in range(0, 432, 24)), *((first, False) for first in range(0, 432, 96))],
)
def test_every_form_as_a_loop_over_single_layers(first, bias):
    generator = random.Random(first)
    rows = [generator.randrange(-1, 24) for _ in range(70)]
    problem = mixed(EVERY[first : first + 24], rows, bias=bias, seed=first)
    close(problem.ours(), problem.loop())
    ordered = mixed(EVERY[first : first + 24], sorted(j for j in rows if j >= 0), bias=bias, seed=first)
    ordered.lengths = torch.bincount(ordered.rows, minlength=24).tolist()
    close(ordered.ours(), ordered.loop())


@pytest.mark.parametrize("rows", [ROWS, [0] * 20, [-1] * 20, [2] * 2 + [6] + [-1], [3], list(range(8))])
def test_by_the_letter(rows):
    problem = mixed(SOME, rows)
    problem.check(problem.ours(), torch.float64)


@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_are_as_near_as_the_letter(dtype, adapters):
    problem = mixed(SOME, ROWS * 3, k=70, n=33, dtype=dtype, adapters=adapters, size=0.1)
    problem.check(problem.ours(), dtype)


def test_leading_dimensions_and_no_rows_at_all():
    problem = mixed(SOME, ROWS, lead=(5, 4))
    close(problem.ours(), problem.loop())
    empty = mixed(SOME, [])
    close(empty.ours(), empty.loop())
    one = mixed(SOME, [1])
    y = replace(one, x=one.x[0], rows=torch.tensor(1)).call()
    assert y.shape == (11,)
    assert torch.allclose(y, glora_linear(one.x[0], one.weight, one.bias, **one.keywords(1)))


def test_an_x_that_is_no_plain_matrix():
    problem = mixed(SOME, ROWS)
    wanted = problem.ours()["y"]
    wide = torch.zeros(20, 41, dtype=torch.float64)
    wide[:, 1::2] = problem.x.detach()
    assert torch.allclose(replace(problem, x=wide[:, 1::2]).call(), wanted)
    parts = problem.x.detach().split([3, 17])
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(list(parts), layout=layout)
        y = replace(problem, x=nested).call()
        assert y.is_nested
        assert torch.allclose(torch.cat(y.unbind()), wanted)


def test_a_tensor_in_several_adapters_has_the_sum_of_its_gradients():
    first, second = mixed([SOME[0], SOME[0]], [0, 1, 1, 0, 0]), mixed([SOME[0], SOME[0]], [0, 1, 1, 0, 0])
    first.adapters[1]["B_down"] = first.adapters[0]["B_down"]
    second.adapters[1]["B_down"].data.copy_(second.adapters[0]["B_down"])
    shared, apart = first.ours(), second.ours()
    assert torch.allclose(shared["d0.B_down"], apart["d0.B_down"] + apart["d1.B_down"])
    assert "d1.B_down" not in shared


def test_every_subset_of_gradients():
    names = ["x", "bias", "1.A", "1.C", "2.A_down", "0.B_up"]
    whole = mixed(SOME, ROWS).loop()
    for size in range(len(names) + 1):
        for subset in itertools.combinations(names, size):
            problem = mixed(SOME, ROWS)
            for name, leaf in problem.leaves().items():
                leaf.requires_grad_(name in subset)
            if subset:
                found = problem.ours()
                assert found.keys() == {"y", *(f"d{name}" for name in subset)}
                close(found, {name: whole[name] for name in found})


@pytest.mark.parametrize("stacked_scale", [False, True])
def test_a_stack_is_its_adapters(stacked_scale):
    generator = torch.Generator().manual_seed(0)
    ranks, shapes = [5, 2, 1, 4], ((4, 5, 20), (4, 11, 5), (4, 11), (9, 20), (11, 20))
    down, up, a, x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    rows = torch.tensor([0, 3, 1, 1, 2, -1, 0, 2, 3])
    leaves = [t.requires_grad_() for t in (down, up, a)]
    scale = torch.arange(1.0, 5.0) if stacked_scale else 2.0
    stack = {"b_down": down, "b_up": up, "a": a, "scale": scale, "ranks": ranks}
    each = [
        {"b_down": down[j, :r], "b_up": up[j][:, :r], "a": a[j], "scale": j + 1.0 if stacked_scale else 2.0}
        for j, r in enumerate(ranks)
    ]
    ys = [multi_glora_linear(x, weight, None, adapters, rows) for adapters in (stack, each)]
    assert torch.equal(*ys)
    for found, want in zip(*(torch.autograd.grad(y.sum(), leaves) for y in ys), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("nested", [False, True])
def test_a_base_in_4_bits(nested):
    problem = mixed(SOME, ROWS, k=64, n=32, dtype=torch.float32)
    problem.weight = quantize_weight(problem.weight, "nf4", 64, nested)
    close(problem.ours(), problem.loop(), 2e-5)


def test_autocast_casts_x_alone():
    problem = mixed(SOME, ROWS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = problem.ours(), problem.loop()
    assert found["y"].dtype == torch.bfloat16
    assert largest_error(found["y"], wanted["y"]) <= 0.05
    assert found["d1.A"].dtype == torch.float32


def arguments(problem: Mixed) -> tuple:
    """Of the registered operator, as a call of it has them."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is OPS.multi_glora_linear.default:
                seen.append(args)
            return function(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        problem.call()
    return seen[0]


def test_the_registered_operator():
    problem = mixed(SOME, ROWS, dtype=torch.float32)
    args = arguments(problem)
    torch.library.opcheck(OPS.multi_glora_linear.default, args)


def test_compiled_into_one_graph_for_every_assignment():
    problem = mixed(SOME[:3], [0, 1, 2, -1, 2, 0])
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def run(x, rows):
        return multi_glora_linear(x, problem.weight, problem.bias, keywords, rows)

    keywords = [problem.keywords(j) for j in range(3)]
    for rows in ([0, 1, 2, -1, 2, 0], [2, 2, 2, 2, 2, 2], [-1, -1, 0, 0, 1, 1]):
        problem.rows = torch.tensor(rows)
        close(problem.results(lambda: run(problem.x, problem.rows)), problem.loop())
    assert len(graphs) == 1


def test_torch_func_and_batched_gradients():
    problem = mixed(SOME[:5], [0, 1, 2, -1, 2, 0, 3])
    leaves = problem.leaves()
    wanted = problem.ours()

    def function(values):
        own = [{n: values.get(f"{j}.{n}", t) for n, t in each.items()} for j, each in enumerate(problem.adapters)]
        copy = Mixed(
            values["x"], problem.weight, values["bias"], problem.configs, own, problem.seeds, problem.rows, problem.dy
        )
        return multi_glora_linear(copy.x, copy.weight, copy.bias, [copy.keywords(j) for j in range(5)], copy.rows)

    y, pull = torch.func.vjp(function, {name: leaf.detach() for name, leaf in leaves.items()})
    assert torch.allclose(y, wanted["y"])
    for name, grad in pull(problem.dy)[0].items():
        assert torch.allclose(grad, wanted[f"d{name}"]), name
    out = function(leaves)
    both = torch.autograd.grad(
        out, list(leaves.values()), torch.stack([problem.dy, 2 * problem.dy]), is_grads_batched=True
    )
    for name, grad in zip(leaves, both, strict=True):
        one = wanted[f"d{name}"]
        assert torch.allclose(grad, torch.stack([one, 2 * one])), name


def test_flops():
    problem = mixed([GLoRAConfig.lora(4)] * 2, [0, 1, 1])
    with FlopCounterMode(display=False) as counter:
        problem.ours()
    assert counter.get_total_flops() == 2 * 3 * 20 * 11 * 2 + 2 * 3 * 31 * 4 * 3


def test_overwritten_operands_are_noticed():
    problem = mixed(SOME[:2], [0, 1])
    y = multi_glora_linear(
        problem.x, problem.weight, problem.bias, [problem.keywords(0), problem.keywords(1)], problem.rows
    )
    problem.adapters[0]["B_up"].data.add_(0)
    with torch.no_grad():
        problem.adapters[0]["B_up"].add_(1)
    with pytest.raises(RuntimeError, match="overwritten in place"):
        y.sum().backward()


PAIR = {"b_up": torch.zeros(11, 2), "b_down": torch.zeros(2, 20)}
ERRORS = {
    "rows must be numbers of adapters, 0 to 1, or -1 for the base alone; got 2": {"rows": torch.tensor([0, 2, 1])},
    "0 to 1, or -1 for the base alone; got -2": {"rows": torch.tensor([0, -2, 1])},
    "rows must have one entry a row of x, shape (3,); got (2,)": {"rows": torch.tensor([0, 1])},
    "a tensor of integers; got torch.float32": {"rows": torch.tensor([0.0, 1.0, 1.0])},
    "must be 2 numbers, one an adapter, that add up to the 3 rows of x; got 2 that add up to 4": {"rows": [2, 2]},
    "got 3 that add up to 3": {"rows": [1, 1, 1]},
    "must be integers >= 0; got [4, -1]": {"rows": [4, -1]},
    "rows must be a tensor of integers or a sequence of lengths, got int": {"rows": 3},
    "adapters[1] has 'b_upp'; accepted are": {"adapters": [{}, {"b_upp": torch.zeros(2, 2)}]},
    "adapters[1]: b_down must be (R, 20) and b_up (11, R)": {
        "adapters": [{}, PAIR | {"b_down": torch.zeros(2, 3)}]
    },
    "adapters[0]: dropout_p=0.5 needs a seed": {"adapters": [PAIR | {"dropout_p": 0.5}, {}]},
    "adapters[1]: a is on meta and x on cpu; a call is computed on one device": {
        "adapters": [{}, {"a": torch.zeros(11, device="meta")}]
    },
    "adapters[0]['a'] must be a tensor, got float": {"adapters": [{"a": 1.0}, {}]},
    "with one number of adapters in front; got {'a': 2, 'b': 3}": {
        "adapters": {"a": torch.zeros(2, 11), "b": torch.zeros(3, 11)}
    },
    "scale has 3 entries beside a stack of 2 adapters": {
        "adapters": {"a": torch.zeros(2, 11), "scale": [1.0, 2.0, 3.0]}
    },
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_accepted(message):
    given = {"rows": torch.tensor([0, 1, 1]), "adapters": [{"a": torch.zeros(11)}, {}]} | ERRORS[message]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        multi_glora_linear(torch.zeros(3, 20), torch.zeros(11, 20), None, **given)


def test_a_backend_that_is_not_there():
    with backend("triton"), pytest.raises(RuntimeError):
        multi_glora_linear(
            torch.zeros(1, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64), None, [{}], [1]
        )
