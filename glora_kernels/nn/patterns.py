"""Arguments that are patterns of module paths, and errors where one matches nothing; `spec.select` has the rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def patterns_of(argument: str, given: str | Iterable[str]) -> list[str]:
    """The argument, one pattern or several, as a list; a TypeError for anything else."""
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{argument} takes a pattern (str) or several, got {given!r}")
    patterns = [given] if isinstance(given, str) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} takes patterns (str), got {pattern!r}")
    return patterns


def unmatched(argument: str, pattern: str, what: str, kind: str, paths: Iterable[str]) -> ValueError:
    """The error for a pattern. what: "matches no linear layer", say. kind, paths: the modules to choose from."""
    return ValueError(f"{argument}: the pattern {pattern!r} {what}. {listed(kind, paths)}")


def listed(kind: str, paths: Iterable[str], most: int = 12) -> str:
    """A sentence for error messages that lists the last names of these paths as choices."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    if not names:
        return f"The model has no {kind} to choose from"
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return f"Available {kind} names: {', '.join(map(repr, names[:most]))}{more}"


def some_of(names: Sequence[str]) -> str:
    """The first four names, for a message."""
    return f"{names[:4]}{' ...' if len(names) > 4 else ''}"
