"""The measurements only a CPU makes: products, small adapters, host cost, time over frozen at one shape."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import host, products, ratios, small_adapters
from benchmarks.cases import Shape

SECTIONS: dict[str, tuple[str, Any]] = {
    "products": ("Matrix products and saved memory", products),
    "small_adapters": ("Small adapters in 16 bits", small_adapters),
    "host": ("Host cost of one call", host),
    "ratios": ("Time over the frozen layer", ratios),
}
"""By section: its heading, and the module with `measure` and `show`."""


def measurements(quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each section runs."""
    if quick:
        return {
            "products": products.measure,
            "small_adapters": lambda: small_adapters.measure(("bf16",), 256),
            "host": lambda: host.measure(rounds=30),
            "ratios": lambda: ratios.measure(Shape(), rounds=5),
        }
    return {
        "products": products.measure,
        "small_adapters": small_adapters.measure,
        "host": host.measure,
        "ratios": lambda: ratios.measure(Shape(), rounds=30),
    }


def markdown(sections: dict[str, Any]) -> list[str]:
    """The sections as tables."""
    lines = []
    for name, (title, module) in SECTIONS.items():
        lines += ["", f"## {title}", "", f"`python -m {module.__name__}`", ""]
        lines.append(module.show(sections[name]))
    return lines


def draw(sections: dict[str, Any], out: Path) -> dict[str, str]:
    """The sections' pictures; their titles by file name. Nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    ratios.plot(sections["ratios"], out / "cpu_over_frozen.png")
    small_adapters.plot(sections["small_adapters"], out / "cpu_small_adapters.png")
    return {"cpu_over_frozen.png": "time over the frozen layer", "cpu_small_adapters.png": "surviving share"}
