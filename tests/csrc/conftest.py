"""The headers of csrc in a plain C++ library, and the extension where it was built."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glora_kernels.runtime import extension as built_extension

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HERE = Path(__file__).parent


def host_compiler() -> str:
    """The C++ compiler; without one the test is skipped."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    return compiler


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """emulate.cpp as a library: the codec, and the kernels walked on the host."""
    compiler = host_compiler()
    library = tmp_path_factory.mktemp("emulate") / "emulate.so"
    flags = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"]
    # -march=native and fast contraction on purpose: the codec must not depend on flags.
    source = str(HERE / "emulate.cpp")
    command = [compiler, *flags, "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{CSRC}", source, "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def host_module(tmp_path_factory: pytest.TempPathFactory):
    """The sources of the extension, kernels and bindings, for the host: host/cuda_runtime_api.h stands for CUDA."""
    pybind11 = pytest.importorskip("pybind11")
    directory = tmp_path_factory.mktemp("host_module")
    cuda_names = HERE / "host" / "cuda_runtime_api.h"
    flags = ["-std=c++20", "-fPIC", "-pthread", "-Wno-unknown-pragmas", f"-I{cuda_names.parent}", f"-I{CSRC}"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-include", str(cuda_names)]
    flags += ['-DGK_ARCHS="host"', '-DGK_NVCC="none"']

    def compiled(source: str) -> str:
        target = directory / f"{source}.o"
        optimize = "-O1" if source.endswith(".cu") else "-O0"
        command = [host_compiler(), *flags, optimize, "-x", "c++", "-c", str(CSRC / source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    sources = ["bindings.cpp", *sorted(path.name for path in CSRC.glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    library = directory / "_C.so"
    subprocess.run([host_compiler(), "-shared", "-pthread", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def extension():
    """glora_kernels._C, where it was built."""
    if reason := built_extension.why_missing():
        pytest.skip(reason)
    return built_extension.module()
