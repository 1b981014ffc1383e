"""benchmarks/results/evidence.md, from what runs have left: nothing in it is typed, what no run has written is empty.

`profiled` also keeps what Nsight Compute saw of a layer, as `scripts/first-light --second` asks it to.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import results, tables, targets

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
"""A run: "date", "with" (versions, the card), "forms": by form and dtype the names of the kernels."""


def file_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / "evidence" / f"{name}.json"


def keep(name: str, kept: Kept, folder: Path = RESULTS) -> None:
    """Write what a run has proved, and the table anew."""
    file_of(name, folder).parent.mkdir(exist_ok=True)
    results.write_json(file_of(name, folder), kept)
    results.write(folder / TABLE.name, text(folder))


def text(folder: Path = RESULTS) -> str:
    """The table as the files in a folder have it."""
    files = {name: file_of(name, folder) for name in COLUMNS}
    runs: dict[str, Kept] = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    forms = list(dict.fromkeys(form for run in runs.values() for form in run["forms"]))
    launched = {
        (kernel, forms.index(form), dtype)
        for run in runs.values() for form, dtypes in run["forms"].items() for dtype, own in dtypes.items()
        for kernel in own
    }  # fmt: skip
    met = _within(results.read(folder))
    rows = []
    for kernel, place, dtype in sorted(launched):
        form = forms[place]
        row = {"kernel": f"`{kernel}`", "form": form, "dtype": dtype}
        for name, (column, _) in COLUMNS.items():
            run = runs.get(name, {"forms": {}})
            own = run["forms"].get(form, {}).get(dtype)
            row[column] = run["date"] if own is not None and (name == "eager" or kernel in own) else ""
        rows.append(row | {"within target": met.get(form, "") if dtype == "bfloat16" else ""})
    said = [f"- {column}: {what}. {_made(runs.get(name))}" for name, (column, what) in COLUMNS.items()]
    return "\n".join([
        "# Evidence", "",
        "Which kernel was proved, in which form and dtype, by what and when; `tests/evidence` runs it and writes this.",
        "A form stands for several calls (`tests/evidence/cases.py`), forward and backward, and each must be right.",
        "What no run has shown is empty.", "",
        *said, "- within target: the card's targets of such layers (`benchmarks/targets.py`) are met.", "",
        tables.table(rows), "",
    ])  # fmt: skip


def _made(run: Kept | None) -> str:
    return "No run yet." if run is None else f"{run['with']}; {run['date']}."


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
    path = file_of("ncu", folder)
    forms = json.loads(path.read_text())["forms"] if path.exists() else {}
    version = subprocess.run(["ncu", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    today = datetime.date.today().isoformat()
    keep("ncu", {"date": today, "with": f"ncu {version}", "forms": {**forms, form: {"bfloat16": seen}}}, folder)


def _form_of_a(case: str) -> str:
    return "none" if case == "lora" else case.partition(":")[2].split(",")[0]
