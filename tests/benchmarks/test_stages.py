"""The staged battery from end to end on a CPU with tiny shapes: interrupted, resumed, assembled, drawn."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import assemble, battery, devices, model, plots, report, runner, schema, sections, stage, surroundings
from benchmarks.battery import Entry, Group
from benchmarks.cases import Contestant
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.store import Store

RATES = Ceilings(0.1, 10.0)


class Quiet(Device):
    """A CPU whose ceilings are known and whose regions are short."""

    region_s = 0.0

    def ceilings(self) -> Ceilings:
        return RATES


def new_store(folder: Path) -> Store:
    return Store(folder / "tiny.stage.jsonl", surroundings.header(Quiet(), "tiny"))


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = battery.tiny_stages()
    whole = Group((*first.groups[0].entries, *second.groups[0].entries[:0]))
    assert whole.entries
    lines: list[str] = []
    time = runner._time
    monkeypatch.setattr(runner, "_time", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # what a kill leaves: a group begun and not ended
        stage.run(first, "tiny", Quiet(), new_store(tmp_path), 1.0, 2, lines.append)
    monkeypatch.setattr(runner, "_time", time)
    assert not stage.complete(first, new_store(tmp_path), "tiny")
    assert stage.run(first, "tiny", Quiet(), new_store(tmp_path), 1.0, 2, lines.append) == stage.DONE
    store = new_store(tmp_path)
    assert stage.complete(first, store, "tiny")
    assert not stage.complete(second, store, "tiny")
    count = len(store.lines)
    assert stage.run(first, "tiny", Quiet(), store, 1.0, 2, lines.append) == stage.DONE
    assert len(new_store(tmp_path).lines) == count  # nothing was measured twice
    assert stage.run(second, "tiny", Quiet(), store, 0.0, 2, lines.append) == stage.OUT_OF_TIME
    assert stage.run(second, "tiny", Quiet(), store, 1.0, 2, lines.append) == stage.DONE
    assert not store.of("error")
    schema.check_report(assemble.result(new_store(tmp_path)))
    rows = [line["row"] for line in assemble.row_lines(store)]
    assert {row["m"] for row in rows} == {8, 16}
    assert sum(row["case"] == "frozen" for row in rows) == 2  # with a bias too, but that is in the detail only
    assert sum(line["detail"]["bias"] for line in store.of("row") if line["row"]["case"] == "frozen") == 2
    ours = next(row for row in rows if row["case"] == "lora" and row["p"] == 0.0 and row["m"] == 8)
    assert ours["saved_bytes"] == 8 * 2 * 4  # h
    assert 0 < ours["max_rel_err"] < 1e-5


def test_the_command_makes_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage as a process of its own, the model in this one, then the files and pictures from what they left."""
    made = report.Report(Quiet(), "tiny", tmp_path, chosen=["target"], rounds=2)
    assert made.run_stages()
    monkeypatch.setattr(model, "CONTESTANTS", [c for c in model.CONTESTANTS if c[1] != "peft"])
    assert stage.run(stage.find("tiny", "model"), "tiny", Quiet(), made.store(), 1.0, 3, print) == stage.DONE
    store = made.store()
    assert not store.of("error")
    assert {line["row"]["impl"] for line in store.of("model")} == {"eager", "ours"}
    pictures = made.pictures("tiny")
    text = assemble.markdown(store, pictures)
    assert "## Every layer" in text
    assert "## Decoder layers" in text
    if importlib.util.find_spec("matplotlib"):
        assert {"tiny_roofline.png", "tiny_saved.png", "tiny_growth.png"} <= set(pictures)
        assert all((tmp_path / name).stat().st_size > 1000 for name in pictures)
    json.dumps(assemble.detail(store), allow_nan=False)


def test_a_card_gets_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path of a card, with a CPU in its place: tests, stages, result by the schema, Markdown, how to go on."""

    class Card(Quiet):
        def name(self) -> str:
            return "NVIDIA H100 80GB HBM3"

    def process(made: report.Report, one: battery.Stage, minutes: float) -> int:
        return stage.run(one, "cuda", made.device, made.store(), minutes if one.name == "target" else 0.0, 2, print)

    first = battery.tiny_stages()[:2]
    monkeypatch.setattr(battery, "stages", lambda scale: first)
    monkeypatch.setattr(report.Report, "_process", process)
    passed = subprocess.CompletedProcess([], 0, stdout="...\n3 passed in 1 s\n")
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda c, **k: passed if "pytest" in c else run(c, **k))
    monkeypatch.setattr(sys, "argv", ["report", "--device", "cuda", "--minutes", "5", "--out", str(tmp_path)])
    monkeypatch.setattr(devices, "get", lambda kind: Card())
    monkeypatch.setattr(Card, "kind", "cuda")
    monkeypatch.setattr(Card, "torch_device", torch.device("cpu"))
    report.main()
    shown = capsys.readouterr().out
    assert "3 passed" in shown
    assert "the same command goes on" in shown
    assert "python -m benchmarks.readme" in shown  # these are not the committed results
    result = json.loads((tmp_path / "h100.json").read_text())
    schema.check_report(result)
    assert result["device"] == "NVIDIA H100 80GB HBM3"
    assert {row["case"] for row in result["rows"]} >= {"frozen", "lora"}
    assert "not reached" in result["unavailable"]["compile"]
    text = (tmp_path / "h100.md").read_text()
    assert "## Targets" in text
    assert "pytest -m gpu" in text
    assert json.loads((tmp_path / "h100_detail.json").read_text())["tests"]["result"].startswith("exit code 0")


def test_no_time_says_so(tmp_path: Path) -> None:
    made = report.Report(Quiet(), "tiny", tmp_path, minutes=0.1)
    assert not made.run_stages()
    assert not made.store().of("row")


def test_stages_by_name_and_number() -> None:
    assert stage.find("cuda", "target") == stage.find("cuda", "0")
    with pytest.raises(SystemExit, match="no such stage"):
        stage.find("cuda", "nothing")


def test_a_wrong_contestant_gets_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = battery.tiny_stages()[0].groups[0]
    build = runner.peers.build

    def wrong(entry: Entry, problem: Any) -> Contestant:
        found = build(entry, problem)
        if entry.case == battery.VECTOR_LORA:
            right = found.forward
            found.forward = lambda x: right(x) * 1.001
        if entry.case == battery.FULL:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nsome")
        return found

    monkeypatch.setattr(runner.peers, "build", wrong)
    store = new_store(tmp_path)
    runner.run_group(group, Quiet(), RATES, store, 2, lambda text: None)
    cases = {line["row"]["case"] for line in store.of("row")}
    assert cases == {"frozen", "lora"}
    reasons = {error["what"].split(" (")[0]: error["reason"] for error in assemble.errors(store)}
    assert "AssertionError" in reasons[battery.VECTOR_LORA]
    assert reasons[battery.FULL].startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate some")
    assert stage.complete(battery.Stage("s", "t", (group,)), store, "tiny")  # settled: it is not tried again


def test_a_lost_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Quiet):
        def healthy(self) -> bool:
            return False

    def lost(entry: Entry, problem: Any) -> Contestant:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(runner.peers, "build", lost)
    store = new_store(tmp_path)
    assert stage.run(battery.tiny_stages()[0], "tiny", Dead(), store, 1.0, 2, print) == stage.DEVICE_LOST
    assert len(store.of("error")) == 1
    assert "illegal memory access" in store.of("error")[0]["reason"]


def test_dropout_of_ours_is_checked_under_its_own_mask() -> None:
    entry = Entry("lora", "ours", 16, 24, 16, 2, 0.5, dtype="fp32")
    group = Group((Entry("frozen", "eager", 16, 24, 16, dtype="fp32"), entry), modes=("eager",))
    values = runner.make_values(group, Quiet())
    found = runner.check_entry(entry, values)
    assert found.max_rel_err < 1e-5
    with pytest.raises(AssertionError, match="is off by"):
        runner.cases.check(found.contestant, values.of(entry))  # without the mask it is another function


def test_a_forgotten_row_is_timed_beside_its_frozen_layer(tmp_path: Path) -> None:
    group = battery.tiny_stages()[0].groups[0]
    store = new_store(tmp_path)
    frozen = Group(group.entries[:1], modes=("eager",))
    runner.run_group(frozen, Quiet(), RATES, store, 2, lambda text: None)
    runner.run_group(group, Quiet(), RATES, store, 2, lambda text: None)
    keys = [line["key"] for line in store.of("row")]
    assert len(keys) == len(set(keys))
    assert all(line["detail"]["over_frozen"] > 0 for line in store.of("row"))


def test_series_over_frozen_need_all_seven() -> None:
    from rows import seven

    def lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"row": row, "detail": {}} for row in rows]

    some = seven("frozen", "eager", 8192, 1.0) + seven("frozen", "eager", 512, 0.5) + seven("lora", "ours", 8192, 1.1)
    found = plots.over_frozen(lines(some + seven("lora", "ours", 512, 0.6)[:6]), "m")
    assert found["lora", "ours"] == {8192: pytest.approx(1.1)}
    assert 512 not in found["lora", "ours"]


def test_no_card_is_an_error_with_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert devices.get("auto").kind == "cpu"
    with pytest.raises(RuntimeError, match="--device cpu"):
        devices.get("cuda")
    with pytest.raises(ValueError, match="graph"):
        devices.get("cpu").prepare([lambda: None], "graph")


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    report.main()


def test_the_command_without_a_card_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "--device", "cuda", "--out", str(tmp_path))
    error = capsys.readouterr().err
    assert "sees no CUDA device" in error
    assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "--device", "cpu", "--stages", "target", "--rounds", "3", "--out", str(tmp_path))
    assert "--stages and --rounds" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_cpu_out_of_time_between_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A section that took all the time is kept, and no later one begins."""
    clock = [0.0]

    def slow() -> dict[str, Any]:
        clock[0] += 1e3
        return {"there": True}

    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    names = list(sections.SECTIONS)
    monkeypatch.setattr(sections, "SECTIONS", {name: (name, SimpleNamespace(show=str)) for name in names})
    monkeypatch.setattr(sections, "measurements", lambda quick: dict.fromkeys(names, slow))
    command(monkeypatch, "--device", "cpu", "--minutes", "5", "--out", str(tmp_path))
    shown = capsys.readouterr().out
    assert "the same command goes on" in shown
    assert "README.md" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.stage.jsonl"]
    notes = Store(tmp_path / "cpu.stage.jsonl", surroundings.header(devices.get("cpu"), "cpu")).of("note")
    assert [note["name"] for note in notes] == [f"section {names[0]} False"]


def test_the_readme_is_rewritten_from_the_committed_results_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    updates: list[bool] = []
    monkeypatch.setattr(report.readme, "update", lambda: updates.append(True) or True)
    report._tell_readme(tmp_path)
    assert not updates
    assert "python -m benchmarks.readme" in capsys.readouterr().out
    report._tell_readme(report.RESULTS)
    assert updates == [True]
    assert "rewritten" in capsys.readouterr().out


def test_the_help_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--help"])
    with pytest.raises(SystemExit, match="0"):
        report.main()
    assert "--quick" in capsys.readouterr().out
