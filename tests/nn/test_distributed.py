"""Two processes that train one model equal one process: DistributedDataParallel and FSDP2, over gloo on the CPU.

The cases are in `distributed_worker.py`: starting a process costs seconds, so two are started once for all of them.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed

WORKER = Path(__file__).with_name("distributed_worker.py")
SECONDS = 240
"""For what takes about 25 on two free cores; a hang is a failure. A collective gives up after 60."""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_equal_one(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name need not resolve
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, WORKER, str(rank), tmp_path]
            with open(log, "wb") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        codes = wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)
    assert codes == [0, 0], f"exit codes {codes} (None: stopped after {SECONDS} s)\n{text}"


def wait(processes):
    """The exit codes: once all have ended, some seconds after one has failed, or when the time is over."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            break
        if any(codes):
            deadline = min(deadline, time.monotonic() + 3)
        time.sleep(0.05)
    return [process.poll() for process in processes]
