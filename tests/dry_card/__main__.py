"""Runs a script, or functions for `dry_run`, with the dry card installed: see the package's docstring."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS.parent)]

from dry_card import SECONDS, card  # noqa: E402


def end(code: Any) -> NoReturn:
    card.leave(code if isinstance(code, int) else int(code is not None))


def answer(target: str, arguments: list[Any], environment: dict[str, str], log: str, kept: str) -> NoReturn:
    """What a process of `serve` does; it is stopped where it takes too long."""
    signal.alarm(SECONDS)
    with open(os.devnull) as nothing, open(log, "wb") as file:
        for stream, number in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(stream.fileno(), number)
    os.environ.update(environment)
    code = 1
    try:
        module, _, function = target.partition(":")
        result = getattr(importlib.import_module(module), function)(*arguments)
        Path(kept).write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    end(code)


def serve() -> None:
    """Of each line of input, the exit code of a process that is forked for it."""
    for line in sys.stdin:
        if not (pid := os.fork()):
            answer(**json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    del sys.argv[0]
    code: int | str | None = 0
    try:
        if sys.argv:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            serve()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    end(code)
