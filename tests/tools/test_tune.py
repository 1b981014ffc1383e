"""The tuner without a GPU: real launches in Triton's interpreter, small shapes, and a clock that obeys the test."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import interpreted
from tuning import BF16, TINY, Clock, machine, run, trial_of

from glora_kernels.runtime import configs, environment, extension, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import DEQUANTIZE, NAMED, SMALL_M
from glora_kernels.tools import tune
from glora_kernels.tools.timing import this_gpu
from glora_kernels.tools.trials import Data, Trial


def stages_of(step):
    launch = trial_of(step).timed[0]
    assert launch.options["num_stages"] == trial_of(step).choice["num_stages"]
    return launch.options["num_stages"]


def drops(trial):
    return trial.timed[0].args["seed"] is not None


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
