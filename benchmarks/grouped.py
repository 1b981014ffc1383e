"""Layers that read one input, launches of a decoder layer, and merging a whole model.

    python -m benchmarks.grouped --device cpu     # into cpu.json, cpu.md and README.md
    python -m benchmarks.grouped --device cuda    # the stages `groups` and `depth` of the card's battery

Three figures. Sets: q/k/v and gate/up with LoRA, the contestants of `benchmarks.grouped_peers`, forward and forward +
backward, each over one product with the set's concatenated weights in the same interleaved rounds; each is compared
with float64 first. Launches: those of the seven linears of a decoder layer; ours as planned for an architecture, from
the shapes alone, others as the operators that PyTorch dispatches, all by the profiler too where there is a card.
Merging: every linear of a model, one launch on a card, over the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import battery, cases, devices, grouped_peers, grouped_text, merging, runner, surroundings
from benchmarks.battery import LLAMA, SIBLINGS, SiblingEntry
from benchmarks.cases import Contestant
from benchmarks.devices import Device, tensors_of
from benchmarks.floor import Ceilings
from benchmarks.peers import Unavailable
from benchmarks.store import Store
from benchmarks.timing import progress, table
from glora_kernels.runtime import environment
from glora_kernels.tools import outputs

ARCH = "sm_90"
RANK = 16
ALONE = {"o": ("o",), "down": ("down",)}
"""The linears of a decoder layer that share their input with no other."""

CONTESTANTS = {
    "frozen": ("frozen", "eager"), "ours": ("lora", "ours"), "single": ("lora", "single"),
    "eager": ("lora", "eager"), "peft": ("lora", "peft"),
}  # fmt: skip
"""By name: what the launches of a decoder layer are counted of."""

NO_LAUNCH = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
"""Operators that move nothing and yet return no view by their schema."""


class OperatorCounter(TorchDispatchMode):
    """Counts the operators below autograd that do something on the device: all but views and allocations.

    Of our registered operators those inside are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "glora_kernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        views = [ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns]
        if not any(views) and func.overloadpacket.__name__ not in NO_LAUNCH:
            self.count += 1
        return func(*args, **(kwargs or {}))


def measure(rounds: int = 15, scale: str = "cpu") -> dict[str, Any]:
    """The section of a CPU: sets, launches and merging."""
    device = devices.get("cpu")
    begun, load = surroundings.now(), os.getloadavg()[0]
    rates = device.ceilings()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "grouped.jsonl", surroundings.header(device, scale))
        for group in progress(battery.sibling_groups(scale), "sets of layers"):
            runner.run_group(group, device, rates, store, rounds, _quiet)
        found = {"rows": [{"row": line["row"], "detail": line["detail"]} for line in store.of("row")]}
        left_out = {line["what"]: line["reason"] for line in store.of("error")}
    found |= measure_depth(scale, device, rates, rounds, _quiet)
    surrounding: dict[str, Any] = {"date": begun, "commit": surroundings.commit()}
    surrounding["load"] = [load, os.getloadavg()[0]]  # before and after
    surrounding |= {"rounds": rounds, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return found | surrounding | {"left_out": left_out}


def _quiet(text: str) -> None:
    """Errors are in the result."""


def measure_depth(
    scale: str, device: Device, rates: Ceilings, rounds: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Launches of a decoder layer, and merging; the reason in the place of what failed."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "launches": lambda: launches(device),
        "merge": lambda: merging.measure(merging.SIZES[scale], device, rates, rounds),
    }
    return runner.run_parts(parts, device, say)


def launches(device: Device, m: int = 8192) -> dict[str, Any]:
    """What the seven linears of a decoder layer launch, forward and backward, with x in training.

    Raises:
        AssertionError: a contestant that is counted is not right.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in CONTESTANTS:
        if name in ("ours", "single"):
            if environment.has_triton():
                rows[name] = planned(name == "ours", m)
        else:
            try:
                rows[name] = counted(name)
            except Unavailable:
                continue
        if device.kind == "cuda" and name in rows:
            try:
                rows[name]["on_card"] = on_card(name, device, m)
            except RuntimeError as reason:  # a profiler that another tool holds must not cost what is planned
                rows[name]["on_card_error"] = runner.describe(reason)
    return {"arch": ARCH, "m": m, "rank": RANK, "rows": rows}


def planned(fused: bool, m: int = 8192, arch: str = ARCH) -> dict[str, Any]:
    """The steps of our layers for a card that need not be here: launches and products of the library.

    fused: q/k/v and gate/up as one call each, as `fuse_siblings` makes them.
    """
    from glora_kernels.tools.planned import How, Linear, linear

    config, how = cases.case_config("lora", RANK), How(m, torch.bfloat16, arch)
    sets: dict[str, int] = {}
    backward = 0
    for name, ones in (SIBLINGS | ALONE).items():
        if fused and len(ones) > 1:
            sets[name], after = _grouped_steps([LLAMA[one] for one in ones], m, arch)
        else:
            plans = [linear(Linear(config, *LLAMA[one]), how) for one in ones]
            sets[name] = sum(len(plan.forward) for plan in plans)
            after = sum(len(plan.backward) for plan in plans) + len(ones) - 1  # autograd adds the dx up
        backward += after
    return {"forward": sum(sets.values()), "backward": backward, "sets": sets, "how": f"planned for {arch}"}


def _grouped_steps(shapes: list[tuple[int, int]], m: int, arch: str) -> tuple[int, int]:
    """Forward and backward steps of one set of siblings with its own factors."""
    from glora_kernels.grouped import triton as grouped_triton
    from glora_kernels.grouped.group import ABSENT, Group, GroupNeeds, Operands
    from glora_kernels.runtime.planning import planning

    def meta(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    count, k = len(shapes), shapes[0][1]
    operands = Operands([meta(m, k)], [meta(*shape) for shape in shapes], [meta(RANK, k) for _ in shapes],
                        [meta(n, RANK) for n, _ in shapes], [], [])  # fmt: skip
    every, none = list(range(count)), [ABSENT] * count
    group = Group([0] * count, every, every, every, none, none, [2.0] * count, 0.0, "triton")
    with planning(arch) as forward:
        ys, hs = grouped_triton.forward(operands, group)
    with planning(arch) as backward:
        grouped_triton.backward(ys, operands, hs, group, GroupNeeds([True], [True] * count, [True] * count, []))
    return len(forward), len(backward)


def counted(name: str) -> dict[str, Any]:
    """The operators of one contestant, which do not depend on the sizes: on small layers, on the CPU."""
    widths = {one: n // 128 for one, (n, _) in LLAMA.items()}
    forward = backward = 0
    for contestant, x, dy in _sets(name, devices.get("cpu"), 8, widths, 32, "fp32", check=True):
        with OperatorCounter() as counter:
            ys = tensors_of(contestant.forward(x))
        forward += counter.count
        with OperatorCounter() as counter:
            torch.autograd.grad(ys, [x, *contestant.params.values()], dy)
        backward += counter.count
    return {"forward": forward, "backward": backward, "how": "operators dispatched"}


def on_card(name: str, device: Device, m: int) -> int | None:
    """The kernels of one forward, by the profiler, at the sizes of LLaMA-3-8B; None where it sees none."""
    total = 0
    widths = {one: n for one, (n, _) in LLAMA.items()}
    for contestant, x, _ in _sets(name, device, m, widths, None, "bf16"):
        found = device.launches(lambda forward=contestant.forward, x=x: forward(x))  # type: ignore[misc]
        if found is None:
            return None
        total += found
    return total


def _sets(
    name: str, device: Device, m: int, widths: dict[str, int], k: int | None, dtype: str, check: bool = False
) -> Iterator[tuple[Contestant, Tensor, Any]]:
    """(contestant, x, dy) of q/k/v, gate/up, o and down; what stands alone is a set of one."""
    kind, impl = CONTESTANTS[name]
    for which, ones in (SIBLINGS | ALONE).items():
        own = [widths[one] for one in ones]
        rank, p = (None, None) if kind == "frozen" else (RANK, 0.0)
        how = "single" if impl == "ours" and len(ones) == 1 else impl
        inner = LLAMA[ones[0]][1] if k is None else k
        entry = SiblingEntry(f"{kind}:{which}", how, m, sum(own), inner, rank, p, dtype=dtype, widths=tuple(own))
        values = grouped_peers.make_values([entry], device)
        contestant = grouped_peers.check_entry(entry, values)[0] if check else grouped_peers.build(entry, values)
        values.forget()
        yield contestant, *values.inputs(contestant)[0]


def show(result: dict[str, Any]) -> str:
    """The section as Markdown."""
    lines = result["rows"]
    row = lines[0]["row"]
    head = (
        f"M={row['m']} K={row['k']} R={RANK} {row['dtype']}, {result['threads']} threads on {result['cores']} cores, "
        f"{grouped_text.load(result)}, {result['rounds']} rounds; {result['date']}, commit {result['commit']}. "
        f"{grouped_text.HEAD}"
    )
    found = [head, "", table(grouped_text.over_table(lines)), "", table(grouped_text.set_rows(lines)), ""]
    found += grouped_text.depth_lines(result)
    found += [f"left out: {what}: {why}" for what, why in result["left_out"].items()]
    return "\n".join(found).rstrip()


def plot(result: dict[str, Any], path: Path) -> None:
    """The picture of the sets."""
    grouped_text.picture(result["rows"]).savefig(path, dpi=130)


def main() -> None:
    from benchmarks import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a card if there is one")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 15 on a CPU, 25 on a card)")
    parser.add_argument(
        "--out", type=outputs.folder, default=report.RESULTS, metavar="DIR", help="benchmarks/results unless given"
    )
    parser.add_argument(
        "--json", type=outputs.file, metavar="PATH", help="on a CPU: only write the figures here, as JSON"
    )
    args = parser.parse_args()
    device = devices.chosen(args.device)
    if device.kind == "cuda":
        sys.argv = ["report", "--device", "cuda", "--no-tests", "--out", str(args.out), "--stages", "groups", "depth"]
        sys.argv += [] if args.rounds is None else ["--rounds", str(args.rounds)]
        report.main()
        return
    result = measure(args.rounds or 15)
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        report.write_section(args.out, "grouped", result)


if __name__ == "__main__":
    main()
