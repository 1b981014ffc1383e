"""Merging: the merged weights compute what the adapted layer does, and the base comes back bit for bit."""

import copy

import pytest
import torch
from small_configs import SMALL
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear, reference
from glora_kernels.nn.model import named_layers

CONFIGS = SMALL | {
    "shifted": GLoRAConfig(E="vector", rank=3),
    "all-lora": GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=3, alpha=6, dropout=0.5),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
each_base = pytest.mark.parametrize("base", ["bias", "no-bias", "conv1d"])


def make(base, config, k=9, n=7, dtype=torch.float32):
    if base == "conv1d":
        linear = pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k).to(dtype)
        nn.init.normal_(linear.bias)
    else:
        linear = nn.Linear(k, n, bias=base == "bias", dtype=dtype)
    return GLoRALinear.from_linear(linear, config).eval()


def bits(layer):
    """The base parameters as raw bytes: equal only where they are equal bit for bit."""
    return [None if p is None else p.detach().clone().view(torch.uint8) for p in (layer.weight, layer.bias)]


def same(left, right):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(left, right, strict=True))


@each_config
@each_base
def test_merged_equals_forward(config, base, randomize):
    layer = randomize(make(base, config, dtype=torch.float64))
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    expected = layer(x)
    identity = (layer.weight, layer.bias)
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert layer.weight is identity[0]
    assert identity[1] is None or layer.bias is identity[1]
    layer.unmerge()
    assert not layer.merged
    assert (layer.weight, layer.bias) == identity
    assert torch.equal(layer(x), expected)


@each_config
@each_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_the_base_bit_for_bit(config, base, dtype, randomize):
    layer = randomize(make(base, config, dtype=dtype))
    with torch.no_grad():
        layer.weight.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-7])
    before = bits(layer)
    for _ in range(2):
        layer.merge()
        assert config == CONFIGS["nothing"] or not same(bits(layer), before)
        layer.unmerge()
        assert same(bits(layer), before)


@each_config
@pytest.mark.parametrize("base", ["bias", "conv1d"])
def test_16_bit_weights_are_merged_in_fp32_and_rounded_once(config, base, randomize):
    layer = randomize(make(base, config, dtype=torch.bfloat16))
    weight = (layer.weight.t() if base == "conv1d" else layer.weight).detach()
    adapter = {name: p.detach().float() for name, p in layer.adapter().items()}
    expected = reference.effective_weight(weight.float(), adapter, config).bfloat16()
    bias = reference.effective_bias(weight.float(), layer.bias.detach().float(), adapter, config).bfloat16()
    linear = layer.to_linear()
    assert torch.equal(linear.weight, expected)
    assert torch.equal(linear.bias, bias)
    layer.merge()
    assert torch.equal(layer.weight.t() if base == "conv1d" else layer.weight, expected)
    assert torch.equal(layer.bias, bias)


@each_config
@each_base
@pytest.mark.parametrize("merged", [False, True])
def test_to_linear_is_plain_and_shares_nothing(config, base, merged, randomize):
    layer = randomize(make(base, config))
    x = torch.randn(2, 9)
    expected = layer(x)
    if merged:
        layer.merge()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert linear.weight.shape == (7, 9)
    assert linear.weight.is_contiguous()
    assert not linear.training
    assert not any(p.requires_grad for p in linear.parameters())
    torch.testing.assert_close(linear(x), expected)
    assert layer.merged is merged
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    torch.testing.assert_close(linear(x), expected)


def test_a_layer_without_a_bias_gets_one_while_merged(randomize):
    layer = randomize(make("no-bias", GLoRAConfig(E="vector", rank=2)))
    names = [name for name, _ in layer.named_parameters()]
    layer.merge()
    assert torch.equal(layer.bias, layer.E)
    assert not layer.bias.requires_grad
    assert layer.bias.data_ptr() != layer.E.data_ptr()
    layer.unmerge()
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == names


def test_the_base_is_kept_in_host_memory_and_survives_a_change_of_dtype(full, randomize):
    layer = randomize(make("bias", full))
    weight = layer.weight.detach().clone()
    layer.merge()
    assert layer._base[0].device.type == "cpu"
    assert layer._base[0].data_ptr() != layer.weight.data_ptr()
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight, weight.double())


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors(full):
    layer = make("bias", full)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="already"):
        layer.merge()
    layer.unmerge()


def test_a_training_forward_while_merged_is_an_error_that_says_what_to_do(full, randomize):
    layer = randomize(make("bias", full)).train()
    x = torch.randn(2, 9)
    layer.merge()
    with pytest.raises(RuntimeError, match=r"unmerge\(\).*eval\(\).*no_grad\(\)"):
        layer(x)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer.eval()(x), expected)


def test_a_failing_merge_changes_nothing(full, randomize, monkeypatch):
    layer = randomize(make("no-bias", full))
    before = bits(layer)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr("glora_kernels.nn.merging.values.effective_bias", fail)
    with pytest.raises(MemoryError):
        layer.merge()
    assert not layer.merged
    assert same(bits(layer), before)


def test_a_pending_backward_notices_that_the_weight_was_merged(full, randomize):
    layer = randomize(make("bias", full))
    y = layer(torch.randn(2, 9, requires_grad=True))
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_loading_a_state_dict_into_a_merged_layer_is_an_error(full):
    layer = make("bias", full)
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    with pytest.raises(RuntimeError, match="merged; call unmerge"):
        layer.load_state_dict(state)
    layer.unmerge()
    layer.load_state_dict(state)


# Whole models.


def test_model_merge_unmerge(vit, full, randomize):
    model = randomize(gk.inject(vit(), full, train=["classifier"])).eval()
    x = torch.randn(3, 4, 12)
    expected = model(x)
    before = copy.deepcopy(model.state_dict())
    assert gk.merge(model) is None
    assert all(layer.merged for layer in named_layers(model).values())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    gk.unmerge(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_llama_and_gpt2_merge(llama, gpt2, full, randomize):
    for build in (llama, gpt2):
        model = randomize(gk.inject(build(), full), std=0.05)
        ids = torch.arange(6)[None]
        expected = model(ids).logits
        gk.merge(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_model_merge_is_all_or_nothing(vit, full, randomize, monkeypatch):
    model = randomize(gk.inject(vit(), full))
    before = copy.deepcopy(model.state_dict())
    layers = list(named_layers(model).values())
    original = GLoRALinear.merge

    def fail_at_the_last(layer):
        if layer is layers[-1]:
            raise MemoryError("no host memory")
        original(layer)

    monkeypatch.setattr(GLoRALinear, "merge", fail_at_the_last)
    with pytest.raises(MemoryError):
        gk.merge(model)
    assert not any(layer.merged for layer in layers)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_model_merge_and_unmerge_name_the_layer_in_the_wrong_state(vit, full):
    model = gk.inject(vit(), full)
    with pytest.raises(RuntimeError, match=r"'embed' is not merged"):
        gk.unmerge(model)
    model.blocks[1].attn.q_proj.merge()
    with pytest.raises(RuntimeError, match=r"'blocks\.1\.attn\.q_proj' is merged already"):
        gk.merge(model)
    assert not model.embed.merged


def test_a_model_without_layers_is_an_error(vit):
    for act in (gk.merge, gk.unmerge, lambda model: gk.disabled(model).__enter__()):
        with pytest.raises(ValueError, match="no GLoRA layer"):
            act(vit())
        with pytest.raises(TypeError, match=r"nn\.Module"):
            act("model")


class Tied(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
        if kind == "object":
            self.out.weight = self.embed.weight
        elif kind == "memory":
            self.out.weight = nn.Parameter(self.embed.weight.data)
        else:
            self.other = nn.Linear(4, 5)
            self.other.bias = self.out.bias


@pytest.mark.parametrize("kind", ["object", "memory", "bias"])
def test_a_tied_weight_may_be_adapted_but_not_merged(kind):
    model = gk.inject(Tied(kind), GLoRAConfig(E="vector", rank=2), target_modules=["out"])
    before = model.embed.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'out' is shared by \[.*(embed|other)"):
        gk.merge(model)
    assert not model.out.merged
    assert torch.equal(model.embed.weight, before)


def test_a_tied_bias_that_merging_leaves_alone_is_fine():
    model = gk.inject(Tied("bias"), GLoRAConfig.lora(2), target_modules=["out"])
    gk.merge(model)
    assert model.out.merged


@pytest.mark.parametrize("rows", [slice(0, 4), slice(2, 6)])
def test_a_view_of_another_weight_is_tied_and_columns_beside_it_are_not(rows):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 4), nn.Linear(2, 6), nn.Linear(2, 6))
    model[1].weight = nn.Parameter(model[0].weight.data[rows])
    columns = torch.randn(6, 4)
    model[2].weight, model[3].weight = (nn.Parameter(columns[:, half : half + 2]) for half in (0, 2))
    gk.inject(model, GLoRAConfig(rank=2), target_modules=["1", "2", "3"])
    with pytest.raises(ValueError, match=r"weight of '1' is shared by \['0\.weight', '1\.weight'\]"):
        gk.merge(model)
    model[1] = nn.Identity()
    gk.merge(model)


def test_layers_on_one_weight_are_merged_one_at_a_time(full, randomize):
    linear = nn.Linear(5, 4)
    other = nn.Linear(5, 4)
    other.weight = nn.Parameter(linear.weight.data)
    left, right = (randomize(GLoRALinear.from_linear(module, full)) for module in (linear, other))
    before = bits(left)
    left.merge()
    with pytest.raises(RuntimeError, match="that of another layer, which is merged"):
        right.merge()
    left.unmerge()
    right.merge()
    right.unmerge()
    assert same(bits(left), before)


def test_a_layer_used_at_two_paths_is_merged_once(full, randomize):
    linear = nn.Linear(4, 4)
    model = randomize(gk.inject(nn.Sequential(linear, nn.ReLU(), linear), full)).eval()
    x = torch.randn(2, 4)
    expected = model(x)
    gk.merge(model)
    torch.testing.assert_close(model(x), expected)


# disabled


def test_disabled_is_the_base_model(vit, full, randomize):
    model = vit().eval()
    x = torch.randn(3, 4, 12)
    expected = model(x)
    randomize(gk.inject(model, full))
    adapted = model(x)
    assert not torch.allclose(adapted, expected, atol=1e-2)
    with gk.disabled(model):
        assert torch.equal(model(x), expected)
        with gk.disabled(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), adapted)


def test_disabled_conv1d_is_the_base_model(gpt2, full, randomize):
    model = gpt2()
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    randomize(gk.inject(model, full))
    with gk.disabled(model):
        torch.testing.assert_close(model(ids).logits, expected)


def test_disabled_survives_an_exception(vit, full, randomize):
    model = randomize(gk.inject(vit(), full)).eval()
    x = torch.randn(3, 4, 12)
    adapted = model(x)
    gk.merge(model)
    with pytest.raises(KeyError), gk.disabled(model), gk.disabled(model):
        raise KeyError
    assert all(layer.merged for layer in named_layers(model).values())
    gk.unmerge(model)
    assert torch.equal(model(x), adapted)


def test_disabled_unmerges_and_merges_again(vit, full, randomize):
    model = vit().eval()
    x = torch.randn(3, 4, 12)
    expected = model(x)
    randomize(gk.inject(model, full))
    model.blocks[0].attn.q_proj.merge()
    merged = model(x)
    with gk.disabled(model):
        assert torch.equal(model(x), expected)
        assert torch.equal(model.train()(x), vit().train()(x)), "the base can be run in training mode"
        with pytest.raises(RuntimeError, match="disabled"):
            model.embed.merge()
    model.eval()
    with torch.no_grad():  # the batch norm has seen a batch in training mode
        model.classifier[0].reset_running_stats()
    assert model.blocks[0].attn.q_proj.merged
    assert not model.embed.merged
    assert torch.equal(model(x), merged)


def test_a_copy_made_while_disabled_is_not_disabled():
    layer = gk.GLoRALinear(6, 5, gk.GLoRAConfig("vector", "none", "none", "none", "none"))
    with torch.no_grad():
        layer.A.fill_(0.5)
    x = torch.randn(3, 6)
    with gk.disabled(layer):
        assert "disabled" in repr(layer)
        copied, base = copy.deepcopy(layer), layer(x)
    assert "disabled" not in repr(copied)
    assert torch.equal(copied(x), layer(x))
    assert not torch.equal(copied(x), base)
