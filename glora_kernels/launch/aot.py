"""Compile every kernel ahead of time, for cards that are not here, and report what the compiler made of it.

`python -m glora_kernels.launch.aot` compiles each kernel × dtype × architecture × configuration that the launchers
choose, with the same `Launch` objects (on meta tensors), and reads registers, stack, spills, shared memory and the
matrix instructions out of the machine code. It needs no GPU, and a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch import environment
from glora_kernels.launch.plan import Launch

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Shared memory a block may use, in bytes."""

MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\b", "sm_89": r"\bHMMA\b", "sm_90": r"\bHGMMA\b|\bHMMA\b", "sm_100": r"\bUTCHMMA\b|\bHMMA\b",
    "gfx942": r"\bv_mfma_",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What one compilation gave. Sizes in bytes; -1 where the tool chain does not tell."""

    kernel: str
    case: str
    dtype: str
    arch: str
    config: str
    registers: int
    stack: int
    spill: int
    shared: int
    matrix_instruction: str
    matrix_count: int
    waits: int
    serialized: bool
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """Why this compilation is not acceptable; empty where it is."""
        found = [self.error] if self.error else []
        if not self.error and min(self.registers, self.stack, self.spill, self.shared) < 0:
            found.append("the compiler's report could not be read")
        if self.stack > 0 or self.spill > 0:
            found.append(f"{self.stack} bytes of stack, {self.spill} spilled")
        if self.serialized:
            found.append("wgmma serialized (C7515)")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, over the card's {SHARED_LIMIT[self.arch]}")
        expects = self.dtype != "fp32" and not self.case.startswith(("sum", "weff", "beta"))
        if not self.error and expects and self.matrix_count == 0:
            found.append("no matrix instruction")
        if self.matrix_instruction == "HGMMA" and self.waits >= self.matrix_count:
            found.append("a wait after every wgmma")
        return found


def cases(dtype: torch.dtype, arch: str) -> Iterator[tuple[str, Launch]]:
    """Every kernel in every form the launchers use that changes its code, on LLaMA-like sizes."""
    from glora_kernels.launch import glora as launch

    m, n, k, r = 4096, 4096, 14336, 16

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def wide(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.float32)

    x, w, dy, seed = meta(m, k), meta(n, k), meta(m, n), meta(1, dtype=torch.int64)
    none: dict[str, Any] = {"h": None, "up": None, "a": None, "b": None, "sigma": None, "beta": None}
    low: dict[str, Any] = {"h": meta(m, r), "up": meta(n, r)}
    full: dict[str, Any] = {**low, "a": meta(n), "b": meta(n), "sigma": wide(m), "beta": wide(n)}
    yield "fwd lora", launch.glora_fwd_launch(x, w, dy, **{**none, **low}, arch=arch)
    yield "fwd full", launch.glora_fwd_launch(x, w, dy, **full, arch=arch)
    yield (
        "fwd full, M=32",
        launch.glora_fwd_launch(
            meta(32, k), w, meta(32, n), **{**full, "h": meta(32, r), "sigma": wide(32)}, arch=arch
        ),
    )
    wide_rank = {"h": meta(m, 256), "up": meta(n, 256)}
    yield "fwd lora, R=256", launch.glora_fwd_launch(x, w, dy, **{**none, **wide_rank}, arch=arch)
    yield (
        "fwd lora, W transposed",
        launch.glora_fwd_launch(x, meta(k, n).t(), dy, **{**none, **low}, arch=arch),
    )
    # Under autocast W and the adapters stay fp32 and the kernels cast what they load.
    mixed: dict[str, Any] = {**full, "up": wide(n, r), "a": wide(n), "b": wide(n)}
    yield "fwd full, W fp32", launch.glora_fwd_launch(x, wide(n, k), dy, **mixed, arch=arch)
    plain: dict[str, Any] = {
        "free_rank": 0,
        "a": None,
        "tau": None,
        "dropout_p": 0.0,
        "seed": None,
        "arch": arch,
    }
    back: dict[str, Any] = {"s": meta(m, r), "down": meta(r, k)}
    yield "dx lora", launch.glora_dx_launch(dy, w, x, **back, **plain)
    scaled = {**plain, "a": meta(n), "tau": wide(m), "dropout_p": 0.1, "seed": seed}
    yield "dx full, dropout", launch.glora_dx_launch(dy, w, x, **back, **scaled)
    mixed = {"s": meta(m, r), "down": wide(r, k), **scaled, "a": wide(n)}
    yield "dx full, dropout, W fp32", launch.glora_dx_launch(dy, wide(n, k), x, **mixed)
    two: dict[str, Any] = {"s": meta(m, 2 * r), "down": meta(2 * r, k)}
    yield "dx product variant", launch.glora_dx_launch(dy, w, x, **two, **{**plain, "free_rank": r})
    project: dict[str, Any] = {"v": meta(r, k), "out": meta(m, r), "row_weight": None, "arch": arch}
    yield "project", launch.project_launch(x, **project, row_sum=wide(m))
    yield "project, dropout", launch.project_launch(x, **project, row_sum=None, dropout_p=0.1, seed=seed)
    yield (
        "sum of rows",
        launch.project_launch(w.t(), v=None, out=None, row_sum=meta(k), row_weight=wide(n), arch=arch),
    )
    splits = launch.factor_grad_splits(m, n, r, dtype, arch)
    yield (
        "factor grad, sums",
        launch.factor_grad_launch(
            dy, wide(splits, r + 3, n), s=meta(m, r), with_sum=True, sigma=wide(m), y=dy, arch=arch
        ),
    )
    splits = launch.factor_grad_splits(m, k, r, dtype, arch)
    yield (
        "factor grad, dropout",
        launch.factor_grad_launch(
            x,
            wide(splits, r, k),
            s=meta(m, r),
            with_sum=False,
            sigma=None,
            y=None,
            dropout_p=0.1,
            seed=seed,
            arch=arch,
        ),
    )
    up, down = meta(n, r), meta(r, k)
    yield "weff", launch.weff_launch(w, up, down, meta(n, k), arch=arch)
    n_tiles, k_tiles = launch.hadamard_grad_tiles(n, k, dtype, arch)
    yield (
        "hadamard grad",
        launch.hadamard_grad_launch(
            dy, x, w, a_up=up, a_down=down, dup=wide(k_tiles, n, r), ddown=wide(n_tiles, r, k), arch=arch
        ),
    )
    yield (
        "hadamard grad, near zero",
        launch.hadamard_grad_launch(dy, x, w, dup=wide(k_tiles, n, 1), marked=meta(n, dtype=torch.int8), arch=arch),
    )
    yield "beta", launch.beta_launch(w, meta(n), meta(k), meta(n), meta(n), wide(n), arch=arch)


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compile as the JIT would: pointers and multiples of 16 marked divisible, ones and absent pointers folded in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    constexpr_names = {names[i] for i in launch.kernel.constexprs}
    signature, constants, attrs = {}, {}, {}
    for i, name in enumerate(names):
        value = launch.args[name]
        if name in constexpr_names or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = _signature_type(value)
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attrs[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options=dict(launch.options))


def report(name: str, launch: Launch, dtype: str, arch: str) -> Report:
    """Compile one launch and read the machine code. A failed compilation is a report with `error` set."""
    blocks = "x".join(str(v) for key, v in launch.args.items() if key.startswith("BLOCK_"))
    config = f"{blocks} w{launch.options['num_warps']} s{launch.options['num_stages']}"
    head = (launch.kernel.__name__, name, dtype, arch, config)
    try:
        compiled = compile_launch(launch, arch)
    except Exception as error:
        return Report(*head, -1, -1, -1, -1, "", 0, 0, False, f"{type(error).__name__}: {str(error)[:500]}")
    read = _read_amd if arch.startswith("gfx") else _read_nvidia
    return Report(*head, **read(compiled, arch))


def run(
    archs: Iterable[str], dtypes: Iterable[str], jobs: int, progress: Callable[[int, int], None] | None = None
) -> list[Report]:
    """All reports, `jobs` compilations at a time."""
    tasks = [(arch, dtype, i) for arch in archs for dtype in dtypes for i in range(_case_count())]
    reports = []
    with ProcessPoolExecutor(jobs) as pool:
        for done, result in enumerate(pool.map(_task, tasks), start=1):
            reports.append(result)
            if progress is not None:
                progress(done, len(tasks))
    return reports


def markdown(reports: list[Report]) -> str:
    """The reports as a table, one line a kernel form, dtype and architecture."""
    head = "| kernel | form | dtype | arch | blocks | registers | stack | spill | shared | matrix instructions | ok |"
    lines = [
        "# Ahead-of-time compilation",
        "",
        f"triton {importlib.metadata.version('triton')}; `python -m glora_kernels.launch.aot`. Sizes in bytes.",
        "",
        head,
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        matrix = f"{r.matrix_count} {r.matrix_instruction}" if r.matrix_count else "–"
        verdict = "; ".join(r.faults) or "yes"
        lines.append(
            f"| `{r.kernel}` | {r.case} | {r.dtype} | {r.arch} | {r.config} | {r.registers} | {r.stack} | {r.spill} "
            f"| {r.shared} | {matrix} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m glora_kernels.launch.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time (default 2)")
    parser.add_argument("--json", type=Path, help="write the reports as JSON")
    parser.add_argument("--markdown", type=Path, help="write the reports as a Markdown table")
    args = parser.parse_args(argv)
    if environment.interpreting():
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")

    def progress(done: int, total: int) -> None:
        end = "\n" if done == total else "\r"
        print(f"compiled {done}/{total}", end=end, file=sys.stderr, flush=True)

    reports = run(args.arch, args.dtype, args.jobs, progress)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(reports))
    if not args.json and not args.markdown:
        print(markdown(reports))
    faulty = [r for r in reports if r.faults]
    for r in faulty:
        print(f"{r.kernel} ({r.case}, {r.dtype}, {r.arch}): {'; '.join(r.faults)}", file=sys.stderr)
    return 1 if faulty else 0


def _case_count() -> int:
    return sum(1 for _ in cases(torch.float16, "sm_90"))


def _task(task: tuple[str, str, int]) -> Report:
    arch, dtype, index = task
    name, launch = list(cases(DTYPES[dtype], arch))[index]
    return report(name, launch, dtype, arch)


def _signature_type(value: object) -> str:
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
                 torch.int8: "i8"}  # fmt: skip
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if abs(value) < 2**31 else "i64"


def _read_nvidia(compiled: Any, arch: str) -> dict[str, Any]:
    from triton import backends

    tools = Path(next(iter(backends.__path__))) / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if arch == "sm_100" and (tools / "ptxas-blackwell").exists() else "ptxas")
    target = re.search(r"^\.target\s+(\w+)", compiled.asm["ptx"], re.M)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        name = target.group(1) if target else arch
        command: list[str | Path] = [ptxas, "-v", f"--gpu-name={name}", ptx, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    matrix = re.findall(MATRIX_INSTRUCTION[arch], sass)
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "stack": _number(r"(\d+) bytes stack frame", log),
        "spill": _number(r"(\d+) bytes spill stores", log),
        "shared": compiled.metadata.shared,
        "matrix_instruction": matrix[0] if matrix else "",
        "matrix_count": len(matrix),
        "waits": len(re.findall(r"WARPGROUP\.DEPBAR", sass)),
        "serialized": "C7515" in log,
    }


def _read_amd(compiled: Any, arch: str) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    matrix = re.findall(MATRIX_INSTRUCTION[arch], text)
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "spill": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "shared": compiled.metadata.shared,
        "matrix_instruction": "v_mfma" if matrix else "",
        "matrix_count": len(matrix),
        "waits": 0,
        "serialized": False,
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else -1


if __name__ == "__main__":
    sys.exit(main())
