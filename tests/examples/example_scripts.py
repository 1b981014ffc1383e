"""What the tests of the example scripts share: a run in a process of its own, and a script asked as a module."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import forked
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NO_CARD = pytest.param(
    "--device", "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
)
"""A bad argument where there is no card."""


class Finished(NamedTuple):
    process: subprocess.CompletedProcess[str]
    out: Path
    results: dict


def needs(*packages: str) -> None:
    """Skip the module that asks, unless the packages are there."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed", allow_module_level=True)


def start(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(script, *arguments, seconds=300)


def finished(script: Path, out: Path, *arguments: str) -> Finished:
    """A run on the CPU that ends well, and what it wrote."""
    process = start(script, *arguments, "--device", "cpu", "--out", str(out))
    assert process.returncode == 0, process.stderr
    return Finished(process, out, json.loads((out / "results.json").read_text()))


def imported(script: Path) -> Iterator[ModuleType]:
    """The script as a module, to look at its parts and its answers without a process each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(script.parent))
        yield importlib.import_module(script.stem)


def exit_code(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """With which code the script stops."""
    monkeypatch.setattr(sys, "argv", [str(script.__file__), *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    return stopped.value.code
