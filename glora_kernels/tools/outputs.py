"""Argparse types for the files and folders that a command writes: checked before anything is measured."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def folder(text: str | Path) -> Path:
    """A folder to write to; created if it does not exist."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no folder can be made of {str(path)!r}: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"the folder {str(path)!r} cannot be written to")
    return path


def file(text: str | Path) -> Path:
    """A file to write; its folder is created if it does not exist."""
    path = Path(text)
    folder(path.parent)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise argparse.ArgumentTypeError(
            f"{str(path)!r} is {'a folder' if path.is_dir() else 'a file that is read-only'}"
        )
    return path
