"""Changes that an error or a signal may interrupt at any place.

Python raises KeyboardInterrupt between any two instructions. So what undoes a change is there before the change is
made, and what brings one to its end may be done twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def all_or_none() -> Iterator[contextlib.ExitStack]:
    """Inside, `undo.callback` is given what undoes a change, before the change; an exception runs all, the last first.

    A callback may run where its change was not made yet.
    """
    with contextlib.ExitStack() as undo:
        yield undo
        undo.pop_all()


def finish(act: Callable[[], object]) -> None:
    """Do what may be done twice, to its end: where it is interrupted, it is done again before the exception goes on."""
    try:
        act()
    except BaseException:
        act()
        raise
