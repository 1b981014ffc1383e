"""How long a layer takes on a CPU, forward and backward, as a multiple of the frozen linear layer.

    python -m benchmarks.ratios --rounds 20 --threads 2

Frozen means W and b frozen and x requiring a gradient: two matrix products. Each round runs every contestant
once, in rotating order; a ratio is the median over the rounds of (contestant / frozen in that round), with
the 20th and 80th percentile beside it. Each contestant is compared with float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases import Contestant, Shape
from benchmarks.timing import Spread, interleaved, progress, ratio, table
from glora_kernels.tools import outputs

CASES = (
    "lora",
    "glora:vector,lora,none,none,none",
    "glora:vector,lora,vector,vector,vector",
    "glora:lora,lora,none,none,none",
    "glora:vector,vector,none,none,none",
)
PEERS = ("lora", "glora:vector,vector,none,none,none", "glora:lora,lora,none,none,none")
"""What PEFT has a layer for. C, D and E are absent, so the work is the same."""

TARGETS = {"lora": 1.12, "glora:vector,lora,none,none,none": 1.18, "glora:lora,lora,none,none,none": 1.70}
"""The most a layer should take over the frozen one, at the default shape."""

SPEEDUPS = {"glora:vector,vector,none,none,none": 2.2, "glora:lora,lora,none,none,none": 1.4}
"""The least by which ours should be faster than PEFT's, at the default shape."""


def contestants(shape: Shape, names: Sequence[str] = CASES, peers: Sequence[str] = PEERS) -> list[Contestant]:
    """The frozen layer, ours, and PEFT's where it is installed; each checked against float64."""
    found = [cases.frozen(cases.make_problem(shape, cases.case_config("lora", shape.r)))]
    for name in progress(names, "checking"):
        problem = cases.make_problem(shape, cases.case_config(name, shape.r))
        here = [cases.ours(problem)]
        if name in peers and not cases.unavailable():
            here.append(cases.peft(problem))
        for contestant in here:
            cases.check(contestant, problem)
        found += here
    return found


def measure(shape: Shape, rounds: int, threads: int | None = None) -> dict[str, Any]:
    """Time every contestant; the rows of the two tables (over frozen, over PEFT)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        layers = contestants(shape)
        problem = cases.make_problem(shape, cases.case_config("lora", shape.r))
        calls = {layer.name: partial(cases.step, layer, problem.x, problem.dy) for layer in layers}
        times = interleaved(calls, rounds, label="timing")
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    rows, speedups = [], []
    for layer in layers:
        over, took = ratio(times, layer.name, "frozen"), Spread.of(times[layer.name])
        target = TARGETS.get(layer.case) if layer.impl == "ours" and shape == Shape() else None
        row = {"case": layer.case, "impl": layer.impl, "over_frozen": over.median, "p20": over.p20}
        rows.append(row | {"p80": over.p80, "median_ms": 1e3 * took.median, "target": target})
        if layer.impl == "peft":
            gain = ratio(times, layer.name, layer.case)
            target = SPEEDUPS.get(layer.case) if shape == Shape() else None
            row = {"case": layer.case, "peft_over_ours": gain.median, "p20": gain.p20, "p80": gain.p80}
            speedups.append(row | {"target": target})
    result: dict[str, Any] = {"shape": str(shape), "rounds": rounds, "threads": used, "rows": rows}
    return result | {"speedups": speedups, "unavailable": cases.unavailable()}


def show(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    rows = [dict(row, median_ms=f"{row['median_ms']:.1f}") for row in result["rows"]]
    rows = [row | {"target": _bound("≤", row["target"])} for row in rows]
    speedups = [row | {"target": _bound("≥", row["target"])} for row in result["speedups"]]
    text = f"{result['shape']}, {result['threads']} threads, {result['rounds']} rounds, forward and backward\n\n"
    text += table(rows)
    if speedups:
        text += "\n\nPEFT's time over ours:\n\n" + table(speedups)
    for peer, reason in result["unavailable"].items():
        text += f"\n\n{peer} unavailable: {reason}"
    return text


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the time over frozen, with the 20th to 80th percentile; PEFT's in another colour."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    colours = {"ours": "#2a6f97", "peft": "#bc6c25"}
    names = [row["case"] if row["impl"] == "eager" else f"{row['case']}  {row['impl']}" for row in rows]
    over = [row["over_frozen"] for row in rows]
    below = [row["over_frozen"] - row["p20"] for row in rows]
    above = [row["p80"] - row["over_frozen"] for row in rows]
    bars = axes.barh(names, over, xerr=[below, above], color=[colours.get(row["impl"], "#777") for row in rows])
    axes.bar_label(bars, [f"{value:.2f}" for value in over], padding=4)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlim(0.0, 1.15 * max(row["p80"] for row in rows))
    axes.invert_yaxis()
    axes.set_xlabel("forward + backward, over the frozen linear layer")
    axes.set_title(f"{result['shape']}, {result['threads']} CPU threads", fontsize=10)
    figure.savefig(path, dpi=150)


def _bound(sign: str, value: float | None) -> str | None:
    return None if value is None else f"{sign} {value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, default=1024, help="rows of x (default 1024)")
    parser.add_argument("--k", type=int, default=2048, help="in_features (default 2048)")
    parser.add_argument("--n", type=int, default=2048, help="out_features (default 2048)")
    parser.add_argument("--rank", type=int, default=8, help="rank of every low-rank support (default 8)")
    parser.add_argument("--dtype", choices=[name for name in cases.DTYPES if name != "fp64"], default="fp32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds, each times every layer once (default 20)")
    parser.add_argument("--json", type=outputs.file, metavar="PATH", help="write the figures as JSON")
    parser.add_argument("--plot", type=outputs.file, metavar="PATH", help="write a bar chart (PNG; needs matplotlib)")
    args = parser.parse_args()
    shape = Shape(args.m, args.k, args.n, args.rank, cases.DTYPES[args.dtype])
    result = measure(shape, args.rounds, args.threads)
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
