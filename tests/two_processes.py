"""Runs a worker script as two processes or more, one a rank, over gloo on the CPU."""

import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import forked
import pytest
import torch.distributed

needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)


def run_two(worker: Path, folder: Path, seconds: int, ranks: int = 2) -> None:
    """Start `worker RANK FOLDER RANKS` for each rank and wait; a failure, or no end in time, fails with all output."""
    # The host's own name need not resolve.
    environment = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes: list[BaseProcess] = []
    try:
        for rank, log in enumerate(logs):
            processes.append(forked.start(worker, rank, folder, ranks, out=log, **environment))
        codes = _wait(processes, seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    text = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)
    assert codes == [0] * ranks, f"exit codes {codes} (None: stopped after {seconds} s)\n{text}"


def _wait(processes: list[BaseProcess], seconds: int) -> list[int | None]:
    """The exit codes: once all have ended, some seconds after one has failed, or when the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        if None not in codes:
            break
        if any(codes):
            deadline = min(deadline, time.monotonic() + 3)
        time.sleep(0.05)
    return [process.exitcode for process in processes]
