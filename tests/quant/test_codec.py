"""The codec: equal to bitsandbytes bit for bit, to the formulas by the letter, and closed to what does not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import glora_kernels as gk
from glora_kernels.glora import eager
from glora_kernels.quant import QuantizedWeight, codec, dequantize, quantize_weight
from glora_kernels.quant.codes import FP4, NF4

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),  # one code: the other half of its byte is padding
    (5, 33),  # odd rows, odd K
    (7, 100),  # K a multiple of no block
    (3, 4096),  # whole blocks of every size, three blocks of the largest
    (1, 4097),  # a last block of one number
    (130, 64),
    (257, 96),  # more than 256 blocks of 32 and of 64: a second block of nested absmax, not full
]
LEVELS = {"nf4": NF4, "fp4": FP4}
types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
nesting = pytest.mark.parametrize("nested", [False, True])


def draw(shape, seed=0, std=1.0, dtype=torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def blocks_of(weight: QuantizedWeight) -> Tensor:
    """absmax in fp32, by the letter and one number at a time: a product and a sum, each rounded."""
    state, nested = weight.state, weight.state.nested
    if nested is None:
        return state.absmax
    out = torch.empty(len(state.absmax))
    for i, code in enumerate(state.absmax.tolist()):
        product = nested.code[code] * nested.absmax[i // nested.blocksize]
        out[i] = product + nested.offset
    return out


def literal(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """W by the letter: the nibbles, the level of each, times the absmax of its block in the flat tensor."""
    n, k = weight.shape
    packed = weight.packed.reshape(-1).long()
    nibbles = torch.stack([packed // 16, packed % 16], 1).reshape(-1)[: n * k]
    levels = torch.tensor(LEVELS[weight.state.quant_type])[nibbles]
    absmax = blocks_of(weight).repeat_interleave(weight.state.blocksize)[: n * k]
    return (levels * absmax).to(weight.state.dtype).to(dtype).view(n, k)


def bnb_quantized(weight: Tensor, quant_type: str, blocksize: int, nested: bool):
    functional = pytest.importorskip("bitsandbytes.functional")
    return functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )  # fmt: skip


def assert_same_codes(ours: QuantizedWeight, packed: Tensor, state) -> None:
    assert torch.equal(ours.packed, packed)
    assert ours.packed.shape == packed.shape
    assert torch.equal(ours.state.absmax, state.absmax)
    assert ours.state.absmax.dtype == state.absmax.dtype
    assert (ours.state.blocksize, ours.state.quant_type) == (state.blocksize, state.quant_type)
    assert (ours.state.dtype, tuple(ours.state.shape)) == (state.dtype, tuple(state.shape))
    assert (ours.state.nested is not None) == state.nested
    if ours.state.nested is not None:
        inner = ours.state.nested
        assert torch.equal(inner.absmax, state.state2.absmax)
        assert torch.equal(inner.code, state.state2.code)
        assert torch.equal(inner.offset, state.offset)
        assert inner.offset.dtype == torch.float32
        assert inner.blocksize == state.state2.blocksize == 256


@types
@nesting
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_equal_those_of_bitsandbytes(quant_type, nested, dtype):
    """Packed codes, absmax, nested absmax and offset; then what the codes stand for, in every dtype."""
    for i, shape in enumerate(SHAPES):
        weight = draw(shape, seed=i, std=0.05, dtype=dtype)
        for blocksize in BLOCKSIZES:
            packed, state = bnb_quantized(weight, quant_type, blocksize, nested)
            ours = quantize_weight(weight, quant_type, blocksize, nested)
            assert_same_codes(ours, packed, state)
            expected = literal(ours, torch.float32)
            for other in (*DTYPES, torch.float64):
                assert torch.equal(dequantize(ours, other), expected.to(other)), (shape, blocksize, other)


@types
@nesting
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_values_equal_those_of_bitsandbytes(quant_type, nested, dtype, monkeypatch):
    """Where blocks and rows line up: elsewhere bitsandbytes' own CPU code (0.50) reads the absmax of other blocks."""
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(codec, "_native", lambda weight: None)
    for shape, blocksize in (((130, 64), 64), ((3, 4096), 32), ((3, 4096), 4096), ((257, 96), 32), ((1, 256), 128)):
        packed, state = bnb_quantized(draw(shape, std=0.05, dtype=dtype), quant_type, blocksize, nested)
        ours = quantize_weight(draw(shape, std=0.05, dtype=dtype), quant_type, blocksize, nested)
        with torch.compiler.set_stance("force_eager"):  # on a CPU it would compile itself, for seconds a shape
            expected = functional.dequantize_4bit(packed, state)
        assert torch.equal(dequantize(ours, dtype), expected)


@types
@nesting
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_decodes_whole_blocks_with_the_same_bits(quant_type, nested, dtype, monkeypatch):
    """All rows and some, also of a K that is no multiple of the block size, where a last block is shorter."""
    pytest.importorskip("bitsandbytes")
    for shape, blocksize in (((96, 96), 64), ((7, 33), 32), ((300, 512), 1024), ((130, 64), 64)):
        weight = quantize_weight(draw(shape, std=0.05, dtype=dtype), quant_type, blocksize, nested)
        assert codec._native(weight) is not None
        cases = [(other, rows) for other in DTYPES for rows in (None, slice(3, 6))]
        native = [dequantize(weight, other, rows) for other, rows in cases]
        with monkeypatch.context() as patch:
            patch.setattr(codec, "_native", lambda weight: None)
            for found, (other, rows) in zip(native, cases, strict=True):
                assert torch.equal(found, dequantize(weight, other, rows)), (shape, blocksize, other, rows)


def test_a_weight_decoded_at_once_is_the_only_dense_one(monkeypatch):
    """In the dtype it was quantized from bitsandbytes' operator makes all of W, and no workspace holds it again."""
    pytest.importorskip("bitsandbytes")
    layer = gk.GLoRALinear.from_linear(gk.quantize(nn.Linear(512, 256)), gk.GLoRAConfig("vector", "lora", rank=4))
    calls = []
    decoded = codec._decoded_by
    monkeypatch.setattr(codec, "_decoded_by", lambda *args: calls.append(args[2:]) or decoded(*args))
    monkeypatch.setattr(eager, "workspace_like", None)
    layer(draw((3, 512)).float().requires_grad_()).sum().backward()
    assert calls[:2] == [(0, 512 * 256)] * 2  # forward and dx; dA recovers what y does not give
    for other in (torch.float64, torch.bfloat16):  # rounded by pieces, into the workspace
        assert codec.decoded_at_once(layer.frozen().weight, other) is None


@types
def test_codes_of_special_values_equal_those_of_bitsandbytes(quant_type):
    """Blocks of zeros, of -0.0, of denormals, of the largest numbers, of both ends of the range, of one level."""
    rows = torch.zeros(14, 64)
    rows[1] = -0.0
    rows[2] = draw(64) * 1e-40
    rows[3] = draw(64) * 1e-44
    rows[4] = draw(64).clamp(-1, 1) * torch.finfo(torch.float32).max
    rows[5] = torch.finfo(torch.float32).min
    rows[6, ::2], rows[6, 1::2] = 1e-30, 1e30
    rows[7] = 0.125
    rows[8, 5] = -2.0
    rows[9] = torch.linspace(-1, 1, 64)
    middles = torch.tensor(sorted(LEVELS[quant_type]))
    middles = (middles[1:] + middles[:-1]) / 2
    rows[10, :15], rows[10, 15] = middles, 1.0
    rows[11, :15], rows[11, 15] = torch.nextafter(middles, torch.tensor(2.0)), 1.0
    rows[12, :15], rows[12, 15] = torch.nextafter(middles, torch.tensor(-2.0)), -1.0
    rows[13] = 1.1754944e-38
    for weight in (rows, rows[:, :63].contiguous(), rows.half().nan_to_num(posinf=65504, neginf=-65504)):
        for blocksize in (32, 64, 128):
            packed, state = bnb_quantized(weight, quant_type, blocksize, False)
            ours = quantize_weight(weight, quant_type, blocksize)
            assert_same_codes(ours, packed, state)
            assert torch.equal(dequantize(ours, weight.dtype), literal(ours, weight.dtype))
            assert dequantize(ours, weight.dtype).isfinite().all()


@types
@pytest.mark.parametrize("rows", [1, 4, 5, 1024])
def test_nested_absmax_of_equal_blocks_equals_bitsandbytes(quant_type, rows):
    """All absmax are their mean: the nested scale is 0, and nothing is divided by it."""
    for value in (1.0, 0.0, 0.1):
        packed, state = bnb_quantized(torch.full((rows, 64), value), quant_type, 64, True)
        ours = quantize_weight(torch.full((rows, 64), value), quant_type, 64, True)
        assert_same_codes(ours, packed, state)
        assert dequantize(ours, torch.float32).isfinite().all()
        assert torch.equal(dequantize(ours, torch.float32), literal(ours, torch.float32))


@types
@pytest.mark.parametrize("blocksize", [32, 4096])
def test_a_weight_of_several_chunks(quant_type, blocksize):
    """More elements than are worked on at a time, K odd: every boundary between chunks falls inside a row."""
    weight = draw((271, 2049), std=0.02, dtype=torch.bfloat16)
    for nested in (False, True):
        packed, state = bnb_quantized(weight, quant_type, blocksize, nested)
        ours = quantize_weight(weight, quant_type, blocksize, nested)
        assert_same_codes(ours, packed, state)
    whole = dequantize(ours, torch.bfloat16)
    state = dataclasses.replace(ours.state, absmax=blocks_of(ours), nested=None)
    assert torch.equal(whole, literal(QuantizedWeight(ours.packed, state), torch.bfloat16))
    for rows in (slice(127, 130), slice(128, 271), slice(270, 271)):
        assert torch.equal(dequantize(ours, torch.bfloat16, rows), whole[rows])


@types
def test_every_code_is_the_nearest_level(quant_type):
    """No other level of a block is closer to the weight, beyond the rounding of the scaled value."""
    weight = draw((40, 64))
    ours = quantize_weight(weight, quant_type, 64)
    error = (dequantize(ours, torch.float64) - weight.double()).abs()
    levels = torch.tensor(LEVELS[quant_type], dtype=torch.float64) * ours.state.absmax.double()[:, None]
    best = (weight.double()[:, :, None] - levels[:, None, :]).abs().amin(2)
    assert (error <= best + 4 * torch.finfo(torch.float32).eps * ours.state.absmax[:, None]).all()


@types
def test_requantizing_gives_the_same_codes(quant_type):
    """The levels of a block are a fixed point: its largest is the absmax itself."""
    ours = quantize_weight(draw((16, 128)), quant_type, 64)
    again = quantize_weight(dequantize(ours, torch.float32), quant_type, 64)
    assert torch.equal(again.state.absmax, ours.state.absmax)
    assert torch.equal(dequantize(again, torch.float32), dequantize(ours, torch.float32))


@pytest.mark.parametrize("shape", [(9, 33), (9, 100), (9, 64), (2, 4097)])
@nesting
def test_rows_are_the_slice_of_the_whole(shape, nested):
    n, _ = shape
    for blocksize in (32, 4096):
        weight = quantize_weight(draw(shape, dtype=torch.bfloat16), "nf4", blocksize, nested)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            whole = dequantize(weight, dtype)
            ranges = [slice(i, j) for i in range(n) for j in range(i, n + 1)]
            for rows in (*ranges, slice(None), slice(-2, None), slice(1, n + 7), slice(n, None)):
                assert torch.equal(dequantize(weight, dtype, rows), whole[rows]), rows


def test_out_is_written_and_nothing_beside_it():
    weight = quantize_weight(draw((7, 33)), "fp4", 32, True)
    for rows in (slice(None), slice(2, 5)):
        for dtype in (*DTYPES, torch.float64):
            expected = dequantize(weight, dtype, rows)
            memory = torch.full((expected.numel() + 2,), 7.0, dtype=dtype)
            out = memory[1:-1].view(expected.shape)
            assert dequantize(weight, dtype, rows, out) is out
            assert torch.equal(out, expected)
            assert memory[[0, -1]].eq(7.0).all()


@types
@nesting
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_weight_is_rounded_to_the_dtype_it_was_quantized_from(quant_type, nested, stored):
    """One matrix, whatever is computed in; the product of level and absmax itself has more digits."""
    weight = quantize_weight(draw((16, 128), dtype=stored), quant_type, 64, nested)
    base = dequantize(weight, stored)
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(dequantize(weight, dtype), base.to(dtype))
    state = dataclasses.replace(weight.state, dtype=torch.float32)
    assert not torch.equal(dequantize(QuantizedWeight(weight.packed, state), torch.float32), base.float())


def test_an_absmax_below_zero_turns_the_levels_around():
    """Nothing that quantizes writes one, and nested absmax can come out below zero all the same."""
    weight = quantize_weight(draw((4, 64)), "nf4", 64)
    turned = QuantizedWeight(weight.packed, dataclasses.replace(weight.state, absmax=-weight.state.absmax))
    assert torch.equal(dequantize(turned, torch.float32), -dequantize(weight, torch.float32))
    nested = quantize_weight(draw((4, 64)), "nf4", 64, True)
    inner = dataclasses.replace(nested.state.nested, offset=torch.tensor(-5.0))
    below = QuantizedWeight(nested.packed, dataclasses.replace(nested.state, nested=inner))
    assert blocks_of(below).lt(0).all()
    assert torch.equal(dequantize(below, torch.float32), literal(below, torch.float32))


def test_strides_and_gradients_of_the_weight_do_not_matter():
    weight = draw((33, 40))
    expected = quantize_weight(weight, "nf4", 32, True)
    for other in (weight.t().contiguous().t(), torch.nn.Parameter(weight), draw((33, 80))[:, ::2].copy_(weight)):
        got = quantize_weight(other, "nf4", 32, True)
        assert torch.equal(got.packed, expected.packed)
        assert torch.equal(got.state.absmax, expected.state.absmax)
        assert not got.packed.requires_grad


def test_what_it_takes_in_memory():
    """4.5 bits a weight; 4 + 8/64 + 32/(64·256) with double quantization, and the map of 256 numbers and an offset."""
    plain, double = (quantize_weight(draw((256, 512)), "nf4", 64, nested) for nested in (False, True))
    assert plain.nbytes() * 8 == plain.numel() * 4.5
    assert double.nbytes() == 256 * 512 // 2 + 2048 + 4 * 8 + 4 * 256 + 4


# What cannot be quantized.


@pytest.mark.parametrize(("weight", "arguments", "error", "words"), [
    (torch.ones(2, 64), ("int4", 64), ValueError, "quant_type.*'nf4', 'fp4'.*'int4'"),
    (torch.ones(2, 64), ("nf4", 16), ValueError, "blocksize.*32, 64.*got 16"),
    (torch.ones(2, 64), ("nf4", 96), ValueError, "blocksize.*got 96"),
    (torch.ones(2, 64), ("nf4", 8192), ValueError, "blocksize.*got 8192"),
    (torch.ones(2, 64), ("nf4", 0), ValueError, "blocksize.*got 0"),
    (torch.ones(2, 64), ("nf4", -64), ValueError, "blocksize.*got -64"),
    (torch.ones(2, 64), ("nf4", True), ValueError, "blocksize.*got True"),
    (torch.ones(2, 64, dtype=torch.float64), ("nf4",), TypeError, "weight.*float32, bfloat16 or float16.*float64"),
    (torch.ones(2, 64, dtype=torch.uint8), ("nf4",), TypeError, "weight.*uint8"),
    (torch.ones(64), ("nf4",), ValueError, r"weight.*matrix.*\(64,\)"),
    (torch.ones(2, 2, 64), ("nf4",), ValueError, r"weight.*matrix.*\(2, 2, 64\)"),
    (torch.ones(0, 64), ("nf4",), ValueError, r"at least one element.*\(0, 64\)"),
    (torch.ones(2, 64, device="meta"), ("nf4",), ValueError, "meta"),
])  # fmt: skip
def test_what_cannot_be_quantized_is_refused(weight, arguments, error, words):
    with pytest.raises(error, match=words):
        quantize_weight(weight, *arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_refused_wherever_they_are(value, dtype):
    for place in ((0, 0), (3, 17), (4, 99)):
        weight = torch.zeros(5, 100, dtype=dtype)
        weight[place] = value
        with pytest.raises(ValueError, match="NaN or inf"):
            quantize_weight(weight, "nf4", 64)


def test_double_quantization_of_numbers_whose_sum_overflows():
    """The mean of the absmax has no fp32: an error that says so, or the right numbers, and no inf."""
    weight = torch.full((4, 64), 3e38)
    try:
        ours = quantize_weight(weight, "nf4", 64, True)
    except ValueError:
        return
    assert torch.allclose(dequantize(ours, torch.float32), weight, rtol=0.1)


# What a QuantizedWeight is made of: afterwards nothing can be read out of bounds.


def changed(weight: QuantizedWeight, packed: Tensor | None = None, nested: dict | None = None, **state):
    if nested is not None:
        state["nested"] = dataclasses.replace(weight.state.nested, **nested)
    return QuantizedWeight(weight.packed if packed is None else packed, dataclasses.replace(weight.state, **state))


PLAIN, DOUBLE = (quantize_weight(draw((5, 100)), "nf4", 64, nested) for nested in (False, True))


@pytest.mark.parametrize(("weight", "change", "error", "words"), [
    (PLAIN, {"packed": PLAIN.packed[:-1]}, ValueError, r"packed.*5x100.*250 numbers.*\(249, 1\)"),
    (PLAIN, {"packed": torch.cat([PLAIN.packed, PLAIN.packed[:1]])}, ValueError, "packed.*250 numbers"),
    (PLAIN, {"packed": PLAIN.packed.int()}, TypeError, "packed must be torch.uint8, got torch.int32"),
    (PLAIN, {"packed": torch.zeros(500, dtype=torch.uint8)[::2]}, ValueError, "packed.*in a row"),
    (PLAIN, {"packed": PLAIN.packed.to("meta")}, ValueError, "absmax is on cpu, the packed weight on meta"),
    (PLAIN, {"absmax": PLAIN.state.absmax[:-1]}, ValueError, r"absmax.*8 numbers.*\(7,\)"),
    (PLAIN, {"absmax": torch.ones(9)}, ValueError, r"absmax.*8 numbers.*\(9,\)"),
    (PLAIN, {"absmax": PLAIN.state.absmax.bfloat16()}, TypeError, "absmax must be torch.float32, got torch.bfloat16"),
    (PLAIN, {"absmax": DOUBLE.state.absmax}, TypeError, "absmax must be torch.float32, got torch.uint8"),
    (PLAIN, {"absmax": PLAIN.state.absmax.to("meta")}, ValueError, "absmax is on meta, the packed weight on cpu"),
    (PLAIN, {"blocksize": 32}, ValueError, "absmax.*blocks of 32 must hold 16 numbers"),
    (PLAIN, {"blocksize": 48}, ValueError, "blocksize.*got 48"),
    (PLAIN, {"shape": (100, 6)}, ValueError, "absmax.*100x6.*10 numbers"),
    (PLAIN, {"shape": (4, 120)}, ValueError, "packed.*4x120.*240 numbers"),
    (PLAIN, {"shape": (500,)}, ValueError, r"two sizes.*\(500,\)"),
    (PLAIN, {"shape": (0, 100)}, ValueError, "at least 1"),
    (PLAIN, {"shape": (-5, -100)}, ValueError, "at least 1"),
    (PLAIN, {"dtype": torch.float64}, TypeError, "float64"),
    (PLAIN, {"quant_type": "int4"}, ValueError, "quant_type.*'int4'"),
    (DOUBLE, {"absmax": PLAIN.state.absmax}, TypeError, "absmax must be torch.uint8, got torch.float32"),
    (DOUBLE, {"absmax": DOUBLE.state.absmax[:-1]}, ValueError, "absmax.*8 numbers"),
    (DOUBLE, {"nested": {"absmax": torch.ones(2)}}, ValueError, "nested absmax.*1 numbers"),
    (DOUBLE, {"nested": {"absmax": torch.ones(0)}}, ValueError, "nested absmax"),
    (DOUBLE, {"nested": {"code": torch.ones(255)}}, ValueError, "nested code.*256"),
    (DOUBLE, {"nested": {"code": torch.ones(256).half()}}, TypeError, "nested code"),
    (DOUBLE, {"nested": {"offset": torch.ones(2)}}, ValueError, "nested offset"),
    (DOUBLE, {"nested": {"offset": torch.ones((), dtype=torch.float64)}}, TypeError, "nested offset"),
    (DOUBLE, {"nested": {"offset": torch.ones((), device="meta")}}, ValueError, "nested offset is on meta"),
    (DOUBLE, {"nested": {"blocksize": 0}}, ValueError, "nested blocksize.*0"),
    (DOUBLE, {"nested": {"blocksize": 4}}, ValueError, "nested absmax.*2 numbers"),
])  # fmt: skip
def test_a_weight_whose_parts_do_not_fit_is_refused(weight, change, error, words):
    with pytest.raises(error, match=words):
        changed(weight, **change)


@pytest.mark.parametrize("blocksize", [64.0, "64"])
def test_a_block_size_is_an_integer(blocksize):
    with pytest.raises((TypeError, ValueError), match="blocksize"):
        changed(PLAIN, blocksize=blocksize)
    with pytest.raises((TypeError, ValueError), match="blocksize"):
        quantize_weight(torch.ones(2, 64), "nf4", blocksize)


def test_codes_may_come_in_any_shape():
    expected = dequantize(DOUBLE, torch.float32)
    for packed in (DOUBLE.packed.view(-1), DOUBLE.packed.t(), DOUBLE.packed.view(5, 50)):
        assert torch.equal(dequantize(changed(DOUBLE, packed), torch.float32), expected)


@pytest.mark.parametrize(("weight", "change"), [
    (PLAIN, {"absmax": PLAIN.state.absmax.view(2, 4)}),
    (PLAIN, {"absmax": PLAIN.state.absmax.view(8, 1)}),
    (PLAIN, {"absmax": PLAIN.state.absmax.view(1, 8)}),
    (DOUBLE, {"absmax": DOUBLE.state.absmax.view(2, 4)}),
    (DOUBLE, {"nested": {"absmax": DOUBLE.state.nested.absmax.view(1, 1)}}),
    (DOUBLE, {"nested": {"code": DOUBLE.state.nested.code.view(16, 16)}}),
    (DOUBLE, {"nested": {"offset": DOUBLE.state.nested.offset.view(1)}}),
])  # fmt: skip
def test_a_state_of_another_shape_is_refused_or_read_as_its_numbers(weight, change):
    try:
        other = changed(weight, **change)
    except ValueError:
        return
    assert torch.equal(dequantize(other, torch.float32), dequantize(weight, torch.float32))
