"""Finding siblings: the layers of known architectures that read one input, by their names."""

import pytest
import torch
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.nn.names import sibling_sets

LORA = GLoRAConfig.lora(rank=3, alpha=6)


def hugging_face(name, **sizes):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(**(sizes or small))
    with torch.device("meta"):
        return getattr(transformers, f"{name}{'LMHeadModel' if name in ('Bert', 'GPT2') else 'Model'}")(config)


BERT = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SETS = {
    "Llama": ({}, ["layers.0.self_attn: q_proj k_proj v_proj", "layers.0.mlp: gate_proj up_proj"]),
    "ViT": ({}, ["layers.0.attention: q_proj k_proj v_proj"]),
    "GPT2": ({"n_embd": 8, "n_layer": 1, "n_head": 2}, []),
    "Bert": (
        BERT | {"is_decoder": True, "add_cross_attention": True},
        [
            "bert.encoder.layer.0.attention.self: query key value",
            "bert.encoder.layer.0.crossattention.self: key value",
        ],
    ),
    "Bart": (
        BART | {"decoder_attention_heads": 2},
        [
            "encoder.layers.0.self_attn: q_proj k_proj v_proj",
            "decoder.layers.0.self_attn: q_proj k_proj v_proj",
            "decoder.layers.0.encoder_attn: k_proj v_proj",
        ],
    ),
    "T5": (
        {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu"},
        [
            "encoder.block.0.layer.0.SelfAttention: q k v",
            "encoder.block.0.layer.1.DenseReluDense: wi_0 wi_1",
            "decoder.block.0.layer.0.SelfAttention: q k v",
            "decoder.block.0.layer.1.EncDecAttention: k v",
            "decoder.block.0.layer.2.DenseReluDense: wi_0 wi_1",
        ],
    ),
}


def short(sets):
    """ "parent: names" of every set."""
    return [f"{paths[0].rpartition('.')[0]}: {' '.join(path.rpartition('.')[2] for path in paths)}" for paths in sets]


@pytest.mark.parametrize(("name", "sizes", "expected"), [(name, *SETS[name]) for name in SETS], ids=SETS.keys())
def test_siblings_of_known_architectures(name, sizes, expected):
    model = hugging_face(name, **sizes)
    assert sorted(short(sibling_sets(model))) == sorted(expected)
    if expected:
        gk.inject(model, LORA)
        assert sorted(short(sibling_sets(model))) == sorted(expected), "GLoRA layers are found as plain ones are"


def test_siblings_read_inputs_of_one_width_and_gated_layers_have_one_shape():
    other_width = nn.ModuleDict({"q": nn.Linear(8, 4), "k": nn.Linear(6, 4), "v": nn.Linear(6, 5)})
    assert short(sibling_sets(nn.ModuleDict({"attention": other_width}))) == ["attention: k v"]
    swiglu = nn.ModuleDict({"w1": nn.Linear(8, 12), "w2": nn.Linear(12, 8), "w3": nn.Linear(8, 12)})
    assert short(sibling_sets(nn.ModuleDict({"mlp": swiglu}))) == ["mlp: w1 w3"]
    chain = nn.ModuleDict({"w1": nn.Linear(8, 12), "w2": nn.Linear(8, 12), "w3": nn.Linear(12, 8)})
    assert sibling_sets(nn.ModuleDict({"mlp": chain})) == []
    deberta = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("value_proj", "key_proj", "query_proj")})
    assert short(sibling_sets(nn.ModuleDict({"self": deberta}))) == ["self: query_proj key_proj value_proj"]
    three = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")})
    three.is_cross_attention = True
    assert short(sibling_sets(nn.ModuleDict({"attention": three}))) == ["attention: key value"]
