"""Measured tables: which entry serves a shape, in which order files are asked, and what a bad file says."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch

from glora_kernels.runtime import configs, environment, routes, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import DEQUANTIZE, SMALL_M, Row, Table

BF16, SHAPE = torch.bfloat16, Shape(8192, 4096, 4096, 16)
CARD = "NVIDIA H100 80GB HBM3"
DEFAULT = configs.default("fwd", "sm_90", BF16, SHAPE)


def row(shape=SHAPE, stages=2, kernel="fwd", dtype="bf16"):
    config = configs.default(kernel, "sm_90", tables.DTYPES[dtype], shape) | {"num_stages": stages}
    return Row(kernel, dtype, shape, config, {"default": 0.4, "chosen": 0.3})


def route(what, choice, dtype="bf16", shape=SHAPE):
    return Row(f"route {what}", dtype, shape, choice, {"fused": 0.5, "library": 0.4})


def table(*rows, arch="sm_90", device=CARD):
    return Table(device, arch, "2.11.0", "3.6.0", "2026-01-01", rows)


DENSE = Row(DEQUANTIZE, "bf16", Shape(0, 4096, 4096, 0), "cuda", {"cuda": 0.1, "triton": 0.2})
FEW = Row(SMALL_M, "bf16", Shape(8, 4096, 4096, 16), "workspace", {"triton": 0.3, "workspace": 0.2})


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A machine with one H100, its user's directory and the shipped one; returns the two."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setenv(environment.TABLES_VARIABLE, str(user))
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    monkeypatch.setattr(environment, "device_of", lambda arch: CARD if arch == "sm_90" else None)
    monkeypatch.setattr(tables, "_warned", set())
    tables.reload()
    yield user, shipped
    tables.reload()


def put(folder, *rows, **kwargs):
    tables.write(table(*rows, **kwargs), folder / f"{environment.slug(kwargs.get('device', CARD))}.json")
    tables.reload()


def stages(shape=SHAPE, kernel="fwd", arch="sm_90", dtype=BF16, weight_dtype=None):
    return tables.choose(kernel, arch, dtype, shape, weight_dtype)["num_stages"]


def test_without_tables_the_default(card):
    assert tables.choose("fwd", "sm_90", BF16, SHAPE) == DEFAULT
    assert tables.explain("fwd", "sm_90", BF16, SHAPE)[1] == "default"
    assert tables.explain("route fwd", "sm_90", BF16, SHAPE)[1] == "cost model"
    assert tables.explain("route fwd", "sm_77", BF16, SHAPE) == ("fused", "default of an unknown card")
    assert tables.explain(SMALL_M, "sm_90", BF16, SHAPE, among=("triton",)) == ("workspace", "default")


def test_nothing_is_shipped_yet_but_how_it_comes_about():
    assert (tables.SHIPPED / "README.md").read_text().count("tune") >= 1
    for path in tables.SHIPPED.glob("*.json"):
        tables.read(path)


@pytest.mark.parametrize(
    ("shape", "near"),
    [
        (SHAPE, True),
        (Shape(4096, 8192, 2048, 16), True),
        (Shape(4095, 4096, 4096, 16), False),
        (Shape(8192, 8193, 4096, 16), False),
        (Shape(8192, 4096, 2047, 16), False),
        (SHAPE._replace(r=1), True),
        (SHAPE._replace(r=17), False),
        (SHAPE._replace(r=0), False),
        (SHAPE._replace(m=0), False),
    ],
)
def test_how_near_an_entry_must_be(shape, near):
    assert (tables.nearest([row()], shape) is not None) == near


def test_the_nearest_wins():
    rows = [row(SHAPE._replace(m=m), stages=i) for i, m in enumerate((5000, 7000, 9000), start=2)]
    assert tables.nearest(rows, SHAPE._replace(m=6900)) is rows[1]
    assert tables.nearest(rows, SHAPE._replace(m=5200)) is rows[0]
    assert tables.nearest(reversed(rows), SHAPE._replace(m=16000)) is rows[2]


def test_an_entry_serves_its_kernel_dtype_and_architecture_only(card):
    put(card[0], row(stages=2))
    assert stages() == 2
    assert tables.explain("fwd", "sm_90", BF16, SHAPE)[1].startswith("your table ")
    assert stages(kernel="dx") == configs.default("dx", "sm_90", BF16, SHAPE)["num_stages"] != 2
    assert stages(dtype=torch.float16) == DEFAULT["num_stages"]
    assert stages(arch="sm_80") == configs.default("fwd", "sm_80", BF16, SHAPE)["num_stages"]
    assert stages(weight_dtype=BF16) == 2
    mixed = configs.default("fwd", "sm_90", BF16, SHAPE, torch.float32)
    assert tables.choose("fwd", "sm_90", BF16, SHAPE, torch.float32) == mixed


def test_the_users_entry_comes_before_the_shipped_one(card):
    user, shipped = card
    put(shipped, row(stages=2), row(SHAPE._replace(n=1024), stages=3))
    assert stages() == 2
    assert tables.explain("fwd", "sm_90", BF16, SHAPE)[1] == "shipped table nvidia-h100-80gb-hbm3.json"
    put(user, row(stages=5))
    assert stages() == 5
    assert stages(SHAPE._replace(n=1024)) == 3, "where the user's has no near entry, the shipped one is asked"


def test_another_card_of_the_architecture_is_not_this_card(card):
    put(card[1], row(stages=2), device="NVIDIA H200")
    assert stages() == DEFAULT["num_stages"]


def test_planning_for_a_card_that_is_not_here(card, monkeypatch):
    """Shipped tables of the architecture serve; the user's do not, which were measured on some card."""
    user, shipped = card
    put(user, row(stages=5))
    put(shipped, row(stages=2), device="NVIDIA H200")
    put(shipped, row(stages=3), arch="sm_80", device="NVIDIA A100")
    monkeypatch.setattr(environment, "device_of", lambda arch: None)
    tables.reload()
    assert stages() == 2
    assert stages(arch="sm_80") == 3


def test_a_table_of_another_architecture_under_this_name_is_not_used(card):
    put(card[0], row(stages=2), arch="sm_80")
    assert stages() == DEFAULT["num_stages"]


def test_the_interpreter_reads_no_table(card, monkeypatch):
    monkeypatch.setattr(environment, "device_of", lambda arch: pytest.fail("asked for a GPU"))
    assert tables.choose("fwd", "cpu", BF16, SHAPE) == configs.default("fwd", "cpu", BF16, SHAPE)
    assert tables.choose("route dx", "cpu", BF16, SHAPE) == "fused"


def test_files_are_read_once(card, monkeypatch):
    put(card[0], row(stages=2))
    read, paths = tables.read, []
    monkeypatch.setattr(tables, "read", lambda path: paths.append(path) or read(path))
    for m in (8192, 8191, 4096, 100):
        stages(SHAPE._replace(m=m))
        tables.choose("route dx scaled", "sm_90", BF16, SHAPE._replace(m=m))
    assert len(paths) == 1
    put(card[0], row(stages=5))
    assert stages() == 5, "reload reads it again"
    assert len(paths) == 2


def test_a_choice_is_remembered(card):
    stages()
    before = tables.explain.cache_info().hits
    for _ in range(10):
        stages()
    assert tables.explain.cache_info().hits == before + 10


def test_unknown_cards_warn_once(card):
    with pytest.warns(UserWarning, match=r"'sm_77'.*python -m glora_kernels tune"):
        stages(arch="sm_77")
    with pytest.warns(UserWarning, match="'sm_78'"):
        stages(arch="sm_78")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kernel in configs.KERNELS:
            stages(arch="sm_77", kernel=kernel, shape=SHAPE._replace(m=3))
        for arch in configs.PROGRAMS:
            stages(arch=arch)


def test_a_table_silences_the_warning(card, monkeypatch):
    monkeypatch.setattr(environment, "device_of", lambda arch: CARD)
    config = configs.default("fwd", "sm_77", BF16, SHAPE)
    put(card[0], Row("fwd", "bf16", SHAPE, config, {"default": 1.0, "chosen": 1.0}), arch="sm_77")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stages(arch="sm_77")
        stages(arch="sm_77", kernel="finish")


def test_routes(card):
    def found(what, dtype=BF16, shape=SHAPE):
        choice, source = tables.explain(f"route {what}", "sm_90", dtype, shape)
        return None if source == "cost model" else choice

    put(card[0], route("fwd", "library"), route("dx scaled", "fused"))
    assert found("fwd") == "library"
    assert found("dx scaled") == "fused"
    assert found("fwd scaled") is found("dx") is None
    assert found("fwd", torch.float16) is None
    assert found("fwd", shape=SHAPE._replace(k=100)) is None
    assert routes.product_route("sm_90", BF16, SHAPE, BF16, backward=False, scales=False) == "library"
    with tables.using(None):
        assert found("fwd") is None
    with tables.using(None, {"route fwd": "fused"}):
        assert routes.product_route("sm_90", BF16, SHAPE, BF16, backward=False, scales=False) == "fused"
    assert found("fwd") == "library"


def test_what_serves_4_bits(card):
    def found(what, kinds=("cuda", "triton"), dtype=BF16, **sizes):
        shape = {DEQUANTIZE: DENSE, SMALL_M: FEW}[what].shape._replace(**sizes)
        choice, source = tables.explain(what, "sm_90", dtype, shape, among=kinds)
        return None if source == "default" else choice

    assert found(DEQUANTIZE) is None
    put(card[1], DENSE._replace(choice="triton", ms={"cuda": 0.3, "triton": 0.2}), FEW)
    assert (found(DEQUANTIZE), found(SMALL_M)) == ("triton", "workspace")
    put(card[0], DENSE)
    assert (found(DEQUANTIZE), found(SMALL_M)) == ("cuda", "workspace"), "the user's first, then the shipped one"
    kinds = ("cuda", "triton")
    assert tables.explain(DEQUANTIZE, "sm_90", BF16, DENSE.shape, among=kinds)[1].startswith("your table ")
    assert tables.explain(SMALL_M, "sm_90", BF16, FEW.shape, among=kinds)[1].startswith("shipped table ")
    assert tables.explain(SMALL_M, "sm_80", BF16, FEW.shape, among=kinds) == ("cuda", "default")
    assert found(DEQUANTIZE, ("triton",)) == "triton", "the other is not there now"
    assert found(DEQUANTIZE, n=2048, k=8192) == "cuda"
    assert [found(SMALL_M, m=m) for m in (3, 4, 16, 17)] == [None, "workspace", "workspace", None]
    assert found(SMALL_M, r=17) is found(SMALL_M, dtype=torch.float16) is found(DEQUANTIZE, n=2047) is None
    with tables.using(None, {SMALL_M: "triton"}):
        assert (found(DEQUANTIZE), found(SMALL_M)) == (None, "triton")
    assert found(SMALL_M) == "workspace"


def older(**lists):
    """A table as it was written before rows were alike."""
    shape = {"dtype": "bf16", "m": 4096, "n": 4096, "k": 4096, "r": 16}
    config = {"kernel": "fwd", **shape, "config": DEFAULT | {"num_stages": 2}, "ms": 1.0, "default_ms": 2.0}
    way = {"pass": "dx", **shape, "scales": True, "route": "library", "fused_ms": 2.0, "library_ms": 1.0}
    few = {"operation": "small_m", **shape, "m": 8, "choice": "triton", "cuda_ms": None, "triton_ms": 1.0,
           "workspace_ms": 3.0}  # fmt: skip
    values = tables.to_json(table())
    del values["rows"]
    return values | {"configs": [config], "routes": [way], "four_bit": [few]} | lists


def test_a_table_in_the_older_format_is_read(card):
    found = tables.parse(older(), "old.json")
    assert [(one.what, one.choice) for one in found.rows[1:]] == [("route dx scaled", "library"), (SMALL_M, "triton")]
    assert [one.ms for one in found.rows] == [
        {"default": 2.0, "chosen": 1.0}, {"fused": 2.0, "library": 1.0}, {"triton": 1.0, "workspace": 3.0}
    ]  # fmt: skip
    path = card[0] / f"{environment.slug(CARD)}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(older()))
    assert stages() == 2
    without = older()
    del without["four_bit"]
    assert len(tables.parse(without, "old.json").rows) == 2
    with pytest.raises(ValueError, match=r"old.json: a row of the older format is not whole: KeyError\('kernel'\)"):
        tables.parse(older(configs=[{}]), "old.json")


def test_using_one_table(card):
    put(card[0], row(stages=5))
    with tables.using(table(row(stages=2))):
        assert stages() == 2
        with tables.using(None):
            assert stages() == DEFAULT["num_stages"]
        assert stages() == 2
    with pytest.raises(KeyError), tables.using(None):
        raise KeyError
    assert stages() == 5


def test_a_file_holds_what_was_written(tmp_path):
    given = table(row(), row(kernel="dy", dtype="fp16"), route("dx scaled", "fused", "fp32"), DENSE, FEW)
    path = tmp_path / "new" / "card.json"
    tables.write(given, path)
    assert tables.read(path) == given
    rows = json.loads(path.read_text())["rows"]
    assert rows[0] == {
        "what": "fwd", "dtype": "bf16", "m": 8192, "n": 4096, "k": 4096, "r": 16, "choice": row().choice,
        "ms": {"default": 0.4, "chosen": 0.3},
    }  # fmt: skip
    assert rows[4] == {
        "what": "4-bit small_m", "dtype": "bf16", "m": 8, "n": 4096, "k": 4096, "r": 16, "choice": "workspace",
        "ms": {"triton": 0.3, "workspace": 0.2},
    }  # fmt: skip


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_writing_is_all_or_nothing(tmp_path, monkeypatch, at):
    path = tmp_path / "card.json"
    tables.write(table(row(stages=2)), path)

    def crash(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, at, crash)
    with pytest.raises(OSError, match="full"):
        tables.write(table(row(stages=5)), path)
    monkeypatch.undo()
    assert tables.read(path) == table(row(stages=2))
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"], "nothing is left beside it"


def change(values, place, value):
    *path, last = place
    for key in path:
        values = values[key]
    if value is KeyError:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["arch"], KeyError, "arch is missing"),
        (["arch"], 90, "arch must be a string, got 90"),
        (["extra"], 1, "extra is no field"),
        (["rows"], {}, "rows must be a list, got {}"),
        (["rows", 0], [], r"rows\[0\] must be an object with .*, got list"),
        (["rows", 0, "what"], "finish", r"rows\[0\]: what must be one of 'fwd'.*got 'finish'"),
        (["rows", 0, "dtype"], "int8", "dtype must be one of 'bf16'.*got 'int8'"),
        (["rows", 0, "m"], 1.5, "m must be an integer >= 0, got 1.5"),
        (["rows", 0, "r"], -1, "r must be an integer"),
        (["rows", 0, "ms", "chosen"], 0, "ms: chosen must be a time in milliseconds > 0, got 0"),
        (["rows", 0, "ms", "default"], "1", "ms: default must be a time"),
        (["rows", 0, "ms", "default"], KeyError, "ms: default is missing"),
        (["rows", 0, "ms"], 1.0, "ms must be an object, got 1.0"),
        (["rows", 0, "choice"], None, "choice must be an object or a name, got None"),
        (["rows", 0, "choice"], "fused", "choice must be an object, got 'fused'"),
        (["rows", 0, "choice", "depth"], KeyError, "choice: depth is missing"),
        (["rows", 0, "choice", "waves"], 2, r"choice: waves is no field of it; those are \['rows'"),
        (["rows", 0, "choice", "rows"], 96, "choice: rows must be a power of two from 16 to 512, got 96"),
        (["rows", 0, "choice", "rows"], 8, "choice: rows must be a power of two from 16 to 512, got 8"),
        (["rows", 0, "choice", "num_warps"], 3, "choice: num_warps must be a power of two from 1 to 16"),
        (["rows", 0, "choice", "num_stages"], 9, "choice: num_stages must be an integer from 1 to 8"),
        (["rows", 0, "choice", "num_stages"], True, "choice: num_stages must be an integer"),
        (["rows", 0, "choice", "tma"], 1, "choice: tma must be true or false"),
        (["rows", 0, "choice", "cols"], 32, "choice: parts must leave at least 16 of the 32 columns"),
        (["rows", 1, "what"], "route bwd", r"rows\[1\]: what must be one of .*'route fwd'"),
        (["rows", 1, "choice"], "eager", "choice must be one of 'fused', 'library', got 'eager'"),
        (["rows", 1, "ms", "library"], -1, "ms: library must be a time"),
        (["rows", 2, "m"], 1, "m must be 0 of a dequantization, got 1"),
        (["rows", 3, "m"], 65, r"rows\[3\]: m must be from 1 to 64 of few tokens, got 65"),
        (["rows", 2, "ms", "workspace"], 1.0, "ms: workspace is no field of it"),
        (["rows", 2, "choice"], "workspace", "choice must be one of 'cuda', 'triton', got 'workspace'"),
        (["rows", 3, "choice"], "cuda", "ms: cuda is missing"),
        (["rows", 3, "ms", "triton"], 0, "ms: triton must be a time"),
    ],
)
def test_a_bad_file_names_itself_and_the_field(card, place, value, message):
    values = tables.to_json(table(row(), route("fwd", "fused"), DENSE, FEW))
    values = json.loads(json.dumps(values))
    tables.parse(values, "whole")
    change(values, place, value)
    path = card[0] / f"{environment.slug(CARD)}.json"
    path.parent.mkdir()
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        stages()
    assert str(path) in str(error.value)
    assert "tune --again" in str(error.value)


def test_a_file_that_is_not_json(card):
    path = card[0] / f"{environment.slug(CARD)}.json"
    path.parent.mkdir()
    path.write_text('{"device": "NVI')
    with pytest.raises(ValueError, match=r"not JSON.*Remove the file") as error:
        stages()
    assert str(path) in str(error.value)


def test_where_tables_are(monkeypatch, tmp_path):
    monkeypatch.setenv(environment.TABLES_VARIABLE, str(tmp_path))
    assert environment.tables_directory() == tmp_path
    monkeypatch.delenv(environment.TABLES_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.tables_directory() == tmp_path / ".cache" / "glora_kernels"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert not environment.tables_directory().is_file(), "a user without a home"
    assert environment.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert environment.slug("AMD Instinct MI300X (OAM)") == "amd-instinct-mi300x-oam"
