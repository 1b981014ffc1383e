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

import glora_kernels.kernels
from glora_kernels.launch import aot

KERNELS = Path(glora_kernels.kernels.__file__).parent
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


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_every_kernel_compiles_without_a_fault(arch, dtype, tmp_path):
    found = reports(tmp_path, "--arch", arch, "--dtype", dtype)
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
            assert r.matrix_instruction == "HGMMA", r
            assert 0 < r.waits < r.matrix_count, f"a wait after every product: {r}"
        if arch == "sm_100" and dtype != "fp32" and r.kernel in BIG[:2]:
            assert r.matrix_instruction == "UTCHMMA", r


AWKWARD = """
import sys, torch
from glora_kernels.launch import aot, glora as launch
arch, name = sys.argv[1:]
dtype = aot.DTYPES[name]
def meta(*shape, dtype=dtype): return torch.empty(shape, dtype=dtype, device="meta")
def wide(*shape): return meta(*shape, dtype=torch.float32)
seed = meta(1, dtype=torch.int64)
for m, n, k, r in [(1, 1, 1, 1), (70000, 4097, 4095, 17)]:
    x, w, y = meta(m, k), meta(n, k), meta(m, n)
    wide_x = meta(m, 2 * k + 1)[:, 1::2]
    h, up, down = meta(m, r), meta(n, r), meta(r, k)
    launches = [
        launch.glora_fwd_launch(x, w, y, h=h, up=up, a=meta(n), b=meta(1), sigma=wide(m), beta=wide(n), arch=arch),
        launch.glora_fwd_launch(wide_x, meta(k, n).t(), y, h=h[:, :1], up=up[:, :1], a=meta(1), b=None, sigma=None,
                                beta=meta(n), arch=arch),
        launch.glora_dx_launch(y, w, x, s=h, down=down, free_rank=0, a=meta(n), tau=wide(m), dropout_p=0.1,
                               seed=seed, arch=arch),
        launch.glora_dx_launch(meta().expand(m, n), w, x, s=meta(m, r + 1), down=meta(r + 1, k), free_rank=1,
                               a=None, tau=None, dropout_p=0.5, seed=seed, arch=arch),
        launch.project_launch(wide_x, v=down, out=h, row_sum=wide(m), row_weight=meta(1), dropout_p=0.1, seed=seed,
                              arch=arch),
        launch.weff_launch(w, wide(n, r), wide(r, k), w, arch=arch),
        launch.beta_launch(w, meta(n), meta(k), meta(1), wide(n), wide(n), arch=arch),
    ]
    splits = launch.factor_grad_splits(m, n, r, dtype, arch)
    launches.append(launch.factor_grad_launch(y, wide(splits, r + 3, n), s=h, with_sum=True, sigma=wide(m), y=y,
                                              arch=arch))
    nt, kt = launch.hadamard_grad_tiles(n, k, dtype, arch)
    launches.append(launch.hadamard_grad_launch(y, wide_x, w, a_up=up, a_down=down, dup=wide(kt, n, r),
                                                ddown=wide(nt, r, k), arch=arch))
    marked = torch.empty(n, dtype=torch.int8, device="meta")
    launches.append(launch.hadamard_grad_launch(y, x, w, dup=wide(kt, n, 1), marked=marked, arch=arch))
    for one in launches:
        compiled = aot.compile_launch(one, arch)
        assert compiled.metadata.shared <= aot.SHARED_LIMIT[arch], str(one)
print("all compiled")
"""


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "dtype"), [("sm_90", "bf16"), ("sm_80", "fp32")])
def test_awkward_sizes_compile(arch, dtype):
    """A size or stride of 1 is folded in as a constant by the JIT: M, N, K, R = 1 are other code."""
    done = run("-c", AWKWARD, arch, dtype)
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
    waits=8,
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
])  # fmt: skip
def test_faults_are_found(change, words):
    faults = dataclasses.replace(GOOD, **change).faults
    assert len(faults) == 1
    assert words in faults[0]


@pytest.mark.parametrize("case", ["weff", "beta", "sum of rows"])
def test_no_matrix_instruction_is_expected_where_there_is_no_product(case):
    assert dataclasses.replace(GOOD, case=case, matrix_count=0, matrix_instruction="", waits=0).faults == []
    assert dataclasses.replace(GOOD, dtype="fp32", matrix_count=0, matrix_instruction="", waits=0).faults == []
