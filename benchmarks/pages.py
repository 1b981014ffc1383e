"""Rewrites the measured parts of README.md and pages of docs/ from benchmarks/results, between markers.

    python -m benchmarks.pages           # rewrite
    python -m benchmarks.pages --check   # exit code 1 if a page is not what the results give

The markers are HTML comments, measured:NAME:begin and measured:NAME:end, with the names of `PARTS`; what stands between
them is generated, all else is left alone.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks import cells, plots, results, tables
from benchmarks.results import Found
from benchmarks.store import ROOT

WIDTH = 140
README, DOCS = ROOT / "README.md", ROOT / "docs"
RESULTS = Path(__file__).parent / "results"
FOLDER = "../benchmarks/results"  # from docs/
WHERE = (
    "`python -m benchmarks.report` wrote this, and [{0}.md](../benchmarks/results/{0}.md) with every row, p20 and p80."
)
NOTHING = "Not measured yet: `python -m benchmarks.report` {} measures it and fills this in."


def cpu_text(folder: Path) -> str:
    """The CPU part: where, the ratios, sets, a 4-bit base."""
    found = results.read(folder).get("cpu")
    if found is None:
        return NOTHING.format("on a CPU")
    head = [f"{cells.facts(found)} {WHERE.format('cpu')}"]
    rest = (
        tables.of_host,
        tables.of_sets,
        tables.of_launches,
        tables.of_merging,
        tables.of_quantized,
        tables.of_memory,
    )
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
        parts += [f"{cells.facts(found)} {WHERE.format(name)}", *tables.of_targets(found, False)]
        parts += [*tables.of_models(found, False), f"Not measured: {missing}." if missing else ""]
        parts += _pictures(folder, name, *plots.TITLES)
    return blocks(*parts)


def peft_text(folder: Path) -> str:
    """A step of PEFT's models before and after `accelerate`: on the CPU, then on each card that has it."""
    parts = [block for found in results.read(folder).values() for block in tables.of_peft(found, False)]
    return blocks(*parts) or NOTHING.format("--stages peft")


def headline_text(folder: Path) -> str:
    """README's one table: the same step, its time and what it keeps; its picture stands above."""
    found = results.read(folder).get("cpu")
    if found is None or not (part := tables.of_headline(found)):
        return NOTHING.format("--stages peft")
    return blocks(*part)


def small_text(folder: Path) -> str:
    """What of a small adapter survives 16 bits, on the CPU."""
    found = results.read(folder).get("cpu")
    if found is None or not (part := tables.of_small_adapters(found)):
        return NOTHING.format("--stages small-adapters")
    return blocks(*part)


def written_text(name: str, folder: Path) -> str:
    """What a script of its own wrote (`benchmarks.lycoris_ratios`, `benchmarks.peft_ratios`) on a CPU."""
    return blocks(*(folder / name / "cpu.md").read_text().strip().split("\n\n"))


def _pictures(folder: Path, name: str, *which: str) -> list[str]:
    files = {f"{name}_{one}.png": plots.TITLES[one] for one in which}
    return [f"![{title}]({FOLDER}/{file})" for file, title in files.items() if (folder / file).exists()]


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
            raise ValueError(f"the page must have {begin} and {end} once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{part.strip()}\n\n{end}{rest.split(end)[1]}"
    return text


PARTS: Mapping[Path, Mapping[str, Callable[[Path], str]]] = {
    README: {"headline": headline_text},
    DOCS / "benchmarks.md": {"peft": peft_text, "cpu": cpu_text, "gpu": gpu_text},
    DOCS / "numerics.md": {"small": small_text},
    DOCS / "diffusion.md": {"lycoris": partial(written_text, "lycoris")},
    DOCS / "what-is-accelerated.md": {"peft_ratios": partial(written_text, "peft_ratios")},
}
"""The pages, and by the name of their markers what each part shows."""


def expected(page: Path, folder: Path = RESULTS) -> str:
    """A page as the results have it."""
    return replaced(page.read_text(), {name: part(folder) for name, part in PARTS[page].items()})


def update() -> list[str]:
    """Rewrite the pages; the names of those that changed."""
    changed = []
    for page in PARTS:
        after = expected(page)
        if after != page.read_text():
            page.write_text(after)
            changed.append(page.name)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    if parser.parse_args().check:
        raise SystemExit(int(any(page.read_text() != expected(page) for page in PARTS)))
    print(said(update()))


def said(changed: list[str]) -> str:
    return f"rewritten: {', '.join(changed)}" if changed else "README.md and the pages of docs/ are up to date"


if __name__ == "__main__":
    main()
