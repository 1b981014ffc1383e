"""Models that are trained: checked, told apart, and what they keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pytest
import torch

from benchmarks import bench_models, results, schema, tables
from benchmarks.bench_models import Which
from benchmarks.cases import FROZEN, HIRA, LORA, LORA_LORA, PEFT_STEP, VECTOR_LORA, VECTORS

pytest.importorskip("peft")

DIMS = replace(bench_models.DIMS["tiny"], kv_heads=2)
ALL = (Which(FROZEN, "eager"), *bench_models.PAIRS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> results.Found:
    """What is measured of models of hardly any size."""
    bench = made.bench(tmp_path_factory.mktemp("models"))
    bench.ceilings()
    bench_models.test_peft(bench)
    bench_models.test_growth(bench)
    return results.of_store(bench.store)


def base() -> bench_models.Llama:
    return bench_models.make_base(DIMS, 2, torch.device("cpu"))


def pairs(found: results.Found) -> dict[tuple[str, bool, str], dict[str, Any]]:
    made = filter(tables.is_pair, found["models"])
    return {(line["row"]["case"], "dropout" in line["row"]["model"], line["row"]["impl"]): line for line in made}


def test_every_model_gets_a_row_of_the_schema(found: results.Found) -> None:
    assert not found["errors"]
    assert {(which.case, bool(which.dropout), which.impl) for which in ALL} == set(pairs(found))
    for line in found["models"]:
        row, detail = line["row"], line["detail"]
        schema.check_model(row)
        assert row["peak_bytes"] > detail["held_bytes"] + detail["saved_bytes"]
        assert ("faster" in detail) == (tables.is_pair(line) and row["impl"] == "ours")
        assert 0 < detail["max_rel_err"] < 1e-5
    grown = [line for line in found["models"] if not tables.is_pair(line)]
    assert {(line["row"]["case"], line["row"]["impl"], line["detail"]["layers"]) for line in grown} == {
        (which.case, which.impl, layers) for which in bench_models.GROWING for layers in (1, 2)
    }
    text = "\n".join(tables.of_peft(found, True) + tables.of_models(found, True))
    assert "| HiRA" in text
    assert "≥ 1.8" in text


def test_no_dense_weight_is_kept(found: results.Found) -> None:
    """PEFT's GLoRA and HiRA keep an effective weight of every layer; after accelerate none is left."""
    weights = 4 * 2 * (4 * DIMS.hidden**2 + 3 * DIMS.hidden * DIMS.intermediate)
    lines = pairs(found)
    for case in (LORA, VECTORS, LORA_LORA, HIRA):
        before, after = (lines[case, False, impl]["detail"] for impl in ("peft", "ours"))
        assert after["dense_bytes"] == 0
        assert (before["dense_bytes"] == 0) if case == LORA else (before["dense_bytes"] >= weights)
        assert case == LORA or after["saved_bytes"] < before["saved_bytes"]


def test_models_share_the_frozen_weights_only() -> None:
    whole = base()
    frozen = {value.data_ptr() for value in whole.parameters()}
    plain, fast = (bench_models.adapt(whole, Which(LORA, how), DIMS) for how in ("peft", "accelerated"))
    for one in (plain, fast):
        own = [value for value in one.model.parameters() if not value.requires_grad]
        assert {value.data_ptr() for value in own} == frozen
    assert all(torch.equal(a, b) for a, b in zip(plain.trained(), fast.trained(), strict=True))
    before = [value.detach().clone() for value in fast.trained()]
    assert all(float(value.abs().min()) < float(value.abs().max()) for value in before)  # nothing starts at zero
    fast.step(torch.randint(DIMS.vocab, (2, 8)))
    assert all(not torch.equal(old, new) for old, new in zip(before, fast.trained(), strict=True))
    assert all(torch.equal(old, new) for old, new in zip(before, plain.trained(), strict=True))
    assert all(value.grad is None for value in fast.trained())


@pytest.mark.parametrize("which", dict.fromkeys((*ALL, *bench_models.GROWING)), ids=str)
def test_the_gradient_reaches_the_embeddings(which: Which) -> None:
    """Of every model that is measured: else a step would leave out what the first layer hands down."""
    one = bench_models.adapt(base(), which, DIMS)
    seen: list[torch.Tensor] = []
    first = next(module for module in one.model.modules() if isinstance(module, bench_models.DecoderLayer))
    first.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    one.step(torch.randint(DIMS.vocab, (2, 8)))
    assert seen[0].is_leaf
    assert seen[0].grad is not None
    assert bool((seen[0].grad[:, :-1] != 0).any(dim=-1).all())  # of every token that has a next one


@pytest.mark.parametrize("tokens", [16, 40, 8])
def test_shapes_that_could_not_be_told_apart_are_refused(tokens: int) -> None:
    dims = replace(bench_models.DIMS["tiny"], batch=1, length=tokens)  # hidden, intermediate, K and V
    with pytest.raises(ValueError, match=f"batch·length is {tokens}, .*told apart by shape"):
        bench_models.make_base(dims, 1, torch.device("cpu"))


def test_models_are_told_apart_in_their_rows(found: results.Found) -> None:
    """A row has no rank, no dropout and not who adapted: its name, case and implementation say which it is."""
    fields = tuple(schema.MODEL)[:4]
    keys = [tuple(line["row"][field] for field in fields) for line in found["models"]]
    assert len(keys) == len(set(keys)) == len(ALL) + 2 * len(bench_models.GROWING)


@pytest.mark.parametrize("how", ["accelerated", "peft"])
def test_a_forgotten_model_is_timed_beside_what_it_is_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    listed = (Which(FROZEN, "eager"), *(Which(LORA, way) for way in ("peft", "accelerated")))
    bench = made.bench(tmp_path)
    bench_models.measure_models(bench, DIMS, 1, listed, PEFT_STEP)
    before = made.forget(tmp_path, f"|{how}")
    timed: list[str] = []
    times = bench.device.times
    monkeypatch.setattr(bench.device, "times", lambda steps, *given: timed.extend(steps) or times(steps, *given))
    again = made.bench(tmp_path, bench.device)
    bench_models.measure_models(again, DIMS, 1, listed, PEFT_STEP)
    assert [key.rpartition("|")[2] for key in timed] == ["eager", "peft", "accelerated"][: 2 + (how == "accelerated")]
    lines = again.store.of("model")
    assert lines[:2] == before
    assert lines[2]["detail"]["how"] == how
    assert lines[2]["detail"]["over_frozen"] > 0
    assert ("faster" in lines[2]["detail"]) == (how == "accelerated")
    part = results.of_store(again.store) | {"notes": {"peft": {**vars(DIMS), "layers": 1}}}
    for line, ms in zip(lines, (1.0, 2.0, 3.0), strict=True):
        line["row"]["median_ms"] = ms
    found = {line["row"]["impl"]: f"{line['row']['median_ms']:.0f}" for line in lines}
    assert f"{found['peft']} → {found['ours']}" in tables.of_peft(part, False)[1]  # not in the order of the store
    made.forget(tmp_path, f"|{how}")
    monkeypatch.setattr(bench_models, "check", lambda *given: 1 / 0)
    again = made.bench(tmp_path, bench.device)
    bench_models.measure_models(again, DIMS, 1, listed, PEFT_STEP)
    kinds = [line["kind"] for line in again.store.settled().values()]
    assert kinds == ["model", "model", "error"]  # what stood there stays


@pytest.mark.parametrize("which", [Which(VECTOR_LORA, "ours"), Which(VECTORS, "accelerated"), Which(HIRA, "peft")])
def test_a_wrong_model_is_refused(which: Which) -> None:
    whole, ids = base(), torch.randint(DIMS.vocab, (1, 8))
    one = bench_models.adapt(whole, which, DIMS)
    bench_models.check(one, whole, ids, DIMS)
    with torch.no_grad():
        whole.layers[1].up_proj.weight[0] *= 1.01  # type: ignore[index]
    own = whole.layers[1].up_proj.weight.clone()
    bench_models.check(one, whole, ids, DIMS)  # they share it
    whole.layers[1].up_proj.weight = torch.nn.Parameter(own * 1.01, requires_grad=False)
    with pytest.raises(AssertionError, match="is off by"):
        bench_models.check(one, whole, ids, DIMS)


def test_a_wrong_model_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One case that is off: the others keep their rows, and it is not tried again."""
    check = bench_models.check

    def wrong(one: bench_models.Trained, *given: Any) -> float:
        if one.which == Which(LORA_LORA, "accelerated"):
            one.trained()[0].data[0] += 1e-2
            one.params = {path: {n: v.detach().clone() for n, v in own.items()} for path, own in one.params.items()}
        return check(one, *given)

    monkeypatch.setattr(bench_models, "check", lambda one, *given: wrong(one, *given))
    bench = made.bench(tmp_path)
    listed = (Which(FROZEN, "eager"), Which(LORA, "peft"), Which(LORA_LORA, "accelerated"))
    bench_models.measure_models(bench, DIMS, 1, listed, PEFT_STEP)
    assert [line["row"]["case"] for line in bench.store.of("model")] == [FROZEN, LORA]
    (error,) = bench.store.of("error")
    assert "accelerated" in error["what"]
    count = len(bench.store.lines)
    bench_models.measure_models(bench, DIMS, 1, listed, PEFT_STEP)
    assert len(bench.store.lines) == count


def test_layers_that_stay_with_peft_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models.gk, "accelerate", lambda model, verbose: model)
    with pytest.raises(AssertionError, match="every layer should run on our operators"):
        bench_models.adapt(base(), Which(LORA, "accelerated"), DIMS)
