"""The commands from end to end: stages as processes that end in time and go on, files, how to go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made import STAGES, Quiet

from benchmarks import cases, devices, pages, report, schema
from benchmarks.measure import OUT_OF_TIME, Bench
from benchmarks.store import ROOT


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()


def test_a_stage_ends_in_time_and_goes_on(tmp_path: Path) -> None:
    """As processes of their own: one without time, then one that ends, then one that has nothing to do."""
    made = report.Report(Quiet(), "tiny", tmp_path, None, [STAGES["target"]], rounds=2)
    made.store()
    assert made._process(STAGES["target"], report.START_S / 60 - 0.01) == OUT_OF_TIME
    assert not made.store().of("row")
    assert not report.complete(STAGES["target"], made.store())
    assert made.run()
    store = made.store()
    assert report.complete(STAGES["target"], store)
    assert not store.of("error")
    assert {line["row"]["case"] for line in store.of("row")} >= {"frozen", "lora"}
    assert {line["stage"] for line in store.of("row")} == {"target"}
    assert store.note("stage target")["rounds"] == 2
    assert made.run()
    assert len(made.store().lines) == len(store.lines)
    names = {path.name for path in made.write()}
    assert {"tiny.json", "tiny.md", "tiny_roofline.png", "tiny_saved.png"} <= names
    assert "## Every row" in (tmp_path / "tiny.md").read_text()


def test_under_pytest_alone(tmp_path: Path) -> None:
    """The rows that are asked for, their table, and a second run that measures nothing."""
    asked = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--scale",
        "tiny",
        "--stage",
        "target",
        "--out",
        str(tmp_path),
    ]
    asked += ["-q", "-p", "no:cacheprovider", "-k", "frozen or vector-ours"]
    first, second = (subprocess.run(asked, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr
    lines = [json.loads(text) for text in (tmp_path / "tiny.stage.jsonl").read_text().splitlines()]
    assert [line["row"]["case"] for line in lines if line["kind"] == "row"] == ["frozen", "frozen", cases.FULL]


def test_a_card_gets_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path of a card, with a CPU in its place: tests, stages, result by the schema, Markdown, how to go on."""

    class Card(Quiet):
        def name(self) -> str:
            return "NVIDIA H100 80GB HBM3"

    def process(made: report.Report, one: cases.Stage, minutes: float) -> int:
        if one.name != "target":
            return OUT_OF_TIME
        bench = Bench(made.device, "cuda", made.store(), given_rounds=2)
        bench.ceilings()
        bench.group(one, one.groups[0])
        return 0

    monkeypatch.setattr(cases, "stages", lambda scale: cases.tiny_stages()[:2])
    monkeypatch.setattr(report.Report, "_process", process)
    passed = subprocess.CompletedProcess([], 0, stdout="...\n3 passed in 1 s\n")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda c, **k: passed if "pytest" in c else run(c, **k))
    monkeypatch.setattr(Card, "kind", "cuda")
    monkeypatch.setattr(Card, "torch_device", torch.device("cpu"))
    monkeypatch.setattr(devices, "get", lambda kind: Card())
    command(monkeypatch, "--device", "cuda", "--minutes", "5", "--out", str(tmp_path))
    shown = capsys.readouterr().out
    assert "3 passed" in shown
    assert "the same command goes on" in shown
    assert "python -m benchmarks.pages" in shown  # these are not the committed results
    result = json.loads((tmp_path / "h100.json").read_text())
    schema.check_report(result)
    assert result["device"] == "NVIDIA H100 80GB HBM3"
    assert {row["case"] for row in result["rows"]} >= {"frozen", "lora"}
    assert (
        sum(row["case"] == "frozen" for row in result["rows"]) == 1
    )  # with a bias too, but that is in the detail only
    assert "not reached" in result["unavailable"]["compile"]
    text = (tmp_path / "h100.md").read_text()
    assert "## Targets" in text
    assert "pytest -m gpu" in text
    detail = json.loads((tmp_path / "h100_detail.json").read_text())
    assert detail["notes"]["tests"]["result"].startswith("exit code 0")
    assert sum(line["row"]["case"] == "frozen" for line in detail["rows"]) == 2


def test_no_time_says_so(tmp_path: Path) -> None:
    made = report.Report(Quiet(), "tiny", tmp_path, 0.1, list(STAGES.values()))
    assert not made.run()
    assert not made.store().of("row")
    assert not made.write()


@pytest.mark.parametrize(
    ("scale", "name", "differs"),
    [("tiny", "tiny.json", "device"), ("cuda", "h100_detail.json", "device"), ("cuda", "h100_detail.json", "source"),
     ("cuda", "h100.json", "commit")],
)  # fmt: skip
def test_figures_of_another_run_are_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scale: str, name: str,
    differs: str,
) -> None:  # fmt: skip
    """They are neither lost nor mixed with those of this one, and the same run goes on over its own."""
    monkeypatch.setattr(Quiet, "name", lambda self: "NVIDIA H100 80GB HBM3")
    device = Quiet()
    monkeypatch.setattr(device, "kind", "cuda" if scale == "cuda" else "cpu")
    made = report.Report(device, scale, tmp_path, None, [])
    bench = Bench(Quiet(), scale, made.store(), given_rounds=2)
    bench.ceilings()
    bench.group(STAGES["target"], STAGES["target"].groups[0])
    made.write()
    made.write()
    assert not list(tmp_path.glob("*.old"))
    path = tmp_path / name
    old = json.loads(path.read_text())
    old.get("header", old)[differs] = "another"
    path.write_text(json.dumps(old))
    written = made.write()
    assert f"{name} has figures of another {differs}; the old is {name}.old" in capsys.readouterr().out
    assert json.loads((tmp_path / f"{name}.old").read_text()) == old
    assert "another" not in path.read_text()
    assert [one.suffix for one in written if one.suffix == ".old"] == []


def test_without_figures_nothing_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the pages are rewritten of the committed results alone."""
    updates: list[bool] = []
    monkeypatch.setattr(pages, "update", lambda: updates.append(True) or [])
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    (tmp_path / "cpu.json").write_text('{"header": {"device": "another"}, "notes": {}}')
    before = (tmp_path / "cpu.json").read_bytes()
    command(monkeypatch, "--device", "cpu", "--minutes", "0.1", "--out", str(tmp_path))
    assert (tmp_path / "cpu.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "cpu.stage.jsonl"}
    assert not updates
    monkeypatch.setattr(report.Report, "write", lambda made: [made.path])
    for folder, expected in ((tmp_path / "elsewhere", []), (tmp_path, [True])):
        command(monkeypatch, "--device", "cpu", "--minutes", "0.1", "--out", str(folder))
        assert updates == expected


def test_the_help_and_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command(monkeypatch, "--help")
    assert "--quick" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "--device", "cuda", "--out", str(tmp_path))
    error = capsys.readouterr().err
    assert "sees no CUDA device" in error
    assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="no such stage"):
        command(monkeypatch, "--device", "cpu", "--stages", "nothing", "--out", str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):  # tried before anything is measured
        command(monkeypatch, "--device", "cpu", "--out", str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
