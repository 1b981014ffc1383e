"""Children: in the space, within the limit, the same again; fronts and parents against brute force."""

import itertools
import random

import pytest
from fake_net import SMALL, FakeNet

from glora_kernels import SearchSpace
from glora_kernels.search import evolution
from glora_kernels.search.evolution import Evolution, Recipe, choose_parents, front, ranking, recipe_of

RECIPES = [Recipe(), Recipe(switch_off=0.0), Recipe(switch_off=1.0), Recipe(mutation=1.0, switch_off=0.1)]
SPACES = [SMALL, SearchSpace(), SearchSpace.paper(), SearchSpace(A=("lora",), B=("vector", "lora"), D=("constant",))]


def made(space=SMALL, recipe=RECIPES[0], limit=None, seed=0, layers=4, bias=True):
    net = FakeNet(layers, space, bias=bias)
    return net, Evolution(net.spaces, net.shapes, recipe, seed, limit)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_child_is_in_the_space_and_within_the_limit(space, recipe, bias):
    net, free = made(space, recipe, bias=bias)
    least = free.size(free.smallest)
    allowed = [set(space.configs(shape)) for shape in net.shapes.values()]
    above = 0
    for limit in (least, least + 1, least + 37, least + 300, None):
        _, drawing = made(space, recipe, limit, bias=bias)
        parents = [free.child(0, i, (), ()) for i in range(4)]
        above += limit is not None and any(free.size(parent) > limit for parent in parents)
        for index in (*range(0, 50, 7), 24, 25, 49):
            child = drawing.child(1, index, parents, ())
            assert limit is None or drawing.size(child) <= limit
            assert all(config in own for config, own in zip(child, allowed, strict=True))
    assert above or recipe.switch_off == 1.0, "no limit had anything to repair"


def test_a_child_depends_on_seed_generation_index_parents_and_what_is_known():
    def draw(seed=0, generation=2, index=3, parents=None, known=()):
        _, drawing = made(SearchSpace(), limit=100, seed=seed, layers=8)
        return drawing.child(generation, index, parents or [drawing.smallest], known)

    same = draw()
    random.seed(5)
    assert draw() == same
    _, other = made(SearchSpace(), limit=100, layers=8)
    parents = [other.child(0, i, (), ()) for i in range(3)]
    changed = [draw(seed=1), draw(generation=3), draw(index=4), draw(parents=parents), draw(known=[same])]
    assert len({same, *changed}) == 6


def test_children_are_as_they_were():
    """What a seed draws decides what a ledger means: if this changes, the version of the ledger must too."""
    _, drawing = made(SMALL, limit=40, seed=7)
    parents = [drawing.child(0, i, (), ()) for i in range(3)]
    children = [drawing.child(1, i, parents, ()) for i in (0, 30, 49)]
    assert ["".join(f"{c.A[0]}{c.B[0]}{c.rank} " for c in child) for child in (*parents, *children)] == DRAWN


DRAWN = [
    "nn1 nn1 vl1 vn1 ",
    "nn1 vl2 nn1 nn1 ",
    "nn1 nn1 nn1 nn1 ",
    "vn1 nn1 nn1 nl1 ",
    "nn1 nn1 vn1 nn1 ",
    "nn1 vn1 nn1 nn1 ",
]


def test_known_children_are_drawn_again_and_then_left_out():
    net, drawing = made(SMALL, layers=1)
    known = set()
    for i in range(200):
        child = drawing.child(0, i, (), known)
        assert child not in known
        if child is not None:
            known.add(child)
    assert known == {(config,) for config in SMALL.configs(*net.shapes.values())}
    assert drawing.child(1, 0, list(known), known) is None


def forms(*configs):
    return {(name, getattr(config, name)) for config in configs for name in "ABCDE"}


def test_mutants_and_crossovers_come_from_their_parents():
    _, still = made(SearchSpace(), Recipe(mutation=0.0), layers=6)
    parents = [still.child(0, i, (), ()) for i in range(3)]
    assert {still.child(1, i, parents, ()) for i in range(25)} == set(parents)
    for index in range(25, 50):
        child = still.child(1, index, parents, ())
        pairs = itertools.combinations(parents, 2)
        assert any(all(forms(c) <= forms(p, q) for c, p, q in zip(child, *pair, strict=True)) for pair in pairs)
    assert still.child(1, 30, parents, ()) not in parents


def test_mutation_draws_a_gene_as_often_as_asked():
    space = SearchSpace(A=("none", "vector"), B=("none", "vector"), C=("none",), D=("none",), E=("none",))
    _, drawing = made(space, Recipe(mutation=0.2, switch_off=0.0), layers=40)
    parent = drawing.smallest
    changed = [c.A != "none" for i in range(25) for c in drawing.child(1, i, [parent], ())]
    assert 0.07 < sum(changed) / len(changed) < 0.13  # of a redrawn gene of two values half are others; 1000 draws


def dominates(one, other):
    return one != other and one[0] >= other[0] and one[1] <= other[1]


def clouds():
    rng = random.Random(0)
    for count in (0, 1, 2, 3, 7, 20, 60):
        for levels in (2, 5, 1000):
            yield [(rng.randrange(levels) / 8, rng.randrange(levels)) for _ in range(count)]
    yield [(float("-inf"), 3), (float("inf"), 9), (0.0, 1), (float("inf"), 9)]


@pytest.mark.parametrize("points", list(clouds()), ids=len)
def test_the_front_is_what_nothing_dominates(points):
    found = front(points)
    assert set(found) == {i for i, p in enumerate(points) if not any(dominates(other, p) for other in points)}
    assert len(set(found)) == len(found)
    assert [points[i] for i in found] == sorted(points[i] for i in found)


@pytest.mark.parametrize("points", list(clouds()), ids=len)
def test_parents_are_the_best_by_score_and_then_by_fronts(points):
    ranked = ranking(points)
    assert [points[i][0] for i in ranked] == sorted((value for value, _ in points), reverse=True)
    assert choose_parents(points, 10, 0) == ranked[:10]
    chosen = choose_parents(points, 3, 4)
    assert len(set(chosen)) == len(chosen) == min(7, len(points))
    assert chosen[:3] == ranked[:3]
    depth = {}
    rest = set(range(len(points)))
    while rest:
        layer = {i for i in rest if not any(dominates(points[j], points[i]) for j in rest)}
        depth |= dict.fromkeys(layer, len(depth))
        rest -= layer
    left = [i for i in range(len(points)) if i not in chosen]
    assert all(depth[i] <= depth[j] for i in chosen[3:] for j in left), "a later front before an earlier one"


def test_a_long_front_gives_parents_from_end_to_end():
    points = [(float(i), i) for i in range(21)]
    assert choose_parents(points, 1, 5) == [20, 0, 4, 9, 14, 19]


def test_the_paper_is_a_preset():
    paper = recipe_of("paper", {})
    assert paper == Recipe(50, 20, 10, 0, 25, 25, 0.2, 0.0)
    assert paper.population * (1 + paper.generations) == 1050
    assert recipe_of(None, {"population": 9, "crossovers": 2, "mutants": None}) == Recipe(9, mutants=4, crossovers=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"population": 0}, "population must be an integer >= 1"),
        ({"parents": 0}, "parents must be an integer >= 1"),
        ({"generations": -1}, "generations must be an integer >= 0"),
        ({"generations": 1.5}, "generations must be an integer"),
        ({"mutation": 1.5}, "mutation must be a probability"),
        ({"switch_off": True}, "switch_off must be a probability"),
        ({"mutants": 40}, r"mutants \+ crossovers must be at most population=50, got 40 \+ 25"),
    ],
)
def test_a_bad_recipe_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        recipe_of(None, given)


def test_repair_is_what_keeps_the_limit(monkeypatch):
    monkeypatch.setattr(evolution.Evolution, "repaired", lambda self, child, rng: child)
    _, drawing = made(SearchSpace(), limit=10)
    assert any(drawing.size(drawing.child(0, i, (), ())) > 10 for i in range(10))
