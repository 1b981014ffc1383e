"""The tuner without a GPU: real launches in Triton's interpreter, small shapes, and a clock that obeys the test."""

from __future__ import annotations

import os

import pytest
import torch

from glora_kernels.four_bit import cuda
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.runtime import configs, environment, extension, tables
from glora_kernels.runtime.configs import SHARED_LIMIT, Shape
from glora_kernels.runtime.launch import Launch
from glora_kernels.tools import four_bit_tune, trials, tune
from glora_kernels.tools.aot import ARCHS
from glora_kernels.tools.commands.tune import few_tokens, whole_pass
from glora_kernels.tools.machine import Machine, this_gpu
from glora_kernels.tools.timing import clock_timer, event_timer, graph_timer, ratio
from glora_kernels.tools.tune import candidates

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="CPU tensors need the interpreter")
TINY, BF16 = Shape(40, 48, 64, 4), torch.bfloat16
CODES = Shape(40, 16, 64, 4)
LARGE = Shape(8192, 4096, 4096, 16)


class Clock:
    """A timer that says how long a launch takes: `cost` of it, in every round."""

    def __init__(self, cost=lambda step: 1.0):
        self.cost, self.calls = cost, 0

    def __call__(self, contenders, rounds):
        self.calls += 1
        for steps in contenders:
            assert len(steps) >= 2, "input sets take turns"
            steps[0]()
        return [[self.cost(steps[0])] * rounds for steps in contenders]


def machine(timer=None, **changes):
    given = {"name": "Test Card", "arch": "sm_90", "device": "cpu", "timer": timer or Clock()}
    return Machine(**{**given, **changes})


def run(path, timer=None, kernels=("x",), shapes=(TINY,), **changes):
    keys = ("name", "arch", "clock", "synchronize")
    card = machine(timer, **{key: changes.pop(key) for key in keys if key in changes})
    return tune.run(shapes, changes.pop("dtype", "fp16"), path, machine=card, kernels=kernels, show=False, **changes)


def stages_of(step):
    launch = step.__self__
    assert isinstance(launch, Launch)
    return launch.options["num_stages"]


@pytest.mark.parametrize("shape", [LARGE, Shape(48, 4096, 4096, 16), Shape(8192, 1024, 4096, 128)])
@pytest.mark.parametrize("dtype", list(tables.DTYPES.values()))
@pytest.mark.parametrize("arch", [*ARCHS, "sm_86"])
def test_candidates(arch, dtype, shape):
    for kernel in configs.TUNED:
        found = candidates(kernel, arch, dtype, shape)
        assert found[0] == configs.choose(kernel, arch, dtype, shape)
        assert 1 <= len(found) <= tune.MOST
        assert len({tuple(sorted(config.items())) for config in found}) == len(found)
        for config in found[1:]:
            assert tables.fault(kernel, arch, dtype, shape, config) is None
            limit = SHARED_LIMIT.get(arch, SHARED_LIMIT["sm_89"])
            assert tune.shared_bytes(kernel, config, dtype, shape) <= limit
    assert found == candidates(kernel, arch, dtype, shape)


@pytest.mark.parametrize("kernel", configs.TUNED)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_there_are_some_to_choose_from(kernel, arch):
    assert len(candidates(kernel, arch, BF16, LARGE)) >= 4


def test_the_default_is_tried_even_where_memory_is_short():
    assert len(candidates("fwd", "sm_90", BF16, LARGE)) > len(candidates("fwd", "gfx942", BF16, LARGE)) >= 2
    with pytest.raises(ValueError, match=r"'fwd', 'dx'.*got 'finish'"):
        candidates("finish", "sm_90", BF16, LARGE)


def test_compilations_are_counted_once_for_shapes_of_one_configuration():
    one = tune.compilations([LARGE], "bf16", "sm_90", ["dx"])
    assert one == len(candidates("dx", "sm_90", BF16, LARGE)) + 2 * (len(configs.KERNELS["dx"].forms) - 1)
    assert tune.compilations([LARGE, LARGE._replace(k=8192)], "bf16", "sm_90", ["dx"]) == one
    assert tune.compilations([LARGE], "bf16", "sm_90", ["dx", "x"]) > one


@interpreted
@pytest.mark.parametrize("kernel", configs.TUNED)
def test_every_form_of_every_kernel_gives_the_same_with_two_configurations(kernel):
    data = trials.Data(TINY, torch.float16, "cpu", "sm_90", 0)
    default, *others = candidates(kernel, "sm_90", torch.float16, TINY)
    for form in configs.KERNELS[kernel].forms:
        expected = trials.trial(kernel, form, data, default).results()
        for name, value in expected.items():
            assert value.isfinite().all(), (form, name)
            assert value.abs().max() > 1e-3
        found = trials.trial(kernel, form, data, others[-1]).results()
        assert trials.disagreement(found, expected, torch.float16, slack=4) == "", form


def test_what_counts_as_different():
    one = {"y": torch.ones(100), "h": torch.ones(4)}
    assert trials.disagreement(one, one, BF16, 4) == ""
    for wrong in (0.0, 1.1, float("nan"), float("inf")):
        other = {"y": torch.ones(100), "h": torch.ones(4)}
        other["y"][17] = wrong
        assert trials.disagreement(other, one, BF16, 4).startswith("y is off by")
    close = {"y": torch.ones(100) + 0.007, "h": torch.ones(4)}
    assert trials.disagreement(close, one, BF16, 4) == ""
    assert trials.disagreement(close, one, torch.float32, 4) != ""


@interpreted
def test_the_fastest_is_kept_and_launched_from_then_on(tmp_path, monkeypatch):
    path = tmp_path / "test-card.json"
    result = run(path, Clock(lambda step: 0.5 if stages_of(step) == 2 else 1.0))
    (outcome,) = result.outcomes
    assert (outcome.what, outcome.default_ms, outcome.best_ms, outcome.gain) == ("x", 1.0, 0.5, 0.5)
    table = tables.read(path)
    assert (table.device, table.arch, table.triton) == ("Test Card", "sm_90", environment.version("triton"))
    (row,) = table.configs
    assert row.config["num_stages"] == 2
    assert row.shape == TINY
    monkeypatch.setenv(environment.TABLES_VARIABLE, str(tmp_path))
    monkeypatch.setattr(environment, "device_of", lambda arch: "Test Card")
    tables.reload()
    try:
        assert tables.choose("x", "sm_90", torch.float16, TINY._replace(m=50)) == row.config
    finally:
        monkeypatch.undo()
        tables.reload()
    assert "50.0% less" in tune.describe(outcome)


@interpreted
@pytest.mark.parametrize(("time", "kept"), [(0.995, False), (0.98, True)])
def test_noise_is_no_gain(tmp_path, time, kept):
    path = tmp_path / "t.json"
    (outcome,) = run(path, Clock(lambda step: time if stages_of(step) == 2 else 1.0)).outcomes
    assert (tables.read(path).configs[0].config["num_stages"] == 2) == kept
    assert (outcome.gain > 0) == kept
    assert ("stays" in tune.describe(outcome)) != kept


def by_stages(step):
    """Two stages are the fastest, then four, then the three of the default."""
    return {2: 0.5, 4: 0.75}.get(stages_of(step), 1.0)


@interpreted
def test_a_wrong_candidate_is_never_chosen(tmp_path, monkeypatch):
    """The fastest gives another result, the next one does not compile."""
    original = trials.Trial.results

    def results(self):
        found = original(self)
        if self.launch.options["num_stages"] == 2:
            found["v_part"][0, -1] *= 1.5
        if self.launch.options["num_stages"] == 4:
            raise RuntimeError("out of resources: shared memory")
        return found

    monkeypatch.setattr(trials.Trial, "results", results)
    path = tmp_path / "t.json"
    (outcome,) = run(path, Clock(by_stages)).outcomes
    assert tables.read(path).configs[0].config["num_stages"] == 3
    assert any("num_stages=2: v_part is off by" in line for line in outcome.discarded)
    assert any("num_stages=4" in line and "out of resources" in line for line in outcome.discarded)


@interpreted
def test_a_candidate_must_serve_the_forms_that_are_not_timed(tmp_path, monkeypatch):
    original = trials.Trial.results

    def results(self):
        if self.launch.args["seed"] is not None and self.launch.options["num_stages"] == 2:
            raise RuntimeError("too many registers")
        return original(self)

    monkeypatch.setattr(trials.Trial, "results", results)
    path = tmp_path / "t.json"
    (outcome,) = run(path, Clock(by_stages)).outcomes
    assert tables.read(path).configs[0].config["num_stages"] == 4, "the next best"
    assert any("in the form 'full': RuntimeError: too many registers" in line for line in outcome.discarded)


@interpreted
def test_a_candidate_must_not_slow_the_other_forms(tmp_path):
    def cost(step):
        slow = step.__self__.args["seed"] is not None and stages_of(step) == 2
        return 9.0 if slow else by_stages(step)

    path = tmp_path / "t.json"
    (outcome,) = run(path, Clock(cost)).outcomes
    assert tables.read(path).configs[0].config["num_stages"] == 4
    assert any("in the form 'full': 800.0% slower than the default" in line for line in outcome.discarded)


@interpreted
def test_a_default_that_fails_is_reported_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(trials.Trial, "results", lambda self: 1 / 0)
    result = run(tmp_path / "t.json", kernels=("x", "dy"))
    assert len(result.failed) == 2
    assert "ZeroDivisionError" in result.failed[0]
    assert not (tmp_path / "t.json").exists()


@interpreted
def test_a_device_that_died_stops_the_run(tmp_path, monkeypatch):
    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="answers no more"):
        run(tmp_path / "t.json", synchronize=dead)


@interpreted
def test_it_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "t.json"

    class Stops(Clock):
        def __call__(self, contenders, rounds):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(contenders, rounds)

    kernels = ("x", "dy", "prepare")
    with pytest.raises(KeyboardInterrupt):
        run(path, Stops(), kernels)
    assert [row.kernel for row in tables.read(path).configs] == ["x", "dy"]
    rest = Clock()
    result = run(path, rest, kernels)
    assert rest.calls == 1
    assert [(outcome.what, outcome.measured) for outcome in result.outcomes] == [
        ("x", False), ("dy", False), ("prepare", True)
    ]  # fmt: skip
    assert [row.kernel for row in tables.read(path).configs] == [*kernels]
    nothing = Clock()
    run(path, nothing, kernels)
    assert nothing.calls == 0
    run(path, nothing, kernels, dtype="fp32")
    assert nothing.calls == 3, "another dtype is another entry"
    again = Clock(lambda step: 7.0)
    run(path, again, ("x",), again=True)
    assert again.calls == 1
    found = tables.read(path).configs
    assert len(found) == 6
    assert next(row.ms for row in found if (row.kernel, row.dtype) == ("x", "fp16")) == 7.0


@interpreted
def test_a_crash_while_writing_leaves_the_table_whole(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    run(path)
    before = path.read_text()

    def crash(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="full"):
        run(path, kernels=("x", "dy"))
    assert path.read_text() == before


@interpreted
def test_the_time_given_is_kept(tmp_path):
    now = iter(range(0, 1000, 40))
    result = run(tmp_path / "t.json", kernels=("x", "dy", "prepare"), minutes=1.5, clock=lambda: next(now))
    assert [outcome.what for outcome in result.outcomes] == ["x", "dy"]
    assert result.left == ["prepare at 40x48x64 r=4"]


@interpreted
def test_a_table_of_another_triton_is_kept_and_not_mixed(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    run(path)
    monkeypatch.setattr(environment, "version", lambda package: "9.9.0")
    timer = Clock()
    run(path, timer, kernels=("x",))
    assert timer.calls == 1
    assert tables.read(path).triton == "9.9.0"
    (old,) = tmp_path.glob("*.old")
    assert tables.read(old).triton != "9.9.0"


def test_a_table_of_another_device_is_not_touched(tmp_path):
    path = tmp_path / "t.json"
    tables.write(tables.Table("Other Card", "sm_90", "2", "3", "today"), path)
    with pytest.raises(ValueError, match=r"table of Other Card \(sm_90\), and this is Test Card: give --out"):
        run(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        run(path)
    assert tune.open_table(path, machine(), again=True).configs == ()


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"kernels must be one of 'fwd'.*got 'finish'"):
        run(tmp_path / "t.json", kernels=("finish",))
    with pytest.raises(ValueError, match=r"dtype must be one of 'bf16'.*got 'int8'"):
        run(tmp_path / "t.json", dtype="int8")


@interpreted
def test_routes_are_measured_as_whole_passes(tmp_path):
    path = tmp_path / "t.json"
    slower = {"fused": 1.0, "library": 0.8}
    result = run(path, Clock(lambda step: slower[step.__name__]), kernels=(), passes=whole_pass, arch="cpu")
    assert result.failed == []
    rows = tables.read(path).routes
    assert [(row.direction, row.scales) for row in rows] == [
        ("fwd", False), ("fwd", True), ("dx", False), ("dx", True)
    ]  # fmt: skip
    assert {(row.route, row.fused_ms, row.library_ms) for row in rows} == {("library", 1.0, 0.8)}
    assert [outcome.best for outcome in result.outcomes] == ["library"] * 4
    done = Clock()
    run(path, done, kernels=(), passes=whole_pass, arch="cpu")
    assert done.calls == 0


@interpreted
def test_routes_that_differ_are_an_error_and_no_choice(tmp_path):
    def passes(data, backward, scales):
        return lambda: {"y": torch.full((4,), 1.0 if tables._State.route == "fused" else 2.0)}

    result = run(tmp_path / "t.json", kernels=(), passes=passes)
    assert len(result.failed) == 4
    assert "the two routes differ: y is off by" in result.failed[0]
    assert not (tmp_path / "t.json").exists()


def four_bits(path, timer, monkeypatch, tokens=(1, 8), shapes=(CODES,), few=few_tokens, **changes):
    """A run of the 4-bit tasks alone."""
    monkeypatch.setattr(four_bit_tune, "TOKENS", tokens)
    return run(path, timer, kernels=(), shapes=shapes, few=few, arch="cpu", **changes)


def test_the_tasks_of_4_bit_layers():
    found = four_bit_tune.tasks([LARGE, LARGE._replace(m=7), LARGE._replace(n=1024), LARGE._replace(r=8)])
    assert found[:2] == [(Shape(0, 4096, 4096, 0), "4-bit dequantize"), (Shape(0, 1024, 4096, 0), "4-bit dequantize")]
    assert len(found) == 2 + 3 * len(four_bit_tune.TOKENS)
    near = {m for m in range(1, 65) for t in four_bit_tune.TOKENS if max(m, t) <= tables.NEAR * min(m, t)}
    assert near == set(range(1, 65)), "every number of tokens has an entry near it"


@interpreted
def test_what_serves_4_bits_is_measured(tmp_path, monkeypatch):
    """Triton's kernels here, which is all there is without the extension."""
    path, names = tmp_path / "t.json", []

    def cost(step):
        names.append(step.__name__)
        return {"triton": 1.0, "workspace": 0.4}[step.__name__]

    result = four_bits(path, Clock(cost), monkeypatch)
    assert result.failed == []
    dense, one, eight = tables.read(path).four_bit
    assert dense == tables.FourBit("dequantize", "fp16", Shape(0, 16, 64, 0), "triton", None, 1.0, None)
    assert one == tables.FourBit("small_m", "fp16", Shape(1, 16, 64, 4), "workspace", None, 1.0, 0.4)
    assert eight.shape.m == 8
    assert names == ["triton", "triton", "workspace", "triton", "workspace"]
    assert [(o.what, o.default_ms, o.best_ms, o.best) for o in result.outcomes[:2]] == [
        ("4-bit dequantize", 1.0, 1.0, "triton"), ("4-bit small_m", 1.0, 0.4, "workspace")
    ]  # fmt: skip
    assert "60.0% less" in tune.describe(result.outcomes[1])
    done = Clock()
    again = four_bits(path, done, monkeypatch, tokens=(1, 8, 3))
    assert done.calls == 1, "it goes on where it stopped"
    assert [outcome.measured for outcome in again.outcomes] == [False] * 3 + [True]
    assert again.outcomes[-1].best == "triton", "equal times: not the workspace"
    assert len(tables.read(path).four_bit) == 4
    four_bits(path, done, monkeypatch, tokens=(), dtype="fp32", again=True)
    assert [row.dtype for row in tables.read(path).four_bit] == ["fp16"] * 4 + ["fp32"]


@interpreted
def test_a_kind_is_what_was_forced(tmp_path, monkeypatch):
    """The forward that is timed as "workspace" reads no codes by itself, and the other does nothing but that."""
    used = []
    launch, dense = four_bit.small_m_launch, four_bit.dequantize_launch
    monkeypatch.setattr(four_bit, "small_m_launch", lambda kind, *a, **k: used.append(kind) or launch(kind, *a, **k))
    monkeypatch.setattr(four_bit, "dequantize_launch", lambda *a, **k: used.append("dense") or dense(*a, **k))
    data = trials.Data(CODES, torch.float16, "cpu", "cpu", 0)
    table = tables.Table("Test Card", "cpu", "2", "3", "today")
    for kind, expected in (("triton", ["triton"]), ("workspace", ["dense"])):
        used.clear()
        four_bit_tune._small_m_steps(kind, [data], table, few_tokens)[0]()
        assert used == expected


class Written:
    """A stand-in of a launch of csrc: it writes what the codec says, or one wrong number."""

    def __init__(self, weight, out, wrong):
        self.weight, self.out, self.wrong = weight, out, wrong

    def run(self):
        four_bit_tune.dequantize(self.weight, self.out.dtype, out=self.out)
        self.out[-1, -1] += self.wrong


@interpreted
@pytest.mark.parametrize(("wrong", "choice", "cuda_ms"), [(0.0, "cuda", 0.1), (0.25, "triton", None)])
def test_only_what_is_right_is_timed(tmp_path, monkeypatch, wrong, choice, cuda_ms):
    """The faster kind is chosen where it gives the codec's bits, and left out where one number differs."""
    path = tmp_path / "t.json"
    monkeypatch.setattr(four_bit, "_available", lambda arch: True)
    monkeypatch.setattr(cuda, "dequantize_launch", lambda weight, out, arch: Written(weight, out, wrong))
    times = {"cuda": 0.1, "triton": 1.0, "workspace": 2.0}
    result = four_bits(path, Clock(lambda step: times[step.__name__]), monkeypatch, tokens=(1,))
    dense, few = tables.read(path).four_bit
    assert (dense.choice, dense.cuda_ms, dense.triton_ms) == (choice, cuda_ms, 1.0)
    discarded = ["cuda: 1 of 1024 numbers are not those of quant.dequantize"] if wrong else []
    assert result.outcomes[0].discarded == discarded
    assert (few.choice, few.cuda_ms) == ("triton", None)
    assert result.outcomes[1].discarded[0].startswith("cuda: RuntimeError: "), "it runs on a GPU only"


@interpreted
def test_a_wrong_or_unserved_forward_is_not_timed(tmp_path, monkeypatch):
    def wrong(data):
        forward = few_tokens(data)

        def step():
            factor = 1.02 if tables._State.small_m == "triton" else 1.0
            return {name: value * factor for name, value in forward().items()}

        return step

    (_, outcome) = four_bits(tmp_path / "t.json", Clock(), monkeypatch, tokens=(1,), few=wrong).outcomes
    assert outcome.best == "workspace"
    assert outcome.discarded[0].startswith("triton: y is off by")
    wide = [CODES._replace(k=72)]
    (_, outcome) = four_bits(tmp_path / "u.json", Clock(), monkeypatch, tokens=(1,), shapes=wide).outcomes
    assert outcome.best == "workspace"
    assert "triton: ValueError: K = 72 is no multiple of the block size 64" in outcome.discarded[0]
    result = four_bits(
        tmp_path / "v.json", Clock(), monkeypatch, tokens=(1,), few=lambda data: lambda: {"y": data["x"][:, :1]}
    )  # fmt: skip
    assert result.failed[0].startswith("4-bit small_m at 1x16x64 r=4: triton: y is off by")
    assert "; workspace: y is off by" in result.failed[0]


def test_the_clock_of_a_cpu_interleaves():
    order = []
    times = clock_timer([[lambda: order.append("a")], [lambda: order.append("b"), lambda: order.append("c")]], 2)
    assert [len(values) for values in times] == [2, 2]
    assert "".join(order) == "bca" + "abc" + "bca"
    assert all(value >= 0 for values in times for value in values)
    assert ratio([2.0, 9.0, 2.0], [1.0, 1.0, 1.0]) == 2.0


def test_sets_go_past_the_cache():
    sized = machine(l2_bytes=50 << 20)
    assert tune._sets(LARGE, BF16, sized) == 2
    assert tune._sets(Shape(1024, 1024, 1024, 16), BF16, sized) == 16
    assert tune._sets(LARGE, BF16, machine(l2_bytes=1 << 40, memory_bytes=1 << 20)) == 2


@pytest.mark.gpu
def test_a_graph_times_what_the_card_does():
    x = torch.randn(4096, 4096, device="cuda", dtype=BF16)
    out = torch.empty_like(x)

    def products(count):
        def step():
            for _ in range(count):
                torch.mm(x, x, out=out)

        return step

    one, four = graph_timer([[products(1)] * 2, [products(4)] * 2], 10)
    assert len(one) == len(four) == 10
    assert all(value > 0 for value in one)
    assert 3 < ratio(four, one) < 5
    events = event_timer([[products(1)] * 4], 10)[0]
    assert 0.5 < sorted(events)[5] / sorted(one)[5] < 2


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted")
def test_tuning_on_a_card(tmp_path):
    card, path, shape = this_gpu(), tmp_path / "card.json", Shape(2048, 1024, 512, 16)
    result = tune.run(
        [shape], "bf16", path, machine=card, kernels=configs.TUNED, passes=whole_pass, few=few_tokens, show=False,
        minutes=4,
    )  # fmt: skip
    assert result.failed == []
    found = tables.read(path)
    assert (found.device, found.arch) == (card.name, card.arch)
    assert len(found.configs) + len(found.routes) + len(result.left) + len(found.four_bit) == len(configs.TUNED) + 11
    for row in found.four_bit:
        assert row.triton_ms is not None, row
        assert (row.cuda_ms is not None) == extension.available(card.arch), row
        assert 0.0005 < min(row.times().values()) == row.times()[row.choice] < 10
    for row in found.configs:
        assert 0.001 < row.ms <= row.default_ms * 1.05 < 10
    with tables.using(found):
        fwd = next(row for row in found.configs if row.kernel == "fwd")
        assert tables.choose("fwd", card.arch, BF16, shape) == fwd.config
        whole_pass(trials.Data(shape, BF16, "cuda", card.arch, 0), backward=True, scales=True)()
        torch.cuda.synchronize()
