"""A signal at any line of the package leaves the old state or the new one, and what restores the base still works."""

import copy
import warnings
from functools import partial

import pytest
import torch
from helpers import EVERYTHING, interrupted
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.nn.model import named_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*have one now")
FULL = GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=2)
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def at_every_line(make, act, check, most=12):
    """`check(model)` where `act(model)` was interrupted at line 1, 2, ..., to its last line."""
    lines = 1
    while interrupted(partial(act, make()), lines):
        lines *= 2
    step = 1 if EVERYTHING else max(1, lines // 2 // most)
    line = 1
    while interrupted(partial(act, model := make()), line):
        check(model)
        line += step
    assert line > 10


def copies(model):
    return partial(copy.deepcopy, model)


def perturb(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in named_layers(model).values():
            for parameter in layer.adapter().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def plain():
    """Dense layers with and without a bias, a Conv1D, and one in 4 bits."""
    torch.manual_seed(0)
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 8)
    packed = gk.quantize(nn.Linear(8, 8, bias=False), double_quant=True)
    return nn.Sequential(nn.Linear(8, 8, bias=False), conv1d, packed, nn.Linear(8, 4))


def adapted(merged=False):
    model = perturb(gk.inject(plain(), FULL))
    if merged:
        gk.merge(model, requantize=True)
    return model


def dense(merged=False):
    """What the kernels merge in one launch."""
    torch.manual_seed(0)
    model = perturb(gk.inject(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)), FULL))
    if merged:
        gk.merge(model)
    return model


def bits(model):
    state = copy.deepcopy(model.state_dict())
    return {
        name: value.view(-1).view(torch.uint8) for name, value in state.items() if "weight" in name or "bias" in name
    }


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def check_merging(model, before, merged):
    """All layers are as they were or all merged; what comes next finds the base bit for bit."""
    layers = named_layers(model).values()
    assert len({layer.merged for layer in layers}) == 1
    if next(iter(layers)).merged:
        assert equal(bits(model), merged)
        gk.unmerge(model)
    assert equal(bits(model), before)
    gk.merge(model, requantize=True)
    assert equal(bits(model), merged)
    gk.unmerge(model)
    assert equal(bits(model), before)


@pytest.mark.parametrize("act", ["merge", "unmerge"])
@pytest.mark.parametrize("build", [adapted, dense])
def test_merging_a_model(act, build):
    with gk.backend("triton" if build is dense else "auto"):
        before, merged = bits(build()), bits(build(merged=True))
        assert not equal(before, merged)
        call = partial(gk.merge, requantize=True) if act == "merge" else gk.unmerge
        check = partial(check_merging, before=before, merged=merged)
        at_every_line(copies(build(act == "unmerge")), call, check, most=3 if build is dense else 10)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled(merged):
    before, after = bits(adapted()), bits(adapted(merged=True))

    def act(model):
        with gk.disabled(model):
            model(X)

    def check(model):
        assert not any(layer._disabled for layer in named_layers(model).values())
        check_merging(model, before, after)

    at_every_line(copies(adapted(merged)), act, check, most=8)


def structure(model):
    """The modules of a model by path, and which of their parameters are trained."""
    modules = [(path, module, type(module)) for path, module in model.named_modules()]
    return modules, [(name, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("act", ["inject", "quantize", "load_adapter"])
def test_replacing_layers(act, tmp_path):
    """The old modules, or all of the new ones with all of their values; and the call can be made again."""
    torch.manual_seed(0)
    config = gk.ShareLoRAConfig(rank=2)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in "ab")
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(8, 2)})
    saved = perturb(gk.inject(copy.deepcopy(model), config, train=["head"]))
    with torch.no_grad():
        saved["head"].weight.add_(1)
    gk.save_adapter(saved, tmp_path / "a.safetensors")
    acts = {
        "inject": lambda m: gk.inject(m, config, train=["head"]),
        "quantize": gk.quantize,
        "load_adapter": lambda m: gk.load_adapter(m, tmp_path / "a.safetensors"),
    }
    expected = acts[act](copy.deepcopy(model))
    before, new = copy.deepcopy(model.state_dict()), expected.state_dict()

    def check(m):
        kinds = [type(module) for module in m.modules()]
        assert kinds in ([type(module) for module in model.modules()], [type(module) for module in expected.modules()])
        state = m.state_dict()
        if kinds == [type(module) for module in model.modules()]:
            assert equal(state, before)
            assert structure(m)[1] == structure(model)[1]
            assert not any(key.startswith("_glora") for module in m.modules() for key in vars(module))
            acts[act](m)
            state = m.state_dict()
        assert structure(m)[1] == structure(expected)[1]
        assert state.keys() == new.keys()
        if act != "inject":
            assert equal(state, new)

    at_every_line(copies(model), acts[act], check, most=10)


def test_loading_into_an_injected_model(tmp_path):
    model = adapted()
    gk.save_adapter(model, tmp_path / "a.safetensors")
    new = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in (p for layer in named_layers(model).values() for p in layer.adapter().values()):
            parameter.neg_()
    before = copy.deepcopy(model.state_dict())

    def check(m):
        assert equal(m.state_dict(), before) or equal(m.state_dict(), new)

    at_every_line(copies(model), lambda m: gk.load_adapter(m, tmp_path / "a.safetensors"), check, most=10)


@pytest.mark.parametrize("requantize", [False, True])
def test_merging_and_unloading(requantize):
    """Each layer is what it was, or merged or plain, which compute the same; called again, it comes to its end."""
    model = adapted() if requantize else dense()
    y = model(X)
    done = gk.merge_and_unload(copy.deepcopy(model), requantize) if not requantize else None

    def check(m):
        if not requantize:
            torch.testing.assert_close(m(X), y, rtol=1e-4, atol=1e-5)
        if named_layers(m):
            call(m)
        if done is not None:
            assert equal(m.state_dict(), done.state_dict())

    def call(m):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gk.merge_and_unload(m, requantize)

    at_every_line(copies(model), call, check, most=8)
