"""What the commands share: argument types, and tables of text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from glora_kernels.spec import SUPPORTS, VARIANTS, GLoRAConfig


def sizes(text: str) -> tuple[int, int, int]:
    """MxNxK: tokens, output features, input features."""
    found = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)[x×]([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be MxNxK, as 8192x4096x4096, got {text!r}")
    m, n, k = map(positive, found.groups())
    return m, n, k


def positive(text: str) -> int:
    """An integer from 1 to the largest that an index of 32 bits holds."""
    if not re.fullmatch(r"[1-9]\d{0,9}", text) or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1 and < 2^31, got {text!r}")
    return int(text)


def architecture(text: str) -> str:
    """As the configurations name it."""
    if not re.fullmatch(r"sm_\d+|gfx\w+", text):
        raise argparse.ArgumentTypeError(f"must be like sm_90 or gfx942, got {text!r}")
    return text


def add_case(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which adapter a layer has."""
    parser.add_argument(
        "--case", default="lora", help="lora, or glora:A,B,C,D,E with the form of each support (default: lora)"
    )
    parser.add_argument("--rank", type=positive, default=16, help="R of the low-rank supports (default: 16)")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the low-rank path of B (default: 0)")
    parser.add_argument("--variant", choices=VARIANTS, default=VARIANTS[0], help="what A=lora is (default: hadamard)")
    parser.add_argument("--bias", action=argparse.BooleanOptionalAction, default=False, help="the base has a bias")


def case(text: str, rank: int, dropout: float, variant: str) -> GLoRAConfig:
    """The configuration of the arguments of `add_case`.

    Raises:
        ValueError: a case that is none, or values that `GLoRAConfig` refuses.
    """
    if text == "lora":
        return GLoRAConfig.lora(rank=rank, alpha=2 * rank, dropout=dropout)
    forms = text.removeprefix("glora:").split(",")
    if not text.startswith("glora:") or len(forms) != len(SUPPORTS):
        raise ValueError(f"--case must be lora or glora:A,B,C,D,E, as glora:vector,lora,none,none,none; got {text!r}")
    return GLoRAConfig.of(forms, rank=rank, dropout=dropout, variant=variant)


def table(head: Sequence[str], rows: Sequence[Any]) -> str:
    """Rows as columns of text under a head."""
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]) + "\n"
