"""The picture of a search. matplotlib is imported when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glora_kernels.search.results import Finished
from glora_kernels.spec import SUPPORTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LETTERS = {"lora": "L", "vector": "v", "constant": "c", "none": ""}


def draw(
    path: str | os.PathLike[str],
    finished: Sequence[Finished],
    front: Sequence[Finished],
    best: Sequence[Finished],
    limit: int | None,
    minimize: bool,
) -> None:
    """Write the picture: score against parameters, and layer × support of the best, the first of which is named.

    The format goes by the ending of the path, as in matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install 'glora_kernels[search]'") from error
    layers = len(best[0].candidate)
    figure = Figure(figsize=(13, min(max(5.5, 1.5 + 0.2 * layers), 60)), layout="constrained")
    scores, kept = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_scores(scores, finished, front, limit, minimize)
    _draw_kept(kept, best)
    figure.savefig(path, dpi=120)


def _draw_scores(
    panel: Axes, finished: Sequence[Finished], front: Sequence[Finished], limit: int | None, minimize: bool
) -> None:
    others = [done for done in finished if done.name is None]
    panel.plot(*_places(others), "o", color="#999999", alpha=0.45, markersize=4, label="candidates")
    panel.plot(*_places(front), "o-", color="#0072B2", markersize=5, drawstyle="steps-post", label="front")
    named = [done for done in finished if done.name is not None]
    if named:
        panel.plot(*_places(named), "D", color="#D55E00", markersize=7, label="hand-picked")
    for done in named:
        place: Any = (done.parameters, done.score)
        panel.annotate(str(done.name), place, xytext=(6, 6), textcoords="offset points", fontsize=8)
    if limit is not None:
        panel.axvline(limit, color="black", linestyle=":", label=f"limit {limit:,}")
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set_xlabel("parameters of the adapters")
    panel.set_ylabel(f"score ({'lower' if minimize else 'higher'} is better)")
    panel.set_title(f"{len(finished)} candidates")
    panel.grid(alpha=0.3)
    panel.legend()
    panel.spines[["top", "right"]].set_visible(False)


def _places(finished: Sequence[Finished]) -> tuple[list[int], list[Any]]:
    return [done.parameters for done in finished], [done.score for done in finished]


def _draw_kept(panel: Axes, best: Sequence[Finished]) -> None:
    paths = list(best[0].candidate)
    share = [
        [sum(getattr(done.candidate[path], name) != "none" for done in best) / len(best) for name in SUPPORTS]
        for path in paths
    ]
    image = panel.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for y, path in enumerate(paths):
        config = best[0].candidate[path]
        for x, name in enumerate(SUPPORTS):
            form = getattr(config, name)
            text = f"{LETTERS[form]}{config.rank}" if form == "lora" else LETTERS[form]
            panel.text(
                x, y, text, ha="center", va="center", fontsize=7, color="white" if share[y][x] > 0.5 else "black"
            )
    panel.set_xticks(range(len(SUPPORTS)), SUPPORTS)
    panel.set_yticks(range(len(paths)), paths, fontsize=7)
    panel.set_title(
        f"share of the best {len(best)} with a support;\nletters: the best one (L lora, v vector, c constant)"
    )
    if panel.figure is not None:
        panel.figure.colorbar(image, ax=panel, shrink=0.6)
