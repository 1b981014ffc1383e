"""What launching costs the host on a card, in microseconds a layer, and over PEFT's LoRA layer; without a card.

    python -m benchmarks.host_launch --rounds 60

Layers of tests/dry_card: Triton's real launch path over a driver that runs nothing, so that its own time, about two
microseconds a launch, is not in the figures. Eight layers in a chain, bf16, 4096 features, forward and backward, or
forward without gradients where a token is decoded; autograd changes threads once a chain. PEFT's layer and the frozen
one are PyTorch's on CPU tensors of size 1: next to no arithmetic, and a CPU's dispatch, which is less than a card's.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dry_card import card, forms  # isort: skip  # installs the card, which comes before torch

import torch
from torch import Tensor, nn

from benchmarks.cells import table
from benchmarks.devices import Spread
from glora_kernels.tools import outputs, timing

CHAIN = 8
INNER = 5  # steps in a row: in training too a chain follows one like it
PEFT, PEFT_FORWARD = "PEFT's LoRA, CPU, size 1", "PEFT's LoRA, CPU, size 1, forward"


def chained(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What the last layer makes, and what else each one did: q leads on, k and v are ends."""
    ends: list[Tensor] = []
    for layer in layers:
        x, *others = forms.forward(layer, x)
        ends += others
    return [x, *ends]


def training(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], None]:
    """A step of a chain: forward, backward, no gradients left."""
    dys = [torch.ones_like(y) for y in chained(layers, x)]
    trained = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        torch.autograd.backward(chained(layers, x), dys)
        for tensor in trained:
            tensor.grad = None

    return step


def decoding(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            chained(layers, x)

    return step


def contestants(only: Sequence[str] = ()) -> dict[str, Callable[[], None]]:
    """PEFT's, the frozen layer's, and of ours all or `only` some."""
    one = torch.ones(1, 1, requires_grad=True)
    small = [nn.Linear(1, 1, bias=False).requires_grad_(False) for _ in range(2 * CHAIN)]
    theirs = [forms.peft(linear, r=1).base_model.model.linear for linear in small[CHAIN:]]
    found = {PEFT: training(theirs, one), "frozen, CPU, size 1": training(small[:CHAIN], one)}
    for name, (make, m) in forms.TRAINED.items():
        if not only or name in only:
            found[name] = training([make() for _ in range(CHAIN)], forms.tensor(m, 4096, grad=True))
    found[PEFT_FORWARD] = decoding(theirs, one.detach())
    for name, (make, m) in forms.DECODED.items():
        if not only or name in only:
            found[name] = decoding([make().eval() for _ in range(CHAIN)], forms.tensor(m, 4096))
    return found


def measure(rounds: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Microseconds and launches a layer; over PEFT's forward and backward, or over its forward."""
    torch.set_num_threads(1)
    calls = contestants(only)
    counts = {}
    for name, call in calls.items():
        call()  # compiles
        before = card.launches()
        call()
        counts[name] = (card.launches() - before) / CHAIN
    gc.collect()
    gc.disable()
    with card.unrecorded():
        taken = timing.clock_timer([[call] * INNER for call in calls.values()], rounds)
    gc.enable()
    times, rows = dict(zip(calls, taken, strict=True)), []
    for name in calls:
        over = Spread.ratio(times[name], times[PEFT_FORWARD if name in (PEFT_FORWARD, *forms.DECODED) else PEFT])
        row: dict[str, Any] = {"layer": name, "launches": counts[name]}
        row |= {"us": 1e3 * Spread.of(times[name]).median / CHAIN, "least_us": 1e3 * min(times[name]) / CHAIN}
        rows.append(row | over.named("over_peft"))
    return {"rounds": rounds, "chain": CHAIN, "rows": rows}


def show(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [
        {
            "layer": row["layer"], "launches": f"{row['launches']:g}", "µs": f"{row['us']:.1f}",
            "least": f"{row['least_us']:.1f}", "over PEFT's": f"{row['over_peft']:.2f}",
            "20 to 80%": f"{row['over_peft_p20']:.2f} to {row['over_peft_p80']:.2f}",
        } for row in result["rows"]
    ]  # fmt: skip
    taken = f"a layer, in a chain of {result['chain']}, 1 thread, median of {result['rounds']} rounds"
    return f"{taken}; q/k/v fused: three layers\n\n" + table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="how often each chain is timed (default 60)")
    parser.add_argument("--json", type=outputs.file, metavar="PATH", help="write the figures as JSON")
    parser.add_argument("--only", nargs="+", default=(), choices=[*forms.TRAINED, *forms.DECODED], help="of our layers")
    args = parser.parse_args()
    result = measure(args.rounds, args.only)
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    card.leave()


if __name__ == "__main__":
    main()
