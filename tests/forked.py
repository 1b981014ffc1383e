"""Scripts in processes of their own, forked from a server that has imported what most of them import.

Importing torch, transformers, PEFT, TRL and Lightning takes several times as long as a short run of a script. The
server (of `multiprocessing`) starts with the first script of a session and imports them once; nothing of this project
is among them, and it sees no GPU. A script then runs as `python SCRIPT ARGUMENTS` would.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
PACKAGES = [
    "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "transformers.trainer", "peft", "accelerate",
    "trl", "datasets", "lightning", "bitsandbytes", "sklearn.datasets", "matplotlib.pyplot",
]  # fmt: skip
"""What is imported beforehand, where it is installed."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONIOENCODING": "utf-8",
}  # fmt: skip


@functools.cache
def _server() -> ForkServerContext:
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PACKAGES)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


def start(
    script: Path, *arguments: object, out: Path, err: Path | None = None, folder: Path | None = None,
    before: Callable[[], object] | None = None, **environment: str,
) -> BaseProcess:  # fmt: skip
    """Start `python script arguments`.

    Args:
        out, err: files of what it writes to its streams; without err, both go to out.
        folder: where it runs; None: here.
        before: what its process calls first.
        environment: variables beside ours and `ENVIRONMENT`.
    """
    given = (script, list(map(str, arguments)), out, err or out, folder or Path.cwd(), before)
    process = _server().Process(
        target=_run, args=(*given, {**os.environ, **ENVIRONMENT, **environment}), name=script.name
    )
    process.start()
    return process


def run(script: Path, *arguments: object, seconds: float) -> subprocess.CompletedProcess[str]:
    """`start`, and what it wrote; TimeoutExpired where it does not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = end_of(start(script, *arguments, out=out, err=err), seconds)
        return subprocess.CompletedProcess([str(script), *map(str, arguments)], code, out.read_text(), err.read_text())


def end_of(process: BaseProcess, seconds: float) -> int:
    """The exit code; TimeoutExpired, and the process stopped, where it does not end in time."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(process.name, seconds)
    return process.exitcode


def _run(
    script: Path, arguments: list[str], out: Path, err: Path, folder: Path,
    before: Callable[[], object] | None, environment: dict[str, str],
) -> None:  # fmt: skip
    """What the process does."""
    gc.freeze()  # what the server has imported is no garbage
    for stream, path in ((1, out), (2, err)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    sys.path[:] = [str(script.parent), *(path for path in sys.path if not Path(path).is_relative_to(TESTS))]
    if before is not None:
        before()
    runpy.run_path(str(script), run_name="__main__")
