"""`python -m glora_kernels tune`: measure launch configurations for your own shapes, and keep them in a table."""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

from glora_kernels.nn.targets import find_targets
from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import DTYPES
from glora_kernels.tools import outputs, timing, tune
from glora_kernels.tools.candidates import compilations, options
from glora_kernels.tools.commands import models, text
from glora_kernels.tools.commands.layer import called
from glora_kernels.tools.commands.printing import Refused, Report, Table
from glora_kernels.tools.tune import Task, text_of

HELP = "measure launch configurations for your own shapes on this GPU, and keep them in a table that launches read"
DESCRIPTION = """Measure launch configurations and routes for your own shapes on this GPU, and write what was found to \
a table, which every later process on such a GPU reads by itself. Only configurations that give the same result and \
are faster by more than noise are kept. A run that was stopped goes on where it was; nothing else ever tunes."""
FACTS = {
    "arch, dtype": "the card's architecture, and the dtype of x",
    "table": "the file that was written (null with --list)",
    "measured": "for each task and shape: what, shape, choice, times (ms), gain (share of the time saved), now (false: "
    "measured before), discarded",
    "left": "what there was no time for",
    "tried": "with --list, for each task and shape: what, shape, choices, of which the first is the default",
    "compilations": "with --list: about how many",
}
VIT_TOKENS = 64 * 197
"""The default tokens of vit-b-16: 64 images of 197."""

_ANY = Shape(1, 1, 1, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_config(parser, "the shapes of a model's linear layers")
    parser.add_argument("--tokens", type=text.positive, help="M of --config (default: 8192, of vit-b-16 64 x 197)")
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


def run(args: argparse.Namespace) -> Report:
    found = list(args.shape)
    if args.config:
        tokens = args.tokens or (VIT_TOKENS if args.config == models.VIT else 8192)
        found += [(tokens, *size) for size in _sizes(models.build(args.config, DTYPES[args.dtype]))]
    if not found and not args.module:
        raise Refused("say which shapes: --config llama-3-8b, --shape MxNxK, or --module NAME:FUNCTION")
    dense = args.four_bit != "only"
    kernels = [name for name in configs.TUNED if dense and name in args.kernels]
    kinds = kernels, dense and "routes" in args.kernels, args.four_bit is not None
    shapes = [Shape(m, n, k, args.rank) for m, n, k in dict.fromkeys(found)]
    what = tune.tasks(shapes, *kinds)
    if args.module:
        with text.refusing("--module"):
            call, x = called(args.module)
            args.dtype = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
            own = tune.tasks_of(call, x.requires_grad_(), args.arch or text.this_arch(), tune.tasks([_ANY], *kinds))
        what = list(dict.fromkeys([*what, *own]))
    if args.list:
        return _list(what, args.dtype, args.arch or text.this_arch())
    if not torch.cuda.is_available() or not environment.has_triton():
        lacks = "PyTorch sees no GPU here" if environment.has_triton() else "the triton package is not installed"
        raise Refused(f"it measures Triton kernels on a GPU, and {lacks}; --list shows what it would try")
    return _measured(what, args)


def _measured(what: list[Task], args: argparse.Namespace) -> Report:
    card = timing.this_gpu()
    try:
        path = outputs.file(args.out or environment.tables_directory() / f"{environment.slug(card.name)}.json")
    except argparse.ArgumentTypeError as error:
        raise Refused(str(error)) from error
    print(f"{card.name} ({card.arch}): {len({shape for _, shape in what})} shapes, table {path}", file=sys.stderr)
    facts = {"arch": card.arch, "dtype": args.dtype, "table": str(path), "measured": [], "left": []}
    try:
        result = tune.run(what, args.dtype, path, machine=card, again=args.again, minutes=args.minutes)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; what was measured is in {path}, and the same command goes on from there"
        ) from None
    except (ValueError, RuntimeError) as error:
        return Report(facts, [], [str(error)])
    tables.reload()
    better = [outcome for outcome in result.outcomes if outcome.gain > 0]
    lines = [tune.describe(one) + ("" if one.measured else "  (measured before)") for one in result.outcomes]
    lines.append(f"{len(better)} of {len(result.outcomes)} are faster than the default; table: {path}")
    if result.left:
        lines.append(f"{len(result.left)} left after {args.minutes:g} minutes: the same command goes on")
    if result.failed:
        lines.append("what failed is left at its default")
    measured = [
        {
            "what": one.row.what, "shape": one.shape._asdict(), "choice": one.row.choice, "times": one.row.times,
            "gain": one.gain, "now": one.measured, "discarded": one.discarded,
        }
        for one in result.outcomes
    ]  # fmt: skip
    return Report(facts | {"measured": measured, "left": result.left}, lines, result.failed)


def _sizes(model: nn.Module) -> list[tuple[int, int]]:
    """N and K of the linear layers of a model but its head, each once. Experts have kernels that are not tuned."""
    every = {layer: layer.base.shape for layer in find_targets(model, None, {}, [])[1]}
    return list(dict.fromkeys(every.values()))


def _list(what: list[Task], dtype: str, arch: str) -> Report:
    said: list[str | Table] = [f"on {arch}, {dtype}; the first of each is its default\n"]
    kernels = [(name, shape) for name, shape in what if name in configs.TUNED]
    tried = [(name, shape, options(name, arch, DTYPES[dtype], shape)) for name, shape in what]
    for shape in dict.fromkeys(shape for _, shape in kernels):
        rows = [(name, text_of(choice)) for name, of, choices in tried if of == shape for choice in choices]
        said.append(f"M={shape.m} N={shape.n} K={shape.k} R={shape.r}")
        said.append(Table(["kernel", "configuration"], [row for row in rows if row[0] in configs.TUNED]))
    if named := [(name, *shape, ", ".join(choices)) for name, shape, choices in tried if name not in configs.TUNED]:
        said.append(Table(["", "M", "N", "K", "R", "served by"], named))
    count = compilations(kernels, dtype, arch) if kernels else 0
    if kernels:
        said.append(f"about {count} compilations")
    listed = [{"what": name, "shape": shape._asdict(), "choices": choices} for name, shape, choices in tried]
    facts = {"arch": arch, "dtype": dtype, "table": None, "tried": listed, "compilations": count}
    return Report(facts, said)
