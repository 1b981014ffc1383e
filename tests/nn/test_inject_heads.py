"""Which layer is a model's head, and so is left alone."""

import pytest
import torch
from injected import CFG, OTHER, paths, refused
from torch import nn

import glora_kernels as gk


def test_llama_leaves_its_head_alone_and_trains_all_seven(llama):
    model = gk.inject(llama(), OTHER)
    assert type(model.lm_head) is nn.Linear
    assert {path.rpartition(".")[2] for path in paths(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert len(paths(model)) == 14


def test_a_tied_head_is_the_head_too(llama):
    model = gk.inject(llama(tied=True), OTHER)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(paths(model)) == 14
    gk.merge(model)


def test_gpt2_conv1d_layers_are_replaced(gpt2):
    model = gpt2()
    ids = torch.arange(5)[None]
    expected = model(ids).logits
    gk.inject(model, CFG)
    assert {path.rpartition(".")[2] for path in paths(model)} == {"c_attn", "c_proj", "c_fc"}
    torch.testing.assert_close(model(ids).logits, expected)


class Headed(nn.Module):
    def __init__(self, name, get=None):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.add_module(name, nn.Linear(4, 4))
        self.get = get

    def forward(self, x):
        return x


class Embeds(Headed):
    def get_output_embeddings(self):
        if self.get == "raises":
            raise NotImplementedError
        return getattr(self, self.get) if self.get else None


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "embed_out"])
def test_a_head_may_be_inside_a_module_of_its_name(name):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), name: nn.Sequential(nn.Dropout(), nn.Linear(4, 4))})
    assert paths(gk.inject(model, CFG)) == {"body"}
    inner = nn.ModuleDict({"fc": nn.Linear(4, 4), "attention": nn.ModuleDict({"out": nn.Linear(4, 4)})})
    assert paths(gk.inject(nn.ModuleDict({"body": nn.Linear(4, 4), name: inner}), CFG)) == {
        "body",
        f"{name}.attention.out",
    }


def test_fc_is_a_head_of_the_model_itself_and_no_layer_of_its_blocks():
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layer": nn.ModuleList([block]), "fc": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)})
    assert paths(gk.inject(model, CFG)) == {"layer.0.fc", "layer.0.fc1", "fc1"}


class Classifies(Headed):
    def get_classifier(self):
        return (self.body, nn.Identity()) if self.get == "pair" else self.final if self.get else nn.Identity()


def test_timms_get_classifier_names_the_head():
    assert paths(gk.inject(Classifies("final", get="final"), CFG)) == {"body"}
    assert paths(gk.inject(Classifies("final", get="pair"), CFG)) == {"final"}
    assert paths(gk.inject(Classifies("head"), CFG)) == {"body"}, "without a classifier the names decide"


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "embed_out"])
def test_a_head_is_known_by_its_last_name(name):
    assert paths(gk.inject(Headed(name), CFG)) == {"body"}
    assert paths(gk.inject(nn.Sequential(Headed(name)), CFG)) == {"0.body"}
    assert paths(gk.inject(Headed(name), CFG, target_modules=["body", name])) == {"body", name}


def test_a_last_layer_of_another_name_is_no_head():
    assert paths(gk.inject(Headed("final"), CFG)) == {"body", "final"}


def test_get_output_embeddings_decides_where_it_names_a_module():
    assert paths(gk.inject(Embeds("head", get="body"), CFG)) == {"head"}
    assert paths(gk.inject(Embeds("head", get=None), CFG)) == {"body"}
    assert paths(gk.inject(Embeds("head", get="raises"), CFG)) == {"body"}


def test_a_configuration_for_the_head_alone_says_why_it_matches_nothing():
    refused(
        Headed("head"),
        {"head": CFG},
        match=r"'head' matches no linear layer to adapt; it matches only the head",
    )
    assert paths(gk.inject(Headed("head"), {"head": None, "*": CFG})) == {"body"}
