"""`python -m glora_kernels tune`: measure launch configurations for your own shapes, and keep them in a table."""

from __future__ import annotations

import argparse
import sys

import torch

from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import DTYPES
from glora_kernels.tools import outputs, timing, tune
from glora_kernels.tools.candidates import compilations, options
from glora_kernels.tools.commands import text
from glora_kernels.tools.commands.layer import called
from glora_kernels.tools.shipped import LAYERS
from glora_kernels.tools.tune import Task, text_of

HELP = "measure launch configurations for your own shapes on this GPU, and keep them in a table that launches read"
DESCRIPTION = """Measure launch configurations and routes for your own shapes on this GPU, and write what was found to a
table, which every later process on such a GPU reads by itself. Only configurations that give the same result and are
faster by more than noise are kept. A run that was stopped goes on where it was; nothing else ever tunes."""
MODELS = {"llama-3-8b": ("LLaMA-3-8B", 8192), "vit-b-16": ("ViT-B/16", 64 * 197)}
"""For each model of --layers: its name in `shipped.LAYERS` and the default tokens (vit-b-16: 64 images of 197)."""


_ANY = Shape(1, 1, 1, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--layers", choices=sorted(MODELS), help="the shapes of a known model's layers")
    parser.add_argument("--tokens", type=text.positive, help="M of --layers (default: 8192, of vit-b-16 64 x 197)")
    parser.add_argument(
        "--shape", type=text.sizes, action="append", default=[], metavar="MxNxK",
        help="tokens x out_features x in_features; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--module", metavar="NAME:FUNCTION",
        help="the shapes that a module of your own asks for, of every kind: FUNCTION of the Python module NAME is "
        "called with the meta device as default, and returns it and its input",
    )  # fmt: skip
    parser.add_argument("--rank", type=text.positive, default=16, help="R (default: 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
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
    found = list(args.shape)
    if args.layers:
        model, tokens = MODELS[args.layers]
        found += [(args.tokens or tokens, *size) for name, size in LAYERS.items() if name.startswith(f"{model} ")]
    if not found and not args.module:
        return text.refused("tune: say which shapes: --layers llama-3-8b, --shape MxNxK, or --module NAME:FUNCTION")
    dense = args.four_bit != "only"
    kernels = [name for name in configs.TUNED if dense and name in args.kernels]
    kinds = kernels, dense and "routes" in args.kernels, args.four_bit is not None
    shapes = [Shape(m, n, k, args.rank) for m, n, k in dict.fromkeys(found)]
    what = tune.tasks(shapes, *kinds)
    if args.module:
        try:
            call, x = called(args.module)
            args.dtype = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
            own = tune.tasks_of(call, x.requires_grad_(), args.arch or text.this_arch(), tune.tasks([_ANY], *kinds))
        except (ValueError, RuntimeError) as error:
            return text.refused(f"tune --module: {error}")
        what = list(dict.fromkeys([*what, *own]))
    if args.list:
        return _list(what, args.dtype, args.arch or text.this_arch())
    if not torch.cuda.is_available() or not environment.has_triton():
        lacks = "PyTorch sees no GPU here" if environment.has_triton() else "the triton package is not installed"
        return text.refused(
            f"tune measures Triton kernels on a GPU, and {lacks}; `tune --list` shows what it would try"
        )
    card = timing.this_gpu()
    try:
        path = outputs.file(args.out or environment.tables_directory() / f"{environment.slug(card.name)}.json")
    except argparse.ArgumentTypeError as error:
        return text.refused(f"tune: {error}")
    print(f"{card.name} ({card.arch}): {len({shape for _, shape in what})} shapes, table {path}", file=sys.stderr)
    try:
        result = tune.run(what, args.dtype, path, machine=card, again=args.again, minutes=args.minutes)
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


def _list(what: list[Task], dtype: str, arch: str) -> int:
    print(f"on {arch}, {dtype}; the first of each is its default\n")
    kernels = [(name, shape) for name, shape in what if name in configs.TUNED]
    tried = [(name, shape, options(name, arch, DTYPES[dtype], shape)) for name, shape in what]
    for shape in dict.fromkeys(shape for _, shape in kernels):
        rows = [(name, text_of(choice)) for name, of, choices in tried if of == shape for choice in choices]
        print(f"M={shape.m} N={shape.n} K={shape.k} R={shape.r}")
        print(text.table(["kernel", "configuration"], [row for row in rows if row[0] in configs.TUNED]))
    if named := [(name, *shape, ", ".join(choices)) for name, shape, choices in tried if name not in configs.TUNED]:
        print(text.table(["", "M", "N", "K", "R", "served by"], named))
    if kernels:
        print(f"about {compilations(kernels, dtype, arch)} compilations")
    return 0
