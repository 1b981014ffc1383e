"""The schema, the store, the files, and the pages that are generated from them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import made
import pytest
from made import HEADER

from benchmarks import cases, cells, pages, plots, results, schema, store, tables
from benchmarks.schema import SchemaError
from benchmarks.store import Store
from benchmarks.targets import FORM_NAMES, LAYERS, QUANTIZED, SIBLINGS


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
    schema.check_report(made.report())


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
    report = made.report()
    report["rows"][0][field] = value
    with pytest.raises(SchemaError, match=message):
        schema.check_report(report)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("case", "lora", "case"), ("case", "lora:qk", "case"), ("case", "nf4-lora:qkv", "case"),
        ("layer", "q", "layer"), ("impl", "bnb", "impl"), ("r", None, "r must"), ("op", "set", "op must"),
        ("op", "linear", "case"),
    ],
)  # fmt: skip
def test_a_bad_row_of_a_set_is_refused(field: str, value: Any, message: str) -> None:
    entry = next(entry for entry in made.STAGES["groups"].groups[0].entries if entry.impl == "ours")
    with pytest.raises(SchemaError, match=message):
        schema.check_row(made.row(entry, mode="eager") | {field: value})


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
        schema.check_report(made.report() | {field: value})


def test_a_missing_field_and_a_double_row_are_refused() -> None:
    report = made.report()
    report["rows"].append(dict(report["rows"][0]))
    with pytest.raises(SchemaError, match="twice"):
        schema.check_report(report)
    del report["driver"]
    with pytest.raises(SchemaError, match="lacks driver"):
        schema.check_report(report)


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        results.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_store_survives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("rubbish")
    Store(path, HEADER).add("row", key="one", row={}, detail={})
    with path.open("a") as file:
        file.write('{"kind": "row", "key": "tw')
    again = Store(path, HEADER)
    assert set(again.settled()) == {"one"}
    again.add("error", key="three", impl="peft", what="w", reason="r")
    assert set(Store(path, HEADER).settled()) == {"one", "three"}
    assert again.message is None


@pytest.mark.parametrize("field", ["device", "source", "torch"])
def test_the_store_starts_afresh_for_another_source(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.jsonl"
    Store(path, HEADER).add("row", key="one", row={}, detail={})
    other = Store(path, HEADER | {field: "other"})
    assert not other.settled()
    assert field in (other.message or "")
    assert (tmp_path / "a.old.jsonl").exists()


def test_another_commit_of_the_same_source_goes_on(tmp_path: Path) -> None:
    """A finished run rewrites tracked results, and they are committed: the rows stay what they are."""
    path = tmp_path / "a.jsonl"
    Store(path, HEADER).add("row", key="one", row={}, detail={})
    again = Store(path, HEADER | {"commit": "c-dirty"})
    assert set(again.settled()) == {"one"}
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
    monkeypatch.setattr(store, "ROOT", tmp_path)
    clean = store.commit()
    assert clean
    for name in ("README.md", "benchmarks/results/cpu.json", "untracked"):
        (tmp_path / name).write_text("after")
    assert store.commit() == clean
    (tmp_path / "code.py").write_text("after")
    assert store.commit() == f"{clean}-dirty"


@pytest.mark.parametrize("page", pages.PARTS, ids=lambda page: page.name)
def test_the_pages_show_the_committed_results(page: Path) -> None:
    assert page.read_text() == pages.expected(page), "run python -m benchmarks.pages"


def test_a_page_with_a_gpu_result(tmp_path: Path) -> None:
    assert "≤ 1.08" in pages.gpu_text(tmp_path)  # the targets alone
    (tmp_path / "h100.json").write_text(json.dumps(made.report()))
    (tmp_path / "h100_by_m.png").write_bytes(b"")
    text = pages.gpu_text(tmp_path)
    for part in ("NVIDIA H100 80GB HBM3", "580.1", "0123456789ab", "1.050", "≤ 1.08", "h100_by_m.png", "h100.md"):
        assert part in text
    assert "h100_roofline.png" not in text
    assert "Not measured yet" in pages.peft_text(tmp_path)


def test_a_card_that_measured_everything(tmp_path: Path) -> None:
    """Every row of the battery once: the schema takes it, and no cell of the targets is empty."""
    whole = made.found()
    rows: dict[str, dict[str, Any]] = {}
    for stage in cases.gpu_stages():
        for group in stage.groups:
            for entry, direction, mode in group.rows():
                detail = {"bias": entry.bias, "decode": entry.decode, "launches_fwd": 2, "over_frozen": 1.1}
                detail |= {"over_frozen_p20": 1.0, "over_frozen_p80": 1.2, "copy_gbps": 3000.0}
                line = {"stage": stage.name, "row": made.row(entry, 1.0, mode, direction), "detail": detail}
                rows.setdefault(cases.row_key(entry, direction, mode), line)
    shares = [{"shape": "q", "form": form, "backend": backend, "mode": mode, "median_ms": 0.1, "of_copy": 0.9}
              for form in FORM_NAMES for backend in ("cuda", "triton") for mode in cases.MODES]  # fmt: skip
    whole["rows"] = list(rows.values())
    whole["notes"] |= {"dequantizing": {"r": 16, "rows": shares}}
    results.write_json(tmp_path / "h100.json", results.by_schema(whole))
    results.write_json(tmp_path / "h100_detail.json", whole)
    for targets in (LAYERS, QUANTIZED, SIBLINGS[:4]):
        for target in targets:
            assert None not in [target.measure(whole, mode) for mode in cases.MODES], target.label
            assert target.beside is None or target.beside(whole, "eager") == pytest.approx(1.0)
    assert "| 1.100 " in pages.gpu_text(tmp_path)
    text = tables.markdown(whole, {})
    for part in ("## Targets", "## Layers with one input", "M=2048: forward + backward", "M=32", "gate, up: forward"):
        assert part in text
    assert {r: at.median for r, at in plots.series(whole, "r")["lora", "ours"].items()} == pytest.approx(
        {8: 1.1, 16: 1.1, 64: 1.1}
    )


def test_what_is_not_measured_again_stays() -> None:
    """A stage alone goes into the file of an earlier run."""
    old = made.found(*made.seven("frozen", "eager", 8192, 1.0), merging={"was": 1}, growth={"was": 1})
    for line in old["rows"]:
        line["stage"] = "target"
    old["rows"][0]["stage"] = "groups"
    new = {
        **made.found(made.row(cases.Entry("frozen", "eager", 4, 2, 2))),
        "models": [],
        "errors": [],
        "unavailable": {"bnb": "is not installed"},
    }
    new["rows"][0]["stage"], new["notes"] = "groups", {"merging": {"is": 1}, "ceilings": {}}
    both = results.merged(old, new)
    assert [line["stage"] for line in both["rows"]] == ["target"] * 6 + ["groups"]
    assert both["notes"] == {**old["notes"], "merging": {"is": 1}}
    assert both["models"] == old["models"]
    assert both["header"] == old["header"]
    slow, fast = ({"ceilings": {"tflops": rate, "gbps": 3.0}} for rate in (0.2, 0.4))
    for one, other in ((slow, fast), (fast, slow)):
        assert results.merged(old | {"notes": one}, new | {"notes": other})["notes"] == fast
    assert both["unavailable"] == {"unsloth": "unsloth is not installed", "bnb": "is not installed"}


def test_pictures_need_all_seven(tmp_path: Path) -> None:
    rows = made.seven("frozen", "eager", 8192, 1.0) + made.seven("frozen", "eager", 512, 0.5)
    rows += made.seven("lora", "ours", 8192, 1.1) + made.seven("lora", "ours", 512, 0.6)[:6]
    points = plots.series(made.found(*rows), "m")["lora", "ours"]
    assert {m: at.median for m, at in points.items()} == {8192: pytest.approx(1.1)}
    whole = made.found(*rows)
    whole["models"][0]["detail"] = {"layers": 1}
    whole["models"][0]["row"]["case"] = "lora"
    shares = {"size": 1e-3, "ours_share": 1.0, "plain_share": 0.2}
    whole["notes"]["small_adapters"] = {"rows": [{"dtype": "bf16", "support": "A vector", "tensor": "y", **shares}]}
    assert {name.partition("_")[2] for name in plots.draw_all(whole, tmp_path, "h100")} == {
        "roofline.png", "saved.png", "growth.png", "small_adapters.png"
    }  # fmt: skip


def test_paragraphs_are_wrapped() -> None:
    text = " ".join(f"word{i} `some code of {i}`" for i in range(40))
    lines = pages.wrapped(text).split("\n")
    assert " ".join(lines) == text
    assert max(map(len, lines)) <= pages.WIDTH
    assert all(line.count("`") % 2 == 0 for line in lines)
    assert cells.table([{"a": None, "b": 1.23456, "c": True}]).split("\n")[2] == "| – | 1.235 | yes |"


def test_markers_must_stand_once() -> None:
    with pytest.raises(ValueError, match="gpu"):
        pages.replaced("no markers", {"gpu": ""})
