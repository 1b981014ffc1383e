"""What all tables are made of: names of what is measured, cells, and where and when it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.cases import FROZEN, FULL, HIRA, LORA, LORA_LORA, VECTOR_LORA, VECTORS
from benchmarks.devices import Spread
from benchmarks.results import Found, Line, Which, over_frozen, select
from benchmarks.targets import PASS_NAMES, SETS

CASE_NAMES = {
    FROZEN: "no adapter", LORA: "LoRA", VECTOR_LORA: "GLoRA, A = vector, B = lora",
    FULL: "GLoRA, A = vector, B = lora, C = D = E = vector", LORA_LORA: "GLoRA, A = B = lora",
    VECTORS: "GLoRA, A = B = vector", "glora:vector,lora,vector,none,vector": "GLoRA, A = C = E = vector, B = lora",
    "glora:vector,lora,none,none,vector": "GLoRA, A = E = vector, B = lora",
    HIRA: "HiRA",
}  # fmt: skip
IMPL_NAMES = {
    "ours": "here", "eager": "eager PyTorch", "compile": "torch.compile", "peft": "PEFT", "bnb": "bitsandbytes",
    "unsloth": "Unsloth", "lorafusion": "LoRAFusion", "concat": "weights concatenated",
    "single": "here, layer by layer", "grouped_mm": "torch.nn.functional.grouped_mm",
}  # fmt: skip
COMMAND = "`python -m benchmarks.report --stages {}` measures this anew."


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table, aligned; None is shown as a dash."""
    if not rows:
        return "(nothing)"
    lines = [[str(key) for key in rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def pivot(corner: str, cells: Mapping[tuple[str, str], str]) -> str:
    """A table of cells by the names of their row and column, both in the order in which they come."""
    columns = list(dict.fromkeys(column for _, column in cells))
    names = dict.fromkeys(row for row, _ in cells)
    return table([{corner: name} | {column: cells.get((name, column), "–") for column in columns} for name in names])


def label(case: str, impl: str, dense: bool = False) -> str:
    """A contestant for people. dense: among layers over a 4-bit base, those on a dense one are named so."""
    adapter = case.removeprefix("nf4-")
    kind, _, name = adapter.partition(":")
    adapter = kind if name in SETS else adapter
    where = ", dense base" if dense and not case.startswith("nf4-") else ""
    return f"{CASE_NAMES.get(adapter, adapter)}{where}: {IMPL_NAMES[impl]}"


def shown(spread: Spread, ends: bool) -> str:
    text = f"{spread.median:.2f}"
    return f"{text} ({spread.p20:.2f} to {spread.p80:.2f})" if ends and spread.p20 != spread.p80 else text


def over_table(
    lines: Sequence[Line], corner: str, ends: bool, keep: Callable[[Which], bool] = lambda which: True
) -> str:
    """A row a contestant, a column an M or a set, and pass: the time over the frozen layer's of the same rounds."""
    cells: dict[tuple[str, str], str] = {}
    mode = results.best_mode(lines)
    for m in sorted({line["row"]["m"] for line in lines}, reverse=True):
        for direction, name in PASS_NAMES.items():
            for which, spread in over_frozen(select(lines, m=m, direction=direction, mode=mode)).items():
                column = f"{SETS.get(which[0].partition(':')[2], f'M={m}')}: {name}"
                if keep(which):
                    cells.setdefault((label(*which[:2]), column), shown(spread, ends))
    return pivot(corner, cells)


def about(found: Found, stage: str) -> str:
    """Where, when and at which commit a stage was measured."""
    note, head = found["notes"].get(f"stage {stage}", {}), found["header"]
    cores = note.get("cores") or head.get("details", {}).get("cores")
    where = f"{note.get('threads', 1)} of {cores} cores" if cores else head["device"]
    load = f", load {note['load'][0]:.1f} before and {note['load'][1]:.1f} after" if "load" in note else ""
    more = f"; {note['with']}" if "with" in note else ""
    date, commit = note.get("date", head["date"]), note.get("commit", head["commit"])
    return f"{where}{load}, {note.get('rounds')} rounds{more}; {date[:10]}, commit {commit}."


def facts(found: Found) -> str:
    """Device and versions in one or two sentences; of a card the commit too, where on a CPU each table has its own."""
    head, rates = found["header"], found["notes"].get("ceilings")
    named = {"torch": head["torch"], "triton": head["triton"], **(head.get("packages") or {})}
    versions = ", ".join(f"{name} {value}" for name, value in named.items() if value)
    driver = f", driver {head['driver']}" if head.get("driver") else ""
    when = f"; {head['date']}, commit {head['commit']}" if head.get("scale") == "cuda" else ""
    text = f"{head['device']}{driver}; {versions}{when}."
    if rates:
        text += f" Ceilings: {rates['tflops']:.3g} TFLOP/s (a large product), {rates['gbps']:.4g} GB/s (a copy)."
    return text
