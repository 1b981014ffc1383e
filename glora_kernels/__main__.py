"""`python -m glora_kernels info | check | tune | warmup | bench | params`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from glora_kernels.tools.commands import bench, check, info, params, printing, tune, warmup

COMMANDS: dict[str, Any] = {
    "info": info, "check": check, "tune": tune, "warmup": warmup, "bench": bench, "params": params
}  # fmt: skip
"""Each has HELP and DESCRIPTION, FACTS (the keys of its JSON), `add_arguments`, and `run`, which returns a `Report`."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status, which the help of every command documents."""
    parser = argparse.ArgumentParser(
        prog="python -m glora_kernels",
        description="GLoRA and LoRA layers at close to the cost of the frozen layer.",
        epilog="COMMAND --help has the options, the keys of --json, and the exit status.",
        formatter_class=printing.Help,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name, help=module.HELP, description=printing.wrapped(module.DESCRIPTION),
            epilog=printing.epilog(module.FACTS), formatter_class=printing.Help,
        )  # fmt: skip
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON (see below) instead of text")
    args = parser.parse_args(argv)
    try:
        report = COMMANDS[args.command].run(args)
    except printing.Refused as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(*stop.args or (f"{args.command}: interrupted",), file=sys.stderr)
        return 130
    return printing.show(args.command, report, args.json)


if __name__ == "__main__":
    sys.exit(printing.quietly(main))
