"""The pictures of a battery: time over frozen by M, roofline, saved bytes, growth. Needs matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import floor, results
from benchmarks.cases import FROZEN
from benchmarks.cells import CASE_NAMES, IMPL_NAMES, label
from benchmarks.results import Found, Line, Spread, over_frozen, select
from benchmarks.tables import MIXED_NAMES, adapted_steps, is_pair, step_name
from benchmarks.targets import PASS_NAMES


class Look(NamedTuple):
    """How a contestant is drawn, in every picture."""

    name: str
    colour: str
    mark: str
    line: str


LOOKS = {
    impl: Look(IMPL_NAMES[impl], colour, mark, line)
    for impl, colour, mark, line in (
        ("ours", "#2a6f97", "o", "-"), ("peft", "#bc6c25", "s", "--"), ("eager", "#588157", "^", ":"),
        ("compile", "#9d4edd", "v", "-."), ("bnb", "#c1121f", "D", "--"), ("unsloth", "#0a9396", "P", "--"),
        ("lorafusion", "#ca6702", "X", "--"),
    )
}  # fmt: skip
FROZEN_COLOUR = "#6c757d"
MIXED_LOOKS = {
    "frozen": Look("", FROZEN_COLOUR, "_", ":"), "loop": LOOKS["ours"]._replace(mark="v", line="--"),
    "peft": LOOKS["peft"], "separate": LOOKS["peft"]._replace(mark="X", line=":"),
}  # fmt: skip
"""How the others of a batch of several adapters are drawn: each in the colour of whose layers it calls."""
Points = Mapping[int, Spread]
Series = dict[tuple[str, str], dict[int, Spread]]
"""By case and impl: points."""
TITLES = {
    "headline": "a training step over the frozen model, and what it keeps for backward",
    "by_m": "time over the frozen layer by M", "roofline": "roofline", "saved": "bytes saved for backward",
    "multi": "several adapters in a batch: times over one call", "growth": "growth with r and the number of layers",
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
            points[which[0], which[1]][int(which[axis] or 0)] = spread
    return dict(points)


def headline(found: Found) -> Any:
    """A training step of a small LLaMA under PEFT, as it is and accelerated: time, and what autograd keeps."""
    steps = adapted_steps(found)
    names = list(dict.fromkeys(map(step_name, steps)))
    if not names:
        return None
    figure = _figure(9, 0.62 * len(names) + 1.2)
    time, kept = figure.subplots(1, 2, sharey=True)
    for impl, at in (("peft", -0.19), ("ours", 0.19)):
        own = [line for line in steps if line["row"]["impl"] == impl]
        places = [names.index(step_name(line)) + at for line in own]
        ratios = [line["detail"]["over_frozen"] for line in own]
        ends = [[abs(line["detail"][f"over_frozen_{end}"] - ratio) for line, ratio in zip(own, ratios, strict=True)]
                for end in ("p20", "p80")]  # fmt: skip
        sizes = [line["detail"]["saved_bytes"] / 2**20 for line in own]
        look = LOOKS[impl]
        bars = time.barh(places, ratios, 0.36, xerr=ends, color=look.colour, label=look.name, error_kw={"lw": 1})
        time.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=6, fontsize=8)
        kept.bar_label(kept.barh(places, sizes, 0.36, color=look.colour), fmt="%.0f", padding=4, fontsize=8)
    time.axvline(1.0, color=FROZEN_COLOUR, linewidth=1, linestyle="--")
    time.set_yticks(range(len(names)), names, fontsize=9)
    time.invert_yaxis()
    time.set(xlabel="time of a training step over the frozen model's", xlim=(0, None))
    kept.set_xlabel("kept for backward, MiB")
    for axes in (time, kept):
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def by_m(found: Found) -> Any:
    """Time over frozen by M: a panel for each case, a line for each contestant, a band from p20 to p80."""
    points = {name: at for name, at in series(found, "m").items() if len(at) > 1}
    if not points:
        return None
    return _grid([("rows of x, M", "forward + backward,\nover frozen", points)], 1.0, _subtitle(dense(found)))


def roofline(found: Found) -> Any:
    """Achieved TFLOP/s against operations per byte, under the measured ceilings."""
    lines, rates = dense(found), found["notes"].get("ceilings")
    if not lines or not rates:
        return None
    groups: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        work = floor.work(results.entry_of(line), line["row"]["pass"])
        point = (work.flops / work.bytes, work.flops / line["row"]["median_ms"] / 1e9)
        groups[line["row"]["case"]][line["row"]["impl"]].append(point)
    columns = min(len(groups), 3)
    rows = math.ceil(len(groups) / columns)
    figure = _figure(3.3 * columns, 2.9 * rows + 0.7)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = grid.flat[: len(groups)]
    for empty in grid.flat[len(groups) :]:
        empty.set_axis_off()
    bend = 1e3 * rates["tflops"] / rates["gbps"]
    for axes, case in zip(panels, sorted(groups, key=_order), strict=True):
        for impl, points in sorted(groups[case].items()):
            look = LOOKS[impl]
            axes.scatter(
                *zip(*points, strict=True), s=22, alpha=0.8, label=look.name, color=look.colour, marker=look.mark
            )
        ends = (bend / 4, bend, 64 * bend)
        axes.plot(ends, [min(at * rates["gbps"] / 1e3, rates["tflops"]) for at in ends], color="black", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte, at least")
        axes.set_title(_wrapped(CASE_NAMES.get(case, case)), fontsize=9)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("TFLOP/s achieved")
    measured = f"{rates['tflops']:.3g} TFLOP/s, {rates['gbps']:.4g} GB/s measured"
    return _finished(figure, panels, f"{_subtitle(lines)}; {measured}")


def saved(found: Found) -> Any:
    """Bytes kept for backward beyond x, y and the parameters: summed over the layers of one M."""
    rows = [line["row"] for line in dense(found) if line["row"]["r"] is not None]
    if not rows:
        return None
    m, r = commonest([row["m"] for row in rows]), commonest([row["r"] for row in rows])
    sums: dict[tuple[str, str], dict[Any, int]] = defaultdict(dict)
    for row in rows:
        if (row["m"], row["r"]) == (m, r) and row["saved_bytes"] is not None:
            sums[row["case"], row["impl"]][row["layer"]] = row["saved_bytes"]
    names = sorted(sums, key=lambda name: sum(sums[name].values()))
    values = [max(sum(sums[name].values()), 1) for name in names]
    figure = _figure(8, 0.36 * len(names) + 1.6)
    axes = figure.add_subplot()
    bars = axes.barh([label(*name) for name in names], values, color=[LOOKS[impl].colour for _, impl in names])
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=4, fontsize=8)
    axes.set(xscale="log", xlabel="bytes saved for backward beyond x, y and the parameters")
    axes.set_xlim(right=20 * max(values))
    figure.suptitle(f"{_subtitle(dense(found))}, M={m}, r={r}", fontsize=10)
    return figure


def growth(found: Found) -> Any:
    """How cost grows: over frozen by r, and the time of a step of 1, 2, 4, 8 decoder layers; a panel for each case."""
    layers: Series = defaultdict(dict)
    for line in found["models"]:
        if not is_pair(line):
            row = line["row"]
            ends = (line["detail"].get(f"{name}_ms", row["median_ms"]) for name in ("median", "p20", "p80"))
            layers[row["case"], row["impl"]][line["detail"]["layers"]] = Spread(*ends)
    frozen = layers.pop((FROZEN, "eager"), {})
    ranks = {name: at for name, at in series(found, "r").items() if len(at) > 1}
    rows = [("rank r", "forward + backward,\nover frozen", ranks), ("decoder layers", "a step, ms", dict(layers))]
    rows = [row for row in rows if row[2]]
    return _grid(rows, 1.0, "", frozen or None) if rows else None


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
        for way, look, name in (("ours", LOOKS["ours"], "here"), ("plain", LOOKS["eager"], "W_eff in bf16")):
            sizes, shares = [row["size"] for row in of], [row[f"{way}_share"] for row in of]
            axes.plot(sizes, shares, look.line, marker=look.mark, color=look.colour, label=name)
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
        for key, name in MIXED_NAMES.items():
            look = MIXED_LOOKS[key]
            if f"{key}_over_mixed" in own[0]:
                ratios = [row[f"{key}_over_mixed"] for row in own]
                axes.plot(ticks, ratios, look.line, marker=look.mark, color=look.colour, label=name, ms=4)
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
    "headline": headline, "by_m": by_m, "roofline": roofline, "saved": saved, "growth": growth,
    "small_adapters": small_adapters, "multi": multi,
}  # fmt: skip
"""What is drawn, where the rows allow it."""


def _grid(rows: Sequence[tuple[str, str, Series]], line: float, title: str, frozen: Points | None = None) -> Any:
    """Panels, a row for each of `rows` and a column for each case (one row alone is folded), with a line for each
    contestant. line: where the frozen layer is in ratios; frozen: its own times."""
    cases = sorted({case for _, _, points in rows for case, _ in points}, key=_order)
    folded = len(rows) == 1 and len(cases) > 3
    shape = (math.ceil(len(cases) / 2), 2) if folded else (len(rows), len(cases))
    figure = _figure(3.3 * shape[1], 2.7 * shape[0] + 0.7)
    grid = figure.subplots(*shape, sharey="all" if folded else "row", squeeze=False)
    for number, (x, y, points) in enumerate(rows):
        panels = grid.flat if folded else grid[number]
        for axes, case in zip(panels, cases, strict=False):
            for impl in (impl for of, impl in sorted(points) if of == case):
                _line(axes, points[case, impl], LOOKS[impl].name, LOOKS[impl])
            if "frozen" in y:
                axes.axhline(line, color=FROZEN_COLOUR, linewidth=1, linestyle="--")
            elif frozen:
                _line(axes, frozen, "no adapter", Look("no adapter", FROZEN_COLOUR, ".", "--"))
            axes.set_xlabel(x)
            axes.grid(alpha=0.3)
            if number == 0:
                axes.set_title(_wrapped(CASE_NAMES.get(case, case)), fontsize=9)
        for axes in grid[:, 0] if folded else grid[number, :1]:
            axes.set_ylabel(y)
        if "frozen" not in y:
            grid[number, 0].set_ylim(bottom=0)
    for axes in list(grid.flat)[len(cases) :] if folded else ():
        axes.set_visible(False)
    return _finished(figure, list(grid.flat), title)


def _line(axes: Any, points: Points, name: str, look: Look) -> None:
    """A line over an x axis that is labelled with the very values, and a band from p20 to p80."""
    at = sorted(points)
    axes.plot(at, [points[one].median for one in at], look.line, marker=look.mark, color=look.colour, label=name, ms=4)
    ends = [points[one].p20 for one in at], [points[one].p80 for one in at]
    axes.fill_between(at, *ends, color=look.colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(at, [str(one) for one in at], fontsize=8)
    axes.minorticks_off()


def _order(case: str) -> int:
    """The place of a case in the order of their names."""
    return list(CASE_NAMES).index(case) if case in CASE_NAMES else len(CASE_NAMES)


def _wrapped(name: str) -> str:
    return textwrap.fill(name, 28)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _finished(figure: Any, panels: Sequence[Any], title: str) -> Any:
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _subtitle(lines: Sequence[Line]) -> str:
    what = "the seven linears of a LLaMA-3-8B layer" if lines[0]["row"]["layer"] else "one linear layer"
    how = "CUDA graphs" if results.best_mode(lines) == "graph" else "eager"
    return f"{what}, forward + backward, {lines[0]['row']['dtype']}, {how}"


def commonest(values: Sequence[Any]) -> Any:
    return max(sorted(set(values), key=str), key=list(values).count) if values else None
