"""What first light launches is asked for on the dry card; what is compiled there and packed, another Triton finds."""

from __future__ import annotations

from pathlib import Path


def one_layer(folder: str) -> dict[str, list[str]]:
    """The stage of one layer, and of the rest of first light's the groups of the fewest tokens; nothing is compiled."""
    from benchmarks import cases, devices
    from benchmarks.measure import Bench
    from benchmarks.store import Store
    from dry_card import card, numberless
    from glora_kernels.runtime import program

    numberless.unnumbered([])
    store = Store(Path(folder) / "cuda.stage.jsonl", {"device": "dry"})
    bench = Bench(devices.get("cuda"), "cuda", store, given_rounds=1, say=lambda *text, **how: None)
    bench.ceilings()
    with card.compilations(False) as asked, program.launching(cached=False):
        for name, m in (("one-layer", 2048), ("headline", 512), ("few-tokens", 1)):
            stage = cases.find("cuda", name)
            bench.group(stage, next(group for group in stage.groups if group.entries[0].m == m))
    errors = [line["reason"] for line in store.of("error") if line["impl"] == "ours"]
    return {"asked": sorted(set(asked)), "errors": errors, "rows": [line["key"] for line in store.of("row")]}


KERNELS = {
    "_glora_fwd_kernel", "_glora_dx_kernel", "_dy_kernel", "_x_kernel", "_dequantize_kernel", "_small_m_kernel",
}  # fmt: skip


def test_a_layer_of_first_light_is_measured_up_to_its_numbers(on_card, tmp_path):
    found = on_card(one_layer, str(tmp_path))
    assert found["errors"] == []
    assert {*found["asked"]} >= KERNELS
    ours = [key for key in found["rows"] if "|ours|" in key]
    assert sum(key.startswith("lora|") for key in ours) == 2 + 4  # two modes, and of the other stage two passes
    assert sum(key.startswith("nf4-lora|") for key in ours) == 4 + 2


def compiled_and_packed(folder: str) -> list[int]:
    from benchmarks import warm_cache

    warm_cache.record(Path(folder, "recorded"))
    _forward()
    return [*warm_cache.pack(Path(folder, "first"), Path(folder, "recorded"), Path(folder, "warm.tar.xz"))]


def unpacked_and_launched(folder: str) -> dict[str, object]:
    from triton.runtime import cache

    from benchmarks import steps, warm_cache
    from dry_card import card

    own, second = cache.triton_key(), Path(folder, "second")
    cache.triton_key = lambda: f"{own}, built otherwise"
    counts, launches = warm_cache.unpack(Path(folder, "warm.tar.xz"), second), card.launches()
    there = steps.entries(second)
    _forward()
    compiled = [steps.name_of(second / entry) for entry in sorted(steps.entries(second) - there)]
    shared = there & steps.entries(Path(folder, "first"))
    found = {"unpacked": [*counts], "compiled": compiled, "shared": sorted(steps.name_of(second / e) for e in shared)}
    return {**found, "launches": card.launches() - launches}


def _forward() -> None:
    import torch

    from dry_card import forms

    with torch.no_grad():
        forms.layer(k=256, n=256)(forms.tensor(64, 256))


def test_a_packed_cache_misses_nothing(on_card, tmp_path):
    """In another folder, under another build's key: kernels are under other names, modules under their own."""
    folder = str(tmp_path)
    packed = on_card(compiled_and_packed, folder, TRITON_CACHE_DIR=f"{folder}/first")
    assert packed[0] >= 2
    found = on_card(unpacked_and_launched, folder, TRITON_CACHE_DIR=f"{folder}/second")
    assert found["compiled"] == []
    assert found["unpacked"] == packed
    assert found["launches"] >= 2
    assert not any(name.endswith("_kernel") for name in found["shared"])
