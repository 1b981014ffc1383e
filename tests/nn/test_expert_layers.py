"""GLoRA layers over the parameters of experts: the equation, which parameters are taken, what is shared and refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from expert_nets import (
    BOTH,
    CONFIGS,
    DOWN,
    FULL,
    SHARED,
    UP,
    Literal,
    X,
    adapted,
    drawn,
    language_model,
    named,
    net,
)  # fmt: skip
from helpers import thinned
from small_mixtures import CLASSES, EACH, HIDDEN, Mixture
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear, ShareLoRAConfig
from glora_kernels.nn.model import named_layers

LORA = GLoRAConfig.lora(rank=4)


def close(left, right, what=""):
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_five_steps_are_those_of_the_equation(family, config):
    ours = adapted(family, config)
    theirs = Literal(ours)
    mine, its = named(ours), named(theirs)
    assert mine.keys() == its.keys()
    optimizers = [torch.optim.AdamW(own.values(), lr=1e-2) for own in (mine, its)]
    for number in range(5):
        x = [(X + number).clone().requires_grad_() for _ in range(2)]
        y = [model(own) for model, own in zip((ours, theirs), x, strict=True)]
        close(y[0], y[1], f"y of step {number}")
        for own, optimizer in zip(y, optimizers, strict=True):
            optimizer.zero_grad()
            own.square().sum().backward()
        close(x[0].grad, x[1].grad, f"dx of step {number}")
        for name, parameter in mine.items():
            close(parameter.grad, its[name].grad, f"gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in mine.items():
        close(parameter, its[name], name)


@pytest.mark.parametrize("target", BOTH)
def test_one_of_the_two_products(target):
    model = adapted("gpt-oss", FULL, target)
    assert list(named_layers(model)) == [target]
    close(model(X), Literal(model)(X))
    assert isinstance(model.experts._parameters[(UP if target == DOWN else DOWN).rpartition(".")[2]], nn.Parameter)


def test_a_new_layer_changes_nothing_and_the_module_stays():
    model = net()
    experts, y = model.experts, model(X)
    gk.inject(model, FULL, target_modules=[], target_parameters=BOTH)
    assert model.experts is experts
    assert isinstance(experts, type(net().experts))
    assert torch.equal(model(X), y) or torch.allclose(model(X), y, rtol=0, atol=1e-14)


@pytest.mark.parametrize("config", [FULL, GLoRAConfig("lora", "lora", "lora", rank=2), SHARED["A"]])
def test_counts(config):
    """E adapters of a linear layer of these sizes; what is shared counts once."""
    model = gk.inject(net("gpt-oss"), config, target_modules=[], target_parameters=BOTH)
    experts, own = 4, config.layer_config() if isinstance(config, ShareLoRAConfig) else config
    expected = 0
    for k, n in ((HIDDEN, 96), (48, HIDDEN)):
        shapes = own.parameter_shapes(k, n)
        expected += sum(
            math.prod(s) * (1 if own != config and name == "B_down" else experts) for name, s in shapes.items()
        )
    assert gk.trainable_parameters(model) == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(named(model))


def test_factors_are_drawn_for_each_expert_as_for_a_linear_layer():
    for init, bound in (("kaiming", 1 / math.sqrt(HIDDEN)), ("xavier", math.sqrt(6 / (HIDDEN + 8)))):
        config = GLoRAConfig("none", "lora", rank=8, init=init)
        layer = gk.inject(net(), config, target_modules=[], target_parameters=UP).experts.gate_up_proj
        assert bound * 0.95 < float(layer.B_down.detach().abs().max()) <= bound
        assert not torch.equal(layer.B_down[0], layer.B_down[1])


# Which parameters are taken.


def test_experts_are_taken_only_by_name():
    model = language_model("deepseek-v3")
    expected = {path for path, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    with pytest.warns(UserWarning, match="target_parameters"):
        gk.inject(model, LORA)
    assert set(named_layers(model)) == expected


PATHS = {f"model.layers.1.mlp.{name}" for name in BOTH}


@pytest.mark.parametrize(
    ("targets", "parameters", "expected"),
    [
        ([], BOTH, PATHS),
        (["experts.gate_up_proj", "experts.down_proj"], (), PATHS),
        ("*.experts.*", (), PATHS),
        ("shared_experts.down_proj", "experts.down_proj", None),
        # A pattern that matches linear layers means these alone.
        ("down_proj", (), {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.down_proj"}),
        ([], r".*layers\.1.*gate_up_proj", {f"model.layers.1.mlp.{UP}"}),
    ],
)
def test_patterns(targets, parameters, expected):
    model = gk.inject(language_model("deepseek-v3"), LORA, targets, target_parameters=parameters)
    both = {"model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.mlp.experts.down_proj"}
    assert set(named_layers(model)) == (expected or both)


def test_one_configuration_a_path():
    configs = {"gate_up_proj": GLoRAConfig(rank=2), "layers.0.mlp.experts.down_proj": None, "*": GLoRAConfig(rank=3)}
    model = gk.inject(language_model("mixtral"), configs, target_modules=["q_proj"], target_parameters=BOTH)
    ranks = {path: layer.config.rank for path, layer in named_layers(model).items()}
    assert {path: rank for path, rank in ranks.items() if "experts" in path} == {
        "model.layers.0.mlp.experts.gate_up_proj": 2, "model.layers.1.mlp.experts.gate_up_proj": 2,
        "model.layers.1.mlp.experts.down_proj": 3,
    }  # fmt: skip
    assert {rank for path, rank in ranks.items() if "q_proj" in path} == {3}


def test_the_rank_of_an_expert():
    config = GLoRAConfig.lora(rank=6, alpha=6)
    model = gk.inject(
        language_model("qwen3"), config, "q_proj", target_parameters=BOTH, expert_rank="rank // top_k"
    )  # fmt: skip
    for path, layer in named_layers(model).items():
        assert layer.config == (GLoRAConfig.lora(rank=2, alpha=6) if "experts" in path else config)
    alone = Mixture(experts=net().experts)
    alone.experts.config = SimpleNamespace()
    for model, given, message in (
        (net(), {"expert_rank": "rank/2"}, "expert_rank must be one of 'rank', 'rank // top_k'"),
        (language_model("qwen3"), {"expert_rank": "rank // top_k", "target_parameters": ()}, "has no effect"),
        (net(), {"expert_rank": "rank // top_k", "config": LORA.lora(rank=1)}, "1 // 2 = 0"),
        (alone, {"expert_rank": "rank // top_k"}, "no num_experts_per_tok"),
    ):
        targets = ["q_proj"] if given.get("target_parameters") == () else []
        with pytest.raises(ValueError, match=message):
            gk.inject(model, **{"config": LORA, "target_modules": targets, "target_parameters": BOTH, **given})
        assert not named_layers(model)
    assert EACH == 2


# Sharing.


def test_share_a_is_one_factor_for_all_experts_and_layers():
    model = gk.inject(language_model("mixtral"), SHARED["A"], target_modules=[], target_parameters=BOTH)
    layers = named_layers(model)
    downs = {path: layer.B_down for path, layer in layers.items()}
    assert {tuple(down.shape) for down in downs.values()} == {(1, 3, HIDDEN), (1, 3, 48)}
    assert len(set(map(id, downs.values()))) == 2  # one for each projection
    assert layers["model.layers.0.mlp.experts.down_proj"].B_up.shape == (4, HIDDEN, 3)
    assert [row.uses for row in gk.shared(model).rows] == [2, 2]
    drawn(model)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(down.grad.any()) for down in downs.values())


def test_share_within_one_experts_module_is_no_reason_to_warn(recwarn):
    gk.inject(net(), SHARED["A"], target_modules=[], target_parameters=UP)
    assert not [warning for warning in recwarn if "shares nothing" in str(warning.message)]


# What is refused, and changes nothing.


class Flat(nn.Module):
    """Experts as Llama-4 has them: no interface."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, HIDDEN, 96))
        self.down_proj = nn.Parameter(torch.randn(4, 48, HIDDEN))


def flat():
    return Mixture(experts=Flat())


def parallel():
    model = net()
    model.experts._is_expert_parallel = True
    return model


def replaced():
    model = net()
    model.experts.forward = lambda *args: None
    return model


def overridden():
    model = net()
    model.experts.__class__ = type("Own", (type(model.experts),), {"forward": lambda self, *args: args[0]})
    return model


def parametrized():
    model = net()
    nn.utils.parametrize.register_parametrization(model.experts, "gate_up_proj", nn.Identity())
    return model


def narrow():
    model = net()
    model.experts.to(torch.float8_e4m3fn)
    return model


REFUSED = {
    "layout": (flat, {}, "experts.gate_up_proj' of a Flat, which is experts of another layout"),
    "one": (lambda: net(count=1), {}, "experts.gate_up_proj.*MixtralExperts.*one expert; accepted are two or more"),
    "parallel": (parallel, {}, "experts spread over processes; accepted are"),
    "replaced": (replaced, {}, "its forward is not that of"),
    "overridden": (overridden, {}, "its forward is not that of"),
    "parametrized": (parametrized, {"target_parameters": DOWN}, "it is parametrized"),
    "dtype": (narrow, {}, "its weight is float8_e4m3fn; accepted"),
    "trained": (net, {"train": "experts"}, "names 'experts.gate_up_proj', which is trained whole with 'experts'"),
    "excluded": (net, {"exclude_modules": BOTH}, "is in exclude_modules"),
    "bias": (lambda: net("gpt-oss"), {"target_parameters": "down_proj_bias"}, "no weight .E, N, K. of a product"),
    "router": (net, {"target_parameters": "router.weight"}, "which is not one of experts; train its module"),
    "nothing": (net, {"target_parameters": "w1"}, "'w1' matches no parameter. Available parameter of experts names"),
    "not targeted": (net, {"config": {UP: LORA}, "target_parameters": DOWN}, "not in target_modules or target_para"),
    "no targets": (net, {"target_parameters": ()}, "target_modules is empty"),
}


@pytest.mark.parametrize(("build", "given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(build, given, message):
    model = build()
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    kind = type(model.experts)
    with pytest.raises(ValueError, match=message):
        gk.inject(model, **{"config": LORA, "target_modules": [], "target_parameters": BOTH, **given})
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert type(model.experts) is kind
    assert not named_layers(model)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model: gk.rows(model, ["default"]).__enter__(), "adapters cannot differ by row"),
        (lambda model: gk.set_rank(model, UP, 2), "is a layer of experts"),
        (lambda model: gk.restart(model), "is a layer of experts"),
        (lambda model: gk.fully_shard(model), "is a layer of experts, which cannot be sharded"),
    ],
)
def test_what_does_not_serve_experts_names_them(act, message):
    with pytest.raises((ValueError, RuntimeError), match=f"'experts.gate_up_proj'.*{message}"):
        act(adapted())


def test_a_supernet_takes_no_experts_and_gives_the_model_back():
    model = net()
    with pytest.raises(ValueError, match=r"Supernet: 'experts\.down_proj' is a parameter of experts"):
        gk.Supernet(model, gk.SearchSpace(), target_modules=[DOWN])
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in net().named_parameters()}


def test_a_router_that_is_a_linear_layer_is_a_target_and_any_may_be_trained_whole():
    model = gk.inject(net(), LORA, "router", target_parameters=BOTH)
    assert set(named_layers(model)) == {"router", *BOTH}
    model = gk.inject(language_model("mixtral"), LORA, [], ["mlp.gate"], target_parameters=BOTH)
    assert model.model.layers[0].mlp.gate.weight.requires_grad
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, dropout):
    """The second forward draws the masks of the first."""
    model = adapted("qwen3", GLoRAConfig("vector", "lora", "vector", rank=3, dropout=dropout))
    found = []
    for checkpointed in (False, True):
        x = X.clone().requires_grad_()
        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        model.zero_grad()
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in named(model).items()}})
    for name, value in found[0].items():
        close(found[1][name], value, name)
    assert isinstance(model.experts.gate_up_proj, GLoRALinear)


@pytest.mark.parametrize("family", thinned(2, CLASSES))
def test_compiled_in_one_piece(family):
    model = adapted(family).float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = X.float()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in named(model).values())


def test_bf16_under_fp32_adapters_and_autocast():
    model = gk.inject(net().bfloat16(), FULL, target_modules=[], target_parameters=BOTH)
    drawn(model)
    assert {p.dtype for p in named(model).values()} == {torch.float32}
    truth = Literal(drawn(gk.inject(net().bfloat16(), FULL, target_modules=[], target_parameters=BOTH))).double()(X)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X.bfloat16())
    assert float((y.double() - truth).norm() / truth.norm()) < 0.02
