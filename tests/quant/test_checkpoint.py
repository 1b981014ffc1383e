"""4-bit layers in state dicts: out and in again, those of bitsandbytes, and what is damaged or belongs elsewhere.

A refused state says what is wrong with it and leaves the layer as it was.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import glora_kernels as gk
from glora_kernels import GLoRAConfig
from glora_kernels.quant import QuantizedWeight, dequantize, quantize_weight
from glora_kernels.quant.checkpoint import state_from_tensors, state_tensors

CFG = GLoRAConfig("vector", "lora", "vector", "vector", "vector", rank=2)
KEY = "weight.quant_state.bitsandbytes__nf4"
CPU = torch.device("cpu")
kinds = pytest.mark.parametrize("kind", ["frozen", "glora"])
nesting = pytest.mark.parametrize("nested", [False, True])


def build(kind="frozen", nested=True, quant_type="nf4", k=40, n=9, seed=0, bias=True, blocksize=64, **more):
    torch.manual_seed(seed)
    layer = gk.quantize(nn.Linear(k, n, bias), quant_type, blocksize=blocksize, double_quant=nested, **more)
    if kind == "frozen":
        return layer
    layer = gk.GLoRALinear.from_linear(layer, CFG)
    with torch.no_grad():
        for parameter in layer.adapter().values():
            parameter.normal_(std=0.3)
    return layer


def snapshot(layer):
    """Everything that a load could change: bits of the codes, of the state, of the bias and the adapter."""
    state = layer.quant_state
    values = (state.quant_type, state.blocksize, state.shape, state.dtype)
    inner = None if state.nested is None else state.nested.blocksize
    return values, inner, [t.clone() for t in (*layer.parameters(), *state.tensors())]


def unchanged(layer, before) -> bool:
    values, inner, tensors = snapshot(layer)
    return (values, inner) == before[:2] and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(tensors, before[2], strict=True)
    )


def refused(layer, state, words, strict=True):
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict(state, strict=strict)
    assert unchanged(layer, before)
    layer(torch.randn(2, layer.in_features))


def edited(state, **changes):
    """The state with other values in its JSON; None removes one."""
    key = next(name for name in state if "bitsandbytes__" in name)
    values = json.loads(bytes(state[key].tolist())) | changes
    values = {name: value for name, value in values.items() if value is not None}
    return state | {key: torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)}


# Out and in again.


@kinds
@nesting
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_round_trip(kind, nested, quant_type):
    """Into a layer of the same form and of another type, block size and nesting: the state says what it is."""
    layer = build(kind, nested, quant_type)
    x = torch.randn(3, 40)
    for other in (
        build(kind, nested, quant_type, seed=1),
        build(kind, not nested, "fp4" if quant_type == "nf4" else "nf4", seed=2, blocksize=128),
    ):
        missing, unexpected = other.load_state_dict(layer.state_dict())
        assert not missing
        assert not unexpected
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.weight, layer.weight)
        before = snapshot(layer)
        with torch.no_grad():
            other.weight.zero_()
        assert unchanged(layer, before)


@nesting
def test_the_parts_are_read_without_change(nested):
    weight = quantize_weight(torch.randn(9, 41), "fp4", 32, nested)
    tensors = state_tensors(weight.state)
    state = state_from_tensors(tensors, CPU)
    assert (state.quant_type, state.blocksize, state.shape, state.dtype) == ("fp4", 32, (9, 41), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), weight.state.tensors(), strict=True))
    assert torch.equal(
        dequantize(QuantizedWeight(weight.packed, state), torch.float32), dequantize(weight, torch.float32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_offset_survives_json(dtype):
    """A float of fp32 is written in decimals and read back to the same bits."""
    for seed in range(20):
        torch.manual_seed(seed)
        weight = quantize_weight(torch.randn(9, 64).to(dtype), "nf4", 64, True)
        state = state_from_tensors(state_tensors(weight.state), CPU)
        assert torch.equal(state.nested.offset, weight.state.nested.offset)
        assert state.nested.offset.dtype == torch.float32
        assert state.dtype == dtype


@kinds
def test_through_a_file(kind, tmp_path):
    """safetensors, which refuses tensors that share memory, and torch.save."""
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(build(kind), nn.ReLU(), build(kind, k=9, n=9, seed=3))
    x = torch.randn(3, 40)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for state in (load_file(tmp_path / "a.safetensors"), torch.load(tmp_path / "a.pt", weights_only=True)):
        other = nn.Sequential(build(kind, seed=4), nn.ReLU(), build(kind, k=9, n=9, seed=5))
        other.load_state_dict(state)
        assert torch.equal(other(x), model(x))


@kinds
def test_onto_a_layer_without_memory(kind):
    """Built on the meta device and filled by `assign=True`, as large models are."""
    layer, other = build(kind), build(kind, seed=1).to("meta")
    assert other.weight.is_meta
    assert all(t.is_meta for t in other.quant_state.tensors())
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 40)
    assert torch.equal(other(x), layer(x))


@kinds
def test_a_frozen_state_loads_below_an_adapter(kind):
    """The base of a GLoRA layer has the names of a frozen one."""
    frozen, layer = build("frozen", seed=7), build("glora")
    with pytest.warns(UserWarning, match="a state without an adapter"):
        missing, unexpected = layer.load_state_dict(frozen.state_dict(), strict=False)
    assert set(missing) == set(layer.adapter())
    assert not unexpected
    assert torch.equal(layer.weight, frozen.weight)
    assert layer.quant_state.absmax.equal(frozen.quant_state.absmax)


def test_a_state_without_the_weight_leaves_it():
    layer = build("glora")
    before = snapshot(layer)
    layer.load_state_dict({name: p.detach().clone() for name, p in layer.adapter().items()}, strict=False)
    assert unchanged(layer, before)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({name: p.detach().clone() for name, p in layer.adapter().items()})


def test_saved_tensors_are_detached_unless_asked():
    layer = build("glora")
    assert not any(t.requires_grad for t in layer.state_dict().values())
    assert layer.state_dict(keep_vars=True)["B_up"] is layer.B_up


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@nesting
def test_a_checkpoint_of_bitsandbytes_loads(nested, dtype, storage):
    """With `quant_storage` too: the same bytes as another dtype, which FSDP users save."""
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(64, 32, quant_type="fp4", compress_statistics=nested, quant_storage=storage)
    theirs = theirs.to(dtype).to("cpu")
    layer = build(k=64, n=32)
    layer.load_state_dict(theirs.state_dict())
    with torch.compiler.set_stance("force_eager"):
        expected = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(dequantize(layer.base_weight(), dtype), expected)
    x = torch.randn(3, 64, requires_grad=True)
    assert layer(x).dtype == torch.float32


def test_a_legacy_checkpoint_with_transposed_codes_is_loaded_whole_or_not_at_all():
    """(1, P) instead of (P, 1)."""
    layer, other = build(seed=1), build(blocksize=32)
    state = layer.state_dict()
    state["weight"] = state["weight"].t().contiguous()
    before = snapshot(other)
    try:
        other.load_state_dict(state)
    except RuntimeError:
        assert unchanged(other, before)
        return
    x = torch.randn(2, 40)
    assert torch.equal(other(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_sees_what_is_loaded():
    """Type, block size and absmax of the state are part of the graph or its guards, not frozen into it."""
    torch._dynamo.reset()
    layer, other = build("glora"), build("glora", quant_type="fp4", blocksize=32, seed=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40)
    torch.testing.assert_close(compiled(x), layer(x))
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))


# A state that belongs elsewhere.


@kinds
def test_a_dense_checkpoint_is_refused(kind):
    layer = build(kind)
    dense = nn.Linear(40, 9)
    for dtype in (torch.float32, torch.bfloat16):
        refused(layer, copy.deepcopy(dense).to(dtype).state_dict(), "weight: it is dense.*4 bits", strict=False)
    refused(layer, dense.state_dict(), "weight: it is dense.*4 bits.*load first, then quantize")


def test_a_4_bit_checkpoint_into_a_dense_layer_is_refused():
    state = build().state_dict()
    layer = gk.GLoRALinear.from_linear(nn.Linear(40, 9), CFG)
    before = [p.clone() for p in layer.parameters()]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"weight is in 4 bits.*dense.*quantize\(\)"):
            layer.load_state_dict(state, strict=strict)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="weight"):
        nn.Linear(40, 9).load_state_dict(state)


@kinds
@pytest.mark.parametrize(("k", "n"), [(36, 10), (40, 10), (9, 40), (20, 18)])
def test_another_shape_is_refused(kind, k, n):
    """(36, 10), (9, 40) and (20, 18) have as many weights as the layer: only the state tells them apart."""
    refused(build(kind), build(k=k, n=n, bias=False).state_dict(), rf"weight.*\({n}, {k}\).*\(9, 40\)", strict=False)


# A damaged state.


@kinds
@pytest.mark.parametrize(("change", "words"), [
    (lambda s: s | {KEY: s[KEY][:40]}, "damaged"),
    (lambda s: s | {KEY: s[KEY][:0]}, "damaged"),
    (lambda s: s | {KEY: s[KEY].float()}, "damaged"),
    (lambda s: s | {KEY: s[KEY][None]}, "damaged"),
    (lambda s: s | {KEY: torch.full_like(s[KEY], 0xFF)}, "damaged"),
    (lambda s: s | {KEY: torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)}, "damaged"),
    (lambda s: s | {KEY: torch.tensor(list(b'"nf4"'), dtype=torch.uint8)}, "damaged"),
    (lambda s: s | {KEY: torch.tensor(list(b"null"), dtype=torch.uint8)}, "damaged"),
    (lambda s: edited(s, quant_type=None), "damaged"),
    (lambda s: edited(s, quant_type="fp4"), "'fp4'"),
    (lambda s: edited(s, quant_type=["nf4"]), "weight"),
    (lambda s: edited(s, shape=None), "damaged"),
    (lambda s: edited(s, shape=[9]), "damaged"),
    (lambda s: edited(s, shape=[9, 40, 1]), "shape"),
    (lambda s: edited(s, shape="ab"), "damaged"),
    (lambda s: edited(s, shape=[-9, -40]), "shape"),
    (lambda s: edited(s, shape=[40, 9]), r"\(40, 9\).*\(9, 40\)"),
    (lambda s: edited(s, dtype="float64"), "damaged|float64"),
    (lambda s: edited(s, dtype="system"), "damaged"),
    (lambda s: edited(s, blocksize=128), "absmax"),
    (lambda s: edited(s, blocksize=0), "blocksize"),
    (lambda s: edited(s, blocksize="64"), "blocksize"),
    (lambda s: edited(s, blocksize=[64]), "blocksize"),
    (lambda s: edited(s, nested_blocksize=0), "nested blocksize"),
    (lambda s: edited(s, nested_blocksize=2), "nested absmax"),
    (lambda s: edited(s, nested_blocksize=None), "absmax"),
    (lambda s: edited(s, nested_offset="half"), "damaged"),
    (lambda s: edited(s, nested_offset=None), "damaged"),
    (lambda s: s | {"weight.absmax": s["weight.absmax"][:-1]}, "absmax.*6 numbers"),
    (lambda s: s | {"weight.absmax": s["weight.absmax"].float()}, "absmax must be torch.uint8"),
    (lambda s: s | {"weight.quant_map": s["weight.quant_map"].flip(0)}, "quant_map"),
    (lambda s: s | {"weight.quant_map": s["weight.quant_map"][:15]}, "quant_map"),
    (lambda s: s | {"weight.quant_map": s["weight.quant_map"] * float("nan")}, "quant_map"),
    (lambda s: s | {"weight.nested_absmax": s["weight.nested_absmax"][:0]}, "nested absmax"),
    (lambda s: s | {"weight.nested_quant_map": s["weight.nested_quant_map"][:255]}, "nested code"),
    (lambda s: s | {"weight.nested_quant_map": s["weight.nested_quant_map"].double()}, "nested code"),
    (lambda s: s | {"weight": s["weight"][:-1]}, "packed"),
    (lambda s: s | {"weight": torch.cat([s["weight"], s["weight"]])}, "packed"),
    (lambda s: {n: t for n, t in s.items() if n != KEY}, "one entry"),
    (lambda s: {n: t for n, t in s.items() if n != "weight.absmax"}, "damaged.*absmax"),
    (lambda s: {n: t for n, t in s.items() if n != "weight.quant_map"}, "damaged.*quant_map"),
    (lambda s: {n: t for n, t in s.items() if n != "weight.nested_absmax"}, "damaged.*nested_absmax"),
    (lambda s: {n: t for n, t in s.items() if not n.startswith("weight.")}, "one entry"),
    (lambda s: s | {KEY.replace("nf4", "fp4"): s[KEY]}, "one entry"),
])  # fmt: skip
def test_a_damaged_state_is_refused(change, words, kind):
    refused(build(kind, seed=1), change(build(kind).state_dict()), words)


@pytest.mark.parametrize("change", [
    lambda s: edited(s, blocksize=64.0),
    lambda s: edited(s, blocksize=True),
    lambda s: edited(s, shape=[9.5, 40.25]),
    lambda s: edited(s, shape=["9", "40"]),
    lambda s: edited(s, nested_blocksize=256.5),
    lambda s: edited(s, nested_offset=float("nan")),
    lambda s: edited(s, nested_offset=float("inf")),
    lambda s: edited(s, nested_offset=True),
    lambda s: s | {"weight.absmax": s["weight.absmax"].view(2, 3)},
    lambda s: s | {"weight.absmax": s["weight.absmax"].view(6, 1)},
    lambda s: s | {"weight.nested_quant_map": s["weight.nested_quant_map"].view(16, 16)},
    lambda s: s | {"weight.nested_absmax": s["weight.nested_absmax"] * float("nan")},
    lambda s: s | {KEY: torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)},
    lambda s: s | {"weight": s["weight"].view(-1)},
    lambda s: s | {"weight": s["weight"].view(9, 20)},
])  # fmt: skip
def test_a_strange_state_is_refused_or_works(change):
    """Never an error at the first forward, never NaN, never codes of one state beside another."""
    layer, other = build(), build(seed=1)
    before, error = snapshot(other), None
    try:
        other.load_state_dict(change(layer.state_dict()))
    except RuntimeError as raised:
        error = str(raised)
    if error is not None:
        assert "weight" in error
        assert unchanged(other, before)
    assert other(torch.randn(2, 40)).isfinite().all()


def test_what_another_layer_of_the_model_holds_is_no_part_of_this_one():
    """Names behind a prefix: "weight.absmax" of "a" is not that of "a.b"."""
    model = nn.ModuleDict({"a": build(), "ab": build(seed=1, quant_type="fp4")})
    other = nn.ModuleDict({"a": build(seed=2), "ab": build(seed=3)})
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 40)
    assert all(torch.equal(other[name](x), model[name](x)) for name in model)
    state = model.state_dict()
    del state["ab.weight.quant_state.bitsandbytes__fp4"]
    with pytest.raises(RuntimeError, match=r"ab\.weight.*one entry"):
        other.load_state_dict(state)
