"""What the interpreter has no word for: streams, devices, threads, graph capture, memory that moves."""

from __future__ import annotations

from typing import Any

import pytest


def streams() -> list[list[int]]:
    """The streams of what is launched by one layer on the default stream and two others, by turns; and theirs."""
    import torch

    from dry_card import card, forms

    layer, x = forms.layer(), forms.tensor(512, 4096, grad=True)
    others = torch.cuda.Stream(), torch.cuda.Stream()
    found = []
    for stream in (torch.cuda.current_stream(), *others, torch.cuda.current_stream(), *others):
        with torch.cuda.stream(stream), card.recorded() as log:
            forms.step(layer, x)
        found.append([stream.cuda_stream, *sorted({launch.stream for launch in log})])
    return found


def test_launches_go_to_the_current_stream(on_card):
    for own, *used in on_card(streams):
        assert used == [own]


def devices() -> list[dict[str, Any]]:
    """Layers on both devices, called by turns while the first is current."""
    import torch

    from dry_card import card, forms

    found = []
    layers = [forms.layer(device=f"cuda:{i}") for i in range(2)]
    for i in (0, 1, 0, 1):
        with card.recorded() as log:
            forms.step(layers[i], forms.tensor(512, 4096, device=f"cuda:{i}", grad=True))
        used = sorted({launch.device for launch in log})
        found.append({"layer": i, "used": used, "current": torch.cuda.current_device(), "launches": len(log)})
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream()) as _, card.recorded() as log:
        own = torch.cuda.current_stream().cuda_stream
        forms.step(layers[1], forms.tensor(512, 4096, device="cuda:1", grad=True))
    found.append(
        {"layer": 1, "used": [1] if {launch.stream for launch in log} == {own} else [], "current": 0, "launches": 6}
    )
    return found


def test_launches_go_to_the_device_of_the_tensors(on_card):
    for call in on_card(devices):
        assert call == {"layer": call["layer"], "used": [call["layer"]], "current": 0, "launches": 6}


def threads() -> dict[str, int]:
    """Two threads on streams of their own, with a layer each: what of a layer was launched elsewhere."""
    import torch

    from dry_card import card, forms, in_threads

    layers, streams = [forms.layer() for _ in range(2)], [torch.cuda.Stream() for _ in range(2)]
    forms.step(layers[0], forms.tensor(512, 4096, grad=True))  # compiled before they start

    def work(i: int) -> None:
        with torch.cuda.stream(streams[i]):
            for _ in range(20):
                forms.step(layers[i], forms.tensor(512, 4096, grad=True))

    with card.recorded() as log:
        wrong = in_threads(2, work)
    kernels = [launch for launch in log if launch.registers]
    for layer, stream in zip(layers, streams, strict=True):
        own = [launch for launch in kernels if any(map(launch.takes, layer.parameters()))]
        wrong += [launch.name for launch in own if launch.stream != stream.cuda_stream]
    return {"launches": len(kernels), "wrong": len(wrong)}


def test_two_threads_launch_on_their_own_streams(on_card):
    assert on_card(threads) == {"launches": 2 * 20 * 6, "wrong": 0}


def captured(names: list[str]) -> dict[str, dict[str, Any]]:
    """Training steps under capture, after a warm-up; and how often the host waited for the card in a plain one."""
    import torch

    from dry_card import card, forms
    from glora_kernels.glora.op import seeds_on_device

    found = {}
    for name in names:
        make, m = forms.TRAINED[name]
        module, x = make(), forms.tensor(m, 4096, grad=True)
        forms.step(module, x)
        waits = card.waits()
        forms.step(module, x)
        waits = card.waits() - waits
        with seeds_on_device():
            forms.step(module, x)
        with torch.cuda.graph(torch.cuda.CUDAGraph()), card.compilations() as asked, card.recorded() as log:
            own = torch.cuda.current_stream().cuda_stream
            forms.step(module, x)
        found[name] = {
            "waits": waits, "compiled": asked, "elsewhere": [e.name for e in log if e.stream != own],
            "operations": sorted({e.name for e in log if not e.registers}),
        }  # fmt: skip
    return found


@pytest.mark.parametrize("form", ["LoRA", "LoRA, dropout"])
def test_a_step_is_captured(form, on_card):
    """Nothing is compiled, read by the host or launched elsewhere meanwhile; the seed is drawn on the card."""
    found = on_card(captured, ["LoRA", "LoRA, dropout"])[form]
    drawn = ["aten::random_"] if "dropout" in form else []
    assert found == {"waits": 0, "compiled": [], "elsewhere": [], "operations": drawn}


def moved() -> list[bool]:
    """Whether launches follow parameters and a base that take new memory between calls, when the old is gone."""
    import torch

    from dry_card import card, forms

    found = []
    layer, x = forms.layer(), forms.tensor(512, 4096, grad=True)
    with card.fresh_addresses():
        for name in ("", "weight", "B_up", "B_down", ""):
            if name:
                parameter = getattr(layer, name)
                parameter.data = torch.empty_like(parameter.data)
            with card.recorded() as log:
                forms.step(layer, x)  # a pointer to freed memory is refused
            found.append(all(any(e.takes(p) for e in log) for p in layer.parameters()))
        del layer
        layer, x = forms.layer(), forms.tensor(512, 4096, grad=True)
        with card.recorded() as log:
            forms.step(layer, x)
        found.append(all(any(e.takes(p) for e in log) for p in (x, *layer.parameters())))
    return found


def test_launches_follow_memory_that_moves(on_card):
    assert on_card(moved) == [True] * 6
