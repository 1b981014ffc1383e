"""The examples of structure search: what they write, that their numbers agree, and how they answer bad arguments."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from types import ModuleType

import pytest
from example_scripts import EXAMPLES, NO_CARD, Finished, exit_code, finished, imported, needs

needs("sklearn", "matplotlib", "tqdm", "transformers")

SCRIPTS = {name: EXAMPLES / f"search_{name}.py" for name in ("digits", "text")}
WRITTEN = {
    "digits": ["teacher.png", "digits.png", "teacher-0.jsonl", "digits-0.jsonl", "tables.md"],
    "text": ["text.png", "text-0.jsonl", "tables.md"],
}


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    yield from imported(SCRIPTS["digits"])


@pytest.fixture(scope="module")
def study(digits: ModuleType) -> Iterator[ModuleType]:
    yield from imported(EXAMPLES / "search_study.py")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    out = tmp_path_factory.mktemp("search")
    return {name: finished(script, out / name, "--smoke") for name, script in SCRIPTS.items()}


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose first heading is `first`, headings included."""
    (block,) = re.findall(rf"^\| {first} .*\n(?:\|.*\n)+", text, re.MULTILINE)
    lines = [line for line in block.splitlines() if not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def runs_of(ran: dict[str, Finished]) -> dict[str, dict]:
    """The one run of every section in which something is searched, and of `sampling`."""
    sections = {
        name: ran["digits"].results[name]["runs"] for name in ("teacher", "comparison", "sampling")
    } | {"text": ran["text"].results["text"]["runs"]}  # fmt: skip
    assert all(len(runs) == 1 for runs in sections.values())
    return {name: runs[0] for name, runs in sections.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_files_are_written_and_named(name: str, ran: dict[str, Finished]) -> None:
    done = ran[name]
    for file in WRITTEN[name]:
        assert (done.out / file).stat().st_size > 100, file
        assert str(done.out / file) in done.process.stdout
        if file.endswith(".png"):
            assert (done.out / file).read_bytes().startswith(b"\x89PNG")
    assert (done.out / "tables.md").read_text().strip() in done.process.stdout
    assert done.results["machine"]["threads"] == 1
    assert {"device", "torch", "python", "glora_kernels"} <= done.results["machine"].keys()
    assert "100%" in done.process.stderr


def test_searched_candidates_keep_the_limit_and_ledgers_hold_every_evaluation(ran: dict[str, Finished]) -> None:
    runs = runs_of(ran)
    ledgers = {"teacher": ("digits", "teacher"), "comparison": ("digits", "digits"), "text": ("text", "text")}
    for section, (script, stem) in ledgers.items():
        run = runs[section]
        assert 0 < run["parameters"] <= run["limit"]
        assert run["candidate"]
        lines = (ran[script].out / f"{stem}-0.jsonl").read_text().splitlines()
        assert run["evaluations"] == len(lines) - 1
        assert run["inherited_best"] <= min(run["hand_picked"].values())
    assert runs["teacher"]["limit"] == 800
    assert runs["comparison"]["limit"] == 6912
    text = runs["text"]
    assert text["trainable"]["searched"] == text["parameters"]
    assert text["trainable"]["LoRA"] == text["limit"]
    assert all(count <= text["limit"] for count in text["trainable"].values())


def test_tables_show_the_results(ran: dict[str, Finished]) -> None:
    runs, text = runs_of(ran), (ran["digits"].out / "tables.md").read_text()
    head, row, mean = rows(text, "teacher")
    errors = runs["teacher"]["errors"]
    assert head[1:] == list(errors) == ["oracle", *runs["teacher"]["hand_picked"], "searched", "searched, alone"]
    assert row[1:] == mean[1:] == [f"{error:.4f}" for error in errors.values()]

    sampled = runs["sampling"]["accuracy"]
    per_row, per_batch = (statistics.mean(sampled[per]) for per in ("row", "batch"))
    assert len(sampled["row"]) == len(sampled["batch"]) == ran["digits"].results["sizes"]["subnets"]
    assert f"| {per_row:.1f} " in text
    assert f"| {per_row - per_batch:+.1f} " in text

    test = {name: scores["test"] for name, scores in runs["comparison"]["accuracy"].items()}
    assert all(0.0 <= value <= 100.0 for value in test.values())
    for name, points, higher in rows(text, "searched − ...")[1:]:
        difference = test["searched"] - test[name]
        assert points == f"{difference:+.2f}"
        assert higher == f"{int(difference > 0)} of 1"

    text, losses = (ran["text"].out / "tables.md").read_text(), runs["text"]["losses"]
    head, row, mean = rows(text, "seed")
    assert head[1:-1] == list(losses) == ["LoRA", "GLoRA", "random", "searched, alone", "searched"]
    assert row[1:-1] == mean[1:-1] == [f"{loss:.4f}" for loss in losses.values()]
    assert row[-1] == f"{runs['text']['parameters']:,}"


def test_a_teacher_is_told_apart_by_its_own_forms_alone(digits: ModuleType) -> None:
    """Its layers are four, of the forms that are said, and depend on the seed."""
    known = [digits.choose_layers(seed) for seed in range(8)]
    for candidate in known:
        assert len(candidate) == 4
        assert sum(".fc" in path for path in candidate) == 1
        assert set(candidate.values()) == {*digits.KNOWN, digits.KNOWN_IN_MLP}
    assert len({tuple(candidate) for candidate in known}) > 4
    assert known[3] == digits.choose_layers(3)


def test_a_searched_configuration_has_no_step_more_in_the_comparisons(digits: ModuleType) -> None:
    for name, sizes in digits.SIZES_BY_NAME.items():
        assert sizes.comparison.searched_steps == sizes.comparison.steps, name
        assert sizes.student.retraining_steps == sizes.student.steps, name  # there it has those of its search beside
    with_text = imported(SCRIPTS["text"])
    for sizes in next(with_text).SIZES.values():
        assert sizes.budget.searched_steps == sizes.budget.steps
    with_text.close()


def test_differences_are_paired(study: ModuleType) -> None:
    found = study.differences([3.0, 5.0, 1.0], [1.0, 2.0, 2.0])
    assert found["each"] == [2.0, 3.0, -1.0]
    assert found["mean"] == pytest.approx(4 / 3)
    assert found["higher"] == 2
    assert found["standard_error"] == pytest.approx(statistics.stdev([2.0, 3.0, -1.0]) / 3**0.5)


def test_help_shows_arguments_and_defaults(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(digits, monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    for text in ("--sections", "--quick", "--smoke", "--seeds", "--device", "--out", "default: 5"):
        assert text in printed


@pytest.mark.parametrize(("argument", "value"), [("--sections", "all"), ("--seeds", "0"), NO_CARD])
def test_a_bad_argument_is_named(
    argument: str,
    value: str,
    digits: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path,
) -> None:
    out = tmp_path / "out"
    assert exit_code(digits, monkeypatch, "--quick", "--out", str(out), argument, value) == 2
    assert f"argument {argument}:" in capsys.readouterr().err
    assert not out.exists()
