"""Two processes that train one model equal one process: DistributedDataParallel and FSDP2, over gloo on the CPU.

The cases are in `distributed_worker.py`: starting a process costs seconds, so two are started once for all of them.
"""

from pathlib import Path

from two_processes import needs_distributed, run_two

WORKER = Path(__file__).with_name("distributed_worker.py")
SECONDS = 240
"""For what takes about 25 on two free cores; a hang is a failure. A collective gives up after 60."""


@needs_distributed
def test_two_processes_equal_one(tmp_path):
    run_two(WORKER, tmp_path, SECONDS)
