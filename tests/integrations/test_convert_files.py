"""Files of other tools into checkpoints for PEFT and back: the same outputs in float64, or a reason."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.integrations.peft import GLoRAPeftConfig, convert_checkpoint

GLORA = GLoRAConfig("lora", "lora", rank=3, alpha=2, variant="matmul", alpha_A=2, init="kaiming")
X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mlp_in = nn.ModuleDict({"up": nn.Linear(6, 8), "down_1": nn.Linear(8, 6, bias=False)})
        self.double()

    def forward(self, x):
        return self.mlp_in["down_1"](torch.tanh(self.mlp_in["up"](x)))


def filled(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("second", [GLORA, GLoRAConfig.lora(5, 4)], ids=["one_form", "two_forms"])
def test_a_file_of_lycoris_for_peft_and_back(tmp_path, second):
    """Two forms become patterns of the configuration."""
    file, folder, back = tmp_path / "a.safetensors", tmp_path / "ours", tmp_path / "b.safetensors"
    model = filled(gk.inject(Net(), {"up": GLORA, "down_1": second}))
    gk.save_adapter(model, file, format="lycoris")
    convert_checkpoint(file, folder, model=Net().to("meta"))
    loaded = PeftModel.from_pretrained(Net(), folder)
    near(loaded(X), model(X))
    convert_checkpoint(folder, back, format="lycoris")
    assert load_file(file).keys() == load_file(back).keys()
    assert all(torch.equal(value, load_file(back)[key]) for key, value in load_file(file).items())


def test_a_file_of_ours_to_both(tmp_path):
    own, file, folder = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "ours"
    model = filled(gk.inject(Net(), GLoRAConfig.lora(3, 2)))
    gk.save_adapter(model, own)
    convert_checkpoint(own, file, format="kohya", prefix="lora_te_")
    assert "lora_te_mlp_in_down_1.lora_up.weight" in load_file(file)
    near(gk.load_adapter(Net(), file)(X), model(X))
    convert_checkpoint(own, folder)
    near(PeftModel.from_pretrained(Net(), folder)(X), model(X))


def test_what_cannot_be_converted_leaves_nothing(tmp_path):
    file, folder, target = tmp_path / "a.safetensors", tmp_path / "theirs", tmp_path / "target"
    gk.save_adapter(filled(gk.inject(Net(), GLORA)), file, format="lycoris")
    vector = get_peft_model(Net(), GLoRAPeftConfig(r=2, target_modules=["up"]))
    vector.save_pretrained(folder)
    for match, source, arguments in (
        ("give model=, the base model", file, {}),
        ("load a file of another tool by load_adapter", file, {"format": "kohya", "model": Net()}),
        ("is no layer of this model", file, {"model": nn.Sequential(nn.Linear(2, 2))}),
        (r"cannot hold 'mlp_in.up' with GLoRAConfig\(A='vector'", folder, {"format": "lycoris"}),
        ("model, prefix and rs_lora are for a file of another tool", folder, {"model": Net()}),
    ):
        with pytest.raises(ValueError, match=match):
            convert_checkpoint(source, target, **arguments)
        assert not target.exists()
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match="does not say whether LyCORIS trained it with rs_lora"):
        convert_checkpoint(file, target, model=Net())
    convert_checkpoint(file, target, model=Net(), rs_lora=False)
    with pytest.raises(FileExistsError, match="give a file that does not"):
        convert_checkpoint(target, file, format="lycoris")
    trained = gk.inject(Net(), GLORA, target_modules=["up"], train=["down_1"])
    gk.save_adapter(trained, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="modules trained whole"):
        convert_checkpoint(tmp_path / "c.safetensors", tmp_path / "d")


def test_scales_are_a_setting_of_the_method(tmp_path):
    """alpha_A in the configuration of PEFT: saved, loaded, summed up, and left out of what PEFT's GLoRA cannot say."""
    config = GLoRAPeftConfig(r=3, A="lora", B="lora", alpha_A=2, target_modules=["up", "down_1"])
    model = filled(get_peft_model(Net(), config))
    model.save_pretrained(tmp_path / "ours")
    near(PeftModel.from_pretrained(Net(), tmp_path / "ours")(X), model(X))
    with pytest.raises(ValueError, match="alpha_A=2 with r=3"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    y = model(X)
    model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    near(model(X), y)
    assert model.peft_config["sum"].alpha_A is None
    assert "alpha_A" not in GLoRAPeftConfig(target_modules=["up"]).to_dict()
