"""From a store's lines to the result files: `<slug>.json` by the schema, `<slug>_detail.json`, and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import grouped_text, nf4_text, peers, peft_models_text, schema, targets
from benchmarks.battery import GROUP_IMPLS, IMPLS, NO_LAYER
from benchmarks.schema import ROW_FIELDS
from benchmarks.store import Store
from benchmarks.timing import table


def result(store: Store) -> dict[str, Any]:
    """The result file of a device, checked against the schema."""
    head = store.header
    rates = store.note("ceilings") or {}
    found = {name: head.get(name) for name in ("device", "driver", "torch", "triton", "commit", "date")}
    found["ceilings"] = {"bf16_tflops": rates.get("tflops"), "copy_gbps": rates.get("gbps")}
    found["unavailable"] = unavailable(store)
    found["rows"] = [line["row"] for line in row_lines(store)]
    lines = [*store.of("model"), *(store.note("peft") or {}).get("models", [])]
    found["models"] = [line["row"] for line in lines]
    schema.check_report(found)
    return found


def row_lines(store: Store) -> list[dict[str, Any]]:
    """The row lines, one for each row of the schema.

    A row does not say whether the layer has a bias. Where a frozen layer was timed both ways, the row is the one
    without; the other is in the detail.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in sorted(store.of("row"), key=lambda line: bool(line["detail"]["bias"])):
        found.setdefault(tuple(line["row"][name] for name in ROW_FIELDS[:12]), line)
    order = {line["key"]: i for i, line in enumerate(store.of("row"))}
    return sorted(found.values(), key=lambda line: order[line["key"]])


def detail(store: Store) -> dict[str, Any]:
    """Everything else that was measured or went wrong."""
    return {
        "header": store.header,
        "rows": [
            {"key": line["key"], "median_ms": line["row"]["median_ms"], **line["detail"]} for line in store.of("row")
        ],
        "models": [{"key": line["key"], **line["detail"]} for line in store.of("model")],
        "grouped": store.note("grouped"),
        "nf4": store.note("nf4"),
        "peft": store.note("peft"),
        "errors": errors(store),
        "tests": store.note("tests"),
    }


def errors(store: Store) -> list[dict[str, str]]:
    """What was left out and why, each thing once."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in store.of("error"):
        found.setdefault((line["what"], line["reason"]), {name: line[name] for name in ("impl", "what", "reason")})
    return list(found.values())


def unavailable(store: Store) -> dict[str, str]:
    """The implementations without a single row, with the reason."""
    present = {line["row"]["impl"] for kind in ("row", "model") for line in store.of(kind)}
    missing, wrong = peers.unavailable(), errors(store)
    found = {}
    sets = tuple(impl for impl in GROUP_IMPLS if impl not in IMPLS) if store.header["scale"] == "cuda" else ()
    for impl in (*IMPLS, *sets):
        if impl in present:
            continue
        reasons = [error["reason"] for error in wrong if error["impl"] == impl]
        found[impl] = missing.get(impl) or (reasons[0] if reasons else "not reached by what was run so far")
    return found | (NO_LAYER if store.header["scale"] == "cuda" else {})


def markdown(store: Store, pictures: Mapping[str, str]) -> str:
    """Device, target table, every row, models, what was left out, pictures (title by file name)."""
    head, rates = store.header, store.note("ceilings")
    lines = [f"# Measured on {head['device']}", "", *facts(head, rates), ""]
    rows = [line["row"] for line in row_lines(store)]
    if head["scale"] == "cuda":
        lines += ["## Targets", "", target_text(rows), "", group_target_text(rows, store.note("grouped")), ""]
        lines += [nf4_targets_of(store), ""]
        over = bias_note(store)
        lines += [over, ""] if over else []
    lines += battery_lines(store)
    tests = store.note("tests")
    if tests:
        lines += ["## Tests on the device", "", f"`{tests['command']}`: {tests['result']}", ""]
    lines += [f"![{title}]({name})" for name, title in pictures.items()]
    return "\n".join(lines).rstrip() + "\n"


def battery_lines(store: Store) -> list[str]:
    """The tables of rows, models and omissions."""
    lines = []
    rows = row_lines(store)
    sets = grouped_text.set_lines(rows)
    if len(rows) > len(sets):
        lines += ["## Every layer", "", "over frozen: in the same rounds, the median of their ratios.", ""]
        lines += [table(layer_rows([line for line in rows if line not in sets])), ""]
    if sets:
        lines += ["## Layers with one input", "", f"{grouped_text.HEAD}", ""]
        lines += [table(grouped_text.over_table(sets)), "", table(grouped_text.set_rows(sets)), ""]
    depth = store.note("grouped")
    if depth:
        lines += ["## Launches and merging", "", *grouped_text.depth_lines(depth)]
    lines += _nf4_lines(rows, store.note("nf4"))
    if store.of("model"):
        lines += ["## Decoder layers", "", "Forward and backward, eager mode, every linear adapted.", ""]
        lines += [table(model_rows([line["row"] for line in store.of("model")])), ""]
    if store.note("peft"):
        lines += ["## PEFT before and after accelerate", "", peft_models_text.show(store.note("peft")), ""]
    missing, wrong = unavailable(store), errors(store)
    if missing or wrong:
        lines += ["## Unavailable", ""]
        lines += [f"- {impl}: {why}" for impl, why in missing.items()]
        lines += [f"- {error['what']}: {error['reason']}" for error in wrong if error["impl"] not in missing]
        lines += [""]
    return lines


def _nf4_lines(lines: Sequence[Mapping[str, Any]], parts: Mapping[str, Any] | None) -> list[str]:
    """What the rows on a 4-bit base come to, and what was measured beside them."""
    if not nf4_text.nf4_lines(lines) and not parts:
        return []
    found = ["## A 4-bit base", "", table(nf4_text.training_table(lines)), "", table(nf4_text.decode_table(lines)), ""]
    return [*found, *(nf4_text.part_lines(parts) if parts else [])]


def facts(head: Mapping[str, Any], rates: Mapping[str, float] | None) -> list[str]:
    """Device, versions and commit in one or two sentences."""
    packages = {name: value for name, value in (head.get("packages") or {}).items() if value}
    versions = ", ".join(
        f"{name} {value}" for name, value in {"torch": head["torch"], "triton": head["triton"]}.items()
    )
    versions += "".join(f", {name} {value}" for name, value in packages.items())
    driver = f", driver {head['driver']}" if head.get("driver") else ""
    text = f"{head['device']}{driver}; {versions}; {head['date']}, commit {head['commit']}."
    if rates:
        text += f" Ceilings: {rates['tflops']:.3g} TFLOP/s (a large product), {rates['gbps']:.4g} GB/s (a copy)."
    return [text]


def target_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The target table with a sentence on how to read it."""
    intro = (
        "H100, bf16, r = 16, M = 8192 where nothing else is said; an empty cell was not measured. The last column is "
        "our eager-mode time over that of eager PyTorch doing the same."
    )
    return f"{intro}\n\n{table(targets.table_rows(rows))}"


def group_target_text(rows: Sequence[Mapping[str, Any]], depth: Mapping[str, Any] | None) -> str:
    """The table of targets of sets of layers, launches and merging."""
    intro = "Layers with one input, launches and merging; bf16, M = 8192; launches as the profiler counts them."
    return f"{intro}\n\n{table(targets.group_rows(rows, depth))}"


def nf4_target_text(rows: Sequence[Mapping[str, Any]], gbps: float | None, parts: Mapping[str, Any] | None) -> str:
    """The table of targets of a 4-bit base; a row may carry its ratio of the same rounds as "over"."""
    intro = (
        "A 4-bit base: NF4 in blocks of 64, double quantization; bf16, r = 16. Of a copy's bandwidth: the bytes of the "
        "codes (dequantizing: all that is read and written) over the time; the worst of the shapes."
    )
    return f"{intro}\n\n{table(targets.nf4_rows(rows, gbps, parts))}"


def nf4_targets_of(store: Store) -> str:
    """The same of a store."""
    rows = [line["row"] | {"over": line["detail"].get("over_frozen")} for line in row_lines(store)]
    return nf4_target_text(rows, (store.note("ceilings") or {}).get("gbps"), store.note("nf4"))


def bias_note(store: Store) -> str | None:
    """The case with a bias over the seven frozen layers with a bias, where those were measured."""
    found = []
    for mode in ("graph", "eager"):
        above = _sum(store, targets.FULL, "ours", mode)
        below = _sum(store, "frozen", "eager", mode)
        if above and below:
            found.append(f"{above / below:.3f} ({mode})")
    if not found:
        return None
    return f"C = D = E = vector over the frozen layers with a bias of their own: {', '.join(found)}."


def _sum(store: Store, case: str, impl: str, mode: str) -> float | None:
    wanted = {"case": case, "impl": impl, "m": 8192, "mode": mode, "pass": "fwd_bwd"}
    lines = [
        line["row"]
        for line in store.of("row")
        if line["detail"]["bias"]
        and all(line["row"][name] == value for name, value in wanted.items())
        and line["row"]["r"] in (None, targets.RANK)
    ]
    r = targets.RANK if case != "frozen" else None
    return targets.seven(lines, case, impl, 8192, r, None if r is None else 0.0, mode)


def layer_rows(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows for people: shape, case, time, over frozen, rate, memory."""
    found = []
    for line in lines:
        row, more = line["row"], line["detail"]
        shown: dict[str, Any] = {"case": row["case"], "impl": row["impl"], "layer": row["layer"] or ""}
        shown |= {"M": row["m"], "N": row["n"], "K": row["k"], "r": row["r"], "p": _short(row["p"])}
        shown |= {"pass": row["pass"], "mode": row["mode"]}
        shown |= {name: _milliseconds(row[name]) for name in ("median_ms", "p20_ms", "p80_ms")}
        shown |= {"over frozen": more.get("over_frozen"), "of floor": f"{100 * more['of_floor']:.0f}%"}
        shown |= {"TFLOP/s": f"{more['tflops']:.3g}", "GB/s": f"{more['gbps']:.3g}", "saved bytes": row["saved_bytes"]}
        shown |= {"peak bytes": row["peak_bytes"], "launches": more.get("launches")}
        found.append(shown | {"host µs": f"{more['host_us']:.0f}", "error": f"{row['max_rel_err']:.1e}"})
    return found


def model_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The model rows for people."""
    base = {row["model"]: row["median_ms"] for row in rows if row["case"] == "frozen"}
    return [
        {
            **{name: row[name] for name in ("model", "case", "impl", "tokens")},
            "median_ms": _milliseconds(row["median_ms"]),
            "over frozen": row["median_ms"] / base[row["model"]] if row["model"] in base else None,
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "peak MiB": None if row["peak_bytes"] is None else round(row["peak_bytes"] / 2**20),
        }
        for row in rows
    ]


def _milliseconds(value: float) -> str:
    return f"{value:.4g}"


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"
