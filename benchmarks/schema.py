"""The result files: which fields, which types, which values; checked before anything is written.

`<slug>.json` holds exactly these fields and no others; whatever else was measured is in `<slug>_detail.json`. A CPU
keeps its rows inside `cpu.json`, in the same form.

A row is of one linear layer (op "linear") or of a set of layers that read one x (op "group"). Of a set, `case` is
"frozen:<set>" or "lora:<set>" with a set of `battery.SIBLINGS`, `impl` one of `battery.GROUP_IMPLS`, `layer` null and
`n` the sum of the layers' N.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.battery import GROUP_IMPLS, IMPLS, LLAMA, MODES, NO_LAYER, PASSES, SIBLINGS, Entry

FIELDS = ("device", "driver", "torch", "triton", "commit", "date", "ceilings", "unavailable", "rows", "models")
ROW_FIELDS = (
    "op", "case", "layer", "dtype", "m", "n", "k", "r", "p", "impl", "pass", "mode",
    "median_ms", "p20_ms", "p80_ms", "peak_bytes", "saved_bytes", "max_rel_err",
)  # fmt: skip
MODEL_FIELDS = ("model", "case", "impl", "tokens", "median_ms", "tokens_per_s", "peak_bytes")
_FORMS = {"A": ("lora", "vector", "constant", "none"), "C": ("lora", "vector", "none")}
_FORMS |= {"B": _FORMS["A"], "D": ("vector", "constant", "none"), "E": ("vector", "constant", "none")}


class SchemaError(ValueError):
    """A result that does not have the fields, types or values of the schema."""


def slug(device: str) -> str:
    """The name of a device's result file: "NVIDIA H100 80GB HBM3" gives "h100", "NVIDIA GeForce RTX 4090" "rtx4090"."""
    words = [
        w for w in re.split(r"[^a-z0-9]+", device.lower()) if w not in ("nvidia", "geforce", "amd", "instinct", "")
    ]
    if words and words[0] in ("rtx", "gtx", "tesla", "quadro") and len(words) > 1:
        words = [words[0] + words[1] if words[0] in ("rtx", "gtx") else words[1]]
    found = next((w for w in words if re.fullmatch(r"[a-z]+\d+[a-z]*", w)), None)
    return found or "-".join(words) or "device"


def is_case(name: str) -> bool:
    """Whether a name is one of frozen, lora, glora:<A>,<B>,<C>,<D>,<E>, perhaps with the prefix nf4-."""
    plain = name.removeprefix("nf4-")
    if plain in ("frozen", "lora"):
        return True
    forms = plain.removeprefix("glora:").split(",")
    return (
        plain.startswith("glora:")
        and len(forms) == 5
        and all(f in _FORMS[s] for s, f in zip("ABCDE", forms, strict=True))
    )


def is_set_case(name: str) -> bool:
    """Whether a name is one of frozen:<set>, lora:<set>."""
    kind, _, siblings = name.partition(":")
    return kind in ("frozen", "lora") and siblings in SIBLINGS


def check_report(report: Mapping[str, Any]) -> None:
    """Raise SchemaError unless `report` is a device's result file."""
    _fields("report", report, FIELDS)
    for name in ("device", "driver", "torch", "triton", "commit"):
        _expect(report[name] is None or _text(report[name]), f"{name} must be a text or null, got {report[name]!r}")
    _expect(_text(report["device"]), "device must be a text")
    try:
        datetime.datetime.fromisoformat(report["date"])
    except (TypeError, ValueError) as reason:
        raise SchemaError(f"date must be in ISO format, got {report['date']!r}") from reason
    _fields("ceilings", report["ceilings"], ("bf16_tflops", "copy_gbps"))
    for name, value in report["ceilings"].items():
        _expect(_positive(value), f"ceilings.{name} must be a positive number, got {value!r}")
    _expect(isinstance(report["unavailable"], dict), "unavailable must be an object")
    for impl, why in report["unavailable"].items():
        known = (*IMPLS, *GROUP_IMPLS, *NO_LAYER)
        _expect(impl in known, f"unavailable names {impl!r}, which is no impl ({', '.join(dict.fromkeys(known))})")
        _expect(_text(why), f"unavailable.{impl} must say why")
    _rows("rows", report["rows"], check_row, lambda row: [row[n] for n in ROW_FIELDS[:12]])
    _rows("models", report["models"], check_model, lambda row: [row[n] for n in MODEL_FIELDS[:4]])


def check_row(row: Mapping[str, Any]) -> None:
    """Raise SchemaError unless `row` is the row of a linear layer, or of a set of them."""
    _fields("row", row, ROW_FIELDS)
    _expect(row["op"] in ("linear", "group"), f"op must be 'linear' or 'group', got {row['op']!r}")
    is_set = row["op"] == "group"
    named = _text(row["case"]) and (is_set_case if is_set else is_case)(row["case"])
    _expect(named, f"case {row['case']!r} is none of the schema's")
    impls = GROUP_IMPLS if is_set else IMPLS
    _expect(row["impl"] in impls, f"impl {row['impl']!r} is none of {', '.join(impls)}")
    _expect(row["pass"] in PASSES, f"pass {row['pass']!r} is none of {', '.join(PASSES)}")
    _expect(row["mode"] in MODES, f"mode {row['mode']!r} is none of {', '.join(MODES)}")
    _expect(row["dtype"] in ("bf16", "fp16", "fp32"), f"dtype {row['dtype']!r} is unknown")
    for name in ("m", "n", "k"):
        _expect(_whole(row[name]) and row[name] > 0, f"{name} must be a positive integer, got {row[name]!r}")
    layer = row["layer"]
    _expect(layer is None or not is_set, f"a set has no layer, got {layer!r}")
    _expect(layer is None or LLAMA.get(layer) == (row["n"], row["k"]), f"layer {layer!r} has not this shape")
    if row["case"].removeprefix("nf4-").partition(":")[0] == "frozen":
        _expect(row["r"] is None and row["p"] is None, "a frozen row has no r and no p")
    else:
        _expect(_whole(row["r"]) and row["r"] > 0, f"r must be a positive integer, got {row['r']!r}")
        _expect(_number(row["p"]) and 0 <= row["p"] < 1, f"p must be in [0, 1), got {row['p']!r}")
    _expect(row["case"] != "frozen" or row["impl"] == "eager", "a frozen row has impl 'eager'")
    for name in ("median_ms", "p20_ms", "p80_ms"):
        _expect(_positive(row[name]), f"{name} must be a positive number, got {row[name]!r}")
    _expect(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"], "p20 <= median <= p80 must hold")
    for name in ("peak_bytes", "saved_bytes"):
        value = row[name]
        _expect(value is None or (_whole(value) and value >= 0), f"{name} must be an integer or null, got {value!r}")
    error = row["max_rel_err"]
    _expect(_number(error) and 0 <= error < 1, f"max_rel_err must be in [0, 1), got {error!r}")


def check_model(row: Mapping[str, Any]) -> None:
    """Raise SchemaError unless `row` is a model's row."""
    _fields("model row", row, MODEL_FIELDS)
    _expect(_text(row["model"]), "model must be a text")
    _expect(_text(row["case"]) and is_case(row["case"]), f"case {row['case']!r} is none of the schema's")
    _expect(row["impl"] in IMPLS, f"impl {row['impl']!r} is none of {', '.join(IMPLS)}")
    _expect(_whole(row["tokens"]) and row["tokens"] > 0, "tokens must be a positive integer")
    for name in ("median_ms", "tokens_per_s"):
        _expect(_positive(row[name]), f"{name} must be a positive number, got {row[name]!r}")
    peak = row["peak_bytes"]
    _expect(peak is None or (_whole(peak) and peak >= 0), "peak_bytes must be an integer or null")


def make_row(entry: Entry, direction: str, mode: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row from an entry and its figures (median_ms ... max_rel_err)."""
    row: dict[str, Any] = {"op": entry.op, "case": entry.case, "layer": entry.layer, "dtype": entry.dtype}
    row |= {"m": entry.m, "n": entry.n, "k": entry.k, "r": entry.r, "p": entry.p, "impl": entry.impl}
    row |= {"pass": direction, "mode": mode}
    row |= {name: figures[name] for name in ROW_FIELDS[12:]}
    check_row(row)
    return row


def write(path: Path, value: Any) -> None:
    """Write JSON beside the file and rename it: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def _rows(name: str, rows: Any, check: Callable[[Mapping[str, Any]], None], key: Callable[[Any], list[Any]]) -> None:
    _expect(isinstance(rows, list), f"{name} must be a list")
    seen = set()
    for i, row in enumerate(rows):
        try:
            check(row)
        except SchemaError as reason:
            raise SchemaError(f"{name}[{i}]: {reason}") from None
        this = tuple(key(row))
        _expect(this not in seen, f"{name}[{i}] stands there twice: {this}")
        seen.add(this)


def _fields(name: str, value: Any, fields: tuple[str, ...]) -> None:
    _expect(isinstance(value, dict), f"{name} must be an object")
    missing, extra = [f for f in fields if f not in value], [f for f in value if f not in fields]
    _expect(not missing, f"{name} lacks {', '.join(missing)}")
    _expect(not extra, f"{name} has fields the schema does not know: {', '.join(map(str, extra))}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise SchemaError(message)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < float("inf")
