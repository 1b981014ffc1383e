"""One group from values to rows: build, check against float64, count, time, and write what came of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import cases, decode, floor, grouped_peers, peers, schema
from benchmarks.battery import DecodeEntry, Entry, Group, SiblingEntry, row_key
from benchmarks.cases import Contestant, Problem
from benchmarks.devices import Call, Device, tensors_of
from benchmarks.floor import Ceilings
from benchmarks.grouped_peers import SiblingValues
from benchmarks.peers import Unavailable
from benchmarks.store import Store
from benchmarks.timing import Spread
from benchmarks.values import Values, shared_values


class DeviceLost(Exception):
    """The device no longer answers this process; another process may go on."""


@dataclass
class Measured:
    """An entry that passed its check: what is timed, and what is known of it already."""

    entry: Entry
    contestant: Contestant
    max_rel_err: float
    note: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def make_values(group: Group, device: Device) -> Values | SiblingValues:
    """Random values on the device for a group."""
    first = group.entries[0]
    if isinstance(first, SiblingEntry):
        return grouped_peers.make_values([entry for entry in group.entries if isinstance(entry, SiblingEntry)], device)
    return shared_values(list(group.entries), device)


def run_group(
    group: Group, device: Device, ceilings: Ceilings, store: Store, rounds: int, say: Callable[[str], None] = print
) -> None:
    """Measure what the store does not have of a group; every row and every error is written at once.

    Raises:
        DeviceLost: an error after which this process cannot use the device; the error itself is stored.
    """
    done = store.settled()
    missing = {row_key(*which) for which in group.row_keys()} - done
    if not missing:
        return
    if store.struck_out(group.key):
        for key in sorted(missing):
            store.add("error", key=key, impl=key.split("|")[1], what=key, reason="did not finish in several attempts")
        return
    store.add("begin", key=group.key)
    with _collected(device):
        measured = list(_checked(group, device, store, missing, say))
        _time(group, measured, device, ceilings, store, missing, rounds)
    store.add("end", key=group.key)


@contextmanager
def _collected(device: Device) -> Iterator[None]:
    """Give all memory back at the end, however it ends."""
    try:
        yield
    finally:
        gc.collect()
        if device.healthy():
            device.free()


def _checked(
    group: Group, device: Device, store: Store, missing: set[str], say: Callable[[str], None]
) -> Iterator[Measured]:
    """Build and check every entry that is missing, and the frozen ones, which the others are compared with."""
    values: Values | SiblingValues | None = None
    for entry in group.entries:
        wanted = [row_key(entry, d, m) for d in group.passes for m in group.modes]
        if not entry.frozen and not missing.intersection(wanted):
            continue
        with _recorded(device, store, entry, [key for key in wanted if key in missing], say):
            if values is None:
                values = make_values(group, device)
            found = check_entry(entry, values)
            found.facts |= facts(found, values, device)
            found.facts["steps"] = {d: steps(found.contestant, values, d) for d in group.passes}
            yield found
    if values is not None:
        values.forget()


def check_entry(entry: Entry, values: Values | SiblingValues) -> Measured:
    """Build a contestant and compare it with float64 on the first input set.

    With dropout, ours is compared under its own mask, drawn before from the same state of the generators. The mask of a
    peer is not known: the peer is compared without dropout, in the same process.

    Raises:
        AssertionError: it is not right.
        Unavailable: it cannot be built here.
    """
    if isinstance(values, SiblingValues):
        assert isinstance(entry, SiblingEntry)
        return Measured(entry, *grouped_peers.check_entry(entry, values))
    if isinstance(entry, DecodeEntry):
        return Measured(entry, *decode.check_entry(entry, values))
    problem = values.of(entry)
    contestant = peers.build(entry, problem)
    if not entry.p:
        return Measured(entry, contestant, cases.check(contestant, problem, values.expected(entry, problem)))
    if entry.impl == "ours":
        return Measured(entry, contestant, _check_dropout(contestant, problem))
    plain = values.of(entry, p=0.0)
    error = cases.check(peers.build(replace(entry, p=0.0), plain), plain, values.expected(entry, plain))
    return Measured(entry, contestant, error, "compared without dropout: its mask is not known")


def steps(contestant: Contestant, values: Values | SiblingValues, direction: str) -> list[Call]:
    """One call for each input set: forward, or forward and backward. The results are dropped."""
    if isinstance(contestant, decode.DecodeContestant):
        assert isinstance(values, Values)
        return decode.steps(contestant, values)

    def forward(x: Tensor) -> Call:
        return lambda: contestant.forward(x)

    def both(x: Tensor, dy: Any) -> Call:
        return lambda: cases.gradients(contestant, x, dy)

    return [both(x, dy) if direction == "fwd_bwd" else forward(x) for x, dy in values.inputs(contestant)]


def row_figures(entry: Entry, direction: str, seconds: list[float], ceilings: Ceilings) -> dict[str, Any]:
    """What follows from the times of one row: percentiles, rates, the fraction of the floor."""
    spread = Spread.of(seconds)
    least = floor.work(entry, direction)
    floor_ms = floor.floor_ms(entry, ceilings, direction)
    further = decode.bandwidth(entry, spread.median, ceilings) if isinstance(entry, DecodeEntry) else {}
    return further | {
        "median_ms": 1e3 * spread.median,
        "p20_ms": 1e3 * spread.p20,
        "p80_ms": 1e3 * spread.p80,
        "tflops": least.flops / spread.median / 1e12,
        "gbps": least.bytes / spread.median / 1e9,
        "intensity": least.flops / least.bytes,
        "floor_ms": floor_ms,
        "of_floor": floor_ms / (1e3 * spread.median),
    }


def _check_dropout(contestant: Contestant, problem: Problem) -> float:
    from glora_kernels.glora.op import dropout_seed
    from glora_kernels.reference.random import keep_mask

    x, p = problem.x, problem.config.dropout
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # the key is drawn on the host, or on a card
        seed = dropout_seed(x.device)
    expected = cases.expectations(problem, keep_mask(seed.to(x.device), x.shape[0], x.shape[1], p))
    return cases.check(contestant, problem, expected)


def facts(measured: Measured, values: Values | SiblingValues, device: Device) -> dict[str, Any]:
    """What is counted, not timed, of a forward and backward on one input set."""
    contestant = measured.contestant
    if isinstance(contestant, decode.DecodeContestant):
        assert isinstance(values, Values)
        return decode.facts(contestant, values, device)
    x, dy = values.inputs(contestant)[0]

    def forward() -> Tensor:
        return contestant.forward(x)

    def step() -> object:
        return cases.gradients(contestant, x, dy)

    found: dict[str, Any] = {
        "saved_bytes": saved_bytes(measured, values, x),
        "held_bytes": device.held_bytes(forward),
        "peak_fwd": device.peak_bytes(forward),
        "peak_fwd_bwd": device.peak_bytes(step),
        "host_us": device.host_us(step),
    }
    if measured.entry.layer not in (None, "q", "down"):  # the profiler is slow to start; these two stand for the rest
        return found
    try:
        found["launches"] = device.launches(step)
    except RuntimeError as reason:  # a profiler that another tool holds must not cost the row
        found["launches_error"] = str(reason)[:200]
    return found


def saved_bytes(measured: Measured, values: Values | SiblingValues, x: Tensor) -> int:
    """Bytes autograd keeps between forward and backward beyond x, y and what the layer owns anyway."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    contestant = measured.contestant
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = contestant.forward(x)
    owned = [x, *tensors_of(y), *values.owned(measured.entry), *contestant.params.values()]
    if isinstance(contestant.forward, torch.nn.Module):
        owned += [*contestant.forward.parameters(), *contestant.forward.buffers()]
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    return sum(size for storage, size in found.items() if storage not in known)


def _time(
    group: Group,
    measured: list[Measured],
    device: Device,
    ceilings: Ceilings,
    store: Store,
    missing: set[str],
    rounds: int,
) -> None:
    """Time all that passed in the same rounds, one pass and mode after the other."""
    for direction in group.passes:
        for mode in group.modes:
            calls: dict[str, Call] = {}
            keys = {found.entry.key: row_key(found.entry, direction, mode) for found in measured}
            if not missing.intersection(keys.values()):
                continue
            for found in measured:
                key = keys[found.entry.key]
                with _recorded(device, store, found.entry, [key] if key in missing else []):
                    prepared = device.prepare(found.facts["steps"][direction], mode)
                    prepared()
                    device.synchronize()
                    calls[found.entry.key] = prepared
            rest = [found for found in measured if found.entry.key in calls]
            if not rest:
                continue
            with _recorded(device, store, rest[0].entry, [k for k in keys.values() if k in missing - store.settled()]):
                times = device.interleaved(calls, rounds)
                _write(rest, times, direction, mode, ceilings, store, missing)
            calls.clear()


def _write(
    measured: list[Measured],
    times: dict[str, list[float]],
    direction: str,
    mode: str,
    ceilings: Ceilings,
    store: Store,
    missing: set[str],
) -> None:
    frozen = [found.entry for found in measured if found.entry.reference]
    counts = {found.entry.key: len(found.facts["steps"][direction]) for found in measured}
    each = {key: [seconds / counts[key] for seconds in times[key]] for key in counts}
    for found in measured:
        entry, facts = found.entry, found.facts
        key = row_key(entry, direction, mode)
        if key not in missing:
            continue
        figures = row_figures(entry, direction, each[entry.key], ceilings)
        figures |= {"max_rel_err": found.max_rel_err, "saved_bytes": facts["saved_bytes"]}
        figures["peak_bytes"] = facts[f"peak_{direction}"]
        detail = {name: value for name, value in figures.items() if name not in schema.ROW_FIELDS}
        detail |= {name: facts[name] for name in ("held_bytes", "host_us", "launches") if name in facts}
        detail |= {
            "bias": entry.bias,
            "input_sets": counts[entry.key],
            "rounds": len(times[entry.key]),
            "note": found.note,
        }
        below = next((e for e in frozen if e.bias == entry.bias), frozen[0] if frozen else None)
        if below is not None:
            over = Spread.of([a / b for a, b in zip(each[entry.key], each[below.key], strict=True)])
            detail |= {"over_frozen": over.median, "over_frozen_p20": over.p20, "over_frozen_p80": over.p80}
        store.add("row", key=key, row=schema.make_row(entry, direction, mode, figures), detail=detail)


@contextmanager
def _recorded(
    device: Device, store: Store, entry: Entry, keys: list[str], say: Callable[[str], None] = print
) -> Iterator[None]:
    """Turn whatever goes wrong inside into stored errors of these rows.

    Raises:
        DeviceLost: the device does not answer afterwards.
    """
    reason = None
    try:
        yield
    except (Exception, SystemExit) as error:  # a contestant may fail in any way; the battery goes on
        reason = describe(error)
    if reason is None:
        return
    for key in keys:
        store.add("error", key=key, impl=entry.impl, what=str(entry), reason=reason)
    if keys:
        say(f"    left out: {entry}: {reason}")
    gc.collect()
    if not device.healthy():
        raise DeviceLost(reason)
    device.free()


def run_parts(
    parts: Mapping[str, Callable[[], dict[str, Any]]], device: Device, say: Callable[[str], None]
) -> dict[str, Any]:
    """What each part returned, or the reason in its place: one must not cost the others, nor the battery."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        reason = None
        try:
            found[name] = part()
        except Exception as error:
            reason = describe(error)
        if reason is not None:  # outside the handler, which would keep the failed part's tensors alive
            found[name] = {"error": reason}
            say(f"    left out: {name}: {reason}")
            if device.healthy():
                device.free()
    return found


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"
