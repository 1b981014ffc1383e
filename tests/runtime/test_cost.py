"""The cost model and the choice between the two routes: pure, monotonous, and no guess about an unknown card."""

from __future__ import annotations

import pytest
import torch

from glora_kernels.runtime import cost, routes, tables
from glora_kernels.runtime.configs import PROGRAMS, Shape

SQUARE = Shape(8192, 4096, 4096, 16)
ARCHS = sorted(cost.CARDS)


def choose(arch, shape, dtype=torch.bfloat16, weight=None, backward=False, scales=False):
    return routes.product_route(arch, dtype, shape, weight or dtype, backward=backward, scales=scales)


def test_the_floor_of_the_design():
    """One product of 8192x4096x4096 on an H100 takes 0.35 ms; a read and write of y another 0.045.

    Ours is in 1024 tiles, which 132 multiprocessors take in eight rounds.
    """
    times = cost.predict("sm_90", torch.bfloat16, SQUARE, backward=False, scales=False)
    assert times["fused"] == pytest.approx(0.3445 / cost.CARDS["sm_90"].share * 8 * 132 / 1024, rel=0.01)
    assert times["library"] == pytest.approx(0.3445 + 0.0447 + cost.LAUNCH_MS, rel=0.01)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("backward", [False, True])
def test_time_grows_with_every_size(arch, backward):
    before = cost.predict(arch, torch.bfloat16, SQUARE, backward=backward, scales=True)
    for name in ("m", "n", "k"):
        larger = SQUARE._replace(**{name: 2 * getattr(SQUARE, name)})
        after = cost.predict(arch, torch.bfloat16, larger, backward=backward, scales=True)
        assert all(after[route] > before[route] for route in ("fused", "library"))


def test_every_card_has_its_number_of_multiprocessors():
    assert set(cost.CARDS) <= set(PROGRAMS)
    for card in cost.CARDS.values():
        assert 0.5 < card.share <= 1.0
        assert 0.5 < card.share_fp32 <= 1.0


def test_a_deep_reduction_goes_to_the_library_and_a_shallow_one_is_fused():
    """The library's gain grows with the product, what its added terms cost with the output alone."""
    assert choose("sm_90", Shape(8192, 4096, 14336, 16)) == "library"
    assert choose("sm_90", Shape(8192, 4096, 1024, 16)) == "fused"
    assert choose("sm_90", Shape(8192, 14336, 4096, 16)) == "fused"
    assert choose("sm_90", Shape(8192, 14336, 4096, 16), backward=True) == "library"


def test_a_few_rows_are_fused():
    """A program a row block would leave the card idle."""
    for m in (1, 16, 48, 512):
        assert choose("sm_90", Shape(m, 4096, 4096, 16)) == "fused"


def test_scaling_counts_against_both_routes():
    """A weight scaled first, or our product with dy scaled on its way: whichever of the two costs less."""
    plain, scaled = (
        cost.predict("sm_90", torch.bfloat16, SQUARE, backward=True, scales=scales) for scales in (False, True)
    )
    assert scaled["library"] > plain["library"]
    assert plain["fused"] < scaled["fused"] <= plain["fused"] + scaled["library"] - plain["library"] + 1e-9


def test_the_weight_is_scaled_first_for_many_rows():
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096)):
        first = [
            cost.scales_weight_first("sm_90", torch.bfloat16, Shape(m, n, k, 16)) for m in (1, 64, 512, 2048, 8192)
        ]
        assert first == [False, False, False, True, True]
    assert not cost.scales_weight_first("cpu", torch.bfloat16, SQUARE), "no guess about an unknown card"


def test_a_grid_that_fills_the_card_costs_no_more_than_one_that_does_not():
    """33 row tiles of four columns are one round of 132 programs, and one more row takes another."""
    times = [
        cost.predict("sm_90", torch.bfloat16, Shape(m, 512, 4096, 16), backward=False, scales=False)["fused"]
        for m in (128 * 33, 128 * 34)
    ]
    assert times[0] < times[1]


@pytest.mark.parametrize("arch", ["cpu", "sm_75", "sm_120", "gfx1100"])
def test_no_guess_about_an_unknown_card(arch):
    assert choose(arch, Shape(8192, 4096, 14336, 16)) == "fused"


def test_a_weight_in_another_dtype_is_fused():
    deep = Shape(8192, 4096, 14336, 16)
    assert choose("sm_90", deep) == "library"
    assert choose("sm_90", deep, weight=torch.float32) == "fused"


def test_a_measurement_overrules_the_model():
    deep = Shape(8192, 4096, 14336, 16)
    with tables.using(None, {"route fwd": "fused"}):
        assert choose("sm_90", deep) == "fused"
    with tables.using(None, {"route fwd": "library"}):
        assert choose("sm_90", Shape(16, 64, 64, 16)) == "library"
        assert choose("sm_90", Shape(16, 64, 64, 16), weight=torch.float32) == "fused"
