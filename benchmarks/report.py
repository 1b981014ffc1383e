"""The one command that measures a machine, a card or a CPU, in stages that can be interrupted and resumed.

    python -m benchmarks.report                         # everything, for the card if there is one
    python -m benchmarks.report --quick --minutes 8     # on a card: the target table only
    python -m benchmarks.report --minutes 9             # as much as fits; run it again to go on
    python -m benchmarks.report --device cpu

On a card: `pytest -m gpu`, then the battery, stage by stage, each a process of its own that ends within nine minutes;
then <slug>.json, <slug>_detail.json, <slug>.md and PNGs in --out (benchmarks/results unless given). On a CPU: products,
small adapters, host cost, ratios, sets of layers, layers over a 4-bit base and PEFT's models before and after
accelerate, then the small battery, into cpu.json, cpu.md and PNGs. A finished row is on the disk at once, in
<slug>.stage.jsonl; a run with the same device, source and versions goes on from there, and one that finds everything
there measures nothing: delete that file to measure again. README.md is rewritten from benchmarks/results
(benchmarks.readme) where --out is that folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    assemble,
    battery,
    cases,
    devices,
    peers,
    peft_models_text,
    plots,
    readme,
    schema,
    sections,
    stage,
    surroundings,
)
from benchmarks.battery import Stage
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.stage import DEVICE_LOST, DONE, OUT_OF_TIME
from benchmarks.store import Store
from glora_kernels.tools import outputs

RESULTS = Path(__file__).parent / "results"
STAGE_MINUTES = 8.5
GRACE_S = 60.0
"""How long after its time a stage may take to end by itself before it is killed."""
START_S = 12.0
"""What a process takes before it measures: part of its time."""
LEAST_S = 30.0
"""With less than this left no stage is started."""
RESERVE_S = 20.0


class Report:
    """One run: a device, a battery, a store, and the time there is.

    Args:
        device: what is measured.
        scale: "cuda", "cpu" or "tiny" (of the tests).
        out: where the files go.
        minutes: all the time there is, or None.
        chosen: the stages to run, or None for all (with quick: those of the target table).
    """

    def __init__(
        self,
        device: Device,
        scale: str,
        out: Path,
        minutes: float | None = None,
        quick: bool = False,
        chosen: list[str] | None = None,
        rounds: int | None = None,
    ) -> None:
        self.device, self.scale, self.out, self.quick = device, scale, out, quick
        self.chosen, self.rounds = chosen, rounds
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.path = stage.store_path(out, device, scale)
        self.header = surroundings.header(device, scale)

    def store(self) -> Store:
        """The store as it is on the disk now."""
        return Store(self.path, self.header)

    def left_s(self) -> float:
        """Seconds left for measuring; RESERVE_S are kept for writing the files."""
        return float("inf") if self.end is None else self.end - time.monotonic() - RESERVE_S

    def stages(self) -> list[Stage]:
        """The stages to run, in order."""
        listed = battery.stages(self.scale)
        if self.chosen is not None:
            return [stage.find(self.scale, name) for name in self.chosen]
        return [one for one in listed if one.quick] if self.quick else listed

    def run_stages(self) -> bool:
        """Run every stage to its end, as far as the time goes; whether all are complete."""
        listed = self.stages()
        for i, one in enumerate(listed, start=1):
            print(f"[{i}/{len(listed)}] {one.name}: {one.title}", flush=True)
            if not self._run_stage(one):
                return False
        return True

    def _run_stage(self, one: Stage) -> bool:
        restarts = 0
        while not stage.complete(one, self.store(), self.scale):
            if self.left_s() < LEAST_S:
                return False
            before = len(self.store().lines)
            code = self._process(one, min(STAGE_MINUTES, self.left_s() / 60))
            if code == DONE and stage.complete(one, self.store(), self.scale):
                break
            if code == OUT_OF_TIME and self.end is None:
                print("  its time is up; going on in a new process", flush=True)
            elif code == OUT_OF_TIME:
                if self.left_s() < LEAST_S:
                    return False
            elif code == DEVICE_LOST:
                print("  going on in a new process", flush=True)
            else:
                print(f"  the stage's process ended with {code}; going on in a new one", flush=True)
            restarts = 0 if len(self.store().lines) > before + 1 else restarts + 1
            if restarts > 3:
                print(f"  stage {one.name} makes no progress; left", flush=True)
                return self.end is None
        return True

    def _process(self, one: Stage, minutes: float) -> int | None:
        command = [sys.executable, "-m", "benchmarks.stage", "--stage", one.name, "--out", str(self.out.resolve())]
        command += ["--minutes", f"{minutes - START_S / 60:.3f}", "--device", self.device.kind, "--scale", self.scale]
        command += ["--go-on"]  # this process has compared what the rows there were measured with
        command += [] if self.rounds is None else ["--rounds", str(self.rounds)]
        limit = 60 * minutes + (GRACE_S if self.end is None else min(GRACE_S, max(5.0, self.left_s() - 60 * minutes)))
        try:
            return subprocess.run(command, cwd=surroundings.ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return None

    def tests(self) -> None:
        """`pytest -m gpu`, once a battery; its outcome is noted, and a failure does not stop the measurements: every
        row has a check of its own."""
        store = self.store()
        if store.note("tests") is not None:
            return
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
        shown = "pytest -m gpu"
        print(shown, flush=True)
        begin = time.monotonic()
        try:
            limit = min(60 * STAGE_MINUTES, 0.6 * self.left_s())
            done = subprocess.run(command, cwd=surroundings.ROOT, timeout=limit, capture_output=True, text=True)
            tail = done.stdout.strip().splitlines()[-40:]
            result = f"exit code {done.returncode}, {tail[-1] if tail else 'no output'}"
            print("\n".join(tail), flush=True)
        except subprocess.TimeoutExpired:
            result = f"not finished in {time.monotonic() - begin:.0f} s"
        print(f"  {result}", flush=True)
        store.add("note", name="tests", value={"command": shown, "result": result})

    def pictures(self, name: str) -> dict[str, str]:
        """Draw what the store allows; the titles by file name. Nothing without matplotlib."""
        if importlib.util.find_spec("matplotlib") is None:
            print("no pictures: matplotlib is not installed", flush=True)
            return {}
        store = self.store()
        rates = store.note("ceilings")
        if rates is None:
            return {}
        found = Ceilings(rates["tflops"], rates["gbps"])
        titles = plots.draw_all(assemble.row_lines(store), store.of("model"), found, self.out, name, store.note("nf4"))
        steps = store.note("peft")
        if steps and steps.get("models"):
            peft_models_text.plot(steps, self.out / f"{name}_peft.png")
            titles[f"{name}_peft.png"] = "PEFT before and after accelerate"
        return titles

    def write(self) -> list[Path]:
        """The result files of a card, from whatever rows there are."""
        store, name = self.store(), schema.slug(self.device.name())
        if store.note("ceilings") is None:
            print("nothing measured yet; no result file", flush=True)
            return []
        files = [self.out / f"{name}.json", self.out / f"{name}_detail.json", self.out / f"{name}.md"]
        schema.write(files[0], assemble.result(store))
        schema.write(files[1], assemble.detail(store))
        pictures = self.pictures(name)
        files[2].write_text(assemble.markdown(store, pictures))
        return [*files, *(self.out / picture for picture in pictures)]


def run(out: Path, quick: bool, minutes: float | None = None, with_battery: bool = True) -> dict[str, Any] | None:
    """Measure everything a CPU measures and write cpu.json, cpu.md and PNGs into `out`.

    None where the time was up before the last section: nothing is written then but the store, to go on from.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = devices.get("cpu")
    report = Report(device, "cpu", out, minutes, quick)
    print(_begun(report), flush=True)
    found: dict[str, Any] = _cpu_surroundings(device, report.store().header)
    found |= {"quick": quick, "unavailable": cases.unavailable()}
    found["sections"] = measured = {}
    todo = sections.measurements(quick)
    for i, name in enumerate(sections.SECTIONS, start=1):
        title, module = sections.SECTIONS[name]
        store = report.store()
        known = store.note(f"section {name} {quick}")
        print(f"[{i}/{len(sections.SECTIONS)}] {title}{'' if known is None else ' (there already)'}", flush=True)
        if known is None:
            if report.left_s() < LEAST_S:
                print("\nNo result files yet: they need every section.", end="")
                _say_resume(report)
                return None
            known = todo[name]()
            store.add("note", name=f"section {name} {quick}", value=known)
        measured[name] = known
        print(f"{module.show(known)}\n", flush=True)
    complete = report.run_stages() if with_battery else True
    if not complete:
        _say_resume(report)
    write_cpu(report, found)
    return found


def write_cpu(report: Report, found: dict[str, Any]) -> None:
    """cpu.json, cpu.md and the pictures, from the sections and the battery's rows."""
    store, out = report.store(), report.out
    pictures = sections.draw(found["sections"], out)
    if not pictures:
        found["unavailable"]["plots"] = "matplotlib is not installed"
    lines = [*_cpu_title(found), *sections.markdown(found["sections"]), ""]
    if store.of("row"):
        result = assemble.result(store)
        found["battery"] = {name: result[name] for name in ("ceilings", "unavailable", "rows", "models")}
        found["battery"]["errors"] = assemble.errors(store)
        pictures |= report.pictures("cpu")
        lines += assemble.battery_lines(store)
    if found["unavailable"]:
        lines += ["## Unavailable in the sections above", ""]
        lines += [f"- {peer}: {why}" for peer, why in found["unavailable"].items()] + [""]
    lines += [f"![{title}]({name})" for name, title in pictures.items()]
    schema.write(out / "cpu.json", found)
    (out / "cpu.md").write_text("\n".join(lines).rstrip() + "\n")


def write_section(out: Path, name: str, value: dict[str, Any]) -> None:
    """One section alone into the cpu.json, cpu.md and pictures of an earlier run, and README.md where it shows them.

    A folder that no earlier run left its files in gets the section's own, as `peft.json` and `peft.md`.
    """
    if not (out / "cpu.json").exists():
        schema.write(out / f"{name}.json", value)
        (out / f"{name}.md").write_text("\n".join(sections.section_lines(name, value)).strip() + "\n")
        pictures = sections.draw({name: value}, out)
        print(f"written to {out}: {', '.join([f'{name}.json', f'{name}.md', *pictures])}")
        return
    found = json.loads((out / "cpu.json").read_text())
    found["sections"][name] = value
    text = sections.replaced((out / "cpu.md").read_text(), name, value)
    schema.write(out / "cpu.json", found)
    (out / "cpu.md").write_text(text)
    sections.draw({name: value}, out)
    _tell_readme(out)


def _begun(report: Report) -> str:
    """What a run starts from."""
    store = report.store()
    if store.message or len(store.lines) == 1:  # the header
        return store.message or f"{report.device.name()}: nothing measured yet"
    file, date = report.path.name, store.header.get("date")
    return f"{report.device.name()}: {len(store.of('row'))} rows there, begun {date}; delete {file} to begin afresh"


def _cpu_surroundings(device: Device, head: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "device": {"name": device.name(), **device.details()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": surroundings.version("triton"),
        "peft": surroundings.version("peft"),
        "date": head["date"],
        "commit": head["commit"],
    }


def _cpu_title(found: dict[str, Any]) -> list[str]:
    device = found["device"]
    versions = f"torch {found['torch']}, triton {found['triton']}, peft {found['peft']}"
    where = f"{device['name']}, {device['cores']} cores, {device['threads']} threads"
    return ["# Measured on a CPU", "", f"{where}; {versions}; {found['date']}, commit {found['commit']}."]


def _say_resume(report: Report) -> None:
    again = " ".join(["python -m benchmarks.report", *sys.argv[1:]])
    print(
        f"\nNot complete: the time is up. What is there is in {report.path.name}; the same command goes on:\n  {again}"
    )


def _run_card(args: argparse.Namespace, device: Device) -> bool:
    """The battery of a card; whether result files were written."""
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(device, "cuda", args.out, args.minutes, args.quick, args.stages, args.rounds)
    print(_begun(report), flush=True)
    for peer, reason in peers.unavailable().items():
        print(f"  {peer}: {reason}", flush=True)
    if not (args.no_tests or args.quick):
        report.tests()
    complete = report.run_stages()
    files = report.write()
    rows = [line["row"] for line in assemble.row_lines(report.store())]
    print("\n" + assemble.target_text(rows) + "\n", flush=True)
    print(assemble.group_target_text(rows, report.store().note("grouped")) + "\n", flush=True)
    print(assemble.nf4_targets_of(report.store()) + "\n", flush=True)
    for error in assemble.errors(report.store())[:20]:
        print(f"left out: {error['what']}: {error['reason']}")
    if files:
        print(f"written: {', '.join(path.name for path in files)}")
    if not complete:
        _say_resume(report)
    return bool(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a card if there is one")
    parser.add_argument("--minutes", type=float, help="all the time there is; without it everything is measured")
    parser.add_argument("--quick", action="store_true", help="target table only, no tests; on a CPU fewer rounds too")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these stages (a card's battery only)")
    parser.add_argument("--rounds", type=int, help="timed rounds of every group (a card's battery only)")
    parser.add_argument("--no-tests", action="store_true", help="leave out pytest -m gpu")
    parser.add_argument(
        "--out", type=outputs.folder, default=RESULTS, metavar="DIR", help="benchmarks/results unless given"
    )
    args = parser.parse_args()
    device = devices.chosen(args.device)
    if device.kind == "cuda":
        written = _run_card(args, device)
    else:
        given = {"--stages": args.stages, "--rounds": args.rounds}
        wrong = [name for name, value in given.items() if value is not None]
        if wrong:
            print(f"{' and '.join(wrong)}: for a card's battery only, and this is a CPU", file=sys.stderr)
            raise SystemExit(2)
        written = run(args.out, args.quick, args.minutes) is not None
        if written:
            print(f"written: {', '.join(sorted(p.name for p in args.out.glob('cpu*') if p.suffix != '.jsonl'))}")
    if written:
        _tell_readme(args.out)


def _tell_readme(out: Path) -> None:
    """Rewrite README.md from the committed results; elsewhere say what does it."""
    if out.resolve() == RESULTS.resolve():
        print("README.md rewritten" if readme.update() else "README.md is up to date")
    else:
        print(f"README.md shows {RESULTS}: put the files there and run `python -m benchmarks.readme` to see them in it")


if __name__ == "__main__":
    main()
