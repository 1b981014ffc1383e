"""A file holds a shared factor once and ties it again; one that shares otherwise is refused."""

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from sharing import NAMES, untied
from torch import nn

import glora_kernels as gk
from glora_kernels import ShareLoRAConfig
from glora_kernels.nn.model import named_layers


@pytest.mark.parametrize("share", ["A", "B", "AB"])
def test_a_file_holds_a_shared_factor_once_and_ties_it_again(share, vit, randomize, tmp_path):
    config = ShareLoRAConfig(rank=2, alpha=4, share=share, projections=["*_proj", "*.mlp.*"], D="vector")
    model = randomize(gk.inject(vit(), config)).eval()
    gk.save_adapter(model, tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == gk.trainable_parameters(model)
    x = torch.randn(3, 4, 12)
    for other in (vit(), gk.inject(vit(), config)):
        gk.load_adapter(other, tmp_path / "a.safetensors")
        assert gk.shared(other) == gk.shared(model)
        assert gk.trainable_parameters(other) == gk.trainable_parameters(model)
        assert torch.equal(other.eval()(x), model(x))
        with pytest.raises(RuntimeError, match="one shared parameter"):
            other.load_state_dict(untied(model))


def test_files_keep_the_dtypes_over_a_16_bit_base(vit, randomize, tmp_path):
    config = ShareLoRAConfig(rank=2, projections=["q_proj"], A="lora", D="vector")
    for dtype, down in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        model = randomize(gk.inject(vit().bfloat16(), config, ["q_proj", "v_proj"], adapter_dtype=dtype))
        gk.save_adapter(model, tmp_path / "a.safetensors")
        other = named_layers(gk.load_adapter(vit().bfloat16(), tmp_path / "a.safetensors"))
        for path, layer in named_layers(model).items():
            assert (layer.B_down.dtype, layer.B_up.dtype) == (down, down)
            for name, parameter in layer.adapter().items():
                assert other[path].adapter()[name].dtype == parameter.dtype, (path, name)
                assert torch.equal(other[path].adapter()[name], parameter)


def test_a_file_that_shares_otherwise_is_refused(vit, tmp_path):
    files = {}
    for share in NAMES:
        files[share] = tmp_path / f"{share}.safetensors"
        gk.save_adapter(gk.inject(vit(), ShareLoRAConfig(rank=2, share=share), ["q_proj"]), files[share])
    names = {"none": "nothing", "A": "B_down", "B": "B_up", "AB": "B_down and B_up"}
    for share in NAMES:
        model = gk.inject(vit(), ShareLoRAConfig(rank=2, share=share), ["q_proj"])
        for other in set(NAMES) - {share}:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            match = (
                rf"shares 'blocks\.1\.attn\.q_proj\.B_.*' with 'blocks\.0\.attn.*the file shares {names[other]} of its "
                f"layers, the model {names[share]}, and one value cannot stand for several"
            )
            with pytest.raises(ValueError, match=match):
                gk.load_adapter(model, files[other])
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    both = gk.inject(vit(), ShareLoRAConfig(rank=2, projections=["blocks.0.*"]), ["q_proj"])
    with pytest.raises(ValueError, match=r"the file shares 'blocks\.1.*the model does not"):
        gk.load_adapter(both, files["A"])


def test_a_file_ties_layers_of_two_dtypes(vit, tmp_path):
    gk.save_adapter(gk.inject(vit(), ShareLoRAConfig(rank=2), ["blocks.*.q_proj"]), tmp_path / "a.safetensors")
    model = vit()
    model.blocks[1].attn.q_proj = nn.Linear(16, 16, dtype=torch.float16)
    gk.load_adapter(model, tmp_path / "a.safetensors")
    assert model.blocks[1].attn.q_proj.B_down is model.blocks[0].attn.q_proj.B_down
    assert model.blocks[1].attn.q_proj.B_down.dtype == torch.float32


def test_safetensors_loads_what_it_saved_of_a_shared_model(vit, randomize, tmp_path):
    source = randomize(gk.inject(vit(), ShareLoRAConfig(rank=2, share="AB")))
    save_model(source, str(tmp_path / "a.safetensors"))
    assert len(load_file(tmp_path / "a.safetensors")) == len(dict(source.named_parameters())) + 3  # of the batch norm
    model = gk.inject(vit(), ShareLoRAConfig(rank=2, share="AB"))
    assert load_model(model, tmp_path / "a.safetensors") == (set(), [])
    assert gk.shared(model) == gk.shared(source)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
