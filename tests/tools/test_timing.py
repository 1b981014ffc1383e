"""The clocks: contenders take turns, and a graph times what the card does."""

from __future__ import annotations

import pytest
import torch
from tuning import BF16, LARGE

from glora_kernels.runtime.configs import Shape
from glora_kernels.tools import trials
from glora_kernels.tools.timing import clock_timer, event_timer, graph_timer, ratio


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
