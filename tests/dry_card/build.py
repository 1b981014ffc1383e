"""Builds the stand-ins with the machine's compilers, once for an environment, and keeps them beside its packages."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = [HERE / "libcuda.c", HERE / "device.cpp"]


def missing() -> str | None:
    """What the machine needs to build the stand-ins and has not."""
    tools = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return " and ".join(tools) or (None if header.exists() else str(header))


def built() -> Path:
    """The folder that holds libcuda.so.1 and dry_device.so for this torch, Triton and these sources."""
    key = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES) + Path(__file__).read_bytes())
    versions = [importlib.metadata.version(name) for name in ("torch", "triton")]
    key.update(" ".join([*versions, sys.version]).encode())
    folder = Path(sys.prefix, "var", "dry_card", key.hexdigest()[:16])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker builds, and this one takes what it built
        if not (folder / "done").exists():
            _build(folder)
            (folder / "done").touch()
    return folder


def package(name: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"the dry card needs {name}"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _build(folder: Path) -> None:
    torch, triton = package("torch"), package("triton")
    headers, library = torch / "include", folder / "libcuda.so.1"
    c = ["gcc", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{triton / 'backends/nvidia/include'}"]
    subprocess.run([*c, str(SOURCES[0]), "-o", str(library)], check=True)
    cxx = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=dry_device", f"-I{headers}"]
    cxx += [f"-I{headers / 'torch/csrc/api/include'}", f"-I{sysconfig.get_paths()['include']}", f"-L{torch / 'lib'}"]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10", str(library)]
    subprocess.run([*cxx, str(SOURCES[1]), "-o", str(folder / "dry_device.so"), *libraries], check=True)
