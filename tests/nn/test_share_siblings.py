"""Siblings (`tie_siblings=True`): one down factor and one mask, also after a file."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sharing import groups, refused, transformer
from torch import nn

import glora_kernels as gk
from glora_kernels import ShareLoRAConfig
from glora_kernels.nn.file import Adapter
from glora_kernels.nn.model import named_layers


def test_tied_siblings_have_one_down_factor(llama):
    model = gk.inject(llama(), ShareLoRAConfig(rank=2, tie_siblings=True))
    attention = "model.layers.#.self_attn.{q_proj (16, 16), k_proj (8, 16), v_proj (8, 16)}"
    mlp = "model.layers.#.mlp.{gate_proj (24, 16), up_proj (24, 16)}"
    alone = {"model.layers.#.self_attn.o_proj (16, 16)": 2, "model.layers.#.mlp.down_proj (16, 24)": 2}
    assert groups(model) == {attention: 6, mlp: 4} | alone
    model = gk.inject(llama(), ShareLoRAConfig(rank=2, share="B", tie_siblings=True))
    downs = [(row.key, row.uses) for row in gk.shared(model).rows if row.factor == "B_down"]
    assert downs == [(attention, 3), (mlp, 2)] * 2, "a block each"
    assert [row.uses for row in gk.shared(model).rows if row.factor == "B_up"] == [2] * 7
    config = ShareLoRAConfig(rank=2, share="none", tie_siblings=True, projections=["k_proj", "v_proj"])
    rows = gk.shared(gk.inject(llama(), config)).rows
    assert [row.paths for row in rows] == [
        tuple(f"model.layers.{i}.self_attn.{name}_proj" for name in "kv") for i in range(2)
    ]


def test_tied_siblings_of_t5_leave_the_queries_of_cross_attention_out():
    model = gk.inject(transformer("T5"), ShareLoRAConfig(rank=2, tie_siblings=True))
    several = {key: layers for key, layers in groups(model).items() if "{" in key}
    assert several == {
        "encoder.block.#.layer.#.SelfAttention.{q (16, 16), k (16, 16), v (16, 16)}": 6,
        "decoder.block.#.layer.#.SelfAttention.{q (16, 16), k (16, 16), v (16, 16)}": 9,
        "decoder.block.#.layer.#.EncDecAttention.{k (16, 16), v (16, 16)}": 6,
    }


def test_siblings_come_back_from_a_file_with_one_dropout_mask(vit, randomize, tmp_path):
    config = ShareLoRAConfig(rank=2, tie_siblings=True, dropout=0.5)
    model = randomize(gk.inject(vit(), config))
    gk.save_adapter(model, tmp_path / "a.safetensors")
    x = torch.randn(3, 4, 12)
    for other in (vit(), gk.inject(vit(), config)):
        gk.load_adapter(other, tmp_path / "a.safetensors")
        assert gk.shared(other) == gk.shared(model)
        outputs = []
        for module in (model, other):
            torch.manual_seed(5)
            outputs.append(module.train()(x))
        assert torch.equal(*outputs), "masks in the same order, the same for siblings"
        gk.save_adapter(other, tmp_path / "b.safetensors")
        assert tensors_and_metadata(tmp_path / "b.safetensors") == tensors_and_metadata(tmp_path / "a.safetensors")
    metadata = tensors_and_metadata(tmp_path / "a.safetensors")[1]
    assert metadata["format_version"] == "2", "what knows version 1 only would give each a mask of its own"
    gk.save_adapter(gk.inject(vit(), ShareLoRAConfig(rank=2)), tmp_path / "c.safetensors")
    assert tensors_and_metadata(tmp_path / "c.safetensors")[1]["format_version"] == "1"

    untied = gk.inject(vit(), ShareLoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"the file shares 'blocks\.0\.attn\.q_proj\.B_down' with.*k_proj.*does not"):
        gk.load_adapter(untied, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"the model shares 'blocks\.0\.attn\.q_proj\.B_down' with.*k_proj.*does not"):
        gk.load_adapter(model, tmp_path / "c.safetensors")
    split_siblings(model)
    with pytest.raises(ValueError, match=r"the file ties \['blocks\.0\.attn\.k_proj', .* as siblings.*does not"):
        gk.load_adapter(model, tmp_path / "a.safetensors")


def test_a_file_with_siblings_that_share_nothing_is_refused():
    tensors = {"a.B_down": torch.zeros(1), "b.B_down": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"\['a', 'b'\] cannot be tied as siblings"):
        Adapter(dict.fromkeys("ab"), [], {}, tensors, [["a", "b"]]).check()
    Adapter(dict.fromkeys("ab"), [], {"b.B_down": "a.B_down"}, {"a.B_down": torch.zeros(1)}, [["a", "b"]]).check()


def split_siblings(model):
    """Layers with one B_down, but masks of their own."""
    for layer in named_layers(model).values():
        layer._siblings = None


def tensors_and_metadata(path):
    with safe_open(path, "pt") as file:
        return {name: tensor.tolist() for name, tensor in load_file(path).items()}, file.metadata()


def test_siblings_that_are_none_or_read_other_inputs_are_refused(vit):
    config = ShareLoRAConfig(rank=2, tie_siblings=True)
    refused(vit(), config, ["o_proj", "q_proj"], match=r"tie_siblings: no two.*'blocks\.0\.attn\.q_proj'")
    only = ShareLoRAConfig(rank=2, tie_siblings=True, projections=["q_proj"])
    refused(vit(), only, match="tie_siblings: no two")
    model = vit()
    model.blocks[1].attn.k_proj = nn.Linear(8, 16)
    match = r"in_features differ: 'blocks\.1\.attn\.q_proj' has 16, 'blocks\.1\.attn\.k_proj' has 8"
    refused(model, config, ["*_proj"], match=match)
    gk.inject(model, {"blocks.1.attn.k_proj": ShareLoRAConfig(rank=2), "*": config}, ["*_proj"])
    assert groups(model)["blocks.#.attn.{q_proj (16, 16), k_proj (16, 16), v_proj (16, 16)}"] == 5
