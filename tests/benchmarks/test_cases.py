"""What is measured, the arithmetic of the floor, the tables of targets."""

from __future__ import annotations

import graphlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import found, row, seven

from benchmarks import cases, floor, peers, results, schema, targets
from benchmarks.cases import FULL, LLAMA, LORA, LORA_LORA, MLP, PASSES, QGLORA, QLORA, VECTOR_LORA, VECTORS, Entry
from benchmarks.schema import CASE, SET_CASE


@pytest.mark.parametrize(
    ("case", "ratio", "within"),
    [(LORA, 1.033, 0.013), (VECTOR_LORA, 1.07, 0.013), (FULL, 1.10, 0.013), (LORA_LORA, 1.565, 0.013),
     (QLORA, 1.074, 0.002), (QGLORA, 1.14, 0.01)],
)  # fmt: skip
def test_the_floors_are_those_of_the_design(case: str, ratio: float, within: float) -> None:
    assert floor.seven(case) == pytest.approx(ratio, abs=within)


def test_the_floor_of_a_4_bit_base() -> None:
    assert floor.seven(cases.QLORA_LORA) < floor.seven(LORA_LORA)  # W_eff comes with the decoding
    few = Entry(QLORA, "ours", 1, 14336, 4096, 16, 0.0, decode=True)  # the codes are read, and that is all
    assert floor.floor_ms(few, floor.H100, "fwd") == pytest.approx(14336 * 4096 / 2 / 3e9, rel=0.01)
    dense = Entry(QLORA, "ours", 1, 14336, 4096, 16, 0.0)
    assert floor.floor_ms(dense, floor.H100, "fwd") > 5 * floor.floor_ms(few, floor.H100, "fwd")


def test_a_frozen_layer_is_two_products() -> None:
    entry = Entry("frozen", "eager", 8192, 4096, 4096)
    assert floor.floor_ms(entry, floor.H100) == pytest.approx(2 * 0.3445, rel=1e-3)
    thin = Entry("frozen", "eager", 1, 4096, 4096)  # reading the weight is all there is
    assert floor.floor_ms(thin, floor.H100, "fwd") == pytest.approx(4096 * 4098 * 2 / 3e9, rel=1e-3)


def test_work_counts_products_and_bytes() -> None:
    work = floor.work(Entry(LORA, "ours", 100, 30, 20, 4, 0.0, dtype="fp32"))
    assert (work.products, work.thin_flops, work.moved) == (2, 6 * 100 * 4 * (30 + 20), 100 * 20 * 4)
    assert floor.work(Entry(LORA_LORA, "ours", 100, 30, 20, 4, 0.0)).products == 3
    siblings = Entry("lora:qkv", "ours", 100, 30, 20, 4, 0.0, widths=(10, 10, 10))  # an h for each member
    assert floor.work(siblings, "fwd").thin_flops == 2 * 100 * 4 * (30 + 3 * 20)


def test_the_floors_of_sets() -> None:
    for group in cases.sibling_groups(1, 16, 8192):
        base, ours = group.entries[0], next(entry for entry in group.entries if entry.impl == "ours")
        for direction in PASSES:
            ratio = floor.floor_ms(ours, floor.H100, direction) / floor.floor_ms(base, floor.H100, direction)
            assert targets.SET_FLOORS[base.case.partition(":")[2], direction] == f"{ratio:.3f}"


def test_a_set_that_is_read_back_has_an_h_for_each_member() -> None:
    for group in cases.sibling_groups(1, 16, 8192):
        ours = next(entry for entry in group.entries if entry.impl == "ours")
        m, n, k, r = ours.m, ours.n, ours.k, ours.r or 0
        assert floor.work(ours, "fwd").thin_flops == 2 * m * r * (n + len(ours.widths) * k)
        assert floor.work(results.entry_of({"row": row(ours), "detail": {}})) == floor.work(ours)


@pytest.mark.parametrize("scale", ["cuda", "cpu", "tiny"])
def test_rows_are_told_apart(scale: str) -> None:
    """Of one key, in whichever stage, is one entry; a row's fields tell it from every other, but for the bias of a
    frozen layer."""
    entries: dict[str, Entry] = {}
    keys: dict[tuple[Any, ...], Entry] = {}
    for stage in cases.stages(scale):
        for entry, direction, mode in (which for group in stage.groups for which in group.rows()):
            assert entries.setdefault(cases.row_key(entry, direction, mode), entry) == entry
            fields = row(entry, mode=mode, direction=direction)
            first = keys.setdefault(tuple(fields[name] for name in schema.ROW_KEY), entry)
            assert first == (replace(entry, bias=first.bias) if entry.case == cases.FROZEN else entry)


@pytest.mark.parametrize("scale", ["cuda", "cpu", "tiny"])
def test_every_entry_is_one_the_schema_knows(scale: str) -> None:
    stages = cases.stages(scale)
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        assert stage.groups or stage.parts
        for group in stage.groups:
            assert group.entries[0].reference
            assert len({entry.key for entry in group.entries}) == len(group.entries)
            for entry in group.entries:
                assert (SET_CASE if entry.widths else CASE).fullmatch(entry.case)
                assert entry.impl in (cases.GROUP_IMPLS if entry.widths else cases.IMPLS)
                assert entry.layer is None or LLAMA[entry.layer] == (entry.n, entry.k)
                assert (entry.r is None) == (entry.p is None) == entry.frozen
                assert entry.bias or entry.adapter != FULL


def test_the_stages_hold_the_targets() -> None:
    """The quick stages come first and have every row of the target table; each has eager PyTorch beside it."""
    stages = cases.gpu_stages()
    quick = [stage for stage in stages if stage.quick]
    assert stages[: len(quick)] == quick

    def rows(listed: list[cases.Stage]) -> set[Any]:
        every = [which for stage in listed for group in stage.groups for which in group.rows()]
        return {(e.case, e.impl, e.m, e.layer, e.p, d, mode) for e, d, mode in every if e.r in (None, 16)}

    early, every = rows(quick), rows(stages)
    asked = [(LORA, 8192, 0.0), (LORA, 8192, 0.1), (VECTOR_LORA, 8192, 0.0), (FULL, 8192, 0.0), (LORA_LORA, 8192, 0.0),
             (LORA, 2048, 0.0), (LORA, 512, 0.0), (VECTORS, 8192, 0.0)]  # fmt: skip
    for layer in LLAMA:
        for case, m, p in asked:
            assert (case, "eager", m, layer, p, "fwd_bwd", "eager") in every
            for mode in cases.MODES:
                assert {(case, "ours", m, layer, p, "fwd_bwd", mode)} <= early
                assert {("frozen", "eager", m, layer, None, "fwd_bwd", mode)} <= early
                assert {(case, "peft", 8192, layer, 0.0, "fwd_bwd", mode) for case in (VECTORS, LORA_LORA)} <= early
        for m, direction in ((8192, "fwd_bwd"), (2048, "fwd"), (1, "fwd"), (8, "fwd"), (32, "fwd")):
            assert {(QLORA, impl, m, layer, 0.0, direction, "graph") for impl in ("ours", "bnb", "eager")} <= every
    groups = {("lora:qkv", "ours", m, None, 0.0, "fwd", "graph") for m in (8192, 512)}
    assert groups <= early


def test_the_battery_covers_what_was_promised() -> None:
    every = [entry for stage in cases.gpu_stages() for group in stage.groups for entry in group.entries]
    entries = [entry for entry in every if not entry.widths]
    assert {entry.impl for entry in entries} == set(cases.IMPLS)
    assert {*cases.FEW, 512, 1024, 2048, 4096, 8192, 16384, 64 * 197} == {entry.m for entry in entries}
    assert {8, 16, 64} == {entry.r for entry in entries if entry.r is not None}
    assert {(entry.n, entry.k) for entry in entries if entry.layer is None} == set(cases.VIT)
    parts = {part for stage in cases.gpu_stages() for part in stage.parts}
    assert parts == {"merging", "multi", "dequantizing", "memory", "peft", "growth", "small_adapters"}
    with pytest.raises(SystemExit, match="no such stage"):
        cases.find("cuda", "nothing")


def test_imports_have_no_circle_and_files_are_short() -> None:
    folder = Path(cases.__file__).parent
    below: dict[str, set[str]] = {}
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) < 500
        named = re.findall(r"^ *from benchmarks import (.+)$", text, re.M)
        below[path.stem] = {name.strip() for names in named for name in names.split(",")}
        below[path.stem] |= set(re.findall(r"^ *from benchmarks\.(\w+) import", text, re.M))
    order = list(graphlib.TopologicalSorter(below).static_order())
    assert order.index("cases") < order.index("measure") < order.index("report")


def test_missing_peers_are_named() -> None:
    assert set(peers.unavailable()) <= set(peers.PACKAGES)
    assert all("not installed" in reason for reason in peers.unavailable().values())


def lines(which: tuple[targets.Target, ...], whole: Any) -> dict[str, list[str]]:
    return {line.pop("corner"): list(line.values()) for line in targets.rows("corner", which, whole)}


def test_the_target_table() -> None:
    """It sums the seven, needs all of them, and has the specification's figures."""
    rows = seven("frozen", "eager", 8192, 1.0) + seven(LORA, "ours", 8192, 1.06)
    rows += seven(LORA_LORA, "ours", 8192, 1.6) + seven(LORA_LORA, "peft", 8192, 4.0)
    rows += seven("frozen", "eager", 8192, 0.8, mode="eager") + seven(VECTORS, "ours", 8192, 1.0)[:6]
    rows += seven(LORA, "ours", 8192, 0.9, mode="eager") + seven(LORA, "eager", 8192, 1.0, mode="eager")
    made = lines(targets.LAYERS, found(*rows))
    assert made["LoRA"] == ["1.033", "≤ 1.08, then 1.06", "1.060", "1.125", "0.900"]
    assert made["LoRA, p = 0.1"] == ["1.033", "≤ 1.10, then 1.08", "", "", ""]
    assert made["GLoRA, A = B = lora"][:3] == ["1.565", "≤ 1.62", "1.600"]
    assert made["PEFT's time over ours, GLoRA, A = B = lora"][:3] == ["", "≥ 2.00", "2.500"]
    assert made["LoRA: saved for backward beyond x and y, over R·M values"][2] == f"{7 * 4 / (7 * 16 * 8192 * 2):.3f}"
    empty = lines(targets.LAYERS, found(*seven("frozen", "eager", 8192, 1.0)))
    assert not any("".join(figures[2:]) for figures in empty.values())


def test_a_ratio_of_the_same_rounds_counts() -> None:
    rows = seven("frozen", "eager", 8192, 1.0) + seven(QLORA, "ours", 8192, 9.0)
    whole = found(*rows)
    for line in whole["rows"][7:]:
        line["detail"] = {"over_frozen": 1.111}
    made = lines(targets.QUANTIZED, whole)
    assert made["QLoRA: seven linears, forward + backward, over bf16 frozen, M = 8192"][:3] == [
        "1.074",
        "≤ 1.12",
        "1.111",
    ]


def test_the_targets_of_sets_and_of_a_4_bit_base() -> None:
    rows = [row(entry, 1.0 if entry.reference else 1.04) for group in cases.sibling_groups(1, 16, 8192, 512)
            for entry in group.entries if entry.reference or entry.impl == "ours"]  # fmt: skip
    merging = {"layers": 32, "kernel": {"of_copy": 0.83}}
    made = lines(targets.SIBLINGS, found(*rows, merging=merging))
    assert [figures[1] for figures in made.values()] == ["≤ 1.05"] * 4 + ["≤ 8", "≥ 0.80"]
    assert [figures[2] for figures in made.values()][:4] == ["", "1.040", "", "1.040"]  # forward + backward alone
    assert made["merging 32 decoder layers, of a copy's bandwidth"][3] == "0.83"
    few = [row(Entry(QLORA, impl, 1, *LLAMA[name], 16, 0.0, name), ms, direction="fwd")
           for impl, ms in (("ours", 0.0125), ("bnb", 0.02)) for name in MLP]  # fmt: skip
    rows = [{"form": "plain", "backend": "cuda", "mode": "graph", "of_copy": share} for share in (0.95, 0.91)]
    made = lines(targets.QUANTIZED, found(*few, dequantizing={"rows": rows}))
    assert [figures[2] for figures in made.values() if figures[2]] == [
        f"{14336 * 4096 / 2 / 0.0125e6 / 3000:.2f}", "1.60", "0.91"
    ]  # fmt: skip
    assert [figures[0] for figures in made.values()][:4] == ["1.074", "1.195", "1.14", "1.351"]
