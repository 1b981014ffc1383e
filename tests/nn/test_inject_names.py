"""Which layers names mean: paths, their ends, globs, regular expressions; what is said of what they leave out."""

import warnings

import pytest
import torch
from injected import CFG, OTHER, paths, refused
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, ShareLoRAConfig

# Names as PEFT's users type them.


def test_a_path_wins_over_a_glob():
    def build():
        return nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4), "a1": nn.Linear(4, 4)})

    assert paths(gk.inject(build(), CFG, ["a[0]"])) == {"a[0]"}
    assert paths(gk.inject(build(), CFG, ["a[01]"])) == {"a0", "a1"}
    assert paths(gk.inject(build(), CFG, exclude_modules="a[0]")) == {"a0", "a1"}
    assert paths(gk.inject(build(), {"a[0]": None, "*": CFG})) == {"a0", "a1"}
    assert paths(gk.inject(build(), {"*": CFG, "a0": None})) == {"a[0]", "a1"}
    assert gk.inject(build(), CFG, ["a1"], train=["a[0]"])["a0"].weight.requires_grad is False
    shared = gk.shared(gk.inject(build(), ShareLoRAConfig(rank=2, share="B", projections=["a[0]"])))
    assert not shared.rows


def test_a_pattern_that_another_takes_everything_from_is_refused(vit):
    refused(vit(), {"*": CFG, "q_proj": None}, match=r"config: the pattern 'q_proj' has no effect.*'\*'")
    refused(vit(), {"*_proj": CFG, "k_proj": OTHER, "*": None}, match="'k_proj' has no effect")


def test_a_suffix_a_regular_expression_and_exclusions(vit):
    def targets(which, **more):
        return paths(gk.inject(vit(), CFG, which, **more))

    assert targets("attn.q_proj") == {f"blocks.{i}.attn.q_proj" for i in range(2)}
    assert targets(r".*\.(q|v)_proj") == {f"blocks.{i}.attn.{n}_proj" for i in range(2) for n in "qv"}
    assert targets([r"blocks\.\d\.mlp\.\d", "embed"]) == {
        "embed",
        *(f"blocks.{i}.mlp.{j}" for i in range(2) for j in (0, 2)),
    }
    assert targets(None, exclude_modules=["?_proj", "embed"]) == {
        f"blocks.{i}.mlp.{j}" for i in range(2) for j in (0, 2)
    }
    assert targets(["*_proj"], exclude_modules="blocks.0.*") == {f"blocks.1.attn.{n}_proj" for n in "qkvo"}
    refused(vit(), CFG, exclude_modules=["query"], match="exclude_modules: the pattern 'query'")
    refused(vit(), CFG, ["q_proj"], exclude_modules="attn.*_proj", match="exclude_modules: the pattern")
    refused(vit(), CFG, ["q_proj", "embed"], exclude_modules="*_proj", match="'q_proj' matches is in exclude_modules")
    refused(vit(), CFG, [r".*\.(x|y)_proj"], match="matches no module")


# Configurations and models of which little is adapted.


def test_a_configuration_without_a_support_is_refused(vit):
    empty = GLoRAConfig("none", "none", E="none")
    refused(vit(), empty, match="no layer of the .* gets a parameter")
    refused(nn.Sequential(nn.Linear(4, 4, bias=False)), GLoRAConfig("none", "none", D="vector", E="none"), match="bias")
    model = gk.inject(vit(), {"q_proj": empty, "v_proj": CFG})
    assert not model.blocks[0].attn.q_proj.adapter(), "a layer of a search that stays as it is"


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(4, 8, 8))

    def forward(self, x):
        return self.q_proj(x) @ self.experts.up.sum(0)


def test_what_is_in_no_linear_layer_is_said_in_figures(llama):
    with pytest.warns(UserWarning, match=r"inject: 80% of the model's weights.*80% experts.*target_modules") as caught:
        gk.inject(Experts(), CFG)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"convolutions"):
        gk.inject(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 8)), CFG, "all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gk.inject(Experts(), CFG, ["q_proj"])
        gk.inject(Experts(), CFG, train=["experts"])
        gk.inject(llama(), CFG)
    net = nn.Sequential(nn.Conv2d(4, 8, 3))
    net.add_module("fc", nn.Linear(8, 2))
    refused(net, CFG, match=r"no linear layer.*95% of the model's weights.*convolutions")
