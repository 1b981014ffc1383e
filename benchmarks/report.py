"""The one command that measures a machine, a card or a CPU, in stages that can be interrupted and resumed.

    python -m benchmarks.report                         # everything, for the card if there is one
    python -m benchmarks.report --quick --minutes 8     # what the target table needs
    python -m benchmarks.report --minutes 9             # as much as fits; run it again to go on
    python -m benchmarks.report --stages peft groups    # these alone
    python -m benchmarks.report --device cpu

On a card `pytest -m gpu` comes first. Then every stage runs as `pytest benchmarks --stage NAME`, a process of its own
that ends within nine minutes. A finished row is on the disk at once, in <slug>.stage.jsonl; a run with the same
device, source and versions goes on from there, and one that finds everything there measures nothing: delete that file
to measure again. At the end --out (benchmarks/results unless given) has <slug>.json by the schema and
<slug>_detail.json with everything, on a CPU cpu.json with everything, where stages that were not measured keep their
figures; <slug>.md; and pictures. Figures of another device, on a card also of another source, are put aside as
<file>.old. README.md and docs/benchmarks.md are rewritten from benchmarks/results (benchmarks.pages) where --out is
that folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cases, devices, pages, peers, plots, results, tables
from benchmarks.cases import Stage, row_key
from benchmarks.devices import Device
from benchmarks.measure import DEVICE_LOST, OUT_OF_TIME
from benchmarks.schema import slug
from benchmarks.store import ROOT, Store, header, store_path
from glora_kernels.tools import outputs

PYTHON = [sys.executable]
"""What a stage's process is started with."""
STAGE_MINUTES = 8.5
GRACE_S = 60.0
"""How long after its time a stage may take to end by itself before it is killed."""
START_S = 12.0
"""What a process takes before it measures: part of its time."""
LEAST_S = 30.0
"""With less than this left no stage is started."""
RESERVE_S = 20.0


@dataclass
class Report:
    """One run: a device, which battery of it ("cuda", "cpu", or "tiny" of the tests), where the files go, all the time
    there is or None, what to run, the rounds of every group or None for the stages' own, and whether to draw."""

    device: Device
    scale: str
    out: Path
    minutes: float | None
    stages: list[Stage]
    rounds: int | None = None
    pictures: bool = True

    def __post_init__(self) -> None:
        self.end = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        self.path = store_path(self.out, self.device, self.scale)
        self.header = header(self.device, self.scale)

    def store(self) -> Store:
        """The store as it is on the disk now."""
        return Store(self.path, self.header)

    def left_s(self) -> float:
        """Seconds left for measuring; RESERVE_S are kept for writing the files."""
        return float("inf") if self.end is None else self.end - time.monotonic() - RESERVE_S

    def run(self) -> bool:
        """Run every stage to its end, as far as the time goes; whether all are complete."""
        for i, stage in enumerate(self.stages, start=1):
            print(f"[{i}/{len(self.stages)}] {stage.name}: {stage.title}", flush=True)
            if not self._run_stage(stage):
                return False
        return True

    def _run_stage(self, stage: Stage) -> bool:
        restarts = 0
        while not complete(stage, self.store()):
            if self.left_s() < LEAST_S:
                return False
            before = len(self.store().lines)
            code = self._process(stage, min(STAGE_MINUTES, self.left_s() / 60))
            if complete(stage, self.store()):
                break
            why = {OUT_OF_TIME: "its time is up", DEVICE_LOST: "the device stopped answering"}
            print(f"  {why.get(code or 0, f'the process ended with {code}')}; going on in a new one", flush=True)
            restarts = 0 if len(self.store().lines) > before + 2 else restarts + 1
            if restarts > 3:
                print(f"  stage {stage.name} makes no progress; left", flush=True)
                return self.end is None
        return True

    def _process(self, stage: Stage, minutes: float) -> int | None:
        """The exit code of one process of a stage; None where it had to be killed."""
        command = [*PYTHON, "-m", "pytest", str(Path(__file__).parent), "-q", "-p", "no:cacheprovider"]
        command += ["--no-header", "--no-summary", "--capture", "tee-sys"]  # shows how far it is
        command += ["--benchmark-disable"] if importlib.util.find_spec("pytest_benchmark") else []
        command += ["--stage", stage.name, "--scale", self.scale, "--device", self.device.kind]
        command += ["--out", str(self.out.resolve()), "--minutes", f"{minutes - START_S / 60:.3f}"]
        command += [] if self.rounds is None else ["--rounds", str(self.rounds)]
        limit = 60 * minutes + (GRACE_S if self.end is None else min(GRACE_S, max(5.0, self.left_s() - 60 * minutes)))
        try:
            return subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return None

    def tests(self) -> None:
        """`pytest -m gpu`, once a battery; its outcome is noted, and a failure does not stop the measurements: every
        row has a check of its own."""
        store = self.store()
        if store.note("tests") is not None:
            return
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
        print("pytest -m gpu", flush=True)
        try:
            limit = min(60 * STAGE_MINUTES, 0.6 * self.left_s())
            done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True)
            tail = done.stdout.strip().splitlines()[-40:]
            result = f"exit code {done.returncode}, {tail[-1] if tail else 'no output'}"
            print("\n".join(tail), flush=True)
        except subprocess.TimeoutExpired as late:
            result = f"not finished in {limit:.0f} s"
            print((late.stdout or b"").decode(errors="replace")[-4000:], flush=True)
        store.add("note", name="tests", value={"command": "pytest -m gpu", "result": result})

    def write(self) -> list[Path]:
        """The result files, from whatever there is; those of another device, on a card also of another source, are put
        aside before."""
        store = self.store()
        if store.note("ceilings") is None:
            print("nothing measured yet; no result file", flush=True)
            return []
        found = results.of_store(store)
        for title, section in reversed(tables.SECTIONS.items()):  # what matters most is at the end of a screen
            made = section(found, True) if title != "Every row" else []
            if made:
                print("\n\n".join([f"\n## {title}", *made]), flush=True)
        name = slug(self.device.name()) if self.scale == "cuda" else self.scale
        whole = self.out / (f"{name}_detail.json" if self.scale == "cuda" else f"{name}.json")
        results.put_aside(whole, found["header"], ("device", "source") if self.scale == "cuda" else ("device",))
        if self.scale != "cuda" and whole.exists() and "notes" in (earlier := json.loads(whole.read_text())):
            found = results.merged(earlier, found)
        results.write_json(whole, found)
        if self.scale == "cuda":
            results.put_aside(self.out / f"{name}.json", found["header"], ("device", "commit"))
            results.write_json(self.out / f"{name}.json", results.by_schema(found))
        pictures: dict[str, str] = {}
        if not self.pictures:
            print("no pictures: --no-pictures", flush=True)
        elif importlib.util.find_spec("matplotlib"):
            pictures = plots.draw_all(found, self.out, name)
        else:
            print("no pictures: matplotlib is not installed", flush=True)
        results.write(self.out / f"{name}.md", tables.markdown(found, pictures))
        return sorted(path for path in self.out.glob(f"{name}*") if path.suffix not in (".jsonl", ".old"))


def complete(stage: Stage, store: Store) -> bool:
    """Whether everything of a stage is there, or an error in its place."""
    settled, notes = store.settled(), store.notes()
    rows = all(row_key(*row) in settled for group in stage.groups for row in group.rows())
    return rows and all(part in notes for part in stage.parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a card if there is one")
    parser.add_argument("--minutes", type=float, help="all the time there is; without it everything is measured")
    parser.add_argument("--quick", action="store_true", help="only what the target table needs, and no tests")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these stages")
    parser.add_argument("--rounds", type=int, help="timed rounds of every group")
    parser.add_argument("--no-tests", action="store_true", help="leave out pytest -m gpu")
    parser.add_argument("--no-pictures", action="store_true", help="write no pictures")
    parser.add_argument(
        "--out", type=outputs.folder, default=pages.RESULTS, metavar="DIR", help="benchmarks/results unless given"
    )
    args = parser.parse_args()
    if not importlib.util.find_spec("pytest"):
        parser.error("pytest is not installed, and every stage runs under it")
    device = devices.get(args.device)
    listed = [stage for stage in cases.stages(device.kind) if stage.quick or not args.quick]
    stages = listed if args.stages is None else [cases.find(device.kind, name) for name in args.stages]
    report = Report(device, device.kind, args.out, args.minutes, stages, args.rounds, not args.no_pictures)
    store = report.store()
    print(store.message or f"{device.name()}: {len(store.of('row'))} rows in {report.path.name}", flush=True)
    for peer, reason in peers.unavailable().items():
        print(f"  {peer}: {reason}", flush=True)
    if device.kind == "cuda" and not (args.no_tests or args.quick):
        report.tests()
    done = report.run()
    files = report.write()
    if files:
        print(f"written: {', '.join(path.name for path in files)}")
        if args.out.resolve() == pages.RESULTS.resolve():
            print(pages.said(pages.update()))
        else:
            print(f"The pages show {pages.RESULTS}: with the files there `python -m benchmarks.pages` rewrites them")
    if not done:
        again = " ".join(["python -m benchmarks.report", *sys.argv[1:]])
        print(
            f"\nNot complete: the time is up. {report.path.name} has what is there; the same command goes on:\n{again}"
        )


if __name__ == "__main__":
    main()
