"""Every kernel compiled for cards that are not here, and what of the machine code is not acceptable."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers import EVERYTHING

import glora_kernels
from glora_kernels.runtime import configs
from glora_kernels.runtime.launch import Launch
from glora_kernels.tools import aot

PACKAGE = Path(glora_kernels.__file__).parent
REPORT = Path(__file__).parents[2] / "benchmarks" / "results" / "aot.md"
BIG = ("_glora_fwd_kernel", "_glora_dx_kernel", "_hadamard_grad_kernel")


def run(*command: str, interpret: str | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the interpreter's would compile nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def reports(tmp_path: Path, *options: str) -> list[aot.Report]:
    target = tmp_path / "aot.json"
    done = run("-m", "glora_kernels.tools.aot", *options, "--jobs", "1", "--json", str(target))
    assert target.exists(), done.stderr[-2000:]
    found = [aot.Report(**r) for r in json.loads(target.read_text())]
    assert done.returncode == (1 if any(r.faults for r in found) else 0)
    return found


ALWAYS = {("sm_90", "bf16"): 70, ("sm_80", "bf16"): 300, ("sm_100", "bf16"): 300, ("gfx942", "bf16"): 300}
"""What is always compiled: one form in so many of each kernel, its first among them. `scripts/compile-all` does the
rest."""


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "dtype"), [
    (arch, dtype) for arch in aot.ARCHS for dtype in aot.DTYPES
])  # fmt: skip
def test_what_layers_ask_for_compiles_without_a_fault(arch, dtype, tmp_path):
    every = 1 if EVERYTHING else ALWAYS.get((arch, dtype))
    if every is None:
        pytest.skip("GLORA_KERNELS_TEST_ALL=1 compiles this as well")
    found = reports(tmp_path, "--arch", arch, "--dtype", dtype, "--every", str(every))
    assert all((r.arch, r.dtype) == (arch, dtype) for r in found)
    faults = [f"{r.kernel} ({r.asked}, {r.config}): {r.faults}" for r in found if r.faults]
    assert not faults, "\n".join(faults)
    for r in found:
        assert r.registers > 0, r
        assert r.stack == 0, r
        assert r.shared >= 0, r
        if not arch.startswith("gfx"):
            assert r.spill == 0, r
        if arch == "sm_90" and dtype != "fp32" and r.kernel in BIG:
            assert "HGMMA" in r.matrix_instruction, r
            assert r.batch >= 2, f"a wait after every product: {r}"
        if arch == "sm_100" and dtype != "fp32" and r.kernel in BIG[:2]:
            assert "UTCHMMA" in r.matrix_instruction, r
        if arch in ("sm_90", "sm_100") and dtype != "fp32" and r.kernel in BIG[:2]:
            by_pointers = "off 16 bytes" in r.asked or "W fp32" in r.asked
            assert (r.tma == 0) == by_pointers, r
        if arch == "sm_80" and dtype != "fp32" and r.kernel in BIG and r.even:
            assert r.async_copies > 0, f"no cp.async: {r}"


FORMS = """
import json, sys
from glora_kernels.tools import aot
print(json.dumps([(f.launch.kernel.__name__, f.key, arch, name) for arch in sys.argv[1:]
                  for name, dtype in aot.DTYPES.items() for f in aot.forms(arch, dtype)]))
"""


@pytest.fixture(scope="module")
def asked():
    """(kernel, key, arch, dtype) of the forms that two cards are asked for: sm_80 takes kernels of its own."""
    done = run("-c", FORMS, "sm_90", "sm_80")
    assert done.returncode == 0, done.stderr[-2000:]
    return {tuple(form) for form in json.loads(done.stdout)}


@pytest.mark.aot
def test_every_kernel_is_asked_for(asked):
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    kernels = set(re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (_\w+_kernel)\(", source, re.M))
    assert len(kernels) >= 7
    assert {kernel for kernel, *_ in asked} == kernels


@pytest.mark.aot
def test_the_committed_report_is_of_what_layers_ask_for(asked):
    """Every form that it has is one that a layer asks for today, and nothing was wrong with it."""
    text = REPORT.read_text()
    if f"Triton {importlib.metadata.version('triton')}, " not in text:
        pytest.skip("the report is of another Triton")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `_")]
    known = {(row[0].strip("`"), row[1], row[4], row[3]): row[-1] for row in rows if row[4] in ("sm_90", "sm_80")}
    assert len(known) > 100
    assert known.keys() <= asked
    assert set(known.values()) == {"yes"}


AWKWARD = """
import sys
sys.path.insert(0, "tests")
import torch
from glora.test_fused import plan
from glora_kernels.runtime import routes
from glora_kernels.tools import aot, elsewhere
from glora_kernels.runtime.configs import SHARED_LIMIT
from glora_kernels.glora.call import Supports
from glora_kernels.spec import GLoRAConfig
arch, name, route = sys.argv[1:]
routes.product_route = lambda *args, **kwargs: route
configs = [
    GLoRAConfig("vector", "lora", "none", "vector", "constant", rank=17, dropout=0.1),
    GLoRAConfig("lora", "lora", "none", "none", "vector", rank=1),
    GLoRAConfig("constant", "constant", "vector", "none", "none"),
    GLoRAConfig("lora", "lora", "none", "none", "none", rank=3, dropout=0.5, variant="matmul"),
]
for m, n, k in [(1, 1, 1), (70000, 4097, 4095)]:
    for config in configs:
        for steps in plan(config, m, n, k, True, arch, aot.DTYPES[name]):
            for step in steps:
                if hasattr(step, "kernel"):
                    with elsewhere.on_card(arch):
                        compiled, _ = elsewhere.compile_launch(step)
                    assert compiled.metadata.shared <= SHARED_LIMIT[arch], str(step)
print("all compiled")
"""


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "dtype", "route"), [
    ("sm_90", "bf16", "fused"), *([("sm_80", "fp32", "library")] if EVERYTHING else []),
])  # fmt: skip
def test_awkward_sizes_compile(arch, dtype, route):
    """A size or stride of 1 is folded in as a constant by the JIT: M, N, K, R = 1 are other code."""
    done = run("-c", AWKWARD, arch, dtype, route)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "all compiled" in done.stdout


@pytest.mark.aot
def test_one_kernel_alone(tmp_path):
    options = ("--arch", "sm_90", "--dtype", "fp32", "--every", "100", "--kernel", "_finish_kernel")
    found = reports(tmp_path, *options, "--kernel", "_wc_kernel")
    assert {r.kernel for r in found} == {"_finish_kernel", "_wc_kernel"}
    assert not any(r.faults for r in found)
    done = run("-m", "glora_kernels.tools.aot", *options, "--kernel", "_mistyped_kernel")
    assert done.returncode == 2
    assert "no layer asks for '_mistyped_kernel'; there are _" in done.stderr
    done = run("-m", "glora_kernels.tools.aot", *options, "--markdown", str(tmp_path / "m.md"))
    assert done.returncode == 2
    assert "leave out --every and --kernel" in done.stderr


def test_every_kernel_that_is_configured_exists():
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    names = [name for kernel in configs.KERNELS.values() for name in kernel.names]
    assert len(set(names)) == len(names)
    assert all(f"def {name}(" in source for name in names)


def test_refused_in_the_interpreter():
    done = run("-m", "glora_kernels.tools.aot", "--arch", "sm_90", "--dtype", "fp32", interpret="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


GOOD = aot.Report(
    kernel="_glora_fwd_kernel",
    form="0123456789ab",
    asked="LoRA r=16 M=512 forward",
    dtype="bf16",
    arch="sm_90",
    config="128x128x64x16 w8 s4",
    registers=168,
    stack=0,
    spill=0,
    shared=131072,
    matrix_instruction="HGMMA",
    matrix_count=64,
    batch=4,
    tma=14,
    async_copies=0,
    narrow=0,
    even=True,
    multiplies=True,
    serialized=False,
)


def test_a_good_report_has_no_fault():
    assert GOOD.faults == []


@pytest.mark.parametrize(("change", "words"), [
    ({"stack": 64}, "64 bytes of stack"),
    ({"spill": 128}, "128 spilled"),
    ({"serialized": True}, "C7515"),
    ({"shared": 232_449}, "232449 bytes of shared memory"),
    ({"matrix_count": 0, "matrix_instruction": ""}, "no matrix instruction"),
    ({"error": "CompilationError: no"}, "CompilationError"),
    ({"arch": "sm_89", "shared": 101_377}, "shared memory"),
    ({"arch": "gfx942", "shared": 65_537}, "shared memory"),
    ({"batch": 1}, "a wait after every wgmma"),
])  # fmt: skip
def test_faults_are_found(change, words):
    faults = dataclasses.replace(GOOD, **change).faults
    assert len(faults) == 1
    assert words in faults[0]


def test_no_matrix_instruction_is_expected_where_there_is_no_product():
    none = dataclasses.replace(GOOD, matrix_count=0, matrix_instruction="", batch=0)
    assert dataclasses.replace(none, multiplies=False).faults == []
    assert dataclasses.replace(none, dtype="fp32").faults == []


@pytest.mark.parametrize(("kernel", "args", "multiplies"), [
    ("_glora_dx_kernel", {"P": 0, "R": 0}, True), ("_x_kernel", {"P": 0, "R": 0}, False),
    ("_x_kernel", {"P": 0, "R": 8}, True), ("_grouped_x_kernel", {"Rs": (0, 4)}, True),
    ("_shared_grad_kernel", {}, True), ("_wc_kernel", {"R": 8}, False), ("_merge_kernel", {"R": 8}, False),
    ("_prepare_kernel", {"P": 8, "R": 0}, True), ("_prepare_kernel", {"P": 8, "R": 0, "weff_ptr": 1}, False),
])  # fmt: skip
def test_what_multiplies(kernel, args, multiplies):
    assert aot.multiplies(Launch(types.SimpleNamespace(__name__=kernel), (1,), args)) is multiplies


def test_narrow_loads_are_a_fault_of_what_streams_whole_rows():
    narrow = dataclasses.replace(GOOD, kernel="_dy_kernel", narrow=48)
    assert narrow.faults == ["48 loads of less than 32 bits"]
    assert dataclasses.replace(narrow, even=False).faults == []
    assert dataclasses.replace(narrow, kernel="_finish_kernel").faults == []
