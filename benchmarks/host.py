"""What one layer call costs on the host, in microseconds: Python, dispatch, autograd, hardly any maths.

    python -m benchmarks.host --rounds 200

M=1, K=N=16, one thread. On a GPU the same work runs while the device is busy, and it is what a small layer
waits for. Forward is timed with gradients enabled and the graph dropped; forward+backward adds the gradients.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch

from benchmarks import cases
from benchmarks.cases import Contestant, Shape
from benchmarks.timing import Spread, interleaved, table
from glora_kernels.tools import outputs

SHAPE = Shape(m=1, k=16, n=16, r=4)
CASES = ("lora", "glora:vector,lora,none,none,vector")
"""LoRA, and GLoRA with a vector A and E."""


def contestants(shape: Shape = SHAPE) -> tuple[dict[str, Contestant], torch.Tensor, torch.Tensor]:
    """F.linear, nn.Linear, ours and PEFT's by name, with the x and dy they are called with."""
    problem = cases.make_problem(shape, cases.case_config("lora", shape.r))
    weight, bias = problem.weight, problem.bias
    plain = Contestant("F.linear", "eager", lambda x: torch.nn.functional.linear(x, weight, bias))
    found = {"F.linear": plain, "nn.Linear": cases.frozen(problem)}
    for case in CASES:
        here = cases.make_problem(shape, cases.case_config(case, shape.r))
        found[f"ours {case}"] = cases.ours(here)
        cases.check(found[f"ours {case}"], here)
    if not cases.unavailable():
        found["peft lora"] = cases.peft(problem)
        same = cases.make_problem(shape, cases.case_config("glora:vector,vector,none,none,none", shape.r))
        found["peft glora:vector,vector,none,none,none"] = cases.peft(same)
    return found, problem.x, problem.dy


def measure(rounds: int = 200, inner: int = 50) -> dict[str, Any]:
    """Microseconds a call, each round timing `inner` calls of everything."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layers, x, dy = contestants()
        forward = {name: partial(layer.forward, x) for name, layer in layers.items()}
        both = {name: partial(cases.step, layer, x, dy) for name, layer in layers.items()}
        forward_times = interleaved(forward, rounds, inner, warmup=inner, label="forward")
        both_times = interleaved(both, rounds, inner, warmup=inner, label="forward+backward")
    finally:
        torch.set_num_threads(threads)
    rows = []
    for name in layers:
        fwd, fwd_bwd = Spread.of(forward_times[name]), Spread.of(both_times[name])
        row: dict[str, Any] = {"layer": name}
        row |= {"fwd_us": 1e6 * fwd.median, "fwd_p20": 1e6 * fwd.p20, "fwd_p80": 1e6 * fwd.p80}
        row |= {"fwd_bwd_us": 1e6 * fwd_bwd.median}
        row |= {"fwd_bwd_p20": 1e6 * fwd_bwd.p20, "fwd_bwd_p80": 1e6 * fwd_bwd.p80}
        rows.append(row)
    return {"shape": str(SHAPE), "rounds": rounds, "inner": inner, "rows": rows}


def show(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [
        {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in row.items()}
        for row in result["rows"]
    ]
    taken = f"median of {result['rounds']} rounds of {result['inner']} calls"
    return f"{result['shape']}, 1 thread, {taken}\n\n" + table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="rounds of 50 calls (default 200)")
    parser.add_argument("--json", type=outputs.file, metavar="PATH", help="write the figures as JSON")
    args = parser.parse_args()
    result = measure(args.rounds)
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
