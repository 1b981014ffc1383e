"""`python -m glora_kernels info | check | tune | bench | params`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from glora_kernels.tools.commands import bench, check, info, params, tune

COMMANDS: dict[str, Any] = {"info": info, "check": check, "tune": tune, "bench": bench, "params": params}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where something failed, 2 where it could not be tried."""
    parser = argparse.ArgumentParser(
        prog="python -m glora_kernels",
        description="GLoRA and LoRA layers at the cost of a frozen linear layer.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))
    args = parser.parse_args(argv)
    status: int = COMMANDS[args.command].run(args)
    return status


def run() -> int:
    """`main` for a shell: where the reader of a pipe has gone (`| head`), the status is 141, as of other programs."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail
        return 141


if __name__ == "__main__":
    sys.exit(run())
