"""What a command says: one document, as JSON or as text of up to 100 columns, and one meaning of the exit status."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WIDTH = 100
"""The columns that text and tables keep to."""

_STATUS = """exit status:
  0    fine
  1    something failed: the last line names it
  2    not tried: the arguments are wrong, or this machine cannot do it; standard error says why
  130  interrupted"""


class Refused(Exception):
    """A command cannot be tried, for its arguments or on this machine; the message says why."""


class Table(NamedTuple):
    """Rows of cells under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass
class Report:
    """What a command has found.

    Attributes:
        facts: its part of the JSON document.
        text: the same for a reader: paragraphs, which are wrapped, and tables.
        failed: a short name for each thing that failed.
    """

    facts: Mapping[str, Any]
    text: Sequence[str | Table]
    failed: Sequence[str] = field(default=())

    @property
    def status(self) -> int:
        return 1 if self.failed else 0


def show(command: str, report: Report, as_json: bool) -> int:
    """Print a report, as JSON or as text; returns the exit status. The last line names what failed."""
    if as_json:
        head = {"command": command, "status": report.status, "failed": list(report.failed)}
        print(json.dumps(head | dict(report.facts), indent=1))
    else:
        for part in report.text:
            print(fitted(part) if isinstance(part, Table) else wrapped(part))
    if report.failed:
        print(f"FAILED: {'; '.join(report.failed)}", file=sys.stderr if as_json else sys.stdout)
    return report.status


def quietly(main: Callable[[], int]) -> int:
    """`main` for a shell: where the reader of a pipe has gone (`| head`), the status is 141, as of other programs."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail
        return 141


def epilog(facts: Mapping[str, str]) -> str:
    """The end of a command's help: what is under the keys of its JSON document, and the exit status."""
    always = {
        "command": "the name of this command", "status": "0 or 1, as the exit status",
        "failed": "a name for each thing that failed",
    }  # fmt: skip
    lines = [
        textwrap.fill(f"{names}: {text}", WIDTH - 2, initial_indent="  ", subsequent_indent="      ")
        for names, text in (always | dict(facts)).items()
    ]
    return "\n".join(["with --json, one object:", *lines, "", _STATUS])


class Help(argparse.RawDescriptionHelpFormatter):
    """Help of up to `WIDTH` columns, with line breaks as they are in description and epilog."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(WIDTH, shutil.get_terminal_size().columns) - 2)


_WORD = re.compile(r"\s+|(?<=[./])(?=[^\W\d]|#)")
"""Where a line may end: at spaces, and in long names after a dot or a slash."""


class _Wrapper(textwrap.TextWrapper):
    wordsep_simple_re = re.compile(f"({_WORD.pattern})")


def _lines(text: str, width: int, indent: str = "") -> list[str]:
    kind = textwrap.TextWrapper if max(map(len, text.split()), default=0) <= width else _Wrapper
    return kind(width, subsequent_indent=indent, break_on_hyphens=False).wrap(text)


def wrapped(text: str, indent: str = "") -> str:
    """Every line of a text in lines of up to `WIDTH` columns; the first may be indented, the others get `indent`."""
    return "\n".join("\n".join(_lines(line, WIDTH, indent)) for line in text.split("\n"))


def fitted(table: Table) -> str:
    """A table in columns. Where they would exceed `WIDTH`, cells of the widest are wrapped, words whole if possible."""
    rows = [[str(cell) for cell in row] for row in (table.head, *table.rows)]
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    longest = [max(len(word) for cell in column for word in _WORD.split(cell)) for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        above = [i for i in range(len(widths)) if widths[i] > longest[i]]
        widths[max(above or range(len(widths)), key=widths.__getitem__)] -= 1
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    for row in rows:
        # A cell that fits is kept as it is, with the spaces that align it.
        cells = [[c] if len(c) <= w else _lines(c, w) for c, w in zip(row, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(f"{part:{w}}" for part, w in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines) + "\n"
