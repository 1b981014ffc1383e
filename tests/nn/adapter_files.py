"""What the tests of adapter files share: an adapted model and its file, and loads that fail and change nothing."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import glora_kernels as gk
from glora_kernels import GLoRAConfig

CFG = GLoRAConfig(C="vector", rank=2)
OTHER = GLoRAConfig.lora(rank=3, alpha=6, dropout=0.25)


@pytest.fixture
def trained(vit, randomize):
    """A classifier with two configurations and a head trained whole, every value away from its start."""
    model = randomize(gk.inject(vit(), {"blocks.0.*": CFG, "*.mlp.*": None, "*": OTHER}, train=["classifier"]))
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_()
        model(torch.randn(6, 4, 12))  # the batch norm's running statistics move
    return model.eval()


@pytest.fixture
def saved(trained, tmp_path):
    path = tmp_path / "a.safetensors"
    gk.save_adapter(trained, path)
    return path


def contents(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def assert_same(left, right):
    """Two files with the same contents; their metadata has no order, so the bytes may differ."""
    (tensors, metadata), (others, other_metadata) = contents(left), contents(right)
    assert metadata == other_metadata, "which includes the digest of every tensor"
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(path, type(m), id(m)) for path, m in model.named_modules()]
    return state, modules, [(name, p.requires_grad) for name, p in model.named_parameters()]


def refused(model, path, match, error=ValueError):
    """Loading fails with a message that matches, and nothing has changed."""
    state, *rest = snapshot(model)
    with pytest.raises(error, match=match):
        gk.load_adapter(model, path)
    after, *rest_after = snapshot(model)
    assert rest == rest_after
    assert state.keys() == after.keys()
    for name, value in state.items():
        assert value.is_meta or torch.equal(value, after[name]), name


def leftovers(directory):
    return sorted(p.name for p in directory.iterdir())
