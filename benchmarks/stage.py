"""One stage of the battery in a process of its own, within a time budget; what it has is on the disk at once.

    python -m benchmarks.stage --stage target --out DIR --minutes 8.5

Ends with 0 when the stage is complete, 3 when the time ran out (run it again to go on) and 4 when the device stopped
answering this process (run it again: another process may go on). `benchmarks.report` runs all stages in order.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import battery, devices, grouped, model, nf4, peft_models, runner, surroundings
from benchmarks.battery import Stage
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.runner import DeviceLost
from benchmarks.schema import slug
from benchmarks.store import Store, header_of
from glora_kernels.tools import outputs

DONE, OUT_OF_TIME, DEVICE_LOST = 0, 3, 4
ONCE: dict[str, Callable[..., dict[str, Any]]] = {
    "grouped": grouped.measure_depth,
    "nf4": nf4.measure_parts,
    "peft": peft_models.measure_noted,
}
"""By note: what makes it."""
ROUNDS = {"cuda": 25, "cpu": 7, "tiny": 3}
T = TypeVar("T")


def store_path(out: Path, device: Device, scale: str) -> Path:
    """Where the lines of a device's battery are kept: <slug>.stage.jsonl; on a CPU cpu.stage.jsonl."""
    name = slug(device.name()) if device.kind == "cuda" else scale
    return out / f"{name}.stage.jsonl"


def find(scale: str, name: str) -> Stage:
    """A stage by its name or its number."""
    listed = battery.stages(scale)
    if name.isdigit() and int(name) < len(listed):
        return listed[int(name)]
    found = [stage for stage in listed if stage.name == name]
    if not found:
        raise SystemExit(f"--stage {name}: no such stage; there are {', '.join(stage.name for stage in listed)}")
    return found[0]


def ceilings(device: Device, store: Store) -> Ceilings:
    """The device's rates: measured once a run, then read from the store."""
    known = store.note("ceilings")
    if known is None:
        measured = device.ceilings()
        known = {"tflops": measured.tflops, "gbps": measured.gbps}
        store.add("note", name="ceilings", value=known)
    return Ceilings(known["tflops"], known["gbps"])


def complete(stage: Stage, store: Store, scale: str) -> bool:
    """Whether every row of a stage is there, or an error in its place."""
    settled = store.settled()
    rows = all(battery.row_key(*which) in settled for group in stage.groups for which in group.row_keys())
    models = stage.models is None or store.note(f"models {stage.models}") is not None
    return rows and models and (stage.once is None or store.note(stage.once) is not None)


def run(stage: Stage, scale: str, device: Device, store: Store, minutes: float, rounds: int, say=print) -> int:
    """Work through a stage until it is complete or the time is up; one of the exit codes."""
    end = time.monotonic() + 60 * minutes
    longest = 0.0

    def out_of_time() -> bool:
        return time.monotonic() + longest > end

    rates = ceilings(device, store)
    for i, group in enumerate(_progress(stage.groups, stage.name), start=1):
        if all(battery.row_key(*which) in store.settled() for which in group.row_keys()):
            continue
        if out_of_time():
            return OUT_OF_TIME
        begin = time.monotonic()
        first = group.entries[0]
        say(f"  {i}/{len(stage.groups)} {first.layer or f'{first.n}x{first.k}'} M={first.m}")
        try:
            runner.run_group(group, device, rates, store, rounds, say)
        except DeviceLost as reason:
            say(f"  the device stopped answering: {reason}")
            return DEVICE_LOST
        longest = max(longest, time.monotonic() - begin)
    if stage.models is not None:
        try:
            if not model.measure(stage.models, scale, device, store, max(3, rounds // 3), out_of_time, say):
                return OUT_OF_TIME
        except DeviceLost as reason:
            say(f"  the device stopped answering: {reason}")
            return DEVICE_LOST
        store.add("note", name=f"models {stage.models}", value=True)
    if stage.once is not None and store.note(stage.once) is None:
        if out_of_time():
            return OUT_OF_TIME
        _once(stage.once, scale, device, rates, store, rounds, say)
        if not device.healthy():
            return DEVICE_LOST
    return DONE


def _once(
    name: str, scale: str, device: Device, rates: Ceilings, store: Store, rounds: int, say: Callable[[str], None]
) -> None:
    """Note what the maker of a note finds; after attempts that did not end, that."""
    if store.struck_out(name):
        store.add("note", name=name, value={"error": "did not finish in several attempts"})
        return
    store.add("begin", key=name)
    store.add("note", name=name, value=ONCE[name](scale, device, rates, rounds, say))
    store.add("end", key=name)


def _progress(items: Iterable[T], label: str) -> Iterable[T]:
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, help="name or number of the stage")
    parser.add_argument("--out", type=outputs.folder, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.5, help="the stage's time (default 8.5)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--scale", choices=["cuda", "cpu", "tiny"], help="which battery (default: the device's)")
    parser.add_argument("--rounds", type=int, help="timed rounds of every group")
    parser.add_argument("--go-on", action="store_true", help="take the rows there as they are: the caller compared")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = devices.chosen(args.device)
    scale = args.scale or device.kind
    path = store_path(args.out, device, scale)
    store = Store(path, header_of(path) if args.go_on else surroundings.header(device, scale))
    if store.message:
        print(store.message)
    say: Callable[[str], None] = lambda text: print(text, flush=True)  # noqa: E731
    rounds = args.rounds or ROUNDS[scale]
    sys.exit(run(find(scale, args.stage), scale, device, store, args.minutes, rounds, say))


if __name__ == "__main__":
    main()
