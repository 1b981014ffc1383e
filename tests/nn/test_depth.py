"""What is done for all layers at once: merging a model, β once a step, gradients of shared factors at the end."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.launch.plan import planning
from glora_kernels.nn.depth import deferred_shared_grads, shift_once
from glora_kernels.nn.model import named_layers
from glora_kernels.ops import depth
from glora_kernels.reference.tolerance import allowed_error, largest_error

MIXED = {
    "*.q_proj": GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=3, alpha=6),
    "*.k_proj": GLoRAConfig("vector", "vector", "vector", "constant", "constant"),
    "*.v_proj": GLoRAConfig("none", "none", "none", "none", "none"),
    "*.o_proj": GLoRAConfig("lora", "lora", "vector", "none", "vector", rank=3, variant="matmul"),
    "*": GLoRAConfig("constant", "lora", "none", "none", "constant", rank=5, dropout=0.25),
}
"""Layers with and without a bias, and every kind of support."""


def names(steps):
    return [step.kernel.__name__ for step in steps if hasattr(step, "kernel")]


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
    one_by_one, before = copy.deepcopy(model), state(model)
    for layer in named_layers(one_by_one).values():
        layer.merge()
    with gk.backend("triton"):
        with planning("cpu") as steps:
            gk.merge(model)
            gk.unmerge(model)
        assert names(steps) == ["_merge_kernel", "_restore_kernel"]
        assert same_bits(state(model), before)
        gk.merge(model)
        assert all(layer.merged for layer in named_layers(model).values())
        got, expected = state(model), state(one_by_one)
        assert got.keys() == expected.keys()
        for name, value in got.items():  # a low-rank sum in another order: the last bit
            assert largest_error(value, expected[name]) <= torch.finfo(dtype).eps * float(expected[name].abs().max())
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


class Stack(nn.Module):
    """Residual blocks of two layers each, through activation checkpoints if asked for."""

    def __init__(self, dim=12, depth=3, dtype=torch.float32):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim + 7), nn.GELU(), nn.Linear(dim + 7, dim, bias=False)) for _ in range(depth)
        ).to(dtype)
        self.reentrant = None

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


SHIFTS = {
    "*.0": GLoRAConfig("vector", "lora", "lora", "vector", "constant", rank=3, dropout=0.25),
    "*.2": GLoRAConfig("none", "none", "vector", "none", "vector"),
}


def shifted(randomize, dtype=torch.float32, depth=3):
    return randomize(gk.inject(Stack(depth=depth, dtype=dtype), SHIFTS, target_modules=["0", "2"]))


def step(model, x, context=None):
    """y and every gradient of one training step, and what the context gave."""
    model.zero_grad()
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    if context is None:
        given, y = None, model(leaf)
        y.square().sum().backward()
    else:
        with context(model) as given:
            y = model(leaf)
            y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **grads}, given


def close(got, expected, rtol=1e-5):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        size = float(expected[name].abs().max())
        assert float((value.double() - expected[name].double()).abs().max()) <= rtol * size, name


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
        assert all(beta.shape == (layer.out_features,) for beta, layer in zip(outer, layers, strict=True))
        with torch.no_grad(), shift_once(model):
            assert not any(layer._beta.requires_grad for layer in layers)
        assert [layer._beta for layer in layers] == outer
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(layer._beta is None for layer in named_layers(copied).values())
            assert torch.equal(copied(x), expected)
        with torch.no_grad():
            layers[0].E.add_(1)
        assert torch.equal(model(x), expected), "β is that of the moment the context was entered"
    assert not torch.equal(model(x), expected)


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


# Gradients of shared factors.


def shared(randomize, names=("B_down",), dtype=torch.float32, dropout=0.25, depth=3):
    """Blocks whose first layers share factors, and so do their last ones."""
    config = GLoRAConfig("vector", "lora", E="vector", rank=3, alpha=6, dropout=dropout)
    model = gk.inject(Stack(depth=depth, dtype=dtype), config, target_modules=["0", "2"])
    for block in model.blocks[1:]:
        for place in (0, 2):
            for name in names:
                setattr(block[place], name, getattr(model.blocks[0][place], name))
    return randomize(model)


SHARED = [("B_down",), ("B_up",), ("B_down", "B_up")]


def literal_sum(model, x, name):
    """The gradient of one type's factor as the sum over layers, from each layer's own inputs and output gradients."""
    inputs, hooks = {}, []
    for i, block in enumerate(model.blocks):

        def keep(module, args, y, i=i):
            inputs[i] = [args[0].detach().reshape(-1, args[0].shape[-1])]
            y.register_hook(lambda dy: inputs[i].append(dy.reshape(-1, dy.shape[-1])))

        hooks.append(block[0].register_forward_hook(keep))
    step(model, x)
    for hook in hooks:
        hook.remove()
    total = 0
    for i, block in enumerate(model.blocks):
        (layer_x, dy), layer = inputs[i], block[0]
        scale = layer.config.scale
        if name == "B_down":
            total = total + scale * layer.B_up.t() @ dy.t() @ layer_x
        else:
            total = total + scale * dy.t() @ layer_x @ layer.B_down.t()
    return total.detach()


@pytest.mark.parametrize("names", SHARED, ids="+".join)
def test_the_deferred_gradient_is_the_sum_over_layers(randomize, names):
    model, x = shared(randomize, names, torch.float64, dropout=0.0), torch.randn(2, 5, 12, dtype=torch.float64)
    expected, _ = step(model, x)
    got, deferred = step(model, x, deferred_shared_grads)
    close(got, expected, 1e-12)
    for name in names:
        literal = literal_sum(model, x, name)
        size = float(literal.abs().max())
        assert float((got[f"blocks.0.0.{name}"] - literal).abs().max()) <= 1e-12 * size
    m, r, itemsize = 10, 3, 8
    widths = [(19, 12), (12, 19)] * 3  # N and K of every layer
    kept = sum(m * ("B_down" in names) * (k + r) + m * ("B_up" in names) * (n + r) for n, k in widths)
    assert deferred.bytes == kept * itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_on_the_triton_route(randomize, dtype, poison):
    """Against float64, beside autograd's own accumulation in this dtype; the other gradients are bit for bit equal."""
    names = ("B_down", "B_up") if dtype == torch.float16 else ("B_down",)
    model, x = shared(randomize, names, dtype, depth=2), torch.randn(5, 12, dtype=dtype) * 0.1
    with gk.backend("triton"):
        plain, _ = step(model, x)
        got, _ = step(model, x, deferred_shared_grads)
    exact, _ = step(shared(randomize, names, dtype, depth=2).double(), x.double())
    assert got.keys() == plain.keys()
    for name, value in got.items():
        if name.rpartition(".")[2] in names:
            assert largest_error(value, exact[name]) <= allowed_error(exact[name], plain[name], dtype), name
        else:
            assert torch.equal(value, plain[name]), name


def test_all_shared_gradients_are_one_launch(randomize):
    model, x = shared(randomize, ("B_down", "B_up")), torch.randn(5, 12)
    with gk.backend("triton"), planning("cpu") as steps:
        with deferred_shared_grads(model):
            model(x).sum().backward()
            inside = len(steps)
        assert names(steps[inside:]) == ["_shared_grad_kernel"]
    assert "_x_kernel" not in names(steps), "the layers do not compute what is deferred"


@pytest.mark.parametrize("reentrant", [False, True])
def test_deferred_gradients_through_activation_checkpoints(randomize, reentrant):
    model, x = shared(randomize, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    expected, _ = step(model, x)
    model.reentrant = reentrant
    got, deferred = step(model, x, deferred_shared_grads)
    close(got, expected, 1e-12)
    assert deferred.bytes > 0


def test_deferred_gradients_are_added_to_those_there_are(randomize):
    """Gradient accumulation, inside one context and over several; under autocast too."""
    model, x = shared(randomize, dropout=0.0), torch.randn(2, 5, 12)
    once, _ = step(model, x)
    with deferred_shared_grads(model):
        for _ in range(2):
            model(x).square().sum().backward()
    with deferred_shared_grads(model):
        pass  # nothing was handed over: nothing changes
    down = model.blocks[0][0].B_down
    torch.testing.assert_close(down.grad, 3 * once["blocks.0.0.B_down"])
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = step(model, x)
        got, _ = step(model, x, deferred_shared_grads)
    assert down.grad.dtype == torch.float32
    for name in ("blocks.0.0.B_down", "blocks.0.2.B_down"):
        torch.testing.assert_close(
            got[name], expected[name], rtol=2**-6, atol=2**-6 * float(expected[name].abs().max())
        )


def test_one_input_of_several_layers_is_kept_once(randomize):
    class Fan(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(x)

    model = randomize(gk.inject(Fan(), GLoRAConfig.lora(2)))
    model.k.B_down = model.v.B_down = model.q.B_down
    _, deferred = step(model, torch.randn(5, 12), deferred_shared_grads)
    assert deferred.bytes == (5 * 12 + 3 * 5 * 2) * 4


def test_what_is_not_shared_or_not_trained_is_left_alone(randomize):
    model = shifted(randomize)
    got, deferred = step(model, torch.randn(5, 12), deferred_shared_grads)
    assert deferred.bytes == 0
    assert "blocks.0.0.B_down" in got
    model = shared(randomize)
    for layer in named_layers(model).values():
        layer.B_down.requires_grad_(False)
    got, deferred = step(model, torch.randn(5, 12), deferred_shared_grads)
    assert deferred.bytes == 0
    assert not any(name.endswith("B_down") for name in got)


def test_an_exception_drops_what_was_handed_over(randomize):
    model, x = shared(randomize), torch.randn(5, 12)

    def fail():
        with deferred_shared_grads(model) as deferred:
            model(x).sum().backward()
            assert deferred.bytes > 0
            assert all(layer._deferred is None for layer in named_layers(copy.deepcopy(model)).values())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.blocks[0][0].B_down.grad is None
    assert all(layer._deferred is None for layer in named_layers(model).values())


def test_deferral_refuses_what_would_miss_the_gradient(randomize, monkeypatch):
    model = shared(randomize)

    def refused(words, error=RuntimeError, of=model):
        with pytest.raises(error, match=words), deferred_shared_grads(of):
            pass
        assert all(layer._deferred is None for layer in named_layers(of).values())

    down = model.blocks[0][0].B_down
    for register in (down.register_post_accumulate_grad_hook, down.register_hook):
        handle = register(lambda _: None)
        refused("a shared factor has a hook")
        handle.remove()
    words = "inside deferred_shared_grads"
    with deferred_shared_grads(model), pytest.raises(RuntimeError, match=words), deferred_shared_grads(model):
        pass
    refused("the model has no GLoRA layer", ValueError, Stack())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refused("2 processes train together")


@pytest.mark.parametrize("context", [shift_once, deferred_shared_grads])
def test_torch_compile_inside_the_contexts(randomize, context):
    """One graph, and autograd's own accumulation where it is traced."""
    model = shared(randomize, dropout=0.0)
    x = torch.randn(5, 12)
    expected, _ = step(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    with context(model):
        compiled(x).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    close(got, {name: value for name, value in expected.items() if name not in ("x", "y")})
