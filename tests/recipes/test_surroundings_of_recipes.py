"""Files that are no recipe's, models that are ahead, wrapped or compiled, cells run twice, and what is left behind."""

import copy
import gc
import json
from contextlib import nullcontext

import pytest
import torch
from recipe_models import (
    MODELS,
    RECIPES,
    STEPS,
    K,
    adapted_weights,
    batch,
    equal,
    loss_of,
    optimizer_of,
    ours,
    plain,
    share_lora,
    started,
    train,
    values,
)  # fmt: skip
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import glora_kernels as gk
from glora_kernels.methods.factors import low_rank
from glora_kernels.recipes import BeamLoRA, ChainOfLoRA, DiffoRA, DynamicLoRA, MTLLoRA, PRILoRA, XGBLoRA

FILE = "recipe.safetensors"
WATCHING = ("dynamic", "prilora")


def after(name, steps, kind="ours"):
    model = MODELS[kind]()
    recipe, optimizer = started(model, name)
    train(model, recipe, optimizer, range(1, steps + 1))
    return model, recipe, optimizer


def hooks(model):
    """How many hooks there are on modules and on parameters."""
    on_modules = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return on_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


# Files


def damaged(path, how, folder):
    data = path.read_bytes()
    bad = folder / "bad.safetensors"
    if how == "truncated":
        bad.write_bytes(data[:-7])
    elif how == "cut header":
        bad.write_bytes(data[:20])
    elif how == "empty":
        bad.write_bytes(b"")
    elif how == "a bit":
        bad.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif how == "other metadata":
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["recipe"])
        save_file(load_file(path), bad, {"recipe": json.dumps(about | {"step": 3})})
    elif how == "an adapter":
        gk.save_adapter(ours(), bad)
    else:
        save_file({"x": torch.zeros(1)}, bad)
    return bad


@pytest.mark.parametrize(("how", "reason"), [
    ("truncated", "truncated"), ("cut header", "truncated"), ("empty", "truncated"), ("a bit", "SHA-256"),
    ("other metadata", "SHA-256"), ("an adapter", "no file of a recipe"), ("tensors", "no file of a recipe"),
])  # fmt: skip
def test_a_file_that_is_no_whole_state_is_refused(how, reason, tmp_path):
    _, recipe, _ = after("dynamic", 4)
    recipe.save(tmp_path / FILE)
    fresh = MODELS["ours"]()
    resumed, _ = started(fresh, "dynamic")
    before = values(fresh)
    with pytest.raises(ValueError, match=reason):
        resumed.load(damaged(tmp_path / FILE, how, tmp_path))
    assert equal(values(fresh), before)
    assert resumed.step == 0
    with pytest.raises(FileNotFoundError):
        resumed.load(tmp_path / "none.safetensors")
    resumed.load(tmp_path / FILE)
    assert resumed.step == 4


@pytest.mark.parametrize(("name", "model", "reason"), [
    ("prilora", MODELS["ours"], "of DynamicLoRA, not of PRILoRA"),
    ("dynamic", lambda: ours(depth=2, train=["head"]), "layers.2"),
    ("dynamic", ours, "head"),
    ("dynamic", MODELS["all supports"], "in one of them only"),
])  # fmt: skip
def test_the_state_of_another_model_changes_nothing(name, model, reason, tmp_path):
    saved, recipe, _ = after("dynamic", 6)
    assert len({own.rank for own in low_rank(saved, "the test").values()}) > 1
    recipe.save(tmp_path / FILE)
    fresh = model()
    resumed, _ = started(fresh, name)
    before = values(fresh)
    with pytest.raises(ValueError, match=reason):
        resumed.load(tmp_path / FILE)
    assert equal(values(fresh), before)
    assert resumed.step == 0


def test_a_state_of_other_sizes_is_refused_with_the_name():
    _, recipe, _ = after("dynamic", 6)
    state = recipe.state_dict()
    state["tensors"]["model/head.weight"] = torch.zeros(3, K)
    fresh = MODELS["ours"]()
    before = values(fresh)
    with pytest.raises(ValueError, match=r"head.weight.* \[3, 16\] in the state, \[5, 16\] here"):
        started(fresh, "dynamic")[0].load_state_dict(state)
    assert equal(values(fresh), before)


@pytest.mark.parametrize("name", ["chain, base", "xgb", "xgb, chain", "chain"])
def test_a_state_from_before_a_restart_does_not_pass_for_that_of_after(name):
    model, recipe, optimizer = after(name, 2)
    early = copy.deepcopy(recipe.state_dict())
    train(model, recipe, optimizer, [3])
    before = values(model)
    with pytest.raises(ValueError, match="restarted after this state was made"):
        recipe.load_state_dict(early)
    assert equal(values(model), before)


@pytest.mark.parametrize("name", ["beam", "diffora", "dynamic", "prilora", "mtl", "chain, base"])
def test_a_run_can_go_back_to_an_earlier_state(name):
    model, recipe, optimizer = after(name, 4)
    state, of_optimizer = copy.deepcopy(recipe.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = train(model, recipe, optimizer, range(5, STEPS + 1))
    recipe.load_state_dict(state)
    optimizer.load_state_dict(of_optimizer)
    assert train(model, recipe, optimizer, range(5, STEPS + 1)) == first


def test_a_state_of_a_compiled_model_is_that_of_the_model(tmp_path):
    model = MODELS["ours"]()
    for i in range(3):
        model.layers[i] = torch.compile(model.layers[i], backend="eager")
    recipe, optimizer = started(model, "beam")
    losses = train(model, recipe, optimizer, range(1, 6))
    assert losses == train(*after_nothing("beam"), range(1, 6))
    recipe.save(tmp_path / FILE)
    fresh, resumed, _ = after_nothing("beam")
    resumed.load(tmp_path / FILE)
    named = {name.replace("_orig_mod.", ""): value for name, value in values(model).items()}
    assert equal(values(fresh), named)


def after_nothing(name, kind="ours"):
    model = MODELS[kind]()
    return (model, *started(model, name))


# What is left


def logits(model, name):
    with gk.tasks(model, 1) if name == "mtl" else nullcontext(), torch.no_grad():
        return model(batch(50)[0])


@pytest.mark.parametrize("name", RECIPES)
def test_finish_leaves_a_plain_adapter(name, tmp_path):
    model, recipe, _ = after(name, 7)
    expected = logits(model, name)
    recipe.finish()
    recipe.finish()
    assert hooks(model) == 0
    if name == "mtl":
        with gk.tasks(model, 1):
            gk.fold_mids(model)
    assert not gk.mids(model)
    assert torch.allclose(model(batch(50)[0]), expected, rtol=0, atol=1e-5)
    if name in ("xgb", "chain, base"):
        with pytest.raises(ValueError, match="merged into its base for good"):
            gk.save_adapter(model, tmp_path / "a.safetensors")
    else:
        gk.save_adapter(model, tmp_path / "a.safetensors")
        again = gk.load_adapter(plain(), tmp_path / "a.safetensors")
        assert torch.allclose(again(batch(50)[0]), expected, rtol=0, atol=1e-5)
    gk.merge(model.eval())
    assert torch.allclose(model(batch(50)[0]), expected, rtol=0, atol=1e-5)
    gk.unmerge(model)
    whole = gk.merge_and_unload(model)
    assert torch.allclose(whole(batch(50)[0]), expected, rtol=0, atol=1e-5)
    assert type(whole.layers[0].q_proj) is nn.Linear


@pytest.mark.parametrize("name", ["beam", "diffora", "dynamic", "prilora"])
@pytest.mark.parametrize("kind", ["peft", "accelerated"])
def test_finish_leaves_what_peft_saves_and_loads(name, kind, tmp_path):
    model, recipe, _ = after(name, 7, kind)
    expected = logits(model, name)
    recipe.finish()
    assert hooks(model) == 0
    assert torch.allclose(logits(model, name), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(plain(), tmp_path)
    assert torch.allclose(again(batch(50)[0]), expected, rtol=0, atol=1e-5)
    assert torch.allclose(model.merge_and_unload()(batch(50)[0]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ours", "accelerated"])
@pytest.mark.parametrize("name", WATCHING)
def test_hooks_go_with_the_recipe(name, kind):
    model, recipe, optimizer = after(name, 4, kind)
    assert hooks(model) > 0
    recipe.finish()
    assert hooks(model) == 0
    recipe, optimizer = started(model, name)
    assert hooks(model) > 0
    del recipe, optimizer
    gc.collect()
    assert hooks(model) == 0


# Cells that run twice


@pytest.mark.parametrize("name", ["dynamic", "prilora", "xgb, chain", "chain, base"])
def test_a_recipe_made_again_takes_the_place_of_the_former(name):
    model = MODELS["ours"]()
    recipe = RECIPES[name](model)
    count = hooks(model)
    recipe = RECIPES[name](model)
    gc.collect()
    assert hooks(model) == count
    optimizer = optimizer_of(model, recipe)
    recipe.bind(optimizer)
    assert train(model, recipe, optimizer, range(1, 8)) == train(*after_nothing(name), range(1, 8))


@pytest.mark.parametrize("name", ["beam", "diffora", "mtl"])
def test_a_second_map_is_refused_and_the_first_stays(name):
    model, recipe, optimizer = after(name, 3)
    before = values(model)
    with pytest.raises(ValueError, match=r"has a map already; call fold_mids"):
        RECIPES[name](model)
    assert equal(values(model), before)
    last = train(model, recipe, optimizer, range(4, 8))
    assert last == train(*after(name, 3), range(4, 8))


# Compiled models, several processes


@pytest.mark.parametrize("name", ["beam", "dynamic", "prilora", "chain"])
def test_recipes_work_on_compiled_models(name):
    torch._dynamo.reset()
    model = MODELS["ours"]()
    compiled = torch.compile(model, backend="eager")
    recipe, optimizer = started(compiled, name)
    losses = train(compiled, recipe, optimizer, range(1, 8))
    expected_model, expected_recipe, expected_optimizer = after_nothing(name)
    expected = train(expected_model, expected_recipe, expected_optimizer, range(1, 8))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert {path: own.rank for path, own in low_rank(model, "the test").items()} == {
        path: own.rank for path, own in low_rank(expected_model, "the test").items()
    }


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", RECIPES)
def test_models_in_ddp_are_refused(name, process_group):
    model = nn.parallel.DistributedDataParallel(MODELS["ours"]())
    before = values(model)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        RECIPES[name](model)
    assert equal(values(model), before)
    assert hooks(model) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_one_process_of_several_is_refused(name, monkeypatch):
    _, recipe, optimizer = after_nothing(name)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    if name == "mtl":  # acts on nothing
        recipe.bind(optimizer)
        return
    with pytest.raises(RuntimeError, match="one process, and this is one of 2"):
        recipe.bind(optimizer)


# Shared factors


def test_a_chain_of_sharelora_goes_into_the_base():
    model = share_lora().double()
    recipe = ChainOfLoRA(model, [3])
    optimizer = optimizer_of(model)
    recipe.bind(optimizer)
    train(model, recipe, optimizer, range(2))
    train(model, None, optimizer, [2])
    expected = adapted_weights(model)
    recipe.after_step()
    layers = low_rank(model, "the test")
    assert layers["layers.0.q_proj"].down.parameter is layers["layers.2.q_proj"].down.parameter
    for path, own in layers.items():
        assert torch.allclose(own.layer.weight, expected[path], rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [
    lambda model: BeamLoRA(model, 10), lambda model: DynamicLoRA(model), lambda model: MTLLoRA(model, 2),
    lambda model: PRILoRA(model), lambda model: XGBLoRA(model, 2),
])  # fmt: skip
def test_sharelora_is_refused_at_once_and_left_alone(make):
    model = share_lora()
    before, trained = values(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"share.*share='none'"):
        make(model)
    assert equal(values(model), before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert hooks(model) == 0


@pytest.mark.parametrize("make", [
    lambda model: BeamLoRA(model, 0), lambda model: BeamLoRA(model, 10, pruned=1.5),
    lambda model: DynamicLoRA(model, period=0), lambda model: DynamicLoRA(model, decay=1.0),
    lambda model: PRILoRA(model, pruned=1.0), lambda model: PRILoRA(model, decay=-0.1),
    lambda model: XGBLoRA(model, 7), lambda model: XGBLoRA(model, 2, steps=0), lambda model: MTLLoRA(model, 0),
    lambda model: BeamLoRA(model, 10, temperature=0.0),
])  # fmt: skip
def test_numbers_that_cannot_be_are_refused_and_change_nothing(make):
    model = ours()
    before = values(model)
    with pytest.raises(ValueError, match="must be"):
        make(model)
    assert equal(values(model), before)
    assert hooks(model) == 0


def test_after_step_leaves_random_numbers_alone():
    _, recipe, _ = after("chain", 2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    recipe.after_step()
    assert torch.equal(torch.rand(3), expected)
    assert loss_of(recipe.model, 1).isfinite()


def test_what_cannot_work_is_said_when_the_recipe_is_made():
    with pytest.raises(ValueError, match="into must be 'base', 'chain' or None, got 'bsae'"):
        ChainOfLoRA(ours(), [3], into="bsae")
    with pytest.raises(ValueError, match="has a base in 4 bits"):
        XGBLoRA(MODELS["4 bits"](), layers=1, into="base")
    with pytest.raises(ValueError, match="period and low must be at least 1"):
        DynamicLoRA(ours(), low=0)
    model = ours()
    optimizer = optimizer_of(model)
    recipe = BeamLoRA(model, steps=10)  # its gains came after the optimizer
    with pytest.raises(ValueError, match=r"the optimizer does not hold all that is trained of .*after the recipe"):
        recipe.bind(optimizer)
    model = ours()
    gates = DiffoRA(model, lambda: loss_of(model, 0))
    with pytest.raises(ValueError, match="all gates are equal"):
        gates.chosen()
    with torch.no_grad():
        gates.parameters[0].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the gate of .* is nan"):
        gates.chosen()
