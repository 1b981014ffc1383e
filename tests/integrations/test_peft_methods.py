"""GLoRA as a method of PEFT: the mathematics of all 432 configurations, and everything that PEFT does with a method."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora_kernels as gk
import glora_kernels.integrations.peft as package
from glora_kernels.integrations import release
from glora_kernels.integrations.peft import GLoRAPeftConfig, registry
from glora_kernels.integrations.peft.layer import AdaptedLinear, GLoRAPeftLinear

GOLDEN = Path(__file__).parents[1] / "data" / "glora_432.npz"
FULL = {"A": "vector", "B": "lora", "C": "vector", "D": "vector", "E": "vector"}


class Net(nn.Module):
    """Two blocks of layers with and without a bias, and a head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(6, 6, dtype=dtype), "up": nn.Linear(6, 6, bias=False, dtype=dtype)})
            for _ in range(2)
        )
        self.head = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["up"](torch.tanh(block["q_proj"](x)))
        return self.head(x)


def x_of(rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))


def adapted(model: nn.Module | None = None, **settings) -> PeftModel:
    settings = {"r": 2, "target_modules": ["q_proj", "up"], **FULL} | settings
    return get_peft_model(Net() if model is None else model, GLoRAPeftConfig(**settings))


def trained(model: nn.Module, name: str = "default", seed: int = 2) -> nn.Module:
    """An adapter that was trained: random numbers in all of its parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f"_adapter.{name}." in path or f"modules_to_save.{name}." in path:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def layers_of(model: nn.Module) -> list[AdaptedLinear]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    got, expected = got.detach(), expected.detach()
    bound = tolerance * max(1.0, float(expected.abs().max()))
    return got.shape == expected.shape and float((got - expected).abs().max()) <= bound


# The mathematics


def golden_layers(bias: bool) -> tuple[PeftModel, dict[str, np.ndarray]]:
    """One model with a layer for each configuration of the file, adapted by one configuration with patterns."""
    golden = dict(np.load(GOLDEN))
    weight, b = (torch.from_numpy(golden[name].copy()) for name in ("weight", "bias"))
    model = nn.ModuleDict()
    patterns = {}
    for i, forms in enumerate(golden["configs"]):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias:
                linear.bias.copy_(b)
        model[f"l{i}"] = linear
        patterns[f"l{i}"] = dict(zip("ABCDE", map(str, forms), strict=True))
    config = GLoRAPeftConfig(r=4, target_modules=r"l\d+", patterns=patterns)
    return get_peft_model(model, config), golden


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_all_432_configurations(bias):
    """y, dx, the gradient of every support, W_eff and the bias, against the original implementation's numbers."""
    model, golden = golden_layers(bias)
    x, dy = (torch.from_numpy(golden[name].copy()) for name in ("x", "dy"))
    for i in range(len(golden["configs"])):
        layer, at = model.base_model.model[f"l{i}"], (0 if bias else 1, i)
        supports = dict(layer.adapters["default"].named_parameters())
        places = {}
        for name, parameter in supports.items():
            # A vector is column 0 of `_up`, a constant its element [0, 0]; of D and E it is element 0.
            stored, column = (f"{name}_up", (slice(len(parameter)), 0)) if name in "ABC" else (name, ())
            if name in "DE":
                column = (slice(len(parameter)),)
            places[name] = (stored, column)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(golden[stored][column].copy()))
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        assert near(y, torch.from_numpy(golden["y"][at])), golden["configs"][i]
        assert near(leaf.grad, torch.from_numpy(golden["dx"][at])), golden["configs"][i]
        for name, parameter in supports.items():
            stored, column = places[name]
            expected = torch.from_numpy(golden[f"d{stored}"][at][column].copy())
            assert near(parameter.grad, expected), (name, golden["configs"][i])
    model.merge_adapter(safe_merge=True)
    for i in range(len(golden["configs"])):
        base, at = model.base_model.model[f"l{i}"].base_layer, (0 if bias else 1, i)
        assert near(base.weight, torch.from_numpy(golden["weight_eff"][at]))
        expected = torch.from_numpy(np.nan_to_num(golden["bias_eff"][at]))
        assert near(torch.zeros_like(expected) if base.bias is None else base.bias, expected)


def test_equal_to_inject_in_every_setting():
    """The same parameters, scale and variant give what the layers of `inject` give."""
    config = gk.GLoRAConfig("lora", "lora", "lora", "none", "constant", 3, alpha=7.0, variant="matmul")
    ours = gk.inject(Net(), config, target_modules=["q_proj", "up"])
    model = adapted(**{name: getattr(config, name) for name in "ABCDE"}, r=3, alpha=7.0, variant="matmul")
    trained(model)
    for mine, theirs in zip(
        layers_of(model), [m for m in ours.modules() if isinstance(m, gk.GLoRALinear)], strict=True
    ):
        assert mine.adapters["default"].tensors().keys() == theirs.adapter().keys()
        for name, tensor in mine.adapters["default"].tensors().items():
            getattr(theirs, name).data.copy_(tensor)
    assert torch.equal(model(x_of()), ours(x_of()))
    assert model.get_nb_trainable_parameters()[0] == gk.trainable_parameters(ours)


@pytest.mark.parametrize("init", ["xavier", "kaiming"])
def test_a_fresh_adapter_changes_nothing(init):
    model = adapted(A="lora", C="lora", init=init)
    assert torch.equal(model(x_of()), Net()(x_of()))
    assert all(bool(p.any()) == path.endswith("_down") for path, p in model.named_parameters() if "_adapter" in path)


def test_dropout_acts_in_training_alone():
    model = trained(adapted(dropout=0.5))
    assert not torch.equal(model(x_of()), model(x_of()))
    model.eval()
    assert torch.equal(model(x_of()), model(x_of()))


def test_conv1d():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.ModuleDict({"c_attn": Conv1D(4, 6)}).double()
    model = trained(get_peft_model(base, GLoRAPeftConfig(r=2, target_modules="all-linear", **FULL)))
    layer = model.base_model.model["c_attn"]
    x, before = x_of(), layer.base_layer.weight.clone()
    y = layer(x)
    model.merge_adapter()
    assert near(layer.base_layer(x), y)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


# What PEFT does with a method


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path, low_cpu_mem_usage):
    settings = {"modules_to_save": ["head"], "patterns": {"*.1.q_proj": {"A": "lora", "r": 3}, "*.up": {"C": "none"}}}
    model = trained(adapted(**settings))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is GLoRAPeftConfig
    assert list(config.patterns) == ["*.1.q_proj", "*.up"], "the order counts"
    loaded = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(x_of()), model(x_of()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert "base_model.model.blocks.1.q_proj.gkglora_adapter.A_up" in load_file(tmp_path / "adapter_model.safetensors")


SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")


@pytest.mark.skipif(not SAVES_BIASES, reason="PEFT before 0.21 does not save the biases")
def test_the_trained_bias_is_trained_and_saved(tmp_path):
    model = trained(adapted(bias="gkglora_only"))
    names = [name for name, p in model.named_parameters() if p.requires_grad and "_adapter" not in name]
    assert names == [f"base_model.model.blocks.{i}.q_proj.base_layer.bias" for i in range(2)]
    model(x_of()).sum().backward()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter -= 0.1 * parameter.grad
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Net(), tmp_path)(x_of()), model(x_of()))


def test_a_trained_bias_needs_a_peft_that_saves_it(monkeypatch):
    monkeypatch.delattr(BaseTuner, "_get_learnable_bias_state_dict", raising=SAVES_BIASES)
    with pytest.raises(ValueError, match=r"bias='all' needs PEFT 0\.21"):
        adapted(bias="all")


def test_several_adapters():
    """Adding, switching, both at once, each row its own, disabling, deleting: sums of changes of one base."""
    x, base = x_of(), Net()(x_of())
    model = trained(adapted())
    first = model(x)
    model.add_adapter(
        "other", GLoRAPeftConfig(r=3, target_modules=["q_proj"], A="lora", B="vector", C="lora", E="none")
    )
    trained(model, "other", seed=3)
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    second = model(x)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}

    layer = layers_of(model)[0]
    alone = [layer._adapted(x, [name]) - layer._base(x) for name in ("default", "other")]
    assert near(layer._adapted(x, ["default", "other"]), layer._base(x) + alone[0] + alone[1])
    model.base_model.set_adapter(["default", "other"])
    together = model(x)
    model.merge_adapter()
    assert near(model(x), together)
    model.unmerge_adapter()
    model.set_adapter("other")
    model.merge_adapter(["other"])
    assert near(model(x), second)
    model.merge_adapter(["default"])  # on top: from the base as it was
    assert near(model(x), together)
    model.unmerge_adapter()
    assert torch.equal(model(x), second)

    model.eval()
    rows = model(x, adapter_names=["default", "__base__", "other", "default", "__base__"])
    assert near(rows, torch.stack([first[0], base[1], second[2], first[3], base[4]]))
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(model(x), first)


def test_several_adapters_that_one_call_does_not_take():
    """Two with dropout draw a mask each, and their changes add up: the mean over masks is that without dropout."""
    model = trained(adapted(dropout=0.2, C="none"))
    model.add_adapter("other", GLoRAPeftConfig(r=2, target_modules=["q_proj", "up"], dropout=0.2, **FULL))
    trained(model, "other", seed=3)
    model.base_model.set_adapter(["default", "other"])
    layer, x = layers_of(model)[0], x_of(1)
    many = layer(x.expand(20000, 6))
    layer.eval()
    deviation = many.std(0) / many.shape[0] ** 0.5
    assert bool(((many.mean(0) - layer(x)[0]).abs() < 5 * deviation).all())
    assert bool((deviation > 0).all())


def test_merging_is_undone_bit_for_bit_and_unloads_to_plain_layers():
    base = Net(torch.float32)
    before = copy.deepcopy(base.state_dict())
    model = trained(adapted(base)).eval()
    x = x_of(dtype=torch.float32)
    y = model(x)
    model.merge_adapter(safe_merge=True)
    up = model.base_model.model.blocks[0]["up"]
    assert up.base_layer.bias is not None, "E and W·C need one"
    model.unmerge_adapter()
    assert up.base_layer.bias is None
    for key, value in model.base_model.model.state_dict().items():
        if "_adapter" not in key:
            assert torch.equal(value, before[key.replace(".base_layer", "")])
    assert torch.equal(model(x), y)
    plain = model.merge_and_unload()
    assert {type(module) for module in plain.modules()} == {Net, nn.ModuleList, nn.ModuleDict, nn.Linear}
    assert near(plain(x), y, 1e-5)
    again = trained(adapted(Net(torch.float32))).unload()
    assert torch.equal(again(x), Net(torch.float32)(x))


def test_a_merge_that_fails_changes_nothing():
    model = trained(adapted())
    y = model(x_of())
    layer = layers_of(model)[1]
    with torch.no_grad():
        kept = layer.adapters["default"].A.clone()
        layer.adapters["default"].A[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    layer.adapters["default"].A.data.copy_(kept)
    assert torch.equal(model(x_of()), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_over_16_bits_are_kept_in_fp32(dtype, tmp_path):
    model = trained(adapted(Net(dtype)))
    assert {p.dtype for path, p in model.named_parameters() if "_adapter" in path} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(dtype), tmp_path, low_cpu_mem_usage=True)
    for path, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(path)), "fp32 adapters must not be rounded on the way"
    x = x_of(dtype=dtype)
    assert torch.equal(loaded(x), model(x))
    assert loaded(x).dtype == dtype


@pytest.mark.parametrize("make", ["bitsandbytes", "ours"])
def test_a_4_bit_base(make):
    torch.manual_seed(4)
    dense = nn.Linear(64, 64, bias=False)
    quantized = gk.quantize(dense, "nf4", double_quant=True)
    if make == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    linear = quantized.to_linear4bit() if make == "bitsandbytes" else quantized
    codes, reference = linear.weight.detach().clone(), quantized.to_linear()
    model = trained(get_peft_model(nn.ModuleDict({"q": linear}), GLoRAPeftConfig(r=2, target_modules=["q"], **FULL)))
    layer = model.eval().base_model.model["q"]
    twin = gk.GLoRALinear.from_linear(reference, gk.GLoRAConfig(**FULL, rank=2))
    for name, tensor in layer.adapters["default"].tensors().items():
        getattr(twin, name).data.copy_(tensor)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    assert near(layer(x), twin(x), 1e-5)
    with pytest.warns(UserWarning, match="survived"):
        model.merge_adapter()
    merged, wanted = gk.QuantizedLinear.from_linear4bit(linear) if make == "bitsandbytes" else linear, twin.to_linear()
    error = (merged.to_linear().weight - wanted.weight).norm() / wanted.weight.norm()
    assert 0.01 < error < 0.2, "the error of 4 bits"
    assert near(linear.bias, wanted.bias, 1e-5)
    assert near(layer(x), merged(x), 1e-6)
    model.unmerge_adapter()
    assert torch.equal(linear.weight, codes)
    assert linear.bias is None
    assert near(layer(x), twin(x), 1e-5)
    with model.disable_adapter():
        assert near(layer(x), quantized(x), 1e-6)


def test_injected_without_a_model_around_it():
    model = inject_adapter_in_model(GLoRAPeftConfig(r=2, target_modules=["q_proj"]), Net())
    assert type(model) is Net
    assert sum(isinstance(module, GLoRAPeftLinear) for module in model.modules()) == 2
    assert torch.equal(model(x_of()), Net()(x_of()))


def test_compiled():
    model = trained(adapted(nn.ModuleDict({"q_proj": nn.Linear(6, 6)}), target_modules=["q_proj"], dropout=0.1)).eval()
    layer = model.base_model.model["q_proj"]
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = x_of(dtype=torch.float32)
    assert near(call(x), layer(x), 1e-6)
    layer.train()
    call(x).sum().backward()
    assert all(bool(p.grad.any()) for p in layer.adapters.parameters())


# The registry


def test_the_types_are_members_like_the_others():
    kind = PeftType.GKGLORA
    assert PeftType("GKGLORA") is PeftType["GKGLORA"] is kind
    assert kind in list(PeftType)
    assert "GKGLORA" in list(PeftType)
    assert kind == "GKGLORA"
    assert kind != PeftType.GLORA
    assert pickle.loads(pickle.dumps(kind)) is copy.deepcopy(kind) is kind
    assert json.dumps(kind) == '"GKGLORA"'
    assert repr(kind) == "<PeftType.GKGLORA: 'GKGLORA'>"
    assert len({*PeftType}) == len(PeftType) == len(list(PeftType))


def test_importing_and_registering_twice_is_harmless():
    importlib.reload(package)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.GKGLORA] is GLoRAPeftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["GKGLORA"] is package.GLoRAPeftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["GKGLORA"] == "gkglora_"
    assert registry.peft_type("GKGLORA") is PeftType.GKGLORA

    class Other(PeftConfig):
        pass

    with pytest.raises(KeyError, match="already PEFT method called 'gkglora'"):
        registry.register("gkglora", Other, package.GLoRAPeftModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.GKGLORA] is GLoRAPeftConfig


def test_another_release_of_peft(monkeypatch):
    """Asked when the package is imported, before PEFT is."""
    monkeypatch.setattr(release, "version", lambda name: "0.19.1")
    with pytest.raises(ImportError, match=r"integrations.peft needs PEFT 0\.20 or later; installed is 0\.19\.1"):
        importlib.reload(package)


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"A": "low"}, ValueError, "A must be one of 'lora', 'vector', 'constant', 'none'; got 'low'"),
        ({"r": 0}, ValueError, "rank must be an integer >= 1, got 0"),
        ({"alpha": 4, "B": "vector"}, ValueError, "alpha scales B='lora' only"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of 'none', 'all', 'gkglora_only'"),
        ({"rank": 4}, TypeError, "has no 'rank'"),
        ({"format": 2}, ValueError, "format 2"),
        ({"patterns": {"*": {"rank": 4}}}, ValueError, r"patterns\['\*'\] sets 'rank'"),
        ({"patterns": {"*": {"r": 0}}}, ValueError, r"patterns\['\*'\]: rank must be"),
        ({"patterns": ["q_proj"]}, TypeError, "patterns must be None or a mapping"),
    ],
)
def test_a_configuration_that_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        GLoRAPeftConfig(**settings)


@pytest.mark.parametrize("through", [PeftConfig, GLoRAPeftConfig])
def test_a_file_of_a_newer_version(tmp_path, through):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"gamma": 2}))
    with pytest.raises(TypeError, match="has no 'gamma'"):
        through.from_pretrained(tmp_path)
    path.write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        through.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["more", "less"])
def test_a_checkpoint_with_other_parameters(tmp_path, change):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    place = "base_model.model.blocks.0.q_proj.gkglora_adapter."
    if change == "more":
        tensors[place + "F"] = torch.ones(6)
    else:
        del tensors[place + "A"]
    save_file(tensors, file)
    with pytest.raises((ValueError, RuntimeError), match="another configuration"):
        PeftModel.from_pretrained(Net(), tmp_path)


def test_layers_that_cannot_be_adapted_are_named_and_nothing_is_changed():
    hooked, nested, sharded = Net(), Net(), Net()
    hooked.blocks[1]["up"].register_forward_hook(lambda *_: None)
    nested = get_peft_model(nested, peft.LoraConfig(target_modules=["up"])).base_model.model
    sharded.blocks[1]["up"]._hf_tp_plan = "colwise"
    other = Net()
    other.blocks[1]["up"] = nn.Embedding(6, 6)
    for model, reason in (
        (hooked, "hooks"),
        (nested, "another adapter"),
        (sharded, "tensor-parallel"),
        (other, "a Embedding"),
    ):
        with pytest.raises(ValueError, match=reason):
            get_peft_model(model, GLoRAPeftConfig(target_modules=["q_proj", "up"]))
        assert not layers_of(model)
    with pytest.raises(ValueError, match="'k_proj' matches none of the 2 layers"):
        get_peft_model(Net(), GLoRAPeftConfig(target_modules=["q_proj"], patterns={"k_proj": {"r": 2}}))


def test_calls_that_have_no_answer():
    model = adapted()
    layer = layers_of(model)[0]
    with pytest.raises(TypeError, match="float32 on a base in"):
        layer(x_of().float())
    with pytest.raises(TypeError, match="floating point"):
        layer(torch.ones(2, 6, dtype=torch.int64))
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="the weight of its base is trained"):
        layer(x_of())
    layer.base_layer.weight.requires_grad_(False)
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks"):
        layer(x_of())
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model(x_of(), adapter_names=["default"] * 5)
    model.eval()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        model(x_of(), adapter_names=["nobody"] * 5)
    empty = get_peft_model(Net(), GLoRAPeftConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match="meta device"):
        empty(x_of())
