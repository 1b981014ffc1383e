"""Builds glora_kernels._C, the CUDA extension, where there is a compiler for it; everything else is in pyproject.toml.

No device is looked at and torch is not imported: the module takes raw pointers and fits every torch of the machine.

    GLORA_KERNELS_CUDA=0             leaves it out
    GLORA_KERNELS_CUDA_ARCHS=80;90   builds these alone (default: 80, 90 and 100, and PTX of the newest for later cards)

Without nvcc, a host compiler, Python's headers, pybind11 or ninja the package is installed without it, and
`glora_kernels.runtime.extension.why_missing()` says which of them was not found. An error of a compiler that is there
fails the build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ("dequantize.cu", "small_m_gemv.cu", "small_m_mma.cu", "bindings.cpp")
ARCHS = ("80", "90", "100")
RECORD = "_C_missing.txt"
"""Beside the module's place in the package: why it is not there."""


class Missing(Exception):
    """Something that the build needs is not on this machine."""


def find_nvcc() -> str:
    """nvcc of CUDA_HOME or CUDA_PATH or of the PATH."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes]
    found = next((path for path in candidates if os.access(path, os.X_OK)), None) or shutil.which("nvcc")
    if found is None:
        raise Missing("nvcc was found neither in CUDA_HOME nor on the PATH: install the CUDA toolkit and set CUDA_HOME")
    return found


def find_host_compiler() -> str:
    """The C++ compiler: CXX, or the first of c++, g++ and clang++."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise Missing(f"no C++ compiler was found ({', '.join(names)}): install g++")
    return found


def find_ninja() -> str:
    """The ninja of this Python, or of the PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = str(Path(ninja.BIN_DIR, "ninja"))
    if found is None:
        raise Missing("ninja was not found: pip install ninja")
    return found


def find_includes() -> list[str]:
    """Of Python and of pybind11."""
    try:
        import pybind11
    except ImportError as error:
        raise Missing("pybind11 was not found: pip install pybind11") from error
    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").exists():
        raise Missing(f"Python.h was not found in {python}: install Python's headers (python3-dev)")
    return [python, pybind11.get_include()]


def architectures(nvcc: str) -> list[str]:
    """What to compile for: GLORA_KERNELS_CUDA_ARCHS, or those of ARCHS that this nvcc knows."""
    wanted = os.environ.get("GLORA_KERNELS_CUDA_ARCHS", "")
    if wanted.strip():
        archs = [re.sub(r"^sm_|\.", "", arch.strip()) for arch in re.split(r"[;,\s]+", wanted.strip()) if arch]
        if bad := [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80]:
            raise SystemExit(f"GLORA_KERNELS_CUDA_ARCHS wants numbers from 80 on such as '80;90'; got {bad[0]!r}")
        return archs
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in ARCHS if f"sm_{arch}" in known]
    if left_out := sorted(set(ARCHS) - set(archs), key=int):
        print(f"glora_kernels: this nvcc does not know sm_{', sm_'.join(left_out)}", file=sys.stderr)
    return archs


def nvcc_version(nvcc: str) -> str:
    """The release of nvcc, such as "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", text)
    return match[1] if match else "unknown"


def ninja_file(target: Path, objects: Path) -> str:
    """The build of the module at `target`, with its objects in `objects`: one edge a source, so that all cores work."""
    nvcc, compiler = find_nvcc(), find_host_compiler()
    archs = architectures(nvcc)
    includes = " ".join(f'-I"{path}"' for path in find_includes())
    newest = max(archs, key=lambda arch: int(arch.rstrip("af")))
    codes = [(arch, f"sm_{arch}") for arch in archs] + [(newest, f"compute_{newest}")]
    gencode = " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in codes)
    # No contraction: products and sums of the codec round one by one on the host too.
    common = f"$nvcc -std=c++17 -O3 -ccbin {compiler} -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off"
    defines = f"""-DGK_ARCHS='"{";".join(archs)}"' -DGK_NVCC='"{nvcc_version(nvcc)}"'"""
    lines = [
        f"nvcc = {nvcc}",
        "rule cuda",
        f"  command = {common} {gencode} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cpp",
        f"  command = {common} {defines} {includes} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # The static runtime loads the driver at its first call: the module imports where there is none.
        f"  command = $nvcc -shared --cudart=static {gencode} -ccbin {compiler} "
        "-Xlinker --exclude-libs,ALL -Xlinker -s $in -o $out",
    ]
    paths = []
    for source in SOURCES:
        paths.append(objects / f"{source}.o")
        rule = "cuda" if source.endswith(".cu") else "cpp"
        lines.append(f"build {_escape(paths[-1])}: {rule} {_escape(ROOT / 'csrc' / source)}")
    lines.append(f"build {_escape(target)}: link {' '.join(map(_escape, paths))}")
    return "\n".join(lines) + "\n"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildModule(build_ext):
    """Runs ninja in the place of setuptools' compiler."""

    def build_extensions(self) -> None:
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.joinpath("build.ninja").write_text(ninja_file(target, objects))
        verbose = ["-v"] if self.verbose else []
        if subprocess.run([find_ninja(), "-C", str(objects), *verbose, str(target)]).returncode:
            raise SystemExit(
                "glora_kernels: the CUDA extension does not compile (see above); "
                "GLORA_KERNELS_CUDA=0 installs without it"
            )


class BuildPackage(build_py):
    """Leaves the reason in the package where the module is not built."""

    def run(self) -> None:
        super().run()
        record = Path("glora_kernels" if self.editable_mode else Path(self.build_lib, "glora_kernels"), RECORD)
        if missing:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(missing + "\n")
        else:
            record.unlink(missing_ok=True)


def why_not() -> str:
    """Why the module cannot be built here; empty where it can."""
    if os.environ.get("GLORA_KERNELS_CUDA") == "0":
        return "it was installed with GLORA_KERNELS_CUDA=0"
    try:
        for find in (find_nvcc, find_host_compiler, find_ninja, find_includes):
            find()
    except Missing as error:
        return str(error)
    return ""


missing = why_not()
builds = any(command.startswith(("build", "bdist", "install", "develop", "editable")) for command in sys.argv[1:])
if missing and builds:
    print(f"glora_kernels: the CUDA extension is left out: {missing}", file=sys.stderr)
setup(
    ext_modules=[] if missing else [Extension("glora_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildModule, "build_py": BuildPackage},
)
