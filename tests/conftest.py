"""Shared set-up. The interpreter is chosen before anything imports a kernel; memory can be poisoned."""

from __future__ import annotations

import gc
import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tests see the shipped configurations, not what somebody tuned on this machine.
os.environ["GLORA_KERNELS_TABLES"] = os.path.join(os.path.dirname(__file__), "no_tables")
# Inductor keeps compiled graphs whatever became of an operator's schema: none that another version has left.
COMPILED = tempfile.TemporaryDirectory(prefix="glora_kernels_inductor_")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", COMPILED.name)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What has been imported is no garbage: looking through all of torch and transformers takes half a second."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run: "cpu" in Triton's interpreter, "cuda" for real. One body for both."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off where there is a GPU (TRITON_INTERPRET=1 turns it on)")
    if request.param == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: the kernels are interpreted")
    return str(request.param)


@pytest.fixture(autouse=True)
def from_y(monkeypatch):
    """Test layers are small, but take the longer way to dA, which needs the tests: from y (`glora.recover`)."""
    from glora_kernels.glora import recover

    monkeypatch.setattr(recover, "SMALL", 0)


@pytest.fixture
def poison():
    """`helpers.poisoned`, which is imported once the interpreter is chosen."""
    from helpers import poisoned

    with poisoned():
        yield


@pytest.fixture
def launched(monkeypatch):
    """The names and the M of the launches made; what is planned is not run."""
    from glora_kernels.runtime.launch import Launch
    from glora_kernels.runtime.planning import is_planning

    found, run = [], Launch.run

    def note(self):
        if not is_planning():
            found.append((self.kernel.__name__, self.args.get("M")))
        run(self)

    monkeypatch.setattr(Launch, "run", note)
    return found
