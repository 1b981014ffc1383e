"""What is kept between calls is real and ordinary, whatever mode it was made in: constants, and the one workspace."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import glora_kernels as gk
from glora_kernels import modes
from glora_kernels.quant import codes, dequantize, quantize_weight
from glora_kernels.runtime.workspace import release, workspace_like

CPU = torch.device("cpu")
FORMS = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]
each_form = pytest.mark.parametrize(("kind", "nested"), FORMS)


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Negated(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return -result if func in (torch.tensor, torch.linspace) else result


SURROUNDINGS = {
    "fake": FakeTensorMode, "inference": torch.inference_mode, "meta": lambda: torch.device("meta"),
    "function mode": _Negated, "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "float64": lambda: _default_dtype(torch.float64), "grad": torch.enable_grad,
}  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten():
    """Every test begins, and leaves, as a process does."""
    modes._constants.clear()
    release()
    yield
    modes._constants.clear()
    release()


def values(kind="nf4"):
    return [codes.codebook(kind, CPU), codes.pairs(kind, CPU), *codes.encoder(kind, CPU), codes.dynamic_map(CPU)]


@pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS.keys())
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_constants_are_the_same_wherever_they_were_first_asked_for(surroundings, kind):
    expected = [tensor.clone() for tensor in values(kind)]
    modes._constants.clear()
    with surroundings():
        values(kind)
    for tensor, right in zip(values(kind), expected, strict=True):
        assert type(tensor) is torch.Tensor
        assert not tensor.is_inference()
        assert (tensor.dtype, tensor.device) == (right.dtype, CPU)
        assert torch.equal(tensor, right)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize, torch.func.grad])
def test_constants_outlive_a_transform(transform):
    expected = values()[1].clone()
    modes._constants.clear()
    transform(lambda x: (x * values()[0][1]).sum())(torch.ones(3))
    assert torch.equal(values()[1] + 0, expected)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in values())


def test_a_constant_is_made_once():
    assert codes.codebook("nf4", CPU) is codes.codebook("nf4", torch.device("cpu"))


@each_form
@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_the_codec_is_right_in_a_trace_and_after_it(kind, nested, tracing):
    weight = quantize_weight(torch.randn(9, 70), kind, double_quant=nested)
    x, expected = torch.randn(3, 70), dequantize(weight, torch.float32).clone()
    modes._constants.clear()
    traced = make_fx(
        lambda x: x @ dequantize(weight, torch.float32).t(), tracing_mode=tracing, _allow_non_fake_inputs=True
    )(x)
    assert torch.equal(dequantize(weight, torch.float32), expected)
    torch.testing.assert_close(traced(x), x @ expected.t())


@each_form
def test_quantizing_and_running_a_model_of_fake_tensors(kind, nested):
    with FakeTensorMode():
        model = gk.quantize(nn.Sequential(nn.Linear(64, 32)), kind, double_quant=nested)
        model = gk.inject(model, gk.GLoRAConfig(A="vector", B="lora", rank=2))
        with torch.no_grad():
            assert model(torch.randn(3, 64)).shape == (3, 32)
        assert model.state_dict()["0.weight"].shape == (1024, 1)
    real, x = gk.quantize(nn.Linear(64, 32), kind, double_quant=nested), torch.randn(3, 64)
    torch.testing.assert_close(real(x), nn.functional.linear(x, real.to_linear().weight, real.bias))
    assert real.to_linear().weight.isfinite().all()


@each_form
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_computes_the_same(kind, nested, strict):
    layer, x = gk.quantize(nn.Linear(64, 32), kind, double_quant=nested), torch.randn(3, 64)
    program = torch.export.export(layer, (x,), strict=strict)
    modes._constants.clear()
    torch.testing.assert_close(program.module()(x), layer(x))


def test_the_workspace_belongs_to_no_mode():
    weight = torch.randn(8, 8)
    for surroundings in (FakeTensorMode, torch.inference_mode, lambda: torch.device("meta")):
        release()
        with surroundings():
            workspace_like(weight, torch.float32)
        view = workspace_like(weight, torch.float32).copy_(weight)
        assert type(view) is torch.Tensor
        assert torch.equal(view, weight)


@pytest.mark.parametrize("config", [
    gk.GLoRAConfig.lora(rank=2), gk.GLoRAConfig(A="lora", B="vector", C="vector", rank=2)
], ids=["lora", "a-lora"])  # fmt: skip
@pytest.mark.parametrize("four_bit", [False, True])
def test_training_after_a_first_call_in_inference_mode(config, four_bit):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    layer = gk.GLoRALinear.from_linear(gk.quantize(linear, double_quant=True) if four_bit else linear, config)
    x = torch.randn(3, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.adapter().values())
