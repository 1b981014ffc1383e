"""Against the LyCORIS package itself, in float64: trained there, continued here and there, saved by either."""

import copy

import pytest
import torch
from foreign import TARGET, X, adapted, changed, near, net, steps
from lycoris_runs import ENDINGS, adam, continued, loaded_there, trained, twin, under

import glora_kernels as gk
from glora_kernels import GLoRAConfig


def theirs(lycoris, algo, **options):
    return under(lycoris, net(), algo, **options)


@pytest.mark.parametrize("algo", ENDINGS)
@pytest.mark.parametrize("bypass_mode", [False, True])
def test_a_run_continues_with_the_same_steps(lycoris, tmp_path, algo, bypass_mode):
    there = theirs(lycoris, algo, bypass_mode=bypass_mode)
    ours, back = continued(*there, algo, net(), steps, X, near, tmp_path)
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
    near(loaded_there(lycoris, path, net())(X), ours(X))


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
