"""Compile every kernel ahead of time, for cards that are not here, and report what the compiler made of it.

`python -m glora_kernels.launch.aot` compiles each kernel × dtype × architecture × configuration that the launchers
choose, with the same `Launch` objects (on meta tensors), and reads registers, stack, spills, shared memory and the
matrix instructions out of the machine code. It needs no GPU, and a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glora_kernels.launch import (
    aot_cases,
    aot_depth_cases,
    aot_grouped_cases,
    aot_quant_cases,
    aot_small_m_cases,
    environment,
    outputs,
)
from glora_kernels.launch.configs import SHARED_LIMIT
from glora_kernels.launch.plan import Launch

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\b", "sm_89": r"\bHMMA\b", "sm_90": r"\bHGMMA\b|\bHMMA\b", "sm_100": r"\bUTCHMMA\b|\bHMMA\b",
    "gfx942": r"\bv_mfma_",
}  # fmt: skip


_WITHOUT_PRODUCT = (
    "prepare, W_eff of a vector", "finish lora", "totals", "wc", "c grad", "merge vectors", "restore", "shift",
    "dequantize", "4-bit, one token", "4-bit, h of few tokens", "dy, A vector",
)  # fmt: skip
"""Forms that only read and add."""

_LARGE = (
    "_glora_fwd_kernel", "_glora_dx_kernel", "_hadamard_grad_kernel", "_grouped_fwd_kernel", "_grouped_dx_kernel",
)  # fmt: skip
"""Kernels that wait for the matrix unit, so that its instructions must be issued in batches."""


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
    batch: int
    tma: int
    async_copies: int
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
            found.append("wgmma serialized (C7511, C7515 …)")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, over the card's {SHARED_LIMIT[self.arch]}")
        expects = self.dtype != "fp32" and not self.case.startswith(_WITHOUT_PRODUCT)
        if not self.error and expects and self.matrix_count == 0:
            found.append("no matrix instruction")
        if self.kernel in _LARGE and "HGMMA" in self.matrix_instruction and self.batch < 2:
            found.append("a wait after every wgmma")
        return found


def cases(dtype: torch.dtype, arch: str, every: int = 1) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of every form of every kernel, or of the first form of each and every so many after it.

    They import the kernels, and so Triton.
    """
    seen: Counter[str] = Counter()
    for part in (aot_cases, aot_grouped_cases, aot_depth_cases, aot_quant_cases, aot_small_m_cases):
        for name, launch in part.cases(dtype, arch):
            kernel = launch.kernel.__name__
            if seen[kernel] % every == 0:
                yield name, launch
            seen[kernel] += 1


def compile_launch(launch: Launch, arch: str) -> tuple[Any, str]:
    """Compile as the JIT would: pointers and multiples of 16 marked divisible, ones and absent pointers folded in.

    Returns the compiled kernel and what ptxas said about it, with the very options Triton gives it.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    constexpr_names = {names[i] for i in launch.kernel.constexprs}
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attrs: dict[Any, Any] = {}
    for i, name in enumerate(names):
        if name in constexpr_names:
            signature[name], constants[(i,)] = "constexpr", launch.args[name]
        else:
            signature[name] = _argument((i,), launch.args[name], constants, attrs)
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attrs)
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.compilation.always_compile = True  # what comes out of the cache has no log
        knobs.compilation.disable_line_info = True  # a sixth of the time, and no instruction
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=dict(launch.options))
    return compiled, log.getvalue()


def blocks_of(launch: Launch) -> str:
    """The configuration of a launch as the report writes it: blocks, warps, stages."""
    blocks = "x".join(str(value) for key, value in launch.args.items() if key.startswith("BLOCK_"))
    return f"{blocks} w{launch.options['num_warps']} s{launch.options['num_stages']}"


def report(name: str, launch: Launch, dtype: str, arch: str) -> Report:
    """Compile one launch and read the machine code. A failed compilation is a report with `error` set."""
    head = (launch.kernel.__name__, name, dtype, arch, blocks_of(launch))
    try:
        compiled, log = compile_launch(launch, arch)
    except Exception as error:
        return Report(*head, -1, -1, -1, -1, "", 0, 0, 0, 0, False, f"{type(error).__name__}: {str(error)[:500]}")
    read = _read_amd(compiled, arch) if arch.startswith("gfx") else _read_nvidia(compiled, log, arch)
    return Report(*head, **read)


def run(
    archs: Iterable[str],
    dtypes: Iterable[str],
    jobs: int,
    every: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Report]:
    """All reports, `jobs` compilations at a time."""
    tasks = [
        (arch, dtype, every, i)
        for arch in archs
        for dtype in dtypes
        for i in range(sum(1 for _ in cases(DTYPES[dtype], arch, every)))
    ]
    reports = []
    with ProcessPoolExecutor(jobs) as pool:
        for done, result in enumerate(pool.map(_task, tasks), start=1):
            reports.append(result)
            if progress is not None:
                progress(done, len(tasks))
    return reports


def markdown(reports: list[Report]) -> str:
    """The reports as a table, one line a kernel form, dtype and architecture."""
    columns = ("kernel", "form", "dtype", "arch", "blocks", "registers", "stack", "spill", "shared",
               "matrix instructions", "TMA", "ok")  # fmt: skip
    head = f"| {' | '.join(columns)} |"
    lines = [
        "# Ahead-of-time compilation",
        "",
        f"triton {importlib.metadata.version('triton')}; `python -m glora_kernels.launch.aot`. Sizes in bytes.",
        "",
        head,
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        matrix = f"{r.matrix_count} {r.matrix_instruction}" if r.matrix_count else "–"
        verdict = "; ".join(r.faults) or "yes"
        lines.append(
            f"| `{r.kernel}` | {r.case} | {r.dtype} | {r.arch} | {r.config} | {r.registers} | {r.stack} | {r.spill} "
            f"| {r.shared} | {matrix} | {r.tma or '–'} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m glora_kernels.launch.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: all")
    parser.add_argument("--every", type=_count, default=1, metavar="N", help="one form in N of each kernel (default 1)")
    parser.add_argument("--jobs", type=_count, default=2, help="compilations at a time (default 2)")
    parser.add_argument("--json", type=outputs.file, help="write the reports as JSON")
    parser.add_argument("--markdown", type=outputs.file, help="write the reports as a Markdown table")
    args = parser.parse_args(argv)
    if args.markdown and args.every > 1:
        parser.error("--markdown is the report of every form: leave out --every")
    if environment.interpreting():
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")

    def progress(done: int, total: int) -> None:
        end = "\n" if done == total else "\r"
        print(f"compiled {done}/{total}", end=end, file=sys.stderr, flush=True)

    reports = run(args.arch, args.dtype, args.jobs, args.every, progress)
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


def _task(task: tuple[str, str, int, int]) -> Report:
    arch, dtype, every, index = task
    name, launch = list(cases(DTYPES[dtype], arch, every))[index]
    return report(name, launch, dtype, arch)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on; got {text!r}")
    return int(text)


def _argument(path: tuple[int, ...], value: Any, constants: dict[Any, Any], attrs: dict[Any, Any]) -> Any:
    """The type of one argument, or of each entry of a tuple, as the JIT would specialize it."""
    if isinstance(value, tuple):
        return tuple(_argument((*path, i), entry, constants, attrs) for i, entry in enumerate(value))
    if type(value).__name__ == "TensorDescriptor":
        block = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{_signature_type(value.base)[1:]}[{block}]>"
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
        attrs[path] = [["tt.divisibility", 16]]
    return _signature_type(value)


def _signature_type(value: object) -> str:
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
                 torch.int8: "i8", torch.uint8: "u8"}  # fmt: skip
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int)
    return "i32" if abs(value) < 2**31 else "i64"


def _read_nvidia(compiled: Any, log: str, arch: str) -> dict[str, Any]:
    from triton import backends

    disassembler = Path(next(iter(backends.__path__))) / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command: list[str | Path] = [disassembler, "-c", "-ndf", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    matrix = re.findall(MATRIX_INSTRUCTION[arch], sass)
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "stack": _number(r"(\d+) bytes stack frame", log),
        "spill": _number(r"(\d+) bytes spill stores", log),
        "shared": compiled.metadata.shared,
        "matrix_instruction": " + ".join(sorted(set(matrix))),
        "matrix_count": len(matrix),
        "batch": _longest_batch(sass),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)),
        "tma": len(re.findall(r"\bUTMALDG\b|\bUTMASTG\b", sass)),
        "serialized": "instructions are serialized" in log,
    }


def _longest_batch(sass: str) -> int:
    """The most wgmma in a row without a wait for all of them: a main loop's step, where it is not serialized."""
    longest = run = 0
    for instruction in re.findall(r"\bHGMMA\b|WARPGROUP\.DEPBAR\.LE gsb0, 0x0", sass):
        run = run + 1 if instruction == "HGMMA" else 0
        longest = max(longest, run)
    return longest


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
        "batch": 0,
        "tma": 0,
        "async_copies": 0,
        "serialized": False,
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else -1


if __name__ == "__main__":
    sys.exit(main())
