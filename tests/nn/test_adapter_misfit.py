"""A file that does not fit the model is refused with the difference, and the model stays as it was."""

import torch
from adapter_files import CFG, OTHER, refused
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig


def test_other_layers(vit, saved, trained):
    model = gk.inject(vit(), {"blocks.0.attn.*": CFG, "*": OTHER}, train=["classifier"])
    refused(model, saved, r"adapts the layers not \['blocks\.1\.mlp\.0'.*which the model has")
    model = gk.inject(vit(), {"blocks.0.attn.*": CFG, "*": OTHER}, ["*_proj"], train=["classifier"])
    refused(model, saved, r"adapts the layers .*'embed'.*which the model lacks")


def test_other_configurations(vit, saved):
    config = {"blocks.0.*": CFG, "*.mlp.*": None}
    model = gk.inject(vit(), config | {"*": GLoRAConfig.lora(4, 6)}, train=["classifier"])
    refused(model, saved, r"does not fit the layer 'embed': it has rank=3 \(the model: 4\)")
    model = gk.inject(vit(), config | {"*": GLoRAConfig.lora(3, 5)}, train=["classifier"])
    refused(
        model, saved, r"alpha=6 \(the model: 5\)\. Load it into the plain base model.*GLoRAConfig\(A='none', B='lora'"
    )


def test_other_trained_modules(vit, saved):
    config = {"blocks.0.*": CFG, "*.mlp.*": None, "classifier.*": None, "*": OTHER}
    refused(gk.inject(vit(), config), saved, r"trains the modules \['classifier'\], which the model lacks")
    model = gk.inject(vit(), config, train=["classifier", "ln"])
    refused(model, saved, r"trains the modules not \['blocks\.0\.ln', 'blocks\.1\.ln'\]")


def test_plain_models_that_do_not_fit(vit, saved):
    refused(vit(depth=1), saved, r"'blocks\.1\.attn\.._proj', where the model has no module")
    refused(vit(dim=8), saved, r"'blocks\.0\.attn\.k_proj'|out_features=16 \(the model: 8\)")
    refused(vit(classes=6), saved, r"'classifier\.1\.(weight|bias)' with shape .*5.*6")
    model = vit()
    model.blocks[0].attn.o_proj = nn.Linear(16, 16)
    refused(model, saved, r"'blocks\.0\.attn\.o_proj': it has bias=False \(the model: True\)")
    model = vit()
    model.embed = nn.LayerNorm(12)
    refused(model, saved, "'embed', where the model has a LayerNorm")
    model = vit()
    del model.classifier
    refused(model, saved, "trains the module 'classifier'")
    model = vit()
    model.classifier[0] = nn.BatchNorm1d(16, affine=False)
    refused(model, saved, r"holds the tensors \['classifier\.0\.bias'")
    model = vit()
    model.embed.register_forward_hook(lambda *args: None)
    refused(model, saved, "hooks")


def test_layers_that_the_model_shares_and_the_file_does_not(tmp_path):
    shared = nn.Linear(4, 4)
    gk.save_adapter(gk.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), CFG), tmp_path / "a.safetensors")
    refused(nn.Sequential(shared, shared), tmp_path / "a.safetensors", "'1', which in the model is one module with '0'")
    model = gk.inject(nn.Sequential(shared, shared), CFG)
    gk.save_adapter(model, tmp_path / "a.safetensors")
    linear = nn.Linear(4, 4)
    loaded = gk.load_adapter(nn.Sequential(linear, linear), tmp_path / "a.safetensors")
    assert loaded[0] is loaded[1]


def test_models_on_meta_are_refused(vit, saved):
    with torch.device("meta"):
        model = vit()
    refused(model, saved, "meta device")
    gk.inject(model, {"blocks.0.*": CFG, "*.mlp.*": None, "*": OTHER}, train=["classifier"])
    refused(model, saved, "meta device")
