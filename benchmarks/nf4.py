"""Layers over a 4-bit base: training, a few tokens, dequantizing alone, memory.

    python -m benchmarks.nf4 --device cpu     # into cpu.json, cpu.md and README.md
    python -m benchmarks.nf4 --device cuda    # the stages nf4, nf4-decode and nf4-parts of the card's battery

Training and a few tokens: the contestants of `benchmarks.quantized_peers`, each compared with float64 on the decoded
weight first, over the dense frozen layer in the same interleaved rounds; a few tokens also as the weight's bytes over
the time, beside the bandwidth of a copy. Dequantizing: `benchmarks.dequantizing`. Memory: `benchmarks.nf4_memory`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import battery, dequantizing, devices, grouped_text, nf4_memory, nf4_text, runner, surroundings
from benchmarks.battery import NO_LAYER
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.store import Store
from benchmarks.timing import progress, table
from glora_kernels.tools import outputs

ROUNDS = {"cpu": 11, "cuda": 25}
STAGES = ("nf4", "nf4-decode", "nf4-parts")


def measure(rounds: int = ROUNDS["cpu"], scale: str = "cpu") -> dict[str, Any]:
    """The section of a CPU: training, a few tokens, dequantizing, memory."""
    device = devices.get("cpu")
    begun, load = surroundings.now(), os.getloadavg()[0]
    rates = device.ceilings()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "nf4.jsonl", surroundings.header(device, scale))
        for group in progress(battery.nf4_groups(scale), "4-bit base"):
            runner.run_group(group, device, rates, store, rounds, _quiet)
        found: dict[str, Any] = {"rows": [{"row": x["row"], "detail": x["detail"]} for x in store.of("row")]}
        left_out = {line["what"]: line["reason"] for line in store.of("error")}
    found["parts"] = measure_parts(scale, device, rates, rounds, _quiet)
    surrounding: dict[str, Any] = {"date": begun, "commit": surroundings.commit(), "copy_gbps": rates.gbps}
    surrounding["load"] = [load, os.getloadavg()[0]]  # before and after
    surrounding |= {"rounds": rounds, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return found | surrounding | {"left_out": left_out | NO_LAYER}


def _quiet(text: str) -> None:
    """Errors are in the result."""


def measure_parts(
    scale: str, device: Device, rates: Ceilings, rounds: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Dequantizing alone, and memory; the reason in the place of what failed."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "dequantize": lambda: dequantizing.measure(dequantizing.SIZES[scale], device, rates, rounds, say),
        "memory": lambda: nf4_memory.measure(nf4_memory.SIZES[scale], device, say),
    }
    return runner.run_parts(parts, device, say)


def show(result: dict[str, Any]) -> str:
    """The section as Markdown."""
    lines = result["rows"]
    row = lines[0]["row"]
    head = (
        f"N = K = {row['n']}, {row['dtype']}, NF4 in blocks of 64, double quantization, {result['threads']} threads "
        f"on {result['cores']} cores, {grouped_text.load(result)}, {result['rounds']} rounds; {result['date']}, "
        f"commit {result['commit']}. Medians of the ratios of the rounds, p20 to p80 behind them; a few tokens: the "
        f"time, and the weight's bytes over it beside a copy's {result['copy_gbps']:.3g} GB/s."
    )
    found = [head, "", table(nf4_text.training_table(lines)), "", table(nf4_text.decode_table(lines)), ""]
    found += nf4_text.part_lines(result["parts"])
    found += [f"- left out: {what}: {why}" for what, why in result["left_out"].items()]
    return "\n".join(found).rstrip()


def plot(result: dict[str, Any], path: Path) -> None:
    """The picture of the section."""
    nf4_text.picture(result["rows"], result["parts"]).savefig(path, dpi=130)


def main() -> None:
    from benchmarks import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a card if there is one")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 11 on a CPU, 25 on a card)")
    parser.add_argument("--minutes", type=float, help="on a card: all the time there is; run it again to go on")
    parser.add_argument(
        "--out", type=outputs.folder, default=report.RESULTS, metavar="DIR", help="benchmarks/results unless given"
    )
    parser.add_argument(
        "--json", type=outputs.file, metavar="PATH", help="on a CPU: only write the figures here, as JSON"
    )
    args = parser.parse_args()
    device = devices.chosen(args.device)
    if device.kind == "cuda":
        sys.argv = ["report", "--device", "cuda", "--no-tests", "--out", str(args.out), "--stages", *STAGES]
        sys.argv += [] if args.rounds is None else ["--rounds", str(args.rounds)]
        sys.argv += [] if args.minutes is None else ["--minutes", str(args.minutes)]
        report.main()
        return
    result = measure(args.rounds or ROUNDS["cpu"])
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        report.write_section(args.out, "nf4", result)


if __name__ == "__main__":
    main()
