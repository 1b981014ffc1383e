"""Which configuration, route and 4-bit kernels a call gets: measured ones where a table has a row near the shape.

A table is one JSON file a device, made by `python -m glora_kernels tune`. The user's own is looked at first
(`environment.tables_directory`), then the one shipped for the device (runtime/shipped), then the default: of
`configs.default`, of the cost model, or of `NAMED`. Files are read once a process, at the first launch on their
architecture; after that a choice is one look-up in a dictionary.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glora_kernels.runtime import configs, cost, environment
from glora_kernels.runtime.configs import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEQUANTIZE, SMALL_M = "4-bit dequantize", "4-bit small_m"
ROUTES: tuple[str, ...] = ("fused", "library")
NAMED: dict[str, tuple[str, ...]] = {
    "route fwd": ROUTES, "route fwd scaled": ROUTES, "route dx": ROUTES, "route dx scaled": ROUTES,
    DEQUANTIZE: ("cuda", "triton"), SMALL_M: ("cuda", "triton", "workspace"),
}  # fmt: skip
"""What is chosen by name, beside the configurations of `configs.TUNED`.

The routes of a pass (scaled: A is a vector or constant); and what serves a 4-bit weight, csrc's kernel, Triton's, or
for a few tokens a dense workspace and the product that a dense weight has. M and R of a dequantization are 0.
"""
SHIPPED = Path(__file__).parent / "shipped"

NEAR = 2.0
"""A row serves sizes up to this factor from its own, in each of M, N and K."""


class Row(NamedTuple):
    """What was measured to be the best at a shape: a configuration of a kernel, or a name of `NAMED`.

    ms: the times, of a configuration "default" and "chosen", else by name; the first is what it is compared with. A
    route is a whole pass, "4-bit small_m" a whole forward. What was not there or did not serve has no time.
    """

    what: str
    dtype: str
    shape: Shape
    choice: Any
    ms: dict[str, float]

    @property
    def times(self) -> tuple[float, float]:
        """(what it is compared with, the choice) in milliseconds."""
        return next(iter(self.ms.values())), self.ms[self.choice if self.what in NAMED else "chosen"]

    def among(self, names: Iterable[str] | None) -> Any:
        """The choice, or where that is none of the names the fastest of those that were measured, or None."""
        times = {name: ms for name, ms in self.ms.items() if names is None or name in names}
        return self.choice if names is None or self.choice in times else min(times, key=times.__getitem__, default=None)


@dataclass(frozen=True)
class Table:
    """What was measured on one device, with what it was measured by."""

    device: str
    arch: str
    torch: str
    triton: str
    date: str
    rows: tuple[Row, ...] = ()


class Source(NamedTuple):
    """A table in use, and what to call it."""

    label: str
    table: Table


class _State:
    """What `using` and `watching` set."""

    table: Table | None = None
    forced: Mapping[str, Any] = {}
    only: bool = False
    version: int = 0
    watcher: Callable[[str, Shape, Any, str], None] | None = None


_warned: set[str] = set()
_REMEDY = "Remove the file, or measure a new one: python -m glora_kernels tune --again"


@functools.lru_cache(maxsize=8192)
def explain(
    what: str,
    arch: str,
    dtype: torch.dtype,
    shape: Shape,
    weight_dtype: torch.dtype | None = None,
    among: tuple[str, ...] | None = None,
) -> tuple[Any, str]:
    """What `choose` returns, and where it comes from: "forced", a table, "cost model" or a default."""
    if weight_dtype in (None, dtype):
        if what in _State.forced:
            return _State.forced[what], "forced"
        names = None if among is None else (*among, "workspace")
        for label, table in sources(arch):
            row = nearest((row for row in table.rows if row.what == what and DTYPES[row.dtype] == dtype), shape)
            if row is not None and (choice := row.among(names)) is not None:
                return choice, label
    if what in (DEQUANTIZE, SMALL_M):
        assert among, "whose kernels there are decides"
        return "workspace" if what == SMALL_M and shape.m > cost.FEW_TOKENS else among[0], "default"
    if what in NAMED:
        if weight_dtype not in (None, dtype) or arch not in cost.CARDS:
            return "fused", "default of an unknown card"
        backward, scales = what.startswith("route dx"), what.endswith("scaled")
        predicted = cost.predict(arch, dtype, shape, backward=backward, scales=scales)
        return min(predicted, key=predicted.__getitem__), "cost model"
    if what in configs.KERNELS:  # csrc has one code for all that it runs on
        _warn_of(arch)
    return configs.default(what, arch, dtype, shape, weight_dtype), "default"


def choose(
    what: str,
    arch: str,
    dtype: torch.dtype,
    shape: Shape,
    weight_dtype: torch.dtype | None = None,
    among: tuple[str, ...] | None = None,
) -> Any:
    """The configuration of a kernel of `configs.KERNELS` or `CSRC`, or a name of `NAMED`; shared: do not change it.

    Args:
        what: the kernel, or a key of `NAMED`.
        arch: of the card.
        dtype: of x, or of the dense weight.
        shape: of the call.
        weight_dtype: of W where that may be another: wider than x, it needs other blocks than were measured.
        among: whose kernels can serve a 4-bit weight here, that to take unmeasured first.

    Warns:
        UserWarning: once an architecture, where there are neither tables nor configurations made for it.
    """
    choice, source = explain(what, arch, dtype, shape, weight_dtype, among)
    if _State.watcher is not None:
        _State.watcher(what, shape, choice, source)
    return choice


@contextlib.contextmanager
def watching(tell: Callable[[str, Shape, Any, str], None]) -> Iterator[None]:
    """Inside, `tell` gets what is chosen, at which shape, the choice, and where it comes from. Not nested."""
    _State.watcher = tell
    try:
        yield
    finally:
        _State.watcher = None


def _warn_of(arch: str) -> None:
    if arch in configs.PROGRAMS or arch in _warned or _State.only or sources(arch):
        return
    _warned.add(arch)
    warnings.warn(
        f"glora_kernels has no launch configurations made for {arch!r}: its kernels run with conservative ones, "
        "which are right but may be slow. `python -m glora_kernels tune` measures better ones on this machine",
        UserWarning,
        stacklevel=4,
    )


def nearest(rows: Iterable[Row], shape: Shape) -> Row | None:
    """The row of the smallest distance, the logarithms of the sizes' ratios, or None where none is near enough.

    M, N and K may differ by a factor of `NEAR`. A rank must fill the same padded one, since the blocks that hold it
    are a part of what was measured to fit the card.
    """
    near = [row for row in rows if _is_near(row.shape, shape)]
    return min(near, key=lambda row: math.dist(_logs(row.shape), _logs(shape)), default=None)


def _is_near(one: Shape, other: Shape) -> bool:
    ranks = [configs.block_r(rank) if rank else 0 for rank in (one.r, other.r)]
    return ranks[0] == ranks[1] and all(max(a, b) <= NEAR * min(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def _logs(shape: Shape) -> list[float]:
    return [math.log(max(1, size)) for size in shape]


def sources(arch: str) -> tuple[Source, ...]:
    """The tables that serve an architecture, the first to be asked first. Never any in the interpreter.

    With a GPU of that architecture here, the user's for it and the shipped one for it; without (a launch planned for
    another card), the shipped ones of the architecture.

    Raises:
        ValueError: a file that is no table; the message names it and the field.
    """
    if arch == "cpu":
        return ()
    if _State.only:
        table = _State.table
        return (Source("given table", table),) if table is not None and table.arch == arch else ()
    return _loaded(arch)


@functools.cache
def _loaded(arch: str) -> tuple[Source, ...]:
    found = [Source(label, read(path)) for label, path in files(arch)]
    return tuple(source for source in found if source.table.arch == arch)


def files(arch: str) -> list[tuple[str, Path]]:
    """The files that `sources` reads, and what to call them."""
    device = environment.device_of(arch)
    if device is None:
        paths = [(f"shipped table {path.name}", path) for path in sorted(SHIPPED.glob("*.json"))]
    else:
        name = f"{environment.slug(device)}.json"
        user = environment.tables_directory() / name
        paths = [(f"your table {user}", user), (f"shipped table {name}", SHIPPED / name)]
    return [(label, path) for label, path in paths if os.path.isfile(path)]


def version() -> int:
    """Another number whenever another table may be in force."""
    return _State.version


def reload() -> None:
    """Forget what was read: the next launch reads the files again."""
    _State.version += 1
    explain.cache_clear()
    _loaded.cache_clear()


@contextlib.contextmanager
def using(table: Table | None, forced: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inside, choices come from `forced`, by what is chosen, and from this table alone (None: from none).

    For the whole process. `tune` measures with it.
    """
    before = _State.table, _State.forced, _State.only
    _State.table, _State.forced, _State.only = table, forced or {}, True
    reload()
    try:
        yield
    finally:
        _State.table, _State.forced, _State.only = before
        reload()


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: what is there is no table; the message names the file and the field.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}. {_REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{error}. {_REMEDY}") from error


def write(table: Table, path: Path) -> None:
    """Put the table in a file, whole or not at all: written beside its place, and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(to_json(table), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def to_json(table: Table) -> dict[str, Any]:
    """The inverse of `parse`: a row is an object with m, n, k and r in the place of its shape."""
    rows = [
        {"what": row.what, "dtype": row.dtype, **row.shape._asdict(), "choice": row.choice, "ms": row.ms}
        for row in table.rows
    ]
    return {**vars(table), "rows": rows}


class Field(NamedTuple):
    """What a value of a table must be, in words, and whether it is."""

    words: str
    holds: Callable[[Any], bool]


def _one_of(names: Iterable[str]) -> Field:
    known = tuple(names)
    return Field(f"one of {', '.join(map(repr, known))}", lambda value: isinstance(value, str) and value in known)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _power(low: int, high: int) -> Field:
    return Field(
        f"a power of two from {low} to {high}",
        lambda value: _is_integer(value) and low <= value <= high and not value & (value - 1),
    )


_TEXT = Field("a string", lambda value: isinstance(value, str))
_OBJECT = Field("an object", lambda value: isinstance(value, dict))
_FLAG = Field("true or false", lambda value: isinstance(value, bool))
_SIZE = Field("an integer >= 0", lambda value: _is_integer(value) and value >= 0)
_TIME = Field("a time in milliseconds > 0", lambda v: (_is_integer(v) or isinstance(v, float)) and 0 < v < math.inf)
_HEAD = {
    **dict.fromkeys(("device", "arch", "torch", "triton", "date"), _TEXT),
    "rows": Field("a list", lambda value: isinstance(value, list)),
}
_ROW = {
    "what": _one_of((*configs.TUNED, *NAMED)), "dtype": _one_of(DTYPES), **dict.fromkeys(Shape._fields, _SIZE),
    "choice": Field("an object or a name", lambda value: isinstance(value, (dict, str))), "ms": _OBJECT,
}  # fmt: skip
_TOKENS = {
    DEQUANTIZE: Field("0 of a dequantization", lambda m: m == 0),
    SMALL_M: Field("from 1 to 64 of few tokens", lambda m: 1 <= m <= 64),
}
_BLOCK = _power(16, 512)
_CONFIG = {
    "num_warps": _power(1, 16), "parts": _power(1, 4), "tma": _FLAG, "persistent": _FLAG,
    "num_stages": Field("an integer from 1 to 8", lambda value: _is_integer(value) and 1 <= value <= 8),
}  # fmt: skip
"""Of a configuration; what else there is in one is a block."""


def _renewed(values: object) -> object:
    """A table of before rows were alike, as one of today: its lists were "configs", "routes" and "four_bit"."""
    if not isinstance(values, dict) or "configs" not in values:
        return values
    rows = [
        _changed(row, what=row["kernel"], choice=row["config"], ms={"default": row["default_ms"], "chosen": row["ms"]})
        for row in values["configs"]
    ]
    for row in values.get("routes", []):
        what = f"route {row['pass']}{' scaled' * row['scales']}"
        rows.append(_changed(row, what=what, choice=row["route"], ms={name: row[f"{name}_ms"] for name in ROUTES}))
    for row in values.get("four_bit", []):
        times = {name: row[f"{name}_ms"] for name in NAMED[SMALL_M] if row[f"{name}_ms"] is not None}
        rows.append(_changed(row, what=f"4-bit {row['operation']}", choice=row["choice"], ms=times))
    return {name: values[name] for name in _HEAD if name in values} | {"rows": rows}


def _changed(row: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    return {name: row[name] for name in ("dtype", *Shape._fields)} | fields


def parse(values: object, where: str) -> Table:
    """A table of plain JSON values, every field checked; also one of the older format.

    Raises:
        ValueError: a field that is missing, unknown or out of range; the message begins with `where` and names it.
    """
    try:
        values = _renewed(values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: a row of the older format is not whole: {error!r}") from error
    head = _checked(values, where, _HEAD)
    rows = [_row(row, f"{where}: rows[{i}]", head["arch"]) for i, row in enumerate(head["rows"])]
    return Table(**head | {"rows": tuple(rows)})


def _row(values: object, where: str, arch: str) -> Row:
    fields = _checked(values, where, _ROW)
    what, shape, choice = fields["what"], Shape(*(fields[name] for name in Shape._fields)), fields["choice"]
    if what in NAMED:
        _check(shape.m, f"{where}: m", _TOKENS.get(what, _SIZE))
        _check(choice, f"{where}: choice", _one_of(NAMED[what]))
        times = dict.fromkeys((choice, *(name for name in NAMED[what] if name in fields["ms"])), _TIME)
    else:
        _check(choice, f"{where}: choice", _OBJECT)
        if reason := fault(what, arch, DTYPES[fields["dtype"]], shape, choice):
            raise ValueError(f"{where}: choice: {reason}")
        times = dict.fromkeys(("default", "chosen"), _TIME)
    ms = _checked(fields["ms"], f"{where}: ms", times)
    return Row(what, fields["dtype"], shape, choice, {name: float(value) for name, value in ms.items()})


def fault(kernel: str, arch: str, dtype: torch.dtype, shape: Shape, config: Mapping[str, Any]) -> str | None:
    """What is wrong with a configuration: "field ...", or None where it can be launched."""
    fields = {name: _CONFIG.get(name, _BLOCK) for name in configs.default(kernel, arch, dtype, shape)}
    try:
        _checked(config, "", fields)
    except ValueError as error:
        return str(error).removeprefix(": ")
    if config["cols"] // config.get("parts", 1) < 16:
        return f"parts must leave at least 16 of the {config['cols']} columns to each, got {config['parts']}"
    return None


def _checked(values: object, where: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    """An object with these fields and no other."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object with {list(fields)}, got {type(values).__name__}")
    if unknown := [name for name in values if name not in fields]:
        raise ValueError(f"{where}: {unknown[0]} is no field of it; those are {list(fields)}")
    if missing := [name for name in fields if name not in values]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    for name, field in fields.items():
        _check(values[name], f"{where}: {name}", field)
    return values


def _check(value: object, where: str, field: Field) -> None:
    if not field.holds(value):
        raise ValueError(f"{where} must be {field.words}, got {value!r}")
