"""DoRA over bitsandbytes' `Linear4bit`: no less exact than PEFT, and never with a norm of another W.

The truth is float64 over what bitsandbytes itself decodes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from twins import Twins, randomized, step

bnb = pytest.importorskip("bitsandbytes")


def config(**more):
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["up"], "use_dora": True, **more})


def errors(found, truth):
    return {name: float((found[name].double() - value).norm() / value.norm()) for name, value in truth.items()}


@pytest.fixture(autouse=True)
def _eager():
    """On a CPU bitsandbytes would compile its decoder, for seconds a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def made(calls):
    def build(compute=None, dtype=torch.float32, **more):
        class Quantized(nn.Module):
            is_loaded_in_4bit = True

            def __init__(self):
                super().__init__()
                self.up = bnb.nn.Linear4bit(128, 64, True, compute, quant_type="nf4")
                dense = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 128**-0.5
                self.up.weight = bnb.nn.Params4bit(dense, requires_grad=False, quant_type="nf4", module=self.up)

            def forward(self, x):
                return self.up(x)

        torch.manual_seed(0)
        net = Quantized().to("cpu")
        model = get_peft_model(net, config(**more), autocast_adapter_dtype=False)
        return Twins(randomized(model, 0.1), calls)

    return build


def truth_of(model, x):
    """The same layer over what bitsandbytes decodes, in float64."""
    from bitsandbytes.functional import dequantize_4bit

    layer = model.base_model.model.up
    weight = layer.base_layer.weight
    net = nn.Module()
    net.up = nn.Linear(128, 64)
    net.up.weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
    net.up.bias.data = layer.base_layer.bias.data.float()
    net.forward = lambda x: net.up(x)
    wide = get_peft_model(net.double(), config(), autocast_adapter_dtype=False)
    state = {name: value.double() for name, value in model.state_dict().items() if "lora_" in name}
    wide.load_state_dict(state, strict=False)
    return step(wide, x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errs_no_more_than_peft(made, dtype):
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    pair = made(compute=dtype)
    for _ in range(2):  # the second time with a kept norm of W
        plain, got = step(pair.plain, x), step(pair.fast, x)
        assert len(pair.calls) == 1
        pair.calls.clear()
        truth = truth_of(pair.plain, x)
        its, ours = errors(plain, truth), errors(got, truth)
        for name, error in ours.items():
            assert got[name].dtype == plain[name].dtype, name
            assert error <= 2 * its[name] + 4 * torch.finfo(dtype).eps, name
        randomized(pair.plain, 0.3), randomized(pair.fast, 0.3)


def test_a_wide_x_over_a_narrow_compute_dtype(made):
    """After `prepare_model_for_kbit_training`: an fp32 residual stream over bf16 products."""
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    pair = made(compute=torch.bfloat16)
    plain, got, truth = step(pair.plain, x), step(pair.fast, x), truth_of(pair.plain, x)
    its, ours = errors(plain, truth), errors(got, truth)
    for name, error in ours.items():
        assert got[name].dtype == plain[name].dtype, name
        assert error <= 2 * its[name] + 4 * torch.finfo(torch.bfloat16).eps, name


def codes(weight):
    weight.copy_(weight.flip(0))


def absmax(weight):
    weight.quant_state.state2.absmax.mul_(1.7)


def state(weight):
    """Another one over the same codes."""
    new, nested = copy.copy(weight.quant_state), copy.copy(weight.quant_state.state2)
    nested.absmax = nested.absmax * 1.7
    new.state2 = nested
    weight.quant_state = new


@pytest.mark.parametrize("write", [codes, absmax, state])
def test_a_weight_that_is_written_to(made, write):
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    pair = made(compute=torch.float32)
    pair.check(x, 1, 1e-4)
    for model in pair:
        with torch.no_grad():
            write(model.base_model.model.up.base_layer.weight)
    pair.check(x, 1, 1e-4)


def test_codes_that_are_written_to_through_data_and_a_move(made):
    """The write changes no version; after a move, also to where it is, the layer reads its base again."""
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    pair = made(compute=torch.float32)
    pair.check(x, 1, 1e-4)
    for model in pair:
        weight = model.base_model.model.up.base_layer.weight
        weight.data.copy_(weight.data.flip(0))
        model.to("cpu")
    pair.check(x, 1, 1e-4)


@pytest.mark.filterwarnings("ignore:.*4-bit:UserWarning")
def test_merged_and_unmerged(made):
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    pair = made(compute=torch.float32)
    for model in pair:
        model.merge_adapter()
    pair.check(x, 0, 0.0)
    for model in pair:
        model.unmerge_adapter()
    pair.check(x, 1, 1e-4)
