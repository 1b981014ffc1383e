"""How the figures of sets of layers, of launches and of merging are shown: tables, a sentence, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.battery import GROUP_IMPLS, PASSES
from benchmarks.timing import table

Line = Mapping[str, Any]
"""A row line of the store: "row" by the schema, "detail"."""

SETS = {"qkv": "q, k, v", "gate_up": "gate, up"}
PASS_NAMES = {"fwd": "forward", "fwd_bwd": "forward + backward"}
LABELS = {
    ("frozen", "concat"): "no LoRA: one product, weights concatenated",
    ("frozen", "eager"): "no LoRA: a product a layer",
    ("lora", "ours"): "here, grouped",
    ("lora", "single"): "here, layer by layer",
    ("lora", "concat"): "weights and A concatenated",
    ("lora", "eager"): "a loop of single operations",
    ("lora", "grouped_mm"): "torch.nn.functional.grouped_mm",
    ("lora", "peft"): "PEFT, layer by layer",
}
HEAD = "Over one product with the concatenated weights: medians of the ratios of the rounds, p20 to p80 behind them."
OURS, OTHERS, FROZEN = "#2a6f97", "#bc6c25", "#6c757d"


def load(section: Mapping[str, Any]) -> str:
    """How busy the machine was with everything, this included."""
    before, after = section["load"]
    return f"load {before:.1f} before and {after:.1f} after"


def set_lines(lines: Sequence[Line]) -> list[Line]:
    """The lines of sets of siblings, of all lines."""
    return [line for line in lines if line["row"]["op"] == "group"]


def widest(lines: Sequence[Line]) -> float:
    """The largest distance from p20 to p80 among the ratios that are shown."""
    return max(line["detail"]["over_frozen_p80"] - line["detail"]["over_frozen_p20"] for line in main_lines(lines))


def main_lines(lines: Sequence[Line]) -> list[Line]:
    """Those of the largest M, under graph replays where there are any."""
    found = set_lines(lines)
    graphs = [line for line in found if line["row"]["mode"] == "graph"]
    most = max((line["row"]["m"] for line in found), default=None)
    return [line for line in graphs or found if line["row"]["m"] == most]


def over_table(lines: Sequence[Line], spread: bool = True) -> list[dict[str, str]]:
    """One row a contestant, one column a set and pass: the time over the one product, p20 to p80 behind it."""
    found: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for line in main_lines(lines):
        row, detail = line["row"], line["detail"]
        kind, _, name = row["case"].partition(":")
        text = f"{detail['over_frozen']:.2f}"
        if spread:
            text += f" ({detail['over_frozen_p20']:.2f} to {detail['over_frozen_p80']:.2f})"
        found.setdefault((kind, row["impl"]), {})[name, row["pass"]] = text
    columns = [(name, direction) for name in SETS for direction in PASSES]
    rows = []
    for which, label in LABELS.items():
        if which in found:
            cells = {f"{SETS[n]}: {PASS_NAMES[d]}": found[which].get((n, d), "–") for n, d in columns}
            rows.append({"over one product": label, **cells})
    return rows


def set_rows(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Every row of a set, for people."""
    found = []
    for line in set_lines(lines):
        row, more = line["row"], line["detail"]
        kind, _, name = row["case"].partition(":")
        shown: dict[str, Any] = {"set": SETS[name], "what": LABELS[kind, row["impl"]], "impl": row["impl"]}
        shown |= {"M": row["m"], "N": row["n"], "K": row["k"], "r": row["r"], "pass": row["pass"], "mode": row["mode"]}
        shown |= {field: f"{row[field]:.4g}" for field in ("median_ms", "p20_ms", "p80_ms")}
        shown |= {"over one product": more.get("over_frozen"), "of floor": f"{100 * more['of_floor']:.0f}%"}
        shown |= {"saved bytes": row["saved_bytes"], "peak bytes": row["peak_bytes"], "launches": more.get("launches")}
        found.append(shown | {"host µs": f"{more['host_us']:.0f}", "error": f"{row['max_rel_err']:.1e}"})
    return found


def launch_rows(launches: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a decoder layer's seven linears launch, a row a contestant."""
    return [
        {
            "seven linears": LABELS["frozen" if name == "frozen" else "lora", "eager" if name == "frozen" else name],
            "forward": one["forward"],
            "backward": one["backward"],
            "forward on this card": one.get("on_card"),
            "how counted": one["how"],
        }
        for name, one in launches["rows"].items()
    ]


def launch_sentence(launches: Mapping[str, Any]) -> str:
    """The figures that are compared, in one sentence."""
    rows = launches["rows"]
    parts = [f"{rows['frozen']['forward']} frozen"]
    if "ours" in rows:
        named = ((SETS.get(name, name).replace(", ", "/"), count) for name, count in rows["ours"]["sets"].items())
        sets = ", ".join(f"{name} {count}" for name, count in named)
        parts.append(f"{rows['ours']['forward']} here (planned for {launches['arch']}: {sets})")
    if "peft" in rows:
        parts.append(f"{rows['peft']['forward']} in PEFT (base, A, B, scale and add of each)")
    return f"Launches of a decoder layer's seven linears, forward: {'; '.join(parts)}."


def merge_text(merge: Mapping[str, Any]) -> str:
    """What merging takes: the launch over a copy's bandwidth, and the call with the copies it keeps."""
    kernel, whole = merge["kernel"], merge["whole"]
    sentences = []
    if kernel is not None:
        took = f"{1e3 * kernel['median_s']:.3g} ms ({1e3 * kernel['p20_s']:.3g} to {1e3 * kernel['p80_s']:.3g})"
        sentences.append(
            f"{merge['layers']} decoder layers, {merge['linears']} linears, {merge['dtype']}, r={merge['r']}, in one "
            f"launch: {took} for {kernel['bytes'] / 2**30:.3g} GiB read and written, {kernel['gbps']:.4g} GB/s, "
            f"{100 * kernel['of_copy']:.0f}% of what a copy reaches; a loop of `addmm_` takes "
            f"{1e3 * kernel['loop_s']:.3g} ms, {100 * kernel['loop_of_copy']:.0f}%."
        )
    each = {name: f"{1e3 * whole[f'{name}_s'] / whole['linears']:.3g} ms" for name in ("merge", "unmerge", "copy")}
    sizes = f"{whole['linears']} with {whole['bytes'] / 2**20:.4g} MiB of weights in all, {merge['dtype']}"
    sentences.append(
        f"`gk.merge` takes {each['merge']} a linear ({sizes}), copying its base to host memory alone {each['copy']}; "
        f"`gk.unmerge` {each['unmerge']}."
    )
    return " ".join(sentences)


def depth_lines(depth: Mapping[str, Any]) -> list[str]:
    """Launches and merging as Markdown; an error in the place of what failed."""
    lines = []
    for name, show in (("launches", lambda part: table(launch_rows(part))), ("merge", merge_text)):
        part = depth.get(name) or {"error": depth.get("error", "not measured")}
        lines += [f"{name}: {part['error']}" if "error" in part else show(part), ""]
    return lines


def picture(lines: Sequence[Line]) -> Any:
    """Bars of the time over the one product, with p20 to p80, a panel a set and pass; None without lines."""
    chosen = main_lines(lines)
    if not chosen:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    shown = [which for which in LABELS if any(_which(line["row"]) == which for line in chosen)]
    assert all(impl in GROUP_IMPLS for _, impl in shown)
    for axes, (name, direction) in zip(panels.flat, [(n, d) for n in SETS for d in PASSES], strict=True):
        own = {_which(x["row"]): x for x in chosen if _set(x["row"]) == name and x["row"]["pass"] == direction}
        details = [own[which]["detail"] if which in own else None for which in shown]
        values = [0.0 if detail is None else detail["over_frozen"] for detail in details]
        below = [0.0 if detail is None else detail["over_frozen"] - detail["over_frozen_p20"] for detail in details]
        above = [0.0 if detail is None else detail["over_frozen_p80"] - detail["over_frozen"] for detail in details]
        bars = axes.barh(
            [LABELS[which] for which in shown], values, xerr=[below, above], color=list(map(_colour, shown))
        )
        axes.bar_label(
            bars, ["" if detail is None else f"{detail['over_frozen']:.2f}" for detail in details], padding=4
        )
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlim(0.0, 1.2 * max(value + more for value, more in zip(values, above, strict=True)))
        axes.set_title(f"{SETS[name]}: {PASS_NAMES[direction]}", fontsize=10)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels.flat[0].invert_yaxis()  # shared by all
    figure.supxlabel("time over one product with the concatenated weights", fontsize=10)
    row = chosen[0]["row"]
    rank = next(line["row"]["r"] for line in chosen if line["row"]["r"] is not None)
    figure.suptitle(f"LoRA r={rank} on layers with one input, M={row['m']} K={row['k']} {row['dtype']}", fontsize=10)
    return figure


def _which(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["case"].partition(":")[0], row["impl"]


def _set(row: Mapping[str, Any]) -> str:
    return str(row["case"].partition(":")[2])


def _colour(which: tuple[str, str]) -> str:
    if which[0] == "frozen":
        return FROZEN
    return OURS if which[1] in ("ours", "single") else OTHERS
