"""Merging into a 4-bit base: refused by default, reported in numbers where asked for, and undone bit for bit."""

import copy
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear, QuantizedLinear
from glora_kernels.nn.merging import values
from glora_kernels.nn.model import named_layers
from glora_kernels.quant import dequantize, quantize_weight
from glora_kernels.quant.codes import codebook
from glora_kernels.reference.tolerance import FLOOR

FULL = GLoRAConfig("lora", "lora", "lora", "vector", "vector", rank=3, alpha=6)
SHIFTS_ONLY = GLoRAConfig("none", "none", "vector", "vector", "vector")
BASES = {  # n, k, type, blocksize, double_quant, bias, dtype
    "nf4": (24, 64, "nf4", 64, False, True, torch.float32),
    "nf4-nested": (96, 64, "nf4", 32, True, False, torch.bfloat16),
    "fp4": (16, 48, "fp4", 32, False, False, torch.float16),
    "fp4-odd": (7, 9, "fp4", 64, True, True, torch.bfloat16),
    "nf4-odd": (13, 33, "nf4", 32, True, False, torch.float32),
}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def make(base=BASES["nf4"], config=FULL, scale=0.05):
    n, k, quant_type, blocksize, double_quant, bias, dtype = base
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    quantized = gk.quantize(linear, quant_type, blocksize=blocksize, double_quant=double_quant)
    layer = GLoRALinear.from_linear(quantized, config, adapter_dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in layer.adapter().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return layer


def bits(layer):
    """The base of a layer, bit for bit: codes, everything beside them, and the bias."""
    tensors = [layer.weight, *layer.quant_state.tensors(), *([] if layer.bias is None else [layer.bias])]
    return [tensor.detach().clone().view(-1).view(torch.uint8) for tensor in tensors]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def mixed(vit, config=FULL):
    """A small model whose attention is in 4 bits and whose other layers are dense."""
    model = gk.quantize(vit(), blocksize=32, double_quant=True, target_modules=["*.attn.*"])
    model = gk.inject(model, config, target_modules=["*.attn.*", "*.mlp.0"]).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in named_layers(model).values():
            for parameter in layer.adapter().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@each_base
def test_the_report_is_that_of_float64_by_hand(base):
    layer = make(base)
    dtype, state = torch.float64, layer.quant_state
    levels = codebook(state.quant_type, torch.device("cpu"))
    codes = torch.stack([layer.weight.view(-1) >> 4, layer.weight.view(-1) & 15], 1).view(-1).long()
    w = dequantize(layer.base_weight(), dtype)
    p = {name: parameter.detach().double() for name, parameter in layer.adapter().items()}
    exact = w + w * (p["A_up"] @ p["A_down"]) + 2.0 * (p["B_up"] @ p["B_down"])
    report = layer.merge(requantize=True)
    q = dequantize(layer.base_weight(), dtype)
    merged_codes = torch.stack([layer.weight.view(-1) >> 4, layer.weight.view(-1) & 15], 1).view(-1).long()
    eps = FLOOR * torch.finfo(torch.float32).eps * exact.norm().item()  # W_eff is computed in fp32

    change, error = (exact - w).norm().item(), (q - exact).norm().item()
    survived = ((q - w) * (exact - w)).sum().item() / change**2
    assert report.shape == tuple(w.shape)
    assert report.relative_error == pytest.approx(error / exact.norm().item(), abs=eps / exact.norm().item())
    assert report.change_error == pytest.approx(error / change, abs=2 * eps / change)
    assert report.survived == pytest.approx(survived, abs=2 * eps / change)
    assert report.max_error == pytest.approx((q - exact).abs().max().item(), abs=eps)
    differ = (levels[codes] != levels[merged_codes])[: w.numel()]
    assert report.codes_changed == differ.double().mean().item() > 0


@each_base
def test_the_codes_are_those_of_the_dense_merged_layer(base):
    layer = make(base)
    dense, state = layer.to_linear(torch.float32), layer.quant_state
    plain = layer.to_linear(state.dtype)
    expected = quantize_weight(dense.weight.detach(), state.quant_type, state.blocksize, state.nested is not None)
    parameter, version, absmax = layer.weight, layer.weight._version, state.absmax.data_ptr()
    layer.merge(requantize=True)
    assert torch.equal(layer.weight, expected.packed)
    assert all(map(torch.equal, layer.quant_state.tensors(), expected.state.tensors()))
    assert (layer.quant_state.dtype, layer.quant_state.shape) == (state.dtype, state.shape)
    assert torch.equal(layer.bias, plain.bias)
    assert layer.weight is parameter
    assert layer.weight._version > version
    assert layer.quant_state.absmax.data_ptr() == absmax
    merged = layer.to_linear(torch.float32)
    assert torch.equal(merged.weight, dequantize(layer.base_weight(), torch.float32))
    x = torch.randn(3, layer.in_features, dtype=state.dtype)
    assert torch.equal(layer(x), layer.to_linear(state.dtype)(x))


@each_base
def test_unmerge_restores_codes_state_and_bias_bit_for_bit(base):
    layer = make(base)
    parameter, before = layer.weight, bits(layer)
    for _ in range(2):
        layer.merge(requantize=True)
        assert layer.merged
        assert not same(bits(layer), before)
        layer.unmerge()
        assert not layer.merged
        assert same(bits(layer), before)
    assert layer.weight is parameter


def test_a_small_change_vanishes_and_a_large_one_survives():
    config = GLoRAConfig("none", "lora", "none", "none", "none", rank=4)
    small = make(config=config, scale=0.003).merge(requantize=True)
    large = make(config=config, scale=0.5).merge(requantize=True)
    # Half a step of NF4 is at least 4% of the largest weight of a block; what moves is that weight, one in 64.
    assert small.change_norm < 1e-3 * small.weight_norm
    assert abs(small.survived) < 0.05
    assert small.change_error > 0.9
    assert small.relative_error < 2e-3, "the relative error says nothing of it"
    assert large.change_norm > large.weight_norm / 2
    assert 0.95 < large.survived < 1.05
    assert large.change_error < 0.2


@pytest.mark.parametrize("base", ["nf4-nested", "fp4-odd"])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_weight_that_no_adapter_changes_keeps_its_codes(base, scale):
    layer = make(BASES[base], SHIFTS_ONLY, scale)
    dense, before = layer.to_linear(), bits(layer)
    report = layer.merge(requantize=True)
    assert same(bits(layer)[: 1 + len(layer.quant_state.tensors())], before[: 1 + len(layer.quant_state.tensors())])
    assert torch.equal(layer.bias, dense.bias)
    assert (report.relative_error, report.max_error, report.codes_changed) == (0.0, 0.0, 0.0)
    assert report.survived is report.change_error is None
    assert "-" in str(report).splitlines()[-1].split()
    layer.unmerge()
    assert same(bits(layer), before)


def test_without_requantize_merging_is_refused_with_the_reason_and_both_ways_out():
    layer = make()
    before = bits(layer)
    with pytest.raises(RuntimeError, match=r"4 bits \(nf4.*\d%.*to_linear\(dtype\).*merge\(requantize=True\)"):
        layer.merge()
    assert not layer.merged
    assert same(bits(layer), before)
    with pytest.raises(RuntimeError, match="would lose nothing"):
        make(config=SHIFTS_ONLY).merge()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_what_cannot_be_rounded_changes_nothing(value):
    layer = make(BASES["fp4"], GLoRAConfig("none", "vector", "none", "none", "vector"))
    before = bits(layer)
    with torch.no_grad():
        layer.B[3] = value
    with pytest.raises(ValueError, match=r"NaN, inf or numbers beyond torch\.float16"):
        layer.merge(requantize=True)
    assert not layer.merged
    assert same(bits(layer), before)


def test_merging_twice_is_an_error_and_a_dense_base_has_no_report():
    layer = make()
    layer.merge(requantize=True)
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge(requantize=True)
    dense = GLoRALinear(4, 3, FULL)
    assert dense.merge(requantize=True) is None
    assert dense.merged


def test_a_pending_backward_notices_the_merge():
    layer = make().train()
    y = layer(torch.randn(2, 64, requires_grad=True))
    layer.merge(requantize=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_merged_layer_is_copied_pickled_moved_and_not_loaded_into():
    layer = make(BASES["nf4-nested"])
    state, before = copy.deepcopy(layer.state_dict()), bits(layer)
    layer.merge(requantize=True)
    merged = bits(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.merged
        assert same(bits(other), merged)
        other.unmerge()
        assert same(bits(other), before)
        assert same(bits(layer), merged), "the copy has memory of its own"
    with pytest.raises(RuntimeError, match="merged; call unmerge"):
        layer.load_state_dict(state)
    layer.double()
    assert same(bits(layer)[:-1], merged[:-1])
    layer.unmerge()
    assert same(bits(layer), before)


def test_a_merged_checkpoint_loads_into_a_quantized_linear():
    layer = make(BASES["fp4-odd"])
    blank = gk.quantize(nn.Linear(9, 7, dtype=torch.bfloat16), "fp4", blocksize=64, double_quant=True)
    x = torch.randn(3, 9, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"not merged; call merge\(requantize=True\)"):
        layer.to_quantized()
    layer.merge(requantize=True)
    plain = layer.to_quantized()
    assert type(plain) is QuantizedLinear
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    keys = [f"weight{part}" for part in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")]
    assert {*keys, "weight.quant_state.bitsandbytes__fp4", "bias"} == set(plain.state_dict())
    blank.load_state_dict({name: value for name, value in layer.state_dict().items() if name in plain.state_dict()})
    expected = layer(x)
    assert torch.equal(blank(x), expected)
    layer.unmerge()
    assert torch.equal(plain(x), expected), "nothing is shared"
    with pytest.raises(RuntimeError, match="the base is dense"):
        GLoRALinear(4, 3, FULL).to_quantized()


def test_bitsandbytes_reads_the_merged_codes():
    functional = pytest.importorskip("bitsandbytes.functional")
    layer = make(BASES["nf4-nested"])
    layer.merge(requantize=True)
    linear = layer.to_quantized().to_linear4bit()
    decoded = functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(decoded, layer.to_linear(torch.bfloat16).weight)


# Whole models.


def test_a_model_of_dense_and_4_bit_layers(vit, tmp_path):
    model = mixed(vit)
    layers, before = named_layers(model), tensors(model)
    four_bit = [path for path, layer in layers.items() if layer.quant_state is not None]
    assert 0 < len(four_bit) < len(layers)
    with pytest.raises(RuntimeError, match=rf"{len(four_bit)} of {len(layers)} .*'blocks\.0\.attn\.q_proj'.*\d%"):
        gk.merge(model)
    assert not any(layer.merged for layer in layers.values())
    assert equal(tensors(model), before)

    report = gk.merge(model, requantize=True)
    assert all(layer.merged for layer in layers.values())
    assert list(report.layers) == four_bit
    parts = report.layers.values()
    change = sum(part.change_norm**2 for part in parts)
    assert report.survived == pytest.approx(sum(part.projection for part in parts) / change)
    assert report.change_error == pytest.approx(math.sqrt(sum(part.error_norm**2 for part in parts) / change))
    assert report.codes_changed == sum(part.changed for part in parts) / sum(part.weights for part in parts)

    gk.save_adapter(model, tmp_path / "merged.safetensors")
    gk.unmerge(model)
    assert equal(tensors(model), before)
    gk.save_adapter(model, tmp_path / "unmerged.safetensors")
    assert equal(*(load_file(tmp_path / f"{name}.safetensors") for name in ("merged", "unmerged")))
    assert gk.merge(gk.inject(vit(), FULL), requantize=True) is None


def test_the_report_prints_a_table(vit):
    report = gk.merge(mixed(vit), requantize=True)
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report.layers)
    assert len({len(line) for line in lines}) == 1, "the columns end at the same place"
    first = report.layers["blocks.0.attn.q_proj"]
    assert lines[1].split()[:2] == ["blocks.0.attn.q_proj", "16x16"]
    shares = [float(cell.rstrip("%")) / 100 for cell in lines[1].split()[2:6]]
    assert shares == pytest.approx(
        [first.relative_error, first.survived, first.change_error, first.codes_changed], 0.01
    )
    assert lines[-1].startswith(f"overall ({len(report.layers)} layers) ")
    assert str(first).splitlines()[-1].split()[:3] == ["the", "layer", "16x16"]


@pytest.mark.parametrize("kind", ["a 4-bit layer", "a dense layer"])
def test_a_merge_that_fails_leaves_nothing_merged(vit, kind, monkeypatch):
    model = mixed(vit)
    layers, before = named_layers(model), tensors(model)
    if kind == "a 4-bit layer":
        last = layers["blocks.1.attn.o_proj"]
        with torch.no_grad():
            last.B_up[0, 0] = before["blocks.1.attn.o_proj.B_up"][0, 0] = math.inf
        error = pytest.raises(ValueError, match=r"'blocks\.1\.attn\.o_proj'.*inf")
    else:
        effective_bias = values.effective_bias

        def fail(weight, *args):
            if weight.shape != (16, 16):
                raise MemoryError
            return effective_bias(weight, *args)

        monkeypatch.setattr("glora_kernels.nn.merging.values.effective_bias", fail)  # only of dense bases
        error = pytest.raises(MemoryError)
    with error:
        gk.merge(model, requantize=True)
    assert not any(layer.merged for layer in layers.values())
    assert equal(tensors(model), before)


def test_disabled_gives_the_merged_codes_back(vit, monkeypatch):
    model = mixed(vit)
    x = torch.randn(3, 4, 12)
    with gk.disabled(model):
        base = model(x)
    gk.merge(model, requantize=True)
    merged, y = tensors(model), model(x)
    with monkeypatch.context() as patch, gk.disabled(model):
        assert torch.equal(model(x), base)
        with gk.disabled(model):
            assert torch.equal(model(x), base)
        patch.setattr("glora_kernels.nn.merging.rounding.quantize_weight", None)  # not rounded again
    assert equal(tensors(model), merged)
    assert torch.equal(model(x), y)

    with gk.disabled(model), torch.no_grad():
        for layer in named_layers(model).values():
            layer.B_up.mul_(3)
    changed = tensors(model)
    gk.unmerge(model)
    gk.merge(model, requantize=True)
    assert equal(tensors(model), changed)
    assert not torch.equal(changed["blocks.0.attn.q_proj.weight"], merged["blocks.0.attn.q_proj.weight"])


def test_progress_is_shown_where_asked_for(vit, capfd):
    gk.merge(mixed(vit), requantize=True, progress=True)
    assert "requantizing" in capfd.readouterr().err
