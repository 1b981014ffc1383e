"""PEFT's layers over bitsandbytes' `Linear4bit` on our operators: no less exact than PEFT, and never on a stale weight.

The truth is float64 over what bitsandbytes itself decodes. The dtype of the comparison is the one the base computes
in: PEFT leaves the adapter of an x wider than that in the dtype of x, ours is computed with the base.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import nn
from twins import Twins, assert_same, randomized, step

import glora_kernels as gk
from glora_kernels.quant.bnb import REPACKED, UNQUANTIZED
from glora_kernels.reference.tolerance import allowed_error, largest_error

bnb = pytest.importorskip("bitsandbytes")
K, N = 128, 64
METHODS = {"lora": LoraConfig, "hira": HiraConfig}
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _eager():
    """On a CPU bitsandbytes would compile its decoder, for seconds a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


class Net4(nn.Module):
    """One quantized layer, with the mark by which PEFT knows a model loaded in 4 bits."""

    is_loaded_in_4bit = True

    def __init__(self, kind=None, bias=True, compute_dtype=None, nested=True, quant_type="nf4"):
        super().__init__()
        kind = kind or bnb.nn.Linear4bit
        self.up = kind(K, N, bias, compute_dtype, compress_statistics=nested, quant_type=quant_type)
        dense = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * K**-0.5
        self.up.weight = bnb.nn.Params4bit(
            dense, requires_grad=False, compress_statistics=nested, quant_type=quant_type, module=self.up
        )

    def forward(self, x):
        return self.up(x)


@pytest.fixture
def quantized(calls):
    def build(method, config=None, **more):
        torch.manual_seed(0)
        model = get_peft_model(Net4(**more).to("cpu"), METHODS[method](r=4, target_modules=["up"], **(config or {})))
        return Twins(randomized(model, 0.1).train(), calls)

    return build


@pytest.fixture
def rows():
    return torch.randn(6, 5, K, generator=torch.Generator().manual_seed(2))


def truth(model, x):
    """The same model over the dense weight that the codes stand for, in float64."""
    dense = copy.deepcopy(model)
    layer = dense.base_model.model.up
    base = layer.base_layer
    linear = nn.Linear(K, N, bias=base.bias is not None)
    linear.weight.data = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().double(), base.bias.requires_grad)
    linear.weight.requires_grad_(False)
    layer.base_layer = linear
    if type(layer).__module__.endswith("lora.bnb"):
        from peft.tuners.lora.layer import Linear as Dense
    else:
        from peft.tuners.hira.layer import Linear as Dense
    layer.__class__ = Dense
    return step(dense.double(), x.double())


def no_less_exact(pair, x, dtype, autocast=False):
    expected = truth(pair.plain, x)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        pefts = step(pair.plain, x)
        pair.calls.clear()
        got = step(pair.fast, x)
    assert len(pair.calls) == 1
    assert got.keys() == pefts.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == pefts[name].dtype, name
        assert largest_error(got[name], value) <= allowed_error(value, pefts[name], dtype), name


CASES = [
    # compute_dtype, x, the dtype of the comparison, autocast
    (None, torch.float32, torch.float32, False),
    (None, torch.bfloat16, torch.bfloat16, False),
    (torch.float32, torch.float32, torch.float32, False),
    (torch.float32, torch.bfloat16, torch.bfloat16, False),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
    (torch.bfloat16, torch.float32, torch.bfloat16, True),
    (None, torch.float16, torch.float16, False),
]


@methods
@pytest.mark.parametrize(("compute", "dtype", "compared", "autocast"), CASES)
def test_no_less_exact_than_peft(quantized, rows, method, compute, dtype, compared, autocast):
    pair = quantized(method, compute_dtype=compute)
    no_less_exact(pair, rows.to(dtype), compared, autocast)
    no_less_exact(pair, rows[0, :1].to(dtype), compared, autocast)
    bases = [model.base_model.model.up.base_layer for model in pair]
    assert bases[0].compute_dtype == bases[1].compute_dtype
    assert bases[1].compute_type_is_set


def test_wider_than_what_is_computed_in(quantized, rows):
    """As after prepare_model_for_kbit_training: the product in bfloat16, the adapter in fp32, no worse than PEFT's."""
    pair = quantized("lora", {"lora_alpha": 7, "lora_bias": True}, compute_dtype=torch.bfloat16)
    no_less_exact(pair, rows, torch.float32)
    pair.both(lambda m: m.add_adapter("other", LoraConfig(r=2, target_modules=["up"], lora_bias=True)))
    pair.both(lambda m: m.base_model.set_adapter(["default", "other"]))
    no_less_exact(pair, rows, torch.float32)


def test_hira_wider_than_what_is_computed_in_is_pefts(quantized, rows):
    """PEFT multiplies by W∘(up·down) in fp32 there, which one call in bfloat16 would round."""
    pair = quantized("hira", compute_dtype=torch.bfloat16)
    pefts, got = step(pair.plain, rows), step(pair.fast, rows)
    assert not pair.calls
    assert all(torch.equal(got[name], value) for name, value in pefts.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(pair.fast, rows)
    assert pair.calls


@methods
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_formats(quantized, rows, method, quant_type, nested, bias):
    pair = quantized(method, quant_type=quant_type, nested=nested, bias=bias)
    no_less_exact(pair, rows, torch.float32)


@pytest.mark.parametrize("more", [{"bias": "all"}, {"lora_bias": True, "use_rslora": True}, {"bias": "lora_only"}])
def test_bias_and_scale(quantized, rows, more):
    pair = quantized("lora", {"lora_alpha": 7, **more})
    no_less_exact(pair, rows, torch.float32)
    trained = {name for name, p in pair.fast.named_parameters() if p.requires_grad}
    assert trained <= step(pair.fast, rows).keys()


@methods
def test_several_adapters_disabling_and_eval(quantized, rows, method):
    pair = quantized(method)
    pair.both(lambda m: m.add_adapter("other", METHODS[method](r=2, target_modules=["up"])))
    pair.both(lambda m: m.base_model.set_adapter(["default", "other"]))
    no_less_exact(pair, rows, torch.float32)
    with pair.plain.disable_adapter(), pair.fast.disable_adapter():
        assert torch.equal(pair.plain(rows), pair.fast(rows))
    expected = truth(pair.plain, rows)["y"]
    pair.calls.clear()
    with torch.no_grad():
        y = pair.fast.eval()(rows)
    assert len(pair.calls) == 1
    assert largest_error(y, expected) <= 1e-5


@methods
def test_merging_gives_the_base_another_weight(quantized, rows, method):
    pair = quantized(method)
    before = step(pair.fast, rows)
    pair.both(lambda m: m.merge_adapter())
    assert torch.equal(pair.plain(rows), pair.fast(rows))
    pair.both(lambda m: m.unmerge_adapter())
    no_less_exact(pair, rows, torch.float32)
    assert not torch.equal(step(pair.fast, rows)["y"], before["y"])  # it was rounded to 4 bits twice
    plain, fast = (model.merge_and_unload() for model in pair)
    assert_same(fast.state_dict(), plain.state_dict(), 0.0)


def test_other_memory_under_the_same_parameter(quantized, rows):
    """What a move to a device and back leaves, and a load into it then."""
    pair = quantized("lora", nested=False)
    no_less_exact(pair, rows, torch.float32)
    for model in pair:
        weight = model.base_model.model.up.base_layer.weight
        weight.data = weight.data.clone().bitwise_xor_(0x35)
    no_less_exact(pair, rows, torch.float32)
    for model in pair:
        state = model.base_model.model.up.base_layer.weight.quant_state
        state.absmax = state.absmax * 1.7
    no_less_exact(pair, rows, torch.float32)


def test_packed_for_inference_on_a_cpu_and_unpacked(quantized, rows):
    """bitsandbytes' packing rounds absmax for good; a state dict undoes the packing in the same parameter."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, _convert_weight_packed_for_cpu_inverse

    pair = quantized("lora")
    no_less_exact(pair, rows, torch.float32)
    for model in pair:
        weight = model.base_model.model.up.base_layer.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert list(gk.acceleration(pair.fast).kept) == [("lora.Linear4bit", REPACKED)]
    for model in pair:
        weight = model.base_model.model.up.base_layer.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    assert gk.acceleration(pair.fast).accelerated == {"lora.Linear4bit": 1}
    no_less_exact(pair, rows, torch.float32)


@methods
def test_what_others_see_and_decelerate(quantized, rows, method):
    pair = quantized(method)
    step(pair.fast, rows)
    assert repr(pair.fast) == repr(pair.plain)
    assert_same(pair.fast.state_dict(), pair.plain.state_dict(), 0.0)
    for other in (copy.deepcopy(pair.fast), pickle.loads(pickle.dumps(pair.fast)).to("cpu")):
        mine, its = (model.base_model.model.up for model in (pair.fast, other))
        assert "weight" in its._glora_kept  # read before its first call, which torch.compile may trace
        pair.calls.clear()
        assert_same(step(other, rows), step(pair.fast, rows), 0.0)
        assert len(pair.calls) == 2
        assert its._glora_kept["weight"].packed.data_ptr() == its.base_layer.weight.data_ptr()
        assert its.base_layer.weight.data_ptr() != mine.base_layer.weight.data_ptr()
    gk.decelerate(pair.fast)
    plain, fast = (model.base_model.model.up for model in pair)
    assert type(fast) is type(plain)
    assert vars(fast).keys() == vars(plain).keys()
    pair.check(rows, 0, 0.0)


def test_a_copy_compiles_in_one_piece(quantized, rows):
    """Its 4-bit state is read before torch.compile could meet the reading, which it cannot trace."""
    pair = quantized("lora")
    fresh = copy.deepcopy(pair.fast)
    with torch.compiler.set_stance("default"):
        y = torch.compile(fresh, backend="eager", fullgraph=True)(rows)
    assert_same({"y": y}, {"y": pair.fast(rows)}, 1e-6)


def test_the_mean_over_dropout_masks_is_eval(quantized, rows):
    fast = quantized("lora", {"lora_dropout": 0.3}).fast
    x = rows[0, :2]
    with torch.no_grad():
        expected = fast.eval()(x)
        ys = torch.stack([fast.train()(x) for _ in range(100)])
    assert float(ys.std(0).max()) > 0
    assert bool(((ys.mean(0) - expected).abs() <= 6 * ys.std(0) / 100**0.5 + 1e-5).all())


class OwnForward(bnb.nn.Linear4bit):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_left_alone(calls, quantized, rows):
    own = quantized("lora", kind=OwnForward)
    own.check(rows, 0, 0.0)
    assert list(gk.acceleration(own.fast).kept) == [("lora.Linear4bit", "OwnForward has a forward of its own")]
    raw = get_peft_model(Net4(), LoraConfig(r=2, target_modules=["up"]))  # never moved to a device
    gk.accelerate(raw, verbose=False)
    assert list(gk.acceleration(raw).kept) == [("lora.Linear4bit", UNQUANTIZED)]
    eight = nn.ModuleDict({"up": bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)}).to("cpu")
    eight.is_loaded_in_8bit = True
    model = get_peft_model(eight, LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(ValueError, match=r"lora\.Linear8bitLt +PEFT +not a kind that is served"):
        gk.accelerate(model)


def test_a_trained_x_of_another_dtype_keeps_its_own(quantized, rows):
    """A float64 x meets a base that computes in fp32: y and dx come back in float64, as PEFT's."""
    pair = quantized("lora", compute_dtype=torch.float32)
    expected, got = (step(model, rows.double()) for model in pair)
    assert len(pair.calls) == 1
    assert_same(got, expected, 1e-5)
