"""Several adapters on one model: adding, choosing, deleting; merging; files, states and copies; refusals."""

import copy
import json

import pytest
import torch
from adapter_files import assert_same, contents
from copies import COPIES
from many import (  # fmt: skip
    EIGHT,
    F64,
    LORA,
    WIDE,
    Net,
    alone,
    fingerprint,
    grads,
    many,
    mixed,
    near,
    randomized,
    two,
    unchanged,
    x_of,
)
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear, ShareLoRAConfig
from glora_kernels.nn.model import named_layers

NAMES = ["b", None, "default", "b"]


def test_adding_changes_nothing_yet():
    model, x = many(["default"]), x_of()
    before, y = dict(model.named_parameters()), model(x)
    gk.add_adapter(model, "b", GLoRAConfig("lora", "lora", "lora", "vector", "vector"))
    assert torch.equal(model(x), y)
    near(mixed(model, x, ["b"] * 4), alone(model, x, [None] * 4))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(after[name].requires_grad for name in after.keys() - before.keys())
    assert {name.split(".adapters.b.")[1] for name in after.keys() - before.keys()} == {
        "A_up", "A_down", "B_up", "B_down", "C_up", "C_down", "D", "E"
    }  # fmt: skip
    assert gk.adapters(model) == ("default", "b")


def test_layers_that_were_plain():
    model, x = many(["default"]), x_of()
    down = model.blocks[0].down
    y = model(x)
    gk.add_adapter(model, "b", WIDE, ["down", "head"])
    assert torch.equal(model(x), y)
    assert not set(gk.adapters(model.blocks[0].down)) - {"b"}
    assert model.blocks[0].down.weight is down.weight
    near(randomized(model)(x), many(["default"])(x))
    gk.set_adapter(model, "b")
    assert not torch.allclose(model(x), y, atol=1e-3)
    near(model(x), mixed(model, x, ["b"] * 4))
    plain = gk.merge_and_unload(model)
    assert not any(isinstance(m, GLoRALinear) for m in plain.modules())
    assert all(p.requires_grad for p in plain.parameters())
    assert type(plain.blocks[0].down) is nn.Linear


def test_targets():
    def where(*args, **more):
        model = gk.add_adapter(many(["default"]), "b", WIDE, *args, **more)
        return {path for path, layer in named_layers(model).items() if "b" in layer.named()}

    every = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "mix")}
    downs = {"blocks.0.down", "blocks.1.down"}
    assert where() == every
    assert where(exclude_modules=["mix"]) == {"blocks.0.up", "blocks.1.up"}
    assert where("all-linear") == every | downs
    assert where("all-linear", exclude_modules="blocks.0.*") == {f"blocks.1.{n}" for n in ("up", "mix", "down")}
    assert where(["down"]) == downs
    with pytest.raises(ValueError, match="no linear layer is left"):
        where(exclude_modules=["up", "mix"])


def test_deleting():
    model, x = many(), x_of(3)
    wanted = alone(model, x, ["wide", "default", "mapped"])
    gk.delete_adapter(model, "shared")
    gk.delete_adapter(model, "rich")
    assert gk.adapters(model) == tuple(name for name in EIGHT if name not in ("shared", "rich"))
    assert not any("shared" in name or "rich" in name for name in model.state_dict())
    near(mixed(model, x, ["wide", "default", "mapped"]), wanted)
    near(mixed(model, x, torch.tensor([1, 0, 5])), wanted)
    gk.add_adapter(model, "rich", LORA)
    assert gk.adapters(model)[-1] == "rich"
    single = two()
    gk.add_adapter(single, "c", WIDE, ["head"])
    gk.delete_adapter(single, "c")
    near(single.head(x), nn.functional.linear(x, single.head.weight, single.head.bias))
    assert gk.adapters(single.head) == ()
    gk.delete_adapter(single, "b")
    assert list(single.state_dict()) == list(many(["default"]).state_dict())


def test_shared_factors_of_an_added_adapter(tmp_path):
    model = randomized(gk.add_adapter(many(["default"]), "s", ShareLoRAConfig(rank=3, share="AB"), ["up", "down"]))
    names = {name for name, _ in model.named_parameters() if ".s." in name}
    assert names == {f"blocks.0.{path}.adapters.s.{own}" for path in ("up", "down") for own in ("B_up", "B_down")}
    assert {name for name in model.state_dict() if ".s." in name} == names
    assert {(row.factor, row.adapter, row.uses) for row in gk.shared(model).rows} == {
        ("B_up", "s", 2), ("B_down", "s", 2)
    }  # fmt: skip
    assert "B_up of 's'" in repr(gk.shared(model))
    assert gk.shared(model).unshared == gk.trainable_parameters(model) + sum(
        p.numel() for name, p in model.named_parameters() if ".s." in name
    )
    gk.set_adapter(model, "s")
    x = x_of()
    model(x).square().sum().backward()
    got = grads(model)
    unshared = gk.add_adapter(many(["default"]), "s", ShareLoRAConfig(rank=3, share="none"), ["up", "down"])
    with torch.no_grad():
        for path, layer in named_layers(unshared).items():
            if "s" in layer.named():
                for own, parameter in layer.adapters["s"].named_parameters():
                    parameter.copy_(dict(model.named_parameters())[f"blocks.0.{path[9:]}.adapters.s.{own}"])
    gk.set_adapter(unshared, "s")
    near(unshared(x), model(x))
    unshared(x).square().sum().backward()
    each = grads(unshared)
    for name in names:
        near(got[name], each[name] + each[name.replace("blocks.0", "blocks.1")])
    gk.save_adapter(model, tmp_path / "s", "s")
    assert len(contents(tmp_path / "s")[0]) == 4
    plain = gk.load_adapter(Net().to(F64), tmp_path / "s")
    beside = gk.load_adapter(many(["default"]), tmp_path / "s", "t")
    assert len(gk.shared(plain).rows) == 4
    gk.set_adapter(beside, "t")
    near(beside(x), model(x))
    assert {name.replace(".t.", ".s.") for name, _ in beside.named_parameters() if ".t." in name} == names
    for again in (copy.deepcopy(model), COPIES["torch.save"](model), model.to(torch.float32).to(F64)):
        assert {name for name, _ in again.named_parameters() if ".s." in name} == names
        assert again.blocks[1].up.adapters["s"].values()["B_up"] is again.blocks[0].up.adapters["s"].B_up


def test_tied_siblings_are_the_first_adapters(vit, tmp_path):
    config = ShareLoRAConfig(rank=2, tie_siblings=True)
    model = gk.inject(vit(), LORA)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"add_adapter.*'b' has tie_siblings=True, which only the first"):
        gk.add_adapter(model, "b", config)
    unchanged(model, before)
    x = torch.randn(2, 4, 12)
    for dropout, refused in ((0.0, False), (0.5, True)):
        tied = randomized(gk.inject(vit(), ShareLoRAConfig(rank=2, tie_siblings=True, dropout=dropout)))
        gk.save_adapter(tied, tmp_path / "tied")
        if refused:
            with pytest.raises(ValueError, match="one dropout mask, which only the first"):
                gk.load_adapter(model, tmp_path / "tied", "c")
            unchanged(model, before)
        else:  # without dropout nothing but the values is tied
            beside = gk.load_adapter(copy.deepcopy(model), tmp_path / "tied", "c")
            near(mixed(beside.eval(), x, ["c", "c"]), tied.eval()(x), 1e-5)
            gk.load_adapter(beside, tmp_path / "tied", "c")


@pytest.mark.parametrize("name", ["wide", "rich", "constants", "shared", "mapped"])
def test_merging_is_that_of_the_active_adapter(name):
    model, x = many(), x_of()
    states = model.state_dict()
    base = {key: value.clone() for key, value in states.items()}
    gk.set_adapter(model, name)
    y, plain = model(x), model.eval()(x)
    near(plain, y)
    gk.merge(model)
    near(model(x), y)
    merged = model.state_dict()
    assert not any(".adapters." in key or ".B_up" in key for key in merged)
    with gk.disabled(model):
        near(model(x), alone(copy.deepcopy(model), x, [None] * 4))
    for match, call in {
        "set_adapter: 'blocks.0.up' is merged": lambda: gk.set_adapter(model, "default"),
        "rows: 'blocks.0.up' cannot take .*merged": lambda: mixed(model, x, [None] * 4),
        "add_adapter: 'blocks.0.up' is merged": lambda: gk.add_adapter(model, "new", LORA, ["head"]),
        "active": lambda: gk.delete_adapter(model, name),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            call()
    fresh = Net().to(F64)
    fresh.load_state_dict(merged, strict=False)  # C and E give a bias to layers without one
    with pytest.raises(RuntimeError, match="state is that of a merged layer"):
        many().load_state_dict(merged, strict=False)
    gk.unmerge(model)
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    near(model(x), y)
    near(gk.merge_and_unload(model)(x), y)


def test_states():
    model, x = many(), x_of(len(EIGHT))
    gk.set_adapter(model, "rich")
    other = many(seed=5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert list(other.state_dict()) == list(model.state_dict())
    assert not torch.allclose(mixed(other, x, list(EIGHT)), mixed(model, x, list(EIGHT)))
    assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(mixed(other, x, list(EIGHT)), mixed(model, x, list(EIGHT)))
    state = gk.add_adapter(many(["default"]), "wide", LORA, ["up", "mix", "down"]).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        many(["default", "wide"]).load_state_dict(state)
    with pytest.raises(RuntimeError, match="it comes from another configuration"):
        many(["default", "wide"]).load_state_dict(
            {name.replace("wide.B_up", "wide.A"): value for name, value in state.items()}
        )


def test_files(tmp_path):
    model, x = many(), x_of(3)
    for name in EIGHT:
        gk.set_adapter(model, name)
        y = model(x)
        gk.save_adapter(model, tmp_path / name, name)
        base = Net().to(F64)
        base.load_state_dict({k: v for k, v in model.state_dict().items() if k in base.state_dict()})
        plain = gk.load_adapter(copy.deepcopy(base), tmp_path / name)
        near(plain(x), y)
        assert gk.adapters(plain) == ("default",)
        gk.save_adapter(plain, tmp_path / "again")
        assert_same(tmp_path / "again", tmp_path / name)
        beside = gk.load_adapter(gk.inject(base, WIDE, ["head"]), tmp_path / name, "new")
        assert gk.adapters(beside) == ("default", "new")
        near(mixed(beside, x, ["new"] * 3), y)
        trained = {n for n, p in beside.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in beside.named_parameters() if ".adapters.new." in n or n.startswith("head.B_")}


def test_what_is_loaded_into_an_adapter_keeps_its_memory(tmp_path):
    model, x = two(), x_of()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(0.7 if parameter.requires_grad else 1.0)
    gk.save_adapter(changed, tmp_path / "b", "b")
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    first = alone(model, x, ["default"] * 4)
    gk.load_adapter(model, tmp_path / "b", "b")
    assert {name: (p, p.data_ptr()) for name, p in model.named_parameters()} == before
    near(mixed(model, x, ["b"] * 4), mixed(changed, x, ["b"] * 4))
    assert torch.equal(alone(model, x, ["default"] * 4), first)


def test_files_that_do_not_fit(tmp_path):
    model = two(train=["head"])
    paths = {}
    for key, other in {
        "form": gk.add_adapter(many(["default"], train=["head"]), "b", LORA),
        "layers": gk.add_adapter(many(["default"], train=["head"]), "b", WIDE, ["up", "down"]),
        "no head": two(),
        "another head": gk.add_adapter(many(["default"], train=["head"]), "b", WIDE, ["up", "down"]),
    }.items():
        if key == "another head":
            with torch.no_grad():
                other.head.weight.add_(1.0)
        gk.save_adapter(other, paths.setdefault(key, tmp_path / key), "b")
    narrow = gk.inject(nn.ModuleDict({"blocks": nn.ModuleDict({"7": nn.Linear(3, 3)}), "head": nn.Linear(12, 5)}),
                       LORA, ["blocks.7"], train=["head"])  # fmt: skip
    gk.save_adapter(narrow, paths.setdefault("no layer", tmp_path / "no layer"))
    before, both = fingerprint(model), ("b", "new")
    for key, names, match in (
        ("form", "b", r"does not fit the layer 'blocks.0.(up|mix)': it has rank=3 \(the model: 7\)"),
        ("layers", "b", "adapts the layers"),
        ("no head", both, r"trains the modules not \['head'\], which the model has"),
        ("another head", "new", "other values of 'head.weight', which all adapters of a model have in common"),
        ("no layer", both, "adapts .*'?blocks.7"),
    ):
        for name in (names,) if isinstance(names, str) else names:
            with pytest.raises(ValueError, match=match):
                gk.load_adapter(model, paths[key], name)
            unchanged(model, before)
    with pytest.raises(ValueError, match="a model gets its first adapter by the name 'default', not 'b'"):
        gk.load_adapter(Net(), paths["form"], "b")
    with pytest.raises(ValueError, match="save_adapter: the model has no adapter 'nobody'; it has default, b"):
        gk.save_adapter(model, tmp_path / "x", "nobody")
    assert not (tmp_path / "x").exists()


def test_files_with_trained_biases(tmp_path):
    model = two()
    model.blocks[0].up.bias.requires_grad_()
    gk.save_adapter(model, tmp_path / "b", "b")
    other = gk.load_adapter(many(["default"]), tmp_path / "b", "c")
    assert other.blocks[0].up.bias.requires_grad
    assert gk.load_adapter(other, tmp_path / "b", "c") is other
    with torch.no_grad():
        other.blocks[0].up.bias.add_(1.0)
    before = fingerprint(other)
    for name in ("c", "d"):
        with pytest.raises(ValueError, match=r"other values of 'blocks.0.up.bias', which all adapters"):
            gk.load_adapter(other, tmp_path / "b", name)
        unchanged(other, before)


def test_the_scaling_of_an_adapter(tmp_path):
    model, x = two(), x_of()
    y, base = mixed(model, x, ["b"] * 4), mixed(model, x, [None] * 4)
    gk.save_adapter(model, tmp_path / "one", "b")
    for layer in named_layers(model).values():
        layer.adapters["b"].scaling = 0.5
    scaled = mixed(model, x, ["b"] * 4)
    assert not torch.allclose(scaled, y, atol=1e-3)
    gk.save_adapter(model, tmp_path / "half", "b")
    assert_same(tmp_path / "half", tmp_path / "one")
    with torch.no_grad():
        for layer in named_layers(model).values():
            layer.adapters["b"].B_up.zero_()
    near(mixed(model, x, ["b"] * 4), base)
    gk.load_adapter(model, tmp_path / "one", "b")
    near(mixed(model, x, ["b"] * 4), scaled)
    gk.set_adapter(model, "b")
    gk.merge(model.eval())
    near(model(x), scaled)


@pytest.mark.parametrize("kind", COPIES)
def test_copies(kind):
    model, x = many(), x_of(len(EIGHT))
    gk.set_adapter(model, "rich")
    with gk.rows(model, ["wide"] * len(x)):
        other = COPIES[kind](model)
    near(other(x), model(x))
    gk.set_adapter(other, "wide")
    near(other(x), mixed(model, x, ["wide"] * len(x)))
    near(mixed(other, x, list(EIGHT)), mixed(model, x, list(EIGHT)))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(p.any() for p in model.parameters())


def test_averages():
    model, x, names = many(), x_of(len(EIGHT)), list(EIGHT)
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    gk.set_adapter(model, "rich")
    average.update_parameters(model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(3.0)
    average.update_parameters(model)
    for name, parameter in average.module.named_parameters():
        near(parameter, first[name] * (2.0 if parameter.requires_grad else 1.0))
    near(mixed(average, x, names), mixed(average.module, x, names))
    gk.set_adapter(average, "wide")
    near(average(x), mixed(average, x, ["wide"] * len(x)))


def test_pruned(tmp_path):
    model, x = two(), x_of()
    gk.save_adapter(model, tmp_path / "b", "b")
    adapter = model.blocks[0].up.adapters["b"]
    prune.l1_unstructured(adapter, "B_up", 0.5)
    dense = gk.load_adapter(two(), tmp_path / "b", "b")
    with torch.no_grad():
        dense.blocks[0].up.adapters["b"].B_up.mul_(adapter.B_up_mask)
    mixed(model, x, ["b"] * 4).sum().backward()
    kept = adapter.B_up_mask.bool()
    assert torch.equal(adapter.B_up_orig.grad != 0, kept)
    with torch.no_grad():
        for each in (adapter.B_up_orig, dense.blocks[0].up.adapters["b"].B_up):
            each.mul_(2.0)
    near(mixed(model, x, NAMES), mixed(dense, x, NAMES))
    assert str(model.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    with pytest.raises(RuntimeError, match=r"'blocks.0.up': B_up .* is computed from other parameters \(pruned"):
        gk.load_adapter(model, tmp_path / "b", "b")
    gk.save_adapter(model, tmp_path / "pruned", "b")
    gk.load_adapter(dense, tmp_path / "pruned", "b")
    near(mixed(dense, x, NAMES), mixed(model, x, NAMES))


def test_bad_arguments():
    model = many()
    before, x = fingerprint(model), x_of()
    for error, match, call in (
        (ValueError, "add_adapter: the model has an adapter 'wide' already; it has default, wide",
         lambda: gk.add_adapter(model, "wide", LORA)),
        (ValueError, "'default' already", lambda: gk.add_adapter(model, "default", LORA)),
        (ValueError, "'a.b' cannot be the name", lambda: gk.add_adapter(model, "a.b", LORA)),
        (ValueError, "'training' cannot be the name", lambda: gk.add_adapter(model, "training", LORA)),
        (ValueError, "'keys' cannot be the name", lambda: gk.add_adapter(model, "keys", LORA)),
        (TypeError, "name must be a str, got int", lambda: gk.add_adapter(model, 3, LORA)),
        (TypeError, "config must be", lambda: gk.add_adapter(model, "b", "lora")),
        (ValueError, "target_modules: .*'nothing'", lambda: gk.add_adapter(model, "b", LORA, ["nothing"])),
        (ValueError, "inject", lambda: gk.add_adapter(nn.Linear(3, 3), "b", LORA)),
        (ValueError, "set_adapter: the model has no adapter 'nobody'; it has default, wide",
         lambda: gk.set_adapter(model, "nobody")),
        (ValueError, "delete_adapter: the model has no adapter 'nobody'", lambda: gk.delete_adapter(model, "nobody")),
        (ValueError, "'default' is part of the layers", lambda: gk.delete_adapter(model, "default")),
        (ValueError, "rows: the model has no adapter 'nobody'; accepted are 'default', 'wide'",
         lambda: mixed(model, x, ["nobody"] * 4)),
        (TypeError, "rows: names must be a sequence .* got str", lambda: mixed(model, x, "wide")),
        (TypeError, "names must have a str or None .* got 0; .* tensor", lambda: mixed(model, x, [0, 1, 2, 3])),
        (TypeError, "integers", lambda: mixed(model, x, torch.zeros(4))),
        (TypeError, "integers", lambda: mixed(model, x, torch.tensor(1))),
        (ValueError, "numbers from 0 to 7, .* or -1 .*; got 8", lambda: mixed(model, x, torch.tensor([0, 8, 0, 0]))),
        (ValueError, "got -2", lambda: mixed(model, x, torch.tensor([0, -2, 0, 0]))),
        (ValueError, r"each of \(3,\) examples, but 'blocks.0.up' was called with an x of shape \(4, 3, 12\)",
         lambda: mixed(model, x, [None] * 3)),
        (ValueError, r"each of \(4, 4\)", lambda: mixed(model, x, torch.zeros(4, 4, dtype=torch.int64))),
        (ValueError, "rows: the model has no GLoRA layer", lambda: mixed(nn.Linear(3, 3), x, [None] * 4)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
        unchanged(model, before)
    assert all(layer._rows is None for layer in named_layers(model).values())


def test_inside_the_context():
    model, x = two(), x_of()
    gk.set_adapter(model, "b")
    before = fingerprint(model)
    with gk.rows(model, NAMES):
        for match, call in {
            r"add_adapter\(\) was called inside rows": lambda: gk.add_adapter(model, "c", LORA),
            "delete_adapter: 'b' is active": lambda: gk.delete_adapter(model, "b"),
            r"merge\(\) was called inside rows": lambda: gk.merge(model),
            r"merge\(\) was called inside rows(?s:.*)": lambda: gk.merge_and_unload(model),
        }.items():
            with pytest.raises(RuntimeError, match=match):
                call()
        gk.set_adapter(model, "default")  # takes effect for calls outside
        near(model(x), alone(copy.deepcopy(model), x, NAMES))
        with pytest.raises(RuntimeError, match=r"delete_adapter\(\) was called inside rows"):
            gk.delete_adapter(model, "b")
    gk.set_adapter(model, "b")
    unchanged(model, before)
    with gk.disabled(model), pytest.raises(RuntimeError, match="inside disabled"):
        gk.add_adapter(model, "c", LORA, ["head"])
    unchanged(model, before)


def test_an_adapter_that_cannot_be_computed():
    model, x = two(), x_of()
    model.blocks[0].mix.adapters["b"].to("meta")
    with gk.rows(model, NAMES), pytest.raises(RuntimeError, match=r"'blocks.0.mix'.*on the meta device"):
        model(x)
    near(mixed(model, x, ["default"] * 4), alone(model, x, ["default"] * 4))
    with torch.no_grad():
        near(mixed(model.eval(), x, ["default"] * 4), alone(model, x, ["default"] * 4))
        with pytest.raises(RuntimeError, match=r"'blocks.0.mix'.*'b'.*on the meta device"):
            mixed(model, x, torch.zeros(4, dtype=torch.int64))
    model = two()
    model.blocks[0].mix.adapters["b"].B_up.data = torch.zeros(3, 3, dtype=F64)
    with gk.rows(model, NAMES), pytest.raises(ValueError, match=r"'blocks.0.mix'.*adapters\[1\].*'default', 'b'"):
        model(x)


def test_by_adapter_takes_learning_rates():
    model, rates = two(train=["head"]), {"default": 1e-2, "b": 0.0, None: 1e-3}
    groups = gk.parameter_groups(model, by_adapter=True)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    optimizer = torch.optim.SGD([{**group, "lr": rates[group["adapter"]]} for group in groups])
    mixed(model, x_of(), NAMES).sum().backward()
    optimizer.step()
    moved = {group["adapter"]: [not torch.equal(p, before[id(p)]) for p in group["params"]] for group in groups}
    assert {name: any(own) for name, own in moved.items()} == {"default": True, "b": False, None: True}
    assert json.dumps([group["adapter"] for group in optimizer.param_groups])
