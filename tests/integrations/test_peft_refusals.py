"""Our PEFT methods refuse layers whose weights a module around them reads, all in one error."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from torch import nn

import glora_kernels.integrations.peft  # noqa: F401
from glora_kernels.integrations.peft import GLoRAPeftConfig, ShareLoRAPeftConfig


@pytest.mark.parametrize("config", [GLoRAPeftConfig, ShareLoRAPeftConfig])
def test_layers_that_are_read_are_refused_and_nothing_is_changed(config):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"2 of 3 layers cannot be adapted:\n.*TransformerEncoderLayer\.forward"):
        get_peft_model(model, config(r=2, target_modules=["linear1", "linear2", "1"]))
    assert type(model[1]) is type(model[0].linear1) is nn.Linear
    get_peft_model(model, config(r=2, target_modules=["linear1", "1"], exclude_modules=["linear1"]))
    assert type(model[0].linear1) is nn.Linear


def test_a_method_without_a_support_is_refused():
    with pytest.raises(ValueError, match="all 'none'"):
        GLoRAPeftConfig(A="none", B="none", E="none")
    config = GLoRAPeftConfig(alpha=4, dropout=0.5, patterns={"a": {"B": "none"}})
    found = config.layer_configs(["a", "b"])
    assert (found["a"].alpha, found["a"].dropout, found["b"].dropout) == (None, 0.0, 0.5)
