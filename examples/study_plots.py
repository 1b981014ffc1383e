"""The figures of the text studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLORS = {
    "LoRA": "#0072B2",
    "ShareA": "#D55E00",
    "ShareB": "#009E73",
    "ShareAB": "#CC79A7",
    "Share-qkv": "#E69F00",
    "QLoRA": "#0072B2",
    "QShareA": "#D55E00",
    "QGLoRA": "#009E73",
}

LABELS = {"dense": "dense", "nf4": "NF4"}

Rows = dict[str, dict[str, Any]]
"""The results by method: one row of the table each, with the runs of all seeds."""


def draw_comparison(rows: Rows, loss_before: float, title: str, path: Path) -> None:
    """Held-out loss by step (mean and range over the seeds), each seed's last loss, and what a method costs."""
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    curves = figure.add_subplot(grid[:, :2])
    for name, row in rows.items():
        draw_curve(curves, row["runs"], loss_before, color=COLORS[name], label=name, linewidth=2)
    finish_curves(curves)

    dots = figure.add_subplot(grid[0, 2])
    for position, (name, row) in enumerate(rows.items()):
        finals = [run["held_out"][-1] for run in row["runs"]]
        dots.plot([position] * len(finals), finals, "o", color=COLORS[name], alpha=0.6)
        dots.hlines(row["loss_mean"], position - 0.3, position + 0.3, color=COLORS[name], linewidth=2)
    dots.set_xlim(-0.5, len(rows) - 0.5)
    dots.grid(axis="y", alpha=0.3)
    dots.set_title("last held-out loss, each seed", fontsize=10)

    costs = [
        (grid[0, 3], "trainable_parameters", 1, "trainable parameters"),
        (grid[1, 2], "optimizer_bytes", 1024, "optimizer state, KiB"),
        (grid[1, 3], "adapter_bytes", 1024, "adapter file, KiB"),
    ]
    panels = [dots]
    for place, key, unit, text in costs:
        panel = figure.add_subplot(place)
        bars = panel.bar(list(rows), [row[key] / unit for row in rows.values()], color=[COLORS[name] for name in rows])
        panel.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        panel.margins(y=0.12)
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.set_title(text, fontsize=10)
        panels.append(panel)
    for panel in panels:
        panel.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_methods(losses: dict[str, list[float]], reference: str, title: str, path: Path) -> None:
    """The loss of every seed and the mean of each method, the best above; a line at the reference's mean."""
    means = {name: sum(own) / len(own) for name, own in losses.items()}
    names = sorted(means, key=lambda name: -means[name])
    figure, panel = plt.subplots(figsize=(9, 0.4 * len(names) + 1.6), layout="constrained")
    for place, name in enumerate(names):
        color = "#D55E00" if name == reference else "#0072B2"
        panel.plot(losses[name], [place] * len(losses[name]), "o", color=color, alpha=0.5)
        panel.vlines(means[name], place - 0.3, place + 0.3, color=color, linewidth=2)
    if reference in means:
        panel.axvline(means[reference], color="#D55E00", linestyle=":", linewidth=1)
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("loss on test text, nats a token (points: seeds, bars: means)")
    panel.set_title(title, fontsize=9, wrap=True)
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curve(panel: Axes, runs: list[dict[str, Any]], loss_before: float, **line: Any) -> None:
    """Held-out loss by step: the mean of the runs, in a band from the lowest to the highest."""
    steps = [0, *runs[0]["steps"]]
    losses = torch.tensor([[loss_before, *run["held_out"]] for run in runs])
    panel.plot(steps, losses.mean(0), **line)
    panel.fill_between(steps, losses.amin(0), losses.amax(0), color=line["color"], alpha=0.2, linewidth=0)


def finish_curves(panel: Axes) -> None:
    panel.set_xlabel("step")
    panel.set_ylabel("held-out loss, nats a token")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
    panel.legend()
    panel.spines[["top", "right"]].set_visible(False)


def draw_four_bit(rows: Rows, bases: Rows, title: str, path: Path) -> None:
    """Held-out loss by step on both bases, what NF4 costs in loss, and the bytes of base and training.

    Args:
        rows: by method, with "dense" and "nf4" of one run's results each, and the "differences" by seed.
        bases: "dense" and "nf4", each with its "loss" and "linear_bytes".
        title: of the figure.
        path: the PNG to write.
    """
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    curves = figure.add_subplot(grid[:, :2])
    for name, row in rows.items():
        for base, style, label in (("dense", "--", name.removeprefix("Q")), ("nf4", "-", name)):
            line = {"color": COLORS[name], "linestyle": style, "linewidth": 1.8, "label": f"{label}, {LABELS[base]}"}
            draw_curve(curves, row[base]["runs"], bases[base]["loss"], **line)
    finish_curves(curves)

    dots = figure.add_subplot(grid[0, 2:])
    for position, (name, row) in enumerate(rows.items()):
        dots.plot([position] * len(row["differences"]), row["differences"], "o", color=COLORS[name], alpha=0.6)
        dots.hlines(row["difference_mean"], position - 0.3, position + 0.3, color=COLORS[name], linewidth=2)
    before = bases["nf4"]["loss"] - bases["dense"]["loss"]
    dots.axhline(before, color="#777777", linestyle=":", label="before the fine-tuning")
    dots.axhline(0.0, color="black", linewidth=0.8)
    dots.set_xlim(-0.5, len(rows) - 0.5)
    dots.set_xticks(range(len(rows)), list(rows))
    dots.set_title("loss on the NF4 base − on the dense base, each seed", fontsize=10)
    dots.grid(axis="y", alpha=0.3)
    dots.legend(fontsize=8, loc="upper left")

    weights, peaks = figure.add_subplot(grid[1, 2]), figure.add_subplot(grid[1, 3])
    sizes = [bases[base]["linear_bytes"] / 1024 for base in LABELS]
    bars = weights.bar(list(LABELS.values()), sizes, color="#777777")
    weights.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    weights.set_title("weights of the linear layers, KiB", fontsize=10)
    for shift, (base, opacity) in zip((-0.2, 0.2), (("dense", 0.45), ("nf4", 1.0)), strict=True):
        for position, (name, row) in enumerate(rows.items()):
            peak = row[base]["peak_memory_bytes"] / 2**20
            bars = peaks.bar(position + shift, peak, width=0.38, color=COLORS[name], alpha=opacity)
            peaks.bar_label(bars, fmt="{:.1f}", fontsize=8)
    peaks.set_xticks(range(len(rows)), list(rows))
    peaks.set_title("peak memory, MiB: dense (pale), NF4", fontsize=10)
    for panel, margin in ((dots, 0.3), (weights, 0.15), (peaks, 0.15)):
        panel.margins(y=margin)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_spectra(spectra: dict[str, torch.Tensor], title: str, path: Path) -> None:
    """The singular values of each layer's update over its largest: a thin line a layer, a thick one the median.

    Args:
        spectra: by method, (layers, rank), each row in falling order.
        title: of the figure.
        path: the PNG to write.
    """
    figure, panels = plt.subplots(1, len(spectra), figsize=(11, 4.5), layout="constrained", sharey=True, squeeze=False)
    for panel, (name, values) in zip(panels[0], spectra.items(), strict=True):
        decay = values / values[:, :1]
        index = range(1, decay.shape[1] + 1)
        panel.plot(index, decay.T, color=COLORS[name], alpha=0.35, linewidth=0.8)
        panel.plot(index, decay.median(0).values, color=COLORS[name], linewidth=3.5, label="median of the layers")
        panel.set_title(f"{name}: {len(values)} layers")
        panel.set_xlabel("singular value")
        panel.set_xticks(list(index))
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
        panel.legend()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("singular value of ΔW / the largest one")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
