"""Progress of a long loop, on stderr: a bar where tqdm is installed, else plain lines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(items: Sequence[T], label: str, show: bool = True) -> Iterator[T]:
    """Yield the items and show progress on stderr; nothing is shown without `show`."""
    if not show or not items:
        yield from items
    elif importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        yield from tqdm(items, desc=label, leave=False)
    else:
        for i, item in enumerate(items, start=1):
            print(f"{label}: {i}/{len(items)}", file=sys.stderr, flush=True)
            yield item


def note(line: str) -> None:
    """Print a line to stderr without breaking a running bar."""
    if importlib.util.find_spec("tqdm") is not None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
