"""The choices of a search: what is counted, what means the same, and what is refused."""

import itertools

import pytest
from fake_net import SMALL

from glora_kernels import GLoRAConfig, SearchSpace
from glora_kernels.search.space import CHOICES, SUPPORTS, LayerShape, parameters_of, smaller
from glora_kernels.spec import all_configs

WITH, WITHOUT = LayerShape(6, 5, True), LayerShape(6, 5, False)
FULL = SearchSpace(**CHOICES, ranks=(2, 4, 8))


def meaning(config, shape):
    """What a configuration computes: the shapes of its parameters by name, and the scale where it has one."""
    return tuple(config.parameter_shapes(*shape).items()), config.scale if config.B == "lora" else None


@pytest.mark.parametrize("ranks", [(4,), (1, 3), (2, 4, 8)])
def test_a_layer_has_270_configurations_a_rank_and_162_without_one(ranks):
    space = SearchSpace(**CHOICES, ranks=ranks)
    for shape, counts in ((WITH, (270, 162)), (WITHOUT, (90, 54))):
        configs = space.configs(shape)
        assert len(configs) == counts[0] * len(ranks) + counts[1]
        assert len({meaning(config, shape) for config in configs}) == len(configs), "two that mean the same"


@pytest.mark.parametrize("rank", [1, 4])
def test_every_configuration_of_the_paper_is_in_its_space(rank):
    space = SearchSpace.paper(rank)
    configs = set(space.configs(WITH))
    assert len(configs) == 432
    assert {space.canonical(config, WITH) for config in all_configs(rank=rank)} == configs
    forms = {tuple(getattr(config, name) for name in SUPPORTS) for config in configs}
    assert forms == set(itertools.product(*CHOICES.values()))


@pytest.mark.parametrize("shape", [WITH, WITHOUT])
def test_the_canonical_form_means_the_same_and_is_its_own(shape):
    allowed = set(FULL.configs(shape))
    for rank in FULL.ranks:
        for config in all_configs(rank=rank, alpha=float(rank)):
            canonical = FULL.canonical(config, shape)
            assert canonical in allowed
            assert meaning(canonical, shape) == meaning(config, shape)
            assert FULL.canonical(canonical, shape) == canonical


def test_what_is_folded():
    assert FULL.canonical(GLoRAConfig(B="none", D="vector"), WITHOUT) == GLoRAConfig(B="none", rank=2)
    assert FULL.canonical(GLoRAConfig.lora(8, alpha=8.0), WITH) == GLoRAConfig("none", "lora", rank=8, alpha=8.0)
    doubled = SearchSpace(ranks=(3,), scale=2.0)
    assert doubled.canonical(GLoRAConfig.lora(3, alpha=6), WITH).alpha == 6.0
    assert {config.scale for config in doubled.configs(WITH) if config.B == "lora"} == {2.0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GLoRAConfig(A="constant"), "A must be one of 'none', 'vector'; got 'constant'"),
        (GLoRAConfig(A="none", C="vector"), "C must be one of 'none'"),
        (GLoRAConfig(rank=4), "rank must be one of 1, 2; got 4"),
        (GLoRAConfig(rank=2, alpha=4), r"alpha must be scale·rank = 2.0, .* got alpha=4"),
        (GLoRAConfig(rank=2, dropout=0.1), "dropout must be 0"),
    ],
)
def test_a_configuration_outside_the_space_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        SMALL.canonical(config, WITH)


def test_the_product_variant_is_refused():
    with pytest.raises(ValueError, match="variant"):
        FULL.canonical(GLoRAConfig(A="lora", variant="matmul"), WITH)
    with pytest.raises(TypeError, match="must be a GLoRAConfig, got dict"):
        FULL.canonical({"A": "none"}, WITH)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"A": ()}, ValueError, "A is empty: the space allows nothing"),
        ({"ranks": ()}, ValueError, "ranks is empty"),
        ({"A": "vector"}, TypeError, "A must be a tuple"),
        ({"A": ("vec",)}, ValueError, "A must be one of"),
        ({"C": ("constant",)}, ValueError, "C must be one of"),
        ({"E": ("none", "none")}, ValueError, "E names something twice"),
        ({"ranks": (0,)}, ValueError, "ranks must be integers >= 1, got 0"),
        ({"ranks": (2.0,)}, ValueError, "ranks must be integers"),
        ({"scale": 0}, ValueError, "scale must be a finite number other than 0"),
        ({"init": "zeros"}, ValueError, "init must be one of"),
        (dict.fromkeys(SUPPORTS, ("none",)), ValueError, "allows nothing"),
    ],
)
def test_a_bad_space_is_refused(arguments, kind, words):
    with pytest.raises(kind, match=words):
        SearchSpace(**arguments)


@pytest.mark.parametrize("shape", [WITH, WITHOUT, LayerShape(3, 1, True), LayerShape(1, 7, False)])
@pytest.mark.parametrize(
    "space",
    [FULL, SMALL, SearchSpace.paper(), SearchSpace(A=("lora",), B=("lora", "constant"), C=("lora",), ranks=(3, 5))],
)
def test_single_steps_down_lead_to_the_fewest_parameters(space, shape):
    fewest = min(config.num_parameters(*shape) for config in space.configs(shape))
    assert space.smallest(shape).num_parameters(*shape) == fewest
    allowed = set(space.configs(shape))
    for config in allowed:
        steps = smaller(space, shape, config)
        assert bool(steps) == (config.num_parameters(*shape) > fewest)
        assert allowed.issuperset(steps)
        assert all(step.num_parameters(*shape) < config.num_parameters(*shape) for step in steps)


def test_parameters_of_a_candidate():
    config = GLoRAConfig("vector", "lora", "none", "vector", "none", rank=2)
    assert parameters_of({"a": config, "b": config}, {"a": WITH, "b": WITHOUT}) == (5 + 2 * 11 + 5) + (5 + 2 * 11)
