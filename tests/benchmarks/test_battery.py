"""What is measured, the arithmetic of the floor, the target table."""

from __future__ import annotations

import pytest
from rows import seven

from benchmarks import battery, floor, peers, targets
from benchmarks.battery import FULL, LLAMA, LORA, LORA_LORA, VECTOR_LORA, DecodeEntry, Entry
from benchmarks.schema import is_case, is_set_case

SCALES = ("cuda", "cpu", "tiny")


@pytest.mark.parametrize(("case", "ratio"), [(LORA, 1.033), (VECTOR_LORA, 1.07), (FULL, 1.10), (LORA_LORA, 1.565)])
def test_the_floors_are_those_of_the_design(case: str, ratio: float) -> None:
    assert floor.seven(case) == pytest.approx(ratio, abs=0.013)


def test_the_floor_of_a_4_bit_base() -> None:
    assert floor.seven(battery.QLORA) == pytest.approx(1.074, abs=0.002)
    assert floor.seven(battery.QGLORA) == pytest.approx(1.14, abs=0.01)
    assert floor.seven(battery.QLORA_LORA) < floor.seven(LORA_LORA)  # W_eff comes with the decoding
    few = DecodeEntry(battery.QLORA, "ours", 1, 14336, 4096, 16, 0.0)  # the codes are read, and that is all
    assert floor.floor_ms(few, floor.H100, "fwd") == pytest.approx(14336 * 4096 / 2 / 3e9, rel=0.01)
    dense = Entry(battery.QLORA, "ours", 1, 14336, 4096, 16, 0.0)
    assert floor.floor_ms(dense, floor.H100, "fwd") > 5 * floor.floor_ms(few, floor.H100, "fwd")


def test_a_frozen_layer_is_two_products() -> None:
    entry = Entry("frozen", "eager", 8192, 4096, 4096)
    assert floor.floor_ms(entry, floor.H100) == pytest.approx(2 * 0.3445, rel=1e-3)
    assert floor.floor_ms(entry, floor.H100, "fwd") == pytest.approx(0.3445, rel=1e-3)
    thin = Entry("frozen", "eager", 1, 4096, 4096)  # reading the weight is all there is
    assert floor.floor_ms(thin, floor.H100, "fwd") == pytest.approx(4096 * 4098 * 2 / 3e9, rel=1e-3)


def test_work_counts_products_and_bytes() -> None:
    entry = Entry(LORA, "ours", 100, 30, 20, 4, 0.0, dtype="fp32")
    work = floor.work(entry)
    assert work.products == 2
    assert work.thin_flops == 6 * 100 * 4 * (30 + 20)
    assert work.moved == 100 * 20 * 4
    assert floor.work(entry, "fwd").moved == 0
    assert floor.work(Entry(LORA_LORA, "ours", 100, 30, 20, 4, 0.0)).products == 3


@pytest.mark.parametrize("scale", SCALES)
def test_every_entry_is_one_the_schema_knows(scale: str) -> None:
    names = [stage.name for stage in battery.stages(scale)]
    assert len(set(names)) == len(names)
    for stage in battery.stages(scale):
        assert stage.groups or stage.models or stage.once
        for group in stage.groups:
            assert group.entries[0].reference
            assert len({entry.key for entry in group.entries}) == len(group.entries)
            for entry in group.entries:
                is_set = entry.op == "group"
                assert (is_set_case if is_set else is_case)(entry.case)
                assert entry.impl in (battery.GROUP_IMPLS if is_set else battery.IMPLS)
                assert entry.layer is None or LLAMA[entry.layer] == (entry.n, entry.k)
                assert (entry.r is None) == (entry.p is None) == entry.frozen
                assert entry.bias or entry.adapter != FULL


def test_the_quick_stages_come_first_and_hold_the_target_table() -> None:
    stages = battery.gpu_stages()
    quick = [stage for stage in stages if stage.quick]
    assert stages[: len(quick)] == quick
    rows = [which for stage in quick for group in stage.groups for which in group.row_keys()]
    made = {(e.case, e.impl, e.m, e.layer, e.p, mode) for e, direction, mode in rows if direction == "fwd_bwd"}
    for target in targets.TARGETS:
        for layer in LLAMA:
            for mode in battery.MODES:
                assert (target.case, "ours", target.m, layer, target.p, mode) in made
                assert ("frozen", "eager", target.m, layer, None, mode) in made
                if target.kind == "least":
                    assert (target.case, "peft", target.m, layer, target.p, mode) in made


def test_every_target_has_eager_pytorch_beside_it() -> None:
    rows = [which for stage in battery.gpu_stages() for group in stage.groups for which in group.row_keys()]
    made = {(e.case, e.m, e.layer, e.r, e.p) for e, direction, mode in rows if (e.impl, mode) == ("eager", "eager")}
    for target in targets.TARGETS:
        assert {(target.case, target.m, layer, targets.RANK, target.p) for layer in LLAMA} <= made


def test_the_battery_covers_what_was_promised() -> None:
    every = [entry for stage in battery.gpu_stages() for group in stage.groups for entry in group.entries]
    entries = [entry for entry in every if entry.op == "linear"]
    assert {entry.impl for entry in entries} == set(battery.IMPLS)
    assert {*battery.FEW, 512, 1024, 2048, 4096, 8192, 16384, 64 * 197} == {entry.m for entry in entries}
    assert {8, 16, 64} == {entry.r for entry in entries if entry.r is not None}
    assert {(entry.n, entry.k) for entry in entries if entry.layer is None} == set(battery.VIT)
    assert {"nf4-frozen", "nf4-lora"} <= {entry.case for entry in entries}


def test_missing_peers_are_named() -> None:
    missing = peers.unavailable()
    assert set(missing) <= set(peers.PACKAGES)
    assert all("not installed" in reason for reason in missing.values())


def test_the_target_table_sums_the_seven() -> None:
    rows = seven("frozen", "eager", 8192, 1.0) + seven(LORA, "ours", 8192, 1.06)
    rows += seven(LORA_LORA, "ours", 8192, 1.6) + seven(LORA_LORA, "peft", 8192, 4.0)
    rows += seven(LORA, "ours", 8192, 9.0, mode="eager")  # no frozen rows in this mode
    found = [targets.measured(rows, target, "graph") for target in targets.TARGETS]
    assert found[0] == pytest.approx(1.06)
    assert found[1] is None  # p = 0.1
    assert found[4] == pytest.approx(1.6)
    assert found[8] == pytest.approx(2.5)
    assert targets.measured(rows, targets.TARGETS[0], "eager") is None
    assert targets.measured(rows[1:], targets.TARGETS[0], "graph") is None  # six are not seven
    assert all(line["measured, CUDA graph"] == "" for line in targets.table_rows([]))


def test_the_target_table_has_the_specification_s_figures() -> None:
    """Floors with their digits, second goals, what is saved, and eager mode over eager PyTorch."""
    rows = seven(LORA, "ours", 8192, 0.9, mode="eager") + seven(LORA, "eager", 8192, 1.0, mode="eager")
    for row in rows:
        row["saved_bytes"] = 8192 * 16 * 2
    lines = [list(line.values()) for line in targets.table_rows(rows)]
    assert lines[0] == ["LoRA", "1.033", "≤ 1.08, then 1.06", "", "", "0.900"]
    assert lines[1] == ["LoRA, p = 0.1", "1.033", "≤ 1.10, then 1.08", "", "", ""]
    assert [line[1] for line in lines[2:5]] == ["1.07", "1.10", "1.565"]
    assert lines[-1] == [targets.SAVED, "R·M", "", "", "1.000", ""]
