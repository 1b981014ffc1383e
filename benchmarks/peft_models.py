"""A training step of PEFT's models before and after `accelerate`: time, peak memory, what backward keeps.

    python -m benchmarks.peft_models --device cpu     # into cpu.json, cpu.md and README.md
    python -m benchmarks.peft_models --device cuda    # the stage peft of the card's battery
    python -m benchmarks.peft_models --hidden 256 --layers 2 --json figures.json    # another size: nowhere else

A LLaMA made from its configuration, random weights, every linear of its layers adapted: LoRA, GLoRA and HiRA as PEFT
has them, LoRA with dropout too, and the frozen model. A step is forward, loss, backward and AdamW over the adapters;
every model carries the gradient through to the output of the embeddings. Before and after are models of their own over
the same frozen weights, each timed once a round, in an order that rotates; figures are medians of the ratios of the
rounds.

Nothing is timed unchecked: losses and every adapter's gradient after `accelerate` are compared with PEFT's model in
float64 first (`benchmarks.peft_models_build`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import devices, nf4_memory, peft_models_text, runner, schema, surroundings
from benchmarks.battery import FROZEN, LORA, LORA_LORA, VECTORS
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.peft_models_build import (
    AFTER,
    BEFORE,
    SIZES,
    Sizes,
    Trained,
    accelerated,
    check,
    make_base,
    peft_model,
    same_weights,
)
from benchmarks.peft_models_text import DROPPED, HIRA, TARGETS
from benchmarks.timing import Spread, progress, ratio
from glora_kernels.runtime import workspace
from glora_kernels.tools import outputs

ROUNDS = {"cpu": 9, "cuda": 25}
LEAST_ROUNDS = 3
"""So many are timed even where the time is up."""
CASES = (LORA, DROPPED, VECTORS, LORA_LORA, HIRA)


def memory(trained: Trained, sizes: Sizes, device: Device) -> dict[str, int]:
    """Bytes: held between steps (weights, adapters, moments, workspace), the peak of a step with them, what autograd
    saves beyond weights and adapters, and which of that is of the shape of a weight."""
    workspace.release()
    trained.step()  # whatever is made once is there
    held = [*trained.model.parameters(), *trained.model.buffers()]
    if trained.optimizer is not None:
        held += [v for state in trained.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    held_bytes = nf4_memory.tensor_bytes(held) + nf4_memory.workspace_bytes(device)
    peak = held_bytes + nf4_memory.peak_bytes(trained.step, device)
    return {"held_bytes": held_bytes, "peak_bytes": peak, **saved(trained, sizes)}


def saved(trained: Trained, sizes: Sizes) -> dict[str, int]:
    """What autograd keeps from the forward beyond weights, adapters and tokens: all, and what has a weight's shape."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trained.losses(trained.ids)
    owned = (*trained.model.parameters(), *trained.model.buffers(), trained.ids)
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept = [tensor for tensor in packed if tensor.untyped_storage().data_ptr() not in known]
    wide, narrow = sizes.intermediate, sizes.hidden
    shapes = {(narrow, narrow), (wide, narrow), (narrow, wide)}
    dense = [tensor for tensor in kept if tuple(tensor.shape) in shapes]
    return {"saved_bytes": nf4_memory.tensor_bytes(kept), "dense_bytes": nf4_memory.tensor_bytes(dense)}


def measure(
    rounds: int = ROUNDS["cpu"],
    sizes: Sizes = SIZES["cpu"],
    device: Device | None = None,
    minutes: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Every model's rows; `left_out` has the reason in the place of those of a case.

    Args:
        rounds: how often each is timed.
        sizes: the model and its batch.
        device: a CPU unless given.
        minutes: no round is begun that would end later, once there are LEAST_ROUNDS.
        say: where what is left out is told at once.
    """
    begin = time.monotonic()
    device = devices.get("cpu") if device is None else device
    begun, load = surroundings.now(), os.getloadavg()[0]
    trained: dict[str, Trained] = {}
    bytes_of: dict[str, dict[str, int]] = {}
    left_out: dict[str, str] = {}
    generator = torch.Generator(device.torch_device).manual_seed(1)
    ids = torch.randint(
        sizes.vocab, (sizes.batch, sizes.length), generator=generator, device=device.torch_device
    )  # fmt: skip
    base: nn.Module | None = None
    for case in progress((FROZEN, *CASES), "checking"):
        try:
            base = make_base(sizes, device.torch_device) if base is None else base
            pair = _pair(base, case, sizes, ids)
            found = {one.key: memory(one, sizes, device) for one in pair}
            trained |= {one.key: one for one in pair}
            bytes_of |= found
        except Exception as error:  # a case may fail in any way; the others go on
            left_out[peft_models_text.LABELS[case]] = runner.describe(error)
            say(f"    left out: {case}: {runner.describe(error)}")
            if not device.healthy():
                raise
        device.free()
    end = None if minutes is None else begin + 60 * minutes
    times = interleaved({key: one.step for key, one in trained.items()}, device, rounds, end)
    lines = [_line(one, sizes, times, bytes_of[one.key]) for one in trained.values()]
    done = len(next(iter(times.values()), []))
    surrounding: dict[str, Any] = {"device": device.name(), "date": begun, "commit": surroundings.commit()}
    surrounding |= {"load": [load, os.getloadavg()[0]], "rounds": done, "threads": torch.get_num_threads()}
    surrounding |= {name: surroundings.version(name) for name in ("torch", "peft", "transformers")}
    shape = {
        **asdict(sizes),
        "checked": list(sizes.checked),
        "intermediate": sizes.intermediate,
        "heads": sizes.heads,
        "kind": device.kind,
    }
    return {"models": lines, "sizes": shape, "cores": os.cpu_count(), **surrounding, "left_out": left_out}


def measure_noted(
    scale: str, device: Device, rates: Ceilings, rounds: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """`measure` as a stage of a card's battery calls it; the reason in its place where it failed."""
    try:
        return measure(rounds, SIZES[scale], device, say=say)
    except Exception as error:  # it must not cost the battery
        say(f"    left out: {runner.describe(error)}")
        return {"error": runner.describe(error)}


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: Device, rounds: int, end: float | None = None
) -> dict[str, list[float]]:
    """Seconds a call of each, one entry a round, in an order that rotates; fewer rounds where `end` comes before."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    longest = 0.0
    for i in progress(range(rounds), "timing"):
        begin = time.monotonic()
        if i >= LEAST_ROUNDS and end is not None and begin + longest > end:
            break
        start = i % max(1, len(names))
        for name in names[start:] + names[:start]:
            times[name].append(device.elapsed(calls[name], 1))
        longest = max(longest, time.monotonic() - begin)
    return times


def _pair(base: nn.Module, case: str, sizes: Sizes, ids: Tensor) -> list[Trained]:
    """PEFT's model before and after, compared with float64; of the frozen model, that alone."""
    if case == FROZEN:
        return [Trained(FROZEN, "eager", same_weights(base), ids)]
    model = peft_model(base, case, sizes)
    plain, fast = Trained(case, BEFORE, model, ids), Trained(case, AFTER, accelerated(model, sizes), ids)
    batch, length = sizes.checked
    check(plain, fast, ids[:batch, :length])
    return [plain, fast]


def _line(one: Trained, sizes: Sizes, times: Mapping[str, list[float]], found: Mapping[str, int]) -> dict[str, Any]:
    """A row of the results' `models`, and what it has no field for."""
    took = Spread.of(times[one.key])
    row: dict[str, Any] = peft_models_text.named_in_a_row(one.case, sizes.name)
    row |= {"impl": one.impl, "tokens": sizes.tokens}
    row |= {"median_ms": 1e3 * took.median, "tokens_per_s": sizes.tokens / took.median}
    row |= {"peak_bytes": found["peak_bytes"]}
    schema.check_model(row)
    detail: dict[str, Any] = {"p20_ms": 1e3 * took.p20, "p80_ms": 1e3 * took.p80}
    detail |= {name: found[name] for name in ("held_bytes", "saved_bytes", "dense_bytes")}
    detail |= {"max_rel_err": one.error, "trained": sum(value.numel() for value in one.params.values())}
    frozen, before = f"{FROZEN}|eager", f"{one.case}|{BEFORE}"
    if frozen in times:
        detail |= _named("over_frozen", ratio(times, one.key, frozen))
    if one.impl == AFTER:
        detail |= _named("faster", ratio(times, before, one.key)) | {"target": TARGETS.get(one.case)}
    return {"row": row, "detail": detail}


def _named(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_p20": spread.p20, f"{name}_p80": spread.p80}


show, plot = peft_models_text.show, peft_models_text.plot


def main() -> None:
    from benchmarks import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a card if there is one")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 9 on a CPU, 25 on a card)")
    parser.add_argument("--minutes", type=float, help="all the time there is: fewer rounds, three at least")
    parser.add_argument(
        "--out", type=outputs.folder, default=report.RESULTS, metavar="DIR", help="benchmarks/results unless given"
    )
    parser.add_argument("--json", type=outputs.file, metavar="PATH", help="only write the figures here, as JSON")
    parser.add_argument("--hidden", type=int, help="hidden size, a multiple of 64 (default: 1024, on a card 4096)")
    for name, text in (
        ("layers", "decoder layers (4)"),
        ("batch", "sequences (4)"),
        ("rank", "rank (8, on a card 16)"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--length", type=int, help="tokens of each (128, on a card 2048)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the model (fp32, on a card bf16)")
    args = parser.parse_args()
    device = devices.chosen(args.device)
    names = ("hidden", "layers", "batch", "length", "rank", "dtype")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if device.kind == "cuda" and not given and not args.json:
        sys.argv = ["report", "--device", "cuda", "--no-tests", "--out", str(args.out), "--stages", "peft"]
        sys.argv += [] if args.rounds is None else ["--rounds", str(args.rounds)]
        sys.argv += [] if args.minutes is None else ["--minutes", str(args.minutes)]
        report.main()
        return
    sizes = replace(SIZES[device.kind], **given)
    result = measure(args.rounds or ROUNDS[device.kind], sizes, device, args.minutes, print)
    print(show(result))
    if not result["models"]:
        raise SystemExit(1)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    elif given:
        print("\nOf another size than the report's: written nowhere; --json PATH keeps it.")
    else:
        report.write_section(args.out, "peft", result)


if __name__ == "__main__":
    main()
