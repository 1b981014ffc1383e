"""Where a battery's rows wait until it is complete: JSON lines, one flushed line for whatever is finished.

A process that is killed loses what it was measuring and nothing else. The first line says what the rows were
measured with; a file of another device or source is put aside and the battery starts afresh. The commit does not
count: `source` is a digest of the code itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STRIKES = 2
"""How often a group may be begun without an end (a crash, a kill) before it is left out."""


class Store:
    """The lines of one run. Kinds: header, begin, end, row, error, model, note.

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

    def settled(self) -> set[str]:
        """What is settled: the keys of rows, model rows and errors."""
        return {line["key"] for line in self.lines if line["kind"] in ("row", "model", "error")}

    def note(self, name: str) -> Any:
        """The last note of a name, or None."""
        found = [line["value"] for line in self.of("note") if line["name"] == name]
        return found[-1] if found else None

    def struck_out(self, key: str) -> bool:
        """Whether a group was begun STRIKES times without an end."""
        begun = sum(line["key"] == key for line in self.of("begin"))
        return begun - sum(line["key"] == key for line in self.of("end")) >= STRIKES


def header_of(path: Path) -> dict[str, Any]:
    """What the rows of a file were measured with."""
    first = _read(path)[0]
    return {name: value for name, value in first.items() if name != "kind"}


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # a line that a kill cut short
            continue
    return lines
