"""Runs scripts one after the other, each in a process of its own; `test_guides.py` starts it.

    python run_guides.py FOLDER [--timm FOLDER] SCRIPT ...

Importing torch, transformers, PEFT, TRL and Lightning takes several times as long as the short runs of the scripts. So
this process imports them once, and every script runs in a child of it, as `python SCRIPT --smoke` would. What a script
prints goes to FOLDER/<its name>.txt, its pictures and adapters to FOLDER, and what it writes where it stands to
FOLDER/<its name>-files; there is one line a script, with its name and exit code.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = (
    "transformers",
    "peft",
    "trl",
    "datasets",
    "lightning",
    "bitsandbytes",
    "sklearn.datasets",
    "matplotlib.pyplot",
)


def run(script: Path, out: Path, timm: Path | None) -> None:
    """What the child process does."""
    with open(out / f"{script.stem}.txt", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    folder = out / f"{script.stem}-files"
    folder.mkdir()
    os.chdir(folder)
    if timm is not None:
        import_torchvision(timm)
    sys.argv = [str(script), "--smoke", "--device", "cpu", "--out", str(out)]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def import_torchvision(folder: Path) -> None:
    """torchvision from a folder of its own, its operators left out.

    The build that the package index has does not fit a CPU build of torch: importing it stops where it describes an
    operator that is not there. timm does not call them.
    """
    import torch

    sys.path.append(str(folder))
    real = torch.library.register_fake

    def register_fake(name: str, *args: object, **kwargs: object) -> object:
        return (lambda function: function) if str(name).startswith("torchvision::") else real(name, *args, **kwargs)

    torch.library.register_fake = register_fake
    importlib.import_module("torchvision")
    torch.library.register_fake = real


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--timm", type=Path)
    parser.add_argument("scripts", type=Path, nargs="+")
    args = parser.parse_args()
    for package in PACKAGES:
        if find_spec(package.partition(".")[0]) is not None:
            importlib.import_module(package)
    context = multiprocessing.get_context("fork")
    for script in args.scripts:
        timm = args.timm if "import timm" in script.read_text() else None
        child = context.Process(target=run, args=(script, args.out, timm))
        child.start()
        child.join()
        print(script.stem, child.exitcode, flush=True)


if __name__ == "__main__":
    main()
