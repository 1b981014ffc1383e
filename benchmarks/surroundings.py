"""What figures were taken on: commit, source, versions."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import Device

ROOT = Path(__file__).parents[1]
WRITTEN = ("benchmarks/results", "README.md")
"""What a run rewrites in the checkout."""


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout, marked "-dirty" where tracked files differ from it.

    What a battery itself rewrites, its results and README.md, does not count. Outside a checkout (a copy on another
    machine) what GLORA_COMMIT says, or None.
    """
    try:
        name = _git("describe", "--always", "--abbrev=12")
        differs = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in WRITTEN))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GLORA_COMMIT") or None
    return f"{name}-dirty" if differs else name


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def source_digest() -> str:
    """A digest of the package and of what measures it: rows of one battery come from one source."""
    digest = hashlib.sha256()
    for folder in ("glora_kernels", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".json") and "results" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def header(device: Device, scale: str) -> dict[str, Any]:
    """What a battery is measured with, as its first line has it."""
    return {
        "device": device.name(),
        "driver": device.driver(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("peft", "bitsandbytes", "unsloth", "lorafusion")},
        "commit": commit(),
        "source": source_digest(),
        "date": now(),
        "scale": scale,
        "details": device.details(),
    }
