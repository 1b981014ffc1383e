"""A file of user code under mypy: what is right passes, and each mistake in it is found, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CODE = Path(__file__).with_name("typed_user_code.py")


def test_user_code_is_checked_as_it_says():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(CODE)]
    done = subprocess.run(command, cwd=CODE.parents[1], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    found = {int(line): code for line, code in re.findall(r":(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M)}
    lines = CODE.read_text().splitlines()
    expected = {number: match[1] for number, line in enumerate(lines, 1) if (match := re.search(r"# E: (\S+)$", line))}
    assert len(expected) > 10
    assert found == expected, done.stdout
