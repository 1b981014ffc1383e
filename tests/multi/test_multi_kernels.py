"""The kernels of many adapters against the truth, through the operator: interpreted (on a card: tests/gpu)."""

from __future__ import annotations

import random

import pytest
import torch
from adapters import mixed

from glora_kernels.multi.plan import multi_plan_launch, plan_of, tiles
from glora_kernels.quant import dequantize, quantize_weight
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime import configs
from glora_kernels.runtime.program import launching
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig
from glora_kernels.tools import planned
from glora_kernels.tools.planned import How, Linear

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these run in the interpreter; see tests/gpu"),
]
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
LORA = [
    GLoRAConfig.lora(1, 3.0), GLoRAConfig.lora(3, 6.0), GLoRAConfig.lora(16, 8.0), GLoRAConfig.lora(16, 8.0),
    GLoRAConfig.lora(3, 3.0, dropout=0.3), GLoRAConfig.lora(16, 16.0, dropout=0.5),
]  # fmt: skip
OTHERS = [
    GLoRAConfig("vector", "lora", "vector", "vector", "vector", 3, 2.0),
    GLoRAConfig("constant", "vector", "lora", "none", "constant", 1),
    GLoRAConfig("none", "constant", "none", "constant", "none"),
    GLoRAConfig("vector", "lora", "none", "none", "none", 16, dropout=0.5),
    GLoRAConfig("none", "none", "none", "none", "vector"),
    GLoRAConfig.lora(1, 3.0),
]  # fmt: skip
APART = [
    GLoRAConfig("lora", "lora", "none", "none", "vector", 2),
    GLoRAConfig("lora", "constant", "lora", "vector", "none", 3, variant="matmul"),
    GLoRAConfig.lora(3, 6.0, dropout=0.25),
    GLoRAConfig("lora", "none", "vector", "none", "none", 1),
]  # fmt: skip
SETS = {"LoRA": LORA, "others": OTHERS, "A=lora": APART}


def rows(count: int, m: int = 37, without: int = 3) -> list[int]:
    """The adapter of each row, unsorted, -1 among them, of one adapter none."""
    draw = random.Random(m)
    return [draw.choice([j for j in range(-1, count) if j != without]) for _ in range(m)]


@pytest.fixture(autouse=True)
def on_triton():
    with backend("triton"):
        yield


@pytest.mark.parametrize(("dtype", "name", "adapters", "size"), [
    (SINGLE, "LoRA", None, 0.3), (SINGLE, "others", None, 0.3), (HALF, "LoRA", SINGLE, 0.1),
    (HALF, "others", None, 0.1), (BRAIN, "others", SINGLE, 0.1), (SINGLE, "A=lora", None, 0.3),
])  # fmt: skip
def test_against_truth(dtype, name, adapters, size):
    problem = mixed(SETS[name], rows(len(SETS[name])), k=70, n=24, dtype=dtype, adapters=adapters, size=size)
    problem.check(problem.ours(), dtype)


@pytest.mark.parametrize("row", [-1, 0, 3])
def test_one_row(row):
    """As it is launched by a program, which is planned once and repeated."""
    problem = mixed(OTHERS, [row], k=24, n=40, dtype=SINGLE)
    problem.check(problem.ours(), SINGLE)
    problem.check(problem.ours(), SINGLE)


def test_no_rows_and_one_adapter_for_all():
    problem = mixed(LORA[:2], [1] * 5, k=24, n=16, bias=False, dtype=SINGLE)
    problem.check(problem.ours(), SINGLE)
    found = mixed(LORA[:2], [], k=24, n=16, bias=False, dtype=SINGLE).ours()
    assert found.pop("y").shape == (0, 16)
    assert found.pop("dx").shape == (0, 24)
    assert len(found) == 4
    assert not any(grad.any() for grad in found.values())


def test_strides():
    """x, W and dy of any, factors as parts of padded ones, of which one has columns apart."""
    problem = mixed(LORA[:3], rows(3, 20, 2), k=24, n=16, dtype=SINGLE)
    with torch.no_grad():
        wide = torch.zeros(20, 49)
        wide[:, 1::2] = problem.x
        problem.x = wide[:, 1::2].requires_grad_()
        problem.weight = problem.weight.t().contiguous().t()
        problem.dy = problem.dy.t().contiguous().t()
        for own in problem.adapters[:2]:
            rank = own["B_down"].shape[0]
            up, down = torch.full((16, 16), float("nan")), torch.full((8, 30), float("nan"))
            up[:, :rank], down[:rank, 2:26] = own["B_up"], own["B_down"]
            own["B_up"], own["B_down"] = up[:, :rank].requires_grad_(), down[:rank, 2:26].requires_grad_()
        problem.adapters[2]["B_up"] = problem.adapters[2]["B_up"].t().contiguous().t().requires_grad_()
    problem.check(problem.ours(), SINGLE)


def test_dtypes_of_their_own():
    """An adapter in fp32 and one in fp16 over fp16."""
    problem = mixed([*LORA[:2], OTHERS[0]], rows(3, 20, 2), k=24, n=16, dtype=HALF, size=0.1)
    problem.adapters[0] = {name: t.detach().float().requires_grad_() for name, t in problem.adapters[0].items()}
    problem.adapters[2] = {
        name: t.detach().to(SINGLE if name in ("B_down", "E") else HALF).requires_grad_()
        for name, t in problem.adapters[2].items()
    }
    problem.check(problem.ours(), HALF)


@pytest.mark.parametrize("m", [20, 90])
def test_larger_ranks_in_several_blocks_and_bands(m, monkeypatch):
    monkeypatch.setitem(configs.PROGRAMS, "cpu", 8)
    ranks = [
        GLoRAConfig.lora(70, 35.0, dropout=0.2),
        GLoRAConfig("vector", "lora", "none", "none", "none", 40),
        *LORA[:1],
    ]
    problem = mixed(ranks, rows(3, m, 2), k=72, n=70, dtype=SINGLE)
    with launching(cached=False):
        problem.check(problem.ours(), SINGLE)


def test_over_4_bits():
    problem = mixed([*LORA[4:], OTHERS[0]], rows(3, 20, 2), k=64, n=16, dtype=SINGLE)
    problem.weight = quantize_weight(problem.weight, "nf4")
    found = problem.ours()
    problem.weight = dequantize(problem.weight, SINGLE)
    problem.check(found, SINGLE)


def test_what_is_shared_has_one_sum_rounded_once():
    problem = mixed(
        [GLoRAConfig("none", "lora", "none", "none", "vector", 2)] * 6, rows(6, 24, -1), k=16, n=16, dtype=HALF
    )
    for own in problem.adapters[1:]:
        own.update(problem.adapters[0])
    found, exact = problem.ours(), problem.literal(torch.float64)
    assert torch.equal(found["d0.E"], exact["d0.E"].to(HALF))
    problem.check(found, HALF)


def test_what_is_not_wanted_is_left_out():
    for trained in (["x"], ["0.E", "2.D"], ["bias"], ["1.B"], ["0.A", "3.B_down"], ["3.B_up", "1.C_down"]):
        problem = mixed(OTHERS, rows(6, 20, 4), k=24, n=16, dtype=SINGLE)
        for name, leaf in problem.leaves().items():
            leaf.requires_grad_(name in trained)
        found = problem.ours()
        assert found.keys() == {"y", *(f"d{name}" for name in trained)}
        problem.check(found, SINGLE)


def test_two_runs_give_the_same_bits_and_a_mask_is_the_one_that_rows_have_alone():
    problem = mixed(LORA, rows(6), k=40, n=24, dtype=HALF)
    first, second = problem.ours(), problem.ours()
    assert all(torch.equal(first[name], second[name]) for name in first)
    truth, loop = problem.literal(torch.float64), problem.loop()
    for name in first:
        assert largest_error(first[name], truth[name]) <= allowed_error(truth[name], loop[name], HALF), name


def test_a_mask_that_was_wrong_would_show():
    """The check sees one row of one adapter dropped by the number that it has among all."""
    problem = mixed(LORA[4:], [1, 0, 0, 1, 0, 1, 1], k=24, n=16, dtype=SINGLE)
    found = problem.ours()
    problem.rows = problem.rows.flip(0)
    with pytest.raises(AssertionError):
        problem.check(found, SINGLE)


def test_a_program_serves_every_m_of_its_class():
    for m in (30, 17):
        problem = mixed(OTHERS[:1] + LORA[4:], rows(3, m, -1), k=24, n=16, dtype=SINGLE)
        with launching(cached=False):
            anew = problem.ours()
        repeated = problem.ours()
        assert all(torch.equal(anew[name], repeated[name]) for name in anew)


# The plan


@pytest.mark.parametrize(("m", "count"), [(1, 1), (5, 3), (300, 40)])
def test_plan(m, count):
    assignment = torch.randint(-1, count, (m,), generator=torch.Generator().manual_seed(m))
    places, starts = (torch.full((size,), -7, dtype=torch.int32) for size in (m, count + 2))
    multi_plan_launch(assignment, places, starts).run()
    keys = torch.where(assignment < 0, count, assignment)
    assert torch.equal(places.long(), keys.argsort(stable=True))
    assert torch.equal(starts.long(), torch.tensor([int((keys < j).sum()) for j in range(count + 2)]))


def test_an_assignment_is_sorted_once_for_all_layers_and_again_when_it_is_written():
    assignment = torch.tensor([2, 0, 1])
    first = plan_of(assignment.view(-1), 4)
    assert plan_of(assignment, 4) is first
    assert plan_of(assignment[:2], 4) is not first
    first = plan_of(assignment, 4)
    assignment[0] = 0
    second = plan_of(assignment, 4)
    assert second is not first
    assert second.places.tolist() == [0, 1, 2]


@pytest.mark.parametrize("wrong", [-2, 2])
def test_a_number_that_is_no_adapters(wrong):
    problem = mixed(LORA[:2], [0, wrong, 1], k=16, n=16, dtype=SINGLE)
    with pytest.raises(ValueError, match=rf"0 to 1, or -1 for the base alone; got {wrong}"):
        problem.call()


# What a card is given


def steps(configs_: list[GLoRAConfig], m: int = 512, **how: object) -> planned.Planned:
    layer = Linear(configs_[0], 4096, 4096, bias=any(c.D != "none" for c in configs_))
    return planned.multi(layer, configs_, How(m, BRAIN, "sm_90", **how))


def without_plan(launches: list) -> list:
    """Without the sorting of the rows, which all layers share."""
    return [step for step in launches if "multi_plan" not in str(step)]


@pytest.mark.parametrize("m", [1, 32, 512, 8192])
def test_launches(m):
    plain, everything = (steps(each, m) for each in ([GLoRAConfig.lora(16, 32.0, dropout=0.1)] * 8, OTHERS))
    assert [len(without_plan(found)) for found in plain] == [3, 4]
    assert [len(without_plan(found)) for found in everything] == [3, 5]
    assert len(without_plan(steps(OTHERS, m, training=False).forward)) == 3


def test_a_plan_has_a_tile_for_every_row():
    """M // block + J of them, and no two adapters have one in common."""
    for seed in range(50):
        draw = random.Random(seed)
        sizes = [draw.choice([0, 0, 1, 3, 16, 40]) for _ in range(draw.randint(1, 9))]
        for block in (16, 32):
            start, taken = 0, []
            for j, size in enumerate(sizes):
                taken += [start // block + j + i for i in range(-(-size // block))]
                start += size
            assert len(set(taken)) == len(taken)
            assert max(taken, default=0) < tiles(start, len(sizes), block)
