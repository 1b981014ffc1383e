"""Models in parts over a mesh equal one process: tensor parallelism, and FSDP2 over it, with gloo on the CPU.

The cases are in `parallel_worker.py`: starting a process costs seconds, so they are started once for all of them.
"""

from pathlib import Path

import pytest
from two_processes import needs_distributed, run_two

pytest.importorskip("transformers")
WORKER = Path(__file__).with_name("parallel_worker.py")


@needs_distributed
def test_parts_equal_one_process(tmp_path):
    """Two ranks, whose checkpoint four of another mesh resume."""
    run_two(WORKER, tmp_path, 240)
    run_two(WORKER, tmp_path, 240, ranks=4)
