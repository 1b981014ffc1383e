"""Rewrites the measured parts of README.md from benchmarks/results, between markers.

    python -m benchmarks.readme           # rewrite
    python -m benchmarks.readme --check   # exit code 1 if README.md is not what the results give

The markers are HTML comments, measured:cpu:begin and measured:cpu:end, and the same with gpu and peft; what stands
between them is generated, all else is left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import assemble, grouped_text, nf4_text, peft_models_text
from benchmarks.ratios import CASES
from benchmarks.schema import FIELDS
from benchmarks.timing import table

ROOT = Path(__file__).parents[1]
WIDTH = 140
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
LABELS = {
    "lora": "LoRA",
    "glora:vector,lora,none,none,none": "GLoRA, A = vector, B = lora",
    "glora:vector,lora,vector,vector,vector": "GLoRA, A = vector, B = lora, C = D = E = vector",
    "glora:lora,lora,none,none,none": "GLoRA, A = B = lora",
    "glora:vector,vector,none,none,none": "GLoRA, A = B = vector",
}
CPU_PICTURES = {
    "cpu_over_frozen.png": "time over the frozen layer",
    "cpu_growth.png": "growth with M, r and the number of layers",
}
SET_PICTURES = {"cpu_groups.png": "layers with one input, over one product with their weights concatenated"}
NF4_PICTURES = {"cpu_nf4.png": "layers over a 4-bit base: time, bandwidth, memory"}
PEFT_PICTURE = "a training step of PEFT's models before and after accelerate: time and peak memory"
PEFT_SPREAD = (
    "Medians of the ratios of the rounds; p20 and p80 are in [{slug}.md](benchmarks/results/{slug}.md). `python -m "
    "benchmarks.peft_models` measures this."
)
GPU_PICTURES = {"by_m": "time over the frozen layer by M", "roofline": "roofline", "saved": "bytes saved for backward"}
GPU_PICTURES |= {
    "growth": "growth with M, r and the number of layers",
    "groups": "layers with one input",
    "nf4": "4-bit base",
}


def cpu_text(results: Path) -> str:
    """The CPU part: where, the ratios, pictures."""
    report = json.loads((results / "cpu.json").read_text())
    device, ratios = report["device"], report["sections"]["ratios"]
    found = {(row["case"], row["impl"]): row["over_frozen"] for row in ratios["rows"]}
    rows = [
        {"": LABELS[case], "here": _two(found.get((case, "ours"))), "PEFT": _two(found.get((case, "peft")))}
        for case in CASES
    ]
    text = (
        f"{device['name']}, {device['cores']} cores, torch {report['torch']}, PEFT {report['peft']}; "
        f"{report['date'][:10]}, commit {report['commit']}. {ratios['shape']}, forward and backward: the median over "
        f"{ratios['rounds']} interleaved rounds of the time over the frozen layer's in the same round. `python -m "
        "benchmarks.report` wrote this, and the tables in [benchmarks/results/cpu.md](benchmarks/results/cpu.md) with "
        "percentiles and versions."
    )
    sections = report["sections"]
    parts = f"{wrapped(text)}\n\n{table(rows)}" + _pictures(results, CPU_PICTURES)
    return parts + _sets(results, sections.get("grouped")) + _nf4(results, sections.get("nf4"))


def gpu_text(results: Path) -> str:
    """The GPU part: for each device its facts, target table, models and pictures; without one the empty table."""
    reports = gpu_reports(results)
    command = "`python -m benchmarks.report` on a machine with a GPU measures it and fills this in."
    if not reports:
        intro = f"Not measured yet. {command} The target table for an H100:"
        return f"{wrapped(intro)}\n\n{_targets([])}\n\n{_group_targets([], None)}\n\n{_nf4_targets([], None, None)}"
    parts = []
    for slug, report in reports.items():
        head = {**report, "packages": _packages(results, slug)}
        rates = {"tflops": report["ceilings"]["bf16_tflops"], "gbps": report["ceilings"]["copy_gbps"]}
        depth = _detail(results, slug).get("grouped")
        lines = [*map(wrapped, assemble.facts(head, rates)), "", _targets(report["rows"])]
        lines += ["", _group_targets(report["rows"], depth)]
        detail = _detail(results, slug)
        lines += ["", _nf4_targets(with_ratios(report["rows"], detail), rates["gbps"], detail.get("nf4"))]
        layers = [row for row in report["models"] if not peft_models_text.is_step(row)]
        if layers:
            lines += ["", "Decoder layers, forward and backward, eager mode, every linear adapted:", ""]
            lines += [table(assemble.model_rows(layers))]
        if report["unavailable"]:
            named = "; ".join(f"{impl}: {why}" for impl, why in report["unavailable"].items())
            lines += ["", f"Not measured: {named}."]
        lines += [
            "",
            f"Every row: [benchmarks/results/{slug}.md](benchmarks/results/{slug}.md); `python -m benchmarks.report`.",
        ]
        pictures = {f"{slug}_{name}.png": title for name, title in GPU_PICTURES.items()}
        parts.append("\n".join(lines) + _pictures(results, pictures))
    return "\n\n".join(parts)


def peft_text(results: Path) -> str:
    """A step of PEFT's models before and after `accelerate`: on the CPU, then on each card that has it."""
    found = {"cpu": json.loads((results / "cpu.json").read_text())["sections"].get("peft")}
    found |= {slug: _detail(results, slug).get("peft") for slug in gpu_reports(results)}
    parts = []
    for slug, section in found.items():
        if section and section.get("models"):
            text = f"{peft_models_text.what(section)} {peft_models_text.where(section)} {PEFT_SPREAD.format(slug=slug)}"
            rows = table(peft_models_text.step_table(section["models"], spread=False))
            parts.append(f"{wrapped(text)}\n\n{rows}" + _pictures(results, {f"{slug}_peft.png": PEFT_PICTURE}))
    return "\n\n".join(parts) or "Not measured yet: `python -m benchmarks.peft_models` does, and fills this in."


def gpu_reports(results: Path) -> dict[str, dict[str, Any]]:
    """The result files of cards, by slug."""
    found = {}
    for path in sorted(results.glob("*.json")):
        value = json.loads(path.read_text())
        if isinstance(value, dict) and set(value) == set(FIELDS):
            found[path.stem] = value
    return found


def replaced(text: str, parts: Mapping[str, str]) -> str:
    """The text with what stands between the markers of each part replaced.

    Raises:
        ValueError: the markers of a part do not stand there exactly once each.
    """
    for name, part in parts.items():
        begin, end = (f"<!-- measured:{name}:{which} -->" for which in ("begin", "end"))
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md must have {begin} and {end} once each")
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        inside = f"{begin}\n\n{part.strip()}\n\n{end}"
        text = pattern.sub(lambda _, inside=inside: inside, text)  # type: ignore[misc]
    return text


def wrapped(text: str) -> str:
    """A paragraph in lines of WIDTH columns; code is not broken."""
    kept = re.sub(r"`[^`]*`", lambda code: code.group().replace(" ", "\0"), text)
    return textwrap.fill(kept, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def expected(text: str, results: Path = RESULTS) -> str:
    """README.md as the results have it."""
    return replaced(text, {"cpu": cpu_text(results), "gpu": gpu_text(results), "peft": peft_text(results)})


def update() -> bool:
    """Rewrite README.md; whether it changed."""
    before = README.read_text()
    after = expected(before)
    if after != before:
        README.write_text(after)
    return after != before


def _targets(rows: Sequence[Mapping[str, Any]]) -> str:
    intro, _, lines = assemble.target_text(rows).partition("\n\n")
    return f"{wrapped(intro)}\n\n{lines}"


def _group_targets(rows: Sequence[Mapping[str, Any]], depth: Mapping[str, Any] | None) -> str:
    intro, _, lines = assemble.group_target_text(rows, depth).partition("\n\n")
    return f"{wrapped(intro)}\n\n{lines}"


def _nf4_targets(rows: Sequence[Mapping[str, Any]], gbps: float | None, parts: Mapping[str, Any] | None) -> str:
    intro, _, lines = assemble.nf4_target_text(rows, gbps, parts).partition("\n\n")
    return f"{wrapped(intro)}\n\n{lines}"


def with_ratios(rows: Sequence[Mapping[str, Any]], detail: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows, each with its ratio to the frozen layer of the same rounds as "over", where the detail has it."""
    over = {line["key"]: line.get("over_frozen") for line in detail.get("rows", [])}
    fields = ("case", "impl", "layer", "dtype", "m", "n", "k", "r", "p")
    found = []
    for row in rows:
        named = ["-" if row[field] is None else str(row[field]) for field in fields]
        key = "|".join([*named, "False", row["pass"], row["mode"]])  # rows without a bias: battery.Entry.key
        found.append({**row, "over": over.get(key)})
    return found


def _nf4(results: Path, found: Mapping[str, Any] | None) -> str:
    """The CPU's layers over a 4-bit base, with their picture."""
    if found is None:
        return ""
    row, parts = found["rows"][0]["row"], found["parts"]
    text = (
        f"Over a 4-bit base (NF4 in blocks of 64, double quantization): N = K = {row['n']} {row['dtype']}, "
        f"{found['rounds']} rounds, {grouped_text.load(found)} on {found['cores']} cores; {found['date'][:10]}, commit "
        f"{found['commit']}. Time over the dense frozen layer's in the same round, then the forward of a few tokens "
        "and, as a share of a copy's bandwidth, the bytes of its weight over that time. A CPU has no fused kernel: the "
        "weight is decoded in plain PyTorch, which is what these times are. p20 and p80 are in cpu.md; `python -m "
        "benchmarks.nf4` measures this."
    )
    blocks = [wrapped(text), table(nf4_text.training_table(found["rows"], spread=False))]
    blocks.append(table(nf4_text.decode_table(found["rows"])))
    if "error" not in parts["memory"]:
        blocks += [wrapped(nf4_text.memory_text(parts["memory"])), table(nf4_text.memory_table(parts["memory"]))]
    return "\n\n" + "\n\n".join(blocks) + _pictures(results, NF4_PICTURES)


def _sets(results: Path, found: Mapping[str, Any] | None) -> str:
    """The CPU's sets of layers, launches and merging, with their picture."""
    if found is None:
        return ""
    row = found["rows"][0]["row"]
    text = (
        "LoRA on layers that read one input, over one product with their weights concatenated: "
        f"M={row['m']} K={row['k']} {row['dtype']}, {found['rounds']} rounds, {grouped_text.load(found)} on "
        f"{found['cores']} cores; {found['date'][:10]}, commit {found['commit']}. On a CPU nothing is launched, so "
        f"grouping has little to gain. The p20 and p80 of a ratio are up to {grouped_text.widest(found['rows']):.2f} "
        "apart; they are in cpu.md. `python -m benchmarks.grouped` measures this."
    )
    parts = [wrapped(text), table(grouped_text.over_table(found["rows"], spread=False))]
    if "error" not in found["launches"]:
        parts.append(wrapped(grouped_text.launch_sentence(found["launches"])))
    if "error" not in found["merge"]:
        parts.append(wrapped(grouped_text.merge_text(found["merge"])))
    return "\n\n" + "\n\n".join(parts) + _pictures(results, SET_PICTURES)


def _packages(results: Path, slug: str) -> dict[str, str]:
    return _detail(results, slug).get("header", {}).get("packages", {})


def _detail(results: Path, slug: str) -> dict[str, Any]:
    path = results / f"{slug}_detail.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _pictures(results: Path, titles: Mapping[str, str]) -> str:
    there = [(name, title) for name, title in titles.items() if (results / name).exists()]
    return "".join(f"\n\n![{title}](benchmarks/results/{name})" for name, title in there)


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if README.md is out of date")
    args = parser.parse_args()
    if args.check:
        text = README.read_text()
        raise SystemExit(int(text != expected(text)))
    print("README.md rewritten" if update() else "README.md is up to date")


if __name__ == "__main__":
    main()
