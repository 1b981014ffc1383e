"""Modules that are trained whole (`train=`), and the dtypes in which they and the adapters are trained."""

import copy

import pytest
import torch
from injected import CFG, LINEARS, OTHER, paths, refused
from torch import nn

import glora_kernels as gk
from glora_kernels import ShareLoRAConfig


def test_trained_modules_require_gradients_and_are_no_targets(vit):
    model = gk.inject(vit(), CFG, train=["classifier"])
    assert paths(model) == LINEARS - {"classifier.1"}
    assert all(p.requires_grad for p in model.classifier.parameters())
    assert not model.blocks[0].ln.weight.requires_grad
    model = gk.inject(vit(), CFG, target_modules=["*_proj"], train=["ln", "blocks.1.mlp"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.count("_proj.")}
    assert trained == {f"blocks.{i}.ln.{n}" for i in range(2) for n in ("weight", "bias")} | {
        f"blocks.1.mlp.{j}.{n}" for j in (0, 2) for n in ("weight", "bias")
    }


def test_a_wildcard_target_leaves_trained_modules_alone(vit):
    model = gk.inject(vit(), CFG, target_modules=["*"], train="classifier")
    assert paths(model) == LINEARS - {"classifier.1"}


def test_targets_inside_trained_modules_are_refused(vit):
    match = r"'classifier\.1' names 'classifier\.1'.*'classifier'"
    refused(vit(), CFG, ["classifier.1", "q_proj"], ["classifier"], match=match)
    refused(
        vit(),
        CFG,
        ["q_proj", "classifier.*"],
        ["classifier"],
        match=r"'classifier\.\*' names 'classifier\.1'",
    )


def test_train_that_leaves_nothing_to_adapt_is_refused(vit):
    refused(vit(), CFG, train=["*"], match="no linear layer is left to adapt")


def test_a_trained_module_tied_to_a_target_is_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["embed"].weight
    refused(model, CFG, train=["embed"], match=r"weight of 'out' is shared with 'embed'")


def dtypes(model):
    return {p.dtype for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [CFG, ShareLoRAConfig(rank=2)])
def test_what_is_trained_in_a_16_bit_model_is_fp32(vit, dtype, config):
    x = torch.randn(3, 4, 12).to(dtype)
    expected = vit().to(dtype)(x)
    model = gk.inject(vit().to(dtype), config, ["*_proj"], train=["classifier", "ln"])
    assert dtypes(model) == {torch.float32}
    assert model.embed.weight.dtype == dtype
    y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert copy.deepcopy(model).float()(x.float()).dtype == torch.float32
    assert dtypes(gk.inject(vit().to(dtype), config, ["*_proj"], "ln", adapter_dtype=dtype)) == {dtype}
    assert dtypes(gk.inject(vit().double(), config, ["*_proj"], "ln")) == {torch.float64}
    assert dtypes(gk.inject(vit(), config, ["*_proj"], "ln")) == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train", [["lm_head"], ["embed_tokens", "norm"], ["embed_tokens", "lm_head"], ["mlp"]])
def test_a_16_bit_llama_trains_fp32_modules_without_autocast(llama, train, tied, tmp_path):
    ids = torch.arange(8)[None]
    model = gk.inject(llama(tied).bfloat16(), OTHER, ["q_proj"], train)
    logits = model(ids).logits
    assert torch.equal(logits, llama(tied).bfloat16()(ids).logits) or train != ["lm_head"]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # What is tied to a module that is not trained stays as that is.
    alone = tied and len({"embed_tokens", "lm_head"} & set(train)) == 1
    assert dtypes(model) == {torch.float32} | ({torch.bfloat16} if alone else set())
    gk.save_adapter(model, tmp_path / "a.safetensors")
    loaded = gk.load_adapter(llama(tied).bfloat16(), tmp_path / "a.safetensors")
    assert dtypes(loaded) == dtypes(model)
    assert torch.equal(loaded(ids).logits, logits)


def test_a_trained_module_with_no_place_for_a_cast_keeps_its_dtype():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16)).bfloat16()
    gk.inject(model, CFG, ["0"], train=["1"])
    assert {p.dtype for p in model[1].parameters()} == {torch.bfloat16}
    assert model(torch.randn(3, 1, 8).bfloat16()).dtype == torch.bfloat16
