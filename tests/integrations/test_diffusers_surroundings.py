"""What diffusers does around its models: pipelines, fused projections, layerwise casting, checkpoints, hot swapping."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers_models import PROJECTIONS, base_model, gradients, moved_away, output
from peft import GloraConfig, LoraConfig
from torch import nn
from twins import EXACT, assert_same

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig

LORA = {"r": 3, "lora_alpha": 4, "target_modules": PROJECTIONS}


def with_lora(name, dtype=torch.float64):
    model = base_model(name).to(dtype)
    model.add_adapter(LoraConfig(**LORA))
    return moved_away(model)


# Pipelines


class Pipeline(DiffusionPipeline):
    """Two models with adapters, one without, and something that is no module."""

    def __init__(self, unet, transformer, decoder, scheduler):
        super().__init__()
        self.register_modules(unet=unet, transformer=transformer, decoder=decoder, scheduler=scheduler)


def pipeline():
    return Pipeline(with_lora("unet"), with_lora("flux"), base_model("sana"), DDPMScheduler())


def test_every_model_of_a_pipeline_is_accelerated(capsys):
    pipe = pipeline()
    expected = {"unet": output(pipe.unet, "unet"), "transformer": output(pipe.transformer, "flux")}
    classes = {module: type(module) for part in (pipe.unet, pipe.transformer) for module in part.modules()}
    assert gk.accelerate(pipe) is pipe
    assert "lora.Linear  glora_kernels" in capsys.readouterr().out
    assert gk.acceleration(pipe).accelerated == {"lora.Linear": 32 + 7}
    assert gk.acceleration(pipe.unet).accelerated == {"lora.Linear": 32}
    assert_same({"unet": output(pipe.unet, "unet"), "transformer": output(pipe.transformer, "flux")}, expected)
    with pytest.raises(RuntimeError, match="same dtype"):
        pipe.transformer.transformer_blocks[0].attn.to_q(torch.randn(2, 16))
    assert [path for path, _ in gk.acceleration(pipe).fallbacks] == ["transformer.transformer_blocks.0.attn.to_q"]
    assert gk.decelerate(pipe) is pipe
    assert all(type(module) is kind for module, kind in classes.items())


def test_a_pipeline_is_accelerated_as_a_whole_or_not_at_all(monkeypatch):
    pipe = pipeline()
    layers = [m for part in (pipe.unet, pipe.transformer) for m in part.modules() if hasattr(m, "lora_A")]
    from glora_kernels.integrations.accelerated.layers import LoraLinear

    real, count = LoraLinear.accelerated, iter(range(100))

    def fails_at_the_last(layer):
        if next(count) == len(layers) - 1:
            raise KeyboardInterrupt
        real(layer)

    monkeypatch.setattr(LoraLinear, "accelerated", fails_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        gk.accelerate(pipe, verbose=False)
    assert not any(type(layer).__module__.startswith("glora_kernels") for layer in layers)
    assert not any("fuse_qkv_projections" in vars(part) for part in (pipe.unet, pipe.transformer))


@pytest.mark.parametrize("call", [gk.accelerate, gk.decelerate, gk.acceleration])
@pytest.mark.parametrize("given", [3, {"unet": nn.Linear(2, 2)}, None], ids=["int", "dict", "None"])
def test_what_is_no_model_and_no_pipeline(call, given):
    with pytest.raises(TypeError, match=rf"an nn.Module, or a pipeline .*`components`.*, got {type(given).__name__}"):
        call(given)


def test_a_pipeline_without_adapters():
    parts = {name: base_model(name) for name in ("unet", "flux", "sana")}
    pipe = Pipeline(parts["unet"], parts["flux"], parts["sana"], DDPMScheduler())
    with pytest.raises(ValueError, match="the model has no PEFT layers"):
        gk.accelerate(pipe)


# Fused projections: a copy of the weights, without adapters


def injected(name):
    return moved_away(gk.inject(base_model(name), gk.GLoRAConfig.lora(3), PROJECTIONS))


def accelerated(name):
    return gk.accelerate(with_lora(name), verbose=False)


def of_our_method(name):
    model = base_model(name)
    model.add_adapter(GLoRAPeftConfig(r=3, target_modules=PROJECTIONS))
    return moved_away(model)


@pytest.mark.parametrize("name", ["unet", "flux", "wan"])
@pytest.mark.parametrize("adapted", [injected, accelerated, of_our_method])
def test_projections_with_adapters_are_not_fused_without_them(name, adapted):
    model = adapted(name)
    expected = output(model, name)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"fuse_qkv_projections copies the weight of '.*to_q' without its adapt"):
            one.fuse_qkv_projections()
        attention = next(module for module in one.modules() if hasattr(module, "fuse_projections"))
        with pytest.raises(RuntimeError, match="fuse_projections copies the weight of 'to_q' without its adapter"):
            attention.fuse_projections()
        assert not any(hasattr(module, "to_qkv") for module in one.modules())
        assert torch.equal(output(one, name), expected)
    merged = gk.merge_and_unload(model) if adapted is injected else model
    if merged is not model or adapted is not injected:
        merged.fuse_lora()
    merged.fuse_qkv_projections()
    assert any(hasattr(module, "to_qkv") for module in merged.modules())
    torch.testing.assert_close(output(merged, name), expected, rtol=0, atol=EXACT)


def test_projections_are_fused_where_no_adapter_is_lost():
    expected = output(base_model("flux"), "flux")
    elsewhere = gk.inject(base_model("flux"), gk.GLoRAConfig.lora(3), ["to_out.0", "ff.net.2"])
    elsewhere.fuse_qkv_projections()
    before = base_model("flux")
    before.fuse_qkv_projections()
    gk.inject(before, gk.GLoRAConfig.lora(3), ["to_qkv", "to_added_qkv", "to_out.0"])
    deleted = accelerated("flux")
    deleted.delete_adapters("default")
    deleted.fuse_qkv_projections()
    unloaded = gk.unload(injected("flux"))
    unloaded.fuse_qkv_projections()
    slow = with_lora("flux")
    untouched = {id(module): set(vars(module)) for module in slow.modules()}
    assert {id(m): set(vars(m)) for m in gk.decelerate(gk.accelerate(slow, verbose=False)).modules()} == untouched
    for model in (elsewhere, before, deleted, unloaded):
        assert model.transformer_blocks[0].attn.fused_projections
        torch.testing.assert_close(output(model, "flux"), expected, rtol=0, atol=EXACT)
    assert "fuse_qkv_projections" not in vars(unloaded)


def test_an_adapter_that_is_added_later_counts():
    model = gk.inject(base_model("flux"), gk.GLoRAConfig.lora(3), ["ff.net.2"])
    gk.add_adapter(model, "more", gk.GLoRAConfig.lora(2), ["to_k"])
    with pytest.raises(RuntimeError, match=r"the weight of '.*to_k'"):
        model.fuse_qkv_projections()


# Layerwise casting: weights kept in a narrow dtype, and computed in another


CONFIGS = {
    "lora": lambda: LoraConfig(**LORA),
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "glora": lambda: GloraConfig(r=3, target_modules=PROJECTIONS),
    "ours": lambda: GLoRAPeftConfig(
        r=3, A="vector", B="lora", C="vector", D="none", E="vector", target_modules=PROJECTIONS
    ),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kept_in", [torch.float8_e4m3fn, torch.float16], ids=str)
def test_layerwise_casting_is_served(method, kept_in):
    """The truth is the model whose base has been rounded to the narrow dtype."""
    model = base_model("flux")
    model.add_adapter(CONFIGS[method]())
    moved_away(model)
    truth = copy.deepcopy(model)
    fast = model if method == "ours" else gk.accelerate(model, verbose=False)
    fast.enable_layerwise_casting(storage_dtype=kept_in, compute_dtype=torch.float64)
    for path, module in fast.named_modules():
        if "layerwise_casting" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            truth.get_submodule(path).to(kept_in).to(torch.float64)
    layer = fast.transformer_blocks[0].attn.to_q
    assert layer.base_layer.weight.dtype == kept_in
    found = [{name: p for name, p in one.named_parameters() if p.requires_grad} for one in (fast, truth)]
    assert {p.dtype for p in found[0].values()} == {torch.float64}
    got, expected = ({"y": output(one, "flux")} for one in (fast, truth))
    got |= gradients(got["y"], found[0])
    expected |= gradients(expected["y"], found[1])
    assert_same(got, expected)
    assert not gk.acceleration(fast).kept
    assert not gk.acceleration(fast).fallbacks
    assert layer.base_layer.weight.dtype == kept_in


def test_layerwise_casting_that_is_refused():
    model = of_our_method("flux")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float64)
    expected = output(model, "flux")
    with pytest.raises(ValueError, match=r"kept in torch.float8_e4m3fn \(layerwise casting\); merge before"):
        model.fuse_lora()
    assert torch.equal(output(model, "flux"), expected)
    cast = base_model("flux")
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a hook of diffusers \(layerwise casting, offloading\) has replaced its"):
        gk.inject(cast, gk.GLoRAConfig.lora(3), PROJECTIONS)


def test_another_hook_of_diffusers_keeps_pefts_path():
    from diffusers.hooks import HookRegistry, ModelHook

    model = with_lora("flux")
    fast = gk.accelerate(copy.deepcopy(model), verbose=False)
    for one in (model, fast):
        one.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float64)
        base = one.transformer_blocks[0].attn.to_q.base_layer
        HookRegistry.check_if_exists_or_initialize(base).register_hook(ModelHook(), "another")
    torch.testing.assert_close(output(fast, "flux"), output(model, "flux"), rtol=0, atol=EXACT)
    assert {path for path, _ in gk.acceleration(fast).fallbacks} == {"transformer_blocks.0.attn.to_q"}


def test_layerwise_casting_leaves_injected_layers_as_they_are():
    model = injected("flux")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float64)
    assert model.proj_out is not None
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype == torch.float64
    assert model.context_embedder.weight.dtype == torch.float8_e4m3fn


# What else diffusers does to a model


@pytest.mark.parametrize("adapted", [injected, accelerated, of_our_method])
def test_gradient_checkpoints(adapted):
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(3)
        model = adapted("flux").train()
        if checkpoints:
            model.enable_gradient_checkpointing()
        y = output(model, "flux")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found.append({"y": y, **gradients(y, trained)})
    assert_same(found[1], found[0])


def test_hot_swapping(tmp_path):
    for name, rank in (("first", 2), ("second", 4)):
        model = base_model("flux")
        model.add_adapter(LoraConfig(r=rank, lora_alpha=3, target_modules=PROJECTIONS))
        moved_away(model).save_lora_adapter(tmp_path, weight_name=f"{name}.safetensors")
    models = []
    for is_fast in (False, True):
        model = base_model("flux")
        model.enable_lora_hotswap(target_rank=4)
        load = {"prefix": None, "adapter_name": "one"}
        model.load_lora_adapter(tmp_path, weight_name="first.safetensors", **load)
        models.append(gk.accelerate(model, verbose=False) if is_fast else model)
    torch.testing.assert_close(output(models[1], "flux"), output(models[0], "flux"), rtol=0, atol=EXACT)
    before = output(models[0], "flux")
    for model in models:
        model.load_lora_adapter(tmp_path, weight_name="second.safetensors", hotswap=True, **load)
    torch.testing.assert_close(output(models[1], "flux"), output(models[0], "flux"), rtol=0, atol=EXACT)
    assert float((output(models[0], "flux") - before).abs().max()) > 1e-3


def test_fusing_an_accelerated_lora():
    model = with_lora("flux")
    fast = gk.accelerate(copy.deepcopy(model), verbose=False)
    expected = output(model, "flux")
    for one in (model, fast):
        one.fuse_lora(lora_scale=0.5, safe_fusing=True)
    torch.testing.assert_close(output(fast, "flux"), output(model, "flux"), rtol=0, atol=EXACT)
    for one in (model, fast):
        one.unfuse_lora()
        one.set_adapters("default", 1.0)
    torch.testing.assert_close(output(fast, "flux"), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("adapted", [injected, accelerated])
def test_one_graph(adapted):
    model = adapted("flux")
    expected = output(model, "flux")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(output(compiled, "flux"), expected, rtol=0, atol=EXACT)
