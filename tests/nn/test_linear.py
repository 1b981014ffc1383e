"""GLoRALinear alone: its parameters, that it starts as its base, and that it computes the equation."""

import copy
import subprocess
import sys

import pytest
import torch
from copies import COPIES
from small_configs import SMALL
from torch import nn
from torch.nn import functional as F

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear, reference

CONFIGS = SMALL | {
    "all-lora": GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=3),
    "a-lora": GLoRAConfig("lora", "none", rank=2, D="constant"),
    "bias-only": GLoRAConfig("none", "none", "vector", "none", "none"),
    "matmul-a": GLoRAConfig("lora", "none", "none", "none", "none", rank=3, variant="matmul"),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def conv1d(k, n, dtype=torch.float32):
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


def truth(layer, x):
    """The layer by the reference, on leaves of its own; (y, leaves by name)."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.adapter().items()}
    weight = layer.weight.detach().t() if layer._transposed else layer.weight.detach()
    return reference.glora_linear(x, weight, layer.bias, leaves, layer.config), leaves


@each_config
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_the_configuration(config, bias):
    layer = GLoRALinear(7, 5, config, bias=bias)
    shapes = {name: tuple(p.shape) for name, p in layer.adapter().items()}
    assert shapes == config.parameter_shapes(7, 5, bias)
    assert gk.trainable_parameters(layer) == config.num_parameters(7, 5, bias)
    assert not layer.weight.requires_grad
    assert (layer.bias is not None) == bias
    assert dict(layer.named_parameters()).keys() == {"weight", *shapes} | ({"bias"} if bias else set())


@pytest.mark.parametrize("init", ["xavier", "kaiming"])
def test_adapter_starts_with_random_down_and_zero_everything_else(init):
    config = GLoRAConfig("lora", "lora", "lora", "vector", "constant", rank=64, init=init)
    layer = GLoRALinear(96, 128, config)
    for name, parameter in layer.adapter().items():
        assert parameter.ne(0).any() == name.endswith("_down"), name
    bound = (6 / (96 + 64)) ** 0.5 if init == "xavier" else 96**-0.5
    for down in (layer.A_down, layer.B_down):
        assert 0.95 * bound < down.abs().max() <= bound


@each_config
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_fresh_layer_equals_its_base_bit_for_bit(config, bias, training):
    linear = nn.Linear(24, 16, bias=bias, dtype=torch.float64).train(training)
    # Integers: their sums are exact, so equality is about the terms and not about the order of summation.
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randint(-8, 8, parameter.shape))
    x = torch.randint(-8, 8, (2, 5, 24)).double()
    expected = linear(x)
    layer = GLoRALinear.from_linear(linear, config)
    assert layer.training is training
    assert torch.equal(layer(x), expected)


@each_config
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_layer_equals_its_base_in_every_rounding(config, bias, dtype):
    linear = nn.Linear(512, 96, bias=bias, dtype=dtype)
    x = torch.randn(33, 512, dtype=dtype)
    expected = linear(x)
    assert torch.equal(GLoRALinear.from_linear(linear, config)(x), expected)


@each_config
@pytest.mark.parametrize("base", ["bias", "no-bias", "conv1d"])
def test_values_and_gradients_are_those_of_the_reference(config, base, randomize):
    linear = conv1d(9, 7, torch.float64) if base == "conv1d" else nn.Linear(9, 7, base == "bias").double()
    layer = randomize(GLoRALinear.from_linear(linear, config))
    x = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    x_ref = x.detach().clone().requires_grad_()
    dy = torch.randn(2, 4, 7, dtype=torch.float64)
    y = layer(x)
    y_ref, leaves = truth(layer, x_ref)
    torch.testing.assert_close(y, y_ref, rtol=1e-12, atol=1e-12)
    y.backward(dy)
    y_ref.backward(dy)
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-12, atol=1e-12)
    for name, leaf in leaves.items():
        torch.testing.assert_close(layer.get_parameter(name).grad, leaf.grad, rtol=1e-11, atol=1e-11)
    assert layer.weight.grad is None


def test_trained_bias_gets_its_gradient(randomize):
    layer = GLoRALinear(9, 7, GLoRAConfig(D="vector", rank=2), dtype=torch.float64)
    randomize(layer).bias.requires_grad_(True)
    x, dy = torch.randn(5, 9).double(), torch.randn(5, 7).double()
    layer(x).backward(dy)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0) * (1 + layer.D))


def test_dropout_acts_on_the_low_rank_path_in_training_only(randomize):
    config = GLoRAConfig(rank=3, dropout=0.5)
    layer = randomize(GLoRALinear(32, 8, config))
    x = torch.randn(6, 32)
    torch.manual_seed(1)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), layer(x))
    with torch.no_grad():
        layer.B_up.zero_()
    assert torch.equal(layer.train()(x), layer(x)), "without the low-rank path there is nothing to drop"


def test_dropout_of_another_form_of_b_has_no_effect(randomize):
    layer = randomize(GLoRALinear(8, 8, GLoRAConfig(B="vector", dropout=0.5)))
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer(x))


def test_from_linear_keeps_the_parameter_objects_and_freezes_them():
    linear = nn.Linear(6, 4)
    weight, bias = linear.weight, linear.bias
    layer = GLoRALinear.from_linear(linear, GLoRAConfig())
    assert layer.weight is weight
    assert layer.bias is bias
    assert not weight.requires_grad
    assert not bias.requires_grad


def test_conv1d_keeps_its_stored_weight_and_checkpoint_names():
    base = conv1d(6, 4)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    layer = GLoRALinear.from_linear(base, GLoRAConfig())
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert layer.weight.shape == (6, 4)
    result = layer.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(layer.adapter())


def test_base_checkpoint_loads():
    linear = nn.Linear(6, 4)
    layer = GLoRALinear(6, 4, GLoRAConfig())
    layer.load_state_dict(linear.state_dict(), strict=False)
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), linear(x))


@each_config
def test_state_dict_round_trip(config, randomize):
    layer = randomize(GLoRALinear(6, 4, config))
    other = GLoRALinear(6, 4, config)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies_compute_the_same_and_share_nothing(how, merged, full, randomize):
    layer = randomize(GLoRALinear(6, 4, full, bias=False)).eval()
    base = layer.weight.detach().clone()
    if merged:
        layer.merge()
    other = COPIES[how](layer)
    x = torch.randn(2, 6)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        layer.weight.zero_()
    if merged:
        other.unmerge()
        assert other.bias is None
    assert torch.equal(other.weight, base)


def test_to_dtype_moves_base_and_adapter(full, randomize):
    layer = randomize(GLoRALinear(6, 4, full)).to(torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    x = torch.randn(2, 6).double()
    torch.testing.assert_close(layer(x), truth(layer, x)[0])


def test_functional_call_uses_the_parameters_it_is_given(full, randomize):
    layer = randomize(GLoRALinear(6, 4, full))
    x = torch.randn(2, 6)
    other = {name: torch.randn_like(p) * 0.3 for name, p in layer.named_parameters()}
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(other[name])
    before = layer(x)
    torch.testing.assert_close(torch.func.functional_call(layer, other, x), expected(x))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("config", [CONFIGS["default"], CONFIGS["all-lora"]], ids=["default", "all-lora"])
def test_fp32_adapters_over_a_16_bit_base(config, randomize):
    linear = nn.Linear(32, 24).bfloat16()
    layer = randomize(GLoRALinear.from_linear(linear, config, adapter_dtype=torch.float32), std=0.1)
    assert layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in layer.adapter().values()} == {torch.float32}
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for name, parameter in layer.adapter().items():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.ne(0).any(), name
    adapter = {name: p.double() for name, p in layer.adapter().items()}
    expected = reference.glora_linear(x.double(), layer.weight.double(), layer.bias.double(), adapter, config)
    eager = F.linear(x, linear.weight, linear.bias)
    rounding = (eager.double() - F.linear(x.double(), linear.weight.double(), linear.bias.double())).norm()
    assert (y.double() - expected).norm() <= 3 * rounding


def test_two_dimensional_one_dimensional_and_empty_inputs(full, randomize):
    layer = randomize(GLoRALinear(6, 4, full))
    x = torch.randn(6)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    assert layer(torch.randn(0, 6)).shape == (0, 4)
    assert layer(torch.randn(2, 0, 6)).shape == (2, 0, 4)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("config", [CONFIGS["default"], CONFIGS["all-lora"], CONFIGS["matmul"]])
def test_autocast_computes_in_bf16_as_linear_does(config, merged, randomize):
    layer = randomize(GLoRALinear(32, 16, config), std=0.1).eval()
    x = torch.randn(6, 32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        if merged:
            layer.merge()  # in fp32, whatever autocast says
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.02 * expected.norm()
    if merged:
        torch.testing.assert_close(layer(x), expected)


def test_autocast_trains_fp32_adapters(full, randomize):
    layer = randomize(GLoRALinear(32, 16, full), std=0.1)
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    got = {name: p.grad.clone() for name, p in layer.adapter().items()}
    layer.zero_grad()
    layer(x.detach()).sum().backward()
    for name, parameter in layer.adapter().items():
        assert got[name].dtype == torch.float32
        assert (got[name] - parameter.grad).norm() < 0.05 * parameter.grad.norm(), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("config", [CONFIGS["default"], CONFIGS["all-lora"], CONFIGS["matmul"]])
@pytest.mark.parametrize("bias", [True, False])
def test_compiles_as_one_graph_and_agrees_with_eager(config, bias, randomize):
    torch._dynamo.reset()
    layer = randomize(GLoRALinear(12, 10, config, bias=bias))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12, requires_grad=True)
    expected = layer(x)
    expected.sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.adapter().items()} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(x.grad if name == "x" else layer.get_parameter(name).grad, grad)


def test_a_compiled_layer_sees_merge_disable_and_dropout(randomize):
    torch._dynamo.reset()
    layer = randomize(GLoRALinear(12, 10, GLoRAConfig(rank=2, dropout=0.5)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12)
    assert not torch.equal(compiled(x), compiled(x))
    layer.eval()
    expected = layer(x)
    torch.testing.assert_close(compiled(x), expected)
    with gk.disabled(layer):
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    layer.merge()
    torch.testing.assert_close(compiled(x), expected)
    layer.unmerge()
    torch.testing.assert_close(compiled(x), expected)


def test_a_data_parallel_replica_reads_its_own_parameters(full, randomize):
    layer = randomize(GLoRALinear(6, 4, full))
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(replica, name, None if parameter is None else 2 * parameter)
    x = torch.randn(2, 6)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(replica(x), doubled(x))


def test_meta_layers_hold_no_data_and_can_be_materialised(full):
    layer = GLoRALinear.from_linear(nn.Linear(6, 4, device="meta"), full)
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    layer.reset_parameters()
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_repr_says_what_the_layer_is(full):
    layer = GLoRALinear(6, 4, GLoRAConfig.lora(rank=2, alpha=4, dropout=0.1), bias=False)
    assert repr(layer) == (
        "GLoRALinear(in_features=6, out_features=4, bias=False, B=lora, rank=2, scale=2, dropout=0.1)"
    )
    layer = GLoRALinear(6, 4, full, bias=False)
    assert "D=" not in repr(layer)
    layer.merge()
    assert "bias=False" in repr(layer)
    assert repr(layer).endswith("merged)")
    matmul = GLoRAConfig("lora", "none", "none", "none", "none", variant="matmul")
    assert "variant=matmul" in repr(GLoRALinear(6, 4, matmul))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """Derived, but computes what a linear layer computes."""


class Extra(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(1))


def hooked():
    linear = nn.Linear(6, 4)
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return linear


def pre_hooked():
    linear = nn.Linear(6, 4)
    linear.register_forward_pre_hook(lambda module, args: None)
    return linear


def patched():
    linear = nn.Linear(6, 4)
    linear.forward = lambda x: x
    return linear


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))


UNSUPPORTED = {
    "own forward": (lambda: Doubled(6, 4), "forward"),
    "hook": (hooked, "hooks"),
    "pre-hook": (pre_hooked, "hooks"),
    "patched": (patched, "forward"),
    "parametrized": (parametrized, "parametrized"),
    "lazy": (lambda: nn.LazyLinear(4), "sizes"),
    "extra": (lambda: Extra(6, 4), "extra"),
    "integers": (lambda: _with_weight(torch.zeros(4, 6, dtype=torch.int8)), "int8"),
    "complex": (lambda: nn.Linear(6, 4, dtype=torch.complex64), "complex64"),
}


def _with_weight(weight):
    linear = nn.Linear(6, 4)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize(("build", "reason"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_linear_layers_that_cannot_be_replaced_are_refused_with_the_reason(build, reason):
    with pytest.raises(ValueError, match=reason):
        GLoRALinear.from_linear(build(), GLoRAConfig())


def test_a_subclass_that_only_has_another_name_is_accepted():
    linear = Renamed(6, 4)
    x = torch.randn(2, 6)
    torch.testing.assert_close(GLoRALinear.from_linear(linear, GLoRAConfig())(x), linear(x))


@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.Conv1d(2, 2, 1), GLoRALinear(4, 4, GLoRAConfig()), None])
def test_from_linear_takes_linear_layers_only(module):
    with pytest.raises(TypeError, match=type(module).__name__):
        GLoRALinear.from_linear(module, GLoRAConfig())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"in_features.*0"):
        GLoRALinear(0, 4, GLoRAConfig())
    with pytest.raises(ValueError, match=r"out_features.*4\.5"):
        GLoRALinear(4, 4.5, GLoRAConfig())
    with pytest.raises(TypeError, match="GLoRAConfig, got dict"):
        GLoRALinear(4, 4, {"rank": 4})
    with pytest.raises(ValueError, match="int32"):
        GLoRALinear.from_linear(nn.Linear(4, 4), GLoRAConfig(), adapter_dtype=torch.int32)
    with pytest.raises(ValueError, match="float8"):
        GLoRALinear(4, 4, GLoRAConfig(), adapter_dtype=torch.float8_e4m3fn)


def test_a_refused_linear_keeps_its_gradients():
    linear = nn.Linear(4, 4)
    with pytest.raises(TypeError):
        GLoRALinear.from_linear(linear, "lora")
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad


def test_wrong_input_width_is_an_error():
    with pytest.raises(ValueError, match="in_features"):
        GLoRALinear(6, 4, GLoRAConfig())(torch.randn(2, 5))


def test_a_trained_base_weight_is_refused():
    layer = GLoRALinear(6, 4, GLoRAConfig())
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        layer(torch.randn(2, 6))


def test_importing_touches_no_gpu_and_loads_no_kernel():
    script = (
        "import sys, torch, glora_kernels as gk; gk.backend; gk.GLoRALinear(4, 4, gk.GLoRAConfig())(torch.ones(1, 4));"
        "assert not torch.cuda.is_initialized();"
        "heavy = 'glora_kernels.tile', 'transformers', 'peft', 'bitsandbytes', 'matplotlib', 'optuna';"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
