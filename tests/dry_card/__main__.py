"""Runs a script, or a function for `dry_run`, with the dry card installed: see the package's docstring."""

import importlib
import json
import runpy
import sys
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS.parent)]

from dry_card import card  # noqa: E402


def main(target: str, *rest: str) -> None:
    module, colon, function = target.partition(":")
    if colon:
        result = getattr(importlib.import_module(module), function)(*json.loads(rest[0]))
        Path(rest[1]).write_text(json.dumps(result))
    else:
        runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    del sys.argv[0]
    code: int | str | None = 0
    try:
        main(*sys.argv)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    card.leave(code if isinstance(code, int) else int(code is not None))
