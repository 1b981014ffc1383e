"""First light on the dry card: fills the cache that is carried to a card, and shows that nothing is missing from it.

    scripts/warm-cache [--out build/warm] [--steps NAME ...] [--tests]
    scripts/warm-cache --check

The steps of `benchmarks.first_light` run as on a card, on a stand-in that computes nothing (tests/dry_card), without
limits. What they compile is what a card would compile: with an empty cache, it is packed into
<out>/triton-<version>.tar.xz, in minutes of a core, some megabytes. Triton is of the release of the card's machine,
PyTorch a CPU build. With --check the archive is unpacked first, and whatever is still compiled is an error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks import first_light, steps, warm_cache
from benchmarks.steps import Run, Step
from benchmarks.store import ROOT
from glora_kernels.tools import outputs

MINUTES = 600.0
DRY = [str(ROOT / "tests" / "dry_card"), str(ROOT / "tests" / "dry_card" / "numberless.py")]


def rehearse(out: Path, cache: Path, listed: Iterable[Step], record: Path | None = None) -> Run:
    """Run steps on the dry card, without limits; what Triton compiles is noted in the folder `record`."""
    noting = [] if record is None else ["--record", str(record)]
    python = [sys.executable, *DRY, *noting]
    run = Run(out, MINUTES, cache, python, first_light.environment(cache), first_light.LOG)
    run.run([_without_limit(step) for step in listed])
    run.summary()
    return run


def _without_limit(step: Step) -> Step:
    command = list(step.command)
    if "--minutes" in command:
        command[command.index("--minutes") + 1] = str(MINUTES)
    return replace(step, seconds=60 * MINUTES, command=command)


def chosen(out: Path, names: Iterable[str] | None = None, tests_too: bool = False) -> list[Step]:
    """First light's steps by the beginnings of their names; without names all, the files of tests only if wanted."""
    every = first_light.first(out, 0)
    if names is not None:
        return first_light.pick(every, names)
    return [step for step in every if tests_too or not step.name.startswith("tests/")]


def wrong(run: Run) -> list[str]:
    """What went wrong: steps that failed, and what the battery could not do of ours."""
    found = [f"{one.name}: {one.how}" for one in run.ended if one.code]
    for path in run.out.glob("*.stage.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["kind"] == "error" and line["impl"] == "ours":
                found.append(f"{line['what']}: {line['reason']}")
            if line["kind"] == "note" and isinstance(line["value"], dict) and "error" in line["value"]:
                found.append(f"{line['name']}: {line['value']['error']}")
    return found


def make(out: Path, names: Iterable[str] | None = None, tests_too: bool = False) -> list[str]:
    """Fill an empty cache and pack it, with the log beside it; what went wrong."""
    archive = warm_cache.archive_of(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        listed = chosen(folder / "out", names, tests_too)
        run = rehearse(folder / "out", folder / "cache", listed, folder / "recorded")
        kernels, modules = warm_cache.pack(folder / "cache", folder / "recorded", archive)
        shutil.copy(run.path, archive.with_name(f"{archive.name.removesuffix('.tar.xz')}.log"))
        found = wrong(run)
    print(f"{archive}: {kernels} kernels, {modules} modules, {archive.stat().st_size / 2**20:.1f} MiB", flush=True)
    return found


def check(out: Path, names: Iterable[str] | None = None, tests_too: bool = False) -> list[str]:
    """Unpack the archive into an empty cache and run the steps; what went wrong, and what was compiled all the same."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        listed = chosen(folder / "out", names, tests_too)
        run = rehearse(folder / "out", folder / "cache", [*first_light.unpacked(out, folder / "cache"), *listed])
        return [*wrong(run), *(f"{one.name} compiled {', '.join(one.compiled)}" for one in run.ended if one.compiled)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=outputs.folder, default=warm_cache.WARM, metavar="DIR", help="build/warm")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these, by the beginnings of their names")
    parser.add_argument("--tests", action="store_true", help="the files of tests too: an hour or two of a core")
    parser.add_argument("--check", action="store_true", help="with the packed cache: what is still compiled")
    args = parser.parse_args()
    steps.end_on_sigterm()
    found = (check if args.check else make)(args.out.absolute(), args.steps, args.tests)
    if found:
        raise SystemExit("\n".join(["went wrong:", *found]))


if __name__ == "__main__":
    main()
