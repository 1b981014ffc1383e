"""What every example has: the arguments for where it runs and writes, and how a mean over its seeds is shown."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch


def add_where(parser: ArgumentParser, out: str, holds: str) -> None:
    """--device, --backend and --out. holds: what the folder is for."""
    add = parser.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    add("--backend", choices=["auto", "eager", "triton", "cuda"], default="auto", help="what the layers run on")
    add("--out", type=Path, default=Path(out), help=f"folder for the {holds}")


def need(parser: ArgumentParser, condition: bool, argument: str, message: str) -> None:
    """End the process with code 2 where an argument does not keep a condition."""
    if not condition:
        parser.error(f"argument {argument}: {message}")


def settle_where(parser: ArgumentParser, args: Namespace) -> None:
    """Check --device and --out, and choose the device."""
    need(parser, args.device != "cuda" or torch.cuda.is_available(), "--device", "PyTorch finds no CUDA device here")
    need(parser, args.out.is_dir() or not args.out.exists(), "--out", f"{args.out} exists and is not a folder")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"


def plus_minus(mean: float, deviation: float, count: int, form: str = ".4f") -> str:
    """The mean ± its deviation; of one value the value alone."""
    return f"{mean:{form}}" + (f" ± {deviation:{form.removeprefix('+')}}" if count > 1 else "")
