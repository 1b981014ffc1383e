"""The kernels of a group against the truth, through the operator: interpreted on a CPU, for real on a GPU.

Beside the numbers: which form of a kernel a call takes, how many launches, and what a card's configurations give.
"""

from __future__ import annotations

import random

import pytest
import torch
from groups import CASES, build

from glora_kernels.glora import triton as single
from glora_kernels.glora.call import Call, Supports
from glora_kernels.grouped import triton as grouped_triton
from glora_kernels.grouped.group import ABSENT, Operands, Trained
from glora_kernels.grouped.group import Group as Indices
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime import configs
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.planning import is_planning, planning
from glora_kernels.runtime.program import launching
from glora_kernels.runtime.routes import backend

pytestmark = pytest.mark.usefixtures("poison")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a card takes its own configurations (tests/gpu)")
SINGLE, HALF = torch.float32, torch.float16
ALIGNED = (40, 16, 24)
"""Widths whose rows begin at multiples of 16 bytes, as descriptors want them."""


@pytest.fixture
def launches(monkeypatch):
    """Every launch of the calls made, in order, each as its pass is written."""
    seen: list[Launch] = []
    run = Launch.run

    def note(launch):
        if not is_planning():  # planned is not run
            seen.append(launch)
        run(launch)

    monkeypatch.setattr(Launch, "run", note)
    with launching(cached=False):  # planned anew, also for another card or other configurations
        yield seen


def of(launches: list[Launch], kernel: str) -> list[Launch]:
    return [launch for launch in launches if launch.kernel.__name__ == f"_grouped_{kernel}_kernel"]


def by_descriptors(launch: Launch) -> bool:
    """Whether a large product reads its operands through descriptors."""
    return not any(launch.args.get(name) for name in ("xs", "dys"))


def makes_h(launch: Launch) -> bool:
    return launch.args["downs"] is not None


# name, dtype, dropout, by descriptors: every structure in one dtype, both dtypes in every form.
COVERING = [
    ("own", SINGLE, 0.0, True), ("own", HALF, 0.25, False), ("one member", HALF, 0.0, False),
    ("tied", SINGLE, 0.25, True), ("one down", HALF, 0.25, True), ("partly tied", HALF, 0.0, False),
    ("W, up and bias shared", SINGLE, 0.25, False), ("without", HALF, 0.0, True), ("without", SINGLE, 0.25, False),
    ("bases alone", SINGLE, 0.0, True), ("transposed", HALF, 0.0, True), ("transposed", SINGLE, 0.25, False),
    ("rows of one", HALF, 0.25, True), ("strided", SINGLE, 0.0, False), ("two inputs", HALF, 0.25, True),
    ("frozen x", SINGLE, 0.0, False), ("ragged", HALF, 0.25, False), ("one row", HALF, 0.0, True),
    ("no rows", SINGLE, 0.25, False), ("a member without rows", SINGLE, 0.25, False),
]  # fmt: skip


@interpreted
@pytest.mark.parametrize(("name", "dtype", "dropout", "described"), COVERING)
def test_against_truth(name, dtype, dropout, described, launches):
    group = CASES[name](dtype=dtype, dropout=dropout, **({"sizes": ALIGNED} if described else {}))
    group.check(group.ours("triton"), dtype)
    inside = dropout == 0.0 and any(down is not None for down in group.downs)
    for launch in of(launches, "fwd"):
        assert by_descriptors(launch) == described
        assert makes_h(launch) == inside
    assert all(by_descriptors(launch) == described for launch in of(launches, "dx"))
    assert len(of(launches, "down")) == (not inside and name != "bases alone")


@interpreted
@pytest.mark.parametrize("seed", range(3))
def test_ragged_groups_equal_the_layers_one_by_one(seed):
    """Random structures: no further from the truth than twice the launches of single layers, and the floor."""
    rng = random.Random(seed)
    members = rng.choice([2, 3])
    shared = rng.random() < 0.5
    dtype = (SINGLE, HALF)[seed % 2]
    group = build(
        [rng.choice([7, 16, 37]) for _ in range(members)],
        lead=(rng.choice([1, 35]),) if shared else [(rng.choice([1, 9, 35]),) for _ in range(members)],
        k=rng.choice([24, 40]) if shared else [rng.choice([17, 24, 40]) for _ in range(members)],
        rank=[rng.choice([1, 3, 16, 20, 33]) for _ in range(members)],
        dropout=rng.choice([0.0, 0.3]), dtype=dtype, seed=seed,
    )  # fmt: skip
    if rng.random() < 0.5:
        group.downs[0] = group.ups[0] = None
    if rng.random() < 0.5:
        group.biases[-1] = None
    group.freeze([name for name in group.leaves() if rng.random() < 0.8])
    with backend("triton"):
        alone = group.results(group.loop(), group.leaves())
    together, truth = group.ours("triton"), group.literal(torch.float64)
    assert together.keys() == alone.keys() == truth.keys()
    for name, value in together.items():
        assert value.shape == alone[name].shape
        assert largest_error(value, truth[name]) <= allowed_error(truth[name], alone[name], dtype), name


@interpreted
def test_more_members_than_descriptors(launches):
    """Five members come by their addresses, although descriptors could read each of them."""
    group = build((16, 8, 24, 16, 8), lead=(9,), k=24, rank=[1, 2, 3, 4, 5], dtype=SINGLE, dropout=0.25)
    group.check(group.ours("triton"), SINGLE)
    assert not any(by_descriptors(launch) for launch in (*of(launches, "fwd"), *of(launches, "dx")))


@interpreted
@pytest.mark.parametrize(
    ("rank", "dropout", "dtype"), [(17, 0.0, HALF), (40, 0.25, SINGLE), (70, 0.25, HALF), (130, 0.0, SINGLE)]
)
def test_larger_ranks(rank, dropout, dtype, launches):
    """Of more rows than a few h comes from a launch of its own; above MAX_FACTOR_RANK so do the factors of d_up.

    Above RANK_BLOCK several programs share the columns of S.
    """
    group = build((24, 16), lead=(70,), k=24, rank=[rank, 3], dropout=dropout, dtype=dtype)
    group.check(group.ours("triton"), dtype)
    assert not makes_h(of(launches, "fwd")[0])
    assert len(of(launches, "x")) == 1 + (rank > configs.MAX_FACTOR_RANK)


@interpreted
def test_sums_in_parts(monkeypatch, launches):
    """Several splits of the rows; several bands of the columns, for a few rows."""
    group = build((16,), lead=(140,), k=16, rank=2, dtype=SINGLE)
    group.check(group.ours("triton"), SINGLE)
    assert of(launches, "x")[0].args["parts"][0].shape[0] > 1
    launches.clear()
    monkeypatch.setitem(configs.PROGRAMS, "cpu", 8)
    group = build((130, 70), lead=(3,), k=24, rank=2, dtype=SINGLE, dropout=0.25)
    group.check(group.ours("triton"), SINGLE)
    assert of(launches, "x")[0].args["BANDS"] == 2


@interpreted
@pytest.mark.parametrize("lead", [(3,), ((3,), (2,))], ids=["one x", "of their own"])
def test_sums_in_parts_that_only_dx_needs(lead, monkeypatch, launches):
    """With frozen factors backward keeps no x, whose rows S has, and a launch of its own adds the bands of S."""
    monkeypatch.setitem(configs.PROGRAMS, "cpu", 8)
    group = build((130, 70), lead=lead, k=24, rank=2, dtype=SINGLE)
    group.freeze([name for name in group.leaves() if name.startswith("xs")])
    group.check(group.ours("triton"), SINGLE)
    assert [one.args["bands"] for one in of(launches, "bands")] == [2]


@interpreted
def test_a_path_of_many_members_is_summed_before_it_is_read(launches):
    """One h for more members than bands are read at a time."""
    count = configs.MAX_BANDS + 1
    group = build([4 + i % 3 for i in range(count)], lead=(5,), k=16, rank=2, dtype=SINGLE)
    group.downs, group.scales = [group.downs[0]] * count, [0.5] * count
    group.check(group.ours("triton"), SINGLE)
    assert len(of(launches, "bands")) == of(launches, "x")[0].args["BANDS"] == 1


@interpreted
def test_adapters_and_a_bias_in_fp32_over_16_bits():
    group = build((24, 16), lead=(9,), k=24, dtype=HALF, adapters=SINGLE, size=0.05)
    group.biases[0] = group.biases[0].detach().float().requires_grad_()
    group.check(group.ours("triton"), HALF)


@interpreted
def test_autocast(launches):
    """fp32 W under fp16 is read by its address and cast on the way; y in bf16, gradients in fp32."""
    group = build(ALIGNED, lead=(9,), k=24, dtype=SINGLE, size=0.05)
    with torch.autocast("cpu", torch.float16):
        got = group.ours("triton")
    assert got["y[0]"].dtype == HALF
    group.check(got, HALF)
    assert not by_descriptors(of(launches, "fwd")[0])


@interpreted
def test_the_gradient_of_what_is_shared_is_rounded_once():
    """Σ over 8 members in fp32: what leaves it in fp16 is the rounding of the whole sum."""
    group = build([8] * 8, lead=(4,), k=8, rank=1, dtype=HALF)
    group.biases = [group.biases[0]] * 8
    exact = group.literal(torch.float64)["biases[0]"]
    assert torch.equal(group.ours("triton")["biases[0]"], exact.to(HALF))


@interpreted
def test_a_transposed_weight_of_one_column_beside_others():
    """Where K is 1 both strides are 1: its layout is that of the others."""
    group = build((7, 16), lead=[(9,), (9,)], k=[1, 24], dtype=SINGLE)
    group.weights = [group.weights[0], group.weights[1].t().contiguous().t()]
    assert group.weights[0].stride() == (1, 1)
    group.check(group.ours("triton"), SINGLE)


@interpreted
def test_mixed_layouts_are_refused():
    group = build((7, 16), k=24, dtype=SINGLE)
    group.weights[1] = group.weights[1].t().contiguous().t()
    with pytest.raises(ValueError, match=r"all be row-major, or all transposed.*\(24, 1\), \(1, 16\)"):
        group.ours("triton")


@interpreted
def test_a_rank_over_the_limit_is_refused():
    with pytest.raises(RuntimeError, match=r"up to 256.*got 257"):
        build((7,), lead=(2,), k=8, rank=257, dtype=SINGLE).ours("triton")


@interpreted
def test_two_runs_give_the_same_bits():
    group = CASES["partly tied"](dtype=HALF, dropout=0.25)
    first, second = group.ours("triton"), group.ours("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


# What a card is given.


@interpreted
@pytest.mark.parametrize(("arch", "dtype"), [("sm_90", HALF), ("sm_100", SINGLE), ("gfx942", HALF)])
def test_the_configurations_of_a_card(arch, dtype, monkeypatch, launches):
    """Several tiles, ragged edges, descriptors where the card has them."""
    monkeypatch.setattr(grouped_triton, "arch_of", lambda tensor: arch)
    group = build((136, 8), lead=(70,), k=72, rank=[20, 3], dropout=0.25, dtype=dtype, size=0.05)
    group.check(group.ours("triton"), dtype)
    described = arch in ("sm_90", "sm_100") and dtype == HALF
    assert [by_descriptors(launch) for launch in (*of(launches, "fwd"), *of(launches, "dx"))] == [described] * 2


@interpreted
def test_the_widest_tile(monkeypatch, launches):
    """128x256, which only large outputs take, with h made beside it: here by force."""
    monkeypatch.setattr(grouped_triton, "arch_of", lambda tensor: "sm_90")
    monkeypatch.setitem(configs.PROGRAMS, "sm_90", 1)
    group = build((264, 16), lead=(130,), k=72, rank=4, dtype=HALF, size=0.05)
    group.check(group.ours("triton"), HALF)
    forward = of(launches, "fwd")[0]
    assert (forward.args["BLOCK_M"], forward.args["BLOCK_N"]) == (128, 256)
    assert by_descriptors(forward)
    assert makes_h(forward)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def plan(
    sizes: tuple[int, ...], k: int, rank: int, *, m: int = 8192, dropout: float = 0.0, tied: bool = False,
    bias: bool = False, arch: str = "sm_90",
) -> tuple[list, list]:  # fmt: skip
    """The launches of forward and of backward of a group that reads one x, everything trained."""
    count = len(sizes)
    downs = 1 if tied else count
    operands = Operands(
        [meta(m, k)], [meta(n, k) for n in sizes], [meta(rank, k) for _ in range(downs)],
        [meta(n, rank) for n in sizes], [meta(n) for n in sizes] if bias else [],
        [torch.tensor([2**62 + 1]) for _ in range(downs)] if dropout else [],
    )  # fmt: skip
    own, none = list(range(count)), [ABSENT] * count
    down = [0] * count if tied else own
    group = Indices([0] * count, own, down, own, own if bias else none, down if dropout else none, [1.0] * count,
                    dropout, "triton")  # fmt: skip
    with planning(arch) as forward:
        ys, hs = grouped_triton.forward(operands, group)
    needs = Trained([True], [True] * downs, [True] * count, [True] * len(operands.biases))
    with planning(arch) as backward:
        grads = grouped_triton.backward([meta(*y.shape) for y in ys], operands, hs, group, needs)
    for part, tensors in zip(grads, (operands.xs, operands.downs, operands.ups, operands.biases), strict=True):
        assert [grad.shape for grad in part] == [tensor.shape for tensor in tensors]
    return forward, backward


QKV, GATE_UP = (4096, 1024, 1024), (14336, 14336)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("sizes", [QKV, GATE_UP, (1024,) * 24], ids=["qkv", "gate up", "24 members"])
def test_launches(sizes, arch):
    """However many members: one forward and four backward, as one layer has; one more with dropout or a larger rank."""
    for bias in (False, True):
        for tied in (False, True):
            counts = {
                (rank, p): tuple(map(len, plan(sizes, 4096, rank, dropout=p, tied=tied, bias=bias, arch=arch)))
                for rank in (16, 64) for p in (0.0, 0.1)
            }  # fmt: skip
            # A path of many members takes one more, which sums its S: every tile of dx would read all of them.
            four = 4 + (tied and len(sizes) > configs.MAX_BANDS)
            assert counts == {(16, 0.0): (1, four), (16, 0.1): (2, four), (64, 0.0): (2, four + 1),
                              (64, 0.1): (2, four + 1)}  # fmt: skip


def test_few_rows_take_as_many_launches():
    for m in (1, 48, 512):
        assert tuple(map(len, plan(QKV, 4096, 16, m=m))) == (1, 4)


def test_no_kernel_reads_more_bands_than_one_layer_leaves():
    for m in (1, 512, 8192):
        for steps in plan((1024,) * 24, 1024, 16, m=m, tied=True):
            assert all(step.args.get("BANDS", 1) <= configs.MAX_BANDS for step in steps)


def test_a_decoder_layer_takes_six_launches_forward():
    """LLaMA-3-8B at M = 8192 and rank 16: q, k, v in one, gate and up in one, o and down in two each."""
    group = len(plan(QKV, 4096, 16)[0]) + len(plan(GATE_UP, 4096, 16)[0])
    alone = 0
    for n, k in ((4096, 4096), (4096, 14336)):
        with planning("sm_90") as steps:
            single.forward(meta(8192, k), meta(n, k), Supports(b_up=meta(n, 16), b_down=meta(16, k)),
                           Call(1.0, 0.0, None, False, "triton"))  # fmt: skip
        alone += len(steps)
    assert (group, alone) == (2, 4)


def test_what_is_not_wanted_is_not_launched():
    """The kernels of a gradient that nobody wants stay away."""
    operands = Operands([meta(64, 256)], [meta(128, 256)] * 2, [meta(8, 256)] * 2, [meta(128, 8)] * 2, [], [])
    group = Indices([0, 0], [0, 1], [0, 1], [0, 1], [ABSENT] * 2, [ABSENT] * 2, [1.0, 1.0], 0.0, "triton")
    hs, dys = [meta(64, 8)] * 2, [meta(64, 128)] * 2

    def kernels(**needs) -> list[str]:
        none = {"xs": [False], "downs": [False] * 2, "ups": [False] * 2, "biases": []}
        with planning("sm_90") as steps:
            grouped_triton.backward(dys, operands, hs, group, Trained(**{**none, **needs}))
        return [step.kernel.__name__.removeprefix("_").removesuffix("_kernel") for step in steps]

    assert kernels() == []
    # Where nothing else reads S, its bands are added on their own.
    assert kernels(xs=[True]) == ["grouped_dy", "grouped_bands", "grouped_dx"]
    assert kernels(downs=[False, True]) == ["grouped_dy", "grouped_x", "finish"]
    assert kernels(ups=[True, False]) == ["grouped_dy", "finish"]
    assert kernels(xs=[True], downs=[True] * 2) == ["grouped_dy", "grouped_x", "finish", "grouped_dx"]


def test_scales_p_and_rows_do_not_change_what_is_compiled():
    """Between two calls only numbers differ that Triton does not specialise, floats, and multiples of 16."""

    def arguments(m: int, p: float, scale: float) -> list[dict[str, object]]:
        operands = Operands([meta(m, 256)], [meta(128, 256)] * 2, [meta(8, 256)] * 2, [meta(128, 8)] * 2, [],
                            [torch.tensor([2**62 + m + 1])] * 2)  # fmt: skip
        group = Indices([0, 0], [0, 1], [0, 1], [0, 1], [ABSENT] * 2, [0, 1], [scale] * 2, p, "triton")
        needs = Trained([True], [True] * 2, [True] * 2, [])
        with planning("sm_90") as steps:
            ys, hs = grouped_triton.forward(operands, group)
            grouped_triton.backward([meta(*y.shape) for y in ys], operands, hs, group, needs)
        return [step.args for step in steps]

    def integers(value: object) -> list[int]:
        if isinstance(value, tuple):
            return [number for entry in value for number in integers(entry)]
        return [value] if isinstance(value, int) else []

    differing = set()
    for one, other in zip(arguments(4096, 0.1, 1.0), arguments(8192, 0.35, 3.0), strict=True):
        differing |= {name for name, value in one.items() if integers(value) != integers(other[name])}
    assert differing <= {"masks", "M", "tiles", "rows_per_split", "splits", "factor_splits", "first_splits",
                         "stride_first", "stride_part", "stride_factor_part", "factor"}  # fmt: skip
