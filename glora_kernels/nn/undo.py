"""Changes that an error or a signal may interrupt at any place.

Python may raise KeyboardInterrupt between any two instructions. So the callback that undoes a change is registered
before the change is made, and functions that complete a change may run twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def all_or_none() -> Iterator[contextlib.ExitStack]:
    """Inside, register what undoes a change with `undo.callback`, before the change; an exception runs all, last first.

    So a callback may run although its change was not made yet.
    """
    with contextlib.ExitStack() as undo:
        yield undo
        undo.pop_all()


def finish(act: Callable[[], object]) -> None:
    """Call `act`; if it is interrupted, call it again before the exception is raised. It must be safe to run twice."""
    try:
        act()
    except BaseException:
        act()
        raise
