"""What was measured as one value, from a store's lines to files and back.

A CPU's `cpu.json` and a card's `<slug>_detail.json` hold everything: "header", "notes" by name, "rows" and "models"
(each line with its "stage", its "row" by the schema, and "detail"), "errors". A card's `<slug>.json` is what the schema
has of it. Tables, pictures and README.md are made of this and of nothing else.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers, schema
from benchmarks.cases import FROZEN, GROUP_IMPLS, IMPLS, LLAMA, NO_LAYER, Entry, with_twins
from benchmarks.devices import Spread
from benchmarks.schema import ROW_KEY
from benchmarks.store import Store

Found = dict[str, Any]
Line = Mapping[str, Any]
Which = tuple[str, str, int, int | None, float | None, str]
"""case, impl, M, r, p, and "llama" for the seven linears or the shape of one."""


def of_store(store: Store) -> Found:
    """Everything that a store has; an error once, however many rows it cost."""
    errors = {(line["what"], line["reason"]): line for line in reversed(store.of("error"))}
    found = {
        "header": store.header,
        "notes": store.notes(),
        "rows": [_without(line, "kind") for line in store.of("row")],
        "models": [_without(line, "kind") for line in store.of("model")],
        "errors": [_without(line, "kind", "key") for line in reversed(errors.values())],
    }
    return {**found, "unavailable": unavailable(found)}


def _without(line: Line, *names: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}


def by_schema(found: Found) -> dict[str, Any]:
    """The result file of a device, checked against the schema.

    A row does not say whether the layer has a bias: of a frozen layer that was timed both ways it is the one without.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in sorted(found["rows"], key=lambda line: bool(line["detail"].get("bias"))):
        rows.setdefault(tuple(line["row"][name] for name in ROW_KEY), line["row"])
    order = {id(line["row"]): i for i, line in enumerate(found["rows"])}
    rates = found["notes"].get("ceilings", {})
    report = {name: found["header"].get(name) for name in ("device", "driver", "torch", "triton", "commit", "date")}
    report["ceilings"] = {"bf16_tflops": rates.get("tflops"), "copy_gbps": rates.get("gbps")}
    report["unavailable"] = found["unavailable"]
    report["rows"] = sorted(rows.values(), key=lambda row: order[id(row)])
    report["models"] = [line["row"] for line in found["models"]]
    schema.check_report(report)
    return report


def unavailable(found: Found) -> dict[str, str]:
    """The implementations without a single row, with the reason, on the machine that measured."""
    present = {line["row"]["impl"] for line in (*found["rows"], *found["models"])}
    missing, why = peers.unavailable(), {}
    on_card = found["header"].get("scale") == "cuda"
    for impl in dict.fromkeys((*IMPLS, *(GROUP_IMPLS if on_card else ()))):
        if impl not in present:
            reasons = [error["reason"] for error in found["errors"] if error["impl"] == impl]
            why[impl] = missing.get(impl) or next(iter(reasons), "not reached by what was run so far")
    return why | (NO_LAYER if on_card else {})


def merged(old: Found, new: Found) -> Found:
    """An earlier run with the stages that were measured again; its header stands while anything of it does.

    Of the ceilings the higher ones count: a machine that others use as well does not always reach them.
    """
    again = {line["stage"] for line in (*new["rows"], *new["models"])}

    def kept(name: str) -> list[dict[str, Any]]:
        return [*(line for line in old[name] if line["stage"] not in again), *new[name]]

    errors = {(error["what"], error["reason"]): error for error in (*old["errors"], *new["errors"])}
    rows, models = kept("rows"), kept("models")
    head = old if len(rows) + len(models) > len(new["rows"]) + len(new["models"]) else new
    before = old["notes"]["ceilings"]
    rates = before | {name: max(rate, before.get(name, rate)) for name, rate in new["notes"]["ceilings"].items()}
    notes = {**old["notes"], **new["notes"], "ceilings": rates}
    present = {line["row"]["impl"] for line in (*rows, *models)}
    missing = {impl: why for impl, why in {**old["unavailable"], **new["unavailable"]}.items() if impl not in present}
    found = {"notes": notes, "rows": rows, "models": models, "errors": list(errors.values()), "unavailable": missing}
    return {**head, **found}


def put_aside(path: Path, header: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Rename a file, to "<name>.old", whose header has other values of these names; whether it was, which is said."""
    old = json.loads(path.read_text()) if path.exists() else {}
    old = old.get("header", old)
    differs = [name for name in names if name in old and old[name] != header.get(name)]
    if differs:
        beside = path.replace(path.with_name(f"{path.name}.old"))
        print(f"{path.name} has figures of another {', '.join(differs)}; the old is {beside.name}", flush=True)
    return bool(differs)


def write(path: Path, text: str) -> None:
    """Write beside the file and rename: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def put_out(text: str, path: Path | None) -> None:
    """Print a text, and write it to a file where one is given, whose folder need not exist."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text)
    print(f"\n{text}")


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Found]:
    """Every device's results in a folder, by slug: the CPU's, then those of the cards."""
    found = {}
    if (folder / "cpu.json").exists():
        found["cpu"] = json.loads((folder / "cpu.json").read_text())
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if isinstance(report, dict) and set(report) == set(schema.REPORT):
            detail = path.with_name(f"{path.stem}_detail.json")
            found[path.stem] = json.loads(detail.read_text()) if detail.exists() else of_report(report)
    return found


def of_report(report: Mapping[str, Any]) -> Found:
    """What a result file alone tells."""
    rates = {"tflops": report["ceilings"]["bf16_tflops"], "gbps": report["ceilings"]["copy_gbps"]}
    lines = {name: [{"stage": "", "row": row, "detail": {}} for row in report[name]] for name in ("rows", "models")}
    return {"header": {**report, "scale": "cuda"}, "notes": {"ceilings": rates}, "errors": [], **lines,
            "unavailable": report["unavailable"]}  # fmt: skip


def entry_of(line: Line) -> Entry:
    """The entry that a line is of; of a set only what the floor asks for."""
    row = line["row"]
    names = ("case", "impl", "m", "n", "k", "r", "p", "layer", "dtype")
    found: dict[str, Any] = {name: row[name] for name in names}
    if row["op"] == "group":
        found["widths"] = (0,) * (3 if row["case"].endswith("qkv") else 2)
    return Entry(**found, bias=bool(line["detail"].get("bias")), decode=bool(line["detail"].get("decode")))


def select(lines: Iterable[Line], **wanted: Any) -> list[Line]:
    """The lines whose rows have these values; "pass" is given as `direction`."""
    if "direction" in wanted:
        wanted["pass"] = wanted.pop("direction")
    return [line for line in lines if all(line["row"][name] == value for name, value in wanted.items())]


def best_mode(lines: Iterable[Line]) -> str:
    """Graph replays where there are any, else eager calls."""
    return "graph" if any(line["row"]["mode"] == "graph" for line in lines) else "eager"


def over_frozen(lines: Sequence[Line]) -> dict[Which, Spread]:
    """The time over the dense frozen layer's in the same rounds, of lines of one pass and mode.

    On LLaMA-3-8B rows over the seven linears, for which one of every size is needed: the ratio of each stands for that
    times its frozen layer, since its rows may come from stages far apart; the p20 and p80 of such a sum are its median.
    """
    base = {_place(line): line["row"]["median_ms"] for line in lines if entry_of(line).reference}
    found: dict[Which, Spread] = {}
    parts: dict[Which, dict[str, tuple[float, float]]] = defaultdict(dict)
    for line in lines:
        row, more, below = line["row"], line["detail"], base.get(_place(line))
        if below is None or (row["layer"] and row["case"] == FROZEN and more.get("bias")):
            continue
        where = "llama" if row["layer"] else f"{row['n']}x{row['k']}"
        which = (row["case"], row["impl"], row["m"], row["r"], row["p"], where)
        ratio = more.get("over_frozen", row["median_ms"] / below)
        if row["layer"] is None:
            found[which] = Spread(ratio, more.get("over_frozen_p20", ratio), more.get("over_frozen_p80", ratio))
        else:
            parts[which][row["layer"]] = (ratio * below, below)
    for which, known in parts.items():
        members = with_twins(known)
        if set(members) == set(LLAMA):
            ratio = sum(above for above, _ in members.values()) / sum(below for _, below in members.values())
            found[which] = Spread(ratio, ratio, ratio)
    return found


def _place(line: Line) -> tuple[Any, ...]:
    return tuple(line["row"][name] for name in ("op", "layer", "dtype", "m", "n", "k", "pass", "mode"))
