"""`warmup` runs what a training will run, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch
from helpers import interpreted, warmup
from torch import nn

import glora_kernels as gk
from glora_kernels.nn.warmup import _sizes
from glora_kernels.runtime import configs
from glora_kernels.runtime.launch import Launch

CONFIG = gk.GLoRAConfig("vector", "lora", "none", "none", "vector", rank=4, dropout=0.5)


@pytest.fixture
def model():
    """Three layers, of which the first and the last are alike."""
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24))
    return gk.inject(net, CONFIG, target_modules=["0", "1", "2"])


@interpreted
def test_each_different_layer_once_in_every_class_of_tokens(model, launched):
    lines = warmup(model, 20)
    assert len(lines) == 2
    assert lines[0].startswith("2 layers like (in_features=16, out_features=24")
    assert re.search(r"forward and backward with 1, 16, 20 tokens, \d+\.\d s$", lines[0])
    assert lines[1].startswith("1 layer like (in_features=24")
    assert [m for name, m in launched if name == "_glora_fwd_kernel"] == [1, 16, 20] * 2
    assert [m for name, m in launched if name == "_glora_dx_kernel"] == [1, 16, 20] * 2
    assert "_finish_kernel" in {name for name, _ in launched}


@interpreted
def test_what_it_launches_is_what_a_step_launches(model, launched):
    warmup(model, [24])
    warmed = set(launched)
    launched.clear()
    with gk.backend("triton"):
        model(torch.randn(24, 16, requires_grad=True)).sum().backward()
    assert set(launched) <= warmed
    assert len(set(launched)) >= 6


@interpreted
def test_inference_runs_no_backward(model, launched):
    lines = warmup(model, [16], training=False)
    assert "forward with 16 tokens" in lines[0]
    assert {name for name, _ in launched} == {"_prepare_kernel", "_glora_fwd_kernel"}


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(8192, [1, 16, 32, 64, 512, 2048, 4096]), (4095, [1, 16, 32, 64, 512, 2048, 4095]), (100, [1, 16, 32, 64, 100]),
     (16, [1, 16]), (15, [1, 15]), (1, [1]), ([64, 7, 64], [64, 7])],
)  # fmt: skip
def test_numbers_of_tokens(tokens, sizes):
    assert _sizes(tokens) == sizes
    if isinstance(tokens, int):
        assert {configs.representative(m) for m in range(1, tokens + 1)} == set(map(configs.representative, sizes))


@interpreted
@pytest.mark.parametrize("training", [True, False])
def test_it_changes_nothing(model, training):
    model[1].eval()
    fired = []
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda grad: fired.append("tensor"))
            p.register_post_accumulate_grad_hook(lambda p: fired.append("accumulate"))
    model[0].register_forward_hook(lambda *args: fired.append("forward"))
    model[0].register_forward_pre_hook(lambda *args: fired.append("pre"))
    model[0].A_kept = model[0].A
    before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    modes = [layer.training for layer in model.modules()]
    state, grad = torch.random.get_rng_state(), torch.is_grad_enabled()
    warmup(model, 16, training=training)
    assert fired == []
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [layer.training for layer in model.modules()] == modes
    assert torch.is_grad_enabled() == grad
    for name, p in model.named_parameters():
        assert p.grad is None
        assert (id(p), p.requires_grad) == (before[name][0], before[name][2])
        assert torch.equal(p, before[name][1])


@interpreted
def test_a_gradient_that_was_there_stays(model):
    model[0].A.grad = torch.full_like(model[0].A, 3.0)
    warmup(model, [16])
    assert model[0].A.grad.eq(3.0).all()


@interpreted
def test_after_an_error_everything_is_as_before(model, monkeypatch):
    model.eval()
    state = torch.random.get_rng_state()
    monkeypatch.setattr(Launch, "run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        warmup(model, [16])
    assert not any(layer.training for layer in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(model[0].weight, nn.Parameter)


@interpreted
def test_what_makes_layers_different(model):
    model[2].B_up.requires_grad_(False)
    assert len(warmup(model, [16])) == 3
    model[2].B_up.requires_grad_(True)
    assert len(warmup(model, [16])) == 2
    model[2].weight = nn.Parameter(torch.zeros(16, 24).t(), requires_grad=False)
    assert len(warmup(model, [16])) == 3, "another layout of the weight"


@interpreted
def test_merged_and_disabled_layers_are_left_out(model):
    model[1].merge()
    assert [line.split(" like")[0] for line in warmup(model, [16])] == ["2 layers"]
    model[1].unmerge()
    with gk.disabled(model):
        assert warmup(model, [16]) == []


@interpreted
def test_autocast(model, launched):
    lines = warmup(model, [16], dtype=torch.bfloat16)
    assert len(lines) == 2
    assert launched


@pytest.mark.filterwarnings("error")
def test_on_a_cpu_there_is_nothing_to_compile(model, launched):
    assert gk.warmup(model, progress=False) == []
    assert launched == []


@interpreted
def test_linear_layers_in_4_bits_without_an_adapter(launched):
    net = gk.quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32)), target_modules=["*"])
    net = gk.inject(net, CONFIG, target_modules=["1"])
    lines = warmup(net, [16])
    assert [line.split(" like (")[0] for line in lines] == ["1 layer", "2 layers"]
    warmed = set(launched)
    launched.clear()
    with gk.backend("triton"):
        net(torch.randn(16, 64, requires_grad=True)).sum().backward()
    assert warmed == set(launched) != set()


def test_errors(model):
    with pytest.raises(ValueError, match="no GLoRA layer"):
        gk.warmup(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        gk.warmup("model")
    for tokens in (0, -1, [8, 0]):
        with pytest.raises(ValueError, match="tokens must be >= 1"):
            gk.warmup(model, tokens)
    with pytest.raises(ValueError, match="got none"):
        gk.warmup(model, [])
    for tokens in (1.5, True, "12"):
        with pytest.raises(TypeError, match="tokens must be an integer"):
            gk.warmup(model, tokens)
    with pytest.raises(ValueError, match=r"dtype must be None.*got torch.float64"):
        gk.warmup(model, dtype=torch.float64)


def test_progress_is_shown_unless_it_is_unwanted(model, capsys):
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("CPU tensors need the interpreter")
    warmup(model, [16])
    assert capsys.readouterr().err == ""
    with gk.backend("triton"):
        gk.warmup(model, [16])
    shown = capsys.readouterr().err
    assert "compiling" in shown
    assert re.search(r"compiled for 2 kinds of layers in \d+\.\d s", shown)


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels are interpreted")
@pytest.mark.parametrize("tokens", [256, 255])
def test_after_it_a_step_compiles_nothing(tokens):
    def compiled():
        modules = [module for name, module in sys.modules.items() if name.startswith("glora_kernels.")]
        kernels = dict(item for module in modules for item in vars(module).items() if item[0].endswith("_kernel"))
        return {
            name: sum(len(caches[0]) for caches in kernel.device_caches.values()) for name, kernel in kernels.items()
        }

    config = gk.GLoRAConfig("vector", "lora", "lora", "vector", "vector", rank=8, dropout=0.1)
    net = nn.Sequential(nn.Linear(128, 192), nn.Linear(192, 128)).to("cuda", torch.bfloat16)
    net = gk.inject(net, config, target_modules=["0", "1"])
    state = torch.cuda.get_rng_state()
    assert len(gk.warmup(net, 256, progress=False)) == 2
    assert torch.equal(torch.cuda.get_rng_state(), state)
    before = compiled()
    assert before["_glora_fwd_kernel"] + before["_added_terms_kernel"] >= 2
    y = net(torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True))
    y.backward(torch.randn_like(y))  # not of a sum, whose gradient is one number seen everywhere
    torch.cuda.synchronize()
    assert compiled() == before
