"""What surrounds accelerated experts: merging, files, copies, hooks, other ways to call, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from mixtures import BOTH, EXPERTS, HIDDEN, Mixture, language_model, lora, mixture
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from twins import assert_same, randomized, reasons, step

import glora_kernels as gk
from glora_kernels.integrations.accelerated import experts
from glora_kernels.integrations.bases import HOOKED, ON_META, SHARDED, SUBCLASS, TRANSFORMED

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


@pytest.fixture
def twins(ran):
    """PEFT's model and its accelerated copy; and a check that a step of both is the same, with so many products."""
    plain = mixture()
    fast = accelerated(plain)

    def check(products, tolerance=1e-11):
        expected = step(plain, X)
        ran.clear()
        got = step(fast, X)
        assert len(ran) == products
        assert_same(got, expected, tolerance)

    return plain, fast, check


def base_of(model):
    return model.base_model.model.experts.get_base_layer()


def test_disabled_and_enabled(twins):
    plain, fast, check = twins
    check(2)
    with plain.disable_adapter(), fast.disable_adapter():
        check(0)
    check(2)
    assert not {reason for _, reason in gk.acceleration(fast).kept}


def test_merged_and_unmerged(twins):
    plain, fast, check = twins
    y = fast(X)
    for safe in (False, True):
        for model in (plain, fast):
            model.merge_adapter(safe_merge=safe)
        check(0)
        torch.testing.assert_close(fast(X), y, rtol=1e-12, atol=1e-12)
        for model in (plain, fast):
            model.unmerge_adapter()
        check(2)


def test_one_of_the_wrappers_is_merged(twins):
    """The inner wrapper is computed with the weight that the outer one has merged, and the other way round."""
    plain, fast, check = twins
    for path in ("experts", "experts.base_layer"):
        for model in (plain, fast):
            model.base_model.model.get_submodule(path).merge()
        check(2 if path == "experts" else 0)
        for model in (plain, fast):
            model.base_model.model.get_submodule(path).unmerge()
    for model in (plain, fast):
        model.base_model.model.experts.base_layer.merge()
    check(0)


def test_merged_for_good(twins):
    plain, fast, _ = twins
    y = fast(X)
    plain, fast = plain.merge_and_unload(), fast.merge_and_unload()
    assert type(fast.experts) is type(plain.experts)
    assert_same(fast.state_dict(), plain.state_dict(), 0.0)
    torch.testing.assert_close(fast(X), y, rtol=1e-12, atol=1e-12)


def test_unloaded(twins):
    _, fast, _ = twins
    with fast.disable_adapter():
        y = fast(X)
    assert torch.equal(fast.unload()(X), y)


def test_files_are_pefts(twins, ran, tmp_path):
    plain, fast, _ = twins
    for name, model in (("plain", plain), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path(tmp_path / "plain" / name).read_bytes() == Path(tmp_path / "fast" / name).read_bytes()
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mixture().double(), tmp_path / "fast", autocast_adapter_dtype=False)
    base_of(loaded).load_state_dict(base_of(plain).state_dict())
    loaded.base_model.model.router.load_state_dict(plain.base_model.model.router.state_dict())
    base_of(loaded).config._experts_implementation = "eager"
    loaded = gk.accelerate(loaded, verbose=False)
    ran.clear()
    assert torch.equal(loaded(X), fast(X))
    assert len(ran) == 4


def test_loading_over_an_adapter_and_resuming(twins):
    plain, fast, check = twins
    other = randomized(mixture(), 0.7)
    for model in (plain, fast):
        model.load_state_dict(other.state_dict())
    check(2)


def test_adapters_are_added_switched_and_deleted(twins):
    plain, fast, check = twins
    for model in (plain, fast):
        model.add_adapter("other", lora(r=2), autocast_adapter_dtype=False)
        randomized(model)
        model.set_adapter("other")
    check(2)
    for model in (plain, fast):
        model.delete_adapter("other")
        model.set_adapter("default")
    check(2)


def test_copies_and_the_way_back(twins, ran):
    plain, fast, check = twins
    assert_same(step(copy.deepcopy(fast), X), step(fast, X), 0.0)
    assert {type(m).__name__ for m in fast.modules()} == {type(m).__name__ for m in plain.modules()}
    gk.decelerate(fast)
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    check(0, 0.0)
    gk.accelerate(fast, verbose=False)
    check(2)
    assert repr(fast) == repr(plain)


def test_rows_are_refused(twins):
    _, fast, check = twins
    told = r"rows: '\S*experts' cannot .* experts module"
    for names in (["default", None, "default"], ["default"] * 3):
        with pytest.raises(RuntimeError, match=told), gk.rows(fast, names):
            fast(X)
    with pytest.raises(ValueError, match="does not support mixed"):
        fast.base_model.model.experts(X[0], torch.zeros(5, 1).long(), torch.ones(5, 1), adapter_names=["default"] * 5)
    check(2)


@pytest.mark.parametrize("act", [lambda m: gk.edit_ranks(m, {"experts": 2}), lambda m: gk.restart(m)])
def test_ranks_are_not_edited(twins, act):
    _, fast, check = twins
    before = copy.deepcopy(fast.state_dict())
    with pytest.raises(
        (TypeError, ValueError), match=r"experts' cannot be changed: it adapts the parameters of experts"
    ):
        act(fast)
    assert_same(fast.state_dict(), before, 0.0)
    check(2)


def test_warmup_takes_the_other_layers():
    net = lora(target_modules=["router"])
    fast = gk.accelerate(mixture(net, dtype=torch.float32), verbose=False)
    expected = step(fast, X.float())
    gk.warmup(fast, [8])
    assert_same(step(fast, X.float()), expected, 0.0)


def test_scales_that_are_tensors(twins):
    """Hot swapping makes them so, and writes to them."""
    plain, fast, check = twins
    for scale in (0.3, 1.7):
        for model in (plain, fast):
            for module in model.modules():
                if isinstance(module, ParamWrapper):
                    module.scaling["default"] = torch.tensor(scale, dtype=torch.float64)
        check(2)


# What is left to PEFT, each with the reason in the summary or in the count of calls.


def change_of(name):
    def parametrized(model):
        class Twice(nn.Module):
            def forward(self, weight):
                return weight * 2

        parametrize.register_parametrization(base_of(model), "down_proj", Twice())

    def parallel(model):
        # The index of an expert of another process is E, and counts for nothing.
        base_of(model)._is_expert_parallel = True

    def hooked(model):
        base_of(model).register_forward_hook(lambda module, given, y: y * 2)

    def hooked_inside(model):
        model.base_model.model.experts.base_layer.register_forward_pre_hook(lambda module, given: None)

    def other_forward(model):
        base = base_of(model)
        base.forward = lambda *given, **more: type(base).forward(base, *given, **more) * 2

    def trained(model):
        base_of(model).down_proj.requires_grad_()

    def subclass(model):
        kind = type(base_of(model))
        base_of(model).__class__ = type("Mine", (kind,), {"forward": lambda *given: 2 * kind.forward(*given)})

    def implementation(model):
        base_of(model).config._experts_implementation = "doubled"

    return locals()[name]


CHANGES = {
    "parametrized": experts.FOREIGN,
    "parallel": experts.PARALLEL,
    "hooked": HOOKED,
    "hooked_inside": HOOKED,
    "other_forward": HOOKED,
    "trained": experts.TRAINED,
    "subclass": experts.OTHER_FORWARD,
    "implementation": experts.OTHER_FORWARD,
}


def doubled(*given):
    return 2 * ALL_EXPERTS_FUNCTIONS["batched_mm"](*given)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_left_to_peft(change, twins, monkeypatch):
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "doubled", doubled)
    plain, fast, check = twins
    y = plain(X)
    for model in (plain, fast):
        change_of(change)(model)
    assert reasons(fast) == {CHANGES[change]}
    check(0, 0.0)
    found = {reason for _, reason in gk.acceleration(fast).fallbacks}
    assert found == {CHANGES[change]}
    assert torch.equal(plain(X), y) == (change in ("parallel", "hooked_inside", "trained"))  # the others change y


@pytest.mark.parametrize("name", ["eager", "batched_mm"])  # the others take no float64
def test_implementations_of_transformers(name, twins):
    plain, fast, check = twins
    for model in (plain, fast):
        base_of(model).config._experts_implementation = name
    check(2)


def test_a_forward_put_in_place_of_the_classes(twins, monkeypatch):
    _, fast, check = twins
    kind = type(base_of(fast))
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *given: 2 * own(*given))
    check(0, 0.0)
    assert reasons(fast) == {experts.OTHER_FORWARD}
    monkeypatch.undo()
    check(0)  # the products were counted by the same monkeypatch
    assert not reasons(fast)


def test_offloaded_experts(twins, ran):
    """accelerate's hooks bring weights in before each call, where only a call of the module itself brings them."""
    from accelerate import cpu_offload

    plain, fast, _ = twins
    expected = plain(X)
    errors = []
    for model in (plain, fast):
        cpu_offload(base_of(model), execution_device=torch.device("cpu"))
        assert base_of(model).down_proj.is_meta
        with pytest.raises(Exception) as error:  # PEFT cannot: it parametrizes weights before the hook brings them
            model(X)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
    assert reasons(fast) == {HOOKED}
    assert not ran
    with plain.disable_adapter():
        assert not torch.equal(expected, plain(X))


def test_meta_weights_and_parts_of_sharded_ones(twins):
    _, fast, _ = twins
    base = base_of(fast)
    base.down_proj = nn.Parameter(base.down_proj.to("meta"), requires_grad=False)
    assert reasons(fast) == {ON_META}

    class Part(torch.Tensor):
        pass

    base.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, 48).as_subclass(Part), requires_grad=False)
    assert reasons(fast) == {SHARDED}


def test_one_expert(ran):
    plain = mixture(net=Mixture(count=1))
    fast = accelerated(plain)
    assert reasons(fast) == {experts.ONE}
    assert_same(step(fast, X), step(plain, X), 0.0)
    assert not ran


def test_a_parameter_that_is_no_weight(ran):
    class Scaled(type(Mixture().experts)):
        def __init__(self, config):
            super().__init__(config)
            self.other = nn.Parameter(torch.ones(EXPERTS, 4, 4))

    net = Mixture(experts=Scaled(Mixture().experts.config))
    plain = mixture(lora(("down_proj", "other")), net=net)
    fast = accelerated(plain)
    assert experts.OTHER_PARAMETER in reasons(fast)
    assert_same(step(fast, X), step(plain, X), 0.0)
    assert not ran


def test_calls_with_keywords_and_of_other_types(twins, ran):
    plain, fast, _ = twins
    x = X.reshape(-1, HIDDEN)
    index, weights = torch.arange(30).view(15, 2) % EXPERTS, torch.rand(15, 2, dtype=torch.float64)
    modules = [model.base_model.model.experts for model in (plain, fast)]
    expected, got = (m(x, top_k_index=index, top_k_weights=weights) for m in modules)
    assert torch.equal(got, expected)
    wider = torch.cat([weights, weights.flip(0)], 1)  # read at the places that the experts have
    expected, got = (m(x, index, wider) for m in modules)
    assert torch.equal(got, expected)

    class Sub(torch.Tensor):
        pass

    expected, got = (m(x.as_subclass(Sub), index, weights) for m in modules)
    assert torch.equal(got, expected)
    assert not ran
    found = {reason for _, reason in gk.acceleration(fast, reset=True).fallbacks}
    assert found == {experts.ARGUMENTS, SUBCLASS}
    _, want = torch.autograd.functional.jvp(lambda x: modules[0](x, index, weights), x, torch.ones_like(x))
    with torch.autograd.forward_ad.dual_level():
        y = modules[1](torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), index, weights)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, want, rtol=1e-11, atol=1e-11)
    assert {reason for _, reason in gk.acceleration(fast).fallbacks} == {TRANSFORMED}


@pytest.mark.parametrize("given", ["lora_", ""])
def test_parameters_of_a_functional_call(given, twins, ran):
    found = []
    for model in twins[:2]:
        given_ = {name: p.detach() * 1.1 for name, p in model.named_parameters() if given in name}
        trained = [tensor.requires_grad_() for name, tensor in given_.items() if "lora_" in name]
        y = torch.func.functional_call(model, given_, (X,))
        found.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    assert len(ran) == 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)


def test_llama_4_keeps_pefts_path(ran):
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=EXPERTS, num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.Llama4ForCausalLM(config)
    adapter = lora(BOTH, "experts", target_modules=["q_proj"])
    plain = randomized(get_peft_model(net, adapter), 0.1)
    fast = accelerated(plain)
    report = gk.acceleration(fast)
    assert report.kept == {("lora.ParamWrapper", experts.LAYOUT): 2}
    assert report.accelerated == {"lora.Linear": 1}
    ids = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert not ran


def test_models_take_turns(ran):
    first, second = (gk.accelerate(language_model("mixtral"), verbose=False) for _ in range(2))
    randomized(second, 0.1)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    alone = [model(input_ids=ids).logits for model in (first, second)]
    for model, expected in zip((second, first, second), (alone[1], alone[0], alone[1]), strict=True):
        assert torch.equal(model(input_ids=ids).logits, expected)
