"""`python -m glora_kernels tune`: measure launch configurations for one's own shapes, and keep them in a table."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from glora_kernels.runtime import configs
from glora_kernels.tools import outputs
from glora_kernels.tools.commands import text

if TYPE_CHECKING:
    from torch import Tensor

    from glora_kernels.runtime.configs import Shape
    from glora_kernels.tools.four_bit_tune import Step
    from glora_kernels.tools.trials import Data
    from glora_kernels.tools.tune import Pass

HELP = "measure launch configurations for your own shapes on this GPU, and keep them in a table that launches read"
DESCRIPTION = """Measure launch configurations and routes for your own shapes on this GPU, and write what was found to a
table, which every later process on such a GPU reads by itself. Only configurations that give the same result and are
faster by more than noise are kept. A run that was stopped goes on where it was; nothing else ever tunes."""
LAYERS: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "llama-3-8b": (8192, ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))),
    "vit-b-16": (12608, ((768, 768), (2304, 768), (3072, 768), (768, 3072))),
}
"""Tokens (of vit-b-16: 64 images of 197), and the different (N, K) of a model's layers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--layers", choices=sorted(LAYERS), help="the shapes of a known model's layers")
    parser.add_argument("--tokens", type=text.positive, help="M of --layers (default: 8192, of vit-b-16 64 x 197)")
    parser.add_argument(
        "--shape", type=text.sizes, action="append", default=[], metavar="MxNxK",
        help="tokens x out_features x in_features; repeatable",
    )  # fmt: skip
    parser.add_argument("--rank", type=text.positive, default=16, help="R (default: 16)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: bf16")
    parser.add_argument(
        "--kernels", nargs="+", choices=(*configs.TUNED, "routes"), default=[*configs.TUNED, "routes"],
        metavar="KERNEL",
        help=f"which of {', '.join(configs.TUNED)}, and routes (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--four-bit", nargs="?", const="also", choices=("also", "only"),
        help="measure also, or only, what serves 4-bit layers of these sizes: csrc, Triton or a dense workspace, "
        "for the dense weight and at 1 to 64 tokens whatever M is",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=outputs.file, metavar="FILE", help="the table (default: where launches look for it)"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after this long (default: 8)")
    parser.add_argument("--again", action="store_true", help="measure anew what is in the table already")
    parser.add_argument(
        "--list", action="store_true", help="print what would be tried, and measure nothing; needs no GPU"
    )
    parser.add_argument(
        "--arch", type=text.architecture, help="with --list: the card's (default: this GPU's, else sm_90)"
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from glora_kernels.runtime import environment, tables
    from glora_kernels.runtime.configs import Shape
    from glora_kernels.tools import machine, tune

    found = list(args.shape)
    if args.layers:
        tokens, layers = LAYERS[args.layers]
        found += [(args.tokens or tokens, n, k) for n, k in layers]
    if not found:
        print("tune: say which shapes: --layers llama-3-8b, or --shape MxNxK", file=sys.stderr)
        return 2
    shapes = [Shape(m, n, k, args.rank) for m, n, k in dict.fromkeys(found)]
    dense = args.four_bit != "only"
    kernels = [name for name in configs.TUNED if dense and name in args.kernels]
    if args.list:
        here = environment.arch(torch.cuda.current_device()) if torch.cuda.is_available() else "sm_90"
        return _list(shapes, args.dtype, args.arch or here, kernels, args.four_bit is not None)
    if not torch.cuda.is_available() or not environment.has_triton():
        lacks = "PyTorch sees no GPU here" if environment.has_triton() else "the triton package is not installed"
        print(
            f"tune measures Triton kernels on a GPU, and {lacks}; `tune --list` shows what it would try",
            file=sys.stderr,
        )
        return 2
    card = machine.this_gpu()
    try:
        path = outputs.file(args.out or environment.tables_directory() / f"{environment.slug(card.name)}.json")
    except argparse.ArgumentTypeError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    passes = whole_pass if dense and "routes" in args.kernels else None
    few = None if args.four_bit is None else few_tokens
    print(f"{card.name} ({card.arch}): {len(shapes)} shapes, table {path}", file=sys.stderr)
    try:
        result = tune.run(
            shapes, args.dtype, path, machine=card, passes=passes, few=few, kernels=kernels, again=args.again,
            minutes=args.minutes,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\nstopped; what was measured is in {path}, and the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 1
    tables.reload()
    for outcome in result.outcomes:
        print(tune.describe(outcome) + ("" if outcome.measured else "  (measured before)"))
    better = [outcome for outcome in result.outcomes if outcome.gain > 0]
    print(f"{len(better)} of {len(result.outcomes)} are faster than the default; table: {path}")
    for line in result.failed:
        print(f"failed, left at its default: {line}", file=sys.stderr)
    if result.left:
        print(f"{len(result.left)} left after {args.minutes:g} minutes: the same command goes on", file=sys.stderr)
    return 1 if result.failed else 0


def whole_pass(data: Data, backward: bool, scales: bool) -> Pass:
    """One forward, or one backward with all gradients, of LoRA with a bias (`scales`: with A as a vector)."""
    from glora_kernels.dispatch.common import Call, Needs, Supports
    from glora_kernels.glora import triton as path
    from glora_kernels.runtime import tables

    x, w, dy = data["x"], data["w"], data["dy"]
    s = Supports(a=data["a"] if scales else None, b_up=data["up"], b_down=data["b_down"], bias=data["bias"])
    call = Call(2.0, 0.0, None, False, "triton")

    def forward() -> dict[str, Tensor]:
        y, h, _, _ = path.forward(x, w, s, call)
        return {"y": y} | ({} if h is None else {"h": h})

    if not backward:
        return forward
    with tables.using(None):
        y, h, sigma, u = path.forward(x, w, s, call)
    needs = Needs(True, *(name in ("b_up", "b_down") or (scales and name == "a") for name in Supports._fields))

    def both() -> dict[str, Tensor]:
        grads = path.backward(dy, x, w, s, y, h, sigma, u, call, needs)
        return {name: grad for name, grad in zip(Needs._fields, grads, strict=True) if grad is not None}

    return both


def few_tokens(data: Data) -> Step:
    """One forward of LoRA with a bias over a 4-bit weight."""
    from glora_kernels.dispatch.common import Call, Supports
    from glora_kernels.glora import triton as path
    from glora_kernels.tools.four_bit_tune import SCALE

    x, codes, call = data["x"], data.codes(), Call(SCALE, 0.0, None, False, "auto")
    s = Supports(b_up=data["up"], b_down=data["b_down"], bias=data["bias"])

    def forward() -> dict[str, Tensor]:
        y, h, _, _ = path.forward(x, codes, s, call)
        return {"y": y} | ({} if h is None else {"h": h})

    return forward


def _list(shapes: list[Shape], dtype: str, arch: str, kernels: list[str], four_bit: bool) -> int:
    from glora_kernels.runtime import tables
    from glora_kernels.tools import four_bit_tune, tune

    print(f"on {arch}, {dtype}; the first of each kernel is its default\n")
    for shape in shapes if kernels else []:
        rows = []
        for kernel in kernels:
            for config in tune.candidates(kernel, arch, tables.DTYPES[dtype], shape):
                rows.append((kernel, " ".join(f"{name}={value}" for name, value in config.items())))
        print(f"M={shape.m} N={shape.n} K={shape.k} R={shape.r}")
        print(text.table(["kernel", "configuration"], rows))
    if four_bit:
        head = ["", "M", "N", "K", "R", "served by"]
        served = {four_bit_tune.task_of(name): ", ".join(kinds) for name, kinds in tables.FOUR_BIT.items()}
        print(text.table(head, [(task, *shape, served[task]) for shape, task in four_bit_tune.tasks(shapes)]))
    if kernels:
        print(f"about {tune.compilations(shapes, dtype, arch, kernels)} compilations")
    return 0
