"""What the tests of siblings share: layers on one input, their results, and what their group calls and keeps."""

import pytest
import torch
from torch import nn

from glora_kernels import GLoRAConfig, GLoRALinear, reference
from glora_kernels.nn import siblings
from glora_kernels.reference.tolerance import allowed_error, largest_error

LORA = GLoRAConfig.lora(rank=3, alpha=6)
RICH = GLoRAConfig("none", "lora", "lora", "vector", "constant", rank=2)
DROPS = GLoRAConfig.lora(rank=3, dropout=0.5)


@pytest.fixture
def calls(monkeypatch):
    """The number of members of every grouped call."""
    found = []
    grouped = siblings.grouped_call

    def counted(flat, layout, scales, dropout_p):
        found.append(len(scales))
        return grouped(flat, layout, scales, dropout_p)

    monkeypatch.setattr(siblings, "grouped_call", counted)
    return found


@pytest.fixture
def seeds(monkeypatch):
    """Every key of a dropout mask that is drawn, by a group or by a layer alone."""
    found = []
    draw = siblings.dropout_seed

    def drawn(device):
        found.append(draw(device))
        return found[-1]

    monkeypatch.setattr(siblings, "dropout_seed", drawn)
    monkeypatch.setattr("glora_kernels.nn.adapted.dropout_seed", drawn)
    return found


@pytest.fixture
def brood(randomize):
    """A function that builds layers on one input, with 7, 8, ... outputs, the first two in the layout of a Conv1D."""

    def build(configs, dtype=torch.float64, k=12, tied=False):
        layers = nn.ModuleDict()
        for i, config in enumerate(configs):
            layers[f"layer{i}"] = layer = GLoRALinear(k, 7 + i, config, bias=i != 1, dtype=dtype)
            if i < 2:
                layer.weight.data, layer._transposed = layer.weight.data.t().contiguous(), True
        randomize(layers)
        if tied:
            for layer in layers.values():
                layer.B_down = layers["layer0"].B_down
        return layers

    return build


def group_of(layers):
    return next(iter(layers.values()))._siblings


def waiting(layers):
    """Whether the group of the layers keeps anything for a later call."""
    group = group_of(layers)
    stores = (group._outputs, group._seeds, group._traced_outputs, group._traced_seeds)
    return any(store.pending is not None for store in stores)


def outputs(layers, x):
    return [layer(x) for layer in layers.values()]


def step(layers, x, dys, keeps=None):
    """Every output and gradient of the layers on one x, by themselves (or by the reference, with given masks)."""
    x = x.detach().clone().requires_grad_()
    if keeps is None:
        ys, leaves = outputs(layers, x), [layer.adapter() for layer in layers.values()]
    else:
        ys, leaves = [], []
        for layer, keep in zip(layers.values(), keeps, strict=True):
            leaves.append({name: p.detach().clone().requires_grad_() for name, p in layer.adapter().items()})
            weight = layer.weight.t() if layer._transposed else layer.weight
            ys.append(reference.glora_linear(x, weight, layer.bias, leaves[-1], layer.config, keep))
    wanted = [x, *{id(p): p for own in leaves for p in own.values()}.values()]
    grads = torch.autograd.grad(ys, wanted, dys)
    by_id = {id(p): grad for p, grad in zip(wanted, grads, strict=True)}
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"dx": by_id[id(x)]}
    return found | {f"{name}{i}": by_id[id(p)] for i, own in enumerate(leaves) for name, p in own.items()}


def agree(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert largest_error(got[name], value) <= allowed_error(value, value, torch.float64), name


def masks(seeds, rows=6, k=12):
    return [reference.keep_mask(seed, rows, k, 0.5) for seed in seeds]
