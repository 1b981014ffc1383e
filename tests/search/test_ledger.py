"""The ledger: a search cut off at any byte ends as if it had not been; what is foreign or damaged is refused."""

import json
import multiprocessing
import os
import random
import re
import signal
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
from fake_net import SMALL, FakeNet, evaluate, score_of
from helpers import EVERYTHING, interrupted
from search_worker import ARGUMENTS, search
from two_processes import needs_distributed, run_two

import glora_kernels as gk

WORKER = Path(__file__).with_name("search_worker.py")


def run(path, **others):
    made = search(path, **others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of scores that are NaN and candidates that fail, on purpose
        made.run(progress=False)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "search.jsonl"
    run(path)
    return path.read_bytes()


def test_equal_searches_have_equal_ledgers(whole, tmp_path):
    run(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    assert run(None).table() == run(tmp_path / "again.jsonl").table()
    kinds = {("failed" in line, line.get("score") == "nan") for line in map(json.loads, whole.splitlines()[1:])}
    assert kinds == {(True, False), (False, True), (False, False)}


def test_cut_at_every_byte_a_search_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    path = tmp_path / "search.jsonl"

    def run_small():
        small = gk.Search(FakeNet(2), evaluate, path=path, max_parameters=30, population=3, generations=1)
        small.run(progress=False)

    run_small()
    whole = path.read_bytes()
    assert whole.count(b"\n") == 7
    header = whole.index(b"\n")
    for place in (*range(0, header, 9), *range(header, len(whole))):
        path.write_bytes(whole[:place])
        run_small()
        assert path.read_bytes() == whole, f"cut at byte {place}"


def test_a_resumed_search_evaluates_nothing_twice(whole, tmp_path):
    path = tmp_path / "search.jsonl"
    path.write_bytes(whole)
    assert run(path)._net.used == []
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:12]) + lines[12][:9])
    resumed = run(path)
    assert len(resumed._net.used) == len(lines) - 12
    assert resumed.best == run(None).best


def test_a_search_can_be_made_longer(whole, tmp_path):
    path = tmp_path / "search.jsonl"
    run(path, generations=1)
    assert whole.startswith(path.read_bytes())
    run(path)
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="beyond the last of generations=1"):
        search(path, generations=1)


def test_ask_and_tell_out_of_order_resume(tmp_path):
    path = tmp_path / "search.jsonl"
    first = search(path, None)
    asked = first.ask(7)
    first.tell(asked[4:], map(score_of, asked[4:]))
    second = search(path, None)
    assert [done.child for done in second.finished] == [4, 5, 6]
    left = second.ask(20)
    assert left[:4] == asked[:4]
    second.tell(left, map(score_of, left))
    assert search(path, None).ask(1) == second.ask(1) != []


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_sigkill_at_random_moments(whole, tmp_path):
    path = tmp_path / "search.jsonl"
    rng = random.Random(0)
    ends = []
    for _ in range(60):
        process = multiprocessing.get_context("fork").Process(target=run, args=(path,))
        process.start()
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.join()
        ends.append(process.exitcode)
    assert ends.count(-signal.SIGKILL) >= 5, "it was over before it was killed"
    run(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"minimize": True}, "direction is 'maximize' there, 'minimize' here"),
        ({"max_parameters": 91}, "max_parameters is 90 there, 91 here"),
        ({"mutation": 0.25}, r"recipe\['mutation'\] is 0.2 there, 0.25 here"),
        ({"start": []}, r"start is \[.* there, \[\] here"),
    ],
)
def test_the_ledger_of_another_search_is_refused(whole, tmp_path, others, words):
    path = tmp_path / "search.jsonl"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"is that of another search: {words}"):
        search(path, **others)
    assert path.read_bytes() == whole


def test_the_ledger_of_another_net_is_refused(whole, tmp_path):
    path = tmp_path / "search.jsonl"
    path.write_bytes(whole)
    wide = FakeNet(5)
    wide.shapes["blocks.0.fc"] = wide.shapes["blocks.0.fc"]._replace(out_features=70)
    for net, words in [
        (FakeNet(5, print_of="other"), "fingerprint is 'trained' there, 'other' here"),
        (FakeNet(4), r"layers['blocks.2.proj'] is {"),
        (wide, "layers['blocks.0.fc']['shape'] is [7, 7, True] there, [7, 70, True] here"),
        (FakeNet(5, gk.SearchSpace(ranks=(1, 2))), "layers['blocks.0.proj']['space']['A'] is ['none', 'vector'] there"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            gk.Search(
                net, path=path, **ARGUMENTS | {"start": [{"*": None, "blocks.0.fc": gk.GLoRAConfig("vector", "none")}]}
            )
    assert path.read_bytes() == whole
    assert SMALL in FakeNet(5).spaces.values()


def test_files_that_are_no_ledger_are_left_alone(whole, tmp_path):
    path = tmp_path / "notes.txt"
    header = json.loads(whole.splitlines()[0])
    for content, words in [
        (b"my notes", "is no ledger of a search; it was left as it is"),
        (b"my notes\n", "is no ledger of a search: "),
        (b"{}\n", "its first line lacks format="),
        (b"\xff\xfe\n", "is no ledger of a search: "),
        (json.dumps(header | {"format_version": 2}).encode() + b"\n", "has format version 2; this library reads 1"),
        (whole[40:], "is no ledger"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(words)):
            search(path)
        assert path.read_bytes() == content
    with pytest.raises(FileNotFoundError):
        search(tmp_path / "nowhere" / "search.jsonl")
    with pytest.raises(IsADirectoryError):
        search(tmp_path)


def test_a_changed_byte_is_found(whole, tmp_path):
    path = tmp_path / "search.jsonl"
    rng = random.Random(1)
    places = {rng.randrange(len(whole)) for _ in range(150)} | {i for i, b in enumerate(whole[:-1]) if b == ord("\n")}
    for place in sorted(places - {len(whole) - 1}):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(7)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            search(path)
        assert path.read_bytes() == damaged


def test_moved_lost_and_doubled_lines_are_found(whole, tmp_path):
    path = tmp_path / "search.jsonl"
    lines = whole.splitlines(keepends=True)
    for order, line in [([0, 2, 1], 2), ([0, 2, 3], 2), ([0, 1, 1], 3), ([0, 1, 2, 0], 4)]:
        path.write_bytes(b"".join(lines[i] for i in order))
        with pytest.raises(ValueError, match=f"is damaged: line {line} does not match its check"):
            search(path)


def test_a_forged_line_is_compared_with_what_the_search_draws(tmp_path):
    made = search(tmp_path / "search.jsonl")
    made.tell(made.ask(1), [1.0])
    true = json.loads((tmp_path / "search.jsonl").read_bytes().splitlines()[1])
    del true["check"]
    other = dict(true["candidate"])
    other["blocks.0.fc"] = ["none", "lora", "none", "none", "none", 2]
    for i, (change, words) in enumerate([
        ({"candidate": other}, "is not what this search draws: candidate['blocks.0.fc'] is ['none', 'lora'"),
        ({"child": 99}, "has no child that generation 0 waits for"),
        ({"generation": 1}, "is not what this search draws: generation is 1 there, 0 here"),
        ({"parameters": 1}, "parameters is 1 there"),
        ({"score": None}, "has no score: "),
        ({"score": "high"}, "has no score: "),
        ({"failed": "why", "more": 1}, "is not what this search draws"),
    ]):  # fmt: skip
        path = tmp_path / f"{i}.jsonl"
        search(path)._ledger.append(1, true | change)
        with pytest.raises(ValueError, match=re.escape(words)):
            search(path)


def test_two_searches_at_one_path_do_not_mix(tmp_path):
    one, two = search(tmp_path / "search.jsonl"), search(tmp_path / "search.jsonl")
    one.tell(one.ask(1), [1.0])
    before = (tmp_path / "search.jsonl").read_bytes()
    with pytest.raises(RuntimeError, match="was changed by another process"):
        two.tell(two.ask(1), [2.0])
    assert two.finished == []
    assert (tmp_path / "search.jsonl").read_bytes() == before
    (tmp_path / "search.jsonl").write_bytes(before[:50])
    with pytest.raises(RuntimeError, match="was changed by another process"):
        one.tell(one.ask(1), [2.0])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_line_that_cannot_be_flushed_is_written_later(whole, tmp_path, monkeypatch, error):
    path = tmp_path / "search.jsonl"
    flush, count = os.fsync, 0

    def failing(file):
        nonlocal count
        count += 1
        if count in (7, 8):
            raise error
        flush(file)

    made = search(path)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(type(error)):
        made.run(progress=False)
    assert len(made.finished) == 6
    with pytest.warns(UserWarning, match="NaN"):
        made.run(progress=False)
    assert path.read_bytes() == whole


def test_ctrl_c_at_any_line_loses_nothing_that_is_in_the_ledger(tmp_path):
    def made(name):
        start = [gk.GLoRAConfig("vector", "none"), gk.GLoRAConfig(rank=1)]
        return gk.Search(FakeNet(1), evaluate, path=tmp_path / name, start=start, population=2, generations=0)

    made("whole").run(progress=False)
    whole = (tmp_path / "whole").read_bytes()
    line = 1
    while interrupted(partial((search := made(str(line))).run, progress=False), line):
        path = tmp_path / str(line)
        assert path.read_bytes().count(b"\n") == 1 + len(search.finished), f"line {line}"
        search.run(progress=False)
        assert path.read_bytes() == whole, f"line {line}"
        line += 1 if EVERYTHING else 4
    assert line > 100


@needs_distributed
def test_two_processes_write_the_ledger_of_one(whole, tmp_path):
    run_two(WORKER, tmp_path, seconds=120)
    assert (tmp_path / "two.jsonl").read_bytes() == whole
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    run(tmp_path / "many1.jsonl", score=None, evaluate_many=lambda candidates: [score_of(c) for c in candidates])
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "many1.jsonl").read_bytes()
    stopped = search(tmp_path / "stopped1.jsonl", lambda model: 1 / 0, max_failures=4)
    with pytest.raises(RuntimeError, match="the last 4 candidates failed"):
        stopped.run(progress=False)
    assert (tmp_path / "stopped.jsonl").read_bytes() == (tmp_path / "stopped1.jsonl").read_bytes()
