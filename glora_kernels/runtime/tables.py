"""Which configuration, route and 4-bit kernels a call gets: measured ones where a table has an entry near the shape.

A table is one JSON file a device, made by `python -m glora_kernels tune`. The user's own is looked at first
(`environment.tables_directory`), then the one shipped for the device (launch/shipped), then `configs.choose`. Files are
read once a process, at the first launch on their architecture; after that a choice is one look-up in a dictionary.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from glora_kernels.runtime import configs, environment
from glora_kernels.runtime.configs import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES: tuple[str, ...] = ("fwd", "dx")
ROUTES: tuple[str, ...] = ("fused", "library")
FOUR_BIT: dict[str, tuple[str, ...]] = {
    "dequantize": ("cuda", "triton"), "small_m": ("cuda", "triton", "workspace")
}  # fmt: skip
"""The operations on a 4-bit weight, and what serves each: csrc's kernel, Triton's, or for a few tokens a dense
workspace and the product that a dense weight has."""
SHIPPED = Path(__file__).parent / "shipped"

NEAR = 2.0
"""An entry serves sizes up to this factor from its own, in each of M, N and K."""


class Config(NamedTuple):
    """A measured configuration; `default_ms` is what the one of `configs.choose` took beside it."""

    kernel: str
    dtype: str
    shape: Shape
    config: dict[str, int]
    ms: float
    default_ms: float


class Route(NamedTuple):
    """The times of a whole pass ("fwd" or "dx") on both routes; `scales`: A is a vector or constant."""

    direction: str
    dtype: str
    shape: Shape
    scales: bool
    route: str
    fused_ms: float
    library_ms: float


class FourBit(NamedTuple):
    """The times of an operation of `FOUR_BIT` by what served it, None where that was not there or did not serve.

    "dequantize": m and r are 0. "small_m": a whole forward of m tokens with the low-rank path of rank r.
    """

    operation: str
    dtype: str
    shape: Shape
    choice: str
    cuda_ms: float | None
    triton_ms: float | None
    workspace_ms: float | None = None

    def times(self) -> dict[str, float]:
        """Those there are, by what served."""
        found = {"cuda": self.cuda_ms, "triton": self.triton_ms, "workspace": self.workspace_ms}
        return {name: ms for name, ms in found.items() if ms is not None}

    def among(self, kinds: Iterable[str]) -> str | None:
        """The choice, or where that is none of `kinds` the fastest of those that were measured."""
        times = {name: ms for name, ms in self.times().items() if name in kinds}
        return self.choice if self.choice in times else min(times, key=lambda name: times[name], default=None)


@dataclass(frozen=True)
class Table:
    """What was measured on one device, with what it was measured by."""

    device: str
    arch: str
    torch: str
    triton: str
    date: str
    configs: tuple[Config, ...] = ()
    routes: tuple[Route, ...] = ()
    four_bit: tuple[FourBit, ...] = ()


class Source(NamedTuple):
    """A table in use, and what to call it."""

    label: str
    table: Table


class _State:
    """What `using` sets."""

    table: Table | None = None
    route: str | None = None
    small_m: str | None = None
    only: bool = False
    version: int = 0


_warned: set[str] = set()
_REMEDY = "Remove the file, or measure a new one: python -m glora_kernels tune --again"


def choose(
    kernel: str, arch: str, dtype: torch.dtype, shape: Shape, weight_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """The configuration of one launch of a kernel of `configs.KERNELS`. The dictionary is shared: do not change it.

    Warns:
        UserWarning: once an architecture, where there are neither tables nor configurations made for it.
    """
    return _found(kernel, arch, dtype, shape, weight_dtype)[0]


def explain(
    kernel: str, arch: str, dtype: torch.dtype, shape: Shape, weight_dtype: torch.dtype | None = None
) -> tuple[dict[str, int], str]:
    """What `choose` returns, and where it comes from: "default", or the table."""
    return _found(kernel, arch, dtype, shape, weight_dtype)


def route(arch: str, dtype: torch.dtype, shape: Shape, *, backward: bool, scales: bool) -> str | None:
    """The measured route near this shape, "fused" or "library", or None."""
    return _State.route or _found_route(arch, dtype, shape, backward, scales)[0]


def explain_route(
    arch: str, dtype: torch.dtype, shape: Shape, *, backward: bool, scales: bool
) -> tuple[str | None, str]:
    """The measured route or None, and the table it comes from."""
    return _found_route(arch, dtype, shape, backward, scales)


def four_bit(
    operation: str, arch: str, dtype: torch.dtype, shape: Shape, kinds: tuple[str, ...] = ("cuda", "triton")
) -> str | None:
    """What was measured to be the fastest near this shape among `kinds` and "workspace", or None.

    Args:
        operation: of `FOUR_BIT`.
        arch: of the card.
        dtype: of x, or of the dense weight.
        shape: of the call; M and R are 0 for "dequantize".
        kinds: whose kernels can be taken here, which need not be all that were there at the measurement.
    """
    forced = _State.small_m if operation == "small_m" else None
    return forced or _found_four_bit(operation, arch, dtype, shape, kinds)[0]


def explain_four_bit(
    operation: str, arch: str, dtype: torch.dtype, shape: Shape, kinds: tuple[str, ...] = ("cuda", "triton")
) -> tuple[str | None, str]:
    """What `four_bit` returns, and where it comes from: "default", or the table."""
    return _found_four_bit(operation, arch, dtype, shape, kinds)


@functools.lru_cache(maxsize=8192)
def _found(
    kernel: str, arch: str, dtype: torch.dtype, shape: Shape, weight_dtype: torch.dtype | None
) -> tuple[dict[str, int], str]:
    # A weight wider than x needs other blocks than those that were measured.
    if kernel in configs.TUNED and weight_dtype in (None, dtype):
        for label, table in sources(arch):
            rows = (row for row in table.configs if row.kernel == kernel and DTYPES[row.dtype] == dtype)
            row = nearest(rows, shape)
            if row is not None:
                return row.config, label
    if arch not in configs.PROGRAMS and arch not in _warned and not _State.only and not sources(arch):
        _warned.add(arch)
        warnings.warn(
            f"glora_kernels has no launch configurations made for {arch!r}: its kernels run with conservative ones, "
            "which are right but may be slow. `python -m glora_kernels tune` measures better ones on this machine",
            UserWarning,
            stacklevel=3,
        )
    return configs.choose(kernel, arch, dtype, shape, weight_dtype), "default"


@functools.lru_cache(maxsize=8192)
def _found_route(arch: str, dtype: torch.dtype, shape: Shape, backward: bool, scales: bool) -> tuple[str | None, str]:
    direction = PASSES[backward]
    for label, table in sources(arch):
        kind = (row for row in table.routes if row.direction == direction and row.scales == scales)
        row = nearest((row for row in kind if DTYPES[row.dtype] == dtype), shape)
        if row is not None:
            return row.route, label
    return None, "cost model"


@functools.lru_cache(maxsize=8192)
def _found_four_bit(
    operation: str, arch: str, dtype: torch.dtype, shape: Shape, kinds: tuple[str, ...]
) -> tuple[str | None, str]:
    for label, table in sources(arch):
        rows = (row for row in table.four_bit if row.operation == operation and DTYPES[row.dtype] == dtype)
        row = nearest(rows, shape)
        choice = None if row is None else row.among((*kinds, "workspace"))
        if choice is not None:
            return choice, label
    return None, "default"


Row = TypeVar("Row", Config, Route, FourBit)


def nearest(rows: Iterable[Row], shape: Shape) -> Row | None:
    """The row of the smallest distance, the logarithms of the sizes' ratios, or None where none is near enough.

    M, N and K may differ by a factor of `NEAR`. A rank must fill the same padded one, since the blocks that hold it
    are a part of what was measured to fit the card.
    """
    best, best_distance = None, math.inf
    for row in rows:
        sizes: list[tuple[int, int]] = list(zip(row.shape[:3], shape[:3], strict=True))
        if any(max(a, b) > NEAR * min(a, b) for a, b in sizes) or _padded(row.shape.r) != _padded(shape.r):
            continue
        logs = [math.log(max(1, a) / max(1, b)) for a, b in (*sizes, (row.shape.r, shape.r))]
        distance = math.hypot(*logs)
        if distance < best_distance:
            best, best_distance = row, distance
    return best


def _padded(rank: int) -> int:
    return configs.block_r(rank) if rank else 0


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
    device = environment.device_of(arch)
    if device is None:
        paths = [(f"shipped table {path.name}", path) for path in sorted(SHIPPED.glob("*.json"))]
    else:
        name = f"{environment.slug(device)}.json"
        user = environment.tables_directory() / name
        paths = [(f"your table {user}", user), (f"shipped table {name}", SHIPPED / name)]
    found = [Source(label, read(path)) for label, path in paths if os.path.isfile(path)]
    return tuple(source for source in found if source.table.arch == arch)


def version() -> int:
    """Another number whenever another table may be in force."""
    return _State.version


def reload() -> None:
    """Forget what was read: the next launch reads the files again."""
    _State.version += 1
    for cache in (_found, _found_route, _found_four_bit, _loaded):
        cache.cache_clear()


@contextlib.contextmanager
def using(table: Table | None, route: str | None = None, small_m: str | None = None) -> Iterator[None]:
    """Inside, launches take measured configurations from this table alone (None: from none).

    And `route` if given, and over a 4-bit weight what `small_m` names of `FOUR_BIT`. For the whole process. `tune`
    measures with it.
    """
    before = _State.table, _State.route, _State.small_m, _State.only
    _State.table, _State.route, _State.small_m, _State.only = table, route, small_m, True
    reload()
    try:
        yield
    finally:
        _State.table, _State.route, _State.small_m, _State.only = before
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
    """The inverse of `parse`."""
    head = {name: getattr(table, name) for name in ("device", "arch", "torch", "triton", "date")}
    rows = [
        {"kernel": row.kernel, "dtype": row.dtype, **row.shape._asdict(), "config": row.config, "ms": row.ms,
         "default_ms": row.default_ms}
        for row in table.configs
    ]  # fmt: skip
    passes = [
        {"pass": row.direction, "dtype": row.dtype, **row.shape._asdict(), "scales": row.scales, "route": row.route,
         "fused_ms": row.fused_ms, "library_ms": row.library_ms}
        for row in table.routes
    ]  # fmt: skip
    operations = [
        {"operation": row.operation, "dtype": row.dtype, **row.shape._asdict(), "choice": row.choice,
         "cuda_ms": row.cuda_ms, "triton_ms": row.triton_ms, "workspace_ms": row.workspace_ms}
        for row in table.four_bit
    ]  # fmt: skip
    return {**head, "configs": rows, "routes": passes, "four_bit": operations}


def parse(values: object, where: str) -> Table:
    """A table of plain JSON values, every field checked; "four_bit" may be absent, as in older tables.

    Raises:
        ValueError: a field that is missing, unknown or out of range; the message begins with `where` and names it.
    """
    names = ("device", "arch", "torch", "triton", "date", "configs", "routes", "four_bit")
    fields = _fields({"four_bit": []} | values if isinstance(values, dict) else values, where, names)
    head = {name: _text(fields[name], f"{where}: {name}") for name in ("device", "arch", "torch", "triton", "date")}
    rows = [
        _config(row, f"{where}: configs[{i}]", head["arch"])
        for i, row in enumerate(_list(fields["configs"], f"{where}: configs"))
    ]
    passes = [_route(row, f"{where}: routes[{i}]") for i, row in enumerate(_list(fields["routes"], f"{where}: routes"))]
    operations = [
        _four_bit(row, f"{where}: four_bit[{i}]")
        for i, row in enumerate(_list(fields["four_bit"], f"{where}: four_bit"))
    ]
    return Table(**head, configs=tuple(rows), routes=tuple(passes), four_bit=tuple(operations))


def fault(kernel: str, arch: str, dtype: torch.dtype, shape: Shape, config: Mapping[str, Any]) -> str | None:
    """What is wrong with a configuration: "field: why", or None where it can be launched."""
    default = configs.choose(kernel, arch, dtype, shape)
    if differing := sorted(set(config) ^ set(default)):
        return f"{differing[0]}: the fields of {kernel!r} are {sorted(default)}; got {sorted(config)}"
    for name, value in config.items():
        if isinstance(default[name], bool):
            if not isinstance(value, bool):
                return f"{name}: true or false, got {value!r}"
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            return f"{name}: an integer, got {value!r}"
        low, high = {"num_stages": (1, 8), "num_warps": (1, 16), "parts": (1, 4)}.get(name, (16, 512))
        if not low <= value <= high:
            return f"{name}: from {low} to {high}, got {value}"
        if name != "num_stages" and value & (value - 1):
            return f"{name}: a power of two, got {value}"
    if config["cols"] // config.get("parts", 1) < 16:
        return f"parts: parts of at least 16 of the {config['cols']} columns, got {config['parts']}"
    return None


def _config(row: object, where: str, arch: str) -> Config:
    fields = _fields(row, where, ("kernel", "dtype", "m", "n", "k", "r", "config", "ms", "default_ms"))
    kernel = _choice(fields["kernel"], f"{where}: kernel", configs.TUNED)
    dtype = _choice(fields["dtype"], f"{where}: dtype", tuple(DTYPES))
    shape = _shape(fields, where)
    if not isinstance(fields["config"], dict):
        raise ValueError(f"{where}: config must be an object, got {fields['config']!r}")
    if reason := fault(kernel, arch, DTYPES[dtype], shape, fields["config"]):
        raise ValueError(f"{where}: config: {reason}")
    times = (_ms(fields[name], f"{where}: {name}") for name in ("ms", "default_ms"))
    return Config(kernel, dtype, shape, fields["config"], *times)


def _route(row: object, where: str) -> Route:
    names = ("pass", "dtype", "m", "n", "k", "r", "scales", "route", "fused_ms", "library_ms")
    fields = _fields(row, where, names)
    if not isinstance(fields["scales"], bool):
        raise ValueError(f"{where}: scales must be true or false, got {fields['scales']!r}")
    return Route(
        _choice(fields["pass"], f"{where}: pass", PASSES),
        _choice(fields["dtype"], f"{where}: dtype", tuple(DTYPES)),
        _shape(fields, where),
        fields["scales"],
        _choice(fields["route"], f"{where}: route", ROUTES),
        _ms(fields["fused_ms"], f"{where}: fused_ms"),
        _ms(fields["library_ms"], f"{where}: library_ms"),
    )


def _four_bit(row: object, where: str) -> FourBit:
    names = ("operation", "dtype", "m", "n", "k", "r", "choice", "cuda_ms", "triton_ms", "workspace_ms")
    fields = _fields(row, where, names)
    operation = _choice(fields["operation"], f"{where}: operation", tuple(FOUR_BIT))
    kinds, shape = FOUR_BIT[operation], _shape(fields, where)
    low, high = (0, 0) if operation == "dequantize" else (1, 64)
    if not low <= shape.m <= high:
        raise ValueError(f"{where}: m of {operation!r} must be from {low} to {high}, got {shape.m}")
    times = {}
    for kind in ("cuda", "triton", "workspace"):
        value = fields[f"{kind}_ms"]
        if value is not None and kind not in kinds:
            raise ValueError(f"{where}: {kind}_ms of {operation!r} must be null, got {value!r}")
        times[f"{kind}_ms"] = None if value is None else _ms(value, f"{where}: {kind}_ms")
    choice = _choice(fields["choice"], f"{where}: choice", kinds)
    if times[f"{choice}_ms"] is None:
        raise ValueError(f"{where}: choice is {choice!r}, but {choice}_ms is null")
    dtype = _choice(fields["dtype"], f"{where}: dtype", tuple(DTYPES))
    return FourBit(operation, dtype, shape, choice, **times)


def _fields(values: object, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be an object with {list(names)}, got {type(values).__name__}")
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{where}: {unknown[0]} is no field of it; those are {list(names)}")
    return values


def _shape(fields: Mapping[str, Any], where: str) -> Shape:
    for name in Shape._fields:
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{where}: {name} must be an integer >= 0, got {value!r}")
    return Shape(*(fields[name] for name in Shape._fields))


def _choice(value: object, where: str, accepted: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, accepted))}; got {value!r}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {value!r}")
    return value


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, got {value!r}")
    return value


def _ms(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where} must be a time in milliseconds > 0, got {value!r}")
    return float(value)
