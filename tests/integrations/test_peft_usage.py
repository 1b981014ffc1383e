"""What users of PEFT expect of our two methods: scales, QLoRA in mixed precision, the fields of its configurations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import glora_kernels as gk
from glora_kernels.integrations.peft import GLoRAPeftConfig, ShareLoRAPeftConfig
from glora_kernels.integrations.peft.layer import AdaptedLinear
from glora_kernels.reference.tolerance import allowed_error, largest_error

K, N = 64, 32
FULL = {"A": "vector", "B": "lora", "C": "lora", "D": "vector", "E": "constant"}
FORMS = {
    "everything": FULL,
    "factors": {"A": "lora", "B": "lora", "C": "vector", "D": "none", "E": "vector"},
    "product": {"A": "lora", "B": "lora", "C": "none", "D": "none", "E": "none", "variant": "matmul"},
    "vectors": {"A": "constant", "B": "vector", "C": "none", "D": "constant", "E": "vector"},
}


def trained(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "_adapter." in path:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def one_layer(base=None, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    base = nn.Linear(K, N, dtype=dtype) if base is None else base
    model = get_peft_model(nn.ModuleDict({"up": base}), GLoRAPeftConfig(target_modules=["up"], **{"r": 3} | settings))
    return trained(model).base_model.model["up"]


def rows(dtype=torch.float64):
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


# Scales, as diffusers' set_adapters and scale_lora_layers set them


@pytest.mark.parametrize("forms", FORMS)
def test_a_scale_multiplies_what_an_adapter_changes(forms):
    layer = one_layer(**FORMS[forms], **({"alpha": 7.0} if "lora" in FORMS[forms]["B"] else {}))
    x = rows()
    base, full = layer._base(x), layer(x)

    def is_scaled(by):
        torch.testing.assert_close(layer(x), base + by * (full - base), rtol=0, atol=1e-12)

    for by in (0.5, 0, -2):
        layer.set_scale("default", by)
        is_scaled(by)
    layer.scale_layer(0.25)
    is_scaled(-0.5)
    layer.unscale_layer(0.25)
    is_scaled(-2)
    layer.merge()
    is_scaled(-2)
    layer.unmerge()
    copied = copy.deepcopy(layer)
    layer.unscale_layer()
    assert torch.equal(layer(x), full)
    torch.testing.assert_close(copied(x), base - 2 * (full - base), rtol=0, atol=1e-12)


def test_a_scale_is_that_of_one_adapter_and_of_its_gradients():
    layer = one_layer(**FULL)
    config = GLoRAPeftConfig(r=2, **FULL).layer_configs([""])[""]
    layer.update_layer("other", config)
    trained(layer)
    x = rows()
    base = layer._base(x)
    alone = [layer._adapted(x, [name]) - base for name in ("default", "other")]
    layer.set_adapter(["default", "other"])
    layer.set_scale("other", 0.5)
    layer.set_scale("nobody", 0.5)  # a layer that has it not, as with PEFT's
    torch.testing.assert_close(layer(x), base + alone[0] + 0.5 * alone[1], rtol=0, atol=1e-12)
    gradients = {}
    for by in (1.0, 0.5):
        layer.set_scale("other", by)
        layer.zero_grad()
        layer(x).sum().backward()
        gradients[by] = {name: p.grad.clone() for name, p in layer.named_parameters() if ".other." in name}
    assert gradients[1.0]
    for name, value in gradients[0.5].items():
        torch.testing.assert_close(value, 0.5 * gradients[1.0][name], rtol=0, atol=1e-12)


def test_scales_of_shared_factors():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(6, 6, dtype=torch.float64)}) for _ in range(2)))
    model = trained(get_peft_model(net, ShareLoRAPeftConfig(r=2, share="AB", target_modules=["q"])))
    first, second = (module for module in model.modules() if isinstance(module, AdaptedLinear))
    x = rows()[:, :6]
    base, full = second._base(x), second(x)
    second.set_scale("default", 0.5)
    torch.testing.assert_close(second(x), base + 0.5 * (full - base), rtol=0, atol=1e-12)
    torch.testing.assert_close(first(x) - first._base(x), full - base, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("scale", "error"), [("1", TypeError), (None, TypeError), (True, TypeError), (math.nan, ValueError)]
)
def test_scales_that_are_refused(scale, error):
    layer = one_layer()
    for change in (lambda: layer.set_scale("default", scale), lambda: layer.scale_layer(scale)):
        with pytest.raises(error, match="scale must be"):
            change()
    with pytest.raises(ValueError, match="scale must not be 0"):
        layer.unscale_layer(0)
    assert layer.adapters["default"].scaling == 1.0


# QLoRA without autocast, after prepare_model_for_kbit_training: an fp32 x over a base that computes in bfloat16


def quantized_base(compute_dtype):
    torch.manual_seed(4)
    return gk.QuantizedLinear(gk.quantize(nn.Linear(K, N)).base_weight(), torch.randn(N), compute_dtype)


def gradients_of(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("forms", FORMS)
def test_an_x_wider_than_the_base_computes_in(forms):
    """As exact as what is computed in bfloat16 alone allows; what does not multiply W is exact to fp32."""
    x = rows(torch.float32)
    layer = one_layer(quantized_base(torch.bfloat16), **FORMS[forms])
    assert {p.dtype for p in layer.adapters.parameters()} == {torch.float32}
    got = gradients_of(layer, x)
    dense = one_layer(quantized_base(None).to_linear(torch.float32).double(), **FORMS[forms])
    dense.base_layer.bias.data.copy_(layer.base_layer.bias)
    for name, parameter in dense.adapters.named_parameters():
        parameter.data.copy_(layer.adapters.get_parameter(name))
    truth = gradients_of(dense.double(), x.double())
    narrow = gradients_of(copy.deepcopy(layer), x.bfloat16())  # all of it in bfloat16
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        assert got[name].dtype == torch.float32, name
        exact = name.rpartition(".")[2] in ("B_up", "B_down", "B", "E")
        bound = 1e-5 * float(value.abs().max()) if exact else allowed_error(value, narrow[name], torch.bfloat16)
        assert largest_error(got[name], value) <= bound, name


def test_lora_is_pefts_there():
    bnb = pytest.importorskip("bitsandbytes")
    x = rows(torch.float32)
    torch.manual_seed(0)
    linear = gk.quantize(nn.Linear(K, N)).to_linear4bit()
    linear.compute_dtype, linear.compute_type_is_set = torch.bfloat16, True
    assert isinstance(linear, bnb.nn.Linear4bit)
    net = nn.ModuleDict({"up": linear})
    net.is_loaded_in_4bit = True
    theirs = get_peft_model(
        copy.deepcopy(net), LoraConfig(r=3, lora_alpha=6, target_modules=["up"])
    ).base_model.model.up
    ours = one_layer(net["up"], A="none", E="none", alpha=6.0)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        theirs.lora_A["default"].weight.copy_(ours.adapters["default"].B_down)
        theirs.lora_B["default"].weight.copy_(ours.adapters["default"].B_up)
    with torch.compiler.set_stance("force_eager"):
        expected = gradients_of(theirs, x)
    got = gradients_of(ours, x)
    names = {"lora_A.default.weight": "B_down", "lora_B.default.weight": "B_up"}
    for name, value in expected.items():
        mine = got[f"gkglora_adapter.default.{names[name]}" if name in names else name]
        rounding = torch.finfo(torch.float32 if name in names else torch.bfloat16).eps
        assert mine.dtype == value.dtype
        assert largest_error(mine, value) <= 8 * rounding * float(value.abs().max()), name


# Fields of PEFT's configurations


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(6, 6), "up": nn.Linear(6, 6)}) for _ in range(4)
        )
        self.model.extra = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6)}) for _ in range(4))


@pytest.mark.parametrize("method", [GLoRAPeftConfig, ShareLoRAPeftConfig])
def test_some_layers_by_their_numbers(method, tmp_path):
    for chosen in ({"layers_to_transform": [1, 3]}, {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
                   {"layers_to_transform": 2, "layers_pattern": ["h", "extra"]},
                   {"layers_to_transform": 1, "exclude_modules": ["up"]}):  # fmt: skip
        model = get_peft_model(Blocks(), method(r=2, target_modules=["q", "up"], **chosen))
        peft = get_peft_model(Blocks(), LoraConfig(r=2, target_modules=["q", "up"], **chosen))
        names = [
            {path.replace(f".{part}", "") for path, _ in each.named_modules() if path.endswith(part)}
            for each, part in ((model, f"{model.base_model.prefix}adapter"), (peft, "lora_A"))
        ]
        assert names[0] == names[1] != set()
        model.save_pretrained(tmp_path)
        assert method.from_pretrained(tmp_path).layers_to_transform == chosen["layers_to_transform"]


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"layers_pattern": "layers"}, ValueError, "give both"),
    ({"layers_to_transform": [-1]}, ValueError, r"an integer >= 0 or a list of them; got \[-1\]"),
    ({"layers_to_transform": "1"}, ValueError, "layers_to_transform must be"),
    ({"layers_to_transform": [1], "layers_pattern": 3}, TypeError, "layers_pattern must be"),
    ({"layers_to_transform": [1], "target_modules": "all-linear"}, ValueError, "name the modules"),
    ({"lora_alpha": 16, "lora_dropout": 0.1}, TypeError, "for lora_alpha use alpha; for lora_dropout use dropout"),
    ({"rank_pattern": {"q": 4}}, TypeError, "for rank_pattern use patterns"),
    ({"use_dora": True}, TypeError, "has no 'use_dora'; it has A, B, C"),
])  # fmt: skip
def test_fields_that_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        GLoRAPeftConfig(**settings)


# Layers that are nn.Linear under another name


class Anew(nn.Linear):
    """As transformers' FalconLinear."""

    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class Noisy(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Factor(nn.Linear):
    factor = 1

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1000, 1000)


class InFp32(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.float(), self.weight.float(), None)


class Inherited(nn.Linear):
    pass


@pytest.mark.parametrize("kind", [Anew, Inherited])
@pytest.mark.parametrize("bias", [True, False])
def test_a_class_that_computes_what_linear_does(kind, bias, calls):
    torch.manual_seed(0)
    linear, x = kind(K, N, bias, dtype=torch.float64), rows()

    def net():
        return nn.ModuleDict({"up": copy.deepcopy(linear)})

    config = GLoRAPeftConfig(r=2, target_modules=["up"])
    lora = LoraConfig(r=2, target_modules=["up"])
    models = [
        gk.inject(net(), gk.GLoRAConfig(rank=2), target_modules=["up"]),
        get_peft_model(net(), config).base_model.model,
        gk.accelerate(get_peft_model(net(), lora), verbose=False).base_model.model,
    ]
    for model in models:
        torch.testing.assert_close(model["up"](x), linear(x), rtol=0, atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [Detached, Noisy, Factor, Clamped, InFp32])
def test_a_class_that_computes_something_else(kind):
    net, state = nn.ModuleDict({"up": kind(K, N)}), torch.get_rng_state()
    with pytest.raises(ValueError, match="up"):
        gk.inject(net, gk.GLoRAConfig(rank=2), target_modules=["up"])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=kind.__name__):
        get_peft_model(net, GLoRAPeftConfig(target_modules=["up"]))
    lora = get_peft_model(net, LoraConfig(r=2, target_modules=["up"]))
    gk.accelerate(lora, verbose=False)
    assert {reason for _, reason in gk.acceleration(lora).kept} == {f"its base is a {kind.__name__}"}
