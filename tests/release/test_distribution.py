"""What is released: sdist, pure wheel, the kernel for the Hugging Face hub, and the versions that they name."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def run(*command, **environment):
    """The output of a command; its errors are shown where it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=os.environ | environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    run(sys.executable, "scripts/hub_kernel.py", out)
    return out


def test_every_place_names_one_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == VERSION
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == VERSION


def test_sdist_and_pure_wheel_are_built_installed_and_used(tmp_path):
    """In an empty environment with this one's torch: `scripts/try_wheel.py` imports it, asks `info`, trains a layer."""
    said = run("scripts/build-wheels", "--pure", OUT=str(tmp_path), PYTHON=sys.executable)
    assert f"glora_kernels {VERSION} with torch" in said
    sdist, wheel = tmp_path / f"glora_kernels-{VERSION}.tar.gz", tmp_path / f"glora_kernels-{VERSION}-py3-none-any.whl"
    assert sorted(tmp_path.iterdir()) == sorted([sdist, wheel])
    assert {sdist.name, wheel.name} == set(re.findall(r"KiB +(\S+)", said))
    with tarfile.open(sdist) as packed:
        files = {name.partition("/")[2] for name in packed.getnames()}
    assert {"csrc/bindings.cpp", "setup.py", "LICENSE", "CHANGELOG.md", "glora_kernels/runtime/direct.c"} <= files
    assert {name.split("/")[0] for name in files if "/" in name} == {"csrc", "glora_kernels", "glora_kernels.egg-info"}
    with zipfile.ZipFile(wheel) as packed:
        tops = {name.split("/")[0] for name in packed.namelist()}
        metadata = packed.read(f"glora_kernels-{VERSION}.dist-info/METADATA").decode()
        assert not [name for name in packed.namelist() if name.endswith((".so", ".pyc", ".cu"))]
    assert tops == {"glora_kernels", f"glora_kernels-{VERSION}.dist-info"}
    needed = {line.split(": ")[1].split(">")[0] for line in metadata.splitlines() if line.startswith("Requires-Dist")
              and "extra ==" not in line}  # fmt: skip
    assert needed == {"torch", "triton", "safetensors"}


def test_torch_is_no_build_requirement():
    requires = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert {re.match(r'\W*"([\w-]+)', part)[1] for part in requires.split(",")} == {"setuptools", "pybind11", "ninja"}


def test_the_hub_loads_the_kernel_and_it_computes_what_the_package_computes(hub):
    said = run(
        sys.executable, Path(__file__).with_name("load_hub.py"), hub, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT),
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert re.search(r"loaded _glora_kernels_cpu_[0-9a-f]{7}", said)


def test_the_layout_is_what_the_hub_asks_for(hub):
    assert {path.name for path in hub.iterdir()} == {"CARD.md", "build.toml", "flake.nix", "torch-ext", "build"}
    assert {path.name for path in (hub / "build").iterdir()} == {"torch-cpu", "torch-cuda", "torch-rocm"}
    general = (hub / "build.toml").read_text()
    ids = set()
    for build in (hub / "build").iterdir():
        told = json.loads((build / "metadata.json").read_text())
        assert told["id"].isidentifier()
        assert (build / "_ops.py").read_text().count(told["id"]) == 2
        assert f'name = "{told["name"]}"' in general
        assert f"version = {told['version']}" in general
        assert build.name == f"torch-{told['backend']['type']}"
        files = {
            path.relative_to(build).as_posix(): path
            for path in build.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        del files["metadata.json"]
        assert told["digest"]["files"] == {
            name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for name, path in files.items()
        }
        code = "".join(path.read_text() for path in files.values() if path.suffix == ".py")
        assert not re.search(r"^\s*(from|import) glora_kernels", code, re.M), "the hub gives it another name"
        assert not re.search(
            r"^(from|import) (?!torch|triton|__future__|\.)(numpy|safetensors|peft|transformers)", code, re.M
        )
        ids.add(told["id"])
    assert len(ids) == 3
