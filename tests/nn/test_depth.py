"""What is done for all layers at once: merging a model, and β once a step."""

import contextlib
import copy
import pickle

import pytest
import torch
from stack import Stack, close, names, shifted, step
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.depth import op as depth
from glora_kernels.nn.depth import shift_once
from glora_kernels.nn.model import named_layers
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime.planning import planning

MIXED = {
    "*.q_proj": GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=3, alpha=6),
    "*.k_proj": GLoRAConfig("vector", "vector", "vector", "constant", "constant"),
    "*.v_proj": GLoRAConfig("none", "none", "none", "none", "none"),
    "*.o_proj": GLoRAConfig("lora", "lora", "vector", "none", "vector", rank=3, variant="matmul"),
    "*": GLoRAConfig("constant", "lora", "none", "none", "constant", rank=5, dropout=0.25),
}
"""Layers with and without a bias, and every kind of support."""


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(t.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name, t in left.items()
    )


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_is_merged_and_restored_in_one_launch_each(vit, randomize, dtype, poison):
    model = randomize(gk.inject(vit().to(dtype), MIXED))
    one_by_one, exact, before = copy.deepcopy(model), copy.deepcopy(model).double(), state(model)
    for layer in (*named_layers(one_by_one).values(), *named_layers(exact).values()):
        layer.merge()
    with gk.backend("triton"):
        with planning("cpu") as steps:
            gk.merge(model)
            gk.unmerge(model)
        assert names(steps) == ["_merge_kernel", "_restore_kernel"]
        assert same_bits(state(model), before)
        gk.merge(model)
        assert all(layer.merged for layer in named_layers(model).values())
        got, plain, true = state(model), state(one_by_one), state(exact)
        assert got.keys() == plain.keys()
        for name, value in got.items():
            assert largest_error(value, true[name]) <= allowed_error(true[name], plain[name], dtype), name
        gk.unmerge(model)
    assert same_bits(state(model), before)
    assert not any(layer.merged for layer in named_layers(model).values())


def test_what_no_kernel_takes_is_merged_by_itself(vit, gpt2, randomize):
    """float64, and one launch a dtype and order of storage for the others."""
    model = nn.ModuleList([vit(), vit().half(), gpt2(), vit().double()])
    randomize(gk.inject(model, GLoRAConfig("vector", "none", E="vector")))
    before = state(model)
    one_by_one = copy.deepcopy(model)
    for layer in named_layers(one_by_one).values():
        layer.merge()
    with gk.backend("triton"):
        with planning("cpu") as steps:
            gk.merge(copy.deepcopy(model))
        assert names(steps) == ["_merge_kernel"] * 3
        gk.merge(model)
        assert same_bits(state(model), state(one_by_one)), "vectors: bit for bit"
        gk.unmerge(model)
    assert same_bits(state(model), before)


@pytest.mark.parametrize("call", [1, 2])
def test_a_launch_that_fails_changes_nothing(vit, randomize, monkeypatch, call):
    model = nn.ModuleList([vit(), vit().half(), vit().double()])
    randomize(gk.inject(model, GLoRAConfig("vector", "none", E="vector")))
    before = state(model)
    original, calls = depth.merge, []

    def fail(layers, betas):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("out of resources")
        original(layers, betas)

    monkeypatch.setattr(depth, "merge", fail)
    with gk.backend("triton"), pytest.raises(RuntimeError, match="out of resources"):
        gk.merge(model)
    assert not any(layer.merged for layer in named_layers(model).values())
    assert same_bits(state(model), before)


def test_merging_at_once_keeps_the_rules_of_merging(vit, full, randomize):
    """A pending backward is told, a disabled layer refused, and a base whose dtype changed restored all the same."""
    model = randomize(gk.inject(vit(), full)).eval()
    x = torch.randn(3, 4, 12)
    expected, before = model(x), state(model)
    y = model(x.requires_grad_())
    with gk.backend("triton"):
        with gk.disabled(model), pytest.raises(RuntimeError, match="disabled"):
            gk.merge(model)
        gk.merge(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        model.double()
        gk.unmerge(model)
    assert same_bits(state(model.float()), before)


@pytest.mark.gpu
def test_without_pinned_memory_layers_are_restored_one_by_one(vit, full, randomize, monkeypatch):
    model = randomize(gk.inject(vit(), full)).cuda()
    before, original = state(model), torch.empty_strided

    def fail(*args, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("cannot pin")
        return original(*args, **options)

    monkeypatch.setattr(torch, "empty_strided", fail)
    with pytest.warns(UserWarning, match="no pinned host memory"):
        gk.merge(model)
    gk.unmerge(model)
    assert same_bits(state(model), before)


# β once a step.


@pytest.mark.parametrize(("route", "dtype", "reentrant"), [
    ("eager", torch.float64, None), ("eager", torch.float64, False), ("eager", torch.float64, True),
    ("triton", torch.float32, True),
])  # fmt: skip
def test_shift_once_changes_no_number(randomize, route, dtype, reentrant):
    """With and without activation checkpointing of either kind."""
    model = shifted(randomize, dtype, depth=3 if route == "eager" else 2)
    x = torch.randn(2, 5, 12, dtype=dtype)
    with gk.backend(route):
        expected, _ = step(model, x)
        model.reentrant = reentrant
        got, _ = step(model, x, shift_once)
    close(got, expected, 1e-12 if dtype == torch.float64 else 2e-6)


def test_shift_once_is_one_launch_forward_and_two_backward(randomize):
    model, x = shifted(randomize), torch.randn(5, 12)

    def count():
        return [name for name in names(steps) if "shift" in name or "wc" in name or "c_grad" in name]

    with gk.backend("triton"):
        with planning("cpu") as steps:
            model(x).sum().backward()
        assert count().count("_wc_kernel") == 6
        with planning("cpu") as steps, shift_once(model):
            model(x).sum().backward()
        assert count() == ["_shift_kernel", "_shift_grad_kernel", "_shift_down_kernel"]


def test_shift_once_leaves_nothing_behind(randomize):
    model, x = shifted(randomize).eval(), torch.randn(5, 12)
    layers = list(named_layers(model).values())
    expected = model(x)
    with pytest.raises(KeyError), shift_once(model):
        raise KeyError
    assert all(layer._beta is None for layer in layers)
    with shift_once(model):
        outer = [layer._beta for layer in layers]
        assert all(layer.kept_shift().shape == (layer.out_features,) for layer in layers)
        with torch.no_grad(), shift_once(model):
            assert not any(layer.kept_shift().requires_grad for layer in layers)
        assert [layer._beta for layer in layers] == outer
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(layer._beta is None for layer in named_layers(copied).values())
            assert torch.equal(copied(x), expected)


def stepped(model, layer):
    """By an optimizer, of which some write past PyTorch's counter of versions."""
    layer.E.grad = torch.ones_like(layer.E)
    torch.optim.AdamW([layer.E], lr=0.5, foreach=True).step()


class Raw(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        self.param_groups[0]["params"][0].data.add_(1)


CHANGES = {
    "in place": lambda model, layer: layer.D.add_(1),
    "an optimizer": stepped,
    "an optimizer that writes past the counter": lambda model, layer: Raw([layer.C_up]).step(),
    "other memory": lambda model, layer: setattr(layer.E, "data", layer.E.data + 1),
    "another parameter": lambda model, layer: setattr(layer, "E", nn.Parameter(layer.E.detach() + 1)),
    "a state": lambda model, layer: layer.load_state_dict({n: t + 1 for n, t in layer.state_dict().items()}),
    "a state that is assigned": lambda model, layer: layer.load_state_dict(
        {n: t + 1 for n, t in layer.state_dict().items()}, assign=True
    ),
    "merged": lambda model, layer: layer.merge(),
    "merged and unmerged, with another bias": lambda model, layer: (
        layer.merge(), layer.unmerge(), layer.bias.detach().add_(1)
    ),
    "frozen": lambda model, layer: layer.E.requires_grad_(False),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_inside_shift_once_is_noticed(randomize, change):
    """With and without gradients, and the layers that did not change still have their gradients."""
    model, x = shifted(randomize, torch.float64).eval(), torch.randn(5, 12, dtype=torch.float64)
    layer = model.blocks[1][0]
    with shift_once(model):
        model(x).square().sum().backward()
        before = model(x).detach()
        with torch.no_grad():
            change(model, layer)
            model.zero_grad()
            quiet = model(x)
        with torch.set_grad_enabled(not layer.merged):
            y = model(x)
        if not layer.merged:
            y.square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = model(x)
    torch.testing.assert_close(quiet, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert layer.merged or not layer.E.requires_grad or not torch.allclose(before, quiet)
    if not layer.merged:
        expected.square().sum().backward()
        close(got, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, 1e-12)


def test_shift_once_entered_in_another_mode(randomize):
    """Without gradients or in inference mode, and used with gradients: they are there all the same."""
    model, x = shifted(randomize, torch.float64).eval(), torch.randn(5, 12, dtype=torch.float64)
    expected, _ = step(model, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with contextlib.ExitStack() as stack:
            with mode():
                stack.enter_context(shift_once(model))
                torch.testing.assert_close(model(x), expected["y"])
            got, _ = step(model, x)
        close(got, expected, 1e-12)


def test_shift_once_and_merged_or_disabled_layers(randomize):
    model, x = shifted(randomize).eval(), torch.randn(5, 12)
    expected = model(x)
    layers = list(named_layers(model).values())
    layers[0].merge()
    with torch.no_grad(), shift_once(model):
        assert layers[0]._beta is None
        torch.testing.assert_close(model(x), expected)
    layers[0].unmerge()
    with gk.disabled(model):
        base = model(x)
        with shift_once(model):
            assert torch.equal(model(x), base)
    with pytest.raises(ValueError, match="shift_once: the model has no GLoRA layer"), shift_once(Stack()):
        pass


def test_several_backwards_inside_one_shift_once(randomize):
    model, xs = shifted(randomize).eval(), torch.randn(2, 5, 12)
    for x in xs:
        model(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with shift_once(model):
        for x in xs:
            model(x).square().sum().backward()
    close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


def test_a_small_shift_beside_a_large_bias_survives_a_narrow_dtype_of_computation():
    """β is added in fp32, over 4 bits that are computed in 16 as well: bf16 would round 1.001 to 1."""
    linear = nn.Linear(64, 48)
    nn.init.ones_(linear.bias)
    model = gk.quantize(nn.Sequential(linear), compute_dtype=torch.bfloat16)
    model = gk.inject(model, GLoRAConfig("none", "none", "none", "none", "vector"), target_modules=["0"])
    with torch.no_grad():
        model[0].E.copy_(torch.linspace(-1e-3, 1e-3, 48))
    with shift_once(model):
        beta = model[0].kept_shift()
        assert beta.dtype == torch.float32
        assert torch.equal(beta, 1 + model[0].E)
        x = torch.randn(512, 64)
        once = model(x)
    assert torch.equal(once, model(x))
