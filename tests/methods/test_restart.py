"""Merge and restart, against sums of s·U·D by the letter; what rounds too much is refused with the right figure."""

import copy

import pytest
import torch
from method_nets import (
    ALL_LOW_RANK,
    LORA,
    PATHS,
    X,
    adam,
    at_every_line,
    forward,
    layers,
    loss_of,
    net,
    plain,
    random_,
    state,
    step,
    trained,
    unchanged,
)
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig
from glora_kernels.methods.restart import chain_ranks, make_chain


def change(layer):
    """s·U·D of the trained factors."""
    maps = layer._modules.get("parametrizations", {})
    up, down = (maps[name].original if name in maps else getattr(layer, name) for name in ("B_up", "B_down"))
    return (layer.config.scale * up @ down).detach()


@pytest.mark.parametrize("into", ["base", "chain"])
def test_the_change_of_all_links_is_the_sum_of_their_products(into):
    model = net()
    start = {path: layer.weight.detach().clone() for path, layer in layers(model).items()}
    total = {path: torch.zeros_like(weight) for path, weight in start.items()}
    optimizer = adam(model)
    for link, rank in enumerate((2, 3, 1), 1):
        for path, layer in layers(model).items():
            total[path] += change(layer)
        before = model(X).detach()
        expected = forward({p: (start[p] + total[p], layer.bias) for p, layer in layers(model).items()})
        assert torch.allclose(before, expected, rtol=1e-11, atol=1e-12)
        ids = [id(p) for p in trained(model)]
        assert gk.restart(model, optimizer, rank=rank, into=into) == into
        assert torch.allclose(model(X), before, rtol=1e-12, atol=1e-12)
        assert ids == [id(p) for p in trained(model)]
        for path, layer in layers(model).items():
            assert not change(layer).any()
            assert layer.config.scale == pytest.approx(2, rel=1e-15)
            down = layer.B_down if into == "base" else layer.parametrizations.B_down.original
            assert down.shape == (rank, layer.in_features)
            assert down.abs().min() > 0
            if into == "base":
                assert torch.allclose(layer.weight, start[path] + total[path], rtol=0, atol=1e-14 * link)
                assert layer.config.rank == rank
            else:
                assert torch.equal(layer.weight, start[path])
                assert layer.config.rank == rank + (4, 6, 9)[link - 1]
                assert torch.allclose(2 * layer.B_up @ layer.B_down, total[path], rtol=0, atol=1e-14 * link)
        assert all(p.grad is None for p in trained(model))
        assert not any(p in optimizer.state for p in trained(model))
        for _ in range(2):
            step(model, optimizer)
    if into == "base":
        with gk.disabled(model):
            assert torch.allclose(model(X), expected, rtol=1e-11, atol=1e-12)
    else:
        assert chain_ranks(model) == dict.fromkeys(PATHS, 9)


def test_frozen_links_stay_while_the_last_one_is_trained():
    model = net()
    gk.restart(model, into="chain")
    frozen = {name: b.clone() for name, b in model.named_buffers()}
    assert len(frozen) == 8
    optimizer = adam(model, 3)
    assert all(torch.equal(b, frozen[name]) for name, b in model.named_buffers())
    assert all(change(layer).any() for layer in layers(model).values())
    assert len(optimizer.state) == 8
    expected = torch.autograd.grad(loss_of(model), trained(model))
    weights = {}
    for path, layer in layers(model).items():
        maps = layer.parametrizations
        sums = maps.B_up[0].frozen @ maps.B_down[0].frozen + maps.B_up.original @ maps.B_down.original
        weights[path] = layer.weight + 2 * sums, layer.bias
    got = torch.autograd.grad((forward(weights) - 1).square().sum(), trained(model))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(got, expected, strict=True))


def test_the_file_of_a_chain_is_a_plain_adapter(tmp_path):
    model = net(ALL_LOW_RANK)
    for seed in (2, 3):
        gk.restart(model, into="chain", rank=2)
        random_(model, seed)
    gk.save_adapter(model, tmp_path / "a.safetensors")
    loaded = gk.load_adapter(plain(), tmp_path / "a.safetensors")
    assert torch.allclose(loaded(X), model(X), rtol=1e-12, atol=1e-12)
    assert [type(layer).__name__ for layer in layers(loaded).values()] == ["GLoRALinear"] * 4
    assert all(layer.config.rank == 8 for layer in layers(loaded).values())
    twin = net(GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=2, alpha=3))
    make_chain(twin, chain_ranks(model))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))
    copied = copy.deepcopy(model)
    gk.restart(model, into="chain")
    assert torch.equal(copied(X), twin(X))
    merged = gk.merge_and_unload(copied.eval())
    assert type(merged.layers[0].q) is nn.Linear
    assert torch.allclose(merged(X), twin(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [ALL_LOW_RANK, GLoRAConfig("vector", "lora", "vector", "constant", "vector", rank=4),
     GLoRAConfig("lora", "lora", rank=4, variant="matmul")],
)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_other_supports_go_into_the_base(config, bias):
    model = plain()
    if not bias:
        for path in PATHS:
            model.get_submodule(path).bias = None
    model = random_(gk.inject(model, config))
    optimizer = adam(model)
    before = model(X)
    assert gk.restart(model, optimizer, rank=2) == "base"
    assert torch.allclose(model(X), before, rtol=1e-12, atol=1e-12)
    with gk.disabled(model):
        assert torch.allclose(model(X), before, rtol=1e-12, atol=1e-12)
    assert not optimizer.state
    assert all(p.requires_grad == (".A" in n or ".B_" in n or n[-1] in "CDE" or ".C_" in n) for n, p in
               model.named_parameters())  # fmt: skip
    step(model, optimizer)


def test_in_a_chain_vectors_train_on():
    model = net(GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=4))
    optimizer = adam(model)
    before = model(X)
    vectors = {name: p.detach().clone() for name, p in model.named_parameters() if name[-1] in "DE"}
    gk.restart(model, optimizer, into="chain", rank=1)
    assert torch.allclose(model(X), before, rtol=1e-12, atol=1e-12)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in vectors.items())
    assert set(optimizer.state) == {parameters[name] for name in vectors}


def test_layers_that_are_not_chosen_are_unchanged_bit_for_bit():
    model = net()
    optimizer = adam(model)
    rest = [p for path in PATHS[1:] for p in layers(model)[path].parameters()]
    before = [p.detach().clone() for p in rest]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in rest if p.requires_grad]
    output = model(X)
    gk.restart(model, optimizer, layers="layers.0.q", into="base")
    assert torch.allclose(model(X), output, rtol=1e-12)
    gk.restart(model, optimizer, layers=["layers.0.q"], into="chain")
    assert all(map(torch.equal, rest, before))
    assert all(map(torch.equal, [optimizer.state[p]["exp_avg"] for p in rest if p.requires_grad], moments))
    assert len(optimizer.state) == 6


@pytest.mark.parametrize("share", ["A", "B", "AB"])
def test_shared_factors(share):
    model = random_(gk.inject(plain(), ShareLoRAConfig(rank=4, alpha=8, share=share)))
    optimizer = adam(model)
    before, own = model(X), state(model, optimizer)
    with pytest.raises(ValueError, match=r"'layers\.0\.q' shares B_(up|down) with 'layers\.1\.q'.*restart all of them"):
        gk.restart(model, optimizer, layers="layers.0.q")
    with pytest.raises(ValueError, match=r"'layers\.0\.q' and 'layers\.1\.q' share a factor.*use into='base'"):
        gk.restart(model, optimizer, into="chain")
    assert unchanged(own, state(model, optimizer))
    gk.restart(model, optimizer, layers="q", rank=2)
    assert torch.allclose(model(X), before, rtol=1e-12, atol=1e-12)
    assert [layer.config.rank for layer in layers(model).values()] == [2, 4, 2, 4]
    first, second = layers(model)["layers.0.q"], layers(model)["layers.1.q"]
    assert (first.B_down is second.B_down) == ("A" in share)
    assert (first.B_up is second.B_up) == ("B" in share)
    step(model, optimizer)


def test_after_base_the_adapter_alone_is_not_saved(tmp_path):
    model = net()
    gk.restart(model, layers="layers.1.v", into="base")
    with pytest.raises(ValueError, match=r"'layers\.1\.v' was merged into its base for good.*state_dict"):
        gk.save_adapter(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    twin = net()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))
    with pytest.raises(ValueError, match="merged into its base"):
        gk.save_adapter(copy.deepcopy(model), tmp_path / "a.safetensors")


def linear(dtype, std, config=LORA, size=256):
    """A layer over a weight of σ 0.02 whose adapter changes it by σ `std`, in fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size, bias=True)).to(dtype)
    nn.init.normal_(model[0].weight, std=0.02)
    model = gk.inject(model, config, target_modules=["0"])
    with torch.no_grad():
        factors = [p for p in trained(model) if p.ndim == 2]
        for p in factors:
            p.normal_(std=(std / 2 / 4**0.5) ** 0.5)
    return model


def lost_by_bf16(layer):
    """By the letter: the share of s·U·D that is missing in the rounded sum."""
    w, full = layer.weight.double(), change(layer).double()
    return ((w + full).bfloat16().double() - w - full).norm() / full.norm()


@pytest.mark.parametrize("std", [1e-2, 1e-3, 4e-4, 2e-4, 1e-4, 1e-5])
def test_a_16_bit_base_is_refused_by_what_it_would_lose(std):
    model = linear(torch.bfloat16, std)
    lost = float(lost_by_bf16(model[0]))
    assert (lost > 0.05) == (std <= 4e-4)  # 2% at 1e-3, all at 1e-5
    before = state(model)
    if lost > 0.05:
        with pytest.raises(
            ValueError, match=rf"'0' has a base in torch.bfloat16.*{100 * lost:.0f}% of the change; use"
        ):
            gk.restart(model, into="base")
        assert unchanged(before, state(model))
        assert gk.restart(model) == "chain"
    else:
        assert gk.restart(copy.deepcopy(model)) == "base"
        gk.restart(model, into="base")
        assert not torch.equal(model[0].weight, before[0][2])


def test_figures_of_many_merges():
    """After several merges of independent changes as much is lost as in each."""
    model = linear(torch.bfloat16, 1e-3)
    start, total = model[0].weight.double(), 0.0
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in trained(model):
                p.normal_(std=(1e-3 / 4) ** 0.5, generator=generator)
        total = total + change(model[0]).double()
        assert gk.restart(model) == "base"
    error = float(((model[0].weight.double() - start - total).norm() / total.norm()).detach())
    assert 0.01 < error < 0.05


def test_the_bias_counts_as_well():
    model = linear(torch.bfloat16, 1e-2, GLoRAConfig("none", "lora", "none", "none", "vector", rank=4, alpha=8))
    with torch.no_grad():
        model[0].bias.fill_(1.0)
        model[0].E.fill_(1e-4)
    with pytest.raises(ValueError, match=r"'0' has a base in torch\.bfloat16, whose rounding would lose 100%"):
        gk.restart(model, into="base")


def test_a_4_bit_base_is_refused():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = gk.inject(gk.quantize(model, target_modules=["0"]), LORA, target_modules=["0", "1"])
    random_(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"'0' has a base in 4 bits.*use into='chain'"):
        gk.restart(model, into="base")
    assert unchanged(before, state(model))
    assert gk.restart(copy.deepcopy(model), layers="1") == "base"
    x = torch.randn(3, 64)
    y = model(x)
    assert gk.restart(model, rank=2) == "chain"
    assert torch.allclose(model(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("act", "options", "error", "message"),
    [
        (None, {"into": "file"}, ValueError, "into must be 'base', 'chain' or None, got 'file'"),
        (None, {"rank": 0}, ValueError, "rank must be an integer >= 1, got 0"),
        (None, {"rank": True}, ValueError, "rank must be an integer >= 1, got True"),
        (None, {"layers": "k_proj"}, ValueError, "'k_proj' matches no low-rank layer"),
        (None, {"optimizer": "adam"}, TypeError, "must be a torch.optim.Optimizer or None, got str"),
        (lambda m: gk.set_mid(m, "gain"), {"into": "base"}, ValueError, r"'layers\.0\.q' has a map.*call fold_mids"),
        (lambda m: gk.set_mid(m, "gain"), {}, ValueError, r"'layers\.0\.q' has a Gain on its D; call fold_mids"),
        (lambda m: gk.restart(m, into="chain"), {"into": "base"}, ValueError, "frozen links.*use into='chain'"),
    ],
)
def test_refusals_change_nothing(act, options, error, message):
    model = net()
    if act is not None:
        act(model)
    optimizer = adam(model)
    before = state(model, optimizer)
    with pytest.raises(error, match=message):
        gk.restart(model, **{"optimizer": optimizer, **options})
    assert unchanged(before, state(model, optimizer))


def test_a_weight_that_another_module_has_is_refused():
    model = plain()
    model.head = nn.Linear(6, 8).double()
    model.head.weight = model.layers[0].q.weight
    model = random_(gk.inject(model, LORA, target_modules=["layers.1.q", "layers.0.v"]))
    gk.restart(model, into="base")
    model = plain()
    model.layers[1].q.weight = model.layers[0].q.weight
    model = random_(gk.inject(model, LORA, target_modules=["layers.0.q"]))
    before = state(model)
    with pytest.raises(ValueError, match=r"restart: .*layers\.1\.q"):
        gk.restart(model, into="base")
    assert unchanged(before, state(model))


@pytest.mark.parametrize("into", ["base", "chain"])
def test_inside_inference_mode(into):
    model = net()
    with torch.inference_mode():
        gk.restart(model, into=into, rank=2)
    step(model, adam(model))


@pytest.mark.parametrize("config", [ALL_LOW_RANK, ShareLoRAConfig(rank=4, alpha=8, share="AB")])
@pytest.mark.parametrize("into", ["base", "chain", "second link"])
def test_an_interrupt_leaves_the_output(config, into):
    if into != "base" and not isinstance(config, GLoRAConfig):
        pytest.skip("chains share nothing")

    def make():
        model = random_(gk.inject(plain(1), config))
        if into == "second link":
            gk.restart(model, into="chain")
            random_(model, 2)
        return model

    expected = make()(X)
    own = "base" if into == "base" else "chain"

    def check(model):
        assert torch.allclose(model(X), expected, rtol=1e-12, atol=1e-12)
        ranks = [layer.config.rank for layer in (model.layers[0].q, model.layers[0].v)]
        assert ranks == [len(layer.B_down) for layer in (model.layers[0].q, model.layers[0].v)]
        (model(X) - 1).square().sum().backward()
        assert all(p.grad is not None for p in trained(model))
        assert len({name.replace("parametrizations.", "") for name, p in model.named_parameters() if p.requires_grad}) \
            == len(trained(make()))  # fmt: skip
        gk.restart(model, into=own)
        assert torch.allclose(model(X), expected, rtol=1e-12, atol=1e-12)

    at_every_line(make, lambda model: gk.restart(model, into=own, rank=2), check, most=15)
