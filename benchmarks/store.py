"""Where what was measured waits until it is complete: JSON lines, one flushed line for whatever is finished.

A process that is killed loses what it was measuring and nothing else. The first line says what the rows were measured
with; a file of another device or source is put aside and the battery starts afresh. The commit does not count: `source`
is a digest of the code itself.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import Device
from benchmarks.schema import slug

ROOT = Path(__file__).parents[1]
WRITTEN = ("benchmarks/results", "README.md", "docs/benchmarks.md")
"""What a run rewrites in the checkout."""
STRIKES = 2
"""How often a group may be begun without an end (a crash, a kill) before it is left out."""


class Store:
    """The lines of one run. Kinds: header, begin, end, row, model, error, note.

    Args:
        path: the file; it is made on the first write.
        header: what the rows are measured with. A file that starts with other values of IDENTITY is put aside.
    """

    IDENTITY = ("device", "source", "torch", "triton", "scale")

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.message: str | None = None
        self.header = dict(header)
        self.lines = _read(path)
        if self.lines:
            old = self.lines[0]
            differs = [n for n in self.IDENTITY if old.get("kind") != "header" or old.get(n) != self.header.get(n)]
            if differs:
                aside = path.with_suffix(".old.jsonl")
                path.replace(aside)
                self.lines = []
                self.message = f"{path.name} has another {', '.join(differs)}; starting afresh, the old is {aside.name}"
            else:
                self.header = {name: value for name, value in old.items() if name != "kind"}
                if not path.read_bytes().endswith(b"\n"):  # killed in the middle of a line
                    with path.open("a") as file:
                        file.write("\n")
        if not self.lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self.add("header", **self.header)

    def add(self, kind: str, **values: Any) -> None:
        """Append one line and make sure it is on the disk."""
        line = {"kind": kind, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Every line of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def settled(self) -> dict[str, dict[str, Any]]:
        """What is settled: rows, model rows and errors by their keys."""
        return {line["key"]: line for line in self.lines if line["kind"] in ("row", "model", "error")}

    def note(self, name: str) -> Any:
        """The last note of a name, or None."""
        return self.notes().get(name)

    def notes(self) -> dict[str, Any]:
        return {line["name"]: line["value"] for line in self.of("note")}

    def struck_out(self, key: str) -> bool:
        """Whether something was begun STRIKES times without an end."""
        begun = sum(line["key"] == key for line in self.of("begin"))
        return begun - sum(line["key"] == key for line in self.of("end")) >= STRIKES


def _read(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # a line that a kill cut short
            continue
    return lines


def store_path(out: Path, device: Device, scale: str) -> Path:
    """Where the lines of a device's battery are kept: <slug>.stage.jsonl; on a CPU cpu.stage.jsonl."""
    return out / f"{slug(device.name()) if device.kind == 'cuda' else scale}.stage.jsonl"


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


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


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
