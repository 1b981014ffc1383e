"""GroupedLoRALinear: several layers on one input as one module."""

import copy
import pickle

import pytest
import torch
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, reference
from glora_kernels.nn import siblings
from glora_kernels.nn.grouped import GroupedLoRALinear
from glora_kernels.nn.model import named_layers
from glora_kernels.reference.tolerance import allowed_error, largest_error

LORA = GLoRAConfig.lora(rank=3, alpha=6)
RICH = GLoRAConfig("none", "lora", "lora", "vector", "constant", rank=2, alpha=4, dropout=0.5)


def linears(k=9):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, k)
    nn.init.normal_(conv1d.bias)
    return [linear.double() for linear in (nn.Linear(k, 7), nn.Linear(k, 5, bias=False), conv1d)]


@pytest.mark.parametrize("tied", [False, True])
def test_values_and_gradients_are_those_of_the_reference_in_one_call(tied, randomize, monkeypatch):
    seeds, calls = [], []
    draw, grouped_call = siblings.dropout_seed, siblings.grouped_call
    monkeypatch.setattr(siblings, "dropout_seed", lambda device: seeds.append(draw(device)) or seeds[-1])
    monkeypatch.setattr(siblings, "grouped_call", lambda *a: calls.append(1) or grouped_call(*a))
    layer = randomize(GroupedLoRALinear.from_linears(linears(), RICH, tied=tied))
    x = torch.randn(2, 4, 9).double().requires_grad_()
    ys = layer(x)
    assert len(calls) == 1
    assert len({int(seed) for seed in seeds}) == len(seeds) == (1 if tied else 3)
    keeps = [reference.keep_mask(seed, 8, 9, 0.5).view(x.shape) for seed in (seeds * 3 if tied else seeds)]
    leaves, truths = {}, []
    for member, keep in zip(layer.members, keeps, strict=True):
        own = {name: leaves.setdefault(p, p.detach().clone().requires_grad_()) for name, p in member.adapter().items()}
        weight = member.weight.t() if member._transposed else member.weight
        truths.append(reference.glora_linear(x, weight, member.bias, own, RICH, keep))
    dys = [torch.randn_like(y) for y in truths]
    expected = torch.autograd.grad(truths, [x, *leaves.values()], dys)
    got = torch.autograd.grad(ys, [x, *leaves], dys)
    assert len(leaves) == 6 + 6 + 2 + 3 - 2 * tied, "of B, C, D (on a bias only) and E; two B_down less where tied"
    for ours, truth in zip((*ys, *got), (*(y.detach() for y in truths), *expected), strict=True):
        assert largest_error(ours, truth) <= allowed_error(truth, truth, torch.float64)


def test_a_fresh_one_equals_its_bases_and_keeps_their_parameters():
    bases = linears()
    x = torch.randn(3, 9).double()
    expected = [base(x) for base in bases]
    weights = [base.weight for base in bases]
    layer = GroupedLoRALinear.from_linears([base.eval() for base in bases], RICH)
    assert not layer.training
    for y, truth in zip(layer(x), expected, strict=True):
        torch.testing.assert_close(y, truth)
    assert all(member.weight is weight for member, weight in zip(layer.members, weights, strict=True))
    assert not any(weight.requires_grad for weight in weights)


@pytest.mark.parametrize("tied", [False, True])
def test_the_tools_for_models_see_its_members(tied, randomize, tmp_path):
    torch.manual_seed(1)
    layer = randomize(GroupedLoRALinear(8, [4, 4, 6], LORA, bias=False, tied=tied))
    downs = 1 if tied else 3
    assert gk.trainable_parameters(layer) == 3 * 8 * downs + 3 * (4 + 4 + 6)
    assert list(named_layers(layer)) == ["members.0", "members.1", "members.2"]
    assert {name.partition(".")[0] for name in layer.state_dict()} == {"members"}
    x = torch.randn(2, 8)
    expected = layer(x)
    bases = [member.weight @ x.t() for member in layer.members]
    with gk.disabled(layer):
        for y, base in zip(layer(x), bases, strict=True):
            torch.testing.assert_close(y, base.t())
    gk.merge(layer.eval())
    for y, truth in zip(layer(x), expected, strict=True):
        torch.testing.assert_close(y, truth)
    gk.unmerge(layer)
    gk.save_adapter(layer, tmp_path / "a.safetensors")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert len({id(member.B_down) for member in other.members}) == downs
        randomize(other, seed=1)
        gk.load_adapter(other, tmp_path / "a.safetensors")
        for y, truth in zip(other(x), expected, strict=True):
            assert torch.equal(y, truth)


def test_it_trains_inside_a_model_with_one_tied_parameter(randomize):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = GroupedLoRALinear(8, [8, 8, 8], GLoRAConfig.lora(rank=2), tied=True)

        def forward(self, x):
            q, k, v = self.qkv(x)
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    model = Attention()
    model.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    x, target = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    losses = []
    for _ in range(10):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert len({id(member.B_down) for member in model.qkv.members}) == 1
    assert len(optimizer.param_groups[0]["params"]) == 4
    untied = {name: value.clone() for name, value in model.state_dict().items()}
    untied["qkv.members.1.B_down"].add_(1)
    with pytest.raises(RuntimeError, match="one shared parameter"):
        model.load_state_dict(untied)


BAD = {
    "one": (lambda: GroupedLoRALinear(8, [4], LORA), ValueError, "2 to 64 members, got 1"),
    "A": (lambda: GroupedLoRALinear(8, [4, 4], GLoRAConfig()), ValueError, "'members.0' has A='vector'"),
    "tied": (lambda: GroupedLoRALinear(8, [4, 4], GLoRAConfig("none", "none"), tied=True), ValueError, "got B='none'"),
    "size": (lambda: GroupedLoRALinear(8, [4, 0], LORA), ValueError, "out_features"),
    "one size": (lambda: GroupedLoRALinear(8, 4, LORA), TypeError, "out_features must be a sequence.* got 4"),
    "config": (lambda: GroupedLoRALinear(8, [4, 4], "lora"), TypeError, "got str"),
}


@pytest.mark.parametrize(("build", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(build, error, match):
    with pytest.raises(error, match=match):
        build()


@pytest.mark.parametrize(
    ("last", "config", "error", "match"),
    [
        (nn.Linear(8, 3), LORA, ValueError, "in_features differs: 9 of 'members.0', 9 of 'members.1', 8"),
        (nn.Linear(9, 3), GLoRAConfig(), ValueError, "A='vector'"),
        (nn.LayerNorm(9), LORA, TypeError, "LayerNorm"),
        (nn.Linear(9, 3, dtype=torch.float32), LORA, ValueError, "dtype differs"),
    ],
)
def test_refused_linears_are_left_as_they_were(last, config, error, match):
    bases = [*linears()[:2], last if error is TypeError or "dtype" in match else last.double()]
    with pytest.raises(error, match=match):
        GroupedLoRALinear.from_linears(bases, config)
    assert all(parameter.requires_grad for base in bases for parameter in base.parameters())
