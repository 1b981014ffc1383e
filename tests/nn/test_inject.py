"""Injection: what is adapted, what patterns match, and that a failure changes nothing."""

import pytest
import torch
from injected import BODY, CFG, LINEARS, OTHER, paths, refused
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRALinear
from glora_kernels.nn.model import named_layers


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_every_linear_layer_but_the_head_by_default(vit, targets):
    model = vit()
    assert gk.inject(model, CFG, targets) is model
    assert paths(model) == BODY


def test_everything_but_the_adapters_is_frozen(vit):
    model = gk.inject(vit(), CFG, target_modules=["q_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.attn.q_proj.{name}" for i in range(2) for name in ("A", "B_up", "B_down")}
    assert gk.trainable_parameters(model) == 2 * CFG.num_parameters(16, 16)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", {f"blocks.{i}.attn.q_proj" for i in range(2)}),
        (["q_proj", "v_proj"], {f"blocks.{i}.attn.{n}_proj" for i in range(2) for n in "qv"}),
        (["blocks.1.*"], {path for path in LINEARS if path.startswith("blocks.1.")}),
        (["?_proj"], {path for path in LINEARS if path.endswith("_proj")}),
        (["embed", "blocks.0.mlp.2"], {"embed", "blocks.0.mlp.2"}),
        (["*"], LINEARS),
        (("*.mlp.[02]",), {f"blocks.{i}.mlp.{j}" for i in range(2) for j in (0, 2)}),
        (iter(["embed"]), {"embed"}),
    ],
)
def test_target_patterns(vit, targets, expected):
    assert paths(gk.inject(vit(), CFG, target_modules=targets)) == expected


def test_a_mapping_gives_each_layer_its_first_match(vit):
    model = gk.inject(vit(), {"embed": None, "blocks.0.*": OTHER, "q_proj": None, "*": CFG})
    layers = named_layers(model)
    assert "embed" not in layers
    assert type(model.embed) is nn.Linear
    assert layers["blocks.0.attn.q_proj"].config is OTHER
    assert "blocks.1.attn.q_proj" not in layers
    assert layers["blocks.1.attn.k_proj"].config is CFG


def test_a_mapping_alone_restricts_the_targets(vit):
    assert paths(gk.inject(vit(), {"blocks.0.mlp.*": CFG})) == {"blocks.0.mlp.0", "blocks.0.mlp.2"}


def test_a_mapping_and_targets_must_both_match(vit):
    model = gk.inject(vit(), {"blocks.0.*": CFG}, target_modules=["q_proj", "k_proj"])
    assert paths(model) == {"blocks.0.attn.q_proj", "blocks.0.attn.k_proj"}


def test_a_catch_all_that_earlier_patterns_shadow_is_fine(vit):
    model = gk.inject(vit(), {"q_proj": OTHER, "*": CFG}, target_modules=["q_proj"])
    assert {layer.config for layer in named_layers(model).values()} == {OTHER}


def test_patterns_that_match_nothing_are_named_with_what_there_is(vit):
    available = "'embed'.*'q_proj'"
    refused(vit(), CFG, ["q_proj", "query"], match=rf"target_modules: the pattern 'query'.*{available}")
    refused(vit(), {"query": CFG, "*": CFG}, match=rf"config: the pattern 'query'.*{available}")
    refused(vit(), {"query": None, "*": CFG}, match="config: the pattern 'query'")
    refused(vit(), CFG, train=["head"], match=r"train: the pattern 'head'.*'classifier'")
    refused(vit(), {"v_proj": CFG, "q_proj": CFG}, ["q_proj"], match=r"'v_proj'.*not in target_modules")


def test_targets_that_are_no_linear_layers_are_named_with_their_type(vit):
    refused(
        vit(),
        CFG,
        ["ln"],
        match=r"'ln' matches no linear layer or convolution \('blocks\.0\.ln' is of class LayerNorm\)",
    )
    refused(vit(), CFG, ["blocks.0.attn"], match="is of class Attention")
    assert paths(gk.inject(vit(), CFG, ["blocks.0.*"])), "a glob may match other modules as well"


def test_configurations_of_others_are_told_what_is_theirs_here(vit):
    peft = pytest.importorskip("peft")
    refused(
        vit(), {"A": "vector", "rank": 4}, error=TypeError, match=r"To make one .* of it: GLoRAConfig\(\*\*config\)"
    )
    refused(
        vit(), peft.LoraConfig(r=4), error=TypeError, match=r"got LoraConfig; GLoRAConfig.lora\(rank, alpha, dropout\)"
    )
    with pytest.raises(
        TypeError, match="GLoRAConfig has no lora_alpha and no r: lora_alpha is alpha here, r is rank here"
    ):
        gk.GLoRAConfig(r=8, lora_alpha=16)
    with pytest.raises(TypeError, match="ShareLoRAConfig has no lora_dropout: lora_dropout is dropout here"):
        gk.ShareLoRAConfig(lora_dropout=0.1)


def test_train_patterns_that_match_nothing_to_train_are_refused(vit):
    refused(vit(), CFG, train=["blocks.0.mlp.1"], match="without parameters")


def test_a_model_without_linear_layers_is_refused():
    refused(
        nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3)), CFG, match=r"\(it has embeddings, norms and vectors alone\)"
    )
    refused(nn.Sequential(nn.Linear(3, 3)), {"*": None}, match="no linear layer is left")


def test_bad_arguments(vit):
    refused(vit(), "lora", error=TypeError, match="or a mapping, got str")
    refused(vit(), {"*": "lora"}, error=TypeError, match=r"config\['\*'\].*got str")
    refused(vit(), {3: CFG}, error=TypeError, match="3")
    refused(vit(), {}, match="empty")
    refused(vit(), CFG, [], match="target_modules is empty")
    refused(vit(), CFG, [3], error=TypeError, match=r"target_modules.*3")
    refused(vit(), CFG, train=[None], error=TypeError, match=r"train.*None")
    refused(vit(), CFG, adapter_dtype=torch.int64, match=r"adapter_dtype.*int64")
    with pytest.raises(TypeError, match=r"nn\.Module, got dict"):
        gk.inject({}, CFG)


def test_injecting_twice_is_refused(vit):
    model = gk.inject(vit(), CFG, ["q_proj"])
    refused(model, CFG, ["v_proj"], match=r"already.*q_proj")


def test_a_failure_while_building_changes_nothing(vit, monkeypatch):
    model = vit()
    model.embed.weight.requires_grad_(False)
    original, calls = GLoRALinear.in_place_of.__func__, []

    def fail_at_the_third(cls, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room for a third")
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(GLoRALinear, "in_place_of", classmethod(fail_at_the_third))
    refused(model, CFG, error=MemoryError, match="third")
    assert len(calls) == 3


def test_a_linear_layer_used_at_several_paths_becomes_one(randomize):
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared), "c": shared})
    gk.inject(model, CFG, target_modules=["b.0"])
    assert isinstance(model["c"], GLoRALinear)
    assert model["a"][0] is model["c"]
    assert model["b"][0] is model["c"]
    assert gk.trainable_parameters(model) == CFG.num_parameters(4, 4)


def test_a_shared_layer_with_two_configurations_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    refused(model, {"a": CFG, "b": OTHER}, match=r"\['a', 'b'\] are one module")
    refused(model, {"a": CFG, "b": None}, match=r"\['a', 'b'\] are one module")


def test_a_model_that_is_a_linear_layer_becomes_a_glora_layer():
    linear = nn.Linear(4, 4)
    layer = gk.inject(linear, CFG)
    assert isinstance(layer, GLoRALinear)
    assert layer.weight is linear.weight


def test_modes_and_dtypes_are_kept(vit):
    model = vit().bfloat16()
    model.blocks[0].eval()
    gk.inject(model, CFG, train=["classifier"])
    for path, layer in named_layers(model).items():
        assert layer.training is not path.startswith("blocks.0")
    assert model.embed.weight.dtype == torch.bfloat16


def test_trainable_parameters_counts_shared_ones_once(vit):
    model = gk.inject(vit(), OTHER, ["q_proj", "v_proj"], train=["classifier"])
    expected = 4 * OTHER.num_parameters(16, 16) + sum(p.numel() for p in model.classifier.parameters())
    assert gk.trainable_parameters(model) == expected
    first, second = (model.blocks[i].attn.q_proj for i in range(2))
    second.B_down = first.B_down
    assert gk.trainable_parameters(model) == expected - 3 * 16
    assert gk.trainable_parameters(nn.Linear(3, 2)) == 8
    with pytest.raises(TypeError, match=r"nn\.Module"):
        gk.trainable_parameters([])
