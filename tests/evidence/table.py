"""benchmarks/results/evidence.md, from what runs have left: nothing in it is typed, what no run has written is empty.

`profiled` also keeps what Nsight Compute saw of a layer, as `scripts/first-light --second` asks it to.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cells, results, targets

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / "evidence.md"
COLUMNS = {
    "eager": ("oracle", "eager PyTorch, written from the equations, beside float64"),
    "interpreter": ("interpreted", "Triton's interpreter, memory filled with NaN, beside float64"),
    "dry_card": ("compiled", "compiled and launched by Triton's JIT on the dry card, where numbers mean nothing"),
    "ttsem": ("executed", "the compiled Triton IR executed by ttsem: bounds, races, unwritten memory, beside float64"),
    "card": ("on a card", "on a GPU, memory filled with NaN, beside float64"),
    "ncu": ("profiled", "seen by Nsight Compute in a layer of full size"),
}
"""By the file that a run leaves, the column and what was done."""
WITHIN = {
    "A=none": ("LoRA", "LoRA, p = 0.1"),
    "A=vector": ("GLoRA, A = vector, B = lora", "GLoRA, A = vector, B = lora, C = D = E = vector (bias)"),
    "A=lora": ("GLoRA, A = B = lora",),
    "NF4 training": ("QLoRA: seven linears, forward + backward, over bf16 frozen, M = 8192",),
    "NF4 decode": ("LoRA on gate, up, down, M = 1: of a copy's bandwidth",),
    "q/k/v": (
        "q, k, v, forward: over one product with the concatenated weights",
        "q, k, v, forward + backward: over one product with the concatenated weights",
    ),
}
"""By form the targets in bf16 (`benchmarks.targets`) that a card must meet, as a CUDA graph."""

Kept = dict[str, Any]
"""What a run has proved of a form: "date", "with" (versions, the card), "kernels": by dtype their names."""


def file_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / "evidence" / f"{name}.json"


def runs(name: str, folder: Path = RESULTS) -> dict[str, Kept]:
    """By form what an instrument has proved."""
    path = file_of(name, folder)
    return json.loads(path.read_text()) if path.exists() else {}


def keep(name: str, form: str, kept: Kept | None, folder: Path = RESULTS) -> None:
    """Write what a run has proved of a form, None for nothing, and the table anew."""
    forms = {**runs(name, folder), form: kept}
    file_of(name, folder).parent.mkdir(exist_ok=True)
    results.write_json(file_of(name, folder), {one: own for one, own in sorted(forms.items()) if own is not None})
    results.write(folder / TABLE.name, text(folder))


def kernels() -> set[str]:
    """The names of the package's kernels; those that no run has launched stand at the table's end, their rows empty."""
    sources = [path.read_text() for path in (ROOT / "glora_kernels").rglob("*.py")]
    return {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE)}


def text(folder: Path = RESULTS) -> str:
    """The table as the files in a folder have it."""
    proved = {name: runs(name, folder) for name in COLUMNS}
    launched = {
        (kernel, form, dtype)
        for forms in proved.values() for form, kept in forms.items()
        for dtype, kernels in kept["kernels"].items() for kernel in kernels
    }  # fmt: skip
    met = _within(results.read(folder))
    rows = []
    for kernel, form, dtype in sorted(launched):
        row = {"kernel": f"`{kernel}`", "form": form, "dtype": dtype}
        for name, (column, _) in COLUMNS.items():
            kept = proved[name].get(form, {"kernels": {}})
            own = kept["kernels"].get(dtype)  # eager PyTorch has no kernels, and proves what they must compute
            row[column] = kept["date"] if own is not None and (name == "eager" or kernel in own) else ""
        rows.append(row | {"within target": met.get(form, "") if dtype == "bfloat16" else ""})
    empty = dict.fromkeys(("form", "dtype", *(column for column, _ in COLUMNS.values()), "within target"), "")
    rows += [{"kernel": f"`{one}`", **empty} for one in sorted(kernels() - {kernel for kernel, _, _ in launched})]
    said = [f"- {column}: {what}. {_made(proved[name])}" for name, (column, what) in COLUMNS.items()]
    return "\n".join([
        "# Evidence", "",
        "Which kernel was proved, in which form and dtype, by what and when; `tests/evidence` runs it and writes this.",
        "A form stands for several calls (`tests/evidence/cases.py`), forward and backward, and each must be right.",
        "What no run has shown is empty. csrc is not in it: `tests/csrc` runs its codec on the host.", "",
        f"{len(kernels())} kernels, {len(rows)} rows. {_gaps(rows)}", "",
        *said, "- within target: the card's targets of such layers (`benchmarks/targets.py`) are met.", "",
        cells.table(rows), "",
    ])  # fmt: skip


def _gaps(rows: Sequence[Mapping[str, str]]) -> str:
    """Which kernels a column has no row of, in sentences; a column without any is said with its name alone."""
    names, said = {row["kernel"] for row in rows}, []
    for column, _ in COLUMNS.values():
        lacking = sorted(names - {row["kernel"] for row in rows if row[column]})
        if len(lacking) == len(names):
            said.append(f"None {column}.")
        elif lacking:
            said.append(f"Not {column} in any form: {', '.join(lacking)}.")
    return " ".join(said)


def _made(forms: Mapping[str, Kept]) -> str:
    return f"{'; '.join(sorted({kept['with'] for kept in forms.values()}))}." if forms else "No run yet."


def _within(found: Mapping[str, Any]) -> dict[str, str]:
    """By form the date at which a card met all of its targets."""
    known = {one.label: one for one in (*targets.LAYERS, *targets.SIBLINGS, *targets.QUANTIZED)}
    dates: dict[str, str] = {}
    for card in (one for name, one in found.items() if name != "cpu"):
        for form, labels in WITHIN.items():
            if all(_is_met(known[label], card) for label in labels):
                dates[form] = max(dates.get(form, ""), card["header"]["date"][:10])
    return dates


def _is_met(target: targets.Target, found: Mapping[str, Any]) -> bool:
    value, goal = target.measure(found, "graph"), re.match(r"([≤≥]) ([\d.]+)", target.goal)
    if value is None or goal is None:
        return False
    return value <= float(goal[2]) if goal[1] == "≤" else value >= float(goal[2])


def profiled(report: Path, case: str, folder: Path = RESULTS) -> None:
    """Keep the kernels in a report of ncu of a layer in bf16, beside those of earlier reports.

    case: as in `benchmarks.cases`: "lora", "glora:<A>,…", "glora-matmul:…".
    """
    command = ["ncu", "--import", str(report), "--csv", "--page", "raw"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    seen = sorted({line["Kernel Name"] for line in csv.DictReader(lines) if line["Kernel Name"].startswith("_")})
    if not seen:
        raise ValueError(f"{report} has no kernel of ours")
    form = "product variant" if case.startswith("glora-matmul:") else f"A={_form_of_a(case)}"
    version = subprocess.run(["ncu", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    today = datetime.date.today().isoformat()
    keep("ncu", form, {"date": today, "with": f"ncu {version}", "kernels": {"bfloat16": seen}}, folder)


def _form_of_a(case: str) -> str:
    return "none" if case == "lora" else case.partition(":")[2].split(",")[0]
