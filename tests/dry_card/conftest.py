"""Functions of tests are run on the dry card, each once a session, whichever workers ask."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dry_card import build, dry_run


@pytest.fixture(scope="session")
def on_card(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`dry_run`, remembered by function, arguments and environment."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("the dry card stands in a CPU build of PyTorch")
    if lacking := build.missing():
        pytest.skip(f"the dry card needs {lacking}")
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent  # of all workers

    def answer(function: Callable, *arguments: Any, **environment: str) -> Any:
        asked = "-".join([function.__module__, function.__qualname__, *map(str, [*arguments, *environment.values()])])
        kept = folder / ("".join(c if c.isalnum() else "-" for c in asked) + ".json")
        with open(kept.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                kept.write_text(json.dumps(dry_run(function, *arguments, **environment)))
        return json.loads(kept.read_text())

    return answer
