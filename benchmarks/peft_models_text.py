"""How the figures of PEFT's models before and after `accelerate` are shown: a table, a sentence, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.battery import FROZEN, LORA, LORA_LORA, VECTORS
from benchmarks.grouped_text import FROZEN as FROZEN_COLOUR
from benchmarks.grouped_text import OTHERS, OURS, load
from benchmarks.timing import table

Line = Mapping[str, Any]
"""A row of the results' `models` as "row", and "detail"."""

HIRA = "glora:lora,none,none,none,none"
DROPPED, DROPOUT = "lora with dropout", 0.1
"""A case of this file's: in the rows it is LORA, and its model's name says the dropout."""
LABELS = {
    FROZEN: "frozen, no adapter",
    LORA: "LoRA",
    DROPPED: f"LoRA, dropout {DROPOUT}",
    VECTORS: "GLoRA, vectors",
    LORA_LORA: "GLoRA, lora",
    HIRA: "HiRA",
}
TARGETS = {LORA: 1.0, DROPPED: 1.0, VECTORS: 1.8, LORA_LORA: 1.3}
"""The least by which a step should be faster after `accelerate`."""


MODEL = "peft step, llama"
"""What the name of the model begins with in the rows."""


def is_step(row: Mapping[str, Any]) -> bool:
    """Whether a row of the results' `models` is one of these."""
    return str(row["model"]).startswith(MODEL)


def named_in_a_row(case: str, model: str) -> dict[str, str]:
    """The case and the model's name as a row of the schema has them."""
    return {"model": f"{model}, dropout {DROPOUT}", "case": LORA} if case == DROPPED else {"model": model, "case": case}


def case_of(row: Mapping[str, Any]) -> str:
    """The case that `named_in_a_row` wrote."""
    return DROPPED if row["model"].endswith(f", dropout {DROPOUT}") else row["case"]


def step_table(lines: Sequence[Line], spread: bool = True) -> list[dict[str, str]]:
    """One row a method: before → after, of time, peak and what backward keeps."""
    found = {(case_of(line["row"]), line["row"]["impl"]): line for line in lines}
    rows = []
    for case, label in LABELS.items():
        before = found.get((case, "eager" if case == FROZEN else "peft"))
        if before is None:
            continue
        after = found.get((case, "ours"))
        pair = [before] if after is None else [before, after]
        target = None if after is None else after["detail"]["target"]
        row = {
            "a step: PEFT → accelerated": label,
            "ms": _arrow([f"{one['row']['median_ms']:.0f}" for one in pair]),
            "over frozen": _arrow([_over(one, spread) for one in pair]),
            "times faster": "–" if after is None else _spread(after["detail"], "faster", spread),
            "target": "" if target is None else f"≥ {target:.1f}",
        }
        row["peak, MiB"] = _arrow([_mebibytes(one["row"]["peak_bytes"]) for one in pair])
        row["saved for backward, MiB"] = _arrow([_mebibytes(one["detail"]["saved_bytes"]) for one in pair])
        row["dense weights in it, MiB"] = _arrow([_mebibytes(one["detail"]["dense_bytes"]) for one in pair])
        rows.append(row)
    return rows


def what(result: Mapping[str, Any]) -> str:
    """What the table is of."""
    sizes = result["sizes"]
    adapters = "; adapters in the dtype of the base" if sizes["dtype"] != "fp32" else ""
    return (
        f"A LLaMA of {sizes['layers']} layers, hidden size {sizes['hidden']}, intermediate {sizes['intermediate']}, "
        f"{sizes['dtype']}, from its configuration with random weights; every linear of its layers adapted, "
        f"r = {sizes['rank']}, no dropout but where named{adapters}; {sizes['batch']} sequences of {sizes['length']} "
        "tokens. A step is forward, loss, backward and AdamW over the adapters; of the frozen model forward and "
        "backward. Every model "
        "carries the gradient through to the output of the embeddings. LLaMA's linears have no bias, so PEFT's GLoRA "
        "makes no C, D and E for them. The peak holds weights, adapters and moments; saved for backward is what "
        "autograd keeps beyond weights and adapters, and a dense weight is what of it has a weight's shape. Losses and "
        "gradients before and after were compared with float64 in the same run, without dropout: masks differ."
    )


def where(result: Mapping[str, Any]) -> str:
    """What it was measured on."""
    busy = f"{result['threads']} threads on {result['cores']} cores, {load(result)}"
    versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "peft", "transformers"))
    machine = busy if result["sizes"]["kind"] == "cpu" else result["device"]
    return f"{machine}, {result['rounds']} rounds; {versions}; {result['date']}, commit {result['commit']}."


def show(result: Mapping[str, Any]) -> str:
    """The section as Markdown; the reason where there is none."""
    if "error" in result:
        return f"not measured: {result['error']}"
    head = f"{what(result)} {where(result)} Medians of the ratios of the rounds, p20 to p80 behind them."
    found = [head, "", table(step_table(result["models"])), ""]
    errors = {
        f"{LABELS[case_of(line['row'])]} ({line['row']['impl']})": f"{line['detail']['max_rel_err']:.1e}"
        for line in result["models"]
        if line["row"]["case"] != FROZEN
    }
    if errors:
        found.append(f"Largest errors: {', '.join(f'{name} {value}' for name, value in errors.items())}.")
    found += [f"- left out: {name}: {why}" for name, why in result["left_out"].items()]
    return "\n".join(found).rstrip()


def plot(result: Mapping[str, Any], path: Path) -> None:
    """The picture of the section; none without rows."""
    if result.get("models"):
        picture(result["models"]).savefig(path, dpi=130)


def picture(lines: Sequence[Line]) -> Any:
    """Time over the frozen model and peak memory, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.42 * len(lines) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [_name(line["row"]) for line in lines]
    colours = [{"peft": OTHERS, "ours": OURS}.get(line["row"]["impl"], FROZEN_COLOUR) for line in lines]
    if all("over_frozen" in line["detail"] for line in lines):
        figures = [[line["detail"][f"over_frozen{end}"] for line in lines] for end in ("", "_p20", "_p80")]
        label, form = "a step over the frozen model's", "{:.2f}"
    else:
        figures = [[line["row"]["median_ms"] for line in lines]]
        figures += [[line["detail"][name] for line in lines] for name in ("p20_ms", "p80_ms")]
        label, form = "a step, ms", "{:.0f}"
    values, low, high = figures
    errors = [
        [value - least for value, least in zip(values, low, strict=True)],
        [most - value for value, most in zip(values, high, strict=True)],
    ]
    bars = left.barh(names, values, xerr=errors, color=colours)
    left.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=8)
    left.set_xlim(0.0, 1.2 * max(high))
    left.set_xlabel(label)
    left.invert_yaxis()
    peaks = [line["row"]["peak_bytes"] / 2**20 for line in lines]
    bars = right.barh(names, peaks, color=colours)
    right.bar_label(bars, [f"{value:.0f}" for value in peaks], padding=4, fontsize=8)
    right.set_xlim(0.0, 1.2 * max(peaks))
    right.set_xlabel("peak of a step, MiB")
    for axes in (left, right):
        axes.tick_params(axis="y", labelsize=8)
    return figure


def _name(row: Mapping[str, Any]) -> str:
    behind = {"peft": ": PEFT", "ours": ": accelerated"}.get(row["impl"], "")
    return LABELS[case_of(row)] + behind


def _over(line: Line, spread: bool) -> str:
    return _spread(line["detail"], "over_frozen", spread) if "over_frozen" in line["detail"] else "–"


def _spread(detail: Mapping[str, Any], name: str, spread: bool) -> str:
    text = f"{detail[name]:.2f}"
    low, high = detail[f"{name}_p20"], detail[f"{name}_p80"]
    return f"{text} ({low:.2f} to {high:.2f})" if spread and low != high else text


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}"


def _arrow(values: Sequence[str]) -> str:
    return " → ".join(values)
