"""Ranks by depth, by scores under a budget and by intrinsic dimensions, against the formulas by the letter."""

import itertools
import math
import random

import pytest
import torch
from method_nets import LORA, Block, Net, layers, plain
from torch import nn

import glora_kernels as gk


def within(scores, budget, low, high):
    """By the letter, by bisection: c with Σ clip(c·score, low, high) = budget, and the shares."""
    smallest, largest = 0.0, 1.0
    while sum(min(max(largest * s, low), high) for s in scores) < budget - 1e-9 and largest < 1e30:
        largest *= 2
    for _ in range(90):
        c = (smallest + largest) / 2
        smallest, largest = (c, largest) if sum(min(max(c * s, low), high) for s in scores) < budget else (smallest, c)
    return [min(max(largest * s, low), high) for s in scores]


def test_any_budget_is_kept_exactly_and_in_proportion():
    rng = random.Random(0)
    for _ in range(600):
        n = rng.randint(1, 12)
        scores = [rng.choice([rng.random(), rng.random() ** 8, 10 ** rng.uniform(-12, 12)]) for _ in range(n)]
        low = rng.randint(0, 3)
        high = rng.choice([None, low + rng.randint(0, 9)])
        budget = rng.randint(n * low, n * (low + 9 if high is None else high))
        found = gk.allocate({str(i): s for i, s in enumerate(scores)}, budget, low, high)
        ranks = list(found.values())
        assert list(found) == [str(i) for i in range(n)]
        assert all(type(rank) is int for rank in ranks)
        assert sum(ranks) == budget
        top = budget if high is None else high
        assert all(low <= rank <= top for rank in ranks)
        for rank, share in zip(ranks, within(scores, budget, low, top), strict=True):
            assert abs(rank - share) < 1 + 1e-6, (scores, budget, low, high)
        order = sorted(range(n), key=lambda i: scores[i])
        assert all(ranks[a] <= ranks[b] for a, b in itertools.pairwise(order)), (scores, ranks)


@pytest.mark.parametrize(
    ("scores", "budget", "bounds", "expected"),
    [
        ([1, 2, 3], 12, (1, None), [2, 4, 6]),
        ([1, 1, 1], 8, (1, None), [3, 3, 2]),  # equal scores in the order given
        ([5, 3, 2], 7, (0, None), [4, 2, 1]),  # shares 3.5, 2.1, 1.4
        ([100, 1, 1], 9, (1, 5), [5, 2, 2]),
        ([100, 0, 0], 9, (1, 5), [5, 2, 2]),
        ([100, 0, 0], 9, (0, None), [9, 0, 0]),
        ([1e308, 1e308], 4, (1, None), [2, 2]),
        ([5e-324, 0], 4, (1, None), [3, 1]),
        ([0.3], 0, (0, None), [0]),
        ([torch.tensor(1.0), torch.tensor(3.0)], 8, (1, None), [2, 6]),
    ],
)
def test_shares(scores, budget, bounds, expected):
    assert list(gk.allocate(dict(zip("abc", scores, strict=False)), budget, *bounds).values()) == expected


@pytest.mark.parametrize(
    ("scores", "budget", "bounds", "message"),
    [
        ({}, 4, (), "there are no scores"),
        ({"a": 1.0, "b": math.nan}, 4, (), "finite and not negative; 'b' has nan"),
        ({"a": math.inf, "b": 1.0}, 4, (), "'a' has inf"),
        ({"a": -0.1, "b": -1.0}, 4, (), r"'a' has -0\.1 \(2 of 2 are such\)"),
        ({"a": 0.0, "b": 0.0}, 4, (), "all scores are 0"),
        ({"a": 1.0, "b": 1.0}, 1, (), "ranks from 1 to 1 can have 2 to 2 in all; got budget=1"),
        ({"a": 1.0, "b": 1.0}, 9, (1, 4), "can have 2 to 8 in all; got budget=9"),
        ({"a": 1.0}, 4, (3, 2), "0 <= low <= high, got 3 and 2"),
        ({"a": 1.0}, 4, (-1,), "0 <= low"),
        ({"a": 1.0}, 4.0, (), "must be integers, got 4.0"),
        ({"a": 1.0}, True, (), "must be integers, got True"),
        ({"a": 1.0}, 4, (1.0,), "must be integers"),
        ({"a": 1.0}, 4, (1, 4.5), "must be integers"),
    ],
)
def test_refused_scores(scores, budget, bounds, message):
    with pytest.raises(ValueError, match=f"allocate: .*{message}"):
        gk.allocate(scores, budget, *bounds)


def test_ranks_rise_linearly():
    model = Net(12)
    ranks = gk.linear_ranks(model, 4, 12)
    assert len(ranks) == 24
    for block in range(12):
        expected = math.floor(4 + 8 * block / 11 + 0.5)
        assert ranks[f"layers.{block}.q"] == ranks[f"layers.{block}.v"] == expected
    down = gk.linear_ranks(model, 9, 1, target_modules=["v"])
    assert list(down.values()) == [math.floor(9 - 8 * b / 11 + 0.5) for b in range(12)]
    assert all(path.endswith(".v") for path in down)
    flat = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))  # a block may be a layer itself
    assert gk.linear_ranks(flat, 2, 4) == {"0": 2, "1": 3, "2": 4}


def test_layers_outside_of_the_blocks_are_left_out():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 6)
            self.layers = nn.ModuleList(Block() for _ in range(12))

    assert "embed" not in gk.linear_ranks(Headed(), 1, 2)
    with pytest.raises(ValueError, match=r"embed.* inside a block"):
        gk.linear_ranks(Headed(), 1, 2, target_modules=["embed"])


@pytest.mark.parametrize(("low", "high", "message"), [(0, 4, "low must be"), (4, 1.5, "high must be an integer >= 1")])
def test_refused_bounds(low, high, message):
    with pytest.raises(ValueError, match=message):
        gk.linear_ranks(plain(), low, high)
    with pytest.raises(ValueError, match="blocks"):
        gk.linear_ranks(nn.ModuleDict({"q": nn.Linear(6, 6)}), 1, 2)


def test_ranks_are_injected_with_the_same_s():
    ranks = {"layers.0.q": 3, "layers.0.v": 0, "layers.1.q": 5, "layers.1.v": 1}
    model = gk.inject(plain(), gk.with_ranks(LORA, ranks), list(ranks))
    for path, layer in layers(model).items():
        if ranks[path] == 0:
            assert type(layer) is nn.Linear
        else:
            assert layer.config.rank == ranks[path]
            assert layer.config.scale == pytest.approx(2, rel=1e-15)


def test_intrinsic_dimensions_of_manifolds():
    pytest.importorskip("skdim")
    generator = torch.Generator().manual_seed(0)
    dimensions = (1, 2, 4, 3)
    spaces = [torch.linalg.qr(torch.randn(16, d, generator=generator))[0] for d in dimensions]
    points = torch.rand(1500, 4, generator=generator)

    class Onto(nn.Module):
        """From any block's states to a manifold of this dimension: the points are kept beside."""

        def __init__(self, space):
            super().__init__()
            self.linear, self.space = nn.Linear(16, 16), space

        def forward(self, x):
            z = points[: len(x), : self.space.shape[1]]
            return (z @ self.space.T).tanh()

    model = nn.Sequential(*[Onto(space) for space in spaces[1:]])
    first = (points[:, :1] @ spaces[0].T).tanh()
    found = gk.intrinsic_dimensions(model, [first], samples=1500)
    assert [round(d) for d in found] == list(dimensions)
    assert gk.intrinsic_dimensions(model, [(first,)], samples=1500) == found
    ranks = gk.intrinsic_ranks(model, [{"input": first}])
    assert ranks == {"0.linear": 2, "1.linear": 3, "2.linear": 1}


def test_too_little_to_look_at():
    pytest.importorskip("skdim")
    with pytest.raises(ValueError, match=r"'layers\.0' has 5 distinct hidden states, and needs at least 20"):
        gk.intrinsic_ranks(plain(), [torch.randn(5, 6, dtype=torch.float64)])
    with pytest.raises(ValueError, match="batches is empty"):
        gk.intrinsic_ranks(plain(), [])
