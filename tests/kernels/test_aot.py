"""Every kernel compiled for cards that are not here, and what of the machine code is not acceptable."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import EVERYTHING

import glora_kernels.kernels
from glora_kernels.launch import aot

KERNELS = Path(glora_kernels.kernels.__file__).parent
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
    done = run("-m", "glora_kernels.launch.aot", *options, "--jobs", "1", "--json", str(target))
    assert target.exists(), done.stderr[-2000:]
    found = [aot.Report(**r) for r in json.loads(target.read_text())]
    assert done.returncode == (1 if any(r.faults for r in found) else 0)
    return found


ALWAYS = {("sm_90", "bf16"): 3, ("sm_80", "bf16"): 12, ("sm_100", "bf16"): 6, ("gfx942", "bf16"): 12}
"""What is always compiled: one form in so many of each kernel, its first among them. benchmarks/results/aot.md has
every form."""


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "dtype"), [
    (arch, dtype) for arch in aot.ARCHS for dtype in aot.DTYPES
])  # fmt: skip
def test_every_kernel_compiles_without_a_fault(arch, dtype, tmp_path):
    every = 1 if EVERYTHING else ALWAYS.get((arch, dtype))
    if every is None:
        pytest.skip("GLORA_KERNELS_TEST_ALL=1 compiles this as well")
    found = reports(tmp_path, "--arch", arch, "--dtype", dtype, "--every", str(every))
    assert all((r.arch, r.dtype) == (arch, dtype) for r in found)
    faults = [f"{r.kernel} ({r.case}, {r.config}): {r.faults}" for r in found if r.faults]
    assert not faults, "\n".join(faults)
    source = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    kernels = set(re.findall(r"^def (_\w+_kernel)\(", source, re.M))
    assert len(kernels) >= 7
    assert {r.kernel for r in found} == kernels
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
            by_pointers = "unaligned" in r.case or "W fp32" in r.case
            assert (r.tma == 0) == by_pointers, r
        if arch == "sm_80" and dtype != "fp32" and r.kernel in BIG and "unaligned" not in r.case:
            assert r.async_copies > 0, f"no cp.async: {r}"


def test_the_committed_report_has_every_form():
    """A form or a block size that is new was compiled for every card and dtype, and nothing was wrong."""
    rows = [line.strip("| ").split(" | ") for line in REPORT.read_text().splitlines() if line.startswith("| `_")]
    known = {(row[0].strip("`"), *row[1:5]): row[-1] for row in rows}
    expected = {
        (launch.kernel.__name__, name, dtype, arch, aot.blocks_of(launch))
        for arch in aot.ARCHS
        for dtype in aot.DTYPES
        for name, launch in aot.cases(aot.DTYPES[dtype], arch)
    }
    assert known.keys() == expected
    assert set(known.values()) == {"yes"}


AWKWARD = """
import sys
sys.path.insert(0, "tests")
import torch
from kernels.test_fused import plan
from glora_kernels.launch import aot, routes
from glora_kernels.launch.configs import SHARED_LIMIT
from glora_kernels.ops.common import Supports
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
                    compiled, _ = aot.compile_launch(step, arch)
                    assert compiled.metadata.shared <= SHARED_LIMIT[arch], str(step)
print("all compiled")
"""


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "dtype", "route"), [("sm_90", "bf16", "fused"), ("sm_80", "fp32", "library")])
def test_awkward_sizes_compile(arch, dtype, route):
    """A size or stride of 1 is folded in as a constant by the JIT: M, N, K, R = 1 are other code."""
    done = run("-c", AWKWARD, arch, dtype, route)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "all compiled" in done.stdout


def test_refused_in_the_interpreter():
    done = run("-m", "glora_kernels.launch.aot", "--arch", "sm_90", "--dtype", "fp32", interpret="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


GOOD = aot.Report(
    kernel="_glora_fwd_kernel",
    case="fwd full",
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


@pytest.mark.parametrize("case", ["wc", "totals", "finish lora", "prepare, W_eff of a vector"])
def test_no_matrix_instruction_is_expected_where_there_is_no_product(case):
    assert dataclasses.replace(GOOD, case=case, matrix_count=0, matrix_instruction="", batch=0).faults == []
    assert dataclasses.replace(GOOD, dtype="fp32", matrix_count=0, matrix_instruction="", batch=0).faults == []
