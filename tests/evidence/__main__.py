"""Runs the calls on an instrument: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS.parent)]


def main() -> int:
    if sys.argv[1:2] == ["interpreter"]:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel
    os.environ["GLORA_KERNELS_TABLES"] = str(TESTS / "no_tables")  # what is shipped, not what was tuned here
    from evidence import table

    parser = argparse.ArgumentParser(prog="python tests/evidence", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("eager", "interpreter", "dry_card", "ttsem", "card"):
        command = commands.add_parser(name)
        command.add_argument("--form", nargs="+", default=[], help="the beginnings of forms' names")
    command = commands.add_parser("ncu")
    command.add_argument("report", type=Path, help="of Nsight Compute")
    command.add_argument("case", help="the layer's, as the benchmarks name it")
    commands.add_parser("table")
    args = parser.parse_args()
    if args.what == "table":
        table.TABLE.write_text(table.text())
        return 0
    if args.what == "ncu":
        table.profiled(args.report, args.case)
        return 0
    from evidence.runs import run

    wrong = []
    for form, kept in run(args.what, args.form):
        table.keep(args.what, form, kept)  # at once: a run that is cut short has proved something too
        wrong += [form] if kept is None else []
    print(f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
