"""The ledger of a search: a file of JSON lines, the first of which says what was searched, one more a candidate.

Every line ends in "check": a hash of the line and of all before it. A line is on disk before the search goes on, so a
process that is killed leaves whole lines and at most one torn one at the end, which the next line overwrites.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glora_kernels.nn.file import flush_folder

FORMAT = "glora_kernels.search"
VERSION = 1
"""To be raised also when the same seed draws other candidates, since a restart draws them anew."""


class Ledger:
    """Opens the ledger at a path, or begins one.

    Args:
        path: of the file.
        header: what is searched and how, as plain JSON values.

    Attributes:
        records: the lines after the header that the file had.

    Raises:
        ValueError: the file is no ledger, that of another search, or damaged. It is unchanged.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._lines: list[tuple[int, str]] = []  # of each line: where it ends in the file, and its check
        self.records: list[dict[str, Any]] = []
        ours = json.loads(_body({"format": FORMAT, "format_version": VERSION, **header}))
        *lines, self._torn = (self._path.read_bytes() if self._path.exists() else b"").split(b"\n")
        if not lines:
            if not _line(ours, "")[0].startswith(self._torn):
                raise self._refused("is no ledger of a search; it was left as it is")
            with open(self._path, "ab"):
                pass
            self.append(0, ours)
            flush_folder(self._path.parent)
            return
        self._check_header(lines[0], ours)
        for line in lines:
            self.records.append(self._parsed(line))
        del self.records[0]

    def append(self, position: int, record: Mapping[str, Any]) -> None:
        """Write a line, the header being at position 0, and flush it to disk. Writing it again changes nothing.

        Raises:
            RuntimeError: the file is not as this object left it: another process writes it.
        """
        end, check = self._lines[position - 1] if position else (0, "")
        line, check = _line(record, check)
        with open(self._path, "r+b") as file:
            file.seek(min(end, os.fstat(file.fileno()).st_size))
            found = file.read()
            if file.tell() < end or (found != self._torn and not line.startswith(found)):
                raise RuntimeError(f"the ledger {str(self._path)!r} was changed by another process meanwhile")
            file.seek(end)
            file.truncate()
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._torn = b""
        self._lines[position:] = [(end + len(line), check)]

    def _check_header(self, line: bytes, ours: Mapping[str, Any]) -> None:
        try:
            theirs = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._refused(f"is no ledger of a search: {error}") from error
        if not isinstance(theirs, dict) or theirs.get("format") != FORMAT:
            raise self._refused(f"is no ledger of a search: its first line lacks format={FORMAT!r}")
        if theirs.get("format_version") != VERSION:
            raise self._refused(f"has format version {theirs.get('format_version')!r}; this library reads {VERSION}")
        theirs.pop("check", None)
        if theirs != ours:
            raise self._refused(f"is that of another search: {difference(theirs, ours)}; give another path")

    def _parsed(self, line: bytes) -> dict[str, Any]:
        position = len(self._lines)
        end, check = self._lines[-1] if self._lines else (0, "")
        try:
            record = json.loads(line)
            del record["check"]
            again, check = _line(record, check)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise bad_line(self._path, position, f"cannot be read: {error!r}") from error
        if again != line + b"\n":
            raise bad_line(self._path, position, "does not match its check")
        self._lines.append((end + len(again), check))
        return record

    def _refused(self, reason: str) -> ValueError:
        return ValueError(f"the ledger {str(self._path)!r} {reason}")


def bad_line(path: str | os.PathLike[str], position: int, reason: str) -> ValueError:
    """The error for a line that cannot be used."""
    return ValueError(f"the ledger {str(path)!r} is damaged: line {position + 1} {reason}")


def difference(theirs: Any, ours: Any, where: str = "") -> str:
    """Where two unequal JSON values differ first, and in what."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*ours, *(key for key in theirs if key not in ours)]
        key = next(key for key in keys if theirs.get(key, keys) != ours.get(key, keys))
        return difference(theirs.get(key), ours.get(key), f"{where}[{key!r}]" if where else str(key))
    return f"{where} is {_short(theirs)} there, {_short(ours)} here"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _body(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False)


def _line(record: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """The line of a record and its check. before: the check of the line before."""
    body = _body(record)
    check = hashlib.sha256((before + body).encode()).hexdigest()[:16]
    return f'{body[:-1]}, "check": "{check}"}}\n'.encode(), check
