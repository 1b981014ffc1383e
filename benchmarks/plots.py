"""The pictures of a battery: time over frozen by M, roofline, saved bytes, growth. Needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import floor, results
from benchmarks.results import Found, Line, over_frozen, select
from benchmarks.tables import MIXED_NAMES, is_pair
from benchmarks.targets import PASS_NAMES

COLOURS = ("#2a6f97", "#bc6c25", "#588157", "#9d4edd", "#c1121f", "#6c757d", "#0a9396", "#ca6702")
MARKS = {"ours": "o", "peft": "s", "eager": "^", "compile": "v", "bnb": "D", "unsloth": "P", "lorafusion": "X"}
Series = dict[tuple[str, str], dict[int, float]]
"""By case and impl: points."""
TITLES = {
    "by_m": "time over the frozen layer by M", "roofline": "roofline", "saved": "bytes saved for backward",
    "multi": "several adapters in a batch: times over one call",
    "growth": "growth with M, r and the number of layers",
    "small_adapters": "the share of a small adapter that survives in 16 bits",
}  # fmt: skip


def draw_all(found: Found, out: Path, name: str) -> dict[str, str]:
    """Draw what the rows allow into `out`; the titles by file name."""
    titles = {}
    for which, draw in FIGURES.items():
        figure = draw(found)
        if figure is not None:
            figure.savefig(out / f"{name}_{which}.png", dpi=130)
            titles[f"{name}_{which}.png"] = TITLES[which]
    return titles


def dense(found: Found) -> list[Line]:
    """Single layers on a dense base, forward and backward, of the main mode, without dropout: of LLaMA-3-8B where there
    are any, else of the commonest shape."""
    lines = [line for line in select(found["rows"], op="linear", direction="fwd_bwd")
             if not line["row"]["p"] and not line["row"]["case"].startswith("nf4-")]  # fmt: skip
    lines = select(lines, mode=results.best_mode(lines))
    named = [line for line in lines if line["row"]["layer"]]
    if named or not lines:
        return named
    shape = commonest([(line["row"]["n"], line["row"]["k"]) for line in lines if line["row"]["r"] is not None])
    return [line for line in lines if (line["row"]["n"], line["row"]["k"]) == shape]


def series(found: Found, by: str) -> Series:
    """Time over frozen against "m" or "r"; the other is the commonest there is."""
    over = over_frozen(dense(found))
    axis, fixed = {"m": (2, 3), "r": (3, 2)}[by]
    adapted = {which: spread for which, spread in over.items() if which[3] is not None}
    value = commonest([which[fixed] for which in adapted])
    points: Series = defaultdict(dict)
    for which, spread in adapted.items():
        if which[fixed] == value:
            points[which[0], which[1]][int(which[axis] or 0)] = spread.median
    return dict(points)


def by_m(found: Found) -> Any:
    """Time over frozen by M, a line for each case and implementation."""
    points = {name: at for name, at in series(found, "m").items() if len(at) > 1}
    if not points:
        return None
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    _lines(axes, points, "rows of x, M", "forward + backward, over frozen", sorted(points))
    return _finished(figure, axes, _subtitle(dense(found)))


def roofline(found: Found) -> Any:
    """Achieved TFLOP/s against operations per byte, under the measured ceilings."""
    lines, rates = dense(found), found["notes"].get("ceilings")
    if not lines or not rates:
        return None
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    groups: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        work = floor.work(results.entry_of(line), line["row"]["pass"])
        point = (work.flops / work.bytes, work.flops / line["row"]["median_ms"] / 1e9)
        groups[line["row"]["case"], line["row"]["impl"]].append(point)
    for i, ((case, impl), points) in enumerate(sorted(groups.items())):
        colour = COLOURS[i % len(COLOURS)]
        axes.scatter(
            *zip(*points, strict=True), s=22, alpha=0.75, label=f"{case} ({impl})", color=colour, marker=MARKS[impl]
        )
    least, most = axes.get_xlim()
    bend = 1e3 * rates["tflops"] / rates["gbps"]
    left, right = min(max(least, 1e-3), bend / 4), max(most, bend * 4)
    axes.plot(
        [left, bend, right], [left * rates["gbps"] / 1e3, rates["tflops"], rates["tflops"]], color="black", linewidth=1
    )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte, at least", ylabel="TFLOP/s achieved")
    measured = f"{rates['tflops']:.3g} TFLOP/s, {rates['gbps']:.4g} GB/s measured"
    return _finished(figure, axes, f"{_subtitle(lines)}; {measured}")


def saved(found: Found) -> Any:
    """Bytes kept for backward beyond x, y and the parameters: summed over the layers of one M."""
    rows = [line["row"] for line in dense(found) if line["row"]["r"] is not None]
    if not rows:
        return None
    m, r = commonest([row["m"] for row in rows]), commonest([row["r"] for row in rows])
    sums: dict[str, dict[Any, int]] = defaultdict(dict)
    for row in rows:
        if (row["m"], row["r"]) == (m, r) and row["saved_bytes"] is not None:
            sums[f"{row['case']} ({row['impl']})"][row["layer"]] = row["saved_bytes"]
    names = sorted(sums, key=lambda name: sum(sums[name].values()))
    values = [max(sum(sums[name].values()), 1) for name in names]
    figure = _figure(8, 0.36 * len(names) + 1.6)
    axes = figure.add_subplot()
    bars = axes.barh(names, values, color=COLOURS[0])
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=4, fontsize=8)
    axes.set(xscale="log", xlabel="bytes saved for backward beyond x, y and the parameters")
    axes.set_xlim(right=20 * max(values))
    axes.set_title(f"{_subtitle(dense(found))}, M={m}, r={r}", fontsize=10)
    return figure


def growth(found: Found) -> Any:
    """How cost grows: over frozen by M, by r, and the time of a step of 1, 2, 4, 8 decoder layers."""
    layers: Series = defaultdict(dict)
    for line in found["models"]:
        if not is_pair(line):
            layers[line["row"]["case"], line["row"]["impl"]][line["detail"]["layers"]] = line["row"]["median_ms"]
    panels = {"rows of x, M": series(found, "m"), "rank r": series(found, "r"), "decoder layers": dict(layers)}
    if not any(panels.values()):
        return None
    figure = _figure(13, 4.6)
    order = sorted({name for points in panels.values() for name in points})
    handles: dict[str, Any] = {}
    for axes, (label, points) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        what = "a step, ms" if points is panels["decoder layers"] else "forward + backward, over frozen"
        _lines(axes, points, label, what, order)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.set_yscale("log")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def small_adapters(found: Found) -> Any:
    """The share of an adapter's contribution to y that survives, by |A|: here, and through a W_eff in bf16."""
    rows = [row for row in found["notes"].get("small_adapters", {}).get("rows", []) if row["support"][0] == "A"]
    forms: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        if (row["dtype"], row["tensor"]) == ("bf16", "y"):
            forms[row["support"]].append(row)
    if not forms:
        return None
    figure = _figure(9, 3.2)
    panels = figure.subplots(1, len(forms), sharey=True, squeeze=False)[0]
    for axes, (form, of) in zip(panels, forms.items(), strict=True):
        for way, style, colour in (("ours", "o-", COLOURS[0]), ("plain", "s--", COLOURS[1])):
            label = "ours" if way == "ours" else "bf16 W_eff"
            axes.plot(
                [row["size"] for row in of], [row[f"{way}_share"] for row in of], style, color=colour, label=label
            )
        axes.set(xscale="log", xlabel="|A|", title=form.replace(" ", " = "))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of Δ in y, bf16")
    panels[0].legend(frameon=False)
    return figure


def multi(found: Found) -> Any:
    """A batch of several adapters: the others' times over that of one call, by the rows of an adapter."""
    rows = found["notes"].get("multi", {}).get("rows", [])
    panels = sorted({(row["pass"], row["adapters"]) for row in rows})
    if not panels:
        return None
    figure = _figure(3.6 * len(panels), 3.6)
    for axes, (direction, count) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        own = [row for row in rows if (row["pass"], row["adapters"]) == (direction, count)]
        ticks = [row["rows"] for row in own]
        for colour, (key, name) in zip(COLOURS, MIXED_NAMES.items(), strict=False):
            if f"{key}_over_mixed" in own[0]:
                axes.plot(ticks, [row[f"{key}_over_mixed"] for row in own], "o-", color=colour, label=name, ms=4)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="rows of an adapter")
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_title(f"{count} adapters, {PASS_NAMES[direction]}", fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("time over one call")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Found], Any]] = {
    "by_m": by_m, "roofline": roofline, "saved": saved, "growth": growth, "small_adapters": small_adapters,
    "multi": multi,
}  # fmt: skip
"""What is drawn, where the rows allow it."""


def _lines(axes: Any, points: Mapping[Any, Mapping[int, float]], x: str, y: str, order: Sequence[Any]) -> None:
    """A line for each case and implementation, over an x axis that is labelled with the very values."""
    for name in sorted(points):
        at, style = sorted(points[name]), "-" if name[1] == "ours" else "--"
        colour, label = COLOURS[list(order).index(name) % len(COLOURS)], f"{name[0]} ({name[1]})"
        values = [points[name][one] for one in at]
        axes.plot(at, values, style, marker=MARKS[name[1]], color=colour, label=label, markersize=4)
    ticks = sorted({at for one in points.values() for at in one})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(at) for at in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finished(figure: Any, axes: Any, title: str) -> Any:
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _subtitle(lines: Sequence[Line]) -> str:
    what = "the seven linears of a LLaMA-3-8B layer" if lines[0]["row"]["layer"] else "one linear layer"
    how = "CUDA graphs" if results.best_mode(lines) == "graph" else "eager"
    return f"{what}, forward + backward, {lines[0]['row']['dtype']}, {how}"


def commonest(values: Sequence[Any]) -> Any:
    return max(sorted(set(values), key=str), key=list(values).count) if values else None
