"""4-bit layers as modules: what they compute, adapted in every way, copied, cast, compiled."""

import pytest
import torch
from copies import COPIES
from packed import FULL
from small_configs import SMALL
from torch import nn
from torch.utils.checkpoint import checkpoint

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear, QuantizedLinear, reference
from glora_kernels.quant import QuantizedWeight, dequantize

CONFIGS = {name: SMALL[name] for name in ("lora", "matmul", "nothing")} | {
    "full": FULL,
    "a-lora": GLoRAConfig("lora", "vector", "vector", "constant", "constant", rank=2),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def quantized(k=40, n=9, bias=True, dtype=torch.float32, seed=0, **more):
    torch.manual_seed(seed)
    return gk.quantize(nn.Linear(k, n, bias, dtype=dtype), double_quant=True, **more)


def test_the_layer_computes_with_what_the_codes_stand_for():
    for dtype in (torch.float32, torch.bfloat16):
        layer = quantized(dtype=dtype)
        x = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
        y = layer(x)
        dense = layer.to_linear()
        assert (dense.weight.dtype, dense.bias.dtype) == (dtype, dtype)
        assert torch.equal(y, dense(x))
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert layer.to_linear(torch.float64).weight.dtype == torch.float64


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(ValueError, match="no linear layer"):
        gk.quantize(nn.LayerNorm(8))
    with pytest.raises(TypeError, match="QuantizedWeight"):
        QuantizedLinear(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="compute_dtype"):
        QuantizedLinear(quantized().base_weight(), compute_dtype=torch.int8)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        gk.quantize(nn.MultiheadAttention(8, 2))


# A GLoRA layer over it.


@each_config
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_reference(config, bias, randomize):
    layer = randomize(GLoRALinear.from_linear(quantized(bias=bias), config)).double()
    assert layer.quant_state.absmax.dtype == torch.uint8
    assert layer.weight.dtype == torch.uint8
    x, dy = torch.randn(2, 5, 40).double().requires_grad_(), torch.randn(2, 5, 9).double()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.adapter().items()}
    x_ref = x.detach().clone().requires_grad_()
    expected = reference.glora_linear(
        x_ref, dequantize(layer.base_weight(), torch.float64), layer.bias, leaves, config
    )  # fmt: skip
    y = layer(x)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(dy)
    expected.backward(dy)
    assert torch.allclose(x.grad, x_ref.grad, rtol=1e-12, atol=1e-12)
    for name, leaf in leaves.items():
        assert torch.allclose(layer.get_parameter(name).grad, leaf.grad, rtol=1e-11, atol=1e-11), name
    assert layer.weight.grad is None


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float32])
def test_a_fresh_layer_equals_its_base_bit_for_bit(config, dtype, compute):
    base = quantized(k=128, n=48, dtype=dtype, compute_dtype=compute)
    x = torch.randn(33, 128, dtype=dtype)
    expected = base(x)
    layer = GLoRALinear.from_linear(base, config)
    assert expected.dtype == dtype
    assert torch.equal(layer(x), expected)
    assert {p.dtype for p in layer.adapter().values()} <= {compute or dtype}
    assert layer.weight.data_ptr() == base.weight.data_ptr()


@each_config
@pytest.mark.parametrize("bias", [True, False])
def test_x_in_more_bits_than_the_bias(config, bias, randomize):
    """Without a compute_dtype x decides: fp32 x over a layer quantized from bfloat16, whose bias is in bfloat16."""
    layer = GLoRALinear.from_linear(quantized(bias=bias, dtype=torch.bfloat16), config, adapter_dtype=torch.float32)
    layer = randomize(layer)
    x = torch.randn(5, 40, requires_grad=True)
    adapter = {name: p.detach().double() for name, p in layer.adapter().items()}
    b = None if layer.bias is None else layer.bias.double()
    expected = reference.glora_linear(x.double(), dequantize(layer.base_weight(), torch.float64), b, adapter, config)
    y = layer(x)
    torch.testing.assert_close(y, expected.float())
    y.sum().backward()
    assert x.grad.isfinite().all()


@each_config
def test_the_base_cannot_be_overwritten_by_chance(config):
    layer = GLoRALinear.from_linear(quantized(), config)
    with pytest.raises(RuntimeError, match="4 bits"):
        layer.reset_parameters()
    layer.reset_adapter()
    weight = layer.base_weight()
    assert isinstance(weight, QuantizedWeight)
    with pytest.raises(RuntimeError):
        layer.weight.requires_grad_(True)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["frozen", "glora"])
def test_copies_compute_the_same_and_share_nothing(how, kind, randomize):
    layer = quantized()
    if kind == "glora":
        layer = randomize(GLoRALinear.from_linear(layer, FULL))
    other = COPIES[how](layer)
    x = torch.randn(2, 40)
    expected = layer(x)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.weight.zero_()
        for tensor in other.quant_state.tensors():
            tensor.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast", ["to", "method", "kwargs"])
def test_a_change_of_dtype_touches_bias_and_adapter_only(dtype, cast, randomize):
    """absmax and the offset are no parameters and no buffers: rounding them would be another weight."""
    model = nn.Sequential(randomize(GLoRALinear.from_linear(quantized(), FULL)), quantized(k=9, n=9))
    before = [[t.clone() for t in (m.weight, *m.quant_state.tensors())] for m in model]
    name = {torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}[dtype]
    model = {"to": lambda: model.to(dtype), "method": lambda: getattr(model, name)(),
             "kwargs": lambda: model.to(device="cpu", dtype=dtype)}[cast]()  # fmt: skip
    for module, tensors in zip(model, before, strict=True):
        now = (module.weight, *module.quant_state.tensors())
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(now, tensors, strict=True))
        assert module.bias.dtype == dtype
    assert {p.dtype for p in model[0].adapter().values()} == {dtype}
    assert model(torch.randn(2, 40, dtype=dtype)).dtype == dtype


def test_to_meta_and_back_from_a_state(randomize):
    layer = randomize(GLoRALinear.from_linear(quantized(), FULL))
    state, x = layer.state_dict(), torch.randn(2, 40)
    expected = layer(x)
    state = {name: t.clone() for name, t in state.items()}
    layer.to("meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.quant_state.tensors()))
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_an_x_on_another_device_is_refused():
    layer = quantized()
    with pytest.raises(ValueError, match="one device"):
        layer(torch.randn(2, 40, device="meta"))
    assert layer.to("meta")(torch.randn(2, 40, device="meta")).shape == (2, 9)


def test_repr_says_what_the_base_is():
    assert repr(quantized()) == (
        "QuantizedLinear(in_features=40, out_features=9, bias=True, nf4, blocksize=64, double_quant)"
    )
    assert "nf4, blocksize=64, double_quant" in repr(GLoRALinear.from_linear(quantized(), FULL))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("config", [CONFIGS["full"], CONFIGS["a-lora"]], ids=["full", "a-lora"])
def test_compiles_as_one_graph(config, randomize):
    torch._dynamo.reset()
    layer = randomize(GLoRALinear.from_linear(quantized(compute_dtype=torch.float32), config))
    frozen = quantized(k=9, n=9)
    model = nn.Sequential(layer, frozen)
    x = torch.randn(5, 40, requires_grad=True)
    trained = [x, *layer.adapter().values()]
    expected = torch.autograd.grad(model(x).sum(), trained, allow_unused=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    got = torch.autograd.grad(compiled(x).sum(), trained, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_with_dropout(reentrant, randomize):
    config = GLoRAConfig("vector", "lora", "vector", rank=3, dropout=0.5)
    layer = randomize(GLoRALinear.from_linear(quantized(), config))
    x = torch.randn(5, 40, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        layer.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        grads.append([x.grad.clone(), *(p.grad.clone() for p in layer.adapter().values())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_autocast_trains_fp32_adapters(compute, randomize):
    layer = randomize(GLoRALinear.from_linear(quantized(k=64, n=32), FULL), std=0.1)
    layer.compute_dtype = compute
    x = torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    got = {name: p.grad.clone() for name, p in layer.adapter().items()}
    layer.compute_dtype = None
    layer.zero_grad()
    layer(x).sum().backward()
    for name, parameter in layer.adapter().items():
        assert got[name].dtype == torch.float32
        assert (got[name] - parameter.grad).norm() < 0.05 * parameter.grad.norm(), name


def test_a_data_parallel_replica_reads_its_own_parameters(randomize):
    layer = randomize(GLoRALinear.from_linear(quantized(), FULL))
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        setattr(replica, name, parameter)
    x = torch.randn(2, 40)
    assert torch.equal(replica(x), layer(x))
