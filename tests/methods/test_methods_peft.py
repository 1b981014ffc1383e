"""The same mechanisms over PEFT's LoRA layers, plain and accelerated."""

import copy

import pytest
import torch
from method_nets import LORA, X, adam, at_every_line, loss_of, plain, random_, state, step, trained, unchanged

import glora_kernels as gk

peft = pytest.importorskip("peft")
PREFIX = "base_model.model.layers"


def model_of(accelerated, **options):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], **options})
    model = random_(peft.get_peft_model(plain(), config).double())
    return gk.accelerate(model) if accelerated else model


@pytest.fixture(params=[False, True], ids=["plain", "accelerated"])
def make(request, capsys):
    return lambda **options: model_of(request.param, **options)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(plain(), folder).double()


def saved_and_loaded(model, folder):
    """Whether the saved adapter over the plain model is the model."""
    return torch.allclose(reloaded(model, folder)(X), model(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
def test_edits_by_the_index(make, rslora, tmp_path):
    model = make(use_rslora=rslora)
    optimizer = adam(model)
    layer = model.get_submodule(f"{PREFIX}.0.q")
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale, old = layer.scaling["default"], [t.detach().clone() for t in (down, up)]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in (down, up)]
    before = model(X)
    gk.edit_ranks(model, {"*": [3, 0, 1, 2, None]}, optimizer)
    assert torch.allclose(model(X), before, rtol=1e-12)
    assert layer.lora_A["default"].weight is down
    assert torch.equal(down[:4], old[0][[3, 0, 1, 2]])
    assert torch.equal(up, torch.cat([old[1][:, [3, 0, 1, 2]], torch.zeros(8, 1)], 1))
    expected = torch.cat([moments[0][[3, 0, 1, 2]], torch.zeros(1, 6)])
    assert torch.equal(optimizer.state[down]["exp_avg"], expected)
    assert torch.equal(optimizer.state[up]["exp_avg"][:, :4], moments[1][:, [3, 0, 1, 2]])
    assert layer.scaling["default"] == scale
    step(model, optimizer)
    assert saved_and_loaded(model, tmp_path)
    gk.edit_ranks(model, {f"{PREFIX}.0.q": [1]}, optimizer)
    step(model, optimizer)
    assert saved_and_loaded(model, tmp_path)
    expected = model(X)
    assert torch.allclose(model.merge_and_unload()(X), expected, rtol=1e-12)


@pytest.mark.parametrize("pattern", ["q", r"(layers\.\d\.)?q", ".*q", "layers.0.q"])
def test_patterns_of_the_user_are_not_in_the_way(make, pattern, tmp_path):
    model = make(rank_pattern={pattern: 3}, alpha_pattern={pattern: 9, "v": 2})
    gk.set_rank(model, {f"{PREFIX}.0.q": 2})
    assert saved_and_loaded(model, tmp_path)
    assert [reloaded(model, tmp_path).get_submodule(f"{PREFIX}.0.{n}").r["default"] for n in "qv"] == [2, 4]


def test_a_layer_whose_path_is_the_end_of_another_one(tmp_path):
    base = plain()
    base.q = torch.nn.Linear(6, 6).double()
    outer = copy.deepcopy(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q"])).double()
    gk.set_rank(model, {"base_model.model.q": 2})
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(outer, tmp_path)
    assert loaded.base_model.model.q.r["default"] == 2
    assert loaded.base_model.model.layers[0].q.r["default"] == 4


def test_the_given_configuration_is_left_alone(make):
    config = peft.LoraConfig(r=4, target_modules=["q", "v"])
    model = peft.get_peft_model(plain(), config)
    gk.set_rank(model, {"*": 2})
    assert config.rank_pattern == {}
    assert model.peft_config["default"].rank_pattern
    assert model.base_model.peft_config["default"] is model.peft_config["default"]


def test_the_active_adapter_alone_is_changed(make, tmp_path):
    model = make()
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["v"]))
    model.double()
    model.set_adapter("b")
    random_(model, 5)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    before = model(X)
    gk.set_rank(model, {"*": 3})
    assert torch.allclose(model(X), before, rtol=1e-12)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in others.items())
    assert model.get_submodule(f"{PREFIX}.0.v").r == {"default": 4, "b": 3}
    with pytest.raises(ValueError, match=rf"'{PREFIX}\.0\.q' matches no low-rank layer"):
        gk.edit_ranks(model, {f"{PREFIX}.0.q": [0]})  # b is not there
    gk.set_mid(model, "gain")
    assert torch.allclose(model(X), before, rtol=1e-12)
    gk.fold_mids(model)
    assert gk.restart(model) == "base"
    assert torch.allclose(model(X), before, rtol=1e-12)
    model.set_adapter("default")
    gk.set_rank(model, {"q": 1})
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain(), tmp_path / "b", adapter_name="b")
    assert loaded.get_submodule(f"{PREFIX}.0.v").r == {"b": 3}


def test_batches_of_several_adapters_see_the_edit(make):
    model = make()
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q", "v"]))
    model.double().eval()
    names = ["default", "b", "__base__", "b", "default"]
    model(X, adapter_names=names)
    gk.edit_ranks(model, {"*": [3, 0]})
    assert torch.allclose(model(X, adapter_names=names)[[0, 4]], model(X)[[0, 4]], atol=1e-13)


@pytest.mark.parametrize(("kind", "options"), [("gain", {}), ("gate", {}), ("tasks", {"tasks": 2, "ups": 2})])
def test_maps_are_those_of_our_layers(make, kind, options, tmp_path):
    model = make()
    ours = random_(gk.inject(plain(), LORA))
    with torch.no_grad():
        for path in ("0.q", "0.v", "1.q", "1.v"):
            layer, twin = model.get_submodule(f"{PREFIX}.{path}"), ours.get_submodule(f"layers.{path}")
            twin.B_down.copy_(layer.lora_A["default"].weight)
            twin.B_up.copy_(layer.lora_B["default"].weight)
    mine, other = (gk.set_mid(one, kind, **options) for one in (model, ours))
    for (path, mid), twin in zip(mine.items(), other.values(), strict=True):
        assert path.startswith(PREFIX)
        random_(mid, len(path))
        twin.load_state_dict(mid.state_dict())
    ids = [0, 1] if kind == "tasks" else [None]
    for task in ids:
        with gk.tasks(model, task) if ids[0] is not None else torch.enable_grad():
            got = model(X)
            grads = torch.autograd.grad(loss_of(model), trained(model))
        with gk.tasks(ours, task) if ids[0] is not None else torch.enable_grad():
            assert torch.allclose(got, ours(X), rtol=1e-12)
            norm = sum(float(g.square().sum()) for g in torch.autograd.grad(loss_of(ours), trained(ours)))
        assert sum(float(g.square().sum()) for g in grads) == pytest.approx(norm, rel=1e-10)
    copied = copy.deepcopy(model)
    with gk.tasks(model, 1) if kind == "tasks" else torch.enable_grad():
        gk.fold_mids(model)
    assert torch.allclose(model(X), got, rtol=1e-12)
    assert saved_and_loaded(model, tmp_path)
    with gk.tasks(copied, 1) if kind == "tasks" else torch.enable_grad():
        assert torch.allclose(copied(X), got, rtol=1e-12)  # a copy keeps its maps


def test_tasks_of_a_batch_need_accelerated_layers(make):
    model = make()
    gk.set_mid(model, "tasks", tasks=2)
    ids = torch.tensor([0, 1, 1, 0, 1])
    if not hasattr(model.get_submodule(f"{PREFIX}.0.q"), "adapter_names"):
        with pytest.raises(RuntimeError, match=r"several tasks in a batch need PEFT's layers accelerated"):
            gk.tasks(model, ids).__enter__()
        return
    random_(model, 3)
    alone = []
    for task in (0, 1):
        with gk.tasks(model, task):
            alone.append(model(X))
    with gk.tasks(model, ids):
        assert torch.allclose(model(X), torch.where(ids[:, None] == 1, alone[1], alone[0]), rtol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_restart_into_the_base(make, bias, tmp_path):
    model = make(lora_bias=bias)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer.weight" in n}
    total = dict.fromkeys(start, 0.0)
    optimizer = adam(model)
    for rank in (2, 3):
        for name in total:
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            total[name] = total[name] + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        before = model(X)
        assert gk.restart(model, optimizer, rank=rank) == "base"
        assert torch.allclose(model(X), before, rtol=1e-12, atol=1e-12)
        assert not optimizer.state
        for name, value in start.items():
            assert torch.allclose(model.get_parameter(name), value + total[name], rtol=0, atol=1e-13)
        with model.disable_adapter():
            assert torch.allclose(model(X), before, rtol=1e-12, atol=1e-12)
        step(model, optimizer)
    assert reloaded(model, tmp_path).get_submodule(f"{PREFIX}.0.q").r["default"] == 3


def half(std, **options):
    base = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"], **options))
    with torch.no_grad():
        torch.nn.init.normal_(base[0].base_layer.weight, std=0.02)
        for p in trained(model):
            p.normal_(std=(std / 2) ** 0.5)
    return model


def test_16_bit_bases():
    assert gk.restart(half(1e-2, lora_alpha=4)) == "base"
    model = half(1e-5, lora_alpha=4)
    before = state(model)
    for into, message in (("base", "bfloat16.* would lose .*%"), ("chain", "layer of PEFT"), (None, "GLoRA layers")):
        with pytest.raises(ValueError, match=rf"'base_model\.model\.0' .*{message}"):
            gk.restart(model, into=into)
        assert unchanged(before, state(model))


def merged(model):
    model.merge_adapter()


def both(model):
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q", "v"]))
    model.base_model.set_adapter(["default", "b"])


@pytest.mark.parametrize(
    ("options", "act", "message"),
    [
        ({}, merged, r"it is merged; call unmerge_adapter\(\)"),
        ({"use_dora": True}, None, r"a variant of LoRA \(DoRA"),
        ({}, both, r"2 active adapters, and only one can be changed; call set_adapter"),
    ],
)
def test_refusals_change_nothing(make, options, act, message):
    model = make(**options)
    if act is not None:
        act(model)
    before = state(model)
    for change in (
        lambda: gk.set_rank(model, {"*": 1}),
        lambda: gk.set_mid(model, "gain"),
        lambda: gk.restart(model, into="base"),
    ):
        with pytest.raises(ValueError, match=rf"'{PREFIX}\.\d\.\w' cannot be changed: .*{message}"):
            change()
        assert unchanged(before, state(model))
    with pytest.raises(ValueError, match="layer of PEFT" if act is None and not options else message):
        gk.restart(model, into="chain")
    assert unchanged(before, state(model))


@pytest.mark.parametrize("kind", ["rite", "lora+", "lora-fa"])
def test_optimizers(make, kind):
    pytest.importorskip("pytorch_optimizer")
    model = make()
    optimizer = gk.optimizer(model, kind, 0.01, **({"update_skipping": 0.0} if kind == "rite" else {}))
    first = float(step(model, optimizer).detach())
    for _ in range(10):
        last = float(step(model, optimizer).detach())
    assert last < first


def test_observation(make):
    model = make()
    with gk.observe(model, "sensitivity") as seen, gk.observe(model, "input_norm") as norms:
        loss_of(model).backward()
    layer = model.get_submodule(f"{PREFIX}.0.q")
    own = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert float(seen[f"{PREFIX}.0.q"]) == pytest.approx(sum(float((p * p.grad).abs().sum()) for p in own), rel=1e-5)
    assert torch.allclose(norms[f"{PREFIX}.0.q"], X.abs().mean(0).float(), rtol=1e-6)


@pytest.mark.parametrize("change", ["edit", "base", "tasks"])
def test_an_interrupt_leaves_the_output(change, make):
    acts = {
        "edit": lambda m: gk.edit_ranks(m, {"*": [3, 2, 1, 0, None]}),
        "base": lambda m: gk.restart(m, rank=2),
        "tasks": lambda m: gk.set_mid(m, "tasks", tasks=2),
    }
    model = make()
    expected = model(X)

    def check(one):
        with gk.tasks(one, 0) if gk.mids(one) else torch.enable_grad():
            assert torch.allclose(one(X), expected, rtol=1e-12, atol=1e-12)
            loss_of(one).backward()

    at_every_line(lambda: copy.deepcopy(model), acts[change], check, most=8)
