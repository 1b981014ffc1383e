"""A run under the LyCORIS package, continued here and there: what its tests of linear layers and convolutions share."""

import functools

import pytest
import torch
from safetensors.torch import load_file

import glora_kernels as gk

ENDINGS = {
    "glora": {"A_up": "a1.weight", "A_down": "a2.weight", "B_up": "b1.weight", "B_down": "b2.weight"},
    "locon": {"B_up": "lora_up.weight", "B_down": "lora_down.weight"},
}
adam = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


@pytest.fixture(scope="module")
def lycoris():
    """The package; importing it takes seconds, which collecting the tests must not."""
    return pytest.importorskip("lycoris", reason="it is in the extra 'test'")


def under(lycoris, model, algo, **options):
    """A model under LyCORIS, with alpha/rank = 2/4."""
    lycoris.LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
    network = lycoris.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2.0, algo=algo, **options)
    network.apply_to()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():  # away from zero: at the start a wrong scale of a1 has no gradient
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model, network.double()


def twin(name, network, endings):
    """The parameter there of a parameter here."""
    path, _, own = name.rpartition(".")
    return dict(network.named_parameters())[f"lycoris_{path.replace('.', '_')}.{endings[own]}"]


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def continued(model, network, algo, base, steps, x, near, folder):
    """A run there is saved, loaded here with its moments, and goes on in both with the same steps; saved by both.

    base: the plain model. steps: trains a model with an optimizer. near: compares. Returns the model here and its file.
    """
    path, back = folder / "theirs.safetensors", folder / "ours.safetensors"
    optimizer = adam(network.parameters())
    steps(model, optimizer)
    network.save_weights(path, None, {})
    ours = gk.load_adapter(base, path, rs_lora=False)
    near(ours(x), model(x))
    mine = adam(trained(ours).values())
    for name, parameter in trained(ours).items():
        state = optimizer.state[twin(name, network, ENDINGS[algo])]
        flat = {key: value.reshape(parameter.shape) if value.ndim else value for key, value in state.items()}
        mine.state[parameter] = {key: value.clone() for key, value in flat.items()}
    steps(model, optimizer)
    steps(ours, mine)
    near(ours(x), model(x))
    for name, parameter in trained(ours).items():
        near(parameter, twin(name, network, ENDINGS[algo]).flatten(1))
    gk.save_adapter(ours, back, format="lycoris")
    network.save_weights(path, None, {})
    assert load_file(back).keys() == load_file(path).keys()
    for key, value in load_file(back).items():
        assert value.shape == load_file(path)[key].shape
        near(value.double(), load_file(path)[key].double())
    return ours, back


def loaded_there(lycoris, path, model):
    """A model with the adapters of a file, made by LyCORIS."""
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
    for module in network.loras:  # a plain list there, made in fp32
        module.double()
    network.apply_to()
    return model
