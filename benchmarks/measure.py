"""From cases to lines in the store: build, check against float64, count, time, and write what came of it at once.

Nothing is timed unchecked. Whatever goes wrong with a contestant becomes a stored reason in the place of its rows, and
the others go on. No piece of work is begun that would end after the time there is.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers, problems, schema
from benchmarks.cases import Entry, Group, Stage, row_key
from benchmarks.devices import Device, Spread, Step
from benchmarks.floor import Ceilings
from benchmarks.peers import Unavailable
from benchmarks.problems import Contestant, Values
from benchmarks.store import Store

OUT_OF_TIME, DEVICE_LOST = 10, 11
"""Exit codes of a process that another one can go on from."""
NO_END = "did not finish in several attempts"
ROUNDS = {"cuda": 25, "cpu": 11, "tiny": 3}


class OutOfTime(Exception):
    """The next piece of work would end after the time there is; another process goes on."""


class DeviceLost(Exception):
    """The device no longer answers this process; another process may go on."""


@dataclass
class Measured:
    """An entry that passed its check: what is timed, and what is known of it already."""

    entry: Entry
    contestant: Contestant
    max_rel_err: float
    note: str | None = None
    layers: list[Callable[[Tensor], Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)


@dataclass
class Bench:
    """What measures: a device, the battery's scale, the store that lines go to, and the time there is.

    minutes: all of it, or None. given_rounds: of every group, or None for the stages' own. say: what is left out.
    """

    device: Device
    scale: str
    store: Store
    minutes: float | None = None
    given_rounds: int | None = None
    say: Callable[..., None] = print
    longest: float = 0.0

    def __post_init__(self) -> None:
        self.rounds = self.given_rounds or ROUNDS[self.scale]
        self.end = None if self.minutes is None else time.monotonic() + 60 * self.minutes

    def ceilings(self) -> Ceilings:
        """The device's rates: measured once a run, then read from the store."""
        known = self.store.note("ceilings")
        if known is None:
            measured = self.device.ceilings()
            known = {"tflops": measured.tflops, "gbps": measured.gbps}
            self.store.add("note", name="ceilings", value=known)
        return Ceilings(known["tflops"], known["gbps"])

    @contextmanager
    def piece(self, key: str) -> Iterator[None]:
        """A piece of work, noted as begun and as ended; afterwards all memory is given back.

        Raises:
            OutOfTime: before it is begun.
        """
        begin = time.monotonic()
        if self.end is not None and begin + self.longest > self.end:
            raise OutOfTime(key)
        self.store.add("begin", key=key)
        try:
            yield
        finally:
            gc.collect()
            if self.device.healthy():
                self.device.free()
        self.longest = max(self.longest, time.monotonic() - begin)
        self.store.add("end", key=key)

    @contextmanager
    def attempt(self, what: str, impl: str, keys: list[str]) -> Iterator[None]:
        """Turn whatever goes wrong inside into stored errors in the place of these rows.

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
            self.store.add("error", key=key, impl=impl, what=what, reason=reason)
        if keys:
            self.say(f"    left out: {what}: {reason}")
        gc.collect()
        if not self.device.healthy():
            raise DeviceLost(reason)
        self.device.free()

    def left_out(self, piece: str, keys: Iterable[str]) -> bool:
        """Whether a piece was begun several times without an end; its rows, "<case>|<impl>|...", are then errors."""
        struck = self.store.struck_out(piece)
        for key in sorted(keys) if struck else ():
            self.store.add("error", key=key, impl=key.split("|")[1], what=key, reason=NO_END)
        return struck

    def note(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` found, made once; where it failed, the reason in its place as "error"."""
        known = self.store.note(name)
        if known is not None:
            return known
        found: dict[str, Any] = {"error": NO_END}
        if not self.store.struck_out(name):
            with self.piece(name):
                try:
                    found = make()
                except Exception as error:  # one part must not cost the others
                    found = {"error": describe(error)}
                    self.say(f"    left out: {name}: {found['error']}")
        self.store.add("note", name=name, value=found)
        if not self.device.healthy():
            raise DeviceLost(name)
        return found

    def group(self, stage: Stage, group: Group, wanted: set[str] | None = None) -> None:
        """Measure what the store does not have of a group, or of the wanted rows of it.

        Raises:
            OutOfTime, DeviceLost: the rest is for another process.
        """
        missing = {row_key(*row) for row in group.rows()} - set(self.store.settled())
        missing &= missing if wanted is None else wanted
        if not missing or self.left_out(group.key, missing):
            return
        first, threads = group.entries[0], torch.get_num_threads()
        self.say(f"\n  {first.layer or f'{first.n}x{first.k}'} M={first.m}, {len(missing)} rows", flush=True)
        torch.set_num_threads(stage.threads or threads)
        try:
            with self.piece(group.key):
                measured = list(self._checked(group, missing))
                for direction in group.passes:
                    for mode in group.modes:
                        self._time(stage, measured, direction, mode, missing)
        finally:
            torch.set_num_threads(threads)

    def _checked(self, group: Group, missing: set[str]) -> Iterator[Measured]:
        """Build and check every entry that is missing, and the frozen ones, which the others are compared with."""
        values: Values | None = None
        for entry in group.entries:
            keys = [key for e, d, mode in group.rows() if e == entry and (key := row_key(e, d, mode)) in missing]
            if not keys and not entry.frozen:
                continue
            with self.attempt(str(entry), entry.impl, keys):
                values = Values(group.entries, self.device) if values is None else values
                found = check_entry(entry, values)
                found.facts = self._facts(found, values)
                found.steps = {direction: steps(found, values, direction) for direction in group.passes}
                yield found
        if values is not None:
            values.forget()

    def _facts(self, measured: Measured, values: Values) -> dict[str, Any]:
        """What is counted, not timed, of a forward and backward on one input set; nothing is kept of a decoding."""
        entry, device = measured.entry, self.device
        forward = steps(measured, values, "fwd")[0]
        both = forward if entry.decode else steps(measured, values, "fwd_bwd")[0]
        found: dict[str, Any] = {"saved_bytes": 0, "held_bytes": None}
        if not entry.decode:
            owned = [*values.owned(entry), *measured.contestant.params.values()]
            found["saved_bytes"] = saved_bytes(measured.contestant.forward, values.problem.x, owned)
            found["held_bytes"] = device.held_bytes(forward)
        on_card = device.kind == "cuda"  # where the allocator counts; a profiler takes its time
        found |= {"peak_fwd": device.peak_bytes(forward) if on_card else None}
        found |= {"peak_fwd_bwd": device.peak_bytes(both) if on_card else None}
        found["host_us"] = device.host_us(both)
        if entry.layer in (None, "q", "down"):  # the profiler is slow to start; these two stand for the rest
            try:
                found |= {"launches": device.launches(both), "launches_fwd": device.launches(forward)}
            except RuntimeError as reason:  # a profiler that another tool holds must not cost the row
                found["launches_error"] = str(reason)[:200]
        return found

    def _time(self, stage: Stage, measured: list[Measured], direction: str, mode: str, missing: set[str]) -> None:
        """Time all that passed in the same rounds, and write a row of each."""
        keys = {one.entry.key: row_key(one.entry, direction, mode) for one in measured}
        if not missing.intersection(keys.values()):
            return
        calls: dict[str, list[Step]] = {}
        for one in measured:
            key = keys[one.entry.key]
            with self.attempt(str(one.entry), one.entry.impl, [key] if key in missing else []):
                self.device.ready(one.steps[direction], mode)
                calls[one.entry.key] = one.steps[direction]
        rest = [one for one in measured if one.entry.key in calls]
        if not rest:
            return
        left = [key for key in keys.values() if key in missing and key not in self.store.settled()]
        with self.attempt(str(rest[0].entry), rest[0].entry.impl, left):
            times = self.device.times(calls, mode, self.given_rounds or stage.rounds or self.rounds)
            frozen = [one.entry for one in rest if one.entry.reference]
            for one in (one for one in rest if keys[one.entry.key] in missing):
                entry, seconds, facts = one.entry, times[one.entry.key], one.facts
                figures = {**Spread.of(seconds).row(), "max_rel_err": one.max_rel_err}
                figures |= {"saved_bytes": facts["saved_bytes"], "peak_bytes": facts[f"peak_{direction}"]}
                detail = {name: value for name, value in facts.items() if not name.startswith(("peak", "saved"))}
                detail |= {"bias": entry.bias, "decode": entry.decode, "note": one.note}
                detail |= {"copy_gbps": self.ceilings().gbps} if entry.decode else {}
                detail |= {"input_sets": len(one.steps[direction]), "rounds": len(seconds)}
                below = next((e for e in frozen if e.bias == entry.bias), next(iter(frozen), None))
                detail |= Spread.ratio(seconds, times[below.key]).named("over_frozen") if below else {}
                row = schema.make_row(entry, direction, mode, figures)
                self.store.add("row", key=keys[entry.key], stage=stage.name, row=row, detail=detail)


def check_entry(entry: Entry, values: Values) -> Measured:
    """Build a contestant and compare it with float64 on the first input set.

    With dropout, ours is compared under its own mask, drawn before from the same state of the generators. The mask of a
    peer is not known: the peer is compared without dropout, in the same process.

    Raises:
        AssertionError: it is not right.
        Unavailable: it cannot be built here.
    """
    copies = values.copies(entry)
    problem = copies[0]
    contestants = [peers.build(one) for one in copies]
    found = Measured(entry, contestants[0], 0.0)
    if entry.decode:
        found.layers = [ungraded(one.forward) for one in contestants]
        expected = {"y": values.expected(problem)["y"]}
        found.max_rel_err = problems.compare(str(entry), {"y": found.layers[0](problem.x)}, expected)
    elif not entry.p:
        found.max_rel_err = problems.check(found.contestant, problem, values.expected(problem))
    elif entry.impl == "ours":
        found.max_rel_err = problems.check(found.contestant, problem, problems.dropout_expectations(problem))
    else:
        plain = values.of(replace(entry, p=0.0))
        found.max_rel_err = problems.check(peers.build(plain), plain, values.expected(plain))
        found.note = "compared without dropout: its mask is not known"
    return found


def ungraded(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same without gradients."""

    def call(x: Tensor) -> Any:
        with torch.no_grad():
            return forward(x)

    return call


def steps(measured: Measured, values: Values, direction: str) -> list[Step]:
    """One call for each input set, or in a step of generation for each copy of the layer; the results are dropped."""
    sets, contestant = values.inputs(measured.contestant, measured.entry), measured.contestant

    def step(i: int, layer: Callable[[Tensor], Any]) -> Step:
        x, dy = sets[i % len(sets)]
        if direction == "fwd_bwd":
            return lambda: problems.gradients(contestant, x, dy)
        return lambda: layer(x)

    return [step(i, layer) for i, layer in enumerate(measured.layers or [contestant.forward] * len(sets))]


def saved_tensors(forward: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What a forward gave, and every tensor that autograd keeps of it."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward(), packed


def saved_bytes(forward: Callable[[Tensor], Any], x: Tensor, owned: list[Tensor]) -> int:
    """Bytes autograd keeps between forward and backward beyond x, y and what is there anyway."""
    y, packed = saved_tensors(lambda: forward(x))
    modules = [*forward.parameters(), *forward.buffers()] if isinstance(forward, nn.Module) else []
    known = [x, *([y] if isinstance(y, Tensor) else y), *owned, *modules]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    return problems.tensor_bytes([t for t in packed if t.untyped_storage().data_ptr() not in addresses])


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}"
