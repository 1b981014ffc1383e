"""A pytest plugin under which every PEFT model that a test builds is accelerated, and which counts where calls ran.

PEFT's own tests know nothing of `accelerate`. With this folder on PYTHONPATH, `pytest -p plugin` changes the one place
where PEFT puts layers into a model, so that they are accelerated as soon as they are there, and prints at the end how
many calls of accelerated layers ran on the operators and how many on PEFT's path, by reason. `scripts/test-peft` runs
PEFT's tests so and compares what passes.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner

import glora_kernels as gk
from glora_kernels.integrations.accelerated import layers

OURS = "glora_kernels"
CALLS: Counter[str] = Counter()
"""Calls of accelerated layers: OURS, or why PEFT's forward ran. Those that torch.compile traces are not counted."""
KEPT: Counter[str] = Counter()
"""Layers that stayed PEFT's, by kind and reason, as they stood after each injection."""


def accelerate_new_layers(model: torch.nn.Module) -> None:
    """Accelerate what can be accelerated in a model, which may be nothing; note the rest in `KEPT`."""
    if any(reason.startswith("accelerate() was not called") for _, reason in gk.acceleration(model).kept):
        gk.accelerate(model, verbose=False)
    for (kind, reason), n in gk.acceleration(model).kept.items():
        KEPT[f"{kind}: {reason}"] += n


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--calls", metavar="FILE", help="write the counts of accelerated calls to this file as JSON")


def pytest_configure(config: pytest.Config) -> None:
    inject, call = BaseTuner.inject_adapter, layers.Accelerated.call

    @functools.wraps(inject)
    def inject_and_accelerate(self: BaseTuner, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        accelerate_new_layers(model)
        return result

    @functools.wraps(call)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = call(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            CALLS[found if isinstance(found, str) else OURS] += 1
        return found

    patch = pytest.MonkeyPatch()
    patch.setattr(BaseTuner, "inject_adapter", inject_and_accelerate)
    patch.setattr(layers.Accelerated, "call", counted)
    config.add_cleanup(patch.undo)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["accelerated"] = {"calls": dict(CALLS), "kept": dict(KEPT)}
        return
    path = session.config.getoption("--calls")
    if path is not None:
        with open(path, "w") as file:
            json.dump({"calls": CALLS, "kept": KEPT}, file)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The counts of a worker of pytest-xdist, which may have died without any."""
    found = getattr(node, "workeroutput", {}).get("accelerated", {"calls": {}, "kept": {}})
    CALLS.update(found["calls"])
    KEPT.update(found["kept"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("calls of accelerated PEFT layers")
    for reason, n in sorted(CALLS.items(), key=lambda item: (item[0] != OURS, -item[1])):
        terminalreporter.write_line(f"{n:9}  {reason if reason == OURS else f'PEFT: {reason}'}")
