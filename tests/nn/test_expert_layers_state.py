"""The life of GLoRA layers over experts: states, files, copies, merging, 4 bits, several adapters."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from contextlib import nullcontext

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
from safetensors.torch import load_file
from small_mixtures import HIDDEN
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, quant
from glora_kernels.nn.file import read, write
from glora_kernels.nn.formats.read import is_foreign
from glora_kernels.nn.model import named_layers

PLAIN = GLoRAConfig("vector", "lora", rank=3)  # nothing of it becomes a bias
FAMILIES = ("mixtral", "gpt-oss")
HARMLESS = [PLAIN, CONFIGS["lora"]]
"""Configurations that add nothing to a bias."""


def close(left, right, tolerance=1e-10):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# States and copies.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_of_the_base_loads_and_one_of_the_layers_goes_round(family):
    base = net(family)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(0.5)
    model = gk.inject(net(family), FULL, target_modules=[], target_parameters=BOTH)
    result = model.load_state_dict(states(base), strict=False)
    assert not result.unexpected_keys
    assert all(name.rpartition(".")[2] not in ("weight", "bias") for name in result.missing_keys)
    close(model(X), base(X))
    own = adapted(family)
    other = adapted(family, seed=4)
    other.load_state_dict(states(own))
    close(other(X), own(X), 0)
    part = gk.inject(net(family), FULL, target_modules=[], target_parameters=BOTH).experts
    assert not part.load_state_dict(states(base.experts), strict=False).unexpected_keys


@pytest.mark.parametrize("family", ["mixtral", "qwen3"])
def test_checkpoints_of_transformers_have_the_layers_and_later_the_original_format(family, tmp_path):
    model = language_model(family)
    model.save_pretrained(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    model = type(model).from_pretrained(tmp_path / "base")  # it has conversions of its own
    gk.inject(model, PLAIN, [], target_parameters=BOTH)
    drawn(model).save_pretrained(tmp_path / "injected")
    assert_same(load_file(tmp_path / "injected" / "model.safetensors"), states(model))
    gk.unload(model).save_pretrained(tmp_path / "plain")
    assert_same(load_file(tmp_path / "plain" / "model.safetensors"), base)
    assert not any("glora" in name for name in vars(model))
    with pytest.raises(ValueError, match="no linear layer"):  # the second pattern fails
        gk.inject(model, {"nothing": PLAIN}, [], target_parameters=BOTH)
    model.save_pretrained(tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), base)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model = adapted("gpt-oss", SHARED["A"])
    twin = copied(model)
    close(twin(X), model(X), 0)
    drawn(twin, 5)
    close(twin(X), Literal(twin)(X))
    assert not torch.allclose(twin(X), model(X))
    assert type(gk.unload(twin).experts) is type(net("gpt-oss").experts)
    close(model(X), Literal(model)(X))


def test_a_move_between_dtypes_keeps_factors_shared():
    model = adapted(config=SHARED["A"], targets=UP).float().double()
    close(model(X), Literal(model)(X))
    model.experts.to_empty(device="cpu")
    drawn(model)
    assert model.experts.gate_up_proj.B_down.shape == (1, 3, HIDDEN)


# Files.


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_go_round(config, tmp_path):
    model = adapted("gpt-oss", config)
    model.experts.down_proj.bias.requires_grad_(True)
    gk.save_adapter(model, tmp_path / "a")
    fresh = gk.load_adapter(net("gpt-oss"), tmp_path / "a")
    close(fresh(X), model(X), 0)
    assert fresh.experts.down_proj.bias.requires_grad
    gk.save_adapter(fresh, tmp_path / "b")
    first, second = (read(tmp_path / name, is_foreign) for name in "ab")
    assert first.layers == second.layers
    assert_same(first.tensors, second.tensors)
    into = adapted("gpt-oss", config, seed=9)
    into.experts.down_proj.bias.requires_grad_(True)
    close(gk.load_adapter(into, tmp_path / "a")(X), model(X), 0)


def test_a_file_without_experts_is_of_the_first_version(tmp_path):
    from safetensors import safe_open

    versions = []
    for targets, parameters in (("router", ()), ([], BOTH)):
        gk.save_adapter(gk.inject(net(), PLAIN, targets, target_parameters=parameters), tmp_path / "a")
        with safe_open(tmp_path / "a", "pt") as file:
            versions.append(file.metadata()["format_version"])
    assert versions == ["1", "3"]


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"experts": 1}, "a number of experts that no layer has"),
        ({"experts": -4}, "a number of experts that no layer has"),
        ({"common": ["C"]}, "common to its experts that it does not have"),
        ({"common": ["B_down"]}, r"shape \(4, 3, 32\); the model takes \(1, 3, 32\)"),
        ({"experts": 5}, r"experts=5 \(the model: 4\)"),
    ],
)
def test_forged_files_are_refused(forged, message, tmp_path):
    gk.save_adapter(adapted(config=PLAIN, targets=UP), tmp_path / "a")
    adapter = read(tmp_path / "a", is_foreign)
    entry = dataclasses.replace(adapter.layers[UP], **forged)
    write(dataclasses.replace(adapter, layers={UP: entry}), tmp_path / "a")
    model = net()
    with pytest.raises(ValueError, match=message):
        gk.load_adapter(model, tmp_path / "a")
    assert not named_layers(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: adapted(config=SHARED["A"]), r"common=\('B_down',\) \(the model: \(\)\)"),
        (lambda: net("deepseek-v3"), "in_features|experts=4"),
        (lambda: nn.Sequential(), "where the model has no module"),
    ],
)
def test_files_that_do_not_fit(model, message, tmp_path):
    saved, given = adapted(config=CONFIGS["lora"]), model()
    if "common" in message:
        saved, given = given, adapted(config=SHARED["A"].layer_config().lora(rank=3, alpha=2))
        saved = adapted(config=type(SHARED["A"])(rank=3, alpha=2))
    gk.save_adapter(saved, tmp_path / "a")
    before = states(given)
    with pytest.raises(ValueError, match=message):
        gk.load_adapter(given, tmp_path / "a")
    assert_same(states(given), before)


# Merging.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_layers_compute_the_same_and_come_back(family, config):
    model = adapted(family, config).eval()
    y, before = model(X), states(model)
    with (
        pytest.warns(UserWarning, match="without a bias have one now")
        if family == "mixtral" and config not in HARMLESS
        else nullcontext()
    ):
        gk.merge(model)
    close(model(X), y)
    with gk.disabled(model):
        close(model(X), net(family)(X), 0)
    close(model(X), y)
    with pytest.raises(RuntimeError, match="merged already"):
        gk.merge(model)
    with pytest.raises(RuntimeError, match="this layer is merged"):
        model.train()(X)
    gk.unmerge(model)
    assert_same(states(model), before)


def test_a_merged_state_is_that_of_a_plain_model():
    model = adapted("gpt-oss").eval()
    y = model(X)
    gk.merge(model)
    plain = net("gpt-oss")
    plain.load_state_dict(states(model))
    close(plain(X), y)


@pytest.mark.parametrize("merged_before", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_module_comes_back_merged_or_not(family, merged_before):
    plain = net(family)
    plain.experts.down_proj.requires_grad_(False)
    names = [(name, id(p), p.requires_grad) for name, p in plain.named_parameters()]
    model = drawn(gk.inject(plain, PLAIN, target_modules=[], target_parameters=BOTH))
    y = model(X)
    if merged_before:
        gk.merge(model)
    gk.merge_and_unload(model)
    assert type(model.experts) is type(net(family).experts)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == names
    assert not any("glora" in name for name in vars(model.experts))
    close(model(X), y)
    again = drawn(gk.inject(model, PLAIN, target_modules=[], target_parameters=DOWN))
    gk.unload(again)
    close(again(X), y)


def test_experts_without_a_bias_are_not_unloaded_with_one():
    model = adapted()
    before = states(model)
    with pytest.raises(
        ValueError, match=r"'experts.gate_up_proj' would become a bias, which these experts do not have"
    ):
        gk.merge_and_unload(model)
    assert_same(states(model), before)
    model.experts.down_proj.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"'experts\.down_proj' has hooks"):
        gk.unload(model)


def test_16_bits_are_rounded_once():
    """As each expert's own GLoRALinear rounds."""
    model = drawn(gk.inject(net().bfloat16(), PLAIN, target_modules=[], target_parameters=UP))
    layer = model.experts.gate_up_proj
    expected = []
    for e in range(4):
        linear = nn.Linear(HIDDEN, 96, bias=False)
        linear.weight = nn.Parameter(layer.weight.detach()[e].clone())
        own = gk.GLoRALinear.from_linear(linear, PLAIN, adapter_dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in own.adapter().items():
                parameter.copy_(layer.adapter()[name][e])
        own.merge()
        expected.append(own.weight)
    gk.merge(model)
    assert torch.equal(layer.weight, torch.stack(expected))


def test_a_failed_merge_changes_nothing():
    model = adapted(config=PLAIN)
    with torch.no_grad():
        model.experts.down_proj.A[2, 3] = torch.inf
    before = states(model)
    with pytest.raises(ValueError, match=r"merge: 'experts.down_proj': the merged weight holds NaN, inf"):
        gk.merge(model)
    assert_same(states(model), before)
    assert not model.experts.gate_up_proj.merged


# 4 bits.


def quantized(family="mixtral", **options):
    return gk.quantize(net(family).float(), target_modules=[], target_parameters=BOTH, **options).double()


def dequantized(model):
    """The same net, its experts dense."""
    made = net(model_family(model))
    for name in ("gate_up_proj", "down_proj"):
        layer = model.experts._modules[name]
        dense = quant.dequantize(layer.codes(), torch.float64).view(layer.experts, layer.out_features, -1)
        with torch.no_grad():
            getattr(made.experts, name).copy_(dense.mT if made.experts.is_transposed else dense)
            if layer.bias is not None:
                getattr(made.experts, f"{name}_bias").copy_(layer.bias)
    made.router.load_state_dict(model.router.state_dict())
    return made


def model_family(model):
    return "gpt-oss" if "GptOss" in type(model.experts).__name__ else "mixtral"


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_4_bits_train_as_the_dequantized_net(family, double_quant, tmp_path):
    packed = quantized(family, double_quant=double_quant)
    dense = dequantized(packed)
    close(packed(X), dense(X), 1e-6)
    assert packed.experts.gate_up_proj.quant_state.shape == (4 * 96, HIDDEN)
    nets = [
        drawn(gk.inject(own, FULL, [], target_parameters=BOTH, adapter_dtype=torch.float64)) for own in (packed, dense)
    ]
    for own in nets:
        own(X).square().sum().backward()
    for name, parameter in named(nets[1]).items():
        close(named(nets[0])[name].grad, parameter.grad, 1e-5)
    gk.save_adapter(nets[0], tmp_path / "a")
    other = gk.load_adapter(quantized(family, double_quant=double_quant), tmp_path / "a")
    close(other(X), nets[0](X), 1e-6)
    twin = pickle.loads(pickle.dumps(nets[0]))
    twin.load_state_dict(states(nets[0]))
    close(twin(X), nets[0](X), 0)


def test_merging_into_4_bits_needs_to_be_allowed_and_reports():
    model = drawn(gk.inject(quantized("gpt-oss"), PLAIN, [], target_parameters=BOTH)).eval()
    y, before = model(X), states(model)
    with pytest.raises(RuntimeError, match=r"2 of 2 layers are in 4 bits, the first 'experts.gate_up_proj'"):
        gk.merge(model)
    report = gk.merge(model, requantize=True)
    assert report.weights == 4 * HIDDEN * (96 + 48)
    assert 0.5 < report.survived < 1.5
    assert 0 < float(((model(X) - y).norm() / y.norm()).detach()) < 0.5
    gk.unmerge(model)
    assert_same(states(model), before)
    close(model.experts.gate_up_proj.to_linear().weight[1], dense_of(model.experts.gate_up_proj, 1), 1e-6)
    plain = gk.unload(model)
    close(plain(X), quantized("gpt-oss")(X), 1e-6)


def dense_of(layer, e):
    from glora_kernels.reference import effective_weight

    dense = quant.dequantize(layer.codes(), torch.float64).view(layer.experts, layer.out_features, -1)[e]
    own = {name: p.detach()[e].double() for name, p in layer.adapter().items()}
    return effective_weight(dense, own, layer.config).to(layer.base_dtype)


def test_an_experts_module_alone_is_quantized():
    experts = net().float().experts
    assert gk.quantize(experts, "nf4") is experts
    assert set(experts._modules) == {"act_fn", "gate_up_proj", "down_proj"}
    assert not experts._parameters


def test_what_cannot_be_quantized():
    model = net("qwen3").float()
    with pytest.raises(
        ValueError, match=r"quantize: 'experts.gate_up_proj' has N·K = 1536 .* multiple of blocksize=1024"
    ):
        gk.quantize(model, target_modules=[], target_parameters=BOTH, blocksize=1024)
    assert set(model.experts._parameters) == {"gate_up_proj", "down_proj"}
    gk.quantize(model)  # the router alone
    assert set(model.experts._parameters) == {"gate_up_proj", "down_proj"}
    with pytest.raises(ValueError, match="is in 4 bits already"):
        gk.quantize(quantized(), target_modules=[], target_parameters=BOTH)


# Several adapters.


def test_several_adapters(tmp_path):
    model = adapted()
    first = model(X)
    gk.add_adapter(model, "b", SHARED["A"])
    gk.add_adapter(model, "c", {UP: GLoRAConfig.lora(rank=4)}, [], target_parameters=UP, expert_rank="rank // top_k")
    close(model(X), first, 0)
    gk.set_adapter(model, "b")
    with torch.no_grad():
        for layer in named_layers(model).values():
            for name in ("b", "c"):
                if (own := layer.named().get(name)) is not None:
                    for number, parameter in enumerate(own.parameters()):
                        generator = torch.Generator().manual_seed(number)
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    y = model(X)
    alone = adapted(config=SHARED["A"])
    with torch.no_grad():
        for path, layer in named_layers(alone).items():
            for name, value in named_layers(model)[path].named()["b"].values().items():
                getattr(layer, name).copy_(value)
    close(y, alone(X))
    gk.save_adapter(model, tmp_path / "b", "b")
    close(gk.load_adapter(net(), tmp_path / "b")(X), y)
    gk.set_adapter(model, "c")
    assert model.experts.gate_up_proj.named()["c"].config.rank == 2
    close(model.experts.down_proj.active_adapter()[0], {})
    gk.delete_adapter(model, "b")
    close(gk.load_adapter(model, tmp_path / "b", "b") and (gk.set_adapter(model, "b") or model(X)), y)
    gk.set_adapter(model, "default")
    close(model(X), first, 0)
    groups = gk.parameter_groups(model, by_adapter=True)
    assert {group["adapter"] for group in groups} == {"default", "b", "c"}


def test_experts_are_added_beside_linear_layers():
    model = gk.inject(net(), GLoRAConfig.lora(rank=2), "router")
    gk.add_adapter(model, "experts", FULL, [], target_parameters=BOTH)
    y = model(X)
    gk.set_adapter(model, "experts")
    close(model(X), y)
    drawn(model)
    assert not torch.allclose(model(X), y)


def test_gradients_are_clipped_and_disabled_layers_are_their_base():
    model = adapted()
    model(X).square().sum().backward()
    grads = torch.cat([p.grad.flatten() for p in named(model).values()])
    close(gk.clip_grad_norm_(model.parameters(), 1.0), grads.norm())
    close(torch.cat([p.grad.flatten() for p in named(model).values()]).norm(), torch.tensor(1.0).double(), 1e-5)
    with gk.disabled(model):
        close(model(X), net()(X))


def test_contexts_over_layers_leave_experts_out():
    model = adapted("gpt-oss", SHARED["A"])
    expected = model(X)
    with gk.shift_once(model), gk.deferred_shared_grads(model):
        close(model(X), expected, 0)
    assert gk.warmup(model, progress=False) == []
