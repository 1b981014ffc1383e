"""What search_digits.py and search_text.py share: a supernet in a training loop, the steps of a search, and tables."""

from __future__ import annotations

import json
import platform
import statistics
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arguments import add_where, need, plus_minus, settle_where
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels.search import Candidate
from glora_kernels.search.results import Finished

CPUINFO = Path("/proc/cpuinfo")


class Sampled(nn.Module):
    """A supernet that draws configurations at each call, so that a training loop takes it as it takes any model.

    Args:
        net: the supernet.
        drawing: the arguments of `Supernet.sample` that say what is drawn.
    """

    def __init__(self, net: gk.Supernet, **drawing: Any) -> None:
        super().__init__()
        self.net, self.drawing = net, drawing

    def forward(self, *args: Tensor, **named: Tensor) -> Any:
        with self.net.sample(rows=len((*args, *named.values())[0]), **self.drawing):
            return self.net(*args, **named)


@dataclass(frozen=True)
class Budget:
    """How long everything is trained.

    Attributes:
        steps: of a configuration chosen by hand.
        supernet_steps: before the search.
        top: how many candidates are trained on after the search; the one with the best validation score is kept.
        retraining_steps: of each of them.
        population, generations: of the search.
    """

    steps: int
    supernet_steps: int
    top: int
    retraining_steps: int
    population: int
    generations: int

    @property
    def searched_steps(self) -> int:
        """Of a search in all."""
        return self.supernet_steps + self.top * self.retraining_steps


@dataclass(frozen=True)
class Found:
    """What a search gave: the model that is kept, its candidate, and the search with the seconds that it took."""

    model: nn.Module
    best: Finished
    search: gk.Search
    search_seconds: float

    def summary(self) -> dict[str, Any]:
        random = [done for done in self.search.finished if done.generation == 0 and done.name is None]
        return {
            "parameters": self.best.parameters,
            "generation": self.best.generation,
            "evaluations": len(self.search.finished),
            "search_seconds": self.search_seconds,
            "candidate": forms_of(self.best.candidate),
            "hand_picked": {done.name: done.score for done in self.search.finished if done.name},
            "inherited_best": self.search.pareto()[-1].score,
            "random_mean": statistics.mean(done.score for done in random if done.score is not None),
        }


def forms_of(candidate: Candidate) -> dict[str, str]:
    """A candidate as text: of each layer that is adapted the forms of A to E, and the rank."""
    adapted = {path: config for path, config in candidate.items() if not config.is_empty}
    return {path: f"{c.A},{c.B},{c.C},{c.D},{c.E} rank {c.rank}" for path, c in adapted.items()}


def search_and_finish(
    net: gk.Supernet,
    score: Callable[[nn.Module], float],
    train_on: Callable[[nn.Module], object],
    budget: Budget,
    seed: int,
    limit: int,
    start: Mapping[str, Candidate],
    path: Path,
) -> Found:
    """Search a trained supernet, train its best candidates on from their inherited values, and keep the best of them.

    Args:
        net: trained for `budget.supernet_steps`.
        score: of a model, on a validation split; lower is better.
        train_on: trains a model for `budget.retraining_steps`.
        budget: the sizes.
        seed: of the search.
        limit: the most parameters of a candidate's adapters.
        start: hand-picked candidates by name.
        path: of the ledger; one that is there is begun anew, for its supernet was another one.
    """
    path.unlink(missing_ok=True)
    started = time.perf_counter()
    search = gk.Search(
        net,
        score,
        limit,
        seed,
        path,
        start,
        minimize=True,
        population=budget.population,
        generations=budget.generations,
    )
    search.run()
    seconds = time.perf_counter() - started
    ranked = sorted(
        (done for done in search.finished if done.is_ranked), key=lambda done: (done.score, done.parameters)
    )
    trained = []
    for done in ranked[: budget.top]:
        model = net.extract(done.candidate)
        train_on(model)
        trained.append((score(model), model, done))
    _, model, best = min(trained, key=lambda entry: entry[0])
    return Found(model, best, search, seconds)


def add_arguments(parser: ArgumentParser, out: str, seeds: int) -> None:
    """The arguments of both scripts, with one script's defaults."""
    add = parser.add_argument
    add("--seeds", type=int, default=seeds, help="runs of each method, with other data, batches and fresh adapters")
    add_where(parser, out, "tables, pictures, results and ledgers")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed and short trainings, in about a minute")
    size.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it works")
    parser.formatter_class = ArgumentDefaultsHelpFormatter


def parse_arguments(parser: ArgumentParser) -> Namespace:
    """The arguments of the command line; a bad one ends the process with code 2."""
    args = parser.parse_args()
    need(parser, args.seeds >= 1, "--seeds", f"must be at least 1, got {args.seeds}")
    settle_where(parser, args)
    if args.quick or args.smoke:
        args.seeds = 1
    args.size = "smoke" if args.smoke else "quick" if args.quick else "full"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # products this small gain nothing from more, and wait for them on a busy machine
    return args


def machine(device: str) -> dict[str, Any]:
    """What a result was measured on."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else (names or [platform.machine()])[0],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "glora_kernels": gk.__version__,
    }


def differences(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """ours − theirs, run by run: the mean, its standard error, and in how many runs ours is higher."""
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
    return {"mean": statistics.mean(each), "standard_error": error, "higher": sum(d > 0 for d in each), "each": each}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, padded so that it can be read as it is."""
    every = [head, *rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in every
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """The mean ± the standard deviation, of one value the value alone."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return plus_minus(statistics.mean(values), deviation, len(values), form)


def write(out: Path, about: str, args: Namespace, sizes: Any, sections: dict[str, Any], tables: Sequence[str]) -> None:
    """Write the tables to tables.md, and everything to results.json."""
    where = machine(args.device)
    line = ", ".join(f"{name} {value}" for name, value in where.items() if name != "device")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    text = "\n\n".join([about, f"{where['device']}; {line}; sizes: {sizes}", *tables])
    content = {"settings": settings, "sizes": asdict(sizes), "machine": where, **sections}
    (out / "tables.md").write_text(text + "\n")
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")


def show(out: Path) -> None:
    """Print the tables, and which files there are."""
    print(f"\n{(out / 'tables.md').read_text()}")
    for path in sorted(out.iterdir()):
        print(f"wrote {path}")
