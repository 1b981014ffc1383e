"""Makes pytest collect bench_*.py here: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    already = any(fnmatch(file_path.name, pattern) for pattern in parent.config.getini("python_files"))
    if already or not fnmatch(file_path.name, "bench_*.py"):
        return None
    return pytest.Module.from_parent(parent, path=file_path)
