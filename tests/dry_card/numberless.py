"""Runs a command of Python's on the dry card, where numbers mean nothing: none is compared, and nobody else is timed.

    python tests/dry_card tests/dry_card/numberless.py [--record DIR] -m MODULE [ARGUMENTS]

Tests run as in `gpu_tests`, with their kernels compiled and launched. Of the battery (`benchmarks`) and of `tune` every
call of ours is made as it would be timed, eagerly and under capture. --record notes what Triton compiles, for
`benchmarks.warm_cache`.
"""

from __future__ import annotations

import runpy
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dry_card import card

HERE = Path(__file__).resolve()


def put(owner: Any, name: str, value: Any) -> None:
    """In the place of what is there."""
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, value)


def unnumbered(python: Sequence[str]) -> None:
    """Leaves out what computes numbers, what compares them, and others. python: starts the process of a stage."""
    from benchmarks import bench_multi, bench_routed, devices, peers, problems, report
    from benchmarks.floor import Ceilings
    from glora_kernels.tools import trials

    built = peers.build

    def build(problem):
        if not problem.entry.frozen and problem.entry.impl not in ("ours", "single"):
            raise peers.Unavailable("only our kernels run on the dry card")
        return built(problem)

    def expectations(*args):
        return defaultdict(lambda: (None, 0.0))

    def no_peft(*args):
        raise ImportError

    put(torch, "randn", lambda *size, generator=None, **options: torch.empty(*size, **options))
    # A generator of the card's says here that it is the host's.
    put(problems, "normal", lambda generator, dtype, *size, std=1.0: torch.empty(size, dtype=dtype, device="cuda"))
    put(problems, "expectations", expectations)
    put(problems, "dropout_expectations", expectations)
    put(problems, "compare", lambda *args: 0.0)
    put(problems.Values, "copies", lambda self, entry: [self.of(entry)])  # a storage cannot be copied here
    put(peers, "build", build)
    put(bench_multi, "check", lambda *args: None)
    put(bench_multi.Layers, "_pefts", no_peft)
    put(bench_routed.Experts, "expected", lambda *args: None)
    put(bench_routed, "allowed_error", lambda *args: 0.0)
    put(devices.Cuda, "ceilings", lambda self: Ceilings(1.0, 1.0))
    put(devices.Cuda, "launches", lambda *args: None)
    put(trials.Data, "wrong", lambda *args: "")
    put(report, "PYTHON", list(python))
    if hasattr(torch.nn.functional, "grouped_mm"):
        del torch.nn.functional.grouped_mm


def main() -> None:
    arguments = sys.argv[1:]
    python = [sys.executable, str(HERE.parent), str(HERE)]
    if arguments[0] == "--record":
        from benchmarks import warm_cache

        warm_cache.record(Path(arguments[1]))
        python, arguments = [*python, *arguments[:2]], arguments[2:]
    assert arguments[0] == "-m", arguments
    if arguments[1:4] == ["pytest", "-m", "gpu"]:
        from dry_card import gpu_tests

        code, _ = gpu_tests.run(arguments[4:], compiles=True)
        card.leave(code)
    unnumbered(python)
    sys.argv[:] = arguments[1:]
    if arguments[1] == "benchmarks.report":  # which was changed: as __main__ it would be another one
        from benchmarks import report

        report.main()
    else:
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
