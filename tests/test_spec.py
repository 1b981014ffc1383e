"""The configuration: what it accepts, the shapes it gives, and its way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from glora_kernels.spec import (
    CHOICES,
    GLoRAConfig,
    ShareLoRAConfig,
    all_configs,
    assign,
    projection_type,
    select,
)

K, N, R = 20, 11, 3


def test_all_432():
    configs = list(all_configs(rank=R))
    assert len(configs) == len(set(configs)) == 432 == math.prod(len(c) for c in CHOICES.values())
    assert {c.rank for c in configs} == {R}
    assert {c.variant for c in configs} == {"hadamard"}


def test_what_is_of_a_low_rank_b_goes_to_those_that_have_one():
    configs = list(all_configs(rank=R, alpha=6, dropout=0.1))
    assert len(configs) == 432
    assert {(c.B == "lora", c.alpha, c.dropout) for c in configs} == {(True, 6, 0.1), (False, None, 0.0)}
    assert [c for c in configs if c.is_empty] == [GLoRAConfig(*["none"] * 5, rank=R)]


def test_dropout_without_a_low_rank_b_is_a_warning():
    with pytest.warns(UserWarning, match=r"dropout=0\.5 has no effect with B='vector'") as caught:
        GLoRAConfig(B="vector", dropout=0.5)
    assert caught[0].filename == __file__


def test_defaults():
    config = GLoRAConfig()
    assert (config.A, config.B, config.C, config.D, config.E) == ("vector", "lora", "none", "none", "none")
    assert (config.rank, config.alpha, config.dropout, config.variant) == (8, None, 0.0, "hadamard")
    assert config.init == "xavier"
    assert config.scale == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4


def test_lora():
    config = GLoRAConfig.lora(rank=8, alpha=16, dropout=0.05)
    assert (config.A, config.B, config.C, config.D, config.E) == ("none", "lora", "none", "none", "none")
    assert (config.rank, config.alpha, config.dropout, config.init) == (8, 16, 0.05, "kaiming")
    assert config.scale == 2.0
    assert config.parameter_shapes(K, N) == {"B_up": (N, 8), "B_down": (8, K)}


@pytest.mark.parametrize(("alpha", "rank", "scale"), [(None, 4, 1.0), (16, 8, 2.0), (1, 3, 1 / 3), (-2.0, 4, -0.5)])
def test_scale(alpha, rank, scale):
    assert GLoRAConfig(rank=rank, alpha=alpha).scale == scale


@pytest.mark.parametrize(("arguments", "words"), [
    ({"A": "matrix"}, ("A", "'matrix'", "'lora'", "'vector'", "'constant'", "'none'")),
    ({"A": None}, ("A", "None")),
    ({"B": "LORA"}, ("B", "'LORA'", "'lora'")),
    ({"C": "constant"}, ("C", "'constant'", "'lora'", "'vector'", "'none'")),
    ({"D": "lora"}, ("D", "'lora'", "'vector'", "'constant'")),
    ({"E": "lora"}, ("E", "'lora'", "'vector'", "'constant'")),
    ({"rank": 0}, ("rank", "0", ">= 1")),
    ({"rank": -1}, ("rank", "-1")),
    ({"rank": 2.0}, ("rank", "2.0", "integer")),
    ({"rank": True}, ("rank", "True")),
    ({"rank": "8"}, ("rank", "'8'")),
    ({"dropout": 1.0}, ("dropout", "1.0", "[0, 1)")),
    ({"dropout": -0.1}, ("dropout", "-0.1")),
    ({"dropout": math.nan}, ("dropout", "nan")),
    ({"dropout": "0.1"}, ("dropout", "'0.1'")),
    ({"dropout": None}, ("dropout", "None")),
    ({"alpha": math.inf}, ("alpha", "inf")),
    ({"alpha": math.nan}, ("alpha", "nan")),
    ({"alpha": "16"}, ("alpha", "'16'")),
    ({"alpha": True}, ("alpha", "True")),
    ({"alpha": 0}, ("alpha", "0", "no effect")),
    ({"alpha": -0.0}, ("alpha", "0")),
    ({"B": "vector", "alpha": 16}, ("alpha", "16", "'vector'")),
    ({"B": "none", "alpha": 1.0}, ("alpha", "'none'")),
    ({"variant": "product"}, ("variant", "'product'", "'hadamard'", "'matmul'")),
    ({"variant": "matmul", "A": "vector"}, ("variant", "'vector'", "'lora'", "'none'")),
    ({"variant": "matmul", "A": "constant"}, ("variant", "'constant'")),
    ({"init": "zeros"}, ("init", "'zeros'", "'xavier'", "'kaiming'")),
])  # fmt: skip
def test_errors_name_the_argument_what_was_given_and_what_is_accepted(arguments, words):
    with pytest.raises(ValueError) as raised:
        GLoRAConfig(**arguments)
    assert all(word in str(raised.value) for word in words), raised.value


SHAPES = {
    ("A", "lora"): {"A_up": (N, R), "A_down": (R, K)}, ("A", "vector"): {"A": (N,)}, ("A", "constant"): {"A": (1,)},
    ("B", "lora"): {"B_up": (N, R), "B_down": (R, K)}, ("B", "vector"): {"B": (N,)}, ("B", "constant"): {"B": (1,)},
    ("C", "lora"): {"C_up": (K, R), "C_down": (R, 1)}, ("C", "vector"): {"C": (K,)},
    ("D", "vector"): {"D": (N,)}, ("D", "constant"): {"D": (1,)},
    ("E", "vector"): {"E": (N,)}, ("E", "constant"): {"E": (1,)},
}  # fmt: skip
COUNTS = {
    ("A", "lora"): R * (N + K), ("A", "vector"): N, ("A", "constant"): 1,
    ("B", "lora"): R * (N + K), ("B", "vector"): N, ("B", "constant"): 1,
    ("C", "lora"): R * (K + 1), ("C", "vector"): K,
    ("D", "vector"): N, ("D", "constant"): 1, ("E", "vector"): N, ("E", "constant"): 1,
}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_shapes_and_counts(bias):
    for config in all_configs(rank=R):
        forms = {name: getattr(config, name) for name in "ABCDE"}
        if not bias:
            forms["D"] = "none"
        expected = {}
        for item in forms.items():
            expected |= SHAPES.get(item, {})
        assert config.parameter_shapes(K, N, bias) == expected
        assert config.num_parameters(K, N, bias) == sum(COUNTS.get(item, 0) for item in forms.items())


def test_shapes_of_the_product_variant():
    config = GLoRAConfig("lora", "none", E="none", rank=R, variant="matmul")
    assert config.parameter_shapes(K, N) == {"A_up": (K, R), "A_down": (R, K)}
    assert config.num_parameters(K, N) == 2 * K * R


def test_llama_7b_counts():
    """DESIGN section 2: LoRA on all linears, r = 64."""
    layers = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    assert 32 * sum(GLoRAConfig.lora(64).num_parameters(k, n, False) for k, n in layers) == 159_907_840


@pytest.mark.parametrize("config", [
    GLoRAConfig(), GLoRAConfig.lora(4, 8, 0.1), GLoRAConfig("lora", "lora", variant="matmul", alpha=0.5),
    *all_configs(rank=5),
])  # fmt: skip
def test_json_round_trip(config):
    assert GLoRAConfig.from_dict(config.to_dict()) == config
    assert GLoRAConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == config.to_dict()


@pytest.mark.parametrize(("text", "words"), [
    ("{", ("JSON",)), ("[1]", ("JSON object", "[1]")), ("null", ("JSON object",)),
    (json.dumps({**GLoRAConfig().to_dict(), "gamma": 1}), ("unknown", "gamma", "alpha")),
    (json.dumps({k: v for k, v in GLoRAConfig().to_dict().items() if k != "rank"}), ("missing", "rank")),
    (json.dumps({**GLoRAConfig().to_dict(), "rank": 0}), ("rank", "0")),
])  # fmt: skip
def test_bad_json(text, words):
    with pytest.raises(ValueError) as raised:
        GLoRAConfig.from_json(text)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(("path", "pattern", "expected"), [
    ("model.layers.0.q_proj", "q_proj", True),
    ("model.layers.0.q_proj", "0.q_proj", True),
    ("model.layers.0.q_proj", "*.q_proj", True),
    ("model.layers.0.q_proj", "model.layers.0.*", True),
    ("model.layers.10.q_proj", "model.layers.1.*", False),
    ("model.layers.0.q_proj", "*_proj", True),
    ("model.layers.0.q_proj", "layers", False),
    ("model.layers.0.q_proj", "ers.0.q_proj", False),
    ("model.layers.0.q_proj", "Q_PROJ", False),
    ("q_proj", "q_proj", True),
    ("q_proj_extra", "q_proj", False),
    ("a.b", "[ab].[ab]", True),
    ("a.b", "*", True),
    ("model.layers.0.q_proj", r".*\.(q|v)_proj", True),
    ("model.layers.0.k_proj", r".*\.(q|v)_proj", False),
    ("model.layers.0.q_proj", "(q|v)_proj", False),
    ("model.layers.0.q_proj", r"model\.layers\.\d+\.q_proj", True),
    ("model.layers.0.q_proj", ".*_proj", True),
    ("model.layers.0.q_proj", "*(", False),
])  # fmt: skip
def test_what_a_pattern_selects(path, pattern, expected):
    assert select(pattern, {path}) == ({path} if expected else set())


@pytest.mark.parametrize(("pattern", "expected"), [
    ("a[0]", {"a[0]"}), ("x.a0", {"x.a0"}), ("a0", {"a0"}), ("a?", {"a0", "x.a0"}), ("b", {"y.b", "b.b"}),
    ("b.b", {"b.b"}), ("y.*", {"y.b"}),
])  # fmt: skip
def test_a_path_wins_over_the_end_of_a_path_and_that_over_a_glob(pattern, expected):
    assert select(pattern, {"a[0]", "a0", "x.a0", "y.b", "b.b"}) == expected


def test_a_path_wins_in_a_mapping_and_then_the_order():
    paths = {"blocks.0.fc", "blocks.1.fc"}
    assert assign(["blocks.0.*", "*"], paths) == {"blocks.0.fc": "blocks.0.*", "blocks.1.fc": "*"}
    assert assign(["*", "blocks.0.fc"], paths) == {"blocks.0.fc": "blocks.0.fc", "blocks.1.fc": "*"}
    assert assign(["blocks.0.*"], {"blocks.1.fc"}) == {}
    assert assign(["a[0]", "a0"], {"a[0]", "a0"}) == {"a[0]": "a[0]", "a0": "a0"}
    assert assign(["fc", "*"], paths) == dict.fromkeys(paths, "fc"), "what is left may be nothing"


@pytest.mark.parametrize("patterns", [["*", "fc"], ["blocks.*", "blocks.0.*"], ["[x0]*", "blocks.?.fc", "fc"]])
def test_a_pattern_from_which_others_take_everything_is_an_error(patterns):
    with pytest.raises(ValueError, match=rf"{re.escape(repr(patterns[-1]))} has no effect.*{re.escape(patterns[-2])}"):
        assign(patterns, {"blocks.0.fc", "blocks.1.fc"})


def test_sharelora_defaults():
    config = ShareLoRAConfig()
    assert dataclasses.astuple(config) == (64, None, 0.0, "A", None, False, "none", "none", "none", "none")
    assert config.layer_config() == GLoRAConfig.lora(rank=64)
    config = ShareLoRAConfig(rank=4, alpha=8, dropout=0.1, share="AB", A="vector", C="lora", D="constant", E="vector")
    assert config.layer_config() == GLoRAConfig(
        "vector", "lora", "lora", "constant", "vector", 4, 8, 0.1, init="kaiming"
    )  # fmt: skip


def test_sharelora_says_which_factors_it_shares():
    shared = {share: ShareLoRAConfig(share=share).shared_factors for share in ("none", "A", "B", "AB")}
    assert shared == {"none": (), "A": ("B_down",), "B": ("B_up",), "AB": ("B_down", "B_up")}


@pytest.mark.parametrize(("arguments", "error", "words"), [
    ({"share": "C"}, ValueError, ("share", "'C'", "'none', 'A', 'B', 'AB'")),
    ({"share": None}, ValueError, ("share", "None")),
    ({"share": ["A"]}, ValueError, ("share", "['A']")),
    ({"rank": 0}, ValueError, ("rank", "0")),
    ({"alpha": math.nan}, ValueError, ("alpha", "nan")),
    ({"alpha": 0}, ValueError, ("alpha", "0")),
    ({"dropout": 1.0}, ValueError, ("dropout", "1.0")),
    ({"A": "matrix"}, ValueError, ("A", "'matrix'")),
    ({"C": "constant"}, ValueError, ("C", "'constant'")),
    ({"tie_siblings": "yes"}, ValueError, ("tie_siblings", "'yes'", "True or False")),
    ({"projections": []}, ValueError, ("projections", "empty")),
    ({"projections": 3}, TypeError, ("projections", "3")),
    ({"projections": ["q_proj", None]}, TypeError, ("projections", "None")),
])  # fmt: skip
def test_sharelora_errors(arguments, error, words):
    with pytest.raises(error) as raised:
        ShareLoRAConfig(**arguments)
    assert all(word in str(raised.value) for word in words), raised.value


def test_sharelora_takes_patterns_as_a_list_and_goes_to_json_and_back():
    for projections in (["q_proj", "k_*"], ("q_proj", "k_*")):
        config = ShareLoRAConfig(rank=4, share="B", projections=projections, tie_siblings=True)
        assert config.projections == ("q_proj", "k_*")
        assert ShareLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert len({config, ShareLoRAConfig.from_dict(config.to_dict())}) == 1
    assert ShareLoRAConfig(projections="q_proj").projections == ("q_proj",)
    assert ShareLoRAConfig.from_dict(ShareLoRAConfig().to_dict()) == ShareLoRAConfig()
    with pytest.raises(ValueError, match="unknown ShareLoRAConfig fields \\['B'\\]"):
        ShareLoRAConfig.from_dict(ShareLoRAConfig().to_dict() | {"B": "lora"})
    with pytest.raises(ValueError, match="missing ShareLoRAConfig fields \\['rank'\\]"):
        ShareLoRAConfig.from_dict({key: value for key, value in ShareLoRAConfig().to_dict().items() if key != "rank"})


@pytest.mark.parametrize(("path", "expected"), [
    ("model.layers.7.self_attn.k_proj", "model.layers.#.self_attn.k_proj (3, 5)"),
    ("decoder.block.11.layer.1.EncDecAttention.q", "decoder.block.#.layer.#.EncDecAttention.q (3, 5)"),
    ("h.0.conv1d", "h.#.conv1d (3, 5)"),
    ("stage2.3.fc", "stage2.#.fc (3, 5)"),
    ("0", "# (3, 5)"),
    ("", "(3, 5)"),
])  # fmt: skip
def test_projection_types(path, expected):
    assert projection_type(path, 3, 5) == expected
