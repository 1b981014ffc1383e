"""What a card does with the library, in eight minutes: is it right, and what does it cost. One command, once or twice.

    scripts/first-light [--out out/first-light] [--minutes 8] [--steps NAME ...]
    scripts/first-light --second        a second call: compute-sanitizer over csrc, ncu over the layer that costs most

Each step has a limit, and what it prints is in <out>/first-light.log at once (of a second call second-light.log). So is
a row that was measured, in <out>/<card>.stage.jsonl, and a run over the same folder goes on from there. <card>.json,
<card>_detail.json and <card>.md are written after every stage, routes.json after every route; clocks.csv has the card's
clocks, power and temperature by the second. Where it is ended early, all that was there stays.

Nothing is fetched, and no setting of the card is changed. Kernels come from build/warm/triton-<version>.tar.xz, where
`scripts/warm-cache` made that on a machine without a card; whatever a step compiles all the same is counted and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import steps, warm_cache
from benchmarks.cases import DISTINCT, FULL, LLAMA
from benchmarks.steps import Run, Step
from glora_kernels.tools import outputs

ROOT = Path(__file__).parents[1]
LOG, SECOND_LOG = "first-light.log", "second-light.log"
CACHE = ROOT / "build" / "triton-cache"
STAGES = ("one-layer", "headline", "groups", "few-tokens", "routed")
"""Of `benchmarks.report`."""
RIGHT = "a_real_size and dtype2 or twenty_runs and dtype1 or cuda_graph or replayed or no_synchronisation"
"""Of tests/gpu/test_gpu.py: bf16 over several tiles, twenty equal runs, graphs, and a host that does not wait."""
SECOND = "a_real_size and dtype2 and (vector-lora or none-lora)"
TOOLS = {"memcheck": 75.0, "racecheck": 90.0, "synccheck": 60.0, "initcheck": 60.0}
"""Of compute-sanitizer, with what each may take over csrc."""
TABLES_S = 30.0
"""For the files and tables at the end, of whatever there is by then."""
PYTEST = ["-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
"""-v: each test is named when it ends, so that a log which was cut short says what failed."""
ORDER = ("tests/csrc/", "tests/gpu/test_gpu_", "tests/gpu/", "")
"""Of the files with the card's tests, by the beginnings of their names."""
CSRC = Step("csrc", 150, ["setup.py", "-q", "build_ext", "--inplace"])
PROFILED = "regex:^_|nvjet|gemm|cutlass"
"""Our kernels, and the products of the vendor's library."""
MUCH = 400
"""More lines than a step prints that is shown whole."""


def report(name: str, seconds: float, out: Path, *stages: str, shows: int = steps.TAIL) -> Step:
    """Stages of the battery, which ends by itself before its limit."""
    command = ["-m", "benchmarks.report", "--device", "cuda", "--no-tests", "--no-pictures", "--out", str(out)]
    return Step(name, seconds, [*command, "--minutes", f"{(seconds - 5) / 60:.2f}", "--stages", *stages], shows=shows)


def tests(name: str, seconds: float, file: str, processes: int, *more: str) -> Step:
    """Tests of the card, in several processes where pytest-xdist is installed; 0: in one."""
    spread = ["-n", str(processes)] if processes and importlib.util.find_spec("xdist") else []
    return Step(name, seconds, [*PYTEST, file, *more, *spread])


def gpu_files() -> list[str]:
    """The files with tests that need a card, in the order of ORDER."""
    found = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py")) if _needs_card(path)]
    return sorted(found, key=lambda name: next(i for i, start in enumerate(ORDER) if name.startswith(start)))


def _needs_card(path: Path) -> bool:
    text = path.read_text()
    marked = "mark.gpu" in text or re.search(r"def test_\w+\([^)]*\bdevice\b", text)
    return bool(marked) and "dry_card" not in path.parts


def first(out: Path, processes: int) -> list[Step]:
    """The steps of a first call, those that matter most first."""
    layers = [f"--shape={m}x{LLAMA[name][0]}x{LLAMA[name][1]}" for m in (8192, 2048, 512) for name in DISTINCT]
    routes = ["-m", "glora_kernels", "tune", "--kernels", "routes", *layers, "--out", str(out / "routes.json")]
    return [
        report("one layer", 65, out, "one-layer"),
        tests("right", 75, "tests/gpu/test_gpu.py", processes, "-k", RIGHT),
        report("headline", 155, out, "headline"),
        Step("routes", 40, [*routes, "--minutes", "0.5"]),
        report("groups", 50, out, "groups"),
        report("few tokens", 40, out, "few-tokens"),
        report("routed", 40, out, "routed"),
        *(tests(name, 60, name, processes) for name in gpu_files()),
    ]


def second(out: Path, card: str) -> list[Step]:
    """The steps of a second call: csrc and the main path under compute-sanitizer, the costliest layer under ncu."""
    csrc, kernels = [*PYTEST, "tests/csrc/test_gpu_csrc.py", "-k", "not 14336"], [*PYTEST, "tests/gpu/test_gpu.py"]
    ours = ["--kernel-regex", "kns=small_m", "--kernel-regex", "kns=dequantize"]
    check = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1", "--tool"]
    case, m, n, k = worst(out, card)
    layer = ["-m", "glora_kernels", "bench", "--layer", f"{m}x{n}x{k}", "--case", case, "--rounds", "1"]
    layer += ["--bias"] if case == FULL else []
    profile = ["ncu", "--set", "full", "--clock-control", "none", "--force-overwrite", "-o", str(out / "worst")]
    profile += ["-k", PROFILED, "--launch-skip", "30", "--launch-count", "30"]  # from forward alone into both passes
    shown = ["ncu", "--import", str(out / "worst.ncu-rep"), "--page", "details"]
    return [
        *(Step(f"{tool} of csrc", s, csrc, [*check, tool, *ours, sys.executable]) for tool, s in TOOLS.items()),
        Step("memcheck", 90, [*kernels, "-k", SECOND], [*check, "memcheck", sys.executable]),
        Step(f"ncu of {case} at {m}x{n}x{k}", 120, layer, [*profile, sys.executable]),
        Step("what ncu saw", 20, [], shown, shows=MUCH),
        Step("evidence", 20, ["tests/evidence", "ncu", str(out / "worst.ncu-rep"), case]),
        Step("forms on the card", 120, ["tests/evidence", "card"]),
    ]


def worst(out: Path, card: str) -> tuple[str, int, int, int]:
    """(case, M, N, K) of the layer of ours that takes longest over its frozen one, forward and backward: of the rows in
    `out`, else of those in benchmarks/results; where there are none LoRA on gate."""
    for folder in (out, ROOT / "benchmarks" / "results"):
        path = folder / f"{card}_detail.json"
        lines = json.loads(path.read_text())["rows"] if path.exists() else []
        if own := [line for line in lines if _can_be_repeated(line["row"])]:
            row = max(own, key=lambda line: line["detail"].get("over_frozen", 0.0))["row"]
            return row["case"], row["m"], row["n"], row["k"]
    return ("lora", 8192, *LLAMA["gate"])


def _can_be_repeated(row: dict[str, Any]) -> bool:
    """Whether the command `bench` measures the same: ours over a dense base, without dropout."""
    plain = not row["case"].startswith(("nf4-", "frozen")) and not row["p"] and row["layer"] is not None
    return plain and (row["impl"], row["pass"], row["mode"]) == ("ours", "fwd_bwd", "graph")


def pick(listed: Sequence[Step], names: Iterable[str]) -> list[Step]:
    """The steps whose names begin with one of these, in their order; none may be unknown."""
    names = tuple(names)
    if unknown := [name for name in names if not any(step.name.startswith(name) for step in listed)]:
        known = ", ".join(repr(step.name) for step in listed)
        raise SystemExit(f"--steps: there is no {', '.join(map(repr, unknown))}; there are {known}")
    return [step for step in listed if step.name.startswith(names)]


def environment(cache: Path) -> dict[str, str]:
    """Of every step: this checkout, one cache of Triton's, no hub, few threads of the CPU."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache.absolute()), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
    }  # fmt: skip


def prepared(warm: Path, cache: Path) -> list[Step]:
    """What comes before all else: which machine this is, and the kernels that were compiled ahead."""
    smi = [Step("nvidia-smi", 10, [], ["nvidia-smi"], shows=20)] if shutil.which("nvidia-smi") else []
    return [*smi, Step("machine", 40, ["-m", "glora_kernels", "info"], shows=30), *unpacked(warm, cache)]


def unpacked(warm: Path, cache: Path) -> list[Step]:
    """The step that puts the archive of this Triton into the cache; none, which is said, where there is no archive."""
    archive = warm_cache.archive_of(warm)
    if not archive.exists():
        print(f"{archive} is not there: every kernel will be compiled here", flush=True)
        return []
    command = ["-m", "benchmarks.warm_cache", str(archive), str(cache.absolute())]
    return [Step("cache", 60, command, fills=True)]


def on_card(args: argparse.Namespace) -> None:
    """Everything, on the card that is here."""
    import torch

    from benchmarks.schema import slug

    if missing := [name for name in ("triton", "pytest") if not importlib.util.find_spec(name)]:
        raise SystemExit(f"first-light needs {' and '.join(missing)} in this Python: {sys.executable}")
    if not torch.cuda.is_available():
        raise SystemExit("first-light measures a card, and PyTorch sees none here")
    card, arch = slug(torch.cuda.get_device_name()), "".join(map(str, torch.cuda.get_device_capability()))
    variables = environment(args.cache) | {"GLORA_KERNELS_CUDA_ARCHS": arch}
    log, minutes = SECOND_LOG if args.second else LOG, args.minutes - TABLES_S / 60
    run = Run(args.out, minutes, args.cache, [sys.executable], variables, log)
    watch = _clocks(args.out / "clocks.csv")
    try:
        run.beside(CSRC)
        run.run(prepared(args.warm, args.cache))
        if args.second:
            run.join()
        listed = second(args.out, card) if args.second else first(args.out, min(8, (os.cpu_count() or 2) // 2))
        for step in listed if args.steps is None else pick(listed, args.steps):
            if step.name == "headline":
                run.join()  # times are taken on a machine that does nothing else
            run.run([step])
    finally:
        run.join(0.0)
        if watch is not None:
            watch.terminate()
        run.summary()
        if not args.second:
            run.step(report("tables", TABLES_S, args.out, *STAGES, shows=MUCH))


def _clocks(path: Path) -> subprocess.Popen[bytes] | None:
    """A process that notes the card's clocks by the second; None without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    fields = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu,clocks_event_reasons.active"
    with path.open("a") as file:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv", "-lms", "1000"]
        return subprocess.Popen(command, stdout=file, stderr=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=outputs.folder, default=ROOT / "out" / "first-light", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps (default 8)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these, by the beginnings of their names")
    parser.add_argument(
        "--warm", type=Path, default=warm_cache.WARM, metavar="DIR", help="of the packed caches (build/warm)"
    )
    parser.add_argument("--cache", type=outputs.folder, default=CACHE, metavar="DIR", help="build/triton-cache")
    parser.add_argument("--second", action="store_true", help="the second call: compute-sanitizer and ncu")
    args = parser.parse_args()
    args.out, args.warm, args.cache = args.out.absolute(), args.warm.absolute(), args.cache.absolute()
    os.chdir(ROOT)
    steps.end_on_sigterm()
    on_card(args)


if __name__ == "__main__":
    main()
