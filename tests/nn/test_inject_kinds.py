"""Layers that injection refuses since a replaced one would do nothing, and wrappers of models that it sees through."""

import pytest
import torch
from injected import BODY, CFG, paths, refused
from torch import nn

import glora_kernels as gk


class MyAttention(nn.MultiheadAttention):
    pass


class MyEncoderLayer(nn.TransformerEncoderLayer):
    pass


@pytest.mark.filterwarnings("ignore:inject")
@pytest.mark.parametrize("kind", [nn.MultiheadAttention, MyAttention])
def test_multihead_attention_is_refused_and_can_be_excluded(kind):
    def build():
        return nn.ModuleDict({"attn": kind(8, 2), "mlp": nn.Linear(8, 8)})

    match = r"'attn\.out_proj' .* cannot be replaced: MultiheadAttention\.forward .*exclude_modules=\['out_proj'\]"
    refused(build(), CFG, match=match)
    refused(build(), CFG, ["out_proj"], match=match)
    assert paths(gk.inject(build(), CFG, ["mlp"])) == {"mlp"}
    assert paths(gk.inject(build(), {"out_proj": None, "*": CFG})) == {"mlp"}
    assert paths(gk.inject(build(), CFG, exclude_modules=["out_proj"])) == {"mlp"}


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, MyEncoderLayer])
def test_transformer_encoder_layers_are_refused(kind):
    model = nn.Sequential(kind(8, 2, 16), nn.Linear(8, 8))
    refused(model, CFG, ["linear1", "1"], match=r"'0\.linear1'.*TransformerEncoderLayer\.forward")
    refused(
        model, CFG, match=r"3 of 4 layers cannot be replaced(.|\n)*exclude_modules=\['linear1', 'linear2', 'out_proj'\]"
    )
    assert paths(gk.inject(model, CFG, ["1"])) == {"1"}


def test_a_transformer_decoder_layer_calls_its_linear_layers(randomize):
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0).eval()
    x, memory = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    expected = layer(x, memory)
    gk.inject(layer, CFG, ["linear1", "linear2"])
    torch.testing.assert_close(layer(x, memory), expected)
    randomize(layer)
    assert not torch.allclose(layer(x, memory), expected, atol=1e-2)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_unsupported_linear_layers_are_refused_by_path():
    model = nn.Sequential(nn.Linear(4, 4), Doubled(4, 4))
    refused(
        model, CFG, match=r"'1' \(Doubled\) cannot be replaced: its forward.*exclude_modules=\['1'\].*target_modules"
    )
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *args: None)
    refused(hooked, CFG, match="hooks")
    refused(nn.Sequential(nn.LazyLinear(4)), CFG, match="sizes")
    refused(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), CFG, match="parametrized")
    assert paths(gk.inject(model, {"1": None, "*": CFG})) == {"0"}


def test_bitsandbytes_layers_are_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(8, 8))
    refused(model, CFG, match="Linear4bit")


def test_a_meta_model_is_injected_on_meta(vit):
    with torch.device("meta"):
        model = vit()
    gk.inject(model, CFG)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_injected_through_its_wrapper(vit, randomize):
    torch._dynamo.reset()
    model = vit().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4, 12)
    expected = compiled(x)
    assert gk.inject(compiled, CFG) is compiled
    assert paths(model) == BODY
    torch.testing.assert_close(compiled(x), expected)
    randomize(model)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), expected, atol=1e-2)


def test_compiled_submodules_have_clean_paths(vit):
    model = vit()
    model.blocks[0].attn = torch.compile(model.blocks[0].attn, backend="eager")
    gk.inject(model, CFG, ["blocks.0.attn.q_proj"])
    assert paths(model) == {"blocks.0.attn.q_proj"}
    model = vit()
    model.embed = torch.compile(model.embed, backend="eager")
    refused(model, CFG, ["embed"], match="torch.compile")
    refused(torch.compile(nn.Linear(3, 3)), CFG, match="inject first")


def test_distributed_data_parallel_must_come_after(vit, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(vit())
        refused(wrapped, CFG, match="DistributedDataParallel")
        wrapped = nn.parallel.DistributedDataParallel(gk.inject(vit(), CFG))
        gk.merge(wrapped)
        gk.unmerge(wrapped)
        gk.save_adapter(wrapped, tmp_path / "a.safetensors")
        del wrapped  # before the group, which its last owner could wait for with Python's lock
    finally:
        torch.distributed.destroy_process_group()
    model = gk.load_adapter(vit(), tmp_path / "a.safetensors")
    assert paths(model) == BODY


def test_a_peft_model_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"PEFT layers.*merge_and_unload"):
        gk.inject(model, gk.GLoRAConfig(rank=2))
