"""What other people's tools do to a model over 4 bits: its codes are none of their business, and come back whole."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import glora_kernels as gk
from glora_kernels import modes
from glora_kernels.quant import QuantizedWeight, quantize_weight

CONFIG = gk.GLoRAConfig(A="vector", B="lora", C="vector", rank=2)
KINDS = {"frozen": None, "glora": CONFIG}
each_kind = pytest.mark.parametrize("kind", KINDS)
nesting = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


def build(kind="frozen", nested=True, seed=0, n=24, k=40, quant_type="nf4"):
    """A model of one layer, its adapter away from zero."""
    torch.manual_seed(seed)
    model = gk.quantize(nn.Sequential(nn.Linear(k, n)), quant_type, double_quant=nested, target_modules=["0"])
    if KINDS[kind] is not None:
        model = gk.inject(model, KINDS[kind], target_modules=["0"])
        for parameter in model[0].adapter().values():
            nn.init.normal_(parameter, std=0.3)
    return model


def held(model):
    layer = model[0]
    return [layer.weight, *layer.quant_state.tensors()]


def same(model, tensors):
    return all(torch.equal(a, b) for a, b in zip(held(model), tensors, strict=True))


X = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))


# Averages, optimizers, casts.


@each_kind
@nesting
@pytest.mark.parametrize("average", [
    {"multi_avg_fn": get_ema_multi_avg_fn(0.9999)}, {"avg_fn": get_ema_avg_fn(0.9)}, {},
    {"use_buffers": True}, {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9)},
], ids=["ema", "ema one by one", "swa", "swa of buffers", "ema of buffers"])  # fmt: skip
def test_an_average_keeps_the_codes(kind, nested, average):
    model = build(kind, nested)
    averaged, before = AveragedModel(model, **average), [t.clone() for t in held(model)]
    for _ in range(3):
        averaged.update_parameters(model)
    assert same(averaged.module, before)
    assert averaged.module[0].weight.data_ptr() != model[0].weight.data_ptr()
    torch.testing.assert_close(averaged(X), model(X))


@nesting
def test_an_average_of_the_floats_of_a_state_dict_keeps_the_codes(nested):
    """As timm's ModelEmaV3 makes it: floating-point entries are averaged, the others copied."""
    model = build(nested=nested)
    ema, before = copy.deepcopy(model), [t.clone() for t in held(model)]
    for mine, theirs in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        mine.lerp_(theirs, 0.1) if mine.is_floating_point() else mine.copy_(theirs)
    assert same(ema, before)


@each_kind
def test_codes_are_neither_parameters_nor_buffers(kind):
    model = build(kind)
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert "0.weight" not in names
    assert all(p.is_floating_point() for p in model.parameters())
    before = [t.clone() for t in held(model)]
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(X).sum().backward()
    optimizer.step()
    assert same(model, before)
    assert (model[0].weight.dtype, model[0].weight.shape) == (torch.uint8, (480, 1))


@each_kind
@pytest.mark.parametrize("change", [
    lambda m: m.type(torch.float64), lambda m: m.share_memory(), lambda m: m._apply(lambda t: t.half()),
    lambda m: m.to(torch.bfloat16), lambda m: m.cpu(),
], ids=["type", "share_memory", "apply", "to", "cpu"])  # fmt: skip
def test_a_change_of_the_module_leaves_the_codes(kind, change):
    model = build(kind)
    before = [t.clone() for t in held(model)]
    change(model)
    assert same(model, before)
    assert [t.dtype for t in held(model)] == [t.dtype for t in before]


# State dicts.


@each_kind
@nesting
def test_distributed_checkpoint(kind, nested, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict

    model = build(kind, nested)
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    if kind == "glora":
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)
        assert get_state_dict(model, optimizer)[0].keys() == state.keys()
    dcp.save({"model": state}, checkpoint_id=tmp_path)
    for seed in range(1, 9):
        other = build(kind, nested, seed)
        addresses = [t.data_ptr() for t in held(other)]
        loaded = {"model": get_model_state_dict(other)}
        dcp.load(loaded, checkpoint_id=tmp_path)
        set_model_state_dict(other, loaded["model"])
        assert same(other, held(model))
        assert [t.data_ptr() for t in held(other)] == addresses
        assert torch.equal(other(X), model(X))


def test_the_entry_of_a_form_has_one_length_that_everybody_reads():
    entries = [build(seed=seed).state_dict()["0.weight.quant_state.bitsandbytes__nf4"] for seed in range(40)]
    assert {len(entry) for entry in entries} == {256}
    values = json.loads(bytes(entries[0].tolist()))
    assert values["shape"] == [24, 40]
    bnb = pytest.importorskip("bitsandbytes")
    assert bnb.utils.unpack_tensor_to_dict(entries[0]) == values


def test_an_entry_without_blanks_is_read():
    model, other = build(), build(seed=1)
    state = model.state_dict()
    name = "0.weight.quant_state.bitsandbytes__nf4"
    state[name] = torch.tensor(list(bytes(state[name].tolist()).rstrip()), dtype=torch.uint8)
    other.load_state_dict(state)
    assert torch.equal(other(X), model(X))


@each_kind
@nesting
@pytest.mark.parametrize(("n", "k"), [(64, 64), (24, 40), (9, 100)])
def test_safetensors_take_a_model_of_any_size(kind, nested, n, k, tmp_path):
    model = build(kind, nested, n=n, k=k)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in model.state_dict().values())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "state.safetensors")
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    for name in ("state", "model"):
        other = build(kind, nested, 1, n, k)
        safetensors.torch.load_model(other, tmp_path / f"{name}.safetensors")
        assert same(other, held(model))


def test_safetensors_take_layers_that_share_codes(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        model[1].weight = model[0].weight
        return gk.quantize(model, double_quant=True)

    model, other, x = tied(0), tied(1), torch.randn(3, 64)
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("left_out", ["weight", "weight.absmax"])
def test_what_is_missing_is_named(left_out):
    model, state = build(), build(seed=1).state_dict()
    before = [t.clone() for t in held(model)]
    del state[f"0.{left_out}"]
    with pytest.raises(RuntimeError, match=left_out.rpartition(".")[2]):
        model.load_state_dict(state)
    assert same(model, before)


@each_kind
@nesting
def test_on_the_meta_device_and_back(kind, nested):
    model = build(kind, nested)
    state, expected = {name: t.clone() for name, t in model.state_dict().items()}, model(X)
    model.to("meta")
    on_meta = model.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in on_meta.items()} == {
        name: (t.shape, t.dtype) for name, t in state.items()
    }
    assert all(t.is_meta for t in on_meta.values())
    with pytest.warns(UserWarning, match="meta"):
        model.load_state_dict(state)
    assert model[0].weight.is_meta
    for assign in (True, False):
        other = copy.deepcopy(model) if assign else copy.deepcopy(model).to_empty(device="cpu")
        with torch.device("meta"):
            other.load_state_dict(state, assign=assign)
            entries = other.state_dict()
        assert torch.equal(other(X), expected)
        assert not any(t.is_meta for t in entries.values())
    with pytest.raises(RuntimeError, match="meta tensor"):
        build(kind, nested).load_state_dict(on_meta)


# Inference mode, and the default dtype.


@each_kind
@nesting
def test_what_inference_mode_made_can_be_loaded_into_and_trained_over(kind, nested):
    with torch.inference_mode():
        model = build("frozen", nested)
        model.to("meta").to_empty(device="cpu").load_state_dict(build("frozen", nested).state_dict(), assign=True)
    if kind == "glora":
        model[0].bias = nn.Parameter(torch.zeros(24), requires_grad=False)  # of inference mode, as any layer's
        model = gk.inject(model, CONFIG, target_modules=["0"])
    other = build(kind, nested, seed=1)
    with torch.inference_mode(kind == "frozen"):
        model.load_state_dict(other.state_dict())
    assert same(model, held(other))
    model.requires_grad_(kind == "glora")
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()
    assert not any(t.is_inference() for t in held(model))


def test_quantizing_in_inference_mode_gives_an_ordinary_layer():
    linear = nn.Linear(40, 24)
    with torch.inference_mode():
        layer = gk.quantize(linear, double_quant=True)
    assert not any(t.is_inference() for t in (*held([layer]), layer.bias))
    layer.load_state_dict(gk.quantize(nn.Linear(40, 24), double_quant=True).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_changes_no_bit(dtype):
    model = build("glora")
    weight, state = torch.randn(24, 40), model.state_dict()
    quantized, merged = quantize_weight(weight, "nf4", double_quant=True), copy.deepcopy(model)
    gk.merge(merged, requantize=True)
    other, remerged = build("frozen", seed=1), copy.deepcopy(model)
    modes._constants.clear()
    torch.set_default_dtype(dtype)
    try:
        again = quantize_weight(weight, "nf4", double_quant=True)
        other.load_state_dict({name: t for name, t in state.items() if "weight" in name or "bias" in name})
        decoded = other[0].to_linear().weight
        gk.merge(remerged, requantize=True)
    finally:
        torch.set_default_dtype(torch.float32)
        modes._constants.clear()
    for a, b in zip(
        (again.packed, *again.state.tensors()), (quantized.packed, *quantized.state.tensors()), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(decoded, build("frozen")[0].to_linear().weight)
    assert same(remerged, held(merged))
    assert torch.equal(remerged[0].bias, merged[0].bias)


# Ties.


@each_kind
def test_a_dense_weight_is_not_assigned(kind):
    model = build(kind)
    expected = model(X)
    for value in (nn.Parameter(torch.zeros(24, 40)), torch.zeros(24, 40), None):
        with pytest.raises(TypeError, match=r"in 4 bits \(nf4.*24x40.*tie_weights"):
            model[0].weight = value
    with pytest.raises(ValueError, match="480 numbers"):
        model[0].weight = torch.zeros(3, 1, dtype=torch.uint8)
    assert torch.equal(model(X), expected)
    model[0].weight = model[0].weight.clone()
    assert torch.equal(model(X), expected)


def test_a_layer_whose_weight_stays_dense_elsewhere_is_not_quantized(llama):
    model = llama(tied=True)
    with pytest.raises(ValueError, match=r"'lm_head' shares its weight with 'model.embed_tokens'"):
        gk.quantize(model, target_modules=["lm_head", "q_proj"])
    assert not any(isinstance(module, gk.QuantizedLinear) for module in model.modules())
    gk.quantize(model)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = gk.quantize(llama(tied=False), target_modules=["lm_head"])
    assert isinstance(untied.lm_head, gk.QuantizedLinear)
    assert untied(torch.arange(6)[None]).logits.isfinite().all()


def test_a_tied_layer_that_is_no_head_is_left_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(32, 16), "out": nn.Linear(16, 32), "mid": nn.Linear(16, 16)})
    model["out"].weight = model["embed"].weight
    gk.quantize(model)
    assert type(model["out"]) is nn.Linear
    assert isinstance(model["mid"], gk.QuantizedLinear)


@nesting
def test_tied_layers_stay_tied_in_a_copy(nested):
    """Codes and absmax together: merging one of two layers that have one absmax would ruin the other."""
    base = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    base[1].weight = base[0].weight
    model = gk.inject(gk.quantize(base, double_quant=nested, target_modules="*"), CONFIG, target_modules="*")
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for left, right in zip(held(made), held(made[1:]), strict=True):
            assert left.data_ptr() == right.data_ptr()
        with pytest.raises(ValueError, match="is shared by"):
            gk.merge(made, requantize=True)


@nesting
def test_one_absmax_of_two_layers_is_not_merged(nested):
    weight = quantize_weight(torch.randn(40, 40), "nf4", 64, nested)
    again = QuantizedWeight(weight.packed.clone(), weight.state)
    model = gk.inject(nn.Sequential(gk.QuantizedLinear(weight), gk.QuantizedLinear(again)), CONFIG, target_modules="*")
    with pytest.raises(ValueError, match=r"the absmax of '0' is shared by \['0.weight.absmax', '1.weight.absmax'\]"):
        gk.merge(model, requantize=True)
    for layer in model:
        nn.init.ones_(layer.adapter()["A"])
    model[0].merge(requantize=True)
    with pytest.raises(RuntimeError, match="is that of another layer, which is merged"):
        model[1].merge(requantize=True)
    model[0].unmerge()
