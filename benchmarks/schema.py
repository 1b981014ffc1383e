"""The result files: which fields, which types, which values; checked before anything is written.

`<slug>.json` of a card holds exactly these fields and no others; whatever else was measured is in
`<slug>_detail.json`. A row is of one linear layer (op "linear") or of a set of layers that read one x (op "group"). Of
a set, `case` is "frozen:<set>" or "lora:<set>" with a set of `cases.SIBLINGS`, `impl` one of `cases.GROUP_IMPLS`,
`layer` null and `n` the sum of the layers' N.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.cases import GROUP_IMPLS, IMPLS, LLAMA, MODES, NO_LAYER, PASSES, SIBLINGS, Entry

Check = Callable[[Any], bool]
SUPPORT_FORMS = {"A": "lora|vector|constant|none", "B": "lora|vector|constant|none", "C": "lora|vector|none",
                 "D": "vector|constant|none", "E": "vector|constant|none"}  # fmt: skip
CASE = re.compile(rf"(nf4-)?(frozen|lora|glora:{','.join(f'({forms})' for forms in SUPPORT_FORMS.values())})")
SET_CASE = re.compile(f"(frozen|lora):({'|'.join(SIBLINGS)})")


class SchemaError(ValueError):
    """A result that does not have the fields, types or values of the schema."""


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _date(value: Any) -> bool:
    try:
        return bool(datetime.datetime.fromisoformat(value))
    except (TypeError, ValueError):
        return False


def _one_of(names: Iterable[str]) -> tuple[str, Check]:
    listed = tuple(names)
    return f"one of {', '.join(listed)}", lambda value: value in listed


def _or_null(rule: tuple[str, Check]) -> tuple[str, Check]:
    return f"{rule[0]} or null", lambda value: value is None or rule[1](value)


TEXT, WHOLE, POSITIVE = ("a text", _text), ("a whole number, 0 or more", _whole), ("a positive number", _positive)
COUNT: tuple[str, Check] = ("a positive whole number", lambda value: _whole(value) and value > 0)
RATIO: tuple[str, Check] = ("a number from 0 to below 1", lambda value: _number(value) and 0 <= value < 1)
ROW: dict[str, tuple[str, Check]] = {
    "op": _one_of(("linear", "group")),
    "case": TEXT,
    "layer": _or_null(_one_of(LLAMA)),
    "dtype": _one_of(("bf16", "fp16", "fp32")),
    **dict.fromkeys(("m", "n", "k"), COUNT),
    "r": _or_null(COUNT),
    "p": _or_null(RATIO),
    "impl": TEXT,
    "pass": _one_of(PASSES),
    "mode": _one_of(MODES),
    **dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), POSITIVE),
    **dict.fromkeys(("peak_bytes", "saved_bytes"), _or_null(WHOLE)),
    "max_rel_err": RATIO,
}
ROW_KEY = tuple(ROW)[:12]
"""The fields that say which row it is; the others are its figures."""
MODEL: dict[str, tuple[str, Check]] = {
    "model": TEXT,
    "case": ("a case", lambda value: _text(value) and bool(CASE.fullmatch(value))),
    "impl": _one_of(IMPLS),
    "tokens": COUNT,
    **dict.fromkeys(("median_ms", "tokens_per_s"), POSITIVE),
    "peak_bytes": _or_null(WHOLE),
}
REPORT: dict[str, tuple[str, Check]] = {
    "device": TEXT,
    **dict.fromkeys(("driver", "torch", "triton", "commit"), _or_null(TEXT)),
    "date": ("a date in ISO format", _date),
    **dict.fromkeys(("ceilings", "unavailable"), ("an object", lambda value: isinstance(value, dict))),
    **dict.fromkeys(("rows", "models"), ("a list", lambda value: isinstance(value, list))),
}


def slug(device: str) -> str:
    """The name of a device's result file: "NVIDIA H100 80GB HBM3" gives "h100", "NVIDIA GeForce RTX 4090" "rtx4090"."""
    makers = ("nvidia", "geforce", "amd", "instinct", "")
    words = [word for word in re.split(r"[^a-z0-9]+", device.lower()) if word not in makers]
    if words and words[0] in ("rtx", "gtx", "tesla", "quadro") and len(words) > 1:
        words = [words[0] + words[1] if words[0] in ("rtx", "gtx") else words[1]]
    found = next((word for word in words if re.fullmatch(r"[a-z]+\d+[a-z]*", word)), None)
    return found or "-".join(words) or "device"


def check_report(report: Mapping[str, Any]) -> None:
    """Raise SchemaError unless `report` is a card's result file."""
    _check("report", report, REPORT)
    _check("ceilings", report["ceilings"], {"bf16_tflops": POSITIVE, "copy_gbps": POSITIVE})
    known = dict.fromkeys((*IMPLS, *GROUP_IMPLS, *NO_LAYER), ("a text that says why", _text))
    _check("unavailable", report["unavailable"], known, all_of_them=False)
    for name, check, fields in (("rows", check_row, ROW_KEY), ("models", check_model, tuple(MODEL)[:4])):
        seen = set()
        for i, row in enumerate(report[name]):
            check(row, f"{name}[{i}]")
            key = tuple(row[field] for field in fields)
            _expect(key not in seen, f"{name}[{i}] stands there twice: {key}")
            seen.add(key)


def check_row(row: Mapping[str, Any], what: str = "row") -> None:
    """Raise SchemaError unless `row` is the row of a linear layer, or of a set of them."""
    _check(what, row, ROW)
    is_set = row["op"] == "group"
    named = (SET_CASE if is_set else CASE).fullmatch(row["case"])
    _expect(named is not None, f"{what}: case {row['case']!r} is none of the schema's")
    impls = GROUP_IMPLS if is_set else IMPLS
    _expect(row["impl"] in impls, f"{what}: impl {row['impl']!r} is none of {', '.join(impls)}")
    layer, shape = row["layer"], (row["n"], row["k"])
    fits = layer is None or (not is_set and LLAMA[layer] == shape)
    _expect(fits, f"{what}: layer {layer!r} has not this shape, or it is of a set")
    if row["case"].removeprefix("nf4-").partition(":")[0] == "frozen":
        _expect(row["r"] is None and row["p"] is None, f"{what}: a frozen row has no r and no p")
    else:
        _expect(row["r"] is not None and row["p"] is not None, f"{what}: r must be given, and p")
    _expect(row["case"] != "frozen" or row["impl"] == "eager", f"{what}: a frozen row has impl 'eager'")
    _expect(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"], f"{what}: p20 <= median <= p80 must hold")


def check_model(row: Mapping[str, Any], what: str = "model row") -> None:
    """Raise SchemaError unless `row` is a model's row."""
    _check(what, row, MODEL)


def make_row(entry: Entry, direction: str, mode: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A row from an entry and its figures (median_ms ... max_rel_err)."""
    known = {"pass": direction, "mode": mode, **figures}
    row = {name: known[name] if name in known else getattr(entry, name) for name in ROW}
    check_row(row)
    return row


def _check(what: str, value: Any, rules: Mapping[str, tuple[str, Check]], all_of_them: bool = True) -> None:
    """Exactly these fields, each with a value that its rule accepts."""
    _expect(isinstance(value, dict), f"{what} must be an object")
    missing, extra = [name for name in rules if name not in value], [name for name in value if name not in rules]
    _expect(not (missing and all_of_them), f"{what} lacks {', '.join(missing)}")
    _expect(not extra, f"{what} has fields the schema does not know: {', '.join(map(str, extra))}")
    for name, given in value.items():
        accepted, check = rules[name]
        _expect(check(given), f"{what}: {name} must be {accepted}, got {given!r}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise SchemaError(message)
