"""First light without a card: limits and logs of steps, what its steps are, and what a kill leaves of a measurement."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import made
import pytest

from benchmarks import bench_routed, cases, devices, first_light, report, steps, tables, warm_cache
from benchmarks.steps import Run, Step
from benchmarks.store import ROOT

TALKS = "import time; print('begun'); time.sleep(60)"


def test_steps_have_limits_and_their_output_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs, with a child that hangs too; what fills the cache, and what misses; what fails; no time."""
    monkeypatch.setattr(steps, "LEAST_S", 2.0)
    said: list[str] = []
    run = Run(tmp_path / "out", 0.08, tmp_path / "cache", say=said.append)
    entry = "import pathlib; p = pathlib.Path({0!r}, {1!r}); p.mkdir(parents=True); (p / {2!r}).touch()"
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    cache = str(run.cache)
    run.run([
        Step("hangs", 1.0, ["-c", f"{child}; {TALKS}"]),
        Step("fills", 9.0, ["-c", entry.format(cache, "A", "_x_kernel.cubin")], fills=True),
        Step("compiles", 9.0, ["-c", entry.format(cache, "B", "_dy_kernel.cubin")]),
        Step("module", 9.0, ["-c", entry.format(cache, "C", "direct.cpython-312-x86_64-linux-gnu.so")]),
        Step("fails", 9.0, ["1"], ["false"]),
        Step("cut short", 60.0, ["-c", "import time; time.sleep(60)"]),
        Step("too late", 9.0, ["-c", ""]),
    ])  # fmt: skip
    run.summary()
    assert [one.code for one in run.ended] == [None, 0, 0, 0, 1, None]
    assert [one.compiled for one in run.ended] == [[], [], ["_dy_kernel"], ["direct"], [], []]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "hangs: stopped at its limit" in log
    pid, begun = log.splitlines()[1:3]
    assert begun == "begun"
    assert not Path("/proc", pid).exists() or "zombie" in Path("/proc", pid, "status").read_text()
    assert "not begun, the time was up: too late" in log
    assert "compiled: 2 (_dy_kernel, direct)" in log.splitlines()[-1]
    assert "begun" in "\n".join(said)


def test_a_step_beside_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path, 1.0, tmp_path / "cache", say=lambda text: None)
    run.beside(Step("builds", 9.0, ["-c", "print('built')"]))
    run.run([Step("another", 9.0, ["-c", "print('done')"])])
    run.join()
    run.join()
    assert [(one.name, one.code) for one in run.ended] == [("another", 0), ("builds", 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert "built" in (tmp_path / "log.txt").read_text()


def test_what_is_told_to_stop_says_what_there_is(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from benchmarks import steps
steps.end_on_sigterm()
run = steps.Run(Path({str(tmp_path)!r}), 5.0, Path({str(tmp_path)!r}, "cache"))
try:
    run.run([steps.Step("hangs", 60.0, ["-c", {TALKS!r}])])
finally:
    run.summary()
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "log.txt"
    until(lambda: log.exists() and "begun" in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert "in all," in log.read_text()


def test_what_a_kill_leaves_of_a_battery_becomes_its_files(tmp_path: Path) -> None:
    """Rows that were measured are in the files, though their process was killed while it wrote a line."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--scale", "tiny"]
    process = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    path = tmp_path / "tiny.stage.jsonl"
    until(lambda: path.exists() and '"kind": "row"' in path.read_text())
    process.kill()
    process.wait()
    with path.open("a") as file:
        file.write('{"kind": "row", "key": ')
    left = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    again = report.Report(devices.get("cpu"), "tiny", tmp_path, None, [], pictures=False)
    assert {"tiny.json", "tiny.md"} <= {one.name for one in again.write()}
    rows = [line["row"] for line in left if line["kind"] == "row"]
    assert rows
    assert [line["row"] for line in json.loads((tmp_path / "tiny.json").read_text())["rows"]] == rows


def until(holds, seconds: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_steps_are_what_there_is() -> None:
    """Stages by their names, every test file of the card's, and tests by words that stand in their names."""
    listed = first_light.first(Path("out"), 4)
    names = [step.name for step in listed]
    assert len(names) == len(set(names))
    assert names[:3] == ["one layer", "right", "headline"]
    for stage in first_light.STAGES:
        assert cases.find("cuda", stage).name == stage
        assert any(stage in step.command for step in listed)
    assert {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")} < {*names}
    assert {"tests/csrc/test_gpu_csrc.py", "tests/glora/test_fused.py", "tests/depth/test_over_depth.py"} < {*names}
    tree = ast.parse((ROOT / "tests" / "gpu" / "test_gpu.py").read_text())
    tests = " ".join(node.name for node in tree.body if isinstance(node, ast.FunctionDef))
    words = set(first_light.RIGHT.split()) - {"and", "or", "dtype1", "dtype2"}
    assert all(word in tests for word in words)
    assert sum(step.seconds for step in listed[:3]) < 6 * 60
    with pytest.raises(SystemExit, match="no 'nothing'; there are 'one layer'"):
        first_light.pick(listed, ["nothing"])
    assert [step.name for step in first_light.pick(listed, ["routes", "right"])] == ["right", "routes"]


def test_what_is_profiled_is_the_layer_that_costs_most(tmp_path: Path) -> None:
    assert first_light.worst(tmp_path, "h100") == ("lora", 8192, *cases.LLAMA["gate"])
    plain = {
        "impl": "ours",
        "pass": "fwd_bwd",
        "mode": "graph",
        "p": 0.0,
        "m": 2048,
        "n": 1024,
        "k": 4096,
        "layer": "k",
    }
    lines = [
        {"row": {**plain, "case": case, **more}, "detail": {"over_frozen": over}}
        for case, over, more in (("lora", 1.1, {}), (cases.FULL, 1.3, {"m": 512}), ("nf4-lora", 1.9, {}),
                                 ("lora", 2.0, {"mode": "eager"}), ("lora", 2.0, {"p": 0.1}),
                                 ("frozen", 3.0, {"impl": "eager"}))
    ]  # fmt: skip
    (tmp_path / "h100_detail.json").write_text(json.dumps({"rows": lines}))
    assert first_light.worst(tmp_path, "h100") == (cases.FULL, 512, 1024, 4096)


def test_a_call_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is beside the others ends before times are taken; the tables come last, also where a step fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["first-light", "--out", "out", "--cache", "cache", "--warm", "warm"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    talks = [Step(name, 20, ["-c", f"print({name!r}, 'ran')"]) for name in ("one layer", "headline")]
    monkeypatch.setattr(first_light, "first", lambda out, processes: [*talks, Step("fails", 20, ["-c", "1 / 0"])])
    monkeypatch.setattr(first_light, "CSRC", Step("csrc", 20, ["-c", "import time; time.sleep(1); print('built')"]))
    monkeypatch.setattr(first_light, "prepared", lambda warm, cache: [])
    monkeypatch.setattr(first_light, "report", lambda name, seconds, out, *stages, shows: Step(name, 20, ["-c", ""]))
    before = signal.getsignal(signal.SIGTERM)
    try:
        first_light.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    log = (tmp_path / "out" / "first-light.log").read_text()
    heads = [line.split(" (")[0].split(",")[0] for line in log.splitlines() if line.startswith("==== ")]
    assert heads == ["==== one layer", "==== csrc", "==== headline", "==== fails", "==== tables"]
    assert "ZeroDivisionError" in log
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"first-light.log", "clocks.csv"}


def test_a_row_of_adapters_and_one_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = made.bench(tmp_path, given_rounds=2)
    bench_routed.test_adapters(bench)
    bench_routed.test_experts(bench)
    notes = bench.store.notes()
    assert [row["pass"] for row in notes["experts"]["rows"]] == ["fwd", "fwd_bwd"]
    assert all(row["over_base"] > 0 for row in notes["experts"]["rows"])
    assert [row["rows"] for row in notes["adapters"]["rows"]] == [2, 2]
    shown = "\n".join(block for name in ("Several adapters, one size", "Experts")
                      for block in tables.SECTIONS[name]({"notes": notes}, True))  # fmt: skip
    assert "3 experts of 24x16, 2 of them for each of 8 tokens" in shown
    assert "--stages routed" in shown
    ours = bench_routed.expert_glora_linear
    monkeypatch.setattr(bench_routed, "expert_glora_linear", lambda *args, **given: 1.01 * ours(*args, **given))
    with pytest.raises(AssertionError, match="experts: y is off"):
        bench_routed.experts(bench_routed.EXPERTS["tiny"], bench)


@pytest.mark.parametrize(
    ("triton", "name", "wrong"),
    [("0.1", "0/k.cubin", "made with Triton 0.1, and here is "), (None, "../k.cubin", "no file of a kernel")],
)
def test_an_archive_that_does_not_fit_is_refused(tmp_path: Path, triton: str | None, name: str, wrong: str) -> None:
    manifest = {"triton": triton or importlib.metadata.version("triton"), "kernels": ["rest"], "modules": []}
    archive, cache = tmp_path / "a.tar.xz", tmp_path / "cache"
    with tarfile.open(archive, "w:xz") as tar:
        warm_cache._add(tar, "manifest.json", json.dumps(manifest).encode())
        warm_cache._add(tar, name, b"code")
    with pytest.raises(ValueError, match=wrong):
        warm_cache.unpack(archive, cache)
    assert not cache.exists()


def test_it_wants_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["first-light", "--out", "out", "--cache", "cache"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="PyTorch sees none here"):
            first_light.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list((tmp_path / "out").iterdir())
