"""The tuner over 4-bit weights: what serves them is measured, and only what is right is timed."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreted
from tuning import LARGE, Clock, run, trial_of

from glora_kernels.four_bit import cuda
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.runtime import tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import DEQUANTIZE, SMALL_M, Row
from glora_kernels.tools import trials, tune
from glora_kernels.tools.trials import Data, Trial

CODES = Shape(40, 16, 64, 4)


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
