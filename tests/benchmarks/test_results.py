"""The schema, the store, and the README that is generated from the results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import rows

from benchmarks import readme, schema, surroundings
from benchmarks.schema import SchemaError
from benchmarks.store import Store

HEADER = {"device": "d", "commit": "c", "source": "s", "torch": "t", "triton": "r", "scale": "tiny"}


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L40S", "l40s"), ("NVIDIA GH200 480GB", "gh200"),
        ("AMD Instinct MI300X", "mi300x"), ("Tesla V100-SXM2-16GB", "v100"), ("NVIDIA B200", "b200"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000"), ("odd", "odd"),
    ],
)  # fmt: skip
def test_slug(name: str, slug: str) -> None:
    assert schema.slug(name) == slug


def test_a_good_report_passes() -> None:
    schema.check_report(rows.report())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("case", "dora", "case"), ("case", "glora:lora,lora,none,none", "case"), ("impl", "mine", "impl"),
        ("pass", "bwd", "pass"), ("mode", "loop", "mode"), ("layer", "q_proj", "layer"), ("m", 0, "m must"),
        ("m", 1.5, "m must"), ("r", 16, "no r"), ("median_ms", 0.0, "median_ms"), ("median_ms", float("nan"), "median"),
        ("median_ms", 99.0, "p20"), ("peak_bytes", 1.0, "peak_bytes"), ("max_rel_err", None, "max_rel_err"),
        ("max_rel_err", float("nan"), "max_rel_err"), ("extra", 1, "does not know"), ("n", 4095, "layer"),
        ("impl", "ours", "impl 'eager'"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused(field: str, value: Any, message: str) -> None:
    report = rows.report()
    report["rows"][0][field] = value
    with pytest.raises(SchemaError, match=message):
        schema.check_report(report)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("device", None, "device"), ("date", "yesterday", "date"), ("ceilings", {"bf16_tflops": 1.0}, "copy_gbps"),
        ("unavailable", {"someone": "x"}, "someone"), ("unavailable", {"peft": ""}, "why"), ("rows", {}, "rows"),
        ("models", [{}], "lacks"), ("more", 1, "does not know"),
    ],
)  # fmt: skip
def test_a_bad_report_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        schema.check_report(rows.report() | {field: value})


def test_a_missing_field_and_a_double_row_are_refused() -> None:
    report = rows.report()
    report["rows"].append(dict(report["rows"][0]))
    with pytest.raises(SchemaError, match="twice"):
        schema.check_report(report)
    del report["driver"]
    with pytest.raises(SchemaError, match="lacks driver"):
        schema.check_report(report)


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    schema.write(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        schema.write(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_store_survives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    store = Store(path, HEADER)
    store.add("row", key="one", row={}, detail={})
    with path.open("a") as file:
        file.write('{"kind": "row", "key": "tw')
    again = Store(path, HEADER)
    assert again.settled() == {"one"}
    again.add("error", key="three", impl="peft", what="w", reason="r")
    assert Store(path, HEADER).settled() == {"one", "three"}
    assert again.message is None


@pytest.mark.parametrize("field", ["device", "source", "torch"])
def test_the_store_starts_afresh_for_another_source(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.jsonl"
    Store(path, HEADER).add("row", key="one", row={}, detail={})
    other = Store(path, HEADER | {field: "other"})
    assert other.settled() == set()
    assert other.message is not None
    assert field in other.message
    assert (tmp_path / "a.old.jsonl").exists()


def test_another_commit_of_the_same_source_goes_on(tmp_path: Path) -> None:
    """A finished run rewrites tracked results, and they are committed: the rows stay what they are."""
    path = tmp_path / "a.jsonl"
    Store(path, HEADER).add("row", key="one", row={}, detail={})
    again = Store(path, HEADER | {"commit": "c-dirty"})
    assert again.settled() == {"one"}
    assert again.header["commit"] == "c"


def test_results_and_the_readme_do_not_make_a_commit_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("README.md", "benchmarks/results/cpu.json", "code.py"):
        (tmp_path / name).write_text("before")
    for arguments in (("init",), ("add", "."), ("commit", "-m", "m")):
        git(*arguments)
    monkeypatch.setattr(surroundings, "ROOT", tmp_path)
    clean = surroundings.commit()
    assert clean
    for name in ("README.md", "benchmarks/results/cpu.json", "untracked"):
        (tmp_path / name).write_text("after")
    assert surroundings.commit() == clean
    (tmp_path / "code.py").write_text("after")
    assert surroundings.commit() == f"{clean}-dirty"


def test_a_store_of_rubbish_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("rubbish")
    Store(path, HEADER).add("note", name="n", value=1)
    assert Store(path, HEADER).note("n") == 1


def test_a_group_that_never_ends_is_struck_out(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.jsonl", HEADER)
    for expected in (False, True):
        store.add("begin", key="g")
        assert store.struck_out("g") is expected
    store.add("end", key="g")
    assert not store.struck_out("g")


def test_the_readme_shows_the_committed_results() -> None:
    text = readme.README.read_text()
    assert text == readme.expected(text), "run python -m benchmarks.readme"


def test_the_readme_with_a_gpu_result(tmp_path: Path) -> None:
    (tmp_path / "h100.json").write_text(json.dumps(rows.report()))
    (tmp_path / "h100_by_m.png").write_bytes(b"")
    text = readme.gpu_text(tmp_path)
    for part in ("NVIDIA H100 80GB HBM3", "580.1", "0123456789ab", "1.050", "≤ 1.08", "h100_by_m.png", "h100.md"):
        assert part in text
    assert "h100_roofline.png" not in text


def test_paragraphs_are_wrapped() -> None:
    text = " ".join(f"word{i} `some code of {i}`" for i in range(40))
    lines = readme.wrapped(text).split("\n")
    assert " ".join(lines) == text
    assert max(map(len, lines)) <= readme.WIDTH
    assert all(line.count("`") % 2 == 0 for line in lines)


def test_markers_must_stand_once() -> None:
    with pytest.raises(ValueError, match="gpu"):
        readme.replaced("no markers", {"gpu": ""})
