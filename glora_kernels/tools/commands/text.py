"""Arguments that the commands share: their types, and what they mean."""

from __future__ import annotations

import argparse
import contextlib
import re
import warnings
from collections.abc import Iterator

import torch

from glora_kernels.runtime import environment
from glora_kernels.spec import SUPPORTS, VARIANTS, GLoRAConfig
from glora_kernels.tools.commands.printing import Refused


def sizes(text: str) -> tuple[int, int, int]:
    """MxNxK: tokens, output features, input features."""
    found = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)[x×]([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be MxNxK, as 8192x4096x4096, got {text!r}")
    m, n, k = map(positive, found.groups())
    return m, n, k


def positive(text: str) -> int:
    """An integer from 1 to 2³¹ - 1, the largest 32-bit index."""
    if not re.fullmatch(r"[1-9]\d{0,9}", text) or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1 and < 2^31, got {text!r}")
    return int(text)


def architecture(text: str) -> str:
    """The architecture of a card, named as in `runtime.configs`, or "cpu"."""
    if not re.fullmatch(r"sm_\d+|gfx\w+|cpu", text):
        raise argparse.ArgumentTypeError(f"must be like sm_90 or gfx942, or cpu, got {text!r}")
    return text


def this_arch() -> str:
    """The architecture of this GPU; without one, sm_90."""
    return environment.arch(torch.cuda.current_device()) if torch.cuda.is_available() else "sm_90"


def add_device(parser: argparse.ArgumentParser, on_cpu: str = "") -> None:
    """Add --device. `on_cpu`: words of the help on a CPU."""
    words = f"default: a GPU if there is one, else the CPU{on_cpu}"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=words)


def device(args: argparse.Namespace) -> str:
    """The device that --device chooses, "cpu" or "cuda".

    Raises:
        Refused: there is no such device here.
    """
    here = torch.cuda.is_available()
    if args.device == "cuda" and not here:
        raise Refused("--device cuda was asked for, but PyTorch sees no GPU")
    return ("cuda" if here else "cpu") if args.device == "auto" else str(args.device)


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """Inside, warnings of this package are not printed but collected, each once."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))


@contextlib.contextmanager
def refusing(option: str = "") -> Iterator[None]:
    """Inside, errors of values and of states are what the command refuses; `option` stands before the message."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise Refused(f"{option}: {error}" if option else str(error)) from error


def add_case(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a layer's adapter."""
    parser.add_argument(
        "--case", default="lora", help="lora, or glora:A,B,C,D,E with the form of each support (default: lora)"
    )
    parser.add_argument("--rank", type=positive, default=16, help="R of the low-rank supports (default: 16)")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the low-rank path of B (default: 0)")
    parser.add_argument("--variant", choices=VARIANTS, default=VARIANTS[0], help="what A=lora is (default: hadamard)")
    parser.add_argument("--bias", action=argparse.BooleanOptionalAction, default=False, help="the base has a bias")


def case(args: argparse.Namespace) -> GLoRAConfig:
    """The configuration that the arguments of `add_case` describe.

    Raises:
        ValueError: an invalid --case, or values that `GLoRAConfig` refuses.
    """
    if args.case == "lora":
        return GLoRAConfig.lora(rank=args.rank, alpha=2 * args.rank, dropout=args.dropout)
    forms = args.case.removeprefix("glora:").split(",")
    if not args.case.startswith("glora:") or len(forms) != len(SUPPORTS):
        raise ValueError(
            f"--case must be lora or glora:A,B,C,D,E, as glora:vector,lora,none,none,none; got {args.case!r}"
        )
    return GLoRAConfig.of(forms, rank=args.rank, dropout=args.dropout, variant=args.variant)


def title(config: GLoRAConfig) -> str:
    """A configuration in words."""
    supports = [f"{name}={getattr(config, name)}" for name in SUPPORTS if getattr(config, name) != "none"]
    supports += [f"rank {config.rank}"] * ("lora" in (config.A, config.B, config.C))
    supports += [f"dropout {config.dropout:g}"] * (config.dropout > 0) + [config.variant] * (config.variant == "matmul")
    return ", ".join(supports) or "no support"
