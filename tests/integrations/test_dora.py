"""PEFT's DoRA layers on our operators: PEFT's own steps, its files and its merging, and never a norm of another W."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import Net, Twins, assert_same, randomized, reasons, step

import glora_kernels as gk
from glora_kernels.integrations.accelerated import dora, layers
from glora_kernels.integrations.bases import ON_META, SHARDED_ADAPTER

ALL = ["up", "mix", "down"]


def config(**more):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ALL, "use_dora": True, **more})


KINDS = {
    "plain": {},
    "rank 1": {"r": 1},
    "patterns": {"rank_pattern": {"down": 5}, "alpha_pattern": {"mix": 1}, "use_rslora": True},
    "one layer": {"target_modules": ["mix"]},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_pefts(twins, x, kind, bias):
    pair = twins(config(**KINDS[kind]), bias=bias)
    count = len(pair.plain.peft_config["default"].target_modules)
    assert gk.acceleration(pair.fast).accelerated == {"lora.Linear": count}
    pair.check(x, count)
    for model in pair:
        model.eval()
    pair.check(x, count)
    with torch.inference_mode():
        torch.testing.assert_close(pair.fast(x), pair.plain(x), rtol=1e-12, atol=1e-12)
    pair.check(x, count)
    assert not gk.acceleration(pair.fast).fallbacks


def test_training_is_pefts_step_by_step(twins, x):
    """AdamW over factors and magnitudes, which PEFT starts at the norms of W."""
    torch.manual_seed(0)
    plain = get_peft_model(Net().double(), config(), autocast_adapter_dtype=False)
    fast = gk.accelerate(copy.deepcopy(plain), verbose=False)
    pair = [(m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05)) for m in (plain, fast)]
    start = {name: p.clone() for name, p in plain.named_parameters()}
    for number in range(6):
        target = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        for model, optimizer in pair:
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        assert_same(dict(fast.named_parameters()), dict(plain.named_parameters()), 1e-9)
    moved = {name for name, p in fast.named_parameters() if not torch.equal(p, start[name])}
    assert {name for name in start if "lora_" in name} == moved
    assert sum("magnitude" in name for name in moved) == 3


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "magnitude", "lora_"])
def test_parts_that_are_not_trained(twins, x, frozen):
    pair = twins(config())
    for model in pair:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and frozen not in name)
    pair.check(x, 3)


def test_dropout_runs_on_pefts_path_in_training_alone(twins, x):
    pair = twins(config(lora_dropout=0.5))
    for model in pair:
        model.eval()
    pair.check(x, 3)
    assert not reasons(pair.fast)
    for model in pair:
        model.train()
    assert reasons(pair.fast) == {layers.INPUT_DROPOUT}
    found = []
    for model in pair:
        torch.manual_seed(3)
        found.append(step(model, x))
    assert_same(found[1], found[0], 0.0)
    assert {reason for _, reason in gk.acceleration(pair.fast).fallbacks} == {layers.INPUT_DROPOUT}
    for model in pair:  # dropout that is off inside a layer in training drops nothing
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    pair.check(x, 3)
    for model in pair:  # and PEFT's layers in evaluation leave out dropout that is on
        for module in model.modules():
            module.train(isinstance(module, nn.Dropout))
    expected, got = step(pair.plain, x), step(pair.fast, x)
    assert_same(got, expected, 0.0)


def test_several_active_adapters(twins, x):
    pair = twins(config(target_modules=["up", "mix"]))
    pair.both(lambda model: model.add_adapter("lora", LoraConfig(r=2, target_modules=["up", "down"])))
    for model in pair:
        model.double()
    gk.accelerate(pair.fast, verbose=False)  # "down" is new
    # "mix" has the one alone, "down" the other, "up" both
    for names in (["default", "lora"], ["lora", "default"], ["lora"], ["default"]):
        for model in pair:
            model.base_model.set_adapter(names)
        pair.check(x, 2)
        assert (layers.SEVERAL_WITH_DORA in reasons(pair.fast)) == (len(names) > 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1 - 1e-3, 1 - 1e-5])
def test_rows_of_w_that_the_adapter_cancels(dtype, scale):
    """‖W‖² + 2s⟨W, UD⟩ + s²‖UD‖² is then the small difference of large numbers; the row is computed as written."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 12, bias=False)).double()
    model = randomized(get_peft_model(net, config(target_modules=["0"]), autocast_adapter_dtype=False))
    layer = model.base_model.model[0]
    with torch.no_grad():
        u, d, s = layer.lora_B["default"].weight, layer.lora_A["default"].weight, layer.scaling["default"]
        layer.base_layer.weight[[2, 7, 8]] = -scale * s * (u @ d)[[2, 7, 8]]
        layer.base_layer.weight[[2, 7, 8], 3] += 1e-4  # what is left of them
    model = gk.accelerate(model.to(dtype), verbose=False)
    layer = model.base_model.model[0]
    w, u, d = (
        t.double() for t in (layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    )
    truth = (w + s * u @ d).norm(dim=1)
    base, operands = layer.parts()
    norm = dora.row_norms(base, operands.tensors["B_up"] * 0 + layer.lora_B["default"].weight, d.to(dtype), s, {})
    its = (layer.base_layer.weight + s * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)).norm(dim=1)
    error, plain = ((found.double() - truth).abs() / truth for found in (norm, its))
    rows = torch.tensor([2, 7, 8])
    assert error[rows].max() <= 2 * plain[rows].max() + 8 * torch.finfo(dtype).eps
    rest = [row for row in range(12) if row not in (2, 7, 8)]
    assert error[rest].max() <= 16 * torch.finfo(dtype).eps


def test_merged_unmerged_disabled(twins, x):
    pair = twins(config())
    y = pair.fast(x)
    for safe in (False, True):
        for model in pair:
            model.merge_adapter(safe_merge=safe)
        pair.check(x, 0)
        torch.testing.assert_close(pair.fast(x), y, rtol=1e-11, atol=1e-11)
        for model in pair:
            model.unmerge_adapter()
        pair.check(x, 3)
    with pair.plain.disable_adapter(), pair.fast.disable_adapter():
        pair.check(x, 0)
    plain, fast = (model.merge_and_unload() for model in pair)
    assert_same(fast.state_dict(), plain.state_dict(), 0.0)
    torch.testing.assert_close(fast(x), y, rtol=1e-11, atol=1e-11)


def test_files_are_pefts(twins, x, tmp_path, calls):
    pair = twins(config())
    for name, model in (("plain", pair.plain), ("fast", pair.fast)):
        model.save_pretrained(tmp_path / name)
    weights = [Path(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "fast")]
    assert weights[0] == weights[1]
    assert LoraConfig.from_pretrained(tmp_path / "fast") == LoraConfig.from_pretrained(tmp_path / "plain")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net().double(), tmp_path / "fast", autocast_adapter_dtype=False)
    loaded = gk.accelerate(loaded, verbose=False)
    calls.clear()
    assert torch.equal(loaded(x), pair.fast(x))
    assert len(calls) == 6


def test_added_switched_deleted_copied_and_back(twins, x):
    pair = twins(LoraConfig(r=2, target_modules=ALL))
    for model in pair:
        model.add_adapter("dora", config(), autocast_adapter_dtype=False)
        randomized(model)
        model.set_adapter("dora")
    pair.check(x, 3)
    assert_same(step(copy.deepcopy(pair.fast), x), step(pair.fast, x), 0.0)
    gk.decelerate(pair.fast)
    pair.check(x, 0, 0.0)
    gk.accelerate(pair.fast, verbose=False)
    pair.check(x, 3)
    for model in pair:
        model.delete_adapter("dora")
        model.set_adapter("default")
    pair.check(x, 3)


def scaled_in_place(weight):
    with torch.no_grad():
        weight.mul_(1.7)


def scaled_behind_its_version(weight):
    weight.data.mul_(1.7)


def written_behind_its_version(weight):
    weight.data.copy_(weight.data.flip(0))


def given_other_data(weight):
    weight.data = weight.data * 1.7


def given_other_data_twice(weight):
    """The allocator may give the second one the address of what it was before."""
    kept = weight.data.clone()
    weight.data = kept * 0.3
    weight.data = kept * 1.7


CHANGES = [
    scaled_in_place, scaled_behind_its_version, written_behind_its_version, given_other_data, given_other_data_twice,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change(twins, x, change):
    pair = twins(config())
    pair.check(x, 3)
    for model in pair:
        for name in ALL:
            change(getattr(model.base_model.model, name).base_layer.weight)
    pair.check(x, 3)


def test_weights_that_are_loaded_moved_or_changed_by_another_adapter(twins, x):
    pair = twins(config())
    pair.check(x, 3)
    torch.manual_seed(9)
    other = randomized(get_peft_model(Net().double(), config(), autocast_adapter_dtype=False), 0.7)
    for model in pair:
        model.load_state_dict(other.state_dict())
    pair.check(x, 3)
    for model in pair:
        model.float().double()
    pair.check(x, 3)
    for model in pair:  # merged for good by hand, as ReLoRA does it
        model.add_adapter("lora", LoraConfig(r=2, target_modules=ALL), autocast_adapter_dtype=False)
        randomized(model)
        model.merge_adapter(["lora"])
        for name in ALL:
            getattr(model.base_model.model, name).merged_adapters.clear()
    pair.check(x, 3)
    for model in pair:
        for name in ALL:
            base = getattr(model.base_model.model, name).base_layer
            base.weight = nn.Parameter(base.weight.detach() * 0.5, requires_grad=False)
    pair.check(x, 3)


def test_trained_weights_hooks_and_foreign_parts(twins, x):
    pair = twins(config())
    for model in pair:
        model.base_model.model.up.base_layer.weight.requires_grad_()
        model.base_model.model.mix.lora_magnitude_vector["default"].register_forward_hook(lambda m, given, y: y * 2)
    pair.check(x, 1)
    assert len(reasons(pair.fast)) == 2


def test_rows_and_batches_of_several_adapters(twins, x):
    pair = twins(config())
    for model in pair:
        model.add_adapter("other", config(r=5), autocast_adapter_dtype=False)
        model.add_adapter("lora", LoraConfig(r=2, target_modules=["up"]), autocast_adapter_dtype=False)
        randomized(model)
        model.eval()
    names = ["other", "lora", "default"]

    def alone(i):
        pair.plain.set_adapter(names[i])
        return step(pair.plain, x[i : i + 1], dy[i : i + 1])

    dy = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    expected = [alone(i) for i in range(3)]
    pair.fast.requires_grad_(False)
    for name, parameter in pair.fast.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with gk.rows(pair.fast, names):
        got = step(pair.fast, x, dy)
    assert len(pair.calls) == 0
    for i in range(3):
        torch.testing.assert_close(got["y"][i : i + 1], expected[i]["y"], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(got["x"][i : i + 1], expected[i]["x"], rtol=1e-11, atol=1e-12)
        for name in expected[i].keys() - {"x", "y"}:
            torch.testing.assert_close(got[name], expected[i][name], rtol=1e-10, atol=1e-11)
    y = pair.fast(x, adapter_names=names)
    torch.testing.assert_close(y, got["y"], rtol=1e-12, atol=1e-12)
    with gk.rows(pair.fast, [None, None, "default"]):
        got = pair.fast(x)
    with pair.plain.disable_adapter():
        torch.testing.assert_close(got[:2], pair.plain(x)[:2], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="DoRA"):  # where PEFT refuses, and leaves hooks behind
        pair.plain(x, adapter_names=names)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(twins, x, reentrant):
    pair = twins(config())

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=reentrant)

    got = {name.removeprefix("model."): value for name, value in step(Checkpointed(pair.fast), x).items()}
    assert_same(got, step(pair.plain, x))


def errors(found, truth):
    return {name: float((found[name].double() - value).norm() / value.norm()) for name, value in truth.items()}


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_errs_no_more_than_peft(adapted, calls, adapter, autocast):
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    model = adapted(config(), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(adapter if "lora_" in name else torch.bfloat16)
    truth = step(copy.deepcopy(model).double(), x.double())
    pair, found = Twins(model, calls), []
    for own in pair:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(step(own, x))
    assert len(calls) == 3
    plain, ours = (errors(own, truth) for own in found)
    for name, error in ours.items():
        assert found[1][name].dtype == found[0][name].dtype, name
        assert error <= 2 * plain[name] + 4 * torch.finfo(torch.bfloat16).eps, name


def test_autocast_over_fp32(adapted, calls):
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(1))
    model = adapted(config(), dtype=torch.float32)
    truth = step(copy.deepcopy(model).double(), x.double())
    pair, found = Twins(model, calls), []
    for own in pair:
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(own, x))
    assert len(calls) == 3
    plain, ours = (errors(own, truth) for own in found)
    for name, error in ours.items():
        assert found[1][name].dtype == found[0][name].dtype, name
        assert error <= 2 * plain[name] + 4 * torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_compiled_model_is_one_graph(adapted, x, dtype):
    torch._dynamo.reset()
    fast = gk.accelerate(adapted(config(), dtype=dtype), verbose=False)
    expected = step(fast, x.to(dtype))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    got = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x.to(dtype)).items()}
    assert_same(got, expected, 1e-11 if dtype == torch.float64 else 2e-5)
    for name in ALL:
        getattr(fast.base_model.model, name).base_layer.weight.data.mul_(1.3)
        getattr(fast.base_model.model, name).scaling["default"] = 0.4
    expected = step(fast, x.to(dtype))
    got = {name.removeprefix("_orig_mod."): value for name, value in step(compiled, x.to(dtype)).items()}
    assert_same(got, expected, 1e-11 if dtype == torch.float64 else 2e-5)
    assert counter.frame_count == 1


def test_hot_swapping(twins, x, tmp_path):
    torch.manual_seed(2)
    other = get_peft_model(Net().double(), config(lora_alpha=9), autocast_adapter_dtype=False)
    randomized(other, 0.7).save_pretrained(tmp_path)
    pair = twins(config())
    pair.check(x, 3)
    told = []
    for model in pair:
        try:
            hotswap_adapter(model, tmp_path, "default")
        except (KeyError, ValueError) as error:  # PEFT's own, which does not take DoRA
            told.append(str(error))
    assert len(set(told)) <= 1
    assert len(told) in (0, 2)
    pair.check(x, 3)
    for model in pair:
        for name in ALL:
            getattr(model.base_model.model, name).scaling["default"] = torch.tensor(0.7, dtype=torch.float64)
    pair.check(x, 3)


def test_warmup_and_the_report(adapted, x):
    model = adapted(config(), dtype=torch.float32)
    assert reasons(model) == {"accelerate() was not called since it was added, or decelerate() was"}
    model = gk.accelerate(model, verbose=False)
    before, expected = copy.deepcopy(model.state_dict()), step(model, x.float())
    gk.warmup(model, [8])
    assert_same(model.state_dict(), before, 0.0)
    assert_same(step(model, x.float()), expected, 0.0)
    assert gk.acceleration(model).accelerated == {"lora.Linear": 3}


@pytest.mark.parametrize("kind", ["meta", "part"])
def test_a_magnitude_without_values_or_of_a_sharded_model_is_told(adapted, x, kind):
    class Part(torch.Tensor):
        pass

    model = gk.accelerate(adapted(config(target_modules=["up"])), verbose=False)
    magnitude = model.base_model.model.up.lora_magnitude_vector["default"]
    weight = magnitude.weight.detach()
    magnitude.weight = nn.Parameter(weight.to("meta") if kind == "meta" else weight.as_subclass(Part))
    assert reasons(model) == {ON_META if kind == "meta" else SHARDED_ADAPTER}
    if kind == "meta":
        with pytest.raises(RuntimeError, match=ON_META):
            model(x)
    else:
        y = model(x)
        assert torch.equal(gk.decelerate(model)(x), y)


def test_other_variants_keep_pefts_path(adapted):
    """DoRA under another class is not ours to compute."""
    model = adapted(config())
    layer = model.base_model.model.up
    layer.lora_variant["default"] = type("OtherVariant", (type(layer.lora_variant["default"]),), {})()
    model = gk.accelerate(model, verbose=False)
    assert reasons(model) == {f"{layers.VARIANT} (Other)"}
