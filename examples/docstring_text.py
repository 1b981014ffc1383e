"""What the text studies read: documentation strings of Python's standard library, as tokens.

The text is taken from the sources by parsing them, so no module is imported, nothing is downloaded, and every
installation of the same Python version gives the same text. Two parts of it differ in topic and style:
`PROGRAMS` (processes, files, protocols; mostly prose) and `NUMBERS` (arithmetic; mostly worked examples).
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PROGRAMS = (
    "_collections_abc _pyio argparse ast asyncio base64 bdb cmd code codecs collections concurrent configparser "
    "contextlib copy csv dataclasses difflib dis doctest email encodings enum filecmp fileinput ftplib functools "
    "gettext glob hashlib hmac html http imaplib importlib inspect io ipaddress json locale logging lzma mailbox "
    "mimetypes multiprocessing optparse os pathlib pdb pickle pickletools pkgutil platform plistlib posixpath pprint "
    "pstats pydoc queue re sched selectors shelve shlex shutil smtplib socket socketserver sqlite3 ssl string "
    "subprocess sysconfig tarfile tempfile textwrap threading timeit tokenize traceback tracemalloc types typing "
    "unittest urllib uuid venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipfile zoneinfo"
)
NUMBERS = "_pydecimal bisect colorsys fractions heapq numbers random statistics"
"""Modules and packages by name; all of them are in every Python from 3.10 on."""

CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
END = 0
"""The token behind each documentation string."""

_PIECES = re.compile(r" ?[A-Za-z]+|\n +|.", re.DOTALL)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_docstrings(names: str) -> list[str]:
    """The documentation strings of modules and packages, each different text once, in the order of a hash.

    The order, and so the division into parts below, depends on the texts alone, not on names or file systems.

    Raises:
        FileNotFoundError: a module has no source file here.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for name in names.split():
        module, package = library / f"{name}.py", library / name
        files = [module] if module.is_file() else sorted(package.rglob("*.py"))
        if not files:
            raise FileNotFoundError(f"the standard library's {name} has no source file in {library}")
        for file in files:
            if "test" in file.relative_to(library).parts:  # unittest's own tests, which not every installation has
                continue
            for text in docstrings(ast.parse(file.read_bytes())):
                found[hashlib.sha256(text.encode()).hexdigest()] = text
    return [found[digest] for digest in sorted(found)]


def docstrings(node: Documented) -> Iterator[str]:
    """The documentation strings of a module, class or function and of what its body defines."""
    if text := ast.get_docstring(node):
        yield text
    for statement in node.body:
        if isinstance(statement, Documented):
            yield from docstrings(statement)


class Vocabulary:
    """The printable ASCII characters and the most frequent words of a text; any other word is spelled.

    A word is a run of letters with the space before it, if there is one; a line break with the indentation
    behind it counts as a word too. A character outside ASCII reads as "?".
    """

    def __init__(self, texts: list[str], size: int) -> None:
        self.size = size
        counts = Counter(piece for text in texts for piece in _PIECES.findall(text) if len(piece) > 1)
        frequent = sorted(counts, key=lambda piece: (-counts[piece], piece))
        pieces = [*CHARACTERS, *frequent[: size - 1 - len(CHARACTERS)]]
        self.ids = {piece: END + 1 + index for index, piece in enumerate(pieces)}

    def encode(self, texts: list[str]) -> Tensor:
        """The tokens of all texts one after the other, each text followed by `END`."""
        tokens: list[int] = []
        unknown = self.ids["?"]
        for text in texts:
            for piece in _PIECES.findall(text):
                if piece in self.ids:
                    tokens.append(self.ids[piece])
                else:
                    tokens.extend(self.ids.get(character, unknown) for character in piece)
            tokens.append(END)
        return torch.tensor(tokens)


@dataclass(frozen=True)
class Corpus:
    """One part of the library: tokens to train on, to choose by, and to test on; no text is in two of them."""

    training: Tensor
    validation: Tensor
    test: Tensor

    @classmethod
    def divide(cls, texts: list[str], vocabulary: Vocabulary) -> Corpus:
        """The first 80 percent of the texts to train on, then 10 to choose by, then 10 to test on."""
        first, second = len(texts) * 80 // 100, len(texts) * 90 // 100
        training, validation, test = texts[:first], texts[first:second], texts[second:]
        return cls(*(vocabulary.encode(part) for part in (training, validation, test)))

    def to(self, device: torch.device) -> Corpus:
        parts = (self.training, self.validation, self.test)
        return Corpus(*(part.to(device) for part in parts))


def load_text(vocabulary_size: int) -> tuple[Corpus, Corpus]:
    """The documentation of `PROGRAMS` and of `NUMBERS`, with a vocabulary from the first one's training text."""
    programs, numbers = read_docstrings(PROGRAMS), read_docstrings(NUMBERS)
    vocabulary = Vocabulary(programs[: len(programs) * 80 // 100], vocabulary_size)
    return Corpus.divide(programs, vocabulary), Corpus.divide(numbers, vocabulary)


def entropy(tokens: Tensor) -> float:
    """-Σ p·log p of the tokens' own frequencies, in nats: the loss of the best model that ignores all context."""
    frequencies = torch.bincount(tokens).double() / len(tokens)
    return -torch.special.xlogy(frequencies, frequencies).sum().item()
