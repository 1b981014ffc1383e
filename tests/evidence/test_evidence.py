"""evidence.md is what the files of the runs give, has every kernel, and says what a run has shown and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import targets
from evidence import cases, problems, runs, table
from evidence.cases import FORMS
from evidence.instruments import INSTRUMENTS

RUN = {"date": "2026-01-02", "with": "something 1.0", "kernels": {"bfloat16": ["_b_kernel", "_a_kernel"]}}


def rows(text: str) -> list[dict[str, str]]:
    """The table's rows by the names of its columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.mark.parametrize("form", FORMS)
def test_every_call_is_right_eagerly(form):
    found = dict(runs.run("eager", [form]))
    assert set(found[form]["kernels"]) == {"float32", "bfloat16"}
    assert None not in found.values()


def test_a_form_with_one_wrong_call_is_not_kept(monkeypatch, capsys):
    right, wrong = (lambda dtype, a=a: cases.pairs(a)(dtype) for a in ("vector", "none"))
    monkeypatch.setattr(runs, "FORMS", {"right": right, "wrong": wrong})
    check = problems.Layer.check

    def checked(self, found, route):
        if self.problem.config.rank == 72 and self.problem.config.A == "none":
            found["y"][-1, -1] += 1.0
        check(self, found, route)

    monkeypatch.setattr(problems.Layer, "check", checked)
    found = dict(runs.run("eager"))
    assert found["right"] is not None
    assert found["wrong"] is None
    assert "wrong, torch.float32: call 4 is wrong" in capsys.readouterr().out


def test_the_committed_table_is_made_of_the_committed_runs():
    assert table.TABLE.read_text() == table.text()


def test_every_kernel_has_a_row():
    found = {row["kernel"].strip("`") for row in rows(table.text())}
    assert {"_glora_fwd_kernel", "_expert_product_kernel"} <= table.kernels()
    assert found == table.kernels()


def test_runs_know_the_forms():
    """What a form is called now; a run of an older name would stand in the table for ever."""
    assert set(INSTRUMENTS) < set(table.COLUMNS)
    assert set(table.WITHIN) <= set(FORMS)
    for name in table.COLUMNS:
        assert set(table.runs(name)) <= set(FORMS), name


def test_a_row_has_the_dates_of_the_runs_that_launched_its_kernel(tmp_path):
    table.keep("ttsem", "A=none", RUN, tmp_path)
    table.keep("eager", "A=none", RUN | {"date": "2026-01-03", "kernels": {"bfloat16": []}}, tmp_path)
    table.keep("card", "A=none", RUN | {"kernels": {"bfloat16": ["_a_kernel"], "float32": ["_a_kernel"]}}, tmp_path)
    found = [row for row in rows((tmp_path / "evidence.md").read_text()) if row["form"]]
    assert [(row["kernel"], row["dtype"]) for row in found] == [
        ("`_a_kernel`", "bfloat16"), ("`_a_kernel`", "float32"), ("`_b_kernel`", "bfloat16"),
    ]  # fmt: skip
    assert [row["executed"] for row in found] == ["2026-01-02", "", "2026-01-02"]
    assert [row["oracle"] for row in found] == ["2026-01-03", "", "2026-01-03"]
    assert [row["on a card"] for row in found] == ["2026-01-02", "2026-01-02", ""]
    assert {row[name] for row in found for name in ("interpreted", "compiled", "profiled", "within target")} == {""}
    table.keep("card", "A=none", None, tmp_path)
    assert {row["on a card"] for row in rows((tmp_path / "evidence.md").read_text())} == {""}


def test_a_card_within_its_targets(monkeypatch):
    known = {one.label for one in (*targets.LAYERS, *targets.SIBLINGS, *targets.QUANTIZED)}
    assert {label for labels in table.WITHIN.values() for label in labels} <= known
    card = {"header": {"date": "2026-01-04T05:06:07"}, "rows": [], "notes": {}}
    assert table._within({"cpu": card, "h100": card}) == {}
    for value, expected in ((1.0, "2026-01-04"), (1.2, "")):
        made = tuple(replace(one, measure=lambda found, mode, value=value: value) for one in targets.LAYERS)
        monkeypatch.setattr(targets, "LAYERS", made)
        assert table._within({"cpu": card, "h100": card}).get("A=none", "") == expected
        assert table._within({"cpu": card}) == {}


def test_what_ncu_saw_stands_beside_what_it_saw_before(monkeypatch, tmp_path):
    said = '"ID","Kernel Name","x"\n"","","ms"\n"0","_dy_kernel","1"\n"1","nvjet_tst","1"\n"2","_dy_kernel","1"\n'
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo Version 2025.1 && exit\nprintf '%s' '{said}'\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    table.profiled(tmp_path / "worst.ncu-rep", "lora", tmp_path)
    table.profiled(tmp_path / "worst.ncu-rep", "glora:vector,lora,none,none,none", tmp_path)
    kept = table.runs("ncu", tmp_path)
    assert [(one["with"], one["kernels"]) for one in kept.values()] == 2 * [
        ("ncu 2025.1", {"bfloat16": ["_dy_kernel"]})
    ]
    assert list(kept) == ["A=none", "A=vector"]
    said = said.replace("_dy_kernel", "nvjet")
    ncu.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    with pytest.raises(ValueError, match="no kernel of ours"):
        table.profiled(tmp_path / "worst.ncu-rep", "lora", tmp_path)
