"""Measured tables: which entry serves a shape, in which order files are asked, and what a bad file says."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace

import pytest
import torch

from glora_kernels.runtime import configs, environment, routes, tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.tables import Config, FourBit, Route, Table

BF16, SHAPE = torch.bfloat16, Shape(8192, 4096, 4096, 16)
CARD = "NVIDIA H100 80GB HBM3"
DEFAULT = configs.choose("fwd", "sm_90", BF16, SHAPE)


def row(shape=SHAPE, stages=2, kernel="fwd", dtype="bf16"):
    config = configs.choose(kernel, "sm_90", tables.DTYPES[dtype], shape) | {"num_stages": stages}
    return Config(kernel, dtype, shape, config, 0.3, 0.4)


def table(*rows, routes=(), four_bit=(), arch="sm_90", device=CARD):
    return Table(device, arch, "2.11.0", "3.6.0", "2026-01-01", rows, tuple(routes), tuple(four_bit))


DENSE = FourBit("dequantize", "bf16", Shape(0, 4096, 4096, 0), "cuda", 0.1, 0.2)
FEW = FourBit("small_m", "bf16", Shape(8, 4096, 4096, 16), "workspace", None, 0.3, 0.2)


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
    assert tables.route("sm_90", BF16, SHAPE, backward=False, scales=False) is None


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
    assert stages(kernel="dx") == configs.choose("dx", "sm_90", BF16, SHAPE)["num_stages"] != 2
    assert stages(dtype=torch.float16) == DEFAULT["num_stages"]
    assert stages(arch="sm_80") == configs.choose("fwd", "sm_80", BF16, SHAPE)["num_stages"]
    assert stages(weight_dtype=BF16) == 2
    mixed = configs.choose("fwd", "sm_90", BF16, SHAPE, torch.float32)
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
    assert tables.choose("fwd", "cpu", BF16, SHAPE) == configs.choose("fwd", "cpu", BF16, SHAPE)
    assert tables.route("cpu", BF16, SHAPE, backward=True, scales=False) is None


def test_files_are_read_once(card, monkeypatch):
    put(card[0], row(stages=2))
    read, paths = tables.read, []
    monkeypatch.setattr(tables, "read", lambda path: paths.append(path) or read(path))
    for m in (8192, 8191, 4096, 100):
        stages(SHAPE._replace(m=m))
        tables.route("sm_90", BF16, SHAPE._replace(m=m), backward=True, scales=True)
    assert len(paths) == 1
    put(card[0], row(stages=5))
    assert stages() == 5, "reload reads it again"
    assert len(paths) == 2


def test_a_choice_is_remembered(card):
    stages()
    before = tables._found.cache_info().hits
    for _ in range(10):
        stages()
    assert tables._found.cache_info().hits == before + 10


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
    config = configs.choose("fwd", "sm_77", BF16, SHAPE)
    put(card[0], Config("fwd", "bf16", SHAPE, config, 1.0, 1.0), arch="sm_77")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stages(arch="sm_77")
        stages(arch="sm_77", kernel="finish")


def test_routes(card):
    rows = [
        Route("fwd", "bf16", SHAPE, False, "library", 0.5, 0.4),
        Route("dx", "bf16", SHAPE, True, "fused", 0.4, 0.5),
    ]
    put(card[0], routes=rows)

    def found(backward, scales, dtype=BF16, shape=SHAPE):
        return tables.route("sm_90", dtype, shape, backward=backward, scales=scales)

    assert found(False, False) == "library"
    assert found(True, True) == "fused"
    assert found(False, True) is found(True, False) is None
    assert found(False, False, torch.float16) is None
    assert found(False, False, shape=SHAPE._replace(k=100)) is None
    assert routes.product_route("sm_90", BF16, SHAPE, BF16, backward=False, scales=False) == "library"
    with tables.using(None):
        assert found(False, False) is None
    with tables.using(None, "fused"):
        assert routes.product_route("sm_90", BF16, SHAPE, BF16, backward=False, scales=False) == "fused"
    assert found(False, False) == "library"


def test_what_serves_4_bits(card):
    def found(operation, kinds=("cuda", "triton"), dtype=BF16, **sizes):
        row = {"dequantize": DENSE, "small_m": FEW}[operation]
        return tables.four_bit(operation, "sm_90", dtype, row.shape._replace(**sizes), kinds)

    assert found("dequantize") is None
    put(card[1], four_bit=[DENSE._replace(choice="triton", cuda_ms=0.3), FEW])
    assert (found("dequantize"), found("small_m")) == ("triton", "workspace")
    put(card[0], four_bit=[DENSE])
    assert (found("dequantize"), found("small_m")) == ("cuda", "workspace"), "the user's first, then the shipped one"
    assert tables.explain_four_bit("dequantize", "sm_90", BF16, DENSE.shape)[1].startswith("your table ")
    assert tables.explain_four_bit("small_m", "sm_90", BF16, FEW.shape)[1].startswith("shipped table ")
    assert tables.explain_four_bit("small_m", "sm_80", BF16, FEW.shape) == (None, "default")
    assert found("dequantize", ("triton",)) == "triton", "the other is not there now"
    assert found("dequantize", n=2048, k=8192) == "cuda"
    assert [found("small_m", m=m) for m in (3, 4, 16, 17)] == [None, "workspace", "workspace", None]
    assert found("small_m", r=17) is found("small_m", dtype=torch.float16) is found("dequantize", n=2047) is None
    with tables.using(None, small_m="triton"):
        assert (found("dequantize"), found("small_m")) == (None, "triton")
    assert found("small_m") == "workspace"


def test_tables_without_4_bit_rows_still_load():
    values = tables.to_json(table(row(), four_bit=[DENSE]))
    del values["four_bit"]
    assert tables.parse(values, "old") == table(row())


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
    given = table(row(), row(kernel="dy", dtype="fp16"), routes=[Route("dx", "fp32", SHAPE, True, "fused", 1.0, 2.0)])
    given = replace(given, four_bit=(DENSE, FEW))
    path = tmp_path / "new" / "card.json"
    tables.write(given, path)
    assert tables.read(path) == given
    assert set(json.loads(path.read_text())["configs"][0]) == {
        "kernel", "dtype", "m", "n", "k", "r", "config", "ms", "default_ms"
    }  # fmt: skip
    assert set(json.loads(path.read_text())["routes"][0]) == {
        "pass", "dtype", "m", "n", "k", "r", "scales", "route", "fused_ms", "library_ms"
    }  # fmt: skip
    assert json.loads(path.read_text())["four_bit"][1] == {
        "operation": "small_m", "dtype": "bf16", "m": 8, "n": 4096, "k": 4096, "r": 16, "choice": "workspace",
        "cuda_ms": None, "triton_ms": 0.3, "workspace_ms": 0.2,
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
        (["configs"], {}, "configs must be a list"),
        (["configs", 0], [], r"configs\[0\]: must be an object"),
        (["configs", 0, "kernel"], "finish", r"configs\[0\]: kernel must be one of 'fwd'"),
        (["configs", 0, "dtype"], "int8", "dtype must be one of 'bf16'"),
        (["configs", 0, "m"], 1.5, "m must be an integer >= 0, got 1.5"),
        (["configs", 0, "r"], -1, "r must be an integer"),
        (["configs", 0, "ms"], 0, "ms must be a time"),
        (["configs", 0, "default_ms"], "1", "default_ms must be a time"),
        (["configs", 0, "config"], None, "config must be an object"),
        (["configs", 0, "config", "depth"], KeyError, "config: depth: the fields of 'fwd' are"),
        (["configs", 0, "config", "waves"], 2, "config: waves: the fields of 'fwd' are"),
        (["configs", 0, "config", "rows"], 96, "config: rows: a power of two, got 96"),
        (["configs", 0, "config", "rows"], 8, "config: rows: from 16 to 512, got 8"),
        (["configs", 0, "config", "num_warps"], 3, "config: num_warps: a power of two"),
        (["configs", 0, "config", "num_stages"], 9, "config: num_stages: from 1 to 8"),
        (["configs", 0, "config", "num_stages"], True, "config: num_stages: an integer"),
        (["configs", 0, "config", "tma"], 1, "config: tma: true or false"),
        (["configs", 0, "config", "cols"], 32, "config: parts: parts of at least 16"),
        (["routes", 0, "pass"], "bwd", r"routes\[0\]: pass must be one of 'fwd', 'dx'"),
        (["routes", 0, "scales"], 0, "scales must be true or false"),
        (["routes", 0, "route"], "eager", "route must be one of 'fused', 'library'"),
        (["routes", 0, "library_ms"], -1, "library_ms must be a time"),
        (["four_bit"], {}, "four_bit must be a list"),
        (["four_bit", 0, "operation"], "merge", r"four_bit\[0\]: operation must be one of 'dequantize', 'small_m'"),
        (["four_bit", 0, "m"], 1, r"m of 'dequantize' must be from 0 to 0, got 1"),
        (["four_bit", 1, "m"], 65, r"four_bit\[1\]: m of 'small_m' must be from 1 to 64, got 65"),
        (["four_bit", 0, "workspace_ms"], 1.0, "workspace_ms of 'dequantize' must be null, got 1.0"),
        (["four_bit", 0, "choice"], "workspace", "choice must be one of 'cuda', 'triton'; got 'workspace'"),
        (["four_bit", 1, "choice"], "cuda", "choice is 'cuda', but cuda_ms is null"),
        (["four_bit", 1, "triton_ms"], 0, "triton_ms must be a time"),
        (["four_bit", 1, "cuda_ms"], KeyError, "cuda_ms is missing"),
        (["four_bit", 1, "dtype"], "int8", "dtype must be one of 'bf16'"),
    ],
)
def test_a_bad_file_names_itself_and_the_field(card, place, value, message):
    routes = [Route("fwd", "bf16", SHAPE, False, "fused", 1.0, 2.0)]
    values = tables.to_json(table(row(), routes=routes, four_bit=[DENSE, FEW]))
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
