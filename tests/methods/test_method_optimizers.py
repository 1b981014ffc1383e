"""Optimizers for low-rank factors: LoRA-RITE's invariance, the rates of LoRA+, LoRA-FA's step by the letter."""

import copy

import pytest
import torch
from method_nets import (
    ALL_LOW_RANK,
    LORA,
    PATHS,
    X,
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

ROTATION = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
GENERAL = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 2 * torch.eye(4)


def in_another_basis(model, basis):
    """The same change of W by D ← M·D, U ← U·M⁻¹."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers(twin).values():
            layer.B_down.copy_(basis @ layer.B_down)
            layer.B_up.copy_(layer.B_up @ torch.linalg.inv(basis))
    return twin


def deviation(make, basis, steps=10):
    """How much the change of W depends on the choice of the factors, after some steps."""
    models = [net(), in_another_basis(net(), basis)]
    for model in models:
        optimizer = make(model)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.01 * loss_of(model)).backward()
            optimizer.step()
    pairs = [[(layer.B_up @ layer.B_down).detach() for layer in layers(model).values()] for model in models]
    moved = max(float((a - s).abs().max()) for a, s in zip(pairs[0], start(), strict=True))
    assert moved > 1e-3
    return max(float((a - b).abs().max()) for a, b in zip(*pairs, strict=True))


def start():
    return [(layer.B_up @ layer.B_down).detach() for layer in layers(net()).values()]


@pytest.mark.parametrize("basis", [100 * torch.eye(4), ROTATION, GENERAL], ids=["scale", "rotation", "general"])
def test_rite_does_not_depend_on_the_basis_and_adam_does(basis):
    pytest.importorskip("pytorch_optimizer")
    exact = {"clip_unmagnified_grad": 0.0, "update_skipping": 0.0, "eps": 0.0}
    basis = basis.double()
    found = deviation(lambda model: gk.optimizer(model, "rite", 0.01, **exact), basis)
    adam = deviation(lambda model: torch.optim.Adam(trained(model), lr=0.01), basis)
    assert found < 1e-12
    assert adam > 0.01


def test_rite_pairs_the_factors_of_a_layer():
    pytest.importorskip("pytorch_optimizer")
    model = net()
    optimizer = gk.optimizer(model, "rite", 0.01)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [
        id(p) for layer in layers(model).values() for p in (layer.B_down, layer.B_up)
    ]
    fresh = gk.inject(plain(), LORA)  # U = 0
    optimizer = gk.optimizer(fresh, "rite", 0.01, update_skipping=0.0)
    first = float(step(fresh, optimizer).detach())
    for _ in range(30):
        last = float(step(fresh, optimizer).detach())
    assert last < first


def test_plus_is_adamw_with_two_rates():
    model, twin = net(ALL_LOW_RANK), net(ALL_LOW_RANK)
    optimizer = gk.optimizer(model, "lora+", 0.01, ratio=8.0, weight_decay=0.1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, trained(model)))
    ups = [layer.B_up for layer in layers(twin).values()]
    rest = [p for p in trained(twin) if not any(p is up for up in ups)]
    literal = torch.optim.AdamW([{"params": ups, "lr": 0.08}, {"params": rest, "lr": 0.01}], weight_decay=0.1)
    for _ in range(3):
        step(model, optimizer)
        step(twin, literal)
    assert all(torch.allclose(a, b, rtol=1e-13) for a, b in zip(trained(model), trained(twin), strict=True))


@pytest.mark.parametrize("share", ["A", "B", "AB"])
def test_plus_takes_shared_factors_once(share):
    model = random_(gk.inject(plain(), ShareLoRAConfig(rank=4, share=share)))
    optimizer = gk.optimizer(model, "lora+", 0.01)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in optimizer.param_groups) == len(trained(model))
    assert all(rates[id(layer.B_up)] == 0.16 and rates[id(layer.B_down)] == 0.01 for layer in layers(model).values())
    step(model, optimizer)


def test_fa_by_the_letter():
    pytest.importorskip("peft")
    model = random_(gk.inject(plain(), GLoRAConfig("none", "lora", "none", "none", "vector", rank=4, alpha=8)))
    before = copy.deepcopy(model)
    optimizer = gk.optimizer(model, "lora-fa", 0.01)
    assert not any(layer.B_down.requires_grad for layer in layers(model).values())
    up = {path: layer.B_up.detach().clone() for path, layer in layers(model).items()}
    moments = {path: [0.0, 0.0] for path in PATHS}
    for t in range(1, 4):
        step(model, optimizer)
        for path, layer in layers(model).items():
            d, m = layer.B_down, moments[path]
            g = layer.B_up.grad @ torch.linalg.inv(d @ d.t() + 1e-8 * torch.eye(4)) / 4  # s = 2
            m[0], m[1] = 0.9 * m[0] + 0.1 * g, 0.999 * m[1] + 0.001 * g**2
            up[path] -= 0.01 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m[0] / (m[1].sqrt() + 1e-6)
            assert torch.allclose(layer.B_up, up[path], rtol=1e-7, atol=1e-9)
    for path, layer in layers(model).items():
        assert torch.equal(layer.B_down, layers(before)[path].B_down)
        assert not torch.equal(layer.E, layers(before)[path].E)


def shared():
    return random_(gk.inject(plain(), ShareLoRAConfig(rank=4, share="A")))


def mapped():
    model = net()
    gk.set_mid(model, "gain")
    return model


def headed():
    return gk.inject(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LORA, ["0"], train=["1"])


def half():
    return gk.inject(plain().bfloat16(), LORA, adapter_dtype=torch.bfloat16)


def frozen():
    model = net()
    layers(model)["layers.0.v"].B_down.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "kind", "options", "message"),
    [
        (net, "adam", {}, r"kind must be one of 'rite', 'lora\+', 'lora-fa'; got 'adam'"),
        (plain, "lora+", {}, "optimizer: the model has no low-rank adapter"),
        (net, "lora+", {"ratio": 0.0}, "ratio must be positive, got 0.0"),
        (shared, "rite", {}, r"'rite': 'layers\.0\.q' and 'layers\.1\.q' share a factor.*kind='lora\+'"),
        (shared, "lora-fa", {}, r"'lora-fa': 'layers\.0\.q' and 'layers\.1\.q' share a factor"),
        (mapped, "rite", {}, r"'rite' takes factors as they are, and 'layers\.0\.q' has a map"),
        (mapped, "lora-fa", {}, r"'lora-fa' takes factors as they are, and 'layers\.0\.q' has a map"),
        (headed, "rite", {}, r"'1\.weight' is trained as well: freeze it"),
        (lambda: net(ALL_LOW_RANK), "rite", {}, r"'layers\.0\.q\.A_up' is trained as well"),
        (half, "rite", {}, r"QR .* torch\.bfloat16 on a CPU \('layers\.0\.q'\).*adapter_dtype=torch\.float32"),
        (frozen, "rite", {}, r"'rite' trains both factors, and one of 'layers\.0\.v' is frozen"),
    ],
)
def test_refusals_change_nothing(make, kind, options, message):
    pytest.importorskip("pytorch_optimizer")
    model = make()
    before, asked = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        gk.optimizer(model, kind, 1e-3, **options)
    assert unchanged(before, state(model))
    assert asked == [p.requires_grad for p in model.parameters()]


def test_an_unknown_option_freezes_nothing():
    pytest.importorskip("peft")
    model = net()
    with pytest.raises(TypeError, match="momentum"):
        gk.optimizer(model, "lora-fa", 1e-3, momentum=0.9)
    assert all(layer.B_down.requires_grad for layer in layers(model).values())


def test_a_restart_drops_what_rite_knows_of_a_pair():
    pytest.importorskip("pytorch_optimizer")
    model = net()
    optimizer = gk.optimizer(model, "rite", 0.01, update_skipping=0.0)
    step(model, optimizer)
    assert optimizer.state
    gk.restart(model, optimizer, rank=2)
    assert not optimizer.state
    before = model(X)
    step(model, optimizer)
    assert not torch.equal(model(X), before)
