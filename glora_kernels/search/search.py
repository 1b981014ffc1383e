"""The structure search: asks for scores of candidates, keeps them in a ledger, and breeds from the best."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from glora_kernels.nn.undo import finish
from glora_kernels.runtime.progress import note
from glora_kernels.runtime.progress import progress as shown
from glora_kernels.search.evolution import Evolution, Key, Point, choose_parents, front, ranking, recipe_of
from glora_kernels.search.ledger import Ledger, bad_line, difference
from glora_kernels.search.plots import draw
from glora_kernels.search.ranks import from_first, gathered, rank_and_world
from glora_kernels.search.results import (
    Failure,
    Finished,
    Outcome,
    genes_by_path,
    outcome_of,
    record_of,
    summary,
    table_of,
)
from glora_kernels.search.space import Candidate, LayerShape, SearchSpace
from glora_kernels.search.start import HandPicked, hand_picked
from glora_kernels.search.trials import to_study

if TYPE_CHECKING:
    import optuna


class Net(Protocol):
    """What a search needs of a supernet."""

    @property
    def spaces(self) -> Mapping[str, SearchSpace]:
        """The choices of every searched layer, by path, in the order of the model."""

    @property
    def shapes(self) -> Mapping[str, LayerShape]:
        """The shapes of the same layers."""

    def use(self, candidate: Candidate) -> AbstractContextManager[nn.Module]:
        """Inside, the model computes this candidate; the context gives the model."""

    def fingerprint(self) -> str:
        """A hash of everything that a score depends on: the trained values."""


class Search:
    """Searches for the configuration of every layer that scores best under a limit on parameters.

    Generation 0 is `start` and random candidates. Every later one is bred from the best of all before it: mutants,
    crossovers, and random candidates for the rest. A candidate above `max_parameters` is not thrown away but made
    smaller until it fits, one gene (a form of a support, or the rank) or one whole layer at a time. None is evaluated
    twice: a child that was there before is drawn again a few times, then left out.

    The ledger holds every score as soon as it is known. A search with the same arguments goes on where a ledger ends,
    after an error, Ctrl-C or SIGKILL, and the ledger comes out as if nothing had happened, byte by byte, if equal
    candidates get equal scores; with more `generations`, it goes on after its end. Where torch.distributed is
    initialised, every rank makes the same search and runs it, candidate i of each batch is evaluated by rank
    i mod world, and rank 0 keeps the ledger, which is that of one process; `evaluate` must not wait for other ranks.

    A score decides what is kept, so it must come from a validation split: the test split must have no part in it.

    `preset="paper"` is the recipe of the GLoRA paper, with `SearchSpace.paper()` for its space: 50 random candidates,
    20 generations of 25 mutants (p = 0.2 a gene) and 25 uniform crossovers of the 10 best so far; at most 1,050
    evaluations. Corrected: the limit is kept by repair (its rejection of random candidates need not end), the last
    generation counts, the depth is that of the model, a search can be resumed, and nothing is scored on a test split
    unless you do. Ours differs in two things: it also breeds from candidates that are good for their size
    (`front_parents`), and it switches layers off (`switch_off`).

    Args:
        net: a supernet.
        evaluate: the model, which computes the candidate, → its score. It may set `model.eval()` and should compute
            without gradients. None where scores come by `evaluate_many`, or by `ask` and `tell`.
        max_parameters: the most parameters that a candidate's adapters may have; None for any number.
        seed: an integer that decides, with the scores, what is drawn.
        path: of the ledger, a file of JSON lines; None keeps it in memory.
        start: hand-picked candidates, the first of generation 0: a list, or a mapping of names (for tables and
            pictures) to them. Each is a GLoRAConfig for all layers, or a mapping path or pattern → GLoRAConfig, as
            `inject` takes.
        minimize: whether a lower score is better, as of a loss.
        preset: "paper" or None; the arguments below are its own unless they are given.
        population: candidates a generation.
        generations: after generation 0.
        parents: the best by score that are bred from.
        front_parents: further ones, by non-dominated sorting of scores and parameters. 5; "paper": 0.
        mutants: children of one parent, whose genes are drawn again with the probability `mutation`. By default half of
            the population.
        crossovers: children of two parents, each gene from one of them. By default half of the population.
        mutation: 0.2.
        switch_off: the probability that a random candidate leaves a layer at the smallest configuration; a mutant
            does so to each layer with mutation·switch_off, and a step of repair with switch_off. 0.5; "paper": 0.
        evaluate_many: candidates → their scores, in the place of `evaluate`: a generation a call, or a rank's share. An
            exception in the place of a score says that this candidate failed; one that is raised ends the run, and
            nothing of its batch is kept.
        max_failures: `run` stops once this many candidates in a row have failed.

    Raises:
        ValueError: an argument outside the accepted ones, a limit that the smallest candidate does not keep, a start
            that is not in the space, or a ledger that is damaged or of another search; the message says which.
        TypeError: an argument of the wrong kind.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
        >>> net = gk.Supernet(model, gk.SearchSpace(ranks=(2, 4)), target_modules=["0"], train=["1"])
        >>> def evaluate(model):
        ...     return -model(torch.ones(1, 16)).square().sum().item()
        >>> search = gk.Search(net, evaluate, max_parameters=100, generations=2)
    """

    def __init__(
        self,
        net: Net,
        evaluate: Callable[[nn.Module], float] | None = None,
        max_parameters: int | None = None,
        seed: int = 0,
        path: str | os.PathLike[str] | None = None,
        start: Iterable[HandPicked] | Mapping[str, HandPicked] = (),
        minimize: bool = False,
        *,
        preset: str | None = None,
        population: int | None = None,
        generations: int | None = None,
        parents: int | None = None,
        front_parents: int | None = None,
        mutants: int | None = None,
        crossovers: int | None = None,
        mutation: float | None = None,
        switch_off: float | None = None,
        evaluate_many: Callable[[list[Candidate]], Sequence[Any]] | None = None,
        max_failures: int = 10,
    ) -> None:
        given = {
            "population": population, "generations": generations, "parents": parents, "front_parents": front_parents,
            "mutants": mutants, "crossovers": crossovers, "mutation": mutation, "switch_off": switch_off,
        }  # fmt: skip
        self._recipe = recipe_of(preset, given)
        if evaluate is not None and evaluate_many is not None:
            raise ValueError("evaluate and evaluate_many are two ways to the same scores; give one of them")
        _check_integer("seed", seed, None)
        _check_integer("max_failures", max_failures, 1)
        if max_parameters is not None:
            _check_integer("max_parameters", max_parameters, 0)
        if not isinstance(minimize, bool):
            raise TypeError(f"minimize must be True or False, got {minimize!r}")
        self._net, self._evaluate, self._evaluate_many = net, evaluate, evaluate_many
        self._minimize, self._max_failures, self.max_parameters = minimize, max_failures, max_parameters
        self.spaces = dict(net.spaces)
        self.shapes = {path: LayerShape(*net.shapes[path]) for path in self.spaces}
        if not self.spaces:
            raise ValueError("the supernet has no layer to search")
        self._evolution = Evolution(self.spaces, self.shapes, self._recipe, seed, max_parameters)
        self._start = hand_picked(start, self.spaces, self.shapes, max_parameters)
        if len(self._start) > self._recipe.population:
            raise ValueError(f"start has {len(self._start)} candidates, more than population={self._recipe.population}")
        self._generation = -1
        self._drawn: set[Key] = set()
        self._open: dict[Key, int] = {}  # those of the generation without a score, and which child each is
        self._asked: set[Key] = set()
        self._finished: dict[Key, Finished] = {}
        self._error: Exception | None = None
        self._ledger: Ledger | None = None
        self._resume(path, self._header(seed))

    def run(self, progress: bool = True) -> None:
        """Evaluate candidates until the last generation is scored, those that `ask` has given out among them.

        Args:
            progress: show a bar a generation, and its best score, on stderr.

        Raises:
            RuntimeError: `max_failures` candidates in a row have failed. All are in the ledger; running again goes on
                behind them.
            ValueError: there is neither `evaluate` nor `evaluate_many`.

        Warns:
            UserWarning: scores are NaN, or candidates have failed.
        """
        if self._evaluate is None and self._evaluate_many is None:
            raise ValueError("run needs evaluate or evaluate_many; without them, use ask and tell")
        rank, world = rank_and_world()
        show = progress and rank == 0
        while self._advance():
            waiting = list(self._open)
            size = world if self._evaluate_many is None else len(waiting)
            batches = [waiting[i : i + size] for i in range(0, len(waiting), size)]
            label = f"generation {self._generation} of {self._recipe.generations}"
            for batch in shown(batches, label, show):
                for key, outcome in zip(batch, self._outcomes(batch), strict=True):
                    self._record(key, outcome)
                    self._stop_after_failures()
            if show:
                note(f"{label}: {summary(self._finished.values(), self._best())}")
        if bad := [done for done in self._finished.values() if not done.is_ranked]:
            warnings.warn(
                f"{summary(self._finished.values(), self._best())}. NaN ranks last; failures, the last one first: "
                f"{'; '.join(dict.fromkeys(done.failure for done in reversed(bad) if done.failure)) or 'none'}",
                UserWarning,
                stacklevel=2,
            )

    def ask(self, n: int) -> list[Candidate]:
        """Up to n candidates that want a score; pass them to `tell`, in any order.

        A generation is drawn once all of the one before are told. So there are fewer than n at its end, and none while
        all that are left were given out (`waiting`) or the search is over (`done`).
        """
        _check_integer("n", n, 1)
        self._advance()
        new = [key for key in self._open if key not in self._asked][:n]
        self._asked.update(new)
        return [self._candidate(key) for key in new]

    def tell(self, candidates: Sequence[Candidate], scores: Sequence[Any]) -> None:
        """Take the scores of candidates that `ask` gave; an exception in the place of a score says that it failed.

        Raises:
            ValueError: a candidate that was never asked for or is told twice, or as many scores as there are not
                candidates. Nothing is recorded.
            TypeError: a score that is no number. Nothing is recorded.
        """
        candidates, outcomes = list(candidates), [outcome_of(score) for score in scores]
        if len(candidates) != len(outcomes):
            raise ValueError(
                f"tell takes a score a candidate, got {len(candidates)} candidates, {len(outcomes)} scores"
            )
        keys = [self._key_asked(candidate) for candidate in candidates]
        if len(set(keys)) < len(keys):
            raise ValueError("tell got a candidate twice")
        for key, outcome in zip(keys, outcomes, strict=True):
            self._record(key, outcome)

    @property
    def done(self) -> bool:
        """Whether the last generation is scored."""
        return not self._advance()

    @property
    def waiting(self) -> list[Candidate]:
        """The candidates that `ask` gave and that are not told yet."""
        return [self._candidate(key) for key in self._open if key in self._asked]

    @property
    def finished(self) -> list[Finished]:
        """Everything evaluated, in the order of the ledger."""
        return list(self._finished.values())

    @property
    def best(self) -> Candidate:
        """The candidate with the best score; of equal ones the smallest.

        Raises:
            ValueError: no candidate has a score yet.
        """
        if (best := self._best()) is None:
            raise ValueError("no candidate has a score yet")
        return best.candidate

    def pareto(self) -> list[Finished]:
        """The candidates that no other beats in score or parameters without losing in the other, by parameters."""
        ranked = self._ranked()
        return [ranked[i] for i in front([self._point(done) for done in ranked])]

    def table(self) -> str:
        """The Pareto front and the hand-picked candidates, a line each, by parameters."""
        return table_of(self.pareto(), self.finished)

    def __repr__(self) -> str:
        about = summary(self._finished.values(), self._best())
        return f"Search(generation {max(self._generation, 0)} of {self._recipe.generations}, {about})\n{self.table()}"

    def plot(self, path: str | os.PathLike[str], top: int = 10) -> None:
        """Draw score against parameters, with the front, the limit and the names of `start`, and what the best kept.

        The second panel shows which share of the `top` best candidates adapts a layer by a support, and the form that
        it has in the best one.

        Raises:
            ImportError: matplotlib is not installed (`pip install 'glora_kernels[search]'`).
            ValueError: no candidate has a score yet.
        """
        _check_integer("top", top, 1)
        ranked = self._ranked()
        best = [ranked[i] for i in ranking([self._point(done) for done in ranked])[:top]]
        if not best:
            raise ValueError("there is nothing to draw: no candidate has a score yet")
        draw(path, ranked, self.pareto(), best, self.max_parameters, self._minimize)

    def to_optuna(self, storage: str | optuna.storages.BaseStorage, name: str = "glora_kernels") -> optuna.Study:
        """Copy what is finished into a new study of Optuna, for its dashboard and plots; returns the study.

        A trial has a categorical parameter a gene ("blocks.0.proj.A", "blocks.0.proj.rank"), two values, score and
        number of parameters, and where it comes from in its user attributes. NaN scores are failed trials there.

        Raises:
            ImportError: optuna is not installed (`pip install 'glora_kernels[search]'`).
        """
        genes = {path: space.genes(self.shapes[path]) for path, space in self.spaces.items()}
        return to_study(self.finished, genes, self._minimize, storage, name)

    def _header(self, seed: int) -> dict[str, Any]:
        """What decides the ledger. Neither when a run stops nor the number of generations changes a line of it."""
        recipe = asdict(self._recipe)
        del recipe["generations"]
        return {
            "seed": seed,
            "direction": "minimize" if self._minimize else "maximize",
            "max_parameters": self.max_parameters,
            "recipe": recipe,
            "fingerprint": self._net.fingerprint(),
            "layers": {
                path: {"shape": list(self.shapes[path]), "space": space.to_dict()}
                for path, space in self.spaces.items()
            },
            "start": [genes_by_path(self._candidate(key)) for key in self._start.values()],
        }

    def _resume(self, path: str | os.PathLike[str] | None, header: dict[str, Any]) -> None:
        """Open the ledger on rank 0 and replay it on all."""
        for rank, other in enumerate(gathered(header)):
            if other != header:
                raise ValueError(f"rank {rank} has another search: {difference(other, header)}")

        def opened() -> list[dict[str, Any]]:
            if path is None:
                return []
            self._ledger = Ledger(path, header)
            return self._ledger.records

        for position, record in enumerate(from_first(opened), start=1):
            self._replay(record, path or "", position)

    def _replay(self, record: dict[str, Any], path: str | os.PathLike[str], position: int) -> None:
        if not self._advance():
            raise bad_line(path, position, f"is beyond the last of generations={self._recipe.generations}")
        key = next((key for key, child in self._open.items() if child == record.get("child")), None)
        if key is None:
            raise bad_line(path, position, f"has no child that generation {self._generation} waits for")
        try:
            outcome = Failure(record["failed"]) if "failed" in record else float(record["score"])
        except (KeyError, TypeError, ValueError) as error:
            raise bad_line(path, position, f"has no score: {error!r}") from error
        done = self._done(key, outcome)
        if record != (ours := record_of(done)):
            raise bad_line(path, position, f"is not what this search draws: {difference(record, ours)}")
        self._close(key, done)

    def _advance(self) -> bool:
        """Draw the next generation where this one is told; whether there is a candidate without a score."""
        while not self._open and self._generation < self._recipe.generations:
            generation = self._generation + 1
            ranked = self._ranked()
            chosen = choose_parents(
                [self._point(done) for done in ranked], self._recipe.parents, self._recipe.front_parents
            )
            parents = [tuple(ranked[i].candidate.values()) for i in chosen]
            picked = list(self._start.values()) if generation == 0 else []
            known, children = set(self._drawn), {}
            for i in range(self._recipe.population):
                key = picked[i] if i < len(picked) else self._evolution.child(generation, i, parents, known)
                if key is not None:
                    known.add(key)
                    children[key] = i

            def drawn(known: set[Key] = known, children: dict[Key, int] = children, now: int = generation) -> None:
                self._drawn, self._open, self._generation = known, children, now

            finish(drawn)
        return bool(self._open)

    def _outcomes(self, batch: list[Key]) -> list[Outcome]:
        """The scores of a batch, of which each rank evaluates its share."""
        rank, world = rank_and_world()
        mine = [self._candidate(key) for key in batch[rank::world]]
        own: list[Outcome] = []
        error: Exception | None = None
        try:
            own = self._many(mine) if self._evaluate is None else [self._one(candidate) for candidate in mine]
        except Exception as raised:  # the other ranks wait for this one
            error = raised
        every = gathered((own, error and repr(error)))
        if error is not None:
            raise error
        if failed := [f"{other} on rank {i}" for i, (_, other) in enumerate(every) if other]:
            raise RuntimeError(f"evaluate_many raised {failed[0]}")
        return [every[i % world][0][i // world] for i in range(len(batch))]

    def _one(self, candidate: Candidate) -> Outcome:
        assert self._evaluate is not None
        try:
            with self._net.use(candidate) as model:
                return outcome_of(self._evaluate(model))
        except Exception as error:
            self._error = error
            return outcome_of(error)

    def _many(self, candidates: list[Candidate]) -> list[Outcome]:
        assert self._evaluate_many is not None
        if not candidates:
            return []
        outcomes = [outcome_of(score) for score in self._evaluate_many(candidates)]
        if len(outcomes) != len(candidates):
            raise ValueError(f"evaluate_many gave {len(outcomes)} scores for {len(candidates)} candidates")
        return outcomes

    def _stop_after_failures(self) -> None:
        row = list(itertools.takewhile(lambda done: done.failure, reversed(self._finished.values())))
        if len(row) >= self._max_failures:
            raise RuntimeError(
                f"the last {len(row)} candidates failed (max_failures={self._max_failures}), the last one with "
                f"{row[0].failure}"
            ) from self._error

    def _record(self, key: Key, outcome: Outcome) -> None:
        done, position = self._done(key, outcome), 1 + len(self._finished)

        def act() -> None:
            if self._ledger is not None:
                self._ledger.append(position, record_of(done))
            self._close(key, done)

        finish(act)

    def _close(self, key: Key, done: Finished) -> None:
        self._finished[key] = done
        self._open.pop(key, None)
        self._asked.discard(key)

    def _done(self, key: Key, outcome: Outcome) -> Finished:
        child = self._open[key]
        names = [name for name, picked in self._start.items() if picked == key]
        score, failure = (None, outcome.reason) if isinstance(outcome, Failure) else (outcome, None)
        size = self._evolution.size(key)
        return Finished(
            self._candidate(key), size, score, failure, self._generation, child, names[0] if names else None
        )

    def _candidate(self, key: Key) -> Candidate:
        return dict(zip(self.spaces, key, strict=True))

    def _key_asked(self, candidate: Candidate) -> Key:
        if not isinstance(candidate, Mapping):
            raise TypeError(f"tell takes candidates, which are mappings, got {type(candidate).__name__}")
        key = tuple(candidate[path] for path in self.spaces) if candidate.keys() == self.spaces.keys() else ()
        if key in self._finished:
            raise ValueError(f"tell got a candidate that was told before: {self._finished[key]}")
        if key not in self._asked:
            raise ValueError(f"tell got a candidate that was never asked for: {dict(candidate)!r}")
        return key

    def _ranked(self) -> list[Finished]:
        """What has a score that is a number, in the order in which it was drawn."""
        return sorted(
            (done for done in self._finished.values() if done.is_ranked), key=lambda done: (done.generation, done.child)
        )

    def _best(self) -> Finished | None:
        ranked = self._ranked()
        return ranked[ranking([self._point(done) for done in ranked])[0]] if ranked else None

    def _point(self, done: Finished) -> Point:
        score = math.nan if done.score is None else done.score
        return (-score if self._minimize else score), done.parameters


def _check_integer(name: str, value: object, least: int | None) -> None:
    if type(value) is not int or (least is not None and value < least):
        raise ValueError(f"{name} must be an integer{'' if least is None else f' >= {least}'}, got {value!r}")
