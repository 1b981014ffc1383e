"""The battery's linear layers as pytest-benchmark tests: on a card all of them, on a CPU a few small ones.

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only -k "lora and q and 8192"
    pytest benchmarks --benchmark-only --benchmark-compare   # against a run stored by --benchmark-autosave

Grouped by operator and pass at one shape, so that a group holds what competes. A contestant is compared with float64
before it is timed; what cannot be built here is skipped with the reason; no speed is asserted. The table's times are
the host's, around a synchronised run over all input sets; the device's own figures (events, medians with p20 and p80,
TFLOP/s, GB/s, the fraction of the floor, bytes, launches, host µs) are in `extra_info` of a JSON report.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import battery, devices, runner
from benchmarks.battery import Entry
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.peers import Unavailable
from benchmarks.stage import ROUNDS

KIND = devices.get("auto").kind
CASES = list(dict.fromkeys(which for group in battery.pytest_groups(KIND) for which in group.row_keys()))


@pytest.fixture(scope="session")
def device() -> Device:
    return devices.get("auto")


@pytest.fixture(scope="session")
def ceilings(device: Device) -> Ceilings:
    return device.ceilings()


@pytest.mark.parametrize(
    ("entry", "direction", "mode"), CASES, ids=[f"{entry.key} {d} {m}".replace("|", "-") for entry, d, m in CASES]
)
def test_linear(benchmark: Any, device: Device, ceilings: Ceilings, entry: Entry, direction: str, mode: str) -> None:
    group = battery.Group((entry,), (direction,), (mode,))
    values = runner.make_values(group, device)
    try:
        found = runner.check_entry(entry, values)
    except Unavailable as reason:
        pytest.skip(str(reason))
    facts = runner.facts(found, values, device)
    values.forget()
    steps = runner.steps(found.contestant, values, direction)
    call = device.prepare(steps, mode)
    seconds = [s / len(steps) for s in device.interleaved({"": call}, ROUNDS[device.kind])[""]]
    benchmark.group = f"{entry.op} {direction} {mode}, {entry.layer or ''} {entry.n}x{entry.k} M={entry.m}"
    benchmark.extra_info.update(runner.row_figures(entry, direction, seconds, ceilings), **facts)
    benchmark.extra_info.update(case=entry.case, impl=entry.impl, max_rel_err=found.max_rel_err, input_sets=len(steps))

    def synchronised() -> None:
        call()
        device.synchronize()

    benchmark.pedantic(synchronised, rounds=5, warmup_rounds=1)
