"""How the figures of a 4-bit base are shown: tables and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.battery import LLAMA, LORA, MLP, PASSES, QFROZEN, QGLORA, QLORA, QLORA_LORA
from benchmarks.grouped_text import FROZEN, OTHERS, OURS, PASS_NAMES
from benchmarks.timing import table

Line = Mapping[str, Any]
"""A row line of the store: "row" by the schema, "detail"."""

Which = tuple[str, str]
"""case, impl."""

LABELS: dict[Which, str] = {
    ("frozen", "eager"): "no adapter, dense base",
    (QFROZEN, "ours"): "no adapter: here",
    (QFROZEN, "bnb"): "no adapter: bitsandbytes",
    (QLORA, "ours"): "LoRA: here",
    (QLORA, "bnb"): "LoRA: bitsandbytes, two thin products beside it",
    (QLORA, "peft"): "LoRA: PEFT",
    (QLORA, "unsloth"): "LoRA: Unsloth",
    (QLORA, "eager"): "LoRA: dequantize, dense product",
    (QLORA, "compile"): "LoRA: the same by torch.compile",
    (QGLORA, "ours"): "GLoRA, A = C = E = vector, B = lora: here",
    (QGLORA, "eager"): "GLoRA, A = C = E = vector, B = lora: dequantize, literal formula",
    (QGLORA, "compile"): "GLoRA, A = C = E = vector, B = lora: the same by torch.compile",
    (QLORA_LORA, "ours"): "GLoRA, A = B = lora: here",
    (QLORA_LORA, "eager"): "GLoRA, A = B = lora: dequantize, literal formula",
    (LORA, "ours"): "LoRA on the dense base: here",
}
FORM_NAMES = {"plain": "W", "vectors": "W + W∘A + B, vectors", "low-rank": "W + W∘A + B, factors"}
BACKEND_NAMES = {"cuda": "CUDA", "triton": "Triton", "bnb": "bitsandbytes", "eager": "eager PyTorch"}


def is_decode(line: Line) -> bool:
    """Whether a line is of a step of generation."""
    return "weight_of_copy" in line["detail"]


def nf4_lines(lines: Sequence[Line]) -> list[Line]:
    """The lines on a 4-bit base, and the frozen ones of steps of generation."""
    return [line for line in lines if line["row"]["case"].startswith("nf4-") or is_decode(line)]


def training(lines: Sequence[Line]) -> dict[Which, dict[tuple[int, str], tuple[float, float, float]]]:
    """By contestant, by M and pass: the time over the dense frozen layer's, with p20 and p80.

    On LLaMA-3-8B rows the sum over the seven linears, which needs all of them; else of the one layer there is. p20 and
    p80 of a sum are its median.
    """
    mode = _mode(lines)
    chosen = [x for x in lines if x["row"]["mode"] == mode and not is_decode(x) and x["row"]["op"] == "linear"]
    base = {_place(x): x["row"]["median_ms"] for x in chosen if x["row"]["case"] == "frozen"}
    parts: dict[tuple[Which, int, str], dict[str | None, Line]] = defaultdict(dict)
    for line in chosen:
        if line["row"]["case"].startswith("nf4-") and _place(line) in base:
            row = line["row"]
            parts[_which(row), row["m"], row["pass"]][row["layer"]] = line
    found: dict[Which, dict[tuple[int, str], tuple[float, float, float]]] = defaultdict(dict)
    for (which, m, direction), members in parts.items():
        if None in members:
            detail = members[None]["detail"]
            figures = tuple(detail[f"over_frozen{end}"] for end in ("", "_p20", "_p80"))
            found[which][m, direction] = (figures[0], figures[1], figures[2])
        elif set(members) == set(LLAMA):
            below = sum(base[_place(line)] for line in members.values())
            over = sum(line["detail"]["over_frozen"] * base[_place(line)] for line in members.values()) / below
            found[which][m, direction] = (over, over, over)
    return dict(found)


def decoding(lines: Sequence[Line]) -> dict[Which, dict[int, tuple[float, float]]]:
    """By contestant, by M: milliseconds, and the weight's bytes over the time over a copy's bandwidth.

    Of LLaMA-3-8B the sum over gate, up and down; else of the one layer there is.
    """
    mode = _mode([line for line in lines if is_decode(line)])
    parts: dict[tuple[Which, int], dict[str | None, Line]] = defaultdict(dict)
    for line in lines:
        row = line["row"]
        if is_decode(line) and row["mode"] == mode and (row["layer"] is None or row["layer"] in MLP):
            parts[_which(row), row["m"]][row["layer"]] = line
    found: dict[Which, dict[int, tuple[float, float]]] = defaultdict(dict)
    for (which, m), members in parts.items():
        if set(members) in ({None}, set(MLP)):
            took = sum(line["row"]["median_ms"] for line in members.values())
            # the bytes of all over the time of all
            share = sum(x["detail"]["weight_of_copy"] * x["row"]["median_ms"] for x in members.values()) / took
            found[which][m] = (took, share)
    return dict(found)


def training_table(lines: Sequence[Line], spread: bool = True) -> list[dict[str, str]]:
    """One row a contestant, one column an M and pass."""
    found = training(lines)
    columns = sorted({at for one in found.values() for at in one}, key=lambda at: (-at[0], PASSES.index(at[1])))
    rows = []
    for which in _listed(found):
        row = {"over the dense frozen layer": LABELS[which]}
        for at in columns:
            row[f"M={at[0]}: {PASS_NAMES[at[1]]}"] = _over(found[which].get(at), spread)
        rows.append(row)
    return rows


def decode_table(lines: Sequence[Line]) -> list[dict[str, str]]:
    """One row a contestant, one column an M: microseconds, and the share of a copy's bandwidth behind them."""
    found = decoding(lines)
    columns = sorted({m for one in found.values() for m in one})
    rows = []
    for which in _listed(found):
        row = {"forward of a few tokens": LABELS[which]}
        for m in columns:
            took, share = found[which].get(m, (None, None))
            row[f"M={m}"] = "–" if took is None or share is None else f"{1e3 * took:.0f} µs, {100 * share:.0f}%"
        rows.append(row)
    return rows


def dequantize_table(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a shape and backend, one column a form: the share of a copy's bandwidth, under graphs where there are."""
    mode = "graph" if any(row["mode"] == "graph" for row in part["rows"]) else "eager"
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in part["rows"]:
        if row["mode"] == mode:
            text = f"{1e3 * row['median_ms']:.0f} µs, {100 * row['of_copy']:.0f}%"
            found[row["shape"], row["backend"]][row["form"]] = text
    return [
        {"dequantizing": shape, "by": BACKEND_NAMES[backend]}
        | {title: cells.get(form, "–") for form, title in FORM_NAMES.items()}
        for (shape, backend), cells in found.items()
    ]


def memory_table(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a contestant and number of layers, in MiB."""
    names = {"base_bytes": "base", "adapter_bytes": "adapters", "workspace_bytes": "workspace"}
    names |= {"saved_bytes": "saved for backward", "peak_bytes": "peak of a step beyond them", "all_bytes": "in all"}
    return [
        {"MiB": LABELS[row["case"], row["impl"]], "layers": row["layers"]}
        | {title: f"{row[name] / 2**20:.3g}" for name, title in names.items()}
        for row in part["rows"]
    ]


def memory_text(part: Mapping[str, Any]) -> str:
    """What the table of memory is of."""
    return (
        f"Layers of N = K = {part['n']} in a row, M = {part['m']}, r = {part['r']}, {part['dtype']}. Saved for "
        "backward: beyond x, y, base and adapters, but with the activations between the layers; the peak "
        "holds it, y and the gradients too. The workspace is one buffer, however many layers there are."
    )


def part_lines(parts: Mapping[str, Any]) -> list[str]:
    """Dequantizing and memory as Markdown; an error in the place of what failed."""
    lines: list[str] = []
    for name, text, show in (
        ("dequantize", lambda part: dequantize_text(part), dequantize_table), ("memory", memory_text, memory_table)
    ):  # fmt: skip
        part = parts.get(name) or {"error": parts.get("error", "not measured")}
        lines += [f"{name}: {part['error']}"] if "error" in part else [text(part), "", table(show(part))]
        lines += [""]
        if part.get("left_out"):
            lines += [*(f"- {what}: {why}" for what, why in part["left_out"].items()), ""]
    return lines


def dequantize_text(part: Mapping[str, Any]) -> str:
    """What the table of dequantizing is of."""
    return (
        f"Dequantizing alone (factors of rank {part['r']}): codes, absmax and adapters read and the dense weight "
        "written, over the time, over what a copy reaches."
    )


def picture(lines: Sequence[Line], parts: Mapping[str, Any] | None = None) -> Any:
    """Time over the dense frozen layer, bandwidth of the weight over M, memory; None without lines."""
    over, shares = training(lines), decoding(lines)
    memory = ((parts or {}).get("memory") or {}).get("rows")
    if not over or not shares:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4 if memory else 4.6), layout="constrained")
    rows = figure.subfigures(2 if memory else 1, 1, squeeze=False)[:, 0]
    left, right = rows[0].subplots(1, 2)
    _bars(left, over)
    _shares(right, shares)
    if memory:
        _memory(rows[1].add_subplot(), memory)
    return figure


def _bars(axes: Any, over: Mapping[Which, Mapping[tuple[int, str], tuple[float, float, float]]]) -> None:
    at = max(((m, direction) for one in over.values() for m, direction in one), key=lambda at: (at[1] == "fwd_bwd", at))
    shown = [which for which in _listed(over) if at in over[which]]
    values = [over[which][at] for which in shown]
    errors = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
    names = [_wrapped(LABELS[which]) for which in shown]
    bars = axes.barh(names, [value for value, _, _ in values], xerr=errors, color=[_colour(which) for which in shown])
    axes.bar_label(bars, [f"{value:.2f}" for value, _, _ in values], padding=4, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlim(0.0, 1.15 * max(high for _, _, high in values))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("time over the dense frozen layer")
    axes.set_title(f"4-bit base, {PASS_NAMES[at[1]]}, M={at[0]}", fontsize=10)


def _shares(axes: Any, shares: Mapping[Which, Mapping[int, tuple[float, float]]]) -> None:
    for which in _listed(shares):
        points = shares[which]
        style = "-" if which[1] == "ours" else "--"
        at = sorted(points)
        axes.plot(at, [100 * points[m][1] for m in at], style, marker="o", markersize=4, label=LABELS[which])
    at = sorted({m for points in shares.values() for m in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(m) for m in at])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.set_xlabel("tokens, M")
    axes.set_ylabel("the weight's bytes over the time, % of a copy")
    axes.set_title("forward of a few tokens", fontsize=10)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=7)


def _memory(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [_wrapped(f"{LABELS[row['case'], row['impl']]}, {row['layers']}") for row in rows]
    left = [0.0] * len(rows)
    colours = {"base": OURS, "adapter": "#588157", "workspace": OTHERS, "peak": FROZEN}
    for part, colour in colours.items():
        sizes = [row[f"{part}_bytes"] / 2**20 for row in rows]
        label = "peak of a step beyond them" if part == "peak" else part
        axes.barh(names, sizes, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("MiB, by the number of layers")
    axes.legend(fontsize=8)


def _over(figures: tuple[float, float, float] | None, spread: bool) -> str:
    if figures is None:
        return "–"
    value, low, high = figures
    return f"{value:.2f} ({low:.2f} to {high:.2f})" if spread and low != high else f"{value:.2f}"


def _listed(found: Mapping[Which, Any]) -> list[Which]:
    return [which for which in LABELS if which in found]


def _which(row: Mapping[str, Any]) -> Which:
    return row["case"], row["impl"]


def _place(line: Line) -> tuple[Any, ...]:
    row = line["row"]
    return tuple(row[name] for name in ("layer", "dtype", "m", "n", "k", "pass"))


def _mode(lines: Sequence[Line]) -> str:
    return "graph" if any(line["row"]["mode"] == "graph" for line in lines) else "eager"


def _wrapped(label: str) -> str:
    return label.replace(": ", ":\n", 1)


def _colour(which: Which) -> str:
    if which[0] == QFROZEN:
        return FROZEN
    return OURS if which[1] == "ours" else OTHERS
