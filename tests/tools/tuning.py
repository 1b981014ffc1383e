"""What the tests of the tuner share: small shapes, a card that is not there, and a clock that obeys the test."""

from __future__ import annotations

import torch

from glora_kernels.runtime.configs import Shape
from glora_kernels.tools import tune
from glora_kernels.tools.timing import Machine
from glora_kernels.tools.trials import Trial

TINY, BF16 = Shape(40, 48, 64, 4), torch.bfloat16
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
