"""Compile the kernels ahead of time, for cards that are not here, and report the properties of the machine code.

`python -m glora_kernels.tools.aot` plans the calls of `tools.shipped` as real calls are, and compiles every form of a
kernel that they ask for as Triton's JIT would on the card (`tools.elsewhere`). From the machine code it reads
registers, stack, spills, shared memory, the widths of loads and the matrix instructions. It needs no GPU;
TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glora_kernels.operands import Matrix
from glora_kernels.runtime import configs, environment, tables
from glora_kernels.runtime.configs import SHARED_LIMIT
from glora_kernels.runtime.launch import Launch
from glora_kernels.runtime.progress import progress
from glora_kernels.tools import elsewhere, outputs, shipped
from glora_kernels.tools.commands import text
from glora_kernels.tools.commands.printing import quietly

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
DTYPES = dict(reversed(tables.DTYPES.items()))
MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\b", "sm_89": r"\bHMMA\b", "sm_90": r"\bHGMMA\b|\bHMMA\b", "sm_100": r"\bUTCHMMA\b|\bHMMA\b",
    "gfx942": r"\bv_mfma_",
}  # fmt: skip


_NARROW = 4
"""The most loads of less than 32 bits in a memory-bound kernel: it may read some vectors number by number."""


@dataclass(frozen=True)
class Report:
    """The result of one compilation. Sizes in bytes; -1 where the tool chain does not report it.

    form: the key of the kernel's form (`elsewhere.key_of`). asked: the first call that asks for the form. batch: see
    `_longest_batch`. narrow: the number of loads of less than 32 bits. even, multiplies: see `is_even`, `multiplies`.
    """

    kernel: str
    form: str
    asked: str
    dtype: str
    arch: str
    config: str
    even: bool
    multiplies: bool
    registers: int = -1
    stack: int = -1
    spill: int = -1
    shared: int = -1
    matrix_instruction: str = ""
    matrix_count: int = 0
    batch: int = 0
    tma: int = 0
    async_copies: int = 0
    narrow: int = 0
    serialized: bool = False
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """Why this compilation is not acceptable; empty if it is."""
        found = [self.error] if self.error else []
        if not self.error and min(self.registers, self.stack, self.spill, self.shared) < 0:
            found.append("the compiler's report could not be read")
        if self.stack > 0 or self.spill > 0:
            found.append(f"{self.stack} bytes of stack, {self.spill} spilled")
        if self.serialized:
            found.append("wgmma serialized (C7511, C7515 …)")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, over the card's {SHARED_LIMIT[self.arch]}")
        if not self.error and self.multiplies and self.dtype != "fp32" and self.matrix_count == 0:
            found.append("no matrix instruction")
        if self._waits_for("products") and "HGMMA" in self.matrix_instruction and self.batch < 2:
            found.append("a wait after every wgmma")
        if self._waits_for("memory") and self.even and self.narrow > _NARROW:
            found.append(f"{self.narrow} loads of less than 32 bits")
        return found

    def _waits_for(self, what: str) -> bool:
        key = configs.key_of(self.kernel)
        return bool(key) and configs.KERNELS[key].waits == what


class Form(NamedTuple):
    """A form of a kernel: its key, the first call that asks for it, and the launch in that call."""

    key: str
    asked: str
    launch: Launch


@functools.lru_cache(maxsize=1)
def forms(arch: str, dtype: torch.dtype, every: int = 1) -> list[Form]:
    """The forms that the calls of `tools.shipped` ask for on a card; of each kernel only one in `every`."""
    asked, seen, found = elsewhere.Forms(), Counter[str](), []
    with elsewhere.on_card(arch), tables.using(None):
        for call in (*shipped.models(arch, dtype), *shipped.others(arch, dtype)):
            for launch in call.steps:
                if not isinstance(launch, Launch) or (key := asked.ask(launch)) is None:
                    continue
                name = launch.kernel.__name__
                if seen[name] % every == 0:
                    found.append(Form(key, call.text, launch))
                seen[name] += 1
    return found


def blocks_of(launch: Launch) -> str:
    """A launch's blocks, warps and stages, as text for the report."""
    blocks = "x".join(str(value) for key, value in launch.args.items() if key.startswith("BLOCK_"))
    return f"{blocks} w{launch.options['num_warps']} s{launch.options['num_stages']}"


def report(form: Form, dtype: str, arch: str) -> Report:
    """Compile one form and read its machine code. If the compilation fails, the report has `error` set."""
    launch = form.launch
    head = (
        launch.kernel.__name__, form.key, form.asked, dtype, arch, blocks_of(launch), is_even(launch.args),
        multiplies(launch),
    )  # fmt: skip
    try:
        with elsewhere.on_card(arch):
            compiled, log = elsewhere.compile_launch(launch)
    except Exception as error:
        return Report(*head, error=f"{type(error).__name__}: {str(error)[:500]}")
    read = _read_amd(compiled) if arch.startswith("gfx") else _read_nvidia(compiled, log)
    found = re.findall(MATRIX_INSTRUCTION[arch], read.pop("code"))
    kinds = " + ".join(sorted({name.removesuffix("_") for name in found}))
    shared = compiled.metadata.shared
    return Report(*head, **read, shared=shared, matrix_instruction=kinds, matrix_count=len(found))


def is_even(args: dict[str, Any]) -> bool:
    """Whether Triton knows that the rows of all matrices among the arguments begin at multiples of 16 numbers.

    False where U = W·A_up is computed, because A_up is read across its rows.
    """
    ranks = _ranks(args, "P", "R", "Rs")
    return args.get("u_ptr") is None and all(rank % 16 == 0 for rank in ranks) and all(
        value.row % 16 == 0 or value.col % 16 == 0
        for arg in args.values() for value in _flat(arg) if isinstance(value, Matrix)
    )  # fmt: skip


def multiplies(launch: Launch) -> bool:
    """Whether a launch has a matrix product. Some kernels have one only with low-rank factors."""
    key, args = configs.key_of(launch.kernel.__name__), launch.args
    if not key or not configs.KERNELS[key].multiplies:
        return False
    ranks = _ranks(args, "R", "Rs", *(() if args.get("weff_ptr") is not None else ("P",)))  # x meets no A in W_eff
    return configs.KERNELS[key].waits == "products" or any(ranks) or not ranks


def _ranks(args: dict[str, Any], *names: str) -> list[int]:
    return [value for name in names for value in _flat(args.get(name))]


def _flat(value: Any) -> Iterator[Any]:
    """The values in an argument's structures, without None; a `Matrix` is one value."""
    if isinstance(value, tuple) and not isinstance(value, Matrix):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def run(
    archs: Iterable[str],
    dtypes: Iterable[str],
    jobs: int,
    every: int = 1,
    kernels: Collection[str] = (),
    show: bool = False,
) -> list[Report]:
    """Compile and report these kernels, or all, with `jobs` compilations at a time.

    Raises:
        ValueError: none of the calls asks for one of the kernels.
    """
    tasks, asked = [], set()
    for arch in archs:
        for dtype in dtypes:
            for i, form in enumerate(forms(arch, DTYPES[dtype], every)):
                asked.add(name := form.launch.kernel.__name__)
                if not kernels or name in kernels:
                    tasks.append((arch, dtype, every, i))
    if unknown := [name for name in kernels if name not in asked]:
        raise ValueError(f"no layer asks for {unknown[0]!r}; there are {', '.join(sorted(asked))}")
    with ProcessPoolExecutor(jobs) as pool:
        found = pool.map(_task, tasks)
        return [next(found) for _ in progress(tasks, "compiled", show)]


def markdown(reports: list[Report]) -> str:
    """The reports as a Markdown table, a line for each form, dtype and architecture."""
    columns = ("kernel", "form", "first asked by", "dtype", "arch", "blocks", "registers", "stack", "spill", "shared",
               "matrix instructions", "TMA", "narrow loads", "ok")  # fmt: skip
    archs, dtypes = (", ".join(dict.fromkeys(getattr(r, name) for r in reports)) for name in ("arch", "dtype"))
    lines = [
        "# Ahead-of-time compilation",
        "",
        f"Triton {environment.version('triton')}, for {archs}, in {dtypes}; "
        f"`python -m glora_kernels.tools.aot`. {len(reports)} forms, {sum(not r.faults for r in reports)} without a "
        "fault. Sizes in bytes.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for r in reports:
        matrix = f"{r.matrix_count} {r.matrix_instruction}" if r.matrix_count else "–"
        verdict = "; ".join(r.faults) or "yes"
        lines.append(
            f"| `{r.kernel}` | {r.form} | {r.asked} | {r.dtype} | {r.arch} | {r.config} | {r.registers} | {r.stack} "
            f"| {r.spill} | {r.shared} | {matrix} | {r.tma or '–'} | {r.narrow or '–'} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m glora_kernels.tools.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: all")
    parser.add_argument(
        "--every", type=text.positive, default=1, metavar="N", help="one form in N of each kernel (default 1)"
    )
    parser.add_argument(
        "--kernel", action="append", default=[], metavar="NAME",
        help="of this kernel alone, as _dy_kernel; repeatable (default: all)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=text.positive, default=2, help="compilations at a time (default 2)")
    parser.add_argument("--json", type=outputs.file, help="write the reports as JSON")
    parser.add_argument("--markdown", type=outputs.file, help="write the reports as a Markdown table")
    args = parser.parse_args(argv)
    if args.markdown and (args.every > 1 or args.kernel):
        parser.error("--markdown is the report of every form: leave out --every and --kernel")
    if environment.interpreting():
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")

    try:
        reports = run(args.arch, args.dtype, args.jobs, args.every, args.kernel, show=True)
    except ValueError as error:
        parser.error(f"--kernel: {error}")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(reports))
    if not args.json and not args.markdown:
        print(markdown(reports))
    faulty = [r for r in reports if r.faults]
    for r in faulty:
        print(f"{r.kernel} ({r.asked}, {r.dtype}, {r.arch}): {'; '.join(r.faults)}", file=sys.stderr)
    return 1 if faulty else 0


def _task(task: tuple[str, str, int, int]) -> Report:
    arch, dtype, every, index = task
    return report(forms(arch, DTYPES[dtype], every)[index], dtype, arch)


def _read_nvidia(compiled: Any, log: str) -> dict[str, Any]:
    from triton import backends

    disassembler = Path(next(iter(backends.__path__))) / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command: list[str | Path] = [disassembler, "-c", "-ndf", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "code": sass,
        "registers": _number(r"Used (\d+) registers", log),
        "stack": _number(r"(\d+) bytes stack frame", log),
        "spill": _number(r"(\d+) bytes spill stores", log),
        "batch": _longest_batch(sass),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)),
        "tma": len(re.findall(r"\bUTMALDG\b|\bUTMASTG\b", sass)),
        "narrow": len(re.findall(r"\bLDG(?:\.\w+)*\.[US](?:8|16)\b", sass)),
        "serialized": "instructions are serialized" in log,
    }


def _longest_batch(sass: str) -> int:
    """The most wgmma with no wait for all of them in between: those of one main-loop step, unless serialized."""
    longest = run = 0
    for instruction in re.findall(r"\bHGMMA\b|WARPGROUP\.DEPBAR\.LE gsb0, 0x0", sass):
        run = run + 1 if instruction == "HGMMA" else 0
        longest = max(longest, run)
    return longest


def _read_amd(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    return {
        "code": code,
        "registers": _number(r"\.vgpr_count:\s+(\d+)", code),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        "spill": _number(r"\.vgpr_spill_count:\s+(\d+)", code),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else -1


if __name__ == "__main__":
    sys.exit(quietly(main))
