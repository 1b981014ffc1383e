"""Adapters of one form with few rows each are computed as one: to 1e-12 as each alone, with or without padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from adapters import mixed

from glora_kernels.multi import eager
from glora_kernels.multi.stacked import MOST, Stack
from glora_kernels.ops import AdapterSet, multi_glora_linear
from glora_kernels.reference.tolerance import largest_error
from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.usefixtures("poison")
FORMS = {
    "LoRA": [GLoRAConfig.lora(3, alpha) for alpha in (6.0, 3.0, 6.0, 1.0)],
    "LoRA, one scale": [GLoRAConfig.lora(3, 6.0)] * 4,
    "dropout": [GLoRAConfig.lora(3, 6.0, dropout=p) for p in (0.5, 0.3, 0.3, 0.1)],
    "vectors": [GLoRAConfig("vector", "vector", "vector", "vector", "vector", 1)] * 4,
    "constants": [GLoRAConfig("constant", "constant", "none", "constant", "constant", 1)] * 4,
    "a constant E alone": [GLoRAConfig("none", "none", "none", "none", "constant", 1)] * 4,
    "a constant B alone": [GLoRAConfig("none", "constant", "none", "none", "none", 1)] * 4,
    "everything": [GLoRAConfig("vector", "lora", "lora", "constant", "vector", 3, 2.0)] * 4,
    "A=lora": [GLoRAConfig("lora", "lora", "none", "none", "vector", 2)] * 4,
}
ROWS = {
    "one each": [3, 1, 0, 2], "one number of rows": [0, 0, 1, 1, 2, 2, 3, 3],
    "padded": [*[0] * 5, *[1] * 8, 3, 3, 2, 3],
    "unsorted": [3, 2, -1, 3, 2, 3, 0, 1, 1, 0, 2, 2, 0],
}  # fmt: skip


STACKED = {"one each": 4, "one number of rows": 4, "padded": 2, "unsorted": 3}


@pytest.fixture
def stacks(monkeypatch):
    """The numbers of adapters of the stacks that were made."""
    found, make = [], Stack.of

    def counted(parts, like):
        found.append(len(parts))
        return make(parts, like)

    monkeypatch.setattr(eager.Stack, "of", staticmethod(counted))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("form", "rows"), itertools.product(FORMS, ROWS))
def test_as_each_alone(form, rows, bias, stacks):
    configs = FORMS[form] if bias else [c for c in FORMS[form] if c.D == "none"]
    if not configs:
        pytest.skip("D needs a bias")
    problem = mixed(configs, ROWS[rows], bias=bias)
    found, wanted = problem.ours(), problem.loop()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert largest_error(value, wanted[name]) <= 1e-12 * max(1.0, float(wanted[name].abs().max())), name
    builds = form == "A=lora" and max(map(ROWS[rows].count, range(4))) > eager.FEW
    assert set(stacks) == (set() if builds else {STACKED[rows]})


@pytest.mark.parametrize("adapters", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_other_dtypes_are_as_near_as_the_letter(form, dtype, adapters, stacks):
    problem = mixed(FORMS[form], ROWS["padded"] * 2, k=70, n=33, dtype=dtype, adapters=adapters, size=0.1)
    problem.check(problem.ours(), dtype)
    assert stacks or form == "A=lora"


def test_adapters_of_other_gradients_or_ranks_or_with_many_rows_are_not_stacked(stacks):
    many = mixed(FORMS["LoRA"][:2], [*[0] * (MOST + 1), *[1] * (MOST + 1)])
    ranks = mixed([GLoRAConfig.lora(r, 1.0) for r in (1, 2)], [0, 1])
    for problem in (many, ranks):
        wanted = problem.loop()
        for name, value in problem.ours().items():
            assert largest_error(value, wanted[name]) <= 1e-12 * max(1.0, float(wanted[name].abs().max())), name
    assert not stacks
    frozen = mixed(FORMS["LoRA"][:2], [0, 1])
    for name in ("B_up", "B_down"):
        frozen.adapters[1][name].requires_grad_(False)
    wanted = frozen.loop()
    for name, value in frozen.ours().items():
        assert largest_error(value, wanted[name]) <= 1e-12 * max(1.0, float(wanted[name].abs().max())), name
    assert stacks == [2]  # forward alone


def test_a_row_is_the_same_in_every_call():
    problem = mixed(FORMS["everything"], ROWS["unsorted"], dtype=torch.float32)
    first, second = problem.ours(), problem.ours()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_set_gives_what_its_list_gives():
    problem = mixed(FORMS["everything"], ROWS["unsorted"])
    keywords = [problem.keywords(j) for j in range(4)]
    chosen, wanted = AdapterSet(keywords), problem.ours()
    found = problem.results(lambda: multi_glora_linear(problem.x, problem.weight, problem.bias, chosen, problem.rows))
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    with torch.no_grad():
        for _ in range(2):
            y = multi_glora_linear(problem.x, problem.weight, problem.bias, chosen, problem.rows)
            assert torch.equal(y, wanted["y"])
