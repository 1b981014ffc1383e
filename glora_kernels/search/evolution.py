"""How a search draws candidates: at random, by mutation and by crossover, made small enough to keep the limit.

All randomness of child i of generation g comes from a hash of (seed, g, i), so a child depends on the parents and on
what was drawn before it, and on nothing else.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

from glora_kernels.search.space import GENES, LayerShape, SearchSpace, genes_of, parameters, smaller
from glora_kernels.spec import GLoRAConfig

T = TypeVar("T")

Key = tuple[GLoRAConfig, ...]
"""A candidate without its paths: the configurations in the order of the layers."""

Point = tuple[float, int]
"""What a candidate is judged by: its value, of which more is better, and its number of parameters."""

TRIES = 10
"""How often a child that was drawn before is drawn again: so often in its own way, then so often at random."""


@dataclass(frozen=True)
class Recipe:
    """The numbers of an evolution; `Search` says what they are."""

    population: int = 50
    generations: int = 20
    parents: int = 10
    front_parents: int = 5
    mutants: int = 25
    crossovers: int = 25
    mutation: float = 0.2
    switch_off: float = 0.5

    def __post_init__(self) -> None:
        least = {"population": 1, "parents": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("mutation", "switch_off"):
                object.__setattr__(self, field.name, check_probability(field.name, value))
            elif type(value) is not int or value < least.get(field.name, 0):
                raise ValueError(f"{field.name} must be an integer >= {least.get(field.name, 0)}, got {value!r}")
        if self.mutants + self.crossovers > self.population:
            raise ValueError(
                f"mutants + crossovers must be at most population={self.population}, got {self.mutants} + "
                f"{self.crossovers}"
            )


def check_probability(name: str, value: object) -> float:
    """The value as a float; a ValueError that names it where it is no probability."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability in [0, 1], got {value!r}")
    return float(value)


PRESETS: Mapping[str | None, Recipe] = {None: Recipe(), "paper": Recipe(front_parents=0, switch_off=0.0)}


def recipe_of(preset: str | None, given: Mapping[str, Any]) -> Recipe:
    """The preset with the numbers that are not None in place of its own.

    With another population, the mutants and the crossovers are half of it each unless they are given.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}; got {preset!r}")
    chosen = {name: value for name, value in given.items() if value is not None}
    if type(population := chosen.get("population")) is int:
        chosen = {"mutants": population // 2, "crossovers": population // 2} | chosen
    return replace(PRESETS[preset], **chosen)


def front(points: Sequence[Point]) -> list[int]:
    """The indices of the points that no other dominates, by parameters and so by value, both rising.

    A point dominates another if it is not worse in either and better in one.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0], i)):
        if not found or points[i][0] > points[found[-1]][0] or points[i] == points[found[-1]]:
            found.append(i)
    return found


def ranking(points: Sequence[Point]) -> list[int]:
    """The indices by falling value; of equal values the one with fewer parameters first, then the earlier one."""
    return sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1], i))


def choose_parents(points: Sequence[Point], by_value: int, by_front: int) -> list[int]:
    """The indices of the parents: the best by value, and others by non-dominated sorting, front after front.

    Where a front has more than are wanted, those at even distances in it are taken, its ends among them.
    """
    rest = ranking(points)
    chosen = rest[:by_value]
    wanted = min(len(points), by_value + by_front)
    while len(chosen) < wanted:
        first = [rest[i] for i in front([points[i] for i in rest])]
        rest = [i for i in rest if i not in first]
        chosen += _evenly([i for i in first if i not in chosen], wanted - len(chosen))
    return chosen


def _evenly(items: list[int], count: int) -> list[int]:
    if len(items) <= count:
        return items
    return [items[j * (len(items) - 1) // max(count - 1, 1)] for j in range(count)]


def _stream(seed: int, generation: int, child: int) -> random.Random:
    digest = hashlib.sha256(f"{seed}/{generation}/{child}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _below(rng: random.Random, count: int) -> int:
    """A number in [0, count). Of `Random` only `random` gives the same numbers in every version of Python."""
    return int(rng.random() * count)


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[_below(rng, len(items))]


class Drawing:
    """Draws random candidates of these layers, within a limit on parameters.

    Args:
        spaces: the choices of each layer, by path.
        shapes: of the same layers, in the same order.
        switch_off: the probability that a layer is left at its smallest configuration.
        limit: the most parameters of a candidate; None for any number.

    Raises:
        ValueError: a limit that the smallest candidate does not keep.
    """

    def __init__(
        self,
        spaces: Mapping[str, SearchSpace],
        shapes: Mapping[str, LayerShape],
        switch_off: float,
        limit: int | None,
    ) -> None:
        self._layers = [(space, shapes[path]) for path, space in spaces.items()]
        self._genes = [space.genes(shape) for space, shape in self._layers]
        self._switch_off, self._limit = switch_off, limit
        self.smallest: Key = tuple(space.smallest(shape) for space, shape in self._layers)
        least = self.size(self.smallest)
        if limit is not None and least > limit:
            raise ValueError(f"max_parameters={limit} is impossible: the smallest candidate has {least} parameters")

    def size(self, candidate: Key) -> int:
        """The number of parameters of a candidate."""
        return sum(parameters(config, shape) for config, (_, shape) in zip(candidate, self._layers, strict=True))

    def draw(self, rng: random.Random) -> Key:
        """A layer is switched off with the probability `switch_off`, else each of its genes is drawn; then repaired."""
        drawn = tuple(
            self.smallest[i]
            if rng.random() < self._switch_off
            else space.build({gene: _pick(rng, values) for gene, values in self._genes[i].items()})
            for i, (space, _) in enumerate(self._layers)
        )
        return self.repaired(drawn, rng)

    def repaired(self, child: Key, rng: random.Random) -> Key:
        """The child, made smaller until it keeps the limit: one gene of some layer at a time, or the whole layer.

        Every step has fewer parameters than the one before, and only the smallest candidate has no step left.
        """
        if self._limit is None:
            return child
        layers, total = list(child), self.size(child)
        open_layers = list(range(len(layers)))
        while total > self._limit:
            at = _below(rng, len(open_layers))
            i = open_layers[at]
            space, shape = self._layers[i]
            steps = smaller(space, shape, layers[i])
            if not steps:
                del open_layers[at]
                continue
            after = self.smallest[i] if rng.random() < self._switch_off else _pick(rng, steps)
            total += parameters(after, shape) - parameters(layers[i], shape)
            layers[i] = after
        return tuple(layers)


class Evolution(Drawing):
    """Draws the children of a search over these layers.

    Args:
        spaces, shapes, limit: as in `Drawing`.
        recipe: the numbers of the evolution.
        seed: any integer.
    """

    def __init__(
        self,
        spaces: Mapping[str, SearchSpace],
        shapes: Mapping[str, LayerShape],
        recipe: Recipe,
        seed: int,
        limit: int | None,
    ) -> None:
        super().__init__(spaces, shapes, recipe.switch_off, limit)
        self._recipe, self._seed = recipe, seed

    def child(self, generation: int, index: int, parents: Sequence[Key], known: Collection[Key]) -> Key | None:
        """A child within the limit that is not among the `known`: a mutant, a crossover or a random one, by its index.

        One that is known is drawn again, `TRIES` times in its own way and as often at random. None: all were known.
        """
        rng = _stream(self._seed, generation, index)
        recipe = self._recipe
        draw: Callable[[], Key] = partial(self.draw, rng)
        if parents and index < recipe.mutants:
            draw = partial(self._mutant, rng, parents)
        elif len(parents) > 1 and index < recipe.mutants + recipe.crossovers:
            draw = partial(self._crossover, rng, parents)
        for attempt in [draw] * TRIES + [partial(self.draw, rng)] * TRIES:
            child = attempt()
            if child not in known:
                return child
        return None

    def _mutant(self, rng: random.Random, parents: Sequence[Key]) -> Key:
        """A parent of which each gene is drawn again with the probability `mutation`.

        Before that a layer is switched off with the probability mutation·switch_off, which genes that change one at a
        time hardly ever do.
        """
        parent, recipe = _pick(rng, parents), self._recipe
        child = []
        for i, (space, _) in enumerate(self._layers):
            if rng.random() < recipe.mutation * recipe.switch_off:
                child.append(self.smallest[i])
                continue
            genes = genes_of(parent[i])
            redrawn = {gene: _pick(rng, self._genes[i][gene]) for gene in GENES if rng.random() < recipe.mutation}
            child.append(space.build(genes | redrawn))
        return self.repaired(tuple(child), rng)

    def _crossover(self, rng: random.Random, parents: Sequence[Key]) -> Key:
        """Each gene is that of one of two parents."""
        first = _below(rng, len(parents))
        second = (first + 1 + _below(rng, len(parents) - 1)) % len(parents)
        both = parents[first], parents[second]
        child = tuple(
            space.build({gene: getattr(_pick(rng, both)[i], gene) for gene in GENES})
            for i, (space, _) in enumerate(self._layers)
        )
        return self.repaired(child, rng)
