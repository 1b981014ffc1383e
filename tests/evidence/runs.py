"""Runs the calls of every form on an instrument, and keeps what was right."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from evidence.cases import FORMS, Problem
from evidence.instruments import DTYPES, INSTRUMENTS, Instrument, described
from evidence.problems import on
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.planning import is_planning
from glora_kernels.runtime.program import launching


def run(name: str, prefixes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What is kept of a run, and the calls that failed."""
    instrument, failed = INSTRUMENTS[name], []
    proved: dict[str, dict[str, list[str]]] = {}
    with launching(cached=False):  # so that Triton's JIT makes each launch
        for form, dtype in itertools.product(FORMS, DTYPES):
            if prefixes and not form.startswith(tuple(prefixes)):
                continue
            begin, called, kernels = time.monotonic(), 0, set()
            label = str(dtype).removeprefix("torch.")
            try:
                for problem in FORMS[form](dtype):
                    called += 1
                    kernels |= tried(problem, instrument)
            except Exception:
                traceback.print_exc()
                failed.append(f"{form}, {label}, call {called}")
            else:
                if called:
                    proved.setdefault(form, {})[label] = sorted(kernels)
            spent = time.monotonic() - begin
            print(f"{form}, {label}: {called} calls, {len(kernels)} kernels, {spent:.1f} s", flush=True)
    return {"date": datetime.date.today().isoformat(), "with": described(name), "forms": proved}, failed


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
