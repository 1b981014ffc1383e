"""`python -m glora_kernels check`: every kernel on this machine against the oracle."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import torch

from glora_kernels.runtime import environment
from glora_kernels.runtime.routes import Backend
from glora_kernels.tools import selftest
from glora_kernels.tools.commands import text

HELP = "test every kernel on this machine against the oracle (about a minute)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text.add_device(parser, ", where the Triton kernels run in Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="the path of plain PyTorch in fp32 alone (seconds)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    try:
        device = text.device(args)
    except ValueError as error:
        return text.refused(f"check: {error}")
    kernels = environment.has_triton() and not args.quick
    if device == "cpu" and kernels and not environment.interpreting():
        # Triton read TRITON_INTERPRET when it was imported: start a process that has it set.
        command = [sys.executable, "-m", "glora_kernels", "check", "--device", "cpu", *["--json"] * args.json]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode
    start, rows = time.perf_counter(), _rows(device, kernels, args.quick)
    failed = [row for row in rows if not row.passed]
    if args.json:
        print(json.dumps([vars(row) | {"passed": row.passed} for row in rows], indent=1))
    else:
        columns = ["route", "dtype", "result", "kernel", "cases", "error", "allowed", "ok"]
        cells = [
            (r.route, r.dtype, r.result, r.kernel, r.cases, f"{r.error:.1e}", f"{r.allowed:.1e}",
             "yes" if r.passed else "NO") for r in rows
        ]  # fmt: skip
        print(text.table(columns, cells))
        how = "in Triton's interpreter" if device == "cpu" else torch.cuda.get_device_name()
        print("error and allowed (twice plain PyTorch's at this dtype, plus a floor) are those of the worst case.")
        print(
            f"{len(rows) - len(failed)} of {len(rows)} results within their tolerance on {device} ({how}), "
            f"{sum(r.cases for r in rows)} comparisons in {time.perf_counter() - start:.0f} s"
        )
    for row in failed:  # last, where a reader of a long table looks
        print(
            f"FAILED: {row.route} {row.dtype} {row.result} ({row.kernel}): error {row.error:.3e} over "
            f"{row.allowed:.3e} at {row.case}",
            file=sys.stderr if args.json else sys.stdout,
        )
    return 1 if failed else 0


def _rows(device: str, kernels: bool, quick: bool) -> list[selftest.Row]:
    half = [torch.float32, torch.float16, torch.bfloat16]
    plans: list[tuple[Backend, list[torch.dtype]]] = [("eager", half[:1] if quick else [torch.float64, *half])]
    if kernels:
        plans.append(("triton", half))
    elif not quick:
        print("the triton package is not installed: its kernels are not checked", file=sys.stderr)
    return [row for route, dtypes in plans for row in selftest.run(device, route, dtypes, sys.stderr.isatty())]
