"""Adapters swapped in place: the file's values inside, the model's own bit for bit after it."""

import copy

import pytest
import torch
from method_nets import ALL_LOW_RANK, LORA, X, adam, at_every_line, layers, net, plain, random_, state, step, unchanged
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig


def headed(seed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)).double()
    return random_(gk.inject(model, LORA, ["0"], train=["1", "2"]), seed)


@pytest.mark.parametrize(
    "make",
    [lambda seed: random_(net(ALL_LOW_RANK), seed), headed,
     lambda seed: random_(gk.inject(plain(), ShareLoRAConfig(rank=2, share="AB")), seed)],
)  # fmt: skip
def test_inside_it_is_the_other_model_and_after_it_its_own(make, tmp_path):
    teacher, model = make(1), make(2)
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean += 0.5
    gk.save_adapter(teacher, tmp_path / "a.safetensors")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer)
    model.eval(), teacher.eval()
    before, output = state(model, optimizer), model(X)
    with gk.using(model, tmp_path / "a.safetensors") as inside:
        assert inside is model
        assert torch.equal(model(X), teacher(X))
        assert not torch.equal(model(X), output)
        step(model, optimizer)  # lost
    after = state(model)
    assert unchanged([e for e in before if e[0] in {n for n, _ in model.named_buffers()}],
                     [e for e in after if e[0] in {n for n, _ in model.named_buffers()}])  # fmt: skip
    assert [e[:2] for e in before if len(e) == 4] == [e[:2] for e in after if len(e) == 4]
    assert torch.equal(model(X), output)


def test_after_an_error_inside_and_nested(tmp_path):
    models = [random_(net(), seed) for seed in (2, 3, 4)]
    for i, model in enumerate(models):
        gk.save_adapter(model, tmp_path / f"{i}.safetensors")
    before = state(models[0])

    def act():
        with gk.using(models[0], tmp_path / "1.safetensors"):
            with gk.using(models[0], tmp_path / "2.safetensors"):
                assert torch.equal(models[0](X), models[2](X))
            assert torch.equal(models[0](X), models[1](X))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        act()
    assert unchanged(before, state(models[0]))


def test_the_bias_of_a_file_that_trains_it_is_given_back(tmp_path):
    teacher, model = net(), net()
    teacher.layers[0].q.bias.requires_grad_(True)
    random_(teacher, 5)
    gk.save_adapter(teacher, tmp_path / "a.safetensors")
    before, asked = state(model), [p.requires_grad for p in model.parameters()]
    with gk.using(model, tmp_path / "a.safetensors"):
        assert torch.equal(model(X), teacher(X))
    assert unchanged(before, state(model))
    assert asked == [p.requires_grad for p in model.parameters()]


def test_compiled_models_are_not_compiled_again(tmp_path):
    torch._dynamo.reset()
    model, count = net(), 0

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    gk.save_adapter(random_(net(), 9), tmp_path / "a.safetensors")
    compiled = torch.compile(model, backend=backend)
    first, runs = compiled(X), count
    with gk.using(compiled, tmp_path / "a.safetensors"):
        assert torch.allclose(compiled(X), random_(net(), 9)(X), atol=1e-14)
    assert torch.equal(compiled(X), first)
    assert count == runs


def merged():
    model = net().eval()
    gk.merge(model)
    return model


def chained():
    model = net()
    gk.restart(model, into="chain")
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: net(GLoRAConfig.lora(2, 8)), ValueError, r"'layers\.0\.q'.*rank=4 \(the model: 2\)"),
        (lambda: net(blocks=1), ValueError, r"adapts the layers \['layers\.1\.q'.*which the model lacks"),
        (plain, ValueError, "using: the model has no GLoRA layer"),
        (merged, RuntimeError, r"'layers\.0\.q' is merged; call unmerge"),
        (chained, RuntimeError, r"'layers\.0\.q': B_(up|down) of this layer is computed"),
    ],
)
def test_refusals_change_nothing(make, error, message, tmp_path):
    gk.save_adapter(net(), tmp_path / "a.safetensors")
    model = make()
    before = state(model)
    with pytest.raises(error, match=message), gk.using(model, tmp_path / "a.safetensors"):
        pytest.fail("entered")
    assert unchanged(before, state(model))


def test_a_file_that_is_not_there():
    model = net()
    before = state(model)
    with pytest.raises(FileNotFoundError), gk.using(model, "nowhere.safetensors"):
        pytest.fail("entered")
    assert unchanged(before, state(model))


def test_an_interrupt_before_the_block_leaves_the_model_as_it_was(tmp_path):
    gk.save_adapter(random_(net(), 9), tmp_path / "a.safetensors")
    model = net()
    before = state(model)
    at_every_line(
        lambda: model,
        lambda model: gk.using(model, tmp_path / "a.safetensors").__enter__(),
        lambda model: unchanged(before, state(model)) or pytest.fail("changed"),
        most=15,
    )


def test_the_optimizer_goes_on_with_its_moments(tmp_path):
    model = net()
    twin = copy.deepcopy(model)
    gk.save_adapter(random_(net(), 9), tmp_path / "a.safetensors")
    optimizers = [adam(one) for one in (model, twin)]
    with gk.using(model, tmp_path / "a.safetensors"):
        model(X)
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        step(one, optimizer)
    assert all(torch.equal(a.B_up, b.B_up) for a, b in zip(layers(model).values(), layers(twin).values(), strict=True))
