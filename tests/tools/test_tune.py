"""The tuner without a GPU: real launches in Triton's interpreter, small shapes, and a clock that obeys the test."""

from __future__ import annotations

import os

import pytest
import torch

from glora_kernels.four_bit import cuda
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.runtime import configs, environment, extension, tables
from glora_kernels.runtime.configs import SHARED_LIMIT, Shape
from glora_kernels.runtime.tables import DEQUANTIZE, NAMED, SMALL_M, Row
from glora_kernels.tools import candidates as trying
from glora_kernels.tools import trials, tune
from glora_kernels.tools.aot import ARCHS
from glora_kernels.tools.candidates import candidates, compilations, options
from glora_kernels.tools.timing import Machine, clock_timer, event_timer, graph_timer, ratio, this_gpu
from glora_kernels.tools.trials import Data, Trial, disagreement, forms

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


def run(path, timer=None, kernels=("x",), shapes=(TINY,), routes=False, four_bit=False, **changes):
    keys = ("name", "arch", "clock", "synchronize")
    card = machine(timer, **{key: changes.pop(key) for key in keys if key in changes})
    what = tune.tasks(shapes, kernels, routes, four_bit)
    return tune.run(what, changes.pop("dtype", "fp16"), path, machine=card, show=False, **changes)


def trial_of(step):
    assert isinstance(step.__self__, Trial)
    return step.__self__


def stages_of(step):
    launch = trial_of(step).timed[0]
    assert launch.options["num_stages"] == trial_of(step).choice["num_stages"]
    return launch.options["num_stages"]


def drops(trial):
    return trial.timed[0].args["seed"] is not None


@pytest.mark.parametrize("shape", [LARGE, Shape(48, 4096, 4096, 16), Shape(8192, 1024, 4096, 128)])
@pytest.mark.parametrize("dtype", list(tables.DTYPES.values()))
@pytest.mark.parametrize("arch", [*ARCHS, "sm_86"])
def test_candidates(arch, dtype, shape):
    for kernel in configs.TUNED:
        found = candidates(kernel, arch, dtype, shape)
        assert found[0] == configs.default(kernel, arch, dtype, shape)
        assert 1 <= len(found) <= trying.MOST
        assert len({tuple(sorted(config.items())) for config in found}) == len(found)
        for config in found[1:]:
            assert tables.fault(kernel, arch, dtype, shape, config) is None
            limit = SHARED_LIMIT.get(arch, SHARED_LIMIT["sm_89"])
            assert trying.shared_bytes(kernel, config, dtype, shape) <= limit
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
    def count(*kernels, shapes=(LARGE,)):
        return compilations([(kernel, shape) for kernel in kernels for shape in shapes], "bf16", "sm_90")

    one = count("dx")
    assert one == len(candidates("dx", "sm_90", BF16, LARGE)) + 2 * (len(forms("dx")) - 1)
    assert count("dx", shapes=[LARGE, LARGE._replace(k=8192)]) == one
    assert count("dx", "x") > one


def test_what_there_is_to_choose_from(monkeypatch):
    """Of a kernel its configurations, the default of a real call first; else the names that can serve here."""
    monkeypatch.setattr(four_bit, "_available", lambda arch: arch == "sm_90")
    assert options("fwd", "sm_90", BF16, LARGE) == candidates("fwd", "sm_90", BF16, LARGE._replace(m=4096))
    assert options("route dx", "sm_90", BF16, LARGE) == ["fused", "library"]
    assert options(DEQUANTIZE, "sm_90", BF16, LARGE) == ["cuda", "triton"]
    assert options(SMALL_M, "sm_90", BF16, LARGE) == ["cuda", "triton", "workspace"]
    assert options(SMALL_M, "sm_80", BF16, LARGE) == ["triton", "workspace"]


@interpreted
@pytest.mark.parametrize("kernel", configs.TUNED)
def test_every_form_of_every_kernel_gives_the_same_with_two_configurations(kernel):
    default, *others = candidates(kernel, "sm_90", torch.float16, TINY)
    for form in forms(kernel):
        data = Data(kernel, form, TINY, torch.float16, "cpu", "sm_90")
        trial = data.trial(default)
        assert trial.timed, "the pass has the kernel"
        expected = trial.results()
        for name, value in expected.items():
            assert value.isfinite().all(), (form, name)
            assert value.abs().max() > 1e-3
        assert data.wrong(data.trial(others[-1]).results(), expected) == "", form


@pytest.mark.parametrize("m", [1, 16, 100, 8192, 12608, 10**6])
def test_a_row_is_near_what_launchers_ask_for(m):
    """By the class of M, however far from it the M that was measured."""
    asked = Shape(configs.m_class(m), 768, 3072, 16)
    for what in ("fwd", "route dx"):
        row = Row(what, "bf16", tune.kept_for(what, asked._replace(m=m)), "fused", {"fused": 1.0})
        assert tables.nearest([row], asked) is row
    assert tune.kept_for(SMALL_M, asked._replace(m=8)).m == 8
    few = Row("small_m", "bf16", tune.kept_for("small_m", asked._replace(m=8)), {}, {"default": 1.0})
    assert tables.nearest([few], asked._replace(m=configs.tokens(5))) is few


def test_what_counts_as_different():
    one = {"y": torch.ones(100), "h": torch.ones(4)}
    assert disagreement(one, one, BF16, 4) == ""
    for wrong in (0.0, 1.1, float("nan"), float("inf")):
        other = {"y": torch.ones(100), "h": torch.ones(4)}
        other["y"][17] = wrong
        assert disagreement(other, one, BF16, 4).startswith("y is off by")
    close = {"y": torch.ones(100) + 0.007, "h": torch.ones(4)}
    assert disagreement(close, one, BF16, 4) == ""
    assert disagreement(close, one, torch.float32, 4) != ""


@interpreted
def test_the_fastest_is_kept_and_launched_from_then_on(tmp_path, monkeypatch):
    path = tmp_path / "test-card.json"
    result = run(path, Clock(lambda step: 0.5 if stages_of(step) == 2 else 1.0))
    (outcome,) = result.outcomes
    assert (outcome.row.what, outcome.row.times, outcome.gain) == ("x", (1.0, 0.5), 0.5)
    table = tables.read(path)
    assert (table.device, table.arch, table.triton) == ("Test Card", "sm_90", environment.version("triton"))
    (row,) = table.rows
    assert row.choice["num_stages"] == 2
    assert row.shape == outcome.shape._replace(m=64) == TINY._replace(m=64), "launchers ask for the class of M"
    monkeypatch.setenv(environment.TABLES_VARIABLE, str(tmp_path))
    monkeypatch.setattr(environment, "device_of", lambda arch: "Test Card")
    tables.reload()
    try:
        assert tables.choose("x", "sm_90", torch.float16, TINY._replace(m=50)) == row.choice
    finally:
        monkeypatch.undo()
        tables.reload()
    assert "50.0% less" in tune.describe(outcome)


@interpreted
@pytest.mark.parametrize(("time", "kept"), [(0.995, False), (0.98, True)])
def test_noise_is_no_gain(tmp_path, time, kept):
    path = tmp_path / "t.json"
    (outcome,) = run(path, Clock(lambda step: time if stages_of(step) == 2 else 1.0)).outcomes
    assert (tables.read(path).rows[0].choice["num_stages"] == 2) == kept
    assert (outcome.gain > 0) == kept
    assert ("stays" in tune.describe(outcome)) != kept


def by_stages(step):
    """Two stages are the fastest, then four, then the three of the default."""
    return {2: 0.5, 4: 0.75}.get(trial_of(step).choice["num_stages"], 1.0)


@interpreted
def test_a_wrong_candidate_is_never_chosen(tmp_path, monkeypatch):
    """The fastest gives another result, the next one does not compile."""
    original = Trial.results

    def results(self):
        found = original(self)
        if self.choice and self.choice["num_stages"] == 2:
            found["db_down"][0, -1] *= 1.5
        if self.choice and self.choice["num_stages"] == 4:
            raise RuntimeError("out of resources: shared memory")
        return found

    monkeypatch.setattr(Trial, "results", results)
    path = tmp_path / "t.json"
    (outcome,) = run(path, Clock(by_stages)).outcomes
    assert tables.read(path).rows[0].choice["num_stages"] == 3
    assert any("num_stages=2: db_down is off by" in line for line in outcome.discarded)
    assert any("num_stages=4" in line and "out of resources" in line for line in outcome.discarded)


@interpreted
def test_a_candidate_must_serve_the_forms_that_are_not_timed(tmp_path, monkeypatch):
    original = Trial.results

    def results(self):
        if self.choice and drops(self) and self.choice["num_stages"] == 2:
            raise RuntimeError("too many registers")
        return original(self)

    monkeypatch.setattr(Trial, "results", results)
    path = tmp_path / "t.json"
    (outcome,) = run(path, Clock(by_stages)).outcomes
    assert tables.read(path).rows[0].choice["num_stages"] == 4, "the next best"
    assert any("in the form 'full': RuntimeError: too many registers" in line for line in outcome.discarded)


@interpreted
def test_a_candidate_must_not_slow_the_other_forms(tmp_path):
    def cost(step):
        slow = drops(trial_of(step)) and trial_of(step).choice["num_stages"] == 2
        return 9.0 if slow else by_stages(step)

    path = tmp_path / "t.json"
    (outcome,) = run(path, Clock(cost)).outcomes
    assert tables.read(path).rows[0].choice["num_stages"] == 4
    assert any("in the form 'full': 800.0% slower than the default" in line for line in outcome.discarded)


@interpreted
def test_a_default_that_fails_is_reported_and_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Trial, "results", lambda self: 1 / 0)
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
    assert [row.what for row in tables.read(path).rows] == ["x", "dy"]
    rest = Clock()
    result = run(path, rest, kernels)
    assert rest.calls == 1
    assert [(outcome.row.what, outcome.measured) for outcome in result.outcomes] == [
        ("x", False), ("dy", False), ("prepare", True)
    ]  # fmt: skip
    assert [row.what for row in tables.read(path).rows] == [*kernels]
    nothing = Clock()
    run(path, nothing, kernels)
    assert nothing.calls == 0
    run(path, nothing, kernels, dtype="fp32")
    assert nothing.calls == 3, "another dtype is another entry"
    again = Clock(lambda step: 7.0)
    run(path, again, ("x",), again=True)
    assert again.calls == 1
    found = tables.read(path).rows
    assert len(found) == 6
    assert next(row.times for row in found if (row.what, row.dtype) == ("x", "fp16")) == (7.0, 7.0)


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
    assert [outcome.row.what for outcome in result.outcomes] == ["x", "dy"]
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
    assert tune.open_table(path, machine(), again=True).rows == ()


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"kernels must be one of 'fwd'.*got 'finish'"):
        run(tmp_path / "t.json", kernels=("finish",))
    with pytest.raises(ValueError, match=r"dtype must be one of 'bf16'.*got 'int8'"):
        run(tmp_path / "t.json", dtype="int8")


@interpreted
def test_routes_are_measured_as_whole_passes(tmp_path):
    path = tmp_path / "t.json"
    steps, slower = {}, {"fused": 1.0, "library": 0.8}

    def cost(step):
        trial = trial_of(step)
        assert trial.timed == trial.steps
        steps.setdefault(trial.choice, []).append([type(step).__name__ for step in trial.steps])
        return slower[trial.choice]

    result = run(path, Clock(cost), kernels=(), routes=True, arch="cpu")
    assert result.failed == []
    assert all("LibraryProduct" in of for of in steps["library"])
    assert not any("LibraryProduct" in of for of in steps["fused"])
    rows = tables.read(path).rows
    assert [row.what for row in rows] == [name for name in NAMED if name.startswith("route")]
    assert all((row.choice, row.ms) == ("library", slower) for row in rows)
    assert [outcome.row.choice for outcome in result.outcomes] == ["library"] * 4
    done = Clock()
    run(path, done, kernels=(), routes=True, arch="cpu")
    assert done.calls == 0


@interpreted
def test_routes_that_differ_are_an_error_and_no_choice(tmp_path, monkeypatch):
    original = Trial.results

    def results(self):
        found = original(self)
        return {name: value * (2 if self.choice == "library" else 1) for name, value in found.items()}

    monkeypatch.setattr(Trial, "results", results)
    result = run(tmp_path / "t.json", kernels=(), routes=True)
    assert len(result.failed) == 4
    assert "the two routes differ: y is off by" in result.failed[0]
    assert not (tmp_path / "t.json").exists()


def four_bits(path, timer, monkeypatch, tokens=(1, 8), shapes=(CODES,), **changes):
    """A run of the 4-bit tasks alone."""
    monkeypatch.setattr(tune, "TOKENS", tokens)
    return run(path, timer, kernels=(), shapes=shapes, four_bit=True, arch="cpu", **changes)


def test_the_tasks_of_4_bit_layers():
    shapes = [LARGE, LARGE._replace(m=7), LARGE._replace(n=1024), LARGE._replace(r=8)]
    found = tune.tasks(shapes, (), False, True)
    assert found[:2] == [(DEQUANTIZE, Shape(0, 4096, 4096, 0)), (DEQUANTIZE, Shape(0, 1024, 4096, 0))]
    assert len(found) == 2 + 3 * len(tune.TOKENS)
    near = {m for m in range(1, 65) for t in tune.TOKENS if max(m, t) <= tables.NEAR * min(m, t)}
    assert near == set(range(1, 65)), "every number of tokens has a row near it"


@interpreted
def test_what_serves_4_bits_is_measured(tmp_path, monkeypatch):
    """Triton's kernels here, which is all there is without the extension."""
    path, names = tmp_path / "t.json", []

    def cost(step):
        names.append(trial_of(step).choice)
        return {"triton": 1.0, "workspace": 0.4}[trial_of(step).choice]

    result = four_bits(path, Clock(cost), monkeypatch)
    assert result.failed == []
    dense, one, eight = tables.read(path).rows
    assert dense == Row(DEQUANTIZE, "fp16", Shape(0, 16, 64, 0), "triton", {"triton": 1.0})
    assert one == Row(SMALL_M, "fp16", Shape(1, 16, 64, 4), "workspace", {"triton": 1.0, "workspace": 0.4})
    assert eight.shape.m == 8
    assert names == ["triton", "triton", "workspace", "triton", "workspace"]
    assert [(o.row.what, *o.row.times, o.row.choice) for o in result.outcomes[:2]] == [
        ("4-bit dequantize", 1.0, 1.0, "triton"), ("4-bit small_m", 1.0, 0.4, "workspace")
    ]  # fmt: skip
    assert "60.0% less" in tune.describe(result.outcomes[1])
    done = Clock()
    again = four_bits(path, done, monkeypatch, tokens=(1, 8, 3))
    assert done.calls == 1, "it goes on where it stopped"
    assert [outcome.measured for outcome in again.outcomes] == [False] * 3 + [True]
    assert again.outcomes[-1].row.choice == "triton", "equal times: not the workspace"
    assert len(tables.read(path).rows) == 4
    four_bits(path, done, monkeypatch, tokens=(), dtype="fp32", again=True)
    assert [row.dtype for row in tables.read(path).rows] == ["fp16"] * 4 + ["fp32"]


@interpreted
def test_a_kind_is_what_was_forced():
    """The forward that is timed as "workspace" reads no codes by itself, and the other does nothing but that."""
    data = Data(SMALL_M, "lora", CODES._replace(m=8), torch.float16, "cpu", "cpu")
    for kind, expected in (("triton", ["small_m"]), ("workspace", ["dequantize", "prepare", "fwd"])):
        assert [trials.kernel_of(step) for step in data.trial(kind).timed] == expected


class Written:
    """A stand-in of a launch of csrc: it writes what the codec says, or one wrong number."""

    def __init__(self, weight, out, wrong):
        self.weight, self.out, self.wrong = weight, out, wrong

    def run(self):
        trials.dequantize(self.weight, self.out.dtype, out=self.out)
        self.out[-1, -1] += self.wrong


@interpreted
@pytest.mark.parametrize(("wrong", "choice", "cuda_ms"), [(0.0, "cuda", 0.1), (0.25, "triton", None)])
def test_only_what_is_right_is_timed(tmp_path, monkeypatch, wrong, choice, cuda_ms):
    """The faster kind is chosen where it gives the codec's bits, and left out where one number differs."""
    path = tmp_path / "t.json"
    monkeypatch.setattr(four_bit, "_available", lambda arch: True)
    monkeypatch.setattr(cuda, "dequantize_launch", lambda weight, out, arch: Written(weight, out, wrong))
    times = {"cuda": 0.1, "triton": 1.0, "workspace": 2.0}
    result = four_bits(path, Clock(lambda step: times[trial_of(step).choice]), monkeypatch, tokens=(1,))
    dense, few = tables.read(path).rows
    assert (dense.choice, dense.ms.get("cuda"), dense.ms["triton"]) == (choice, cuda_ms, 1.0)
    discarded = ["cuda: 1 of 1024 numbers are not those of quant.dequantize"] if wrong else []
    assert result.outcomes[0].discarded == discarded
    assert (few.choice, few.ms.get("cuda")) == ("triton", None)
    assert result.outcomes[1].discarded[0].startswith("cuda: RuntimeError: "), "it runs on a GPU only"


@interpreted
def test_a_wrong_or_unserved_forward_is_not_timed(tmp_path, monkeypatch):
    original = Trial.results

    def wrong(*kinds):
        def results(self):
            found = original(self)
            factor = 1.02 if self.choice in kinds and "y" in found else 1.0
            return {name: value * factor for name, value in found.items()}

        monkeypatch.setattr(Trial, "results", results)

    wrong("triton")
    (_, outcome) = four_bits(tmp_path / "t.json", Clock(), monkeypatch, tokens=(1,)).outcomes
    assert outcome.row.choice == "workspace"
    assert outcome.discarded[0].startswith("triton: y is off by")
    wrong("triton", "workspace")
    result = four_bits(tmp_path / "v.json", Clock(), monkeypatch, tokens=(1,))
    assert result.failed[0].startswith("4-bit small_m at 1x16x64 r=4: triton: y is off by")
    assert "; workspace: y is off by" in result.failed[0]
    wrong()
    wide = [CODES._replace(k=72)]
    (_, outcome) = four_bits(tmp_path / "u.json", Clock(), monkeypatch, tokens=(1,), shapes=wide).outcomes
    assert outcome.row.choice == "workspace"
    assert "triton: ValueError: K = 72 is no multiple of the block size 64" in outcome.discarded[0]


def test_the_clock_of_a_cpu_interleaves():
    order = []
    times = clock_timer([[lambda: order.append("a")], [lambda: order.append("b"), lambda: order.append("c")]], 2)
    assert [len(values) for values in times] == [2, 2]
    assert "".join(order) == "bca" + "abc" + "bca"
    assert all(value >= 0 for values in times for value in values)
    assert ratio([2.0, 9.0, 2.0], [1.0, 1.0, 1.0]) == 2.0


def test_sets_go_past_the_cache():
    assert trials.sets("fwd", LARGE, BF16, 50 << 20, 1 << 34) == 2
    assert trials.sets("fwd", Shape(1024, 1024, 1024, 16), BF16, 50 << 20, 1 << 34) == 16
    assert trials.sets("fwd", LARGE, BF16, 1 << 40, 1 << 20) == 2


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
    what = tune.tasks([shape], configs.TUNED, True, True)
    result = tune.run(what, "bf16", path, machine=card, show=False, minutes=4)
    assert result.failed == []
    found = tables.read(path)
    assert (found.device, found.arch) == (card.name, card.arch)
    assert len(found.rows) + len(result.left) == len(what) == len(configs.TUNED) + 14
    for row in found.rows:
        if row.what in (DEQUANTIZE, SMALL_M):
            assert "triton" in row.ms, row
            assert ("cuda" in row.ms) == extension.available(card.arch), row
        before, after = row.times
        assert 0.0005 < after <= before * 1.05 < 10, row
    with tables.using(found):
        fwd = next(row for row in found.rows if row.what == "fwd")
        assert tables.choose("fwd", card.arch, BF16, shape) == fwd.choice
        Data("route dx scaled", "scaled", shape, BF16, "cuda", card.arch).trial("fused", found).run()
        torch.cuda.synchronize()
