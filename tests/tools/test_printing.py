"""What is the same in all commands: help, JSON, width, errors, and readers that go away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from glora_kernels.__main__ import COMMANDS, main
from glora_kernels.tools.commands import printing

SAID = {"command", "status", "failed"}
"""The keys of every command's JSON."""
LAYER = ["info", "--layer", "8192x4096x4096", "--arch", "sm_90"]


def out(capsys, *args):
    assert main(list(args)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    options = re.findall(r"^  (--[\w-]+)", text, re.M)
    assert len(options) >= 2
    assert all(re.search(rf"^  {name}\b.*\n?.*\w{{3,}}", text, re.M) for name in options)
    assert len(text) > 300
    assert max(map(len, text.splitlines())) <= 100
    assert "exit status:" in text


@pytest.mark.parametrize(
    "args",
    [
        [], ["nonsense"], ["info", "--layer", "8x8"], ["tune", "--rank", "0"], ["info", "--arch", "90"],
        ["info", "--layer", f"8x8x{10**20}"], ["info", "--layer", "8x8x8", "--rank", f"{2**31}"],
        ["params", "--hidden", f"{10**20}", "--intermediate", "4"], ["tune", "--out", os.path.dirname(__file__)],
    ],
)  # fmt: skip
def test_bad_arguments(args, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["info"], [*LAYER, "--four-bit", "nf4", "--case", "glora:lora,lora,vector,none,none"], [*LAYER, "--share", "A"],
        [*LAYER, "--siblings", "1024", "1024"], ["tune", "--list", "--shape", "64x64x64", "--four-bit"],
        ["bench", "--device", "cpu", "--layer", "4x8x8", "--rounds", "1"], ["params", "--config", "llama-3-8b"],
        ["check", "--device", "cpu", "--quick"],
    ],
    ids=lambda args: " ".join(args[:4:3]),
)  # fmt: skip
def test_what_is_printed_fits_and_its_json_is_documented(args, capsys):
    assert max(map(len, out(capsys, *args).splitlines())) <= 100
    found = json.loads(out(capsys, *args, "--json"))
    documented = {name for names in COMMANDS[args[0]].FACTS for name in names.split(", ")}
    assert set(found) - documented == SAID


def test_a_table_that_is_too_wide():
    wide = ["a few words that are long enough to be wrapped " * 3, "folder/" * 20, "x" * 60, "  1"]
    lines = printing.fitted(printing.Table(["one", "two", "three", "n"], [wide])).splitlines()
    assert max(map(len, lines)) <= 100
    columns = [slice(*found.span()) for found in re.finditer("-+", lines[1])]
    back = ["".join(line[column].strip() + " " for line in lines[2:]).split() for column in columns]
    assert " ".join(back[0]) == wide[0].strip()
    assert ["".join(cell) for cell in back[1:3]] == wide[1:3]
    assert lines[2].endswith("    1"), "spaces that align a cell are kept"
    narrow = printing.fitted(printing.Table(["a", "b"], [["x", "yy"]]))
    assert narrow == "a  b\n-  --\nx  yy\n"


def test_a_reader_that_goes_away(monkeypatch):
    """As `tune --list | head` does: 141 without a traceback, also for what is still to be flushed."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["glora_kernels", "tune", "--list", "--shape", "64x64x64"])
    with os.fdopen(write, "w") as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        assert printing.quietly(main) == 141
        gone.write("the descriptor can be written to at exit")


def test_an_interrupt(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["info"], "run", stop)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "info: interrupted\n"


def test_a_process_of_its_own_counts_what_a_first_step_compiles():
    """Which Triton's interpreter, in which these tests run, cannot."""
    command = [sys.executable, "-m", "glora_kernels", "info", "--config", "vit-b-16", "--arch", "sm_90", "--json"]
    quiet = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    names = {step["kernel"] for group in found["groups"] for name in ("forward", "backward")
             for step in group[name]["steps"] if step["file"]}  # fmt: skip
    assert len(names) <= found["compilations"] <= 4 * len(names)
    assert done.stderr == ""
