"""PEFT's LoRA over experts (`target_parameters`), accelerated: the same steps as PEFT's over every layout."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from mixtures import BOTH, CLASSES, EXPERTS, HIDDEN, Mixture, config_of, language_model, lora, mixture
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from twins import assert_same, randomized, reasons, step

import glora_kernels as gk
from glora_kernels.integrations.accelerated import experts

X = torch.randn(3, 5, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def ran(monkeypatch):
    """The rows of every product of experts that ran on our operator."""
    seen = []
    real = experts.expert_rows
    monkeypatch.setattr(experts, "expert_rows", lambda x, *others: seen.append(x) or real(x, *others))
    return seen


def accelerated(model):
    return gk.accelerate(copy.deepcopy(model), verbose=False)


def assert_twins(model, ran, x=X, products=2, tolerance=1e-11):
    """A step of the model, and of its accelerated copy with so many products on our operator, are the same."""
    fast = accelerated(model)
    expected = step(model, x)
    ran.clear()
    got = step(fast, x)
    assert len(ran) == products
    assert_same(got, expected, tolerance)
    return fast


@pytest.mark.parametrize("family", CLASSES)
def test_language_models_train_as_with_peft(family, ran):
    plain = language_model(family)
    fast = accelerated(plain)
    kinds = {"lora.Linear": 2, "lora.ParamWrapper": 2 if family == "deepseek-v3" else 4}
    assert gk.acceleration(fast).accelerated == kinds
    assert not gk.acceleration(fast).kept
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (plain, fast)]
    for number in range(4):
        ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(number))
        losses = []
        for model, optimizer in zip((plain, fast), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
        assert_same(dict(fast.named_parameters()), dict(plain.named_parameters()), 1e-9)
    assert len(ran) == 4 * kinds["lora.ParamWrapper"]
    assert not gk.acceleration(fast).fallbacks


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double(), **found}


@pytest.mark.parametrize("family", CLASSES)
def test_bf16_errs_no_more_than_peft(family, ran):
    """Against float64 from the same weights: in the norm of each gradient at most twice PEFT's error, and a floor."""
    narrow = language_model(family, torch.bfloat16)
    fast = accelerated(narrow)
    wide = language_model(family)
    wide.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    truth, plain, ours = (gradients(model, ids) for model in (wide, narrow, fast))
    assert ran
    floor = 4 * torch.finfo(torch.bfloat16).eps
    for name, value in truth.items():
        if "experts" in name or name == "loss":
            error, its = (float((found[name] - value).norm()) for found in (ours, plain))
            assert error <= 2 * its + floor * float(value.norm()), name


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:], BOTH[::-1]])
def test_one_parameter_or_both(family, targets, ran):
    assert_twins(mixture(lora(targets), family=family), ran)


OTHERS = {
    "rslora": {"use_rslora": True},
    "rank 1": {"r": 1},
    "rank 9": {"r": 9},
    "patterns": {"rank_pattern": {"down_proj": 7}, "alpha_pattern": {"gate_up_proj": 3}},
    "scale 0": {"lora_alpha": 0},
}


@pytest.mark.parametrize("more", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_scales_and_ranks(family, more, ran):
    assert_twins(mixture(lora(**more), family=family), ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_adapters_over_another_dtype(dtype, ran):
    """Those over bf16 are rounded to it, as PEFT does; their gradients are in fp32."""
    net = Mixture()
    net.router.double()
    plain = mixture(net=net, dtype=dtype, autocast_adapter_dtype=True)
    truth = copy.deepcopy(plain).double()
    fast, x = accelerated(plain), X.to(dtype)
    truth.base_model.model.experts.get_base_layer().config = copy.copy(net.experts.get_base_layer().config)
    truth.base_model.model.experts.get_base_layer().config._experts_implementation = "eager"
    expected, its, got = step(truth, x.double()), step(plain, x), step(fast, x)
    assert len(ran) == 2
    for name, value in expected.items():
        error, allowed = (float((found[name].double() - value).norm()) for found in (got, its))
        assert got[name].dtype == its[name].dtype
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * float(value.norm()), name


FAMILIES = {
    "no gate": ("nemotron_h", "NemotronHExperts", {"mlp_hidden_act": "relu2", "moe_latent_size": None}),
    "norm after": ("muse_spark", "MuseSparkExperts", {"moe_hidden_size": HIDDEN, "post_norm_eps": 1e-5}),
    "in, out": ("aria", "AriaExperts", {"moe_num_experts": EXPERTS}),
    "clamped": ("deepseek_v4", "DeepseekV4Experts", {"swiglu_limit": 0.3}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_of_other_families(family, ran):
    module, name, more = FAMILIES[family]
    found = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name])
    config = SimpleNamespace(
        hidden_size=HIDDEN, intermediate_size=20, moe_intermediate_size=20, num_local_experts=EXPERTS,
        n_routed_experts=EXPERTS, num_experts=EXPERTS, hidden_act="silu", **more,
    )  # fmt: skip
    module = getattr(found, name)(config)
    targets = BOTH if module.has_gate else ("up_proj", "down_proj")
    assert_twins(mixture(lora(targets), net=Mixture(experts=module)), ran)


def routed(model, index):
    """The model, its router giving these experts."""
    weights = torch.linspace(0.2, 0.9, index.numel(), dtype=torch.float64).view(index.shape)

    def forward(x):
        rows = x.reshape(-1, HIDDEN)
        return x + net.experts(rows, index, weights.to(x.dtype)).view(x.shape)

    net = model.base_model.model
    net.forward = forward
    return model


ROUTES = {
    "all on one expert": torch.full((15, 1), 2),
    "an expert without tokens": torch.tensor([[0, 3]] * 14 + [[3, 1]]),
    "one token": torch.tensor([[3, 1]]),
    "no token": torch.zeros(0, 2, dtype=torch.int64),
    "int32": torch.tensor([[0, 3]] * 15, dtype=torch.int32),
}


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("route", [name for name in ROUTES if name != "int32"])
def test_routes(route, family, ran):
    plain, index = mixture(family=family), ROUTES[route]
    fast = accelerated(plain)
    x = X.reshape(-1, HIDDEN)[: len(index)]
    expected, got = (step(routed(model, index), x) for model in (plain, fast))
    assert len(ran) == 2
    if not len(index):  # PEFT gives no gradient at all
        got = {name: value for name, value in got.items() if name in expected or bool(value.any())}
    assert_same(got, expected)


def test_an_index_of_another_integer_type(ran):
    model = accelerated(mixture())
    x, index = X.reshape(-1, HIDDEN), ROUTES["int32"]
    assert_same(step(routed(model, index), x), step(routed(model, index.long()), x), 0.0)


def test_two_active_adapters(ran):
    plain = mixture()
    for name, rank in (("wide", 7), ("rs", 3)):
        plain.add_adapter(name, lora(r=rank, use_rslora=name == "rs"), autocast_adapter_dtype=False)
    randomized(plain)
    for names in (["default", "wide"], ["rs", "default", "wide"], ["rs"]):
        plain.base_model.set_adapter(names)
        assert_twins(plain, ran)


def test_a_step_without_gradients_and_one_of_x_alone(ran):
    plain = mixture()
    fast = accelerated(plain)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), plain(X), rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), plain(X), rtol=1e-12, atol=1e-12)
    for model in (plain, fast):
        model.requires_grad_(False)
    assert_same(step(fast, X), step(plain, X))
    assert len(ran) == 6


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, ran):
    plain = mixture()
    fast = accelerated(plain)
    expected = step(fast, X)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = fast

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    ran.clear()
    got = {name.removeprefix("model."): value for name, value in step(Checkpointed(), X).items()}
    assert len(ran) == 4
    assert_same(got, expected, 0.0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant, ran):
    plain = language_model("mixtral")
    fast = accelerated(plain)
    for model in (plain, fast):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    assert_same(gradients(fast, ids), gradients(plain, ids), 1e-11)
    assert len(ran) == 8


def test_autocast_keeps_pefts_path_and_tells_it(ran):
    plain = mixture(dtype=torch.float32)
    fast = accelerated(plain)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (model(X.float()) for model in (plain, fast))
        assert not ran
        assert torch.equal(got, expected)
    (((_, reason), calls),) = gk.acceleration(fast).fallbacks.items()
    assert (reason, calls) == (experts.DTYPES, 1)
    narrow = mixture(dtype=torch.bfloat16)
    fast = accelerated(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(X.bfloat16())
    assert len(ran) == 2
    assert torch.equal(got, fast(X.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_compiled_model_is_one_graph(family, dtype, ran):
    torch._dynamo.reset()
    fast, x = accelerated(mixture(dtype=dtype, family=family)), X.to(dtype)
    expected = step(fast, x)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x).items()}
    assert_same(got, expected, 1e-11 if dtype == torch.float64 else 1e-5)


def test_flops_do_not_grow_with_experts(ran):
    """A dense ΔW would take 2·E·N·K·R, whatever the number of tokens."""
    counted = []
    for count in (8, 64):
        model = accelerated(mixture(net=Mixture(count=count)))
        with FlopCounterMode(display=False) as flops:
            model(X[:1, :1])
        router = 2 * HIDDEN * count
        counted.append(flops.get_total_flops() - router)
    assert counted[0] == counted[1] > 0


def test_saved_bytes_are_those_of_the_frozen_experts_and_h():
    """Of the size of rows there is h of each product and the input of the second one; x is kept by token."""
    rank, rows = 4, 15 * 2
    plain = mixture(dtype=torch.float32, adapter=lora(r=rank))
    fast, frozen = accelerated(plain), copy.deepcopy(plain)
    frozen.requires_grad_(False)
    frozen.base_model.disable_adapter_layers()
    kept = []
    for model in (frozen, fast):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def keep(tensor, own=own, found=found):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(X.float().requires_grad_())
        kept.append(sum(size for size, _ in found.values()))
    up = sum(p.numel() for name, p in fast.named_parameters() if "lora_B" in name)  # laid out by expert
    down_input = rows * config_of("mixtral").intermediate_size
    assert kept[1] <= kept[0] + 4 * (X.numel() + 2 * rows * rank + up + down_input)


def test_the_report_before_and_after():
    model = mixture()
    told = "accelerate() was not called since it was added, or decelerate() was"
    assert gk.acceleration(model).kept == {("lora.ParamWrapper", told): 2}
    gk.accelerate(model, verbose=False)
    assert gk.acceleration(model).accelerated == {"lora.ParamWrapper": 2}
    with model.disable_adapter():
        assert gk.acceleration(model).accelerated == {"lora.ParamWrapper": 2}
    gk.decelerate(model)
    assert gk.acceleration(model).kept == {("lora.ParamWrapper", told): 2}
    assert not reasons(accelerated(mixture(LoraConfig(r=2, target_modules=["router"], target_parameters=[]))))
