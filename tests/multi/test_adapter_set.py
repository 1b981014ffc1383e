"""A set of adapters gives what its list gives, in every mode, and after whatever happens to its tensors."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from adapters import mixed

from glora_kernels.multi.op import MULTI
from glora_kernels.nn.adapted import Frozen, Operands, mixed_linear
from glora_kernels.ops import AdapterSet, multi_glora_linear
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.usefixtures("poison")
SOME = [
    GLoRAConfig.lora(3, 6.0), GLoRAConfig("vector", "lora", "vector", "vector", "vector", 3, 2.0),
    GLoRAConfig("constant", "vector", "lora", "none", "constant", 1), GLoRAConfig.lora(3, 3.0),
]  # fmt: skip
ROWS = [0, 1, 3, -1, 2, 0, 3]


def problem_and_set(dtype=torch.float32, configs=SOME, adapters=None, rows=ROWS):
    problem = mixed(configs, rows, k=24, n=16, dtype=dtype, adapters=adapters)
    return problem, AdapterSet([problem.keywords(j) for j in range(len(configs))])


def call(problem, chosen, x=None):
    return multi_glora_linear(problem.x if x is None else x, problem.weight, problem.bias, chosen, problem.rows)


@pytest.fixture
def shortly(monkeypatch):
    """Fails where a call takes the general way."""

    def refuse(*_):
        raise AssertionError("the general way")

    return lambda: monkeypatch.setattr(MULTI, "call", refuse)


@pytest.mark.parametrize("route", ["eager", "triton"])
def test_without_gradients(route, shortly):
    with backend(route), torch.no_grad():
        problem, chosen = problem_and_set()
        wanted = problem.call()
        shortly()
        for _ in range(2):
            assert torch.equal(call(problem, chosen), wanted)
        with torch.inference_mode():
            assert torch.equal(call(problem, chosen), wanted)


def test_each_backend_and_base_has_its_own(shortly):
    problem, chosen = problem_and_set()
    with torch.no_grad():
        for route in ("eager", "triton", "eager"):
            with backend(route):
                assert torch.equal(call(problem, chosen), problem.call())
        for name, value in (("weight", torch.randn(16, 24)), ("bias", torch.randn(16)), ("x", torch.randn(7, 24))):
            setattr(problem, name, value)
            assert torch.equal(call(problem, chosen), problem.call())
        problem.bias.add_(1)
        assert torch.equal(call(problem, chosen), problem.call())


@pytest.mark.parametrize("adapters", [None, torch.bfloat16])
@pytest.mark.parametrize("route", ["eager", "triton"])
def test_what_is_written_into_the_tensors_counts(route, adapters):
    problem, chosen = problem_and_set(adapters=adapters)
    if adapters:
        problem.adapters[0]["B_up"].data = problem.adapters[0]["B_up"].data.float()  # dtypes that differ take copies
    with backend(route), torch.no_grad():
        for _ in range(2):
            assert torch.equal(call(problem, chosen), problem.call())
            for tensor in problem.adapters[0].values():
                tensor.add_(1)


def test_other_data_counts():
    problem, chosen = problem_and_set()
    own = problem.adapters[0]
    with torch.no_grad():
        call(problem, chosen)
        own["B_up"].data = torch.randn(16, 5)
        with pytest.raises(ValueError, match=re.escape("adapters[0]: b_down must be (R, 24)")):
            call(problem, chosen)
        own["B_down"].data = torch.randn(5, 24)
        assert torch.equal(call(problem, chosen), problem.call())
        whole = torch.randn(24, 16)
        own["B_up"].data, own["B_down"].data = whole.view(-1)[:80].view(16, 5), torch.randn(5, 24)
        assert torch.equal(call(problem, chosen), problem.call())
        own["B_up"].data = whole.view(-1)[:80].view(5, 16).t()  # the same address
        assert torch.equal(call(problem, chosen), problem.call())
        own["B_up"].data = own["B_up"].data.double()
        assert torch.equal(call(problem, chosen), problem.call())


def test_a_failed_call_changes_nothing():
    problem, chosen = problem_and_set()
    with torch.no_grad():
        wanted = call(problem, chosen)
        with pytest.raises(ValueError, match="do not fit"):
            call(problem, chosen, torch.zeros(7, 23))
        with pytest.raises(ValueError, match="rows must have one entry a row of x"):
            call(problem, chosen, torch.zeros(6, 24))
        assert torch.equal(call(problem, chosen), wanted)


def test_gradients_and_autocast_take_the_general_way():
    problem, chosen = problem_and_set()
    with torch.no_grad():
        call(problem, chosen)
    found, wanted = problem.results(lambda: call(problem, chosen)), problem.ours()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = call(problem, chosen)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, problem.call())


def test_leading_dimensions():
    problem, chosen = problem_and_set()
    with torch.no_grad():
        wanted = problem.call()
        problem.rows = problem.rows.view(1, 7)
        assert torch.equal(call(problem, chosen, problem.x[None]), wanted[None])
        problem.rows = problem.rows.view(7)
        wide = torch.zeros(7, 48)
        wide[:, ::2] = problem.x
        assert torch.equal(call(problem, chosen, wide[:, ::2]), wanted)


@pytest.mark.parametrize("route", ["eager", "triton"])
def test_dropout_follows_its_key(route):
    problem, chosen = problem_and_set(configs=[GLoRAConfig.lora(3, 6.0, dropout=0.5), SOME[0]], rows=[0, 1, 0, 0])
    with backend(route), torch.no_grad():
        first = call(problem, chosen)
        assert torch.equal(first, problem.call())
        assert not torch.equal(call(problem, chosen.with_seeds([torch.tensor([5])])), first)
        problem.seeds[0].add_(1)  # the same tensor
        assert torch.equal(call(problem, chosen), problem.call())


def test_compiled():
    problem, chosen = problem_and_set()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def run(x):
        return call(problem, chosen, x)

    with torch.no_grad():
        assert torch.equal(run(problem.x), problem.call())
    assert len(graphs) == 1


def test_a_copy_has_tensors_of_its_own():
    problem, chosen = problem_and_set()
    with torch.no_grad():
        wanted = call(problem, chosen)
        other = copy.deepcopy(chosen)
        problem.adapters[0]["B_up"].add_(1)
        assert torch.equal(call(problem, other), wanted)


def test_errors():
    with pytest.raises(TypeError, match="takes a sequence of mappings"):
        AdapterSet({"a": torch.zeros(2, 11)})
    with pytest.raises(TypeError, match=re.escape("adapters[1] has 'b_upp'; accepted are")):
        AdapterSet([{}, {"b_upp": torch.zeros(1)}])
    with pytest.raises(TypeError, match=re.escape("adapters[0]['a'] must be a tensor, got float")):
        AdapterSet([{"a": 1.0}])


def test_a_layer_keeps_its_set_until_its_adapters_are_others(monkeypatch):
    problem, _ = problem_and_set()
    base, kept = Frozen(problem.weight, problem.bias), {}
    from glora_kernels.nn import adapted

    made = []
    real = adapted.AdapterSet
    monkeypatch.setattr(adapted, "AdapterSet", lambda each: made.append(real(each)) or made[-1])

    def operands():
        return [Operands.of(c, own, True) for c, own in zip(problem.configs, problem.adapters, strict=True)]

    def check(count):
        with torch.no_grad():
            y = mixed_linear(problem.x, base, operands(), problem.rows, kept)
            assert torch.equal(y, mixed_linear(problem.x, base, operands(), problem.rows))
        made.pop()  # that of the call that keeps nothing
        assert len(made) == count

    check(1)
    check(1)
    problem.adapters[0]["B_up"] = torch.randn(16, 3)
    check(2)
    problem.configs[0] = GLoRAConfig.lora(3, 1.0)
    check(3)
    check(3)
    problem.adapters[0]["B_up"] = torch.randn(16, 3).requires_grad_() * 1.0  # new in each call: not kept
    check(4)
    check(5)
