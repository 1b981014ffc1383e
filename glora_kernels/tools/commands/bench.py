"""`python -m glora_kernels bench`: a quick look at what a layer costs over the frozen linear layer, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.nn import GLoRALinear
from glora_kernels.runtime.tables import DTYPES
from glora_kernels.tools import timing
from glora_kernels.tools.commands import text
from glora_kernels.tools.commands.printing import Refused, Report, Table

HELP = "time one layer over the frozen F.linear here, forward and backward (a quick look, some seconds)"
DESCRIPTION = """Time one layer over the frozen F.linear on this machine, one step at a time in interleaved rounds. \
The two times are those of the round whose ratio is the median, so they were measured together."""
FACTS = {
    "layer, m, dtype, device, threads, rounds": "what was timed, and where",
    "passes": "for each pass: frozen_ms, ours_ms, over_frozen, p20, p80 (of the ratio over the rounds)",
}
COLUMNS = ("frozen_ms", "ours_ms", "over_frozen", "p20", "p80")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer", type=text.sizes, metavar="MxNxK",
        help="tokens x out_features x in_features (default: 8192x4096x4096 on a GPU, 512x1024x1024 on a CPU)",
    )  # fmt: skip
    text.add_case(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    text.add_device(parser)
    parser.add_argument("--rounds", type=text.positive, default=20, help="interleaved rounds (default: 20)")


def run(args: argparse.Namespace) -> Report:
    device = text.device(args)
    try:
        m, n, k = args.layer or ((8192, 4096, 4096) if device == "cuda" else (512, 1024, 1024))
        dtype = DTYPES[args.dtype or ("bf16" if device == "cuda" else "fp32")]
        linear = nn.Linear(k, n, bias=args.bias, device=device, dtype=dtype)
        layer = GLoRALinear.from_linear(linear, text.case(args))
        inputs = [torch.randn(m, k, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        dy = torch.randn(m, n, device=device, dtype=dtype)
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes that do not fit the memory
        raise Refused(str(error).splitlines()[0]) from error
    with torch.no_grad():
        for parameter in layer.adapter().values():
            parameter.normal_(std=0.02)
    wanted = list(layer.adapter().values())

    def forward(module: nn.Module, x: Tensor) -> Any:
        return lambda: module(x)

    def both(module: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> Any:
        return lambda: torch.autograd.grad(module(x), [x, *parameters], dy)

    timer = timing.event_timer if device == "cuda" else timing.clock_timer
    passes = {
        "forward": ([forward(linear, x) for x in inputs], [forward(layer, x) for x in inputs]),
        "forward + backward": ([both(linear, x, []) for x in inputs], [both(layer, x, wanted) for x in inputs]),
    }
    rows = {name: row(*timer(contenders, args.rounds)) for name, contenders in passes.items()}
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} threads"
    name = str(dtype).removeprefix("torch.")
    facts = {
        "layer": str(layer), "m": m, "dtype": name, "device": device, "threads": threads, "rounds": args.rounds,
        "passes": {name: dict(zip(COLUMNS, values, strict=True)) for name, values in rows.items()},
    }  # fmt: skip
    return Report(facts, [
        f"{layer}\nM={m} tokens, {name}, {where}, {args.rounds} interleaved rounds, one step at a time\n"
        "The round whose ratio is the median; then the ratio's 20th and 80th percentile over the rounds.\n",
        Table(
            ["pass", *(column.replace("_", " ") for column in COLUMNS)],
            [(name, *(f"{value:.3f}" for value in values)) for name, values in rows.items()],
        ),
    ])  # fmt: skip


def row(frozen: Sequence[float], ours: Sequence[float]) -> tuple[float, ...]:
    """The row of a pass. The two times are those of the round with the median ratio, so they were measured together."""
    rounds = sorted((b / a, a, b) for a, b in zip(frozen, ours, strict=True))
    last = len(rounds) - 1
    over, a, b = rounds[last // 2]
    return a, b, over, rounds[round(0.2 * last)][0], rounds[round(0.8 * last)][0]
