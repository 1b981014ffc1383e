"""Rewrites the measured parts of README.md from benchmarks/results, between markers.

    python -m benchmarks.readme           # rewrite
    python -m benchmarks.readme --check   # exit code 1 if README.md is not what the results give

The markers are HTML comments, measured:cpu:begin and measured:cpu:end, and the same with gpu and peft; what stands
between them is generated, all else is left alone.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from benchmarks import plots, results, tables
from benchmarks.results import Found
from benchmarks.store import ROOT

WIDTH = 140
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
WHERE = "`python -m benchmarks.report` wrote this, and [{0}.md](benchmarks/results/{0}.md) with every row, p20 and p80."
NOTHING = "Not measured yet: `python -m benchmarks.report` {} measures it and fills this in."


def cpu_text(folder: Path) -> str:
    """The CPU part: where, the ratios, sets, a 4-bit base."""
    found = results.read(folder).get("cpu")
    if found is None:
        return NOTHING.format("on a CPU")
    head = [f"{tables.facts(found)} {WHERE.format('cpu')}"]
    rest = (tables.of_sets, tables.of_launches, tables.of_merging, tables.of_quantized, tables.of_memory)
    pictures = _pictures(folder, "cpu", "by_m", "growth")
    parts = (block for section in rest for block in section(found, False))
    return blocks(*head, *tables.of_ratios(found, False), *pictures, *parts)


def gpu_text(folder: Path) -> str:
    """The GPU part: for each device its facts, target tables, models and pictures; without one the empty tables."""
    cards = {name: found for name, found in results.read(folder).items() if name != "cpu"}
    if not cards:
        empty: Found = {"header": {"scale": "cuda"}, "rows": [], "notes": {}}
        return blocks(NOTHING.format("on a machine with a GPU"), "The targets:", *tables.of_targets(empty, False))
    parts = []
    for name, found in cards.items():
        missing = "; ".join(f"{impl}: {why}" for impl, why in found["unavailable"].items())
        parts += [f"{tables.facts(found)} {WHERE.format(name)}", *tables.of_targets(found, False)]
        parts += [*tables.of_models(found, False), f"Not measured: {missing}." if missing else ""]
        parts += _pictures(folder, name, *plots.TITLES)
    return blocks(*parts)


def peft_text(folder: Path) -> str:
    """A step of PEFT's models before and after `accelerate`: on the CPU, then on each card that has it."""
    parts = [block for found in results.read(folder).values() for block in tables.of_peft(found, False)]
    return blocks(*parts) or NOTHING.format("--stages peft")


def _pictures(folder: Path, name: str, *which: str) -> list[str]:
    files = {f"{name}_{one}.png": plots.TITLES[one] for one in which}
    return [f"![{title}](benchmarks/results/{file})" for file, title in files.items() if (folder / file).exists()]


def blocks(*parts: str) -> str:
    """Paragraphs wrapped at WIDTH; tables, lists and pictures as they are."""
    return "\n\n".join(part if part.startswith(("|", "!", "- ")) else wrapped(part) for part in parts if part)


def wrapped(text: str) -> str:
    """A paragraph in lines of WIDTH columns; code is not broken."""
    kept = re.sub(r"`[^`]*`", lambda code: code.group().replace(" ", "\0"), text)
    return textwrap.fill(kept, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def replaced(text: str, parts: Mapping[str, str]) -> str:
    """The text with what stands between the markers of each part replaced.

    Raises:
        ValueError: the markers of a part do not stand there exactly once each.
    """
    for name, part in parts.items():
        begin, end = (f"<!-- measured:{name}:{which} -->" for which in ("begin", "end"))
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must have {begin} and {end} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{part.strip()}\n\n{end}{rest.split(end)[1]}"
    return text


def expected(text: str, folder: Path = RESULTS) -> str:
    """README.md as the results have it."""
    return replaced(text, {"cpu": cpu_text(folder), "gpu": gpu_text(folder), "peft": peft_text(folder)})


def update() -> bool:
    """Rewrite README.md; whether it changed."""
    before = README.read_text()
    after = expected(before)
    README.write_text(after)
    return after != before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if README.md is out of date")
    if parser.parse_args().check:
        text = README.read_text()
        raise SystemExit(int(text != expected(text)))
    print("README.md rewritten" if update() else "README.md is up to date")


if __name__ == "__main__":
    main()
