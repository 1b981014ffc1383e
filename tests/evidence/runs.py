"""Runs the calls of every form on an instrument, and keeps what was right."""

from __future__ import annotations

import contextlib
import datetime
import time
import traceback
from collections.abc import Iterator, Sequence

import torch

from evidence.cases import FORMS, Problem
from evidence.instruments import DTYPES, INSTRUMENTS, Instrument, described
from evidence.problems import on
from evidence.table import Kept
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.planning import is_planning
from glora_kernels.runtime.program import launching


def run(name: str, prefixes: Sequence[str] = ()) -> Iterator[tuple[str, Kept | None]]:
    """By form what is kept of it, or None where a call was wrong; of the forms whose names begin so, or of all."""
    made = described(name)
    for form in FORMS:
        if form.startswith(tuple(prefixes)) if prefixes else True:
            with launching(cached=False):  # so that Triton's JIT makes each launch
                kernels = {str(dtype).removeprefix("torch."): proved(name, form, dtype) for dtype in DTYPES}
            found = {dtype: sorted(names) for dtype, names in kernels.items() if names is not None}
            today = datetime.date.today().isoformat()
            yield form, {"date": today, "with": made, "kernels": found} if len(found) == len(kernels) else None


def proved(name: str, form: str, dtype: torch.dtype) -> set[str] | None:
    """The kernels that the calls of a form launch; None where one of them was wrong."""
    begin, called, kernels = time.monotonic(), 0, set()
    try:
        for problem in FORMS[form](dtype):
            called += 1
            kernels |= tried(problem, INSTRUMENTS[name])
    except Exception:
        traceback.print_exc()
        print(f"{form}, {dtype}: call {called} is wrong", flush=True)
        return None
    print(f"{form}, {dtype}: {called} calls, {len(kernels)} kernels, {time.monotonic() - begin:.1f} s", flush=True)
    return kernels


def tried(problem: Problem, instrument: Instrument) -> set[str]:
    """The kernels that a call of an operator and its backward launch; an error where a result is wrong."""
    with instrument.around(), kernels_launched() as names:
        found = on(instrument.device, problem).ours(instrument.route)
    if instrument.compares:
        problem.check({name: value.cpu() for name, value in found.items()}, instrument.route)
    return names


@contextlib.contextmanager
def kernels_launched() -> Iterator[set[str]]:
    """The names of the kernels that are launched inside."""
    names, launch = set(), Launch.run

    def noted(self: Launch) -> None:
        launch(self)
        if not is_planning() and 0 not in self.grid:
            names.add(self.kernel.__name__)

    Launch.run = noted  # type: ignore[method-assign]
    try:
        yield names
    finally:
        Launch.run = launch  # type: ignore[method-assign]
