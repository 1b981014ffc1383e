"""Against the LyCORIS package itself, in float64: trained there, continued here and there, saved by either."""

import copy
import functools

import pytest
import torch
from foreign import TARGET, X, adapted, changed, near, net, steps
from safetensors.torch import load_file

import glora_kernels as gk
from glora_kernels import GLoRAConfig

ENDINGS = {
    "glora": {"A_up": "a1.weight", "A_down": "a2.weight", "B_up": "b1.weight", "B_down": "b2.weight"},
    "locon": {"B_up": "lora_up.weight", "B_down": "lora_down.weight"},
}


@pytest.fixture(scope="module")
def lycoris():
    """The package; importing it takes seconds, which collecting the tests must not."""
    return pytest.importorskip("lycoris", reason="it is in the extra 'test'")


def theirs(lycoris, algo, **options):
    """A model under LyCORIS, with alpha/rank = 2/4."""
    model = net()
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


adam = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("algo", ENDINGS)
@pytest.mark.parametrize("bypass_mode", [False, True])
def test_a_run_continues_with_the_same_steps(lycoris, tmp_path, algo, bypass_mode):
    path, back = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    model, network = theirs(lycoris, algo, bypass_mode=bypass_mode)
    optimizer = adam(network.parameters())
    steps(model, optimizer)
    network.save_weights(path, None, {})
    ours = gk.load_adapter(net(), path, rs_lora=False)
    near(ours(X), model(X))
    mine = adam(trained(ours).values())
    for name, parameter in trained(ours).items():
        state = optimizer.state[twin(name, network, ENDINGS[algo])]
        mine.state[parameter] = {key: value.clone() for key, value in state.items()}
    steps(model, optimizer)
    steps(ours, mine)
    near(ours(X), model(X))
    for name, parameter in trained(ours).items():
        near(parameter, twin(name, network, ENDINGS[algo]))
    gk.save_adapter(ours, back, format="lycoris")
    network.save_weights(path, None, {})
    assert load_file(back).keys() == load_file(path).keys()
    for key, value in load_file(back).items():
        near(value.double(), load_file(path)[key].double())
    near(changed(back, net(), "lycoris_")[0](X), ours(X))


def test_a_scale_folded_into_a_factor_would_not_continue_so(lycoris, tmp_path):
    """Why there is alpha_A: the same layer and the same gradients, up to s, but other steps."""
    path = tmp_path / "theirs.safetensors"
    model, network = theirs(lycoris, "glora")
    network.save_weights(path, None, {})
    ours = gk.load_adapter(net(), path, rs_lora=False)
    folded = gk.inject(net(), GLoRAConfig("lora", "lora", rank=4, alpha=2, variant="matmul"))
    with torch.no_grad():
        for name, parameter in trained(gk.load_adapter(net(), path, rs_lora=False)).items():
            folded.get_parameter(name).copy_(parameter * (0.5 if name.endswith("A_up") else 1.0))
    near(folded(X), model(X))
    near(ours(X), model(X))
    steps(model, adam(network.parameters()), 1)
    steps(ours, adam(trained(ours).values()), 1)
    steps(folded, adam(trained(folded).values()), 1)
    near(ours(X), model(X))
    assert (folded(X) - model(X)).abs().max() > 1e-3


@pytest.mark.parametrize("algo", ENDINGS)
def test_their_package_reads_what_is_saved_here(lycoris, tmp_path, algo):
    path = tmp_path / "a.safetensors"
    glora = GLoRAConfig("lora", "lora", rank=4, alpha=2, variant="matmul", alpha_A=8)
    ours = adapted(glora if algo == "glora" else GLoRAConfig.lora(4, 2))  # another scale of A goes into a1
    gk.save_adapter(ours, path, format="lycoris")
    model = net()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
    for module in network.loras:  # a plain list there, made in fp32
        module.double()
    network.apply_to()
    near(model(X), ours(X))


@pytest.mark.parametrize("rs_lora", [False, True])
def test_rs_lora_and_use_scalar(lycoris, tmp_path, rs_lora):
    """The file of a training with rs_lora has the same alpha; use_scalar is in its factors."""
    path = tmp_path / "theirs.safetensors"
    model, network = theirs(lycoris, "glora", use_scalar=True)
    for module in network.loras:  # the wrapper does not pass rs_lora on
        module.rs_lora, module.scale = rs_lora, 2.0 / (4**0.5 if rs_lora else 4)
    network.save_weights(path, None, {})
    near(gk.load_adapter(net(), path, rs_lora=rs_lora)(X), model(X))
    assert (gk.load_adapter(net(), path, rs_lora=not rs_lora)(X) - model(X)).abs().max() > 1e-3


def test_dora_of_theirs_is_refused_by_name(lycoris, tmp_path):
    path = tmp_path / "theirs.safetensors"
    _, network = theirs(lycoris, "locon", dora_wd=True)
    network.save_weights(path, None, {})
    with pytest.raises(ValueError, match="has 'dora_scale', DoRA's magnitudes"):
        gk.load_adapter(net(), path, rs_lora=False)


def test_trained_in_16_bits(lycoris, tmp_path):
    """fp16 files over an fp32 base: the numbers as they are, in the dtype of the base."""
    path = tmp_path / "theirs.safetensors"
    _, network = theirs(lycoris, "glora")
    network.save_weights(path, torch.float16, {})
    ours = gk.load_adapter(net().float(), path, rs_lora=False)
    for name, parameter in trained(ours).items():
        stored = twin(name, network, ENDINGS["glora"]).half()
        assert torch.equal(parameter, stored.float())
    assert copy.deepcopy(ours)(X.float()).shape == TARGET.shape
