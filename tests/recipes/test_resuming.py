"""Every recipe over every kind of adapter: it runs, is saved in the middle and goes on exactly, or says why not."""

import copy

import pytest
from recipe_models import MODELS, RECIPES, STEPS, equal, optimizer_of, started, train, values

from glora_kernels.methods.factors import low_rank

REFUSED = {
    **dict.fromkeys(
        [
            (recipe, "ShareLoRA")
            for recipe in ("beam", "diffora", "dynamic", "mtl", "prilora", "xgb", "xgb, chain", "chain")
        ],
        "share",
    ),
    **dict.fromkeys([("xgb, chain", kind) for kind in ("peft", "accelerated")], "cannot hold frozen links"),
    **dict.fromkeys([("chain", kind) for kind in ("peft", "accelerated")], "cannot hold frozen links"),
    ("mtl", "peft"): "accelerate",
    ("chain, base", "4 bits"): "4 bits",
}
SAVED = 7


def pairs(refused: bool):
    return [(recipe, kind) for recipe in RECIPES for kind in MODELS if ((recipe, kind) in REFUSED) == refused]


@pytest.mark.parametrize(("name", "kind"), pairs(False))
def test_a_run_goes_on_exactly_in_a_fresh_model(name, kind, tmp_path):
    model = MODELS[kind]()
    start = values(model)
    recipe, optimizer = started(model, name)
    first = train(model, recipe, optimizer, range(1, SAVED + 1))
    recipe.save(tmp_path / "recipe.safetensors")
    state = copy.deepcopy(optimizer.state_dict())
    last = train(model, recipe, optimizer, range(SAVED + 1, STEPS + 1))
    assert len({*first, *last}) == STEPS
    if name == "dynamic":
        assert len({own.rank for own in low_rank(model, "the test").values()}) > 1

    fresh = MODELS[kind]()
    assert equal(values(fresh), start)
    resumed, _ = started(fresh, name)
    resumed.load(tmp_path / "recipe.safetensors")
    again = optimizer_of(fresh, resumed)
    again.load_state_dict(state)
    resumed.bind(again)
    assert resumed.step == SAVED
    assert train(fresh, resumed, again, range(SAVED + 1, STEPS + 1)) == last
    assert equal(values(fresh), values(model))


@pytest.mark.parametrize(("name", "kind"), pairs(True))
def test_what_cannot_be_is_refused_with_the_reason(name, kind):
    model = MODELS[kind]()

    def run():
        recipe, optimizer = started(model, name)
        train(model, recipe, optimizer, range(1, SAVED))

    with pytest.raises((ValueError, RuntimeError), match=REFUSED[name, kind]):
        run()
