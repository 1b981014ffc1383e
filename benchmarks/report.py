"""Everything a CPU can measure, in order: products, small adapters, host cost, time over frozen.

    python -m benchmarks.report            # a few minutes
    python -m benchmarks.report --quick    # a fast pass with few rounds

Writes cpu.json (device, versions, date, commit, sections), cpu.md (the same as tables) and PNGs into --out,
which is benchmarks/results unless given. A peer that is not installed is listed under "unavailable" with the
reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, host, products, ratios, small_adapters
from benchmarks.cases import Shape

RESULTS = Path(__file__).parent / "results"
SECTIONS: dict[str, tuple[str, Any]] = {
    "products": ("Matrix products and saved memory", products),
    "small_adapters": ("Small adapters in 16 bits", small_adapters),
    "host": ("Host cost of one call", host),
    "ratios": ("Time over the frozen layer", ratios),
}
"""By section: its heading, and the module with `measure` and `show`."""


def measurements(quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each section runs."""
    if quick:
        return {
            "products": products.measure,
            "small_adapters": lambda: small_adapters.measure(("bf16",), 256),
            "host": lambda: host.measure(rounds=30),
            "ratios": lambda: ratios.measure(Shape(), rounds=5),
        }
    return {
        "products": products.measure,
        "small_adapters": small_adapters.measure,
        "host": host.measure,
        "ratios": lambda: ratios.measure(Shape(), rounds=30),
    }


def surroundings() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "device": {"name": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    device = report["device"]
    lines = [
        "# Measured on a CPU",
        "",
        f"{device['name']}, {device['cores']} cores, {device['threads']} threads; torch {report['torch']}, "
        f"triton {report['triton']}, peft {report['peft']}; {report['date']}, commit {report['commit']}.",
    ]
    for name, (title, module) in SECTIONS.items():
        lines += ["", f"## {title}", "", f"`python -m {module.__name__}`", ""]
        lines.append(module.show(report["sections"][name]))
    if report["unavailable"]:
        lines += ["", "## Unavailable", ""]
        lines += [f"- {peer}: {why}" for peer, why in report["unavailable"].items()]
    return "\n".join(lines) + "\n"


def run(out: Path, quick: bool) -> dict[str, Any]:
    """Measure everything and write the files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = surroundings() | {
        "quick": quick,
        "unavailable": cases.unavailable(),
        "sections": {},
    }
    todo = measurements(quick)
    for i, name in enumerate(SECTIONS, start=1):
        title, module = SECTIONS[name]
        print(f"[{i}/{len(SECTIONS)}] {title}", flush=True)
        result = todo[name]()
        report["sections"][name] = result
        print(f"{module.show(result)}\n", flush=True)
    if importlib.util.find_spec("matplotlib") is None:
        report["unavailable"]["plots"] = "matplotlib is not installed"
    else:
        ratios.plot(report["sections"]["ratios"], out / "cpu_over_frozen.png")
        small_adapters.plot(report["sections"]["small_adapters"], out / "cpu_small_adapters.png")
    (out / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "cpu.md").write_text(markdown(report))
    return report


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout, marked where files differ from it; None outside a checkout."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one 16-bit dtype")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="benchmarks/results unless given")
    args = parser.parse_args()
    run(args.out, args.quick)
    print(f"written: {', '.join(sorted(path.name for path in args.out.glob('cpu*')))}")


if __name__ == "__main__":
    main()
