"""`python -m glora_kernels check`: every kernel on this machine against the oracle."""

from __future__ import annotations

import argparse
import importlib.util
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
from glora_kernels.tools.commands.printing import Refused, Report, Table

HELP = "test every kernel on this machine against the oracle (about a minute)"
DESCRIPTION = """Compare every result of the kernels of dense layers with the literal mathematics in float64, on a GPU \
or, through Triton's interpreter, on a CPU. An error of up to twice that of plain PyTorch at the same dtype, plus a \
floor, is allowed. The last line says how many passed, or names what failed."""
FACTS = {
    "device": "cpu or cuda",
    "results": "for each route, dtype and result: kernel, cases, passed, and of the worst case its error, what is "
    "allowed, their ratio (worst) and the case",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text.add_device(parser, ", where the Triton kernels run in Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="the path of plain PyTorch in fp32 alone (seconds)")


def run(args: argparse.Namespace) -> Report:
    device, start = text.device(args), time.perf_counter()
    kernels = environment.has_triton() and not args.quick
    if device == "cpu" and kernels and not environment.interpreting():
        rows = _interpreted()
    else:
        rows = _rows(device, kernels, args.quick)
    failed = [row for row in rows if not row.passed]
    columns = ["route", "dtype", "result", "kernel", "cases", "error", "allowed", "ok"]
    cells = [
        (r.route, r.dtype, r.result, r.kernel, r.cases, f"{r.error:.1e}", f"{r.allowed:.1e}",
         "yes" if r.passed else "NO") for r in rows
    ]  # fmt: skip
    where = "in Triton's interpreter" if kernels else "in plain PyTorch"
    how = where if device == "cpu" else torch.cuda.get_device_name()
    said = [
        f"{row.route} {row.dtype} {row.result} ({row.kernel}): error {row.error:.3e} over {row.allowed:.3e} "
        f"at {row.case}"
        for row in failed
    ]
    return Report(
        {"device": device, "results": [vars(row) | {"passed": row.passed} for row in rows]},
        [
            Table(columns, cells),
            "error and allowed (twice plain PyTorch's at this dtype, plus a floor) are those of the worst case.",
            *said,
            f"{len(rows) - len(failed)} of {len(rows)} results passed on {device} ({how}): "
            f"{sum(r.cases for r in rows)} comparisons, {time.perf_counter() - start:.0f} s",
        ],
        [f"{row.route} {row.dtype} {row.result} ({row.kernel})" for row in failed],
    )


def _interpreted() -> list[selftest.Row]:
    """The rows of a process with TRITON_INTERPRET=1, which Triton reads when it is imported."""
    if importlib.util.find_spec("numpy") is None:
        raise Refused(
            "Triton's interpreter, in which kernels run without a GPU, needs numpy: pip install numpy, or --quick"
        )
    command = [sys.executable, "-m", "glora_kernels", "check", "--device", "cpu", "--json"]
    # numpy, with which it computes, warns of every NaN; there are cases of them.
    variables = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise Refused(f"the process in which Triton's interpreter runs ended with status {done.returncode}")
    results = json.loads(done.stdout)["results"]
    return [selftest.Row(**{name: value for name, value in row.items() if name != "passed"}) for row in results]


def _rows(device: str, kernels: bool, quick: bool) -> list[selftest.Row]:
    half = [torch.float32, torch.float16, torch.bfloat16]
    plans: list[tuple[Backend, list[torch.dtype]]] = [("eager", half[:1] if quick else [torch.float64, *half])]
    if kernels:
        plans.append(("triton", half))
    elif not quick:
        print("the triton package is not installed: its kernels are not checked", file=sys.stderr)
    return [row for route, dtypes in plans for row in selftest.run(device, route, dtypes, sys.stderr.isatty())]
