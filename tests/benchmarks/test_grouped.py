"""Sets of layers with one input, launches of a decoder layer, merging: contestants, counts, tables, files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import rows
import torch

import glora_kernels as gk
from benchmarks import (
    assemble,
    battery,
    devices,
    floor,
    grouped,
    grouped_peers,
    grouped_text,
    merging,
    plots,
    readme,
    report,
    runner,
    schema,
    sections,
    stage,
    surroundings,
    targets,
)
from benchmarks.battery import SiblingEntry
from benchmarks.devices import Device
from benchmarks.floor import Ceilings
from benchmarks.schema import SchemaError
from benchmarks.store import Store
from glora_kernels.runtime import environment

RATES = Ceilings(0.1, 10.0)
QKV, GATE_UP = battery.sibling_groups("tiny")


class Quiet(Device):
    """A CPU whose ceilings are known and whose regions are short."""

    region_s = 0.0

    def ceilings(self) -> Ceilings:
        return RATES


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a CPU measures, on sets of hardly any width."""
    patch = pytest.MonkeyPatch()
    patch.setattr(devices, "get", lambda kind: Quiet())
    try:
        return grouped.measure(rounds=2, scale="tiny")
    finally:
        patch.undo()


def new_store(folder: Path, scale: str = "tiny") -> Store:
    return Store(folder / "tiny.stage.jsonl", surroundings.header(Quiet(), scale))


def test_every_contestant_is_right_and_gets_its_rows(section: dict[str, Any]) -> None:
    lines = section["rows"]
    for line in lines:
        schema.check_row(line["row"])
        assert line["row"]["max_rel_err"] < 1e-5
    found = {(line["row"]["case"], line["row"]["impl"], line["row"]["pass"]) for line in lines}
    impls = [impl for impl in battery.GROUP_IMPLS if impl != "peft" or importlib.util.find_spec("peft")]
    assert section["left_out"] == {} or "peft" in " ".join(section["left_out"].values())
    for siblings in battery.SIBLINGS:
        for direction in battery.PASSES:
            assert {impl for case, impl, way in found if (case, way) == (f"lora:{siblings}", direction)} == set(impls)
            assert {(f"frozen:{siblings}", impl, direction) for impl in ("concat", "eager")} <= found
    one = [line for line in lines if line["row"]["impl"] == "concat" and line["row"]["case"].startswith("frozen")]
    assert all(line["detail"]["over_frozen"] == 1.0 for line in one)
    # the h of each member, whoever computes it
    saved = {line["row"]["saved_bytes"] for line in lines if line["row"]["case"] == "lora:qkv"}
    ends = 3 * 4 + 3 * 4  # grouped_mm keeps where the groups end as well
    assert saved == {3 * 8 * 4 * 4, 3 * 8 * 4 * 4 + ends}


@pytest.mark.parametrize("impl", ["ours", "concat", "grouped_mm"])
def test_a_wrong_contestant_is_refused(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One member's factor changed in the contestant alone: outputs and gradients are compared member by member."""
    entry = next(entry for entry in QKV.entries if entry.impl == impl and not entry.frozen)
    assert isinstance(entry, SiblingEntry)
    values = grouped_peers.make_values([entry], Quiet())
    build = grouped_peers.build

    def wrong(entry: SiblingEntry, values: grouped_peers.SiblingValues) -> grouped_peers.SiblingContestant:
        found = build(entry, values)
        with torch.no_grad():
            next(iter(found.params.values()))[-1] += 1e-3
        return found

    grouped_peers.check_entry(entry, values)
    monkeypatch.setattr(grouped_peers, "build", wrong)
    with pytest.raises(AssertionError, match=f"lora:qkv \\({impl}\\).* is off by"):
        grouped_peers.check_entry(entry, values)


def test_what_cannot_be_built_is_left_out_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    store = new_store(tmp_path)
    runner.run_group(GATE_UP, Quiet(), RATES, store, 2, lambda text: None)
    (error,) = assemble.errors(store)
    assert error["impl"] == "grouped_mm"
    assert "has no torch.nn.functional.grouped_mm" in error["reason"]
    assert {line["row"]["impl"] for line in store.of("row")} >= {"ours", "single", "concat", "eager"}


def test_the_shapes_are_those_of_the_model() -> None:
    large = {(g.entries[0].case, g.entries[0].m): g.entries[0] for g in battery.sibling_groups("cuda")}
    assert set(large) == {(f"frozen:{name}", m) for name in ("qkv", "gate_up") for m in (8192, 512)}
    assert large["frozen:qkv", 8192].widths == (4096, 1024, 1024)  # type: ignore[attr-defined]
    assert (large["frozen:gate_up", 512].n, large["frozen:gate_up", 512].k) == (28672, 4096)
    names = [one.name for one in battery.gpu_stages() if one.quick]
    assert names[:3] == ["target", "groups", "depth"]


def test_a_set_has_an_h_for_each_member() -> None:
    entry = next(entry for entry in QKV.entries if entry.impl == "ours")
    m, n, k, r = entry.m, entry.n, entry.k, entry.r or 0
    assert floor.work(entry, "fwd").thin_flops == 2 * m * r * (n + 3 * k)
    assert floor.work(entry).product_flops == 2 * m * n * k


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("case", "lora", "case"), ("case", "lora:qk", "case"), ("case", "nf4-lora:qkv", "case"),
        ("layer", "q", "layer"), ("impl", "bnb", "impl"), ("r", None, "r must"), ("op", "set", "op must"),
        ("op", "linear", "case"),
    ],
)  # fmt: skip
def test_a_bad_row_of_a_set_is_refused(field: str, value: Any, message: str) -> None:
    entry = next(entry for entry in QKV.entries if entry.impl == "ours")
    with pytest.raises(SchemaError, match=message):
        schema.check_row(rows.row(entry, mode="eager") | {field: value})


@pytest.mark.skipif(not environment.has_triton(), reason="plans Triton launches")
def test_launches_of_a_decoder_layer(section: dict[str, Any]) -> None:
    found = section["launches"]["rows"]
    assert found["ours"]["sets"] == {"qkv": 1, "gate_up": 1, "o": 2, "down": 2}
    assert found["ours"]["forward"] == 6 <= targets.LAUNCH_TARGET
    assert found["single"]["forward"] == 14
    assert found["frozen"]["forward"] == 7
    assert found["eager"]["forward"] == 35
    if importlib.util.find_spec("peft"):
        assert found["peft"]["forward"] == 35
    text = grouped_text.launch_sentence(section["launches"])
    assert "6 here (planned for sm_90: q/k/v 1, gate/up 1, o 2, down 2)" in text
    assert all(one["backward"] > found["frozen"]["backward"] for name, one in found.items() if name != "frozen")


def test_operators_are_counted_but_views_are_not() -> None:
    x = torch.randn(4, 6)
    with grouped.OperatorCounter() as counter:
        y = torch.empty(3, 4)
        torch.mm(x[:3, :4].reshape(4, 3), y.view(3, 4)).t().add_(1.0)
    assert counter.count == 3  # the copy of what cannot be viewed, the product, the sum


def test_merging_is_checked_and_undone(section: dict[str, Any]) -> None:
    found = section["merge"]
    assert (found["layers"], found["linears"], found["kernel"] is None) == (2, 14, True)
    assert 0 < found["max_rel_err"] < 1e-6
    assert all(found["whole"][f"{name}_s"] > 0 for name in ("merge", "unmerge", "copy"))
    model = merging.make_model(merging.SIZES["tiny"], Quiet())
    layers = [module for module in model.modules() if isinstance(module, gk.GLoRALinear)]
    before = [layer.weight.clone() for layer in layers]

    def wrong() -> None:
        gk.merge(model)
        with torch.no_grad():
            layers[3].weight[0, 0] += 1e-3

    with pytest.raises(AssertionError, match="merged weight 3 is off"):
        merging.check(layers, before, wrong)


@pytest.mark.skipif(not environment.interpreting(), reason="CPU tensors need the interpreter")
def test_the_kernel_that_merges_is_timed() -> None:
    """On a card this is what runs; here through the interpreter."""
    with gk.backend("triton"):
        found = merging.measure(merging.Sizes(1, 512, 2, torch.float32), Quiet(), RATES, 2)
    kernel = found["kernel"]
    weights = sum(n * k for n, k in battery.LLAMA.values()) // 512**2 * 4
    factors = sum(n + k for n, k in battery.LLAMA.values()) // 512 * 2 * 4
    assert kernel["bytes"] == 2 * weights + factors
    assert kernel["of_copy"] == pytest.approx(kernel["bytes"] / kernel["median_s"] / 1e9 / RATES.gbps)
    assert "in one launch" in grouped_text.merge_text(found)


def test_a_card_too_small_gets_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card(Quiet):
        kind = "cuda"

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (24 << 30, 24 << 30))
    assert merging.fitting(merging.SIZES["cuda"], Card()).layers == 16
    assert merging.fitting(merging.SIZES["cuda"], Quiet()).layers == 32


def test_a_part_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage notes the reason, is complete, and does not try again; one that never ends is struck out."""

    def fails(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(merging, "measure", fails)
    one = battery.Stage("depth", "t", once="grouped")
    store = new_store(tmp_path)
    assert stage.run(one, "tiny", Quiet(), store, 1.0, 2, lambda text: None) == stage.DONE
    assert stage.complete(one, store, "tiny")
    note = store.note("grouped")
    assert note["merge"] == {"error": "OutOfMemoryError: CUDA out of memory"}
    assert note["launches"]["rows"]["frozen"]["forward"] == 7
    assert assemble.detail(store)["grouped"] == note
    assert "merge: OutOfMemoryError: CUDA out of memory" in "\n".join(assemble.battery_lines(store))
    (tmp_path / "again").mkdir()
    dying = new_store(tmp_path / "again")
    for _ in range(2):
        dying.add("begin", key="grouped")
    assert stage.run(one, "tiny", Quiet(), dying, 1.0, 2, lambda text: None) == stage.DONE
    assert "did not finish" in dying.note("grouped")["error"]
    assert grouped_text.depth_lines(dying.note("grouped"))[0] == "launches: did not finish in several attempts"


def target_rows(ours: float, mode: str) -> list[dict[str, Any]]:
    found = []
    for group in battery.sibling_groups("cuda"):
        for entry in group.entries:
            if entry.reference or entry.impl == "ours":
                found.append(rows.row(entry, 1.0 if entry.reference else ours, mode))
    return found


def test_the_floors_of_sets() -> None:
    for group in battery.sibling_groups("cuda"):
        base, ours = group.entries[0], next(entry for entry in group.entries if entry.impl == "ours")
        for direction in battery.PASSES if base.m == targets.GROUP_M else ():
            ratio = floor.floor_ms(ours, floor.H100, direction) / floor.floor_ms(base, floor.H100, direction)
            assert targets.GROUP_FLOORS[base.case.partition(":")[2], direction] == f"{ratio:.3f}"


def test_the_targets_of_sets() -> None:
    empty = targets.group_rows([], None)
    assert [line["target"] for line in empty] == ["≤ 1.05"] * 4 + ["≤ 8", "≥ 0.80"]
    assert not any(line["measured, eager"] + line["measured, CUDA graph"] for line in empty)
    made = target_rows(1.04, "graph") + rows.seven("lora", "ours", 8192, 9.0)
    depth = {"launches": {"rows": {"ours": {"on_card": 6}}}, "merge": {"layers": 16, "kernel": {"of_copy": 0.83}}}
    lines = targets.group_rows(made, depth)
    assert [line["measured, CUDA graph"] for line in lines[:4]] == [
        "",
        "1.040",
        "",
        "1.040",
    ]  # forward + backward alone
    assert [line["measured, eager"] for line in lines[4:]] == ["6", "0.83"]
    assert lines[5]["LoRA, r = 16"].startswith("merging 16 decoder layers")
    assert targets.seven(made, "lora", "ours", 8192, 16, 0.0, "graph") == pytest.approx(63.0)  # sets are no layers


def test_tables_and_pictures(section: dict[str, Any], tmp_path: Path) -> None:
    table = grouped_text.over_table(section["rows"])
    assert [row["over one product"] for row in table][:2] == list(grouped_text.LABELS.values())[:2]
    assert table[0]["q, k, v: forward"] == "1.00 (1.00 to 1.00)"
    assert len(grouped_text.set_rows(section["rows"])) == len(section["rows"])
    if importlib.util.find_spec("matplotlib"):
        titles = plots.draw_all(section["rows"], [], RATES, tmp_path, "tiny")
        assert "tiny_groups.png" in titles
        assert (tmp_path / "tiny_groups.png").stat().st_size > 1000
        assert not {"tiny_roofline.png", "tiny_saved.png"} & set(titles)  # those are of layers


def test_a_section_alone_goes_into_the_files(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = "# Measured on a CPU\n\n## Time over the frozen layer\n\nt\n\n## Every layer\n\ntable\n\n![a](a.png)\n"
    (tmp_path / "cpu.json").write_text(json.dumps({"sections": {"host": 1}}))
    (tmp_path / "cpu.md").write_text(before)
    monkeypatch.setattr(grouped, "measure", lambda rounds: section)
    monkeypatch.setattr(sys, "argv", ["grouped", "--device", "cpu", "--rounds", "2", "--out", str(tmp_path)])
    grouped.main()
    assert "over one product" in capsys.readouterr().out
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["sections"]["host"] == 1
    assert found["sections"]["grouped"]["rounds"] == 2
    text = (tmp_path / "cpu.md").read_text()
    title = sections.SECTIONS["grouped"][0]
    assert text.index("## Time over") < text.index(f"## {title}") < text.index("## Every layer") < text.index("![a]")
    assert text.endswith("![layers with one input](cpu_groups.png)\n")
    grouped.main()
    assert (tmp_path / "cpu.md").read_text() == text  # renewed, not doubled


def test_a_card_runs_its_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Card(Quiet):
        kind = "cuda"

    seen: list[list[str]] = []
    monkeypatch.setattr(devices, "get", lambda kind: Card())
    monkeypatch.setattr(report, "main", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["grouped", "--out", str(tmp_path)])
    grouped.main()
    assert seen[0][-3:] == ["--stages", "groups", "depth"]
    assert {stage.find("cuda", name).name for name in seen[0][-2:]} == {"groups", "depth"}


def test_the_readme_shows_sets(section: dict[str, Any], tmp_path: Path) -> None:
    text = readme._sets(tmp_path, section)
    assert "here, grouped" in text
    assert "`gk.merge`" in text
    assert readme._sets(tmp_path, None) == ""
    (tmp_path / "h100.json").write_text(json.dumps(rows.report() | {"rows": target_rows(1.045, "graph")}))
    (tmp_path / "h100_detail.json").write_text(json.dumps({"header": {"packages": {}}, "grouped": None}))
    assert "1.045" in readme.gpu_text(tmp_path)
