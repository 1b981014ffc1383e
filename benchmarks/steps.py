"""Runs a list of steps on a machine that is there for minutes only: each with a limit, and all of it logged as it goes.

A step is a command in a process group of its own, whose output goes into one log as it comes. A step that reaches its
limit is stopped with everything that it started, and the next one begins; what no longer fits into the time that there
is, is named. After each step the new entries of Triton's cache are counted: what was compiled here, although it might
have been compiled before.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

TAIL = 12
"""Lines of a step's output that are shown on the terminal."""
LEAST_S = 12.0
"""With less than this left no step is begun: torch alone takes that long to import."""
ENDS_S = 8.0
"""What a process has to end by itself before it is killed."""
COMPILED = re.compile(r"(\w+)\.(?:.*\.)?(cubin|hsaco|so)$")
"""A file in an entry of Triton's cache, with the name of its kernel or module."""


@dataclass(frozen=True)
class Step:
    """A command: Python's arguments, behind `program` in the place of Python where that is given.

    seconds: the limit. shows: lines of the output's end for the terminal. fills: what is new in the cache it put there.
    """

    name: str
    seconds: float
    command: Sequence[str]
    program: Sequence[str] | None = None
    shows: int = TAIL
    fills: bool = False


@dataclass(frozen=True)
class Ended:
    """What became of a step. code: None where it was stopped at its limit. compiled: names of kernels and modules."""

    name: str
    code: int | None
    seconds: float
    compiled: Sequence[str] = ()

    @property
    def how(self) -> str:
        return "stopped at its limit" if self.code is None else f"exit code {self.code}"


@dataclass(frozen=True)
class _Beside:
    step: Step
    process: subprocess.Popen[bytes]
    path: Path
    begun: float


@dataclass
class Run:
    """Runs steps, with `out` for the log and `minutes` for all of them.

    python: what a step's Python is started with. cache: Triton's, whose new entries are counted. variables: of the
    environment.
    """

    out: Path
    minutes: float
    cache: Path
    python: Sequence[str] = (sys.executable,)
    variables: Mapping[str, str] = field(default_factory=dict)
    log: str = "log.txt"
    say: Callable[[str], None] = lambda text: print(text, flush=True)

    def __post_init__(self) -> None:
        self.begun = time.monotonic()
        self.ended: list[Ended] = []
        self.left_out: list[str] = []
        self._aside: _Beside | None = None
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / self.log

    def spent_s(self) -> float:
        return time.monotonic() - self.begun

    def left_s(self) -> float:
        return 60 * self.minutes - self.spent_s()

    def run(self, listed: Sequence[Step]) -> None:
        """Every step that still fits, in order."""
        for step in listed:
            if self.left_s() < LEAST_S:
                self.left_out.append(step.name)
            else:
                self.step(step, self.left_s())

    def step(self, step: Step, left: float = float("inf")) -> Ended:
        """Run a step to its end or to its limit, and no longer than the time that is left."""
        limit, known, begin = min(step.seconds, left), entries(self.cache), time.monotonic()
        self._note(f"==== {step.name} (at {self.spent_s():.0f} s, at most {limit:.0f} s)")
        with self.path.open("ab") as log:
            start = log.tell()
            process = self._started(step, log.fileno())
            try:
                code = waited(process, limit)
            finally:  # also where this process is told to end
                stopped(process)
        new = set() if step.fills else entries(self.cache) - known
        compiled = [name_of(self.cache / entry) for entry in sorted(new)]
        ended = Ended(step.name, code, time.monotonic() - begin, compiled)
        self.ended.append(ended)
        output = self.path.read_bytes()[start:].decode(errors="replace").rstrip()
        self.say("\n".join(output.splitlines()[-step.shows :]))
        self._note(f"---- {step.name}: {ended.how} after {ended.seconds:.0f} s; {misses(compiled)}")
        return ended

    def beside(self, step: Step) -> None:
        """Begin a step that runs beside the next ones; `join` ends it."""
        path = self.out / f"{step.name}.log"
        with path.open("wb") as log:
            self._aside = _Beside(step, self._started(step, log.fileno()), path, time.monotonic())

    def join(self, seconds: float | None = None) -> None:
        """Wait for the step beside the others, as long as is left of its limit; its output goes into the log."""
        if (one := self._aside) is None:
            return
        self._aside = None
        left = min(one.step.seconds - (time.monotonic() - one.begun), self.left_s())
        code = waited(one.process, left if seconds is None else seconds)
        stopped(one.process)
        ended = Ended(one.step.name, code, time.monotonic() - one.begun)
        self.ended.append(ended)
        output = one.path.read_text(errors="replace").rstrip()
        one.path.unlink()
        self._note(f"==== {ended.name}, beside the others\n{output[-4000:]}\n---- {ended.name}: {ended.how}")

    def _started(self, step: Step, output: int) -> subprocess.Popen[bytes]:
        command = [*(self.python if step.program is None else step.program), *step.command]
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", **self.variables}
        return subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=os.setpgrp
        )

    def _note(self, text: str) -> None:
        self.say(text)
        with self.path.open("a") as log:
            log.write(text + "\n")

    def summary(self) -> None:
        """What became of every step, and all that was compiled."""
        self._note("")
        width = max((len(one.name) for one in self.ended), default=0)
        for one in self.ended:
            self._note(f"{one.name:<{width}}  {one.how:<20}  {one.seconds:4.0f} s  compiled: {len(one.compiled)}")
        if self.left_out:
            self._note(f"not begun, the time was up: {', '.join(self.left_out)}")
        self._note(f"in all, {self.spent_s():.0f} s: {misses([name for one in self.ended for name in one.compiled])}")


def end_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does: what runs is stopped, and what is known is written."""

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; None where the process runs on after that time."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(0.0, seconds))
    return None


def stopped(process: subprocess.Popen[bytes]) -> None:
    """End what there is of a process group: it is interrupted, so that pytest still says what failed, then killed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        waited(process, ENDS_S)


def entries(cache: Path) -> set[str]:
    """The entries of Triton's cache, one a kernel or module."""
    return set(os.listdir(cache)) if cache.is_dir() else set()


def name_of(entry: Path) -> str:
    """What was compiled into an entry; of one that was cut short, its own name."""
    found = (COMPILED.match(name) for name in (sorted(os.listdir(entry)) if entry.is_dir() else ()))
    return next((match[1] for match in found if match), entry.name)


def misses(compiled: Sequence[str], most: int = 20) -> str:
    """What was compiled, by name, or that nothing was."""
    if not compiled:
        return "nothing was compiled"
    rest = f" and {len(compiled) - most} more" if len(compiled) > most else ""
    return f"compiled: {len(compiled)} ({', '.join(compiled[:most])}{rest})"
