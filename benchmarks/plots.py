"""The pictures of a battery: time over frozen by M, roofline, saved bytes, growth, sets of layers. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import grouped_text, nf4_text
from benchmarks.battery import LLAMA
from benchmarks.floor import Ceilings

Line = Mapping[str, Any]
"""A row line of the store: "row" by the schema, "detail"."""

COLOURS = ("#2a6f97", "#bc6c25", "#588157", "#9d4edd", "#c1121f", "#6c757d", "#0a9396", "#ca6702")
MARKS = {"ours": "o", "peft": "s", "eager": "^", "compile": "v", "bnb": "D", "unsloth": "P", "lorafusion": "X"}


def draw_all(
    lines: Sequence[Line], models: Sequence[Line], ceilings: Ceilings, out: Path, name: str, nf4: Any = None
) -> dict[str, str]:
    """Draw what the rows allow into `out`; the titles by file name. nf4: the note of that name."""
    sets, every = grouped_text.set_lines(lines), lines
    apart = [*sets, *nf4_text.nf4_lines(lines)]
    lines = [line for line in lines if line not in apart]
    figures = {
        f"{name}_by_m.png": ("time over the frozen layer by M", by_m(lines)),
        f"{name}_roofline.png": ("roofline", roofline(lines, ceilings)),
        f"{name}_saved.png": ("bytes saved for backward", saved(lines)),
        f"{name}_growth.png": ("growth with M, r and the number of layers", growth(lines, models)),
        f"{name}_groups.png": ("layers with one input", grouped_text.picture(sets)),
        f"{name}_nf4.png": ("4-bit base", nf4_text.picture(every, nf4)),
    }
    titles = {}
    for file, (title, figure) in figures.items():
        if figure is not None:
            figure.savefig(out / file, dpi=130)
            titles[file] = title
    return titles


def main_mode(lines: Sequence[Line]) -> str:
    """Graph replays where there are any, else eager calls."""
    return "graph" if any(line["row"]["mode"] == "graph" for line in lines) else "eager"


def over_frozen(lines: Sequence[Line], by: str) -> dict[tuple[str, str], dict[int, float]]:
    """By (case, impl) and then by m or r: the summed time over the summed time of the same frozen layers.

    On LLaMA-3-8B rows the sum is over the seven linears, and needs all of them; elsewhere over the commonest shape.
    r is the commonest one where `by` is "m", and m the commonest one where `by` is "r".
    """
    mode = main_mode(lines)
    rows = [
        line["row"] | {"over": line["detail"].get("over_frozen")}
        for line in lines
        if line["row"]["mode"] == mode and line["row"]["pass"] == "fwd_bwd" and not line["row"]["p"]
    ]
    llama = any(row["layer"] for row in rows)
    if llama:
        rows = [row for row in rows if row["layer"]]
    else:
        shape = _commonest([(row["n"], row["k"]) for row in rows if row["r"] is not None])
        rows = [row for row in rows if (row["n"], row["k"]) == shape]
    fixed = {"m": "r", "r": "m"}[by]
    adapted = [row for row in rows if row["r"] is not None]
    value = _commonest([row[fixed] for row in adapted])
    sums: dict[tuple[str, str, int], dict[Any, tuple[float, float]]] = defaultdict(dict)
    frozen = {(row["layer"], row["m"]): row["median_ms"] for row in rows if row["case"] == "frozen"}
    for row in adapted:
        below = frozen.get((row["layer"], row["m"]))
        if row[fixed] != value or below is None:
            continue
        # rows of a later group stand beside their own frozen layer: its ratio, in the time of this one
        above = row["median_ms"] if row["over"] is None else row["over"] * below
        sums[row["case"], row["impl"], row[by]][row["layer"]] = (above, below)
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for (case, impl, at), parts in sums.items():
        if not llama or set(parts) == set(LLAMA):
            found[case, impl][at] = sum(a for a, _ in parts.values()) / sum(b for _, b in parts.values())
    return dict(found)


def by_m(lines: Sequence[Line]) -> Any:
    """Time over frozen by M, a line for each case and implementation."""
    series = over_frozen(lines, "m")
    if not any(len(points) > 1 for points in series.values()):
        return None
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    _ratio_lines(axes, {name: points for name, points in series.items() if len(points) > 1}, "rows of x, M")
    axes.set_title(_subtitle(lines), fontsize=10)
    _legend(figure, axes)
    return figure


def roofline(lines: Sequence[Line], ceilings: Ceilings) -> Any:
    """Achieved TFLOP/s against operations per byte, under the measured ceilings."""
    mode = main_mode(lines)
    chosen = [line for line in lines if line["row"]["mode"] == mode and line["row"]["pass"] == "fwd_bwd"]
    if not chosen:
        return None
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in chosen:
        groups[line["row"]["case"], line["row"]["impl"]].append(line)
    for i, ((case, impl), members) in enumerate(sorted(groups.items())):
        x = [line["detail"]["intensity"] for line in members]
        y = [line["detail"]["tflops"] for line in members]
        label, colour = _name(case, impl), COLOURS[i % len(COLOURS)]
        axes.scatter(x, y, s=22, alpha=0.75, label=label, color=colour, marker=MARKS[impl])
    least, most = axes.get_xlim()
    bend = 1e3 * ceilings.tflops / ceilings.gbps
    left, right = min(max(least, 1e-3), bend / 4), max(most, bend * 4)
    axes.plot([left, bend], [left * ceilings.gbps / 1e3, ceilings.tflops], color="black", linewidth=1)
    axes.plot([bend, right], [ceilings.tflops, ceilings.tflops], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte, at least", ylabel="TFLOP/s achieved")
    axes.set_title(f"{_subtitle(lines)}; {ceilings.tflops:.3g} TFLOP/s, {ceilings.gbps:.4g} GB/s measured", fontsize=10)
    _legend(figure, axes)
    return figure


def saved(lines: Sequence[Line]) -> Any:
    """Bytes kept for backward beyond x, y and the parameters: summed over the layers of one M."""
    rows = [line["row"] for line in lines if line["row"]["pass"] == "fwd_bwd" and line["row"]["r"] is not None]
    if not rows:
        return None
    llama = [row for row in rows if row["layer"]]
    if llama:
        rows = llama
    m, r = _commonest([row["m"] for row in rows]), _commonest([row["r"] for row in rows])
    sums: dict[str, dict[Any, int]] = defaultdict(dict)
    for row in rows:
        if row["m"] == m and row["r"] == r and row["saved_bytes"] is not None:
            drop = f", p={row['p']:g}" if row["p"] else ""
            sums[_name(row["case"], row["impl"]) + drop][row["layer"], row["n"], row["k"]] = row["saved_bytes"]
    if not sums:
        return None
    names = sorted(sums, key=lambda name: sum(sums[name].values()))
    values = [sum(sums[name].values()) for name in names]
    figure = _figure(8, 0.36 * len(names) + 1.6)
    axes = figure.add_subplot()
    bars = axes.barh(names, [max(value, 1) for value in values], color=COLOURS[0])
    axes.bar_label(bars, [_bytes(value) for value in values], padding=4, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=20 * max([*values, 1]))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("bytes saved for backward beyond x, y and the parameters")
    where = "seven LLaMA-3-8B linears" if llama else "summed over the layers"
    axes.set_title(f"{where}, M={m}, r={r}", fontsize=10)
    return figure


def growth(lines: Sequence[Line], models: Sequence[Line]) -> Any:
    """How cost grows: over frozen by M, by r, and the time of 1, 2, 4, 8 decoder layers."""
    with_m, with_r, layers = over_frozen(lines, "m"), over_frozen(lines, "r"), _by_layers(models)
    if not any((with_m, with_r, layers)):
        return None
    figure = _figure(13, 4.6)
    left, middle, right = figure.subplots(1, 3)
    order = sorted({*with_m, *with_r, *layers})
    _ratio_lines(left, with_m, "rows of x, M", order)
    _ratio_lines(middle, with_r, "rank r", order)
    for name, points in layers.items():
        _line(right, name, points, order)
    _powers(right, layers)
    right.set_yscale("log")
    right.set_xlabel("decoder layers, every linear adapted")
    right.set_ylabel("forward + backward, ms")
    handles: dict[str, Any] = {}
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _by_layers(models: Sequence[Line]) -> dict[tuple[str, str], dict[int, float]]:
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for line in models:
        row = line["row"]
        found[row["case"], row["impl"]][line["detail"]["layers"]] = row["median_ms"]
    return dict(found)


def _ratio_lines(
    axes: Any, series: Mapping[tuple[str, str], Mapping[int, float]], label: str, order: Sequence[Any] = ()
) -> None:
    order = order or sorted(series)
    for name in sorted(series):
        _line(axes, name, series[name], order)
    axes.axhline(1.0, color="black", linewidth=0.8)
    _powers(axes, series)
    axes.set_xlabel(label)
    axes.set_ylabel("forward + backward, over frozen")


def _line(axes: Any, name: tuple[str, str], points: Mapping[int, float], order: Sequence[Any]) -> None:
    at = sorted(points)
    colour, style = COLOURS[list(order).index(name) % len(COLOURS)], "-" if name[1] == "ours" else "--"
    axes.plot(at, [points[x] for x in at], style, marker=MARKS[name[1]], color=colour, label=_name(*name), markersize=4)
    axes.grid(alpha=0.3)


def _powers(axes: Any, series: Mapping[Any, Mapping[int, float]]) -> None:
    """A logarithmic x axis that is labelled with the very values."""
    at = sorted({x for points in series.values() for x in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(x) for x in at], fontsize=8)
    axes.minorticks_off()


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Any, axes: Any) -> None:
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def _name(case: str, impl: str) -> str:
    return f"{case} ({impl})"


def _subtitle(lines: Sequence[Line]) -> str:
    llama = any(line["row"]["layer"] for line in lines)
    what = "the seven linears of a LLaMA-3-8B layer" if llama else "one linear layer"
    how = "CUDA graphs" if main_mode(lines) == "graph" else "eager"
    return f"{what}, forward + backward, {lines[0]['row']['dtype']}, {how}"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def _commonest(values: Sequence[Any]) -> Any:
    return max(sorted(set(values), key=str), key=list(values).count) if values else None
