"""What became of a candidate, in memory, in the ledger and in tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from glora_kernels.search.space import Candidate, genes_of


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no score."""

    reason: str


Outcome = float | Failure


@dataclass(frozen=True)
class Finished:
    """An evaluated candidate.

    Attributes:
        candidate: the configuration of every searched layer, by path.
        parameters: of its adapters.
        score: as `evaluate` gave it, perhaps NaN; None where it failed.
        failure: the exception where it failed: its type, and the first line of its text.
        generation: in which it was drawn.
        child: which of that generation it is.
        name: of a hand-picked candidate.
    """

    candidate: Candidate
    parameters: int
    score: float | None
    failure: str | None
    generation: int
    child: int
    name: str | None

    @property
    def is_ranked(self) -> bool:
        """Whether its score is a number that can be compared."""
        return self.score is not None and not math.isnan(self.score)


def outcome_of(score: Any) -> Outcome:
    """A score as a float; a failure where it is an exception.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(score, Exception):
        first = re.sub("0x[0-9a-f]+", "0x...", str(score).strip().partition("\n")[0])  # addresses differ between runs
        return Failure(f"{type(score).__name__}: {first[:300]}" if first else type(score).__name__)
    try:
        if isinstance(score, (str, bytes)):
            raise TypeError("text")
        return float(score)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"a score must be a number, got {score!r:.200}") from error


def genes_by_path(candidate: Candidate) -> dict[str, list[Any]]:
    """A candidate as plain JSON values: the genes of each layer in the order of `GENES`."""
    return {path: list(genes_of(config).values()) for path, config in candidate.items()}


def record_of(done: Finished) -> dict[str, Any]:
    """The line of the ledger; a score that JSON has no number for is text."""
    record = {
        "generation": done.generation,
        "child": done.child,
        "parameters": done.parameters,
        "candidate": genes_by_path(done.candidate),
    }
    if done.score is None:
        return record | {"failed": done.failure}
    return record | {"score": done.score if math.isfinite(done.score) else repr(done.score)}


def summary(finished: Iterable[Finished], best: Finished | None) -> str:
    """How many were evaluated, how many of them have no score to compare, and the best."""
    every = list(finished)
    failed = sum(done.score is None for done in every)
    nan = sum(not done.is_ranked for done in every) - failed
    counts = f"{len(every)} evaluated, {failed} failed, {nan} NaN"
    return counts + ("" if best is None else f"; best {best.score:.6g} with {best.parameters:,} parameters")


def table_of(front: Sequence[Finished], finished: Sequence[Finished]) -> str:
    """The front and the named candidates, a line each, by parameters."""
    shown = {id(done): done for done in (*front, *(done for done in finished if done.name))}
    rows = [("parameters", "score", "layers", "generation", "front", "name")]
    on_front = {id(done) for done in front}
    for done in sorted(shown.values(), key=lambda done: (done.parameters, done.generation, done.child)):
        score = "failed" if done.score is None else f"{done.score:.6g}"
        adapted = sum(not config.is_empty for config in done.candidate.values())
        rows.append((
            f"{done.parameters:,}", score, f"{adapted} of {len(done.candidate)}", str(done.generation),
            "yes" if id(done) in on_front else "no", done.name or "",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) for row in rows]
    return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))
