"""benchmarks.host_launch runs, and counts what it times; what it measures is asserted nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from dry_card.test_launches import COUNTS

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_of_the_host(on_card, tmp_path):
    target, ours = tmp_path / "host.json", ["LoRA", "decode"]
    command = [sys.executable, "-m", "benchmarks.host_launch", "--rounds", "2", "--only", *ours, "--json", str(target)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["layer"]: row for row in json.loads(target.read_text())["rows"]}
    for name in ours:
        assert rows[name]["launches"] == sum(COUNTS[name])
    assert all(row["us"] >= row["least_us"] > 0 for row in rows.values())
    assert "over PEFT's" in done.stdout
