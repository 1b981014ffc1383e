"""Runs a worker script as two processes or more, one a rank, over gloo on the CPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed

needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)


def run_two(worker: Path, folder: Path, seconds: int, ranks: int = 2) -> None:
    """Start `worker RANK FOLDER RANKS` for each rank and wait; a failure, or no end in time, fails with all output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name need not resolve
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, worker, str(rank), folder, str(ranks)]
            with open(log, "wb") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        codes = _wait(processes, seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)
    assert codes == [0] * ranks, f"exit codes {codes} (None: stopped after {seconds} s)\n{text}"


def _wait(processes: list[subprocess.Popen[bytes]], seconds: int) -> list[int | None]:
    """The exit codes: once all have ended, some seconds after one has failed, or when the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            break
        if any(codes):
            deadline = min(deadline, time.monotonic() + 3)
        time.sleep(0.05)
    return [process.poll() for process in processes]
