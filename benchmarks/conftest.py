"""The battery under pytest: `pytest benchmarks --stage target --minutes 8.5 --out DIR`.

Collects bench_*.py and gives their tests the fixture `bench`. A test is a row, and a group of rows is measured at the
first of them that is selected. Ends with OUT_OF_TIME where the time is up and with DEVICE_LOST where the device stopped
answering: run it again with the same --out and it goes on; `python -m benchmarks.report` does that, stage by stage.
Without --out everything is measured anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cases, devices
from benchmarks.cases import Stage, row_key
from benchmarks.measure import DEVICE_LOST, OUT_OF_TIME, Bench, DeviceLost, OutOfTime
from benchmarks.store import Store, header, now, store_path


class NoTable:
    """Stands in for pytest-benchmark, which a borrowed card may lack."""

    @pytest.fixture
    def benchmark(self) -> None:
        """No table is made."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("battery")
    group.addoption("--stage", help="only this stage, by name or number")
    group.addoption("--scale", choices=["cuda", "cpu", "tiny"], help="which battery (default: the device's)")
    group.addoption("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a card if there is one")
    group.addoption("--out", type=Path, metavar="DIR", help="where <slug>.stage.jsonl is kept, to go on from")
    group.addoption("--minutes", type=float, help="all the time there is")
    group.addoption("--rounds", type=int, help="timed rounds of every group")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "default")  # a warning must not cost a row
    if not config.pluginmanager.hasplugin("benchmark"):
        config.addinivalue_line("markers", "benchmark: of pytest-benchmark, which is not installed")
        config.pluginmanager.register(NoTable())


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # pytest itself collects what is named on the command line
    ours = fnmatch(file_path.name, "bench_*.py") and not named
    return pytest.Module.from_parent(parent, path=file_path) if ours else None


def scale(config: pytest.Config) -> str:
    return config.getoption("scale") or devices.get(config.getoption("device")).kind


def chosen(config: pytest.Config) -> list[Stage]:
    name = config.getoption("stage")
    return cases.stages(scale(config)) if name is None else [cases.find(scale(config), name)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        listed = [(s, g, row) for s in chosen(metafunc.config) for g in s.groups for row in g.rows()]
        names = [f"{s.name} {row_key(*row)}".replace("|", "-") for s, _, row in listed]
        metafunc.parametrize(("stage", "group", "row"), listed, ids=names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the parts, which are tests by name, those of the chosen stages."""
    parts = {f"test_{part}" for stage in chosen(config) for part in stage.parts}
    items[:] = [item for item in items if "row" in getattr(item, "fixturenames", ()) or item.name in parts]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except OutOfTime:
        pytest.exit("the time is up; the same command goes on", OUT_OF_TIME)
    except DeviceLost as reason:
        pytest.exit(f"the device stopped answering: {reason}", DEVICE_LOST)


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """What measures; it notes when, on how busy a machine and at which commit a stage was measured."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    option = request.config.getoption
    device, which = devices.get(option("device")), scale(request.config)
    path = store_path(option("out") or tmp_path_factory.mktemp("battery"), device, which)
    store = Store(path, header(device, which))
    if store.message:
        print(store.message)
    found = Bench(device, which, store, option("minutes"), option("rounds"))
    found.ceilings()
    about: dict[str, Any] = {"date": now(), "commit": store.header["commit"], "load": [os.getloadavg()[0]]}
    yield found
    about["load"].append(os.getloadavg()[0])
    for stage in chosen(request.config):
        rounds = option("rounds") or stage.rounds or found.rounds
        more = {"rounds": rounds, **device.details()} | ({"threads": stage.threads} if stage.threads else {})
        begun = store.note(f"stage {stage.name}") or about  # by a run that this one goes on from
        more |= {"date": begun["date"], "commit": begun["commit"], "load": [begun["load"][0], about["load"][1]]}
        store.add("note", name=f"stage {stage.name}", value=more)
