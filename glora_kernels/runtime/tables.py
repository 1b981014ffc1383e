"""Chooses configurations, routes and 4-bit kernels: measured ones where a table has a row near the shape.

A table is one JSON file per device, made by `python -m glora_kernels tune`. The user's own table comes first
(`environment.tables_directory`), then the one shipped for the device (runtime/shipped), then a default:
`configs.default`, the cost model, or a fixed name. Files are read once per process, at the first launch on their
architecture; after that a choice is one dictionary look-up.
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
"""The choices that are a name, not a configuration, with the names that are accepted.

The route of a pass (scaled: A is a vector or constant); and the kernels of a 4-bit weight: csrc's, Triton's, or for a
few tokens "workspace": dequantize W, then multiply as with a dense weight. M and R of a dequantization are 0.
"""
SHIPPED = Path(__file__).parent / "shipped"

NEAR = 2.0
"""A row serves shapes whose M, N and K each differ from its own by at most this factor."""


class Row(NamedTuple):
    """The choice that was measured to be the best at a shape: a configuration of a kernel, or a name of `NAMED`.

    ms: the times; for a configuration "default" and "chosen", else one per name. The first is the baseline. For a route
    a whole pass is timed, for "4-bit small_m" a whole forward. A choice that was missing or failed has no time.
    """

    what: str
    dtype: str
    shape: Shape
    choice: Any
    ms: dict[str, float]

    @property
    def times(self) -> tuple[float, float]:
        """The milliseconds of the baseline and of the choice."""
        return next(iter(self.ms.values())), self.ms[self.choice if self.what in NAMED else "chosen"]

    def among(self, names: Iterable[str] | None) -> Any:
        """The choice if it is one of the names (None: of any), else the fastest measured one of them, else None."""
        times = {name: ms for name, ms in self.ms.items() if names is None or name in names}
        return self.choice if names is None or self.choice in times else min(times, key=times.__getitem__, default=None)


@dataclass(frozen=True)
class Table:
    """The measured choices of one device, with the versions that they were measured with."""

    device: str
    arch: str
    torch: str
    triton: str
    date: str
    rows: tuple[Row, ...] = ()


class Source(NamedTuple):
    """A table in use, with a label for it."""

    label: str
    table: Table


class _State:
    """Process-wide state, set by `using` and `watching`."""

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
    """The choice that `choose` returns, and its source: "forced", a table, "cost model" or a default."""
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
    if what in configs.KERNELS:  # csrc has one code for every architecture
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
        arch: the architecture of the card.
        dtype: of x; for a dequantization, of its result.
        shape: of the call.
        weight_dtype: of W, where it may differ: a W wider than x needs other blocks than those measured.
        among: the kinds of kernels that can serve a 4-bit weight here; the first is taken where nothing was measured.

    Warns:
        UserWarning: once per architecture for which there are neither tables nor configurations.
    """
    choice, source = explain(what, arch, dtype, shape, weight_dtype, among)
    if _State.watcher is not None:
        _State.watcher(what, shape, choice, source)
    return choice


@contextlib.contextmanager
def watching(tell: Callable[[str, Shape, Any, str], None]) -> Iterator[None]:
    """Inside, every choice calls `tell(what, shape, choice, source)`. Cannot be nested."""
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
    """The row nearest to a shape, or None where none is near enough; distances are between logarithms of the sizes.

    M, N and K may differ by a factor of `NEAR`. The padded rank must be the same: the blocks that hold it are part of
    the configuration that was found to fit the card.
    """
    near = [row for row in rows if _is_near(row.shape, shape)]
    return min(near, key=lambda row: math.dist(_logs(row.shape), _logs(shape)), default=None)


def _is_near(one: Shape, other: Shape) -> bool:
    ranks = [configs.block_r(rank) if rank else 0 for rank in (one.r, other.r)]
    return ranks[0] == ranks[1] and all(max(a, b) <= NEAR * min(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def _logs(shape: Shape) -> list[float]:
    return [math.log(max(1, size)) for size in shape]


def sources(arch: str) -> tuple[Source, ...]:
    """The tables for an architecture, in the order in which they are asked. None in the interpreter.

    With a GPU of that architecture here: the user's table for it, then the shipped one. Without (a launch is planned
    for another card): all shipped tables of the architecture.

    Raises:
        ValueError: a file is not a valid table; the message names the file and the field.
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
    """(label, path) of the files that `sources` reads."""
    device = environment.device_of(arch)
    if device is None:
        paths = [(f"shipped table {path.name}", path) for path in sorted(SHIPPED.glob("*.json"))]
    else:
        name = f"{environment.slug(device)}.json"
        user = environment.tables_directory() / name
        paths = [(f"your table {user}", user), (f"shipped table {name}", SHIPPED / name)]
    return [(label, path) for label, path in paths if os.path.isfile(path)]


def version() -> int:
    """A number that changes whenever other tables may have come into force."""
    return _State.version


def reload() -> None:
    """Forget the tables that were read; the next launch reads the files again."""
    _State.version += 1
    explain.cache_clear()
    _loaded.cache_clear()


@contextlib.contextmanager
def using(table: Table | None, forced: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Inside, choices come from `forced` (a choice by its `what`), and else from this table alone (None: from none).

    It holds for the whole process. `tune` uses it to measure.
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
    """Read a table from a file.

    Raises:
        ValueError: the file is not a valid table; the message names the file and the field.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}. {_REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{error}. {_REMEDY}") from error


def write(table: Table, path: Path) -> None:
    """Write the table to a file, whole or not at all: to a temporary file in the same folder, which is then renamed."""
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
    """The inverse of `parse`. The shape of a row becomes the fields m, n, k and r."""
    rows = [
        {"what": row.what, "dtype": row.dtype, **row.shape._asdict(), "choice": row.choice, "ms": row.ms}
        for row in table.rows
    ]
    return {**vars(table), "rows": rows}


class Field(NamedTuple):
    """The check of a value in a table: in words, and as a function."""

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
"""The checks of a configuration's fields; every field that is not here is a block size."""


def _renewed(values: object) -> object:
    """Convert the older format, with lists "configs", "routes" and "four_bit"; other values stay as they are."""
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
    """Make a table from plain JSON values, of this format or the older one, and check every field.

    Raises:
        ValueError: a field is missing, unknown or out of range; the message begins with `where` and names the field.
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
    """Why a configuration cannot be launched: a text that begins with the field, or None where it can."""
    fields = {name: _CONFIG.get(name, _BLOCK) for name in configs.default(kernel, arch, dtype, shape)}
    try:
        _checked(config, "", fields)
    except ValueError as error:
        return str(error).removeprefix(": ")
    if config["cols"] // config.get("parts", 1) < 16:
        return f"parts must leave at least 16 of the {config['cols']} columns to each, got {config['parts']}"
    return None


def _checked(values: object, where: str, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Check that a value is an object with exactly these fields, and return it."""
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
