"""GLoRA as LyCORIS has it at the sizes of diffusion models: LyCORIS's module and ours, over the frozen layer.

    OMP_NUM_THREADS=1 python -m benchmarks.lycoris_ratios
    python -m benchmarks.lycoris_ratios --device cuda --dtype bf16 --out benchmarks/results/lycoris/cuda.md

A step is forward and backward, with dx and every gradient of the adapter. All take turns in every round; a ratio is the
median of the rounds' own. Each result is compared with float64 before anything is timed. On a card LyCORIS's rebuild is
timed by its Triton kernels, its default there, and by PyTorch's operations.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import devices, peers, problems, results
from benchmarks.cases import Entry
from benchmarks.devices import Spread
from benchmarks.problems import Contestant, Problem
from glora_kernels import GLoRAConfig

SHAPES = {
    "DiT projection": (4096, 1536, 1536, 32),
    "SDXL feed-forward, out": (1024, 1280, 5120, 16),
    "SDXL cross-attention, k": (77, 1280, 2048, 16),
}
"""M, N, K, R."""
CONTESTANTS: dict[str, Callable[[Problem], Contestant]] = {
    "LyCORIS, rebuild (default)": partial(peers.lycoris, backend="torch"),
    "LyCORIS, rebuild, Triton": partial(peers.lycoris, backend="triton"),
    "LyCORIS, bypass": partial(peers.lycoris, bypass=True),
    "ours": peers.ours,
}


def problem_of(m: int, n: int, k: int, r: int, dtype: str, device: torch.device) -> Problem:
    entry = Entry("glora:lora,lora,none,none,none", "ours", m, n, k, r=r, p=0.0, dtype=dtype)
    config = GLoRAConfig("lora", "lora", "none", "none", "none", rank=r, alpha=r, alpha_A=r, variant="matmul")
    return problems.make_problem(entry, device, config)


def steps_of(contestant: Contestant, problem: Problem) -> list[devices.Step]:
    return [lambda: problems.gradients(contestant, problem.x, problem.dy)]


def measure(problem: Problem, device: devices.Device, rounds: int) -> dict[str, Spread]:
    """The frozen layer's seconds, and by contestant the ratio to them."""
    frozen = Contestant(problems.base_layer(problem))
    steps, expected = {"frozen": steps_of(frozen, problem)}, problems.expectations(problem)
    for name, build in CONTESTANTS.items():
        try:
            contestant = build(problem)
        except (peers.Unavailable, ImportError) as reason:
            print(f"{name}: {reason}")
            continue
        problems.check(contestant, problem, expected)
        steps[name] = steps_of(contestant, problem)
    for one in steps.values():
        device.ready(one, "eager")
    taken = device.times(steps, "eager", rounds)
    ratios = {name: Spread.ratio(seconds, taken["frozen"]) for name, seconds in taken.items() if name != "frozen"}
    return {"frozen": Spread.of(taken["frozen"]), **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: cuda if there is")
    parser.add_argument("--dtype", choices=list(problems.DTYPES), default="fp32", help="default fp32")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contestant (default 11)")
    parser.add_argument("--out", type=Path, help="a file for the table")
    args = parser.parse_args()
    device = devices.get(args.device)
    on_cpu = device.kind == "cpu"
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()} " if on_cpu else ""
    command = f"{threads}python -m benchmarks.lycoris_ratios --device {device.kind} --dtype {args.dtype}"
    command += f" --rounds {args.rounds}"
    found = {
        name: measure(problem_of(*shape, args.dtype, device.torch_device), device, args.rounds)
        for name, shape in devices.progress(list(SHAPES.items()), "shapes")
    }
    names = [name for name in CONTESTANTS if any(name in row for row in found.values())]
    lines = [
        f"Forward and backward over the frozen layer: median [p20, p80] of {args.rounds} rounds. {device.name()}, "
        f"{args.dtype}; Python {platform.python_version()}, torch {torch.__version__}, lycoris-lora "
        f"{version('lycoris-lora')}; `{command}`.",
        "",
        f"| layer | M x K → N, r | frozen, ms | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for name, row in found.items():
        m, n, k, r = SHAPES[name]
        cells = [name, f"{m} x {k} → {n}, {r}", f"{1e3 * row['frozen'].median:.1f}"]
        for one in names:
            spread = row.get(one)
            cells.append("–" if spread is None else f"{spread.median:.2f} [{spread.p20:.2f}, {spread.p80:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
    results.put_out("\n".join(lines) + "\n", args.out)


if __name__ == "__main__":
    main()
