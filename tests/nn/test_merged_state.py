"""The state dict of a merged model is that of the plain model, and no layer with an adapter takes it unnoticed."""

import copy
import io
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import glora_kernels as gk
from glora_kernels import GLoRAConfig

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
TWICE = r"state is that of a merged layer, whose adapter would be applied twice.*before inject.*unmerge"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)))


@pytest.fixture
def merged(full, randomize):
    model = randomize(gk.inject(net(), full)).eval()
    gk.merge(model)
    return model


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("way", [lambda state: state, through_a_file])
def test_an_injected_model_refuses_it(way, assign, strict, full, randomize, merged):
    model = randomize(gk.inject(net(), full)).eval()
    y = model(X)
    with pytest.raises(RuntimeError, match=TWICE):
        model.load_state_dict(way(merged.state_dict()), strict=strict, assign=assign)
    with pytest.raises(RuntimeError, match=TWICE):
        model[1].load_state_dict(way(merged[1].state_dict()), strict=strict, assign=assign)
    assert torch.equal(model(X), y)


def test_a_plain_model_takes_it(merged, tmp_path):
    state = merged.state_dict()
    assert state.keys() == net().state_dict().keys()
    save_file(state, tmp_path / "a.safetensors")
    for values in (state, through_a_file(state), load_file(tmp_path / "a.safetensors")):
        model = net()
        model.load_state_dict(values)
        assert torch.equal(model(X), merged(X))


def test_through_tools_that_keep_tensors_only(merged, full, randomize, tmp_path):
    save_file(merged.state_dict(), tmp_path / "a.safetensors")
    values = load_file(tmp_path / "a.safetensors")
    model = randomize(gk.inject(net(), full))
    with pytest.raises(RuntimeError, match="Missing key"), pytest.warns(UserWarning, match="applied twice"):
        model.load_state_dict(values)
    with pytest.warns(UserWarning, match="without an adapter was loaded"):
        model.load_state_dict(values, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.inject(net(), full).load_state_dict(net().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=TWICE):
        set_model_state_dict(model, get_model_state_dict(merged))
    plain = net()
    set_model_state_dict(plain, get_model_state_dict(merged))
    assert torch.equal(plain(X), merged(X))


def test_a_merged_model_takes_none(merged):
    with pytest.raises(RuntimeError, match="is merged; call unmerge"):
        merged.load_state_dict(merged.state_dict())
    gk.unmerge(merged)
    merged.load_state_dict(copy.deepcopy(merged.state_dict()))


def test_over_4_bits_it_is_that_of_a_quantized_model(randomize):
    model = gk.quantize(net().append(nn.Linear(4, 4)), double_quant=True)
    keys = model.state_dict().keys()
    model = randomize(gk.inject(model, GLoRAConfig(rank=2))).eval()
    gk.merge(model, requantize=True)
    assert model.state_dict().keys() == keys
    blank = gk.quantize(net().append(nn.Linear(4, 4)), double_quant=True)
    blank.load_state_dict(model.state_dict())
    assert torch.equal(blank(X), model(X))
