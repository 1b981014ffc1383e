"""PEFT's models on our operators compute what PEFT computes, through everything PEFT can do to an adapter.

The oracle is PEFT's own forward and autograd in float64; at 16 bits it is the float64 truth, which ours may miss by
twice what PEFT misses it by.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import pickle

import pytest
import torch
from peft import GloraConfig, HiraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.glora.layer import GloraLinear
from peft.tuners.hira.layer import Linear as HiraLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from twins import Net, Twins, assert_same, randomized, step

import glora_kernels as gk
from glora_kernels.reference.tolerance import allowed_error, largest_error

ALL, LINEAR = ["up", "mix", "down"], ["up", "down"]
CONFIGS = {
    "lora": (lambda: LoraConfig(r=3, target_modules=ALL), 3),
    "patterns": (
        lambda: LoraConfig(
            r=3, lora_alpha=5, target_modules=ALL, rank_pattern={"down": 5}, alpha_pattern={"mix": 1}, use_rslora=True
        ),
        3,
    ),
    "lora_bias": (lambda: LoraConfig(r=3, lora_alpha=5, target_modules=ALL, lora_bias=True), 3),
    "bias of all": (lambda: LoraConfig(r=3, target_modules=["up"], bias="all"), 1),
    "bias of lora": (lambda: LoraConfig(r=3, target_modules=ALL, bias="lora_only"), 3),
    "modules_to_save": (lambda: LoraConfig(r=3, target_modules=["up", "mix"], modules_to_save=["down"]), 2),
    "hira": (lambda: HiraConfig(r=3, target_modules=ALL), 3),
    "glora": (lambda: GloraConfig(r=3, target_modules=LINEAR), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_one_step_is_pefts(twins, x, name, bias):
    config, ours = CONFIGS[name]
    pair = twins(config(), bias=bias)
    trained = {n for n, p in pair.plain.named_parameters() if p.requires_grad}
    assert trained <= step(pair.fast, x).keys()
    for given in (x, x[0], x[0, 0], x[:0], x.transpose(0, 1)):
        pair.check(given, ours)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_every_mode_of_glora(calls, bias):
    torch.manual_seed(0)
    modes = itertools.product(
        ("lora", "vector", "constant", "none"), ("lora", "vector", "none"), ("vector", "constant", "none")
    )
    for a_b, c, d_e in modes:
        config = GloraConfig(r=3, config_A_B=a_b, config_C=c, config_D_E=d_e)
        layer = randomized_layer(GloraLinear(nn.Linear(11, 6, bias=bias), "default", config).double())
        pair = Twins(layer, calls)
        for lead in ((4,), (2, 3)):
            x = torch.randn(*lead, 11, dtype=torch.float64)
            pair.check(x, 1)
            used = {name for name, value in calls[0].tensors.items() if isinstance(value, torch.Tensor)}
            assert {name[0].lower() for name in used} == expected_letters(a_b, c, d_e, bias)


def randomized_layer(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return layer


def expected_letters(a_b, c, d_e, bias):
    given = {"a": a_b, "b": a_b, "c": c if bias else "none", "d": d_e if bias else "none"}
    given["e"] = given["d"]
    return {letter for letter, form in given.items() if form != "none"}


CASES_16 = [
    ("lora", torch.bfloat16, torch.bfloat16, False),
    ("lora", torch.bfloat16, torch.float32, False),
    ("lora", torch.float32, torch.float32, True),
    ("lora", torch.bfloat16, torch.float32, True),
    ("lora", torch.float16, torch.float16, False),
    ("hira", torch.bfloat16, torch.bfloat16, False),
    ("hira", torch.float32, torch.float32, True),
    ("glora", torch.bfloat16, torch.bfloat16, False),
    ("glora", torch.bfloat16, torch.float32, False),
    ("glora", torch.float32, torch.float32, True),
]


@pytest.mark.parametrize(("name", "base", "adapters", "autocast"), CASES_16)
def test_sixteen_bits_are_as_exact_as_pefts(adapted, calls, name, base, adapters, autocast):
    """A layer in 16 bits, fp32 adapters over one, and fp32 under autocast, against the truth in float64."""
    config = {"lora": LoraConfig, "hira": HiraConfig, "glora": GloraConfig}[name](r=3, target_modules=["up"])
    model = adapted(config, net=nn.ModuleDict({"up": nn.Linear(64, 24)})).base_model.model["up"]
    for part, parameter in model.named_parameters():
        parameter.data = parameter.data.to(base if part.startswith("base_layer") else adapters)
    pair = Twins(model, calls)
    x, dy = torch.randn(40, 64).to(base), torch.randn(40, 24).to(torch.bfloat16 if autocast else base)
    truth = step(copy.deepcopy(model).double(), x.double(), dy.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, got = step(pair.plain, x, dy), step(pair.fast, x, dy)
    assert len(calls) == 1
    dtype = torch.bfloat16 if autocast else base
    for part, value in truth.items():
        assert got[part].dtype == expected[part].dtype, part
        assert largest_error(got[part], value) <= allowed_error(value, expected[part], dtype), part


def test_adapters_are_added_switched_scaled_and_deleted(twins, x):
    pair = twins(CONFIGS["patterns"][0]())
    pair.both(lambda m: m.add_adapter("other", LoraConfig(r=2, lora_alpha=7, target_modules=["up", "down"])))
    pair.check(x, 3)
    pair.both(lambda m: m.set_adapter("other"))
    pair.check(x, 2)
    pair.both(lambda m: m.base_model.set_adapter(["default", "other"]))
    pair.check(x, 3)
    pair.both(lambda m: [layer.scale_layer(2.0) for layer in m.modules() if isinstance(layer, LoraLinear)])
    pair.check(x, 3)
    pair.both(lambda m: [layer.set_scale("other", 0.3) for layer in m.modules() if isinstance(layer, LoraLinear)])
    pair.check(x, 3)
    pair.both(lambda m: [layer.unscale_layer() for layer in m.modules() if isinstance(layer, LoraLinear)])
    with rescale_adapter_scale(pair.plain, 0.5), rescale_adapter_scale(pair.fast, 0.5):
        pair.check(x, 3)
    pair.check(x, 3)
    with pair.plain.disable_adapter(), pair.fast.disable_adapter():
        assert torch.equal(pair.plain(x), pair.fast(x))
    pair.check(x, 3)
    pair.both(lambda m: m.base_model.set_adapter("default"))
    pair.both(lambda m: m.add_weighted_adapter(["default", "default"], [0.7, 0.5], "sum", combination_type="cat"))
    pair.both(lambda m: m.set_adapter("sum"))
    pair.check(x, 3)
    pair.both(lambda m: m.delete_adapter("sum"))
    pair.both(lambda m: m.delete_adapter("default"))
    pair.check(x, 2)
    assert pair.plain.get_model_status() == pair.fast.get_model_status()
    assert pair.plain.get_layer_status() == pair.fast.get_layer_status()


@pytest.mark.parametrize("name", ["lora_bias", "hira", "glora"])
def test_several_active_adapters(twins, x, name):
    config, ours = CONFIGS[name]
    pair = twins(config())
    pair.both(lambda m: m.add_adapter("other", config()))
    pair.both(lambda m: m.base_model.set_adapter(["default", "other"]))
    pair.check(x, ours)


def test_glora_adapters_of_two_forms_run_as_pefts(twins, x):
    pair = twins(GloraConfig(r=3, target_modules=LINEAR, config_A_B="vector"))
    pair.both(lambda m: m.add_adapter("other", GloraConfig(r=3, target_modules=LINEAR, config_A_B="constant")))
    pair.both(lambda m: m.add_adapter("third", GloraConfig(r=3, target_modules=LINEAR, config_A_B="lora")))
    pair.both(lambda m: m.base_model.set_adapter(["default", "other"]))
    pair.check(x, 2)
    pair.both(lambda m: m.base_model.set_adapter(["default", "third"]))
    pair.check(x, 0)
    assert gk.acceleration(pair.fast).kept == {
        ("glora.GloraLinear", "its active adapters have one support in two forms"): 2
    }


@pytest.mark.parametrize("name", ["lora_bias", "hira", "glora"])
def test_merging(twins, x, name):
    config, ours = CONFIGS[name]
    pair = twins(config())
    pair.both(lambda m: m.merge_adapter(safe_merge=True))
    assert torch.equal(pair.plain(x), pair.fast(x))
    pair.both(lambda m: m.unmerge_adapter())
    pair.check(x, ours)
    copies = [copy.deepcopy(model) for model in pair]
    merged = [model.merge_and_unload() for model in pair]
    assert repr(merged[0]) == repr(merged[1]) == repr(Net().double())
    assert_same(merged[1].state_dict(), merged[0].state_dict(), 0.0)
    plain, fast = (model.unload() for model in copies)
    assert_same(fast.state_dict(), plain.state_dict(), 0.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_others_see_is_unchanged(adapted, name, tmp_path):
    """Names, types, printed form, checkpoints; and PEFT's classes, which other models use."""
    forwards = {kind: kind.forward for kind in (LoraLinear, HiraLinear, GloraLinear)}
    plain = adapted(CONFIGS[name][0]())
    fast = copy.deepcopy(plain)
    parameters = dict(fast.named_parameters(remove_duplicate=False))
    assert gk.accelerate(fast, verbose=False) is fast
    assert all(kind.forward is forward for kind, forward in forwards.items())
    after = dict(fast.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys()
    assert all(after[n] is p for n, p in parameters.items())
    assert repr(fast) == repr(plain)
    assert_same(fast.state_dict(), plain.state_dict(), 0.0)
    assert_same(get_peft_model_state_dict(fast), get_peft_model_state_dict(plain), 0.0)
    for (path, layer), original in zip(fast.named_modules(), plain.modules(), strict=True):
        assert isinstance(layer, type(original)), path
        assert type(layer).__name__ == type(original).__name__, path
    fast.save_pretrained(tmp_path / "fast")
    plain.save_pretrained(tmp_path / "plain")
    file, config = "adapter_model.safetensors", "adapter_config.json"
    assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    configs = [json.loads((tmp_path / name / config).read_text()) for name in ("fast", "plain")]
    for values in configs:
        values["target_modules"].sort()  # a set, in the order of its hashes
    assert configs[0] == configs[1]


def test_a_checkpoint_comes_into_an_accelerated_model(twins, x, tmp_path):
    pair = twins(LoraConfig(r=3, target_modules=ALL))
    saved = randomized(get_peft_model(Net().double(), LoraConfig(r=5, lora_alpha=3, target_modules=ALL)), size=0.2)
    saved.save_pretrained(tmp_path)
    for model in pair:  # without `both`: its numbers are the file's
        model.load_adapter(tmp_path, "loaded", autocast_adapter_dtype=False)
        model.set_adapter("loaded")
    pair.check(x, 3)
    for model in pair:
        model.load_adapter(tmp_path, "light", autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        model.set_adapter("light")
    pair.check(x, 3)
    torch.manual_seed(0)
    again = gk.accelerate(
        PeftModel.from_pretrained(Net().double(), tmp_path, autocast_adapter_dtype=False), verbose=False
    )
    assert_same({"y": again(x)}, {"y": pair.plain(x)})


def test_hot_swapping(twins, x, tmp_path):
    for rank in (2, 4):
        torch.manual_seed(rank)
        other = get_peft_model(Net().double(), LoraConfig(r=rank, lora_alpha=rank + 3, target_modules=ALL))
        randomized(other, size=0.1 * rank).save_pretrained(tmp_path / str(rank))
    pair = twins(LoraConfig(r=4, lora_alpha=5, target_modules=ALL))
    for model in pair:
        hotswap_adapter(model, tmp_path / "4", "default")
    pair.check(x, 3)
    for model in pair:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    pair.check(x, 3)
    for model in pair:
        model.to("cpu").double()
        hotswap_adapter(model, tmp_path / "2", "default")
    pair.check(x, 3)


def test_the_scale_that_compiled_code_reads_follows_every_change(adapted, x, tmp_path):
    """torch.compile reads `scaling` from tensors; whatever sets it must reach them, or the number is wrong there."""
    model = gk.accelerate(adapted(LoraConfig(r=4, lora_alpha=5, target_modules=ALL)), verbose=False)
    layer = model.base_model.model.up

    def agree():
        tensors = {name: float(t) for name, t in layer._glora_scales.items()}
        return tensors == {name: float(value) for name, value in layer.scaling.items()}

    assert agree()
    with rescale_adapter_scale(model, 0.5):
        assert agree()
        layer.scale_layer(3.0)
        assert agree()
    assert agree()
    layer.scale_layer(2.0)
    layer.scaling.update(default=0.7)
    assert agree()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=7, target_modules=ALL))
    model.delete_adapter("default")
    assert list(layer.scaling) == ["other"]
    assert agree()
    prepare_model_for_compiled_hotswap(model)
    model.to("meta")  # a move to another device and back
    model.to_empty(device="cpu")
    layer.scaling["other"].fill_(9.0)
    assert agree()


def test_what_is_set_in_inference_mode_can_be_set_afterwards(twins, x):
    """The tensors that compiled code reads the scales from are made there, and written to later."""
    pair = twins(LoraConfig(r=3, lora_alpha=5, target_modules=ALL))
    gk.decelerate(pair.fast)
    with torch.inference_mode():
        gk.accelerate(pair.fast, verbose=False)
        with rescale_adapter_scale(pair.plain, 0.5), rescale_adapter_scale(pair.fast, 0.5):
            torch.testing.assert_close(pair.fast(x), pair.plain(x))
    pair.both(lambda m: [layer.scale_layer(3.0) for layer in m.modules() if isinstance(layer, LoraLinear)])
    pair.check(x, 3)


def test_an_optimizer_made_before_keeps_working(twins, x):
    """Ten steps of Adam, accelerated after the third and given back after the seventh, equal PEFT's alone."""
    for name in ("lora_bias", "glora"):
        pair = twins(CONFIGS[name][0]())
        gk.decelerate(pair.fast)
        optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-2) for m in pair]
        for i in range(10):
            if i == 3:
                gk.accelerate(pair.fast, verbose=False)
            if i == 7:
                gk.decelerate(pair.fast)
            losses = []
            for model, optimizer in zip(pair, optimizers, strict=True):
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            assert_same({"loss": losses[1]}, {"loss": losses[0]}, 1e-10)
        assert_same(pair.fast.state_dict(), pair.plain.state_dict(), 1e-9)


@pytest.mark.parametrize("name", ["lora", "hira", "glora"])
def test_copies(twins, x, name):
    """deepcopy, pickle and torch.save give accelerated models with state of their own."""
    pair = twins(CONFIGS[name][0]())
    expected = step(pair.plain, x)
    buffer = io.BytesIO()
    torch.save(pair.fast, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(pair.fast), pickle.loads(pickle.dumps(pair.fast)), torch.load(buffer, weights_only=False),
    ]  # fmt: skip
    for other in copies:
        pair.calls.clear()
        assert_same(step(other, x), expected)
        assert len(pair.calls) == CONFIGS[name][1]
        for layer in other.modules():
            if isinstance(layer, LoraLinear):
                layer.scale_layer(3.0)
                assert layer._glora_scales is layer.scaling.tensors
                assert float(layer._glora_scales["default"]) == layer.scaling["default"]
    pair.check(x, CONFIGS[name][1])
    gk.decelerate(copies[0])


@pytest.mark.parametrize("name", ["lora_bias", "hira", "glora"])
def test_functional_call(twins, x, name):
    """The parameters of the call, not those of the module, and their gradients."""
    pair = twins(CONFIGS[name][0]())
    found = []
    for model in pair:
        given = {n: (p * 1.5).detach().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
        pair.calls.clear()
        y = functional_call(model, given, (x,))
        wanted = {n: p for n, p in given.items() if p.requires_grad}
        grads = torch.autograd.grad(y.square().sum(), list(wanted.values()))
        found.append({"y": y.detach(), **dict(zip(wanted, grads, strict=True))})
    assert len(pair.calls) == CONFIGS[name][1]
    assert_same(found[1], found[0])


def test_ddp_around_it_and_before_it(twins, x, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for before in (True, False):
            pair = twins(LoraConfig(r=3, target_modules=ALL))
            if before:
                gk.decelerate(pair.fast)
            wrapped = nn.parallel.DistributedDataParallel(pair.fast)
            if before:
                gk.accelerate(wrapped, verbose=False)
            expected = {f"module.{n}" if n not in "yx" else n: v for n, v in step(pair.plain, x).items()}
            for _ in range(2):
                pair.calls.clear()
                assert_same(step(wrapped, x), expected)
                assert len(pair.calls) == 3
            # The last owner of the group would wait, holding Python's lock, for a thread that needs it.
            del wrapped
            gc.collect()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpointing(adapted, x, reentrant, dropout):
    """The recomputed forward drops the elements of the first one: gradients equal those without checkpointing."""
    model = gk.accelerate(adapted(LoraConfig(r=3, target_modules=ALL, lora_dropout=dropout)), verbose=False).train()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    torch.manual_seed(3)
    expected = {n if n in "yx" else f"inner.{n}": v for n, v in step(model, x).items()}
    torch.manual_seed(3)
    assert_same(step(Checkpointed(), x), expected)


def test_dropout(adapted, x):
    """In eval PEFT's numbers; in training the mask of forward is the one of backward, drawn anew, p of it zero."""
    p = 0.4
    config = LoraConfig(r=8, target_modules=["up"], lora_dropout=p)
    plain = adapted(config)
    fast = gk.accelerate(copy.deepcopy(plain), verbose=False)
    assert_same(step(fast.eval(), x), step(plain.eval(), x))
    layer = fast.train().base_model.model.up
    with torch.no_grad():  # y = Σ over r of the dropped ones
        layer.base_layer.weight.zero_(), layer.base_layer.bias.zero_()
        layer.lora_A.default.weight.zero_(), layer.lora_B.default.weight.zero_()
        layer.lora_A.default.weight[0] = 1.0
        layer.lora_B.default.weight[0, 0] = layer.scaling["default"] ** -1
    rows = torch.ones(400, 20, dtype=torch.float64, requires_grad=True)
    y = layer(rows)
    y[:, 0].sum().backward()
    kept = rows.grad  # mask / (1 - p)
    values = kept.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - p)], dtype=torch.float64))
    torch.testing.assert_close(y[:, 0].detach(), kept.sum(1))
    share = float((kept == 0).double().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    assert not torch.equal(layer(rows.detach()), y)


def test_several_dropouts_and_hira_dropout_run_as_pefts(twins, x):
    """Masks are torch's there: equal element by element under one seed."""
    drop = LoraConfig(r=3, target_modules=ALL, lora_dropout=0.5)
    several = twins(drop)
    several.both(lambda m: m.add_adapter("other", drop))
    several.both(lambda m: m.base_model.set_adapter(["default", "other"]))
    hira = twins(HiraConfig(r=3, target_modules=ALL, hira_dropout=0.5))
    for pair in (several, hira):
        outs = []
        pair.calls.clear()
        for model in pair:
            torch.manual_seed(9)
            outs.append(step(model.train(), x))
        assert not pair.calls
        assert_same(outs[1], outs[0], 0.0)
        pair.both(lambda m: m.eval())
        pair.check(x, 3)


def test_decelerate_leaves_nothing(twins, x):
    for name in ("lora_bias", "hira", "glora"):
        pair = twins(CONFIGS[name][0]())
        step(pair.fast, x)
        assert gk.decelerate(pair.fast) is pair.fast
        for layer, original in zip(pair.fast.modules(), pair.plain.modules(), strict=True):
            assert type(layer) is type(original)
            assert vars(layer).keys() == vars(original).keys()
            if isinstance(layer, LoraLinear):
                assert type(layer.scaling) is dict
                assert layer.scaling == original.scaling
        pair.check(x, 0)
        assert gk.decelerate(pair.fast) is pair.fast
        gk.accelerate(pair.fast, verbose=False)
        pair.check(x, CONFIGS[name][1])


class ReadsQ(nn.Module):
    """A module that reads the weight of `q` and calls `p`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.p = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.p(nn.functional.linear(x, self.q.weight))


def test_a_layer_whose_weight_a_module_reads_stays_pefts_and_the_report_says_so():
    model = get_peft_model(nn.Sequential(ReadsQ()), LoraConfig(r=2, target_modules=["q", "p"]))
    for _ in "ab":
        report = gk.acceleration(gk.accelerate(model, verbose=False))
        assert report.accelerated == {"lora.Linear": 1}
        assert [why for _, why in report.kept] == [
            "ReadsQ.forward (test_accelerate.py) reads its weight without calling it, and misses its adapter there"
        ]
    with pytest.raises(ValueError, match="reads its weight without calling it"):
        gk.accelerate(get_peft_model(nn.Sequential(ReadsQ()), LoraConfig(r=2, target_modules=["q"])))
