"""The gradients of factors that layers share, computed at the end of backward."""

import contextlib
import copy

import pytest
import torch
from stack import Stack, close, names, shifted, step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.nn.depth import deferred_shared_grads, shift_once
from glora_kernels.nn.model import named_layers
from glora_kernels.reference.tolerance import allowed_error, largest_error
from glora_kernels.runtime.planning import planning


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
            y = model(x).sum()
        y.backward()
    assert names(steps).count("_shared_grad_kernel") == 1
    assert names(steps)[-1] == "_shared_grad_kernel"
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


def plainly(_):
    return contextlib.nullcontext()


def outcome(make, use, context):
    """The gradients, and what `use(model, x, context)` returns, of a fresh model."""
    torch.manual_seed(1)
    model, x = make(), torch.randn(2, 5, 12, dtype=torch.float64)
    given = use(model, x, context)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = {f"value of {name}": p.detach() for name, p in model.named_parameters()}
    return grads | values | {f"given {i}": tensor for i, tensor in enumerate(given or ())}


def backward_after_the_context(model, x, context):
    with context(model):
        loss = model(x).square().mean()
    loss.backward()


def two_forwards_and_one_of_the_losses_later(model, x, context):
    with context(model):
        first, second = model(x).square().mean(), model(2 * x).abs().mean()
        first.backward()
    second.backward()
    with context(model):
        (model(x).mean() + model(-x).square().mean()).backward()


def a_graph_used_twice(model, x, context):
    with context(model):
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
    loss.backward()


def clipped_and_stepped_inside(model, x, context):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    with context(model):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    return [norm]


def asked_for_by_name(model, x, context):
    """By `torch.autograd.grad`, and into some leaves alone."""
    down, up = model.blocks[0][0].B_down, model.blocks[1][2].B_up
    leaf = x.clone().requires_grad_()
    with context(model):
        loss = model(leaf).square().mean()
        given = torch.autograd.grad(loss, [down, up, leaf], retain_graph=True)
        assert down.grad is None
        loss.backward(inputs=[leaf], retain_graph=True)
        assert down.grad is None
        loss.backward(inputs=[down])
        assert up.grad is None
    return [*given, leaf.grad]


def seen_by_hooks(model, x, context):
    down, seen = model.blocks[0][0].B_down, []
    down.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    down.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with context(model):
        model(x).square().mean().backward()
    assert len(seen) == 2
    return seen


def an_exception_after_backward(model, x, context):
    def fail():
        with context(model):
            model(x).square().mean().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def a_backward_that_fails_on_its_way(model, x, context):
    def fail(grad):
        raise KeyError

    with context(model):
        handles = [model.blocks[0][0].register_full_backward_hook(lambda *_: fail(None))]
        with pytest.raises(KeyError):
            model(x).square().mean().backward()
        handles[0].remove()
        for parameter in model.parameters():
            parameter.grad = None
        model(x).square().mean().backward()


def gradients_with_a_graph(model, x, context):
    """A second derivative of what is returned is refused, and none of it is lost without a word."""
    down = model.blocks[0][0].B_down
    with context(model):
        (grad,) = torch.autograd.grad(model(x).square().mean(), [down], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            grad.square().sum().backward()
    return [grad.detach()]


def batches_of_gradients(model, x, context):
    down, directions = model.blocks[0][0].B_down, torch.randn(3, *x.shape, dtype=x.dtype)
    with context(model):
        y = model(x)
    return torch.autograd.grad(y, [down], directions, is_grads_batched=True)


def frozen_and_replaced_inside(model, x, context):
    first, last = ([block[place] for block in model.blocks] for place in (0, 2))
    with context(model):
        first[0].B_down.requires_grad_(False)
        for layer in last:
            layer.B_down = nn.Parameter(layer.B_down.detach() * 2)
        model(x).square().mean().backward()
        assert first[0].B_down.grad is None


def checkpointed_without_the_context_in_backward(model, x, context):
    model.reentrant = False
    backward_after_the_context(model, x, context)


def accumulated_to_zeros(model, x, context):
    with context(model):
        for _ in range(2):
            model(x).square().mean().backward()
            nn.Module.zero_grad(model, set_to_none=False)
        model(x).square().mean().backward()


USES = [
    backward_after_the_context, two_forwards_and_one_of_the_losses_later, a_graph_used_twice,
    clipped_and_stepped_inside, asked_for_by_name, seen_by_hooks, an_exception_after_backward,
    a_backward_that_fails_on_its_way, gradients_with_a_graph, batches_of_gradients, frozen_and_replaced_inside,
    checkpointed_without_the_context_in_backward, accumulated_to_zeros,
]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_whatever_is_done_with_the_gradients(randomize, use):
    """The same as without the context, also where backward, the optimizer or a hook comes at another time."""

    def make():
        return shared(randomize, ("B_down", "B_up"), torch.float64, dropout=0.0, depth=2)

    close(outcome(make, use, deferred_shared_grads), outcome(make, use, plainly), 1e-12)


def test_deferral_takes_part_in_copies_and_nested_contexts_only_once(randomize):
    model = shared(randomize)
    with deferred_shared_grads(model):
        assert all(layer._deferred is None for layer in named_layers(copy.deepcopy(model)).values())
        with pytest.raises(RuntimeError, match="inside deferred_shared_grads"), deferred_shared_grads(model):
            pass
        model(torch.randn(5, 12)).sum().backward()
    assert model.blocks[0][0].B_down.grad.any()
    assert all(layer._deferred is None for layer in named_layers(model).values())
    with pytest.raises(ValueError, match="the model has no GLoRA layer"), deferred_shared_grads(Stack()):
        pass


def test_operators_are_counted_inside_too(randomize):
    """Under a dispatch mode the layer is its operator, whose gradient autograd accumulates."""
    model, x = shared(randomize, dropout=0.0), torch.randn(5, 12)
    expected, _ = step(model, x)
    model.zero_grad()
    with deferred_shared_grads(model), FlopCounterMode(display=False):
        model(x).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    close(got, {name: value for name, value in expected.items() if name not in ("x", "y")})


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
