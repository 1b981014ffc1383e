"""What a CPU measures beside its battery: products, small adapters, host cost, ratios, sets, 4-bit bases, PEFT."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import grouped, host, nf4, peft_models, products, ratios, small_adapters
from benchmarks.cases import Shape

SECTIONS: dict[str, tuple[str, Any]] = {
    "products": ("Matrix products and saved memory", products),
    "small_adapters": ("Small adapters in 16 bits", small_adapters),
    "host": ("Host cost of one call", host),
    "ratios": ("Time over the frozen layer", ratios),
    "grouped": ("Layers with one input, launches, merging", grouped),
    "nf4": ("A 4-bit base", nf4),
    "peft": ("PEFT before and after accelerate", peft_models),
}
"""By section: its heading, and the module with `measure` and `show`."""
PICTURES: dict[str, tuple[str, str, Any]] = {
    "ratios": ("cpu_over_frozen.png", "time over the frozen layer", ratios.plot),
    "small_adapters": ("cpu_small_adapters.png", "surviving share", small_adapters.plot),
    "grouped": ("cpu_groups.png", "layers with one input", grouped.plot),
    "nf4": ("cpu_nf4.png", "4-bit base", nf4.plot),
    "peft": ("cpu_peft.png", "PEFT before and after accelerate", peft_models.plot),
}
"""By section: the file, the title and the drawing of its picture."""


def measurements(quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each section runs."""
    if quick:
        return {
            "products": products.measure,
            "small_adapters": lambda: small_adapters.measure(("bf16",), 256),
            "host": lambda: host.measure(rounds=30),
            "ratios": lambda: ratios.measure(Shape(), rounds=5),
            "grouped": lambda: grouped.measure(rounds=5),
            "nf4": lambda: nf4.measure(rounds=3),
            "peft": lambda: peft_models.measure(rounds=3),
        }
    return {
        "products": products.measure,
        "small_adapters": small_adapters.measure,
        "host": host.measure,
        "ratios": lambda: ratios.measure(Shape(), rounds=30),
        "grouped": grouped.measure,
        "nf4": nf4.measure,
        "peft": peft_models.measure,
    }


def markdown(sections: dict[str, Any]) -> list[str]:
    """The sections as tables."""
    return [line for name in SECTIONS for line in section_lines(name, sections[name])]


def section_lines(name: str, value: dict[str, Any]) -> list[str]:
    """One section: heading, command, tables."""
    title, module = SECTIONS[name]
    return ["", f"## {title}", "", f"`python -m {module.__name__}`", "", module.show(value)]


def replaced(text: str, name: str, value: dict[str, Any]) -> str:
    """cpu.md with one section and its picture renewed, or put in before the battery's tables where it is not there."""
    title, _ = SECTIONS[name]
    lines = "\n".join(section_lines(name, value)).strip()
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |^!\[|\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(text):
        text = pattern.sub(lambda _: f"{lines}\n\n", text, count=1)
    else:
        place = re.search(r"^## (?:Every layer|Decoder layers|Unavailable)|^!\[|\Z", text, re.MULTILINE)
        assert place is not None
        text = f"{text[: place.start()].rstrip()}\n\n{lines}\n\n{text[place.start() :]}"
    file, caption, _ = PICTURES[name]
    if f"]({file})" not in text:
        text = f"{text.rstrip()}\n![{caption}]({file})\n"
    return text


def draw(sections: dict[str, Any], out: Path) -> dict[str, str]:
    """The sections' pictures; their titles by file name. Nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    titles = {}
    for name, (file, caption, plot) in PICTURES.items():
        if name in sections:
            plot(sections[name], out / file)
            if (out / file).exists():
                titles[file] = caption
    return titles
