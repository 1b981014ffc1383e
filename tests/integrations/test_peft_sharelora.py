"""ShareLoRA as a method of PEFT: one parameter for every layer that shares it, whatever PEFT does with the model."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import LlamaConfig, LlamaForCausalLM

import glora_kernels as gk
from glora_kernels.integrations.peft import ShareLoRAPeftConfig
from glora_kernels.integrations.peft.layer import AdaptedLinear

TOKENS = torch.arange(14).reshape(2, 7)


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def adapted(base: nn.Module | None = None, autocast_adapter_dtype: bool = True, **settings) -> PeftModel:
    config = ShareLoRAPeftConfig(**{"r": 3, "target_modules": "all-linear", "alpha": 6.0} | settings)
    return get_peft_model(llama() if base is None else base, config, autocast_adapter_dtype=autocast_adapter_dtype)


def layers_of(model: nn.Module) -> dict[str, AdaptedLinear]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    return {path.removeprefix("base_model.model."): layer for path, layer in found.items()}


def trained(model: nn.Module, name: str = "default") -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f"_adapter.{name}." in path:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits.detach()


def ties(model: nn.Module, name: str = "default") -> set[frozenset[tuple[str, str]]]:
    """Which parameters of which layers are one object."""
    places: dict[int, set[tuple[str, str]]] = {}
    for path, layer in layers_of(model).items():
        for own, tensor in layer.adapters[name].tensors().items() if name in layer.adapters else ():
            places.setdefault(id(tensor), set()).add((path, own))
    return {frozenset(several) for several in places.values()}


SETTINGS = [
    {"share": "A"},
    {"share": "B"},
    {"share": "AB", "C": "vector", "E": "vector"},
    {"share": "none"},
    {"share": "A", "projections": ["q_proj", "k_proj", "v_proj"]},
    {"share": "A", "tie_siblings": True},
    {"share": "none", "tie_siblings": True},
]
settings_of_each = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))


@settings_of_each
def test_the_parameters_the_outputs_and_the_gradients_of_inject(settings):
    """The same layers share the same factors as with `inject`, and the model computes the same."""
    theirs = gk.inject(llama(), gk.ShareLoRAConfig(rank=3, alpha=6.0, **settings))
    model = adapted(**settings)
    assert model.get_nb_trainable_parameters()[0] == gk.trainable_parameters(theirs)
    trained(model)
    twins = {path: module for path, module in theirs.named_modules() if isinstance(module, gk.GLoRALinear)}
    layers = layers_of(model)
    assert twins.keys() == layers.keys()
    for path, twin in twins.items():
        tensors = layers[path].adapters["default"].tensors()
        assert tensors.keys() == twin.adapter().keys()
        for name, tensor in tensors.items():
            getattr(twin, name).data.copy_(tensor.detach())
    assert torch.equal(logits(model), logits(theirs))

    for each in (model, theirs):
        each(TOKENS, labels=TOKENS).loss.backward()
    for path, twin in twins.items():
        for name, tensor in layers[path].adapters["default"].tensors().items():
            torch.testing.assert_close(tensor.grad, getattr(twin, name).grad, rtol=1e-12, atol=1e-14)


@settings_of_each
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_once_and_loaded_shared(tmp_path, settings, low_cpu_mem_usage):
    model = trained(adapted(**settings)).eval()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == model.get_nb_trainable_parameters()[0]
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True).eval()
    assert ties(loaded) == ties(model)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert torch.equal(logits(loaded), logits(model))


def test_factors_stay_one_parameter():
    """Through a cast of PEFT, of PyTorch, the meta device and back, a copy, and loading with assign=True."""
    model = trained(adapted(llama(torch.bfloat16), share="AB"))
    wanted = ties(model)
    assert max(map(len, wanted)) == 3, "depth"
    count = model.get_nb_trainable_parameters()[0]
    shared = layers_of(model)["model.layers.2.mlp.up_proj"].adapters["default"].tensors()["B_down"]
    assert shared.dtype == torch.float32
    assert shared is layers_of(model)["model.layers.0.mlp.up_proj"].adapters["default"].B_down

    state = {key: value.clone() for key, value in model.state_dict().items()}
    y = logits(model)
    copied = copy.deepcopy(model)
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    moved.load_state_dict(state, assign=True)
    for each in (copied, moved):
        assert ties(each) == wanted
        assert each.get_nb_trainable_parameters()[0] == count
    assert torch.equal(logits(copied), y)
    assert torch.equal(layers_of(moved)["model.layers.2.mlp.up_proj"].adapters["default"].tensors()["B_down"], shared)
    model.to(torch.float64)
    assert ties(model) == wanted
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with torch.no_grad():
        layers_of(copied)["model.layers.0.mlp.up_proj"].adapters["default"].B_down.zero_()
    assert bool(shared.any()), "a copy has parameters of its own"


def test_shared_factors_over_16_bits_are_fp32_without_a_cast():
    model = adapted(llama(torch.bfloat16), autocast_adapter_dtype=False, projections=["q_proj"])
    dtypes = {
        name: {layer.adapters["default"].tensors()[name].dtype for layer in layers_of(model).values()}
        for name in ("B_down", "B_up")
    }
    assert dtypes == {"B_down": {torch.float32}, "B_up": {torch.bfloat16}}


def test_a_trained_step_changes_every_layer():
    model = adapted(share="A")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    trained(model)
    before = {path: layer.adapters["default"].tensors()["B_down"].clone() for path, layer in layers_of(model).items()}
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for path, layer in layers_of(model).items():
        assert not torch.equal(layer.adapters["default"].tensors()["B_down"], before[path])


def test_several_adapters_share_among_themselves():
    model = trained(adapted(share="A", tie_siblings=True))
    y, base = logits(model), logits(llama())
    config = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "share": "A", "tie_siblings": True}
    model.add_adapter("other", ShareLoRAPeftConfig(**config))
    assert torch.equal(logits(model), y)
    assert sorted(map(len, ties(model, "other"))) == [1] * 9 + [9], "one B_down for all, a B_up for each"
    model.set_adapter("other")
    assert torch.equal(logits(model), base)
    assert model.get_nb_trainable_parameters()[0] == 2 * 16 + 2 * 3 * (16 + 8 + 8)
    trained(model, "other")
    second = logits(model)
    assert not torch.allclose(second, base)
    model.eval()
    rows = model(TOKENS, adapter_names=["default", "other"]).logits.detach()
    torch.testing.assert_close(rows, torch.stack([y[0], second[1]]), rtol=1e-12, atol=1e-12)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


def test_merged_and_unloaded():
    model = trained(adapted(share="AB", E="vector")).eval()
    y = logits(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), y, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    plain = model.merge_and_unload()
    assert type(plain) is LlamaForCausalLM
    assert not layers_of(plain)
    torch.testing.assert_close(logits(plain), y, rtol=1e-12, atol=1e-12)


def test_injected_without_a_model_around_it():
    model = inject_adapter_in_model(ShareLoRAPeftConfig(r=3, alpha=6.0, target_modules="all-linear"), llama())
    assert type(model) is LlamaForCausalLM
    assert ties(model) == ties(adapted())
    assert torch.equal(logits(model), logits(llama()))


def test_compiled_layer_by_layer():
    model = trained(adapted(llama(torch.float32), share="A")).eval()
    y = logits(model)
    torch._dynamo.reset()
    layer = layers_of(model)["model.layers.2.mlp.up_proj"]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x), layer(x))
    call(x).sum().backward()
    assert bool(layer.adapters["default"].tensors()["B_down"].grad.any())
    assert torch.equal(logits(model), y)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="share must be one of"):
        ShareLoRAPeftConfig(share="C")
    with pytest.raises(ValueError, match=r"tie_siblings=True with dropout=0\.1"):
        ShareLoRAPeftConfig(tie_siblings=True, dropout=0.1)
    with pytest.raises(TypeError, match="has no 'rank'"):
        ShareLoRAPeftConfig(rank=4)
    with pytest.raises(ValueError, match="the pattern 'nothing' matches no linear layer"):
        adapted(projections=["nothing"])
    with pytest.raises(ValueError, match="no two of the layers that share are siblings"):
        adapted(target_modules=["o_proj"], tie_siblings=True)
    with pytest.raises(ValueError, match="cannot be injected from a state_dict"):
        inject_adapter_in_model(ShareLoRAPeftConfig(target_modules=["q_proj"]), llama(), state_dict={})
    mixed = llama()
    mixed.model.layers[1].to(torch.float32)
    with pytest.raises(ValueError, match="cannot share one B_down"):
        adapted(mixed)
    assert not layers_of(mixed)

    # A file in which each layer has a factor of its own is no file of factors that are shared.
    adapted(share="A").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    place = "base_model.model.model.layers.{}.mlp.up_proj.gksharelora_adapter.B_down"
    save_file(tensors | {place.format(1): tensors[place.format(0)] + 1}, file)
    with pytest.raises((ValueError, RuntimeError), match="comes from another configuration"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_model_that_shares_nothing_warns():
    with pytest.warns(UserWarning, match=r"shares nothing over depth.*'model.layers.#.mlp.up_proj \(24, 16\)'"):
        adapted(target_modules=["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"])
