"""A dry card: Triton's real launch path on a machine without a GPU.

In a process of its own, PyTorch has tensors on "cuda:0" and "cuda:1" (by their properties H100s, with host memory) and
Triton has its own JIT, driver and ptxas; libcuda.so.1 is a stand-in that keeps a log and runs nothing. So it answers
exactly what is launched, with which arguments, what is compiled and when again, what spills, and what a call costs the
host. It cannot say whether a number is right: the interpreter does.

By hand, with the environment that runs the tests (gcc and g++ build the stand-ins in half a minute, once):

    python tests/dry_card SCRIPT [ARGUMENTS]

runs SCRIPT with the card installed before anything is imported. What a script wants to know is in `dry_card.card`:

    from dry_card import card
    with card.compilations() as asked, card.recorded() as log:
        layer(x).backward(dy)
    print(asked)                                            # names of the kernels that were compiled
    for launch in log:                                      # name, grid, stream, registers, local_bytes, parameters
        print(launch.name, launch.grid, launch.local_bytes)

`compilations(compiles=False)` counts and neither compiles nor launches; `launches()`, `modules()`, `tensor_maps()` and
`waits()` are counts of the process; `fresh_addresses()` never uses freed memory again. A launch is refused, as a card
would, for an impossible grid, too much shared memory, a module or stream of another device, and for a pointer to freed
memory or to another device's; so is a tensor map against the rules. `torch.cuda.graph` captures nothing, but what may
not be done while a stream captures is refused, as under `torch.cuda.set_sync_debug_mode("error")`.

Tests run a function of theirs on it with `dry_run`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 800
"""What a function has."""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """A process with torch, Triton and the card, none of this library; of each function one is forked from it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent)], env={**environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip


def dry_run(function: Callable, *arguments: Any, **environment: str) -> Any:
    """What a function at the top of a module returns on the dry card, in a process of its own; by way of JSON."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log")
        target = f"{function.__module__}:{function.__qualname__}"
        asked = {"target": target, "arguments": arguments, "environment": environment}
        print(json.dumps({**asked, "log": str(log), "kept": str(answer)}), file=server.stdin, flush=True)
        code = server.stdout.readline().strip()
        wrote = log.read_text(errors="replace")[-12000:] if log.exists() else "the dry card's server has ended"
        assert code == "0", f"{target} failed on the dry card ({code}):\n{wrote}"
        return json.loads(answer.read_text())


def in_threads(count: int, work: Callable[[int], object]) -> list[str]:
    """What went wrong in `work(0)`, `work(1)` …, each in a thread of its own; they begin at once."""
    barrier, wrong = threading.Barrier(count), []

    def run(i: int) -> None:
        try:
            barrier.wait()
            work(i)
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong
