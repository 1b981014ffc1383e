"""The layers of `benchmarks.ratios` as pytest-benchmark tests.

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only --benchmark-compare   # against a run stored by --benchmark-autosave

Grouped by case and pass, so that a group holds what competes: the frozen layer, ours, the literal formula and
PEFT's. A contestant is compared with float64 before it is timed; no speed is asserted.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import cases
from benchmarks.cases import Contestant, Problem, Shape
from benchmarks.ratios import CASES

SHAPE = Shape(m=256, k=512, n=512, r=8)
BUILDERS = {"frozen": cases.frozen, "ours": cases.ours, "eager": cases.eager, "peft": cases.peft}


@pytest.fixture(params=CASES)
def problem(request: pytest.FixtureRequest) -> Problem:
    return cases.make_problem(SHAPE, cases.case_config(request.param, SHAPE.r))


@pytest.fixture(params=BUILDERS)
def contestant(request: pytest.FixtureRequest, problem: Problem) -> Contestant:
    if request.param == "frozen":
        return cases.frozen(problem)
    try:
        found = BUILDERS[request.param](problem)
    except (ImportError, ValueError) as reason:
        pytest.skip(str(reason))
    cases.check(found, problem)
    return found


def test_forward(benchmark: Any, contestant: Contestant, problem: Problem) -> None:
    benchmark.group = f"{cases.config_case(problem.config)} fwd"
    benchmark.extra_info.update(impl=contestant.impl, shape=str(SHAPE))
    benchmark(contestant.forward, problem.x)


def test_forward_backward(benchmark: Any, contestant: Contestant, problem: Problem) -> None:
    benchmark.group = f"{cases.config_case(problem.config)} fwd_bwd"
    benchmark.extra_info.update(impl=contestant.impl, shape=str(SHAPE))
    benchmark(cases.step, contestant, problem.x, problem.dy)
