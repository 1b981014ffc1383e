"""LyCORIS's GLoRA beside ours, at hardly any size: what is timed computes the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import devices, lycoris_ratios, peers

pytest.importorskip("lycoris")


@pytest.fixture(autouse=True)
def _same_environment_afterwards(monkeypatch):
    monkeypatch.setenv("LYCORIS_KERNEL_BACKEND", "torch")


def problem():
    return lycoris_ratios.problem_of(6, 10, 8, 3, "fp32", torch.device("cpu"))


def test_all_that_a_cpu_has_is_timed_over_the_frozen_layer(capsys):
    found = lycoris_ratios.measure(problem(), devices.get("cpu"), rounds=2)
    on_cards = {"LyCORIS, rebuild, Triton"}
    assert found.keys() == {"frozen", *lycoris_ratios.CONTESTANTS} - on_cards
    assert all(spread.median > 0 for spread in found.values())
    assert "LyCORIS, rebuild, Triton: LyCORIS has no backend 'triton' on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("bypass", [False, True])
def test_what_computes_something_else_is_not_timed(monkeypatch, bypass):
    def halved(given):
        contestant = peers.lycoris(given, bypass=bypass)
        with torch.no_grad():
            contestant.params["A_up"].mul_(0.5)
        return contestant

    monkeypatch.setitem(lycoris_ratios.CONTESTANTS, "LyCORIS, bypass", halved)
    with pytest.raises(AssertionError, match="is off by"):
        lycoris_ratios.measure(problem(), devices.get("cpu"), rounds=1)
