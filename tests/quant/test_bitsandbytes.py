"""bitsandbytes' objects in without a copy and out again; what cannot be taken is refused, and left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig, GLoRALinear
from glora_kernels.nn import QuantizedLinear
from glora_kernels.quant import QuantizedWeight, dequantize, quantize_weight
from glora_kernels.quant import bnb as ours

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional
FRESH = GLoRAConfig("vector", "lora", "vector", "none", "vector", rank=3)
types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
nesting = pytest.mark.parametrize("nested", [False, True])


@pytest.fixture(autouse=True)
def _eager():
    """On a CPU bitsandbytes would compile its decoder, for seconds a shape."""
    torch.manual_seed(0)
    with torch.compiler.set_stance("force_eager"):
        yield


def linear4bit(k=128, n=64, quant_type="nf4", nested=True, bias=True, dtype=torch.float32, kind=None, **more):
    """A quantized `Linear4bit`, in training mode: in eval mode its first forward on some CPUs repacks the weight."""
    kind = kind or bnb.nn.Linear4bit
    if kind is bnb.nn.Linear4bit:
        more["quant_type"] = quant_type
    linear = kind(k, n, bias=bias, compress_statistics=nested, **more)
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * k**-0.5
    storage = linear.weight.quant_storage
    linear.weight = bnb.nn.Params4bit(
        dense.to(dtype), requires_grad=False, compress_statistics=nested, quant_type=linear.weight.quant_type,
        quant_storage=storage, module=linear,
    )  # fmt: skip
    if bias:
        linear.bias.data = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(dtype)
    return linear.to("cpu").train()


def values(state) -> dict:
    """The tensors of a bitsandbytes QuantState by name."""
    found = {"absmax": state.absmax, "code": state.code}
    if state.nested:
        found |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
    return found


def storages(weight: QuantizedWeight) -> list[int]:
    return [tensor.data_ptr() for tensor in (weight.packed, *weight.state.tensors())]


def bnb_storages(packed: Tensor, state) -> list[int]:
    found = [packed.data_ptr(), state.absmax.data_ptr()]
    if state.nested:
        found += [state.state2.absmax.data_ptr(), state.state2.code.data_ptr(), state.offset.data_ptr()]
    return found


def dense_of(packed: Tensor, state) -> Tensor:
    """What bitsandbytes says the codes are."""
    return functional.dequantize_4bit(packed, state)


# In, without a copy.


@types
@nesting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear4bit_goes_in_on_the_same_memory(quant_type, nested, dtype):
    linear = linear4bit(quant_type=quant_type, nested=nested, dtype=dtype)
    weight = ours.from_linear4bit(linear)
    assert storages(weight) == bnb_storages(linear.weight, linear.weight.quant_state)
    assert (weight.state.quant_type, weight.state.blocksize, weight.shape) == (quant_type, 64, (64, 128))
    assert (weight.state.nested is not None) == nested
    assert type(weight.packed) is Tensor
    assert torch.equal(dequantize(weight, dtype), dense_of(linear.weight.data, linear.weight.quant_state))
    layer = GLoRALinear.from_linear(linear, FRESH)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer.quant_state.absmax.data_ptr() == linear.weight.quant_state.absmax.data_ptr()
    assert layer.bias is linear.bias
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, False)
    assert {p.dtype for p in layer.adapter().values()} == {dtype}


@pytest.mark.parametrize("kind", ["Linear4bit", "LinearNF4", "LinearFP4", "derived"])
def test_every_class_of_theirs_is_taken(kind):
    class Derived(bnb.nn.Linear4bit):
        pass

    cls = Derived if kind == "derived" else getattr(bnb.nn, kind)
    linear = cls(96, 64).to("cpu")
    weight = ours.from_linear4bit(linear)
    assert weight.state.quant_type == ("nf4" if kind == "LinearNF4" else "fp4")
    assert isinstance(GLoRALinear.from_linear(linear, FRESH), GLoRALinear)


def test_what_is_no_linear4bit_of_theirs_is_told_apart():
    class Linear4bit(nn.Linear):
        pass

    assert not ours.is_linear4bit(Linear4bit(4, 4))
    assert not ours.is_linear4bit(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    assert ours.is_linear4bit(linear4bit())
    assert gk.GLoRALinear.from_linear(Linear4bit(4, 4), FRESH).quant_state is None


def test_an_eight_bit_layer_is_no_4_bit_one():
    with pytest.raises((TypeError, ValueError)):
        GLoRALinear.from_linear(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), FRESH)


@types
@nesting
def test_a_params4bit_and_a_saved_quant_state_go_in(quant_type, nested):
    linear = linear4bit(quant_type=quant_type, nested=nested, dtype=torch.bfloat16)
    expected = dense_of(linear.weight.data, linear.weight.quant_state)
    weight = ours.from_params4bit(linear.weight)
    assert storages(weight) == bnb_storages(linear.weight, linear.weight.quant_state)
    assert torch.equal(dequantize(weight, torch.bfloat16), expected)
    saved = {f"weight.{name}": t.clone() for name, t in linear.weight.quant_state.as_dict(packed=True).items()}
    state = functional.QuantState.from_dict(saved, torch.device("cpu"))
    assert torch.equal(dequantize(ours.from_state(linear.weight.data, state), torch.bfloat16), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_quant_storage_is_another_view_of_the_same_bytes(storage):
    linear = linear4bit(quant_storage=storage)
    assert linear.weight.dtype == storage
    weight = ours.from_linear4bit(linear)
    assert weight.packed.dtype == torch.uint8
    assert weight.packed.data_ptr() == linear.weight.data_ptr()
    assert torch.equal(weight.packed.view(-1), ours.from_linear4bit(linear4bit()).packed.view(-1))
    x = torch.randn(5, 128)
    assert torch.equal(GLoRALinear.from_linear(linear, FRESH)(x), GLoRALinear.from_linear(linear4bit(), FRESH)(x))


def test_the_transposed_codes_of_older_versions_go_in():
    linear = linear4bit()
    for packed in (linear.weight.data.t(), linear.weight.data.t().contiguous(), linear.weight.data.reshape(1, -1)):
        weight = ours.from_state(packed, linear.weight.quant_state)
        assert torch.equal(weight.packed.reshape(-1), linear.weight.data.reshape(-1))
        assert weight.packed.is_contiguous()


def test_a_state_that_only_the_module_holds_is_found():
    """As where FSDP or a conversion has made a plain Parameter of the weight; bitsandbytes puts it back at forward."""
    linear = linear4bit()
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Tensor), requires_grad=False)
    expected = dense_of(linear.weight.data, linear.quant_state)
    assert torch.equal(dequantize(ours.from_linear4bit(linear), torch.float32), expected)


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_compute_dtype_means_what_it_does_to_a_linear4bit(compute, given):
    """x is cast to it, y back; a fresh layer and a `QuantizedLinear` give what the Linear4bit gives."""
    linear = linear4bit(dtype=torch.float32, compute_dtype=compute, bias=False)
    x = torch.randn(5, 128).to(given)
    layers = [QuantizedLinear.from_linear4bit(linear), GLoRALinear.from_linear(linear, FRESH)]
    assert layers[0].base_dtype == (compute or torch.float32)
    assert {p.dtype for p in layers[1].adapter().values()} == {compute or torch.float32}
    expected = linear(x.requires_grad_())
    assert expected.dtype == given
    for layer in layers:
        y = layer(x)
        assert y.dtype == given
        assert torch.equal(y, expected)
        if compute is not None:
            w = dequantize(layer.base_weight(), compute)
            assert torch.equal(y, nn.functional.linear(x.to(compute), w).to(given))
        x.grad = None
        y.float().sum().backward()
        assert x.grad.dtype == given


@types
@nesting
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [96, 128])
def test_a_fresh_layer_gives_the_bits_of_the_linear4bit(quant_type, nested, bias, k):
    """K not a multiple of the block too, where our W is compared instead: theirs is wrong on a CPU (0.50)."""
    linear = linear4bit(k, quant_type=quant_type, nested=nested, bias=bias)
    x = torch.randn(2, 5, k, requires_grad=True)
    y = GLoRALinear.from_linear(linear, FRESH)(x)
    if k % 64 == 0:
        assert torch.equal(y, linear(x))
    w = dequantize(ours.from_linear4bit(linear), torch.float32)
    assert torch.equal(y, nn.functional.linear(x, w, linear.bias))


def test_the_base_is_neither_changed_nor_kept_alive_twice():
    linear = linear4bit()
    before = copy.deepcopy(linear.weight.quant_state), linear.weight.data.clone()
    layer = GLoRALinear.from_linear(linear, FRESH)
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(linear.weight.data, before[1])
    for name, tensor in values(before[0]).items():
        assert torch.equal(values(linear.weight.quant_state)[name], tensor), name
    assert linear.weight.grad is None


# Out again.


@types
@nesting
@pytest.mark.parametrize("bias", [True, False])
def test_out_again_on_the_same_memory(quant_type, nested, bias):
    dense = nn.Linear(128, 64, bias=bias)
    layer = gk.quantize(dense, quant_type, double_quant=nested, compute_dtype=torch.float32)
    out = layer.to_linear4bit()
    assert type(out) is bnb.nn.Linear4bit
    assert isinstance(out.weight, bnb.nn.Params4bit)
    assert out.weight.bnb_quantized
    assert bnb_storages(out.weight, out.weight.quant_state) == storages(layer.base_weight())
    assert (out.in_features, out.out_features, out.compute_dtype) == (128, 64, torch.float32)
    assert out.training == layer.training
    assert not any(p.requires_grad for p in out.parameters())
    assert not any(p.is_meta for p in out.parameters())
    x = torch.randn(3, 128, requires_grad=True)
    assert torch.equal(out(x), layer(x))
    again = QuantizedLinear.from_linear4bit(out)
    assert torch.equal(again(x), layer(x))
    assert storages(again.base_weight()) == storages(layer.base_weight())


@types
@nesting
def test_what_goes_out_is_what_bitsandbytes_would_have_made(quant_type, nested):
    theirs = linear4bit(quant_type=quant_type, nested=nested)
    dense = nn.Linear(128, 64)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 128**-0.5)
    out = gk.quantize(dense, quant_type, double_quant=nested).to_linear4bit()
    assert torch.equal(out.weight.data, theirs.weight.data)
    mine, other = out.weight.quant_state, theirs.weight.quant_state
    assert mine == other
    for name, tensor in values(other).items():
        assert torch.equal(values(mine)[name], tensor), name
        assert values(mine)[name].dtype == tensor.dtype
    saved, expected = (s.as_dict(packed=True) for s in (mine, other))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    moved = out.to("cpu")
    assert torch.equal(moved.weight.data, theirs.weight.data)
    copied = copy.deepcopy(out)
    assert torch.equal(copied.weight.data, theirs.weight.data)


@types
@nesting
@pytest.mark.parametrize("k", [64, 100])
def test_our_state_dict_is_theirs(quant_type, nested, k):
    """`Params4bit.from_prequantized` of what we save, and what a Linear4bit saves into our layer: name by name."""
    layer = gk.quantize(nn.Linear(k, 32), quant_type, double_quant=nested)
    mine = layer.state_dict()
    theirs = layer.to_linear4bit().state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if "bitsandbytes__" not in name:
            assert torch.equal(mine[name], tensor), name
            assert mine[name].dtype == tensor.dtype
    stats = {name.removeprefix("weight."): t for name, t in mine.items() if name.startswith("weight.")}
    parameter = bnb.nn.Params4bit.from_prequantized(mine["weight"], stats, device="cpu")
    assert torch.equal(
        dequantize(ours.from_params4bit(parameter), torch.float32), dequantize(layer.base_weight(), torch.float32)
    )
    other = gk.quantize(nn.Linear(k, 32), quant_type, double_quant=not nested)
    other.load_state_dict(theirs)
    x = torch.randn(3, k)
    assert torch.equal(other(x), layer(x))


def test_a_model_of_layers_that_went_out_can_be_saved(tmp_path):
    """safetensors refuses tensors that share memory, and what bitsandbytes saves of two layers must share none."""
    from safetensors.torch import save_file

    model = nn.Sequential(*(gk.quantize(nn.Linear(64, 64), double_quant=True).to_linear4bit() for _ in range(2)))
    save_file(model.state_dict(), tmp_path / "a.safetensors")


# What cannot be taken.


def refused(linear, words: str) -> None:
    """Every way in says why, and nothing has changed."""
    before = linear.weight
    for take in (
        lambda: GLoRALinear.from_linear(linear, FRESH),
        lambda: QuantizedLinear.from_linear4bit(linear),
        lambda: ours.from_linear4bit(linear),
        lambda: gk.inject(nn.Sequential(linear), FRESH),
        lambda: gk.inject(nn.Sequential(linear), gk.ShareLoRAConfig(rank=2)),
    ):
        with pytest.raises(ValueError, match=words):
            take()
    assert linear.weight is before


def test_an_unquantized_layer_is_refused():
    refused(bnb.nn.Linear4bit(64, 64), r"not quantized yet.*\.to\(device\)")
    with pytest.raises(ValueError, match="not quantized yet"):
        ours.from_params4bit(bnb.nn.Linear4bit(64, 64).weight)


def test_quantizing_what_is_in_4_bits_is_refused():
    model = nn.Sequential(nn.Linear(64, 64), linear4bit(64, 64))
    with pytest.raises(ValueError, match=r"'1'.*4 bits already"):
        gk.quantize(model)
    assert type(model[0]) is nn.Linear


def repacked(nested: bool) -> nn.Module:
    """As bitsandbytes leaves a layer after its first inference on a CPU with AVX512-BF16."""
    linear = linear4bit(128, 64, nested=nested)
    linear.weight.data, linear.weight.quant_state = functional._convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    return linear


@nesting
def test_a_layer_repacked_for_inference_is_refused(nested):
    linear = repacked(nested)
    refused(linear, "repacked")
    with pytest.raises(ValueError, match="repacked"):
        ours.from_params4bit(linear.weight)
    with pytest.raises(ValueError, match="repacked"):
        ours.from_state(linear.weight.data, linear.weight.quant_state)


def test_a_layer_that_its_own_inference_has_repacked_is_refused_or_right():
    """Where this CPU does it: the real path, not a call of ours."""
    linear = linear4bit(128, 64)
    expected = dense_of(linear.weight.data, linear.weight.quant_state)
    with torch.no_grad():
        linear.eval()(torch.randn(2, 128))
    if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
        refused(linear, "repacked")
    else:
        assert torch.equal(dequantize(ours.from_linear4bit(linear), torch.float32), expected)


def test_a_layer_taken_before_that_is_not_touched_by_it():
    linear = linear4bit(128, 64)
    layer = GLoRALinear.from_linear(linear, FRESH)
    x = torch.randn(2, 128)
    before = layer(x)
    with torch.no_grad():
        linear.eval()(x)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: setattr(s, "quant_type", "int4"), "quant_type.*'int4'"),
    (lambda s: setattr(s, "shape", torch.Size([64, 100])), "64x100|shape"),
    (lambda s: setattr(s, "shape", torch.Size([128, 64])), r"\(128, 64\).*\(64, 128\)"),
    (lambda s: setattr(s, "shape", torch.Size([64 * 128])), "two sizes"),
    (lambda s: setattr(s, "shape", None), "two sizes"),
    (lambda s: setattr(s, "blocksize", 256), "absmax"),
    (lambda s: setattr(s, "blocksize", 60), "blocksize.*60"),
    (lambda s: setattr(s, "absmax", s.absmax[:-1]), "absmax"),
    (lambda s: setattr(s, "absmax", torch.cat([s.absmax, s.absmax])), "absmax"),
    (lambda s: setattr(s, "absmax", s.absmax.to("meta")), "absmax is on meta"),
    (lambda s: setattr(s, "code", s.code.flip(0)), "code.*nf4"),
    (lambda s: setattr(s.state2, "absmax", s.state2.absmax[:0]), "nested absmax"),
    (lambda s: setattr(s.state2, "blocksize", 32), "nested absmax"),
    (lambda s: setattr(s.state2, "code", s.state2.code[:16]), "nested code"),
])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(change, words):
    linear = linear4bit()
    change(linear.weight.quant_state)
    with pytest.raises(ValueError, match=words):
        GLoRALinear.from_linear(linear, FRESH)
    model = nn.Sequential(linear)
    with pytest.raises(ValueError, match=words):
        gk.inject(model, FRESH)
    assert model[0] is linear


@pytest.mark.parametrize("state", [None, [1, 2], "nf4"])
def test_what_is_no_quant_state_is_refused(state):
    with pytest.raises((TypeError, ValueError), match="QuantState"):
        ours.from_state(torch.zeros(4, 1, dtype=torch.uint8), state)


def test_an_8_bit_state_is_refused():
    packed, state = functional.quantize_blockwise(torch.randn(8, 64))
    with pytest.raises(ValueError, match=r"quant_type.*None"):
        ours.from_state(packed, state)


def test_codes_of_another_length_are_refused():
    linear = linear4bit()
    for packed in (linear.weight.data[:-1], linear.weight.data[:0], torch.cat([linear.weight.data] * 2)):
        with pytest.raises(ValueError, match="packed"):
            ours.from_state(packed, linear.weight.quant_state)


def test_a_weight_on_another_device_is_refused():
    """The codes on one device and the state on another; and x on another than the weight."""
    linear = linear4bit()
    with pytest.raises(ValueError, match="absmax is on cpu, the packed weight on meta"):
        ours.from_state(linear.weight.data.to("meta"), linear.weight.quant_state)
    layer = GLoRALinear.from_linear(linear, FRESH)
    with pytest.raises(ValueError, match="one device"):
        layer(torch.randn(2, 128, device="meta"))


@pytest.mark.parametrize("what", ["hook", "forward", "buffer", "parametrized bias"])
def test_what_makes_a_plain_layer_unfit_makes_this_one(what):
    linear = linear4bit()
    if what == "hook":
        linear.register_forward_hook(lambda *args: None)
    elif what == "forward":
        linear.forward = lambda x: x
    elif what == "buffer":
        linear.register_buffer("mask", torch.ones(1))
    else:
        nn.utils.parametrize.register_parametrization(linear, "bias", nn.Identity())
    words = {"hook": "hooks", "forward": "forward", "buffer": "mask", "parametrized bias": "parametrized"}
    with pytest.raises(ValueError, match=words[what]):
        GLoRALinear.from_linear(linear, FRESH)


def test_out_of_a_weight_that_is_not_uint8_column():
    """The operators take the codes in any shape; what goes out has bitsandbytes'."""
    weight = quantize_weight(torch.randn(64, 96), "nf4", 64, True)
    flat = QuantizedWeight(weight.packed.view(-1), weight.state)
    out = ours.to_params4bit(flat)
    assert out.shape == (64 * 48, 1)
    assert out.data_ptr() == weight.packed.data_ptr()


@pytest.mark.parametrize("nested", [False, True])
def test_a_base_that_inference_mode_read_first_is_trained_over(nested):
    """What is kept of a `Linear4bit` is an ordinary tensor, whichever mode it was made or read in."""
    peft = pytest.importorskip("peft")

    def linear4bit():
        options = {"bias": False, "compute_dtype": torch.float32, "compress_statistics": nested, "quant_type": "nf4"}
        return nn.Sequential(bnb.nn.Linear4bit(64, 32, **options)).to("cpu")

    model = linear4bit()
    model.is_loaded_in_4bit = True
    model = gk.accelerate(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"])), verbose=False)
    x = torch.randn(3, 64)
    model.merge_adapter()
    model.unmerge_adapter()
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.inference_mode():
        made = linear4bit()
    adapted = gk.inject(made, gk.GLoRAConfig(A="vector", B="lora", rank=2), target_modules=["0"])
    adapted(x).sum().backward()
    adapted.load_state_dict(adapted.state_dict())
