"""setup.py without a compiler, and the machine code that it makes: every architecture, no spill, tensor cores."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from glora_kernels.runtime import extension as built_extension

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"dequantize_kernel": 3, "dequantize_adapted_kernel": 6, "small_m_gemv_kernel": 6, "small_m_mma_kernel": 8}
"""By name, how many instantiations: types of the result, or types of x and numbers of tokens."""


def run_setup(*command, **environment):
    """setup.py in a process of its own; an empty value removes a variable."""
    env = {**os.environ, **environment}
    env = {name: value for name, value in env.items() if value != "" and name not in ("CUDA_PATH",)}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CUDA_HOME": "", "PATH": "/nonexistent"}, "nvcc was found neither in CUDA_HOME nor on the PATH"),
        ({"GLORA_KERNELS_CUDA": "0"}, "installed with GLORA_KERNELS_CUDA=0"),
    ],
)
def test_without_nvcc_the_package_is_built_and_says_so(tmp_path, environment, reason):
    build = ["build", "--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")]
    done = run_setup("egg_info", "--egg-base", str(tmp_path), *build, **environment)
    assert done.returncode == 0, done.stderr
    assert reason in done.stderr
    package = tmp_path / "lib" / "glora_kernels"
    assert (package / "__init__.py").exists()
    assert not list(package.glob("_C*.so"))
    assert reason in (package / built_extension._RECORD).read_text()


def fake_nvcc(directory: Path, script: str) -> str:
    """A CUDA_HOME whose nvcc does as told."""
    nvcc = directory / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n" + script)
    nvcc.chmod(0o755)
    return str(directory)


NVCC = """
case "$1" in
  --list-gpu-code) echo sm_80; echo sm_90;;
  --version) echo "release 12.4, V12.4.1";;
  *) echo "no such luck" >&2; exit 1;;
esac
"""


@pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="needs pybind11")
def test_an_error_of_the_compiler_fails_the_build(tmp_path):
    home = fake_nvcc(tmp_path, NVCC)
    done = run_setup(
        "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"), CUDA_HOME=home
    )
    assert done.returncode != 0
    assert "does not compile" in done.stderr
    assert "does not know sm_100" in done.stderr
    assert not list(tmp_path.rglob("_C*.so"))
    ninja = (tmp_path / "temp" / "build.ninja").read_text()
    assert "code=sm_80" in ninja
    assert "code=sm_90" in ninja
    assert "code=compute_90" in ninja
    assert "sm_100" not in ninja


def test_architectures_that_are_none_are_refused(tmp_path):
    home = fake_nvcc(tmp_path, NVCC)
    done = run_setup(
        "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"), CUDA_HOME=home,
        GLORA_KERNELS_CUDA_ARCHS="80;hopper",
    )  # fmt: skip
    assert done.returncode != 0
    assert "'hopper'" in done.stderr


def cuobjdump() -> str:
    """The toolkit's, or the one inside triton."""
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    found = shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)
    if found is None:
        pytest.skip("needs cuobjdump")
    return found


def test_no_kernel_spills_on_any_architecture(extension):
    """Registers only: no stack frame and no local memory, in each kernel of each architecture."""
    command = [cuobjdump(), "--dump-resource-usage", extension.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, str], int] = {}
    for part in re.split(r"(?=^arch = )", text, flags=re.M)[1:]:
        arch = re.match(r"arch = sm_(\w+)", part)[1]
        for name, stack, local in re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", part):
            kernel = next(k for k in KERNELS if re.search(rf"\d{k}I", name))
            found[arch, kernel] = found.get((arch, kernel), 0) + 1
            assert (stack, local) == ("0", "0"), f"{name} on sm_{arch}"
    archs = built_extension.build_info()["archs"]
    assert found == {(arch, kernel): count for arch in archs for kernel, count in KERNELS.items()}


def test_the_small_m_kernels_use_tensor_cores(extension):
    arch = built_extension.build_info()["archs"][0]
    command = [cuobjdump(), "-sass", "-arch", f"sm_{arch}", extension.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {}
    for part in re.split(r"(?=^[ \t]+Function : )", text, flags=re.M)[1:]:
        name = re.match(r"[ \t]+Function : (\S+)", part)[1]
        counts[name] = len(re.findall(r"\bHMMA\.16816\.F32", part))
    products = {name: count for name, count in counts.items() if "small_m_mma" in name}
    assert len(products) == KERNELS["small_m_mma_kernel"]
    for name, count in products.items():
        tiles = int(re.search(r"ELi(\d+)E", name)[1])
        assert count >= 8 * tiles, "32 rows x 64 k x 8 tokens are eight instructions, halves of a span unrolled"
    assert all(count == 0 for name, count in counts.items() if "dequantize" in name)


@pytest.mark.parametrize(("arch", "driver", "words"), [
    ("sm_90", 0, None),  # no driver, no card
    ("sm_90", 13000, None),
    ("sm_89", 13020, None),
    ("sm_90", 12080, "driver for CUDA 13.0, this one serves up to 12.8"),
    ("sm_120", 13020, None),
    ("sm_120", 13000, "driver for CUDA 13.1, this one serves up to 13.0"),  # PTX of a later toolkit
])  # fmt: skip
def test_a_driver_that_is_too_old_is_named(monkeypatch, arch, driver, words):
    monkeypatch.setattr(built_extension, "build_info", lambda: {"archs": ("80", "90", "100"), "nvcc": "13.1"})
    built = types.SimpleNamespace(versions=lambda: (driver, 13010))
    monkeypatch.setattr(built_extension, "_load", lambda: built)
    reason = built_extension.why_missing(arch)
    assert reason is None if words is None else words in reason
