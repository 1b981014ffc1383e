"""The codec header equals bitsandbytes bit for bit: compiled by a plain C++ compiler, and inside the extension."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from glora_kernels.quant.codes import codebook
from glora_kernels.reference.random import round_dithered

bnb = pytest.importorskip("bitsandbytes.functional")
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute  # noqa: E402

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SHAPES = [(3, 70), (5, 333), (7, 4096)]
CASES = [
    ("nf4", 32, False), ("nf4", 64, True), ("nf4", 128, True), ("nf4", 256, False), ("nf4", 512, True),
    ("nf4", 1024, False), ("nf4", 2048, True), ("nf4", 4096, True),
    ("fp4", 32, True), ("fp4", 64, False), ("fp4", 128, False), ("fp4", 256, True), ("fp4", 4096, False),
]  # fmt: skip


class Header:
    """The header in the C++ library of the tests."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def decode(self, packed, state, out):
        nested = state.state2 if state.nested else None
        pointers = [nested.absmax, nested.code, state.offset] if nested else [None] * 3
        self.library.decode(
            pointer(packed), pointer(state.absmax), *map(pointer, pointers), log2(state.blocksize),
            log2(nested.blocksize) if nested else 0, int(state.quant_type == "fp4"), ctypes.c_int64(out.numel()),
            DTYPES[out.dtype], pointer(out),
        )  # fmt: skip

    def encode(self, values, blocksize, quant_type, packed, absmax):
        self.library.encode(
            pointer(values), ctypes.c_int64(values.numel()), log2(blocksize), int(quant_type == "fp4"),
            pointer(packed), pointer(absmax),
        )  # fmt: skip

    def round_dithered(self, values, out):
        back = torch.empty_like(values)
        rows, cols = map(ctypes.c_int64, values.shape)
        self.library.round16(pointer(values), rows, cols, DTYPES[out.dtype], 1, pointer(out), pointer(back))


class Extension:
    """The same functions of glora_kernels._C."""

    def __init__(self, module) -> None:
        self.module = module

    def decode(self, packed, state, out):
        nested = state.state2 if state.nested else None
        absmax = (0, state.absmax.data_ptr()) if nested else (state.absmax.data_ptr(), 0)
        second = (nested.absmax.data_ptr(), nested.code.data_ptr(), state.offset.data_ptr()) if nested else (0, 0, 0)
        blocks = (log2(state.blocksize), log2(nested.blocksize) if nested else 0)
        codes = (packed.data_ptr(), *absmax, *second, *blocks, state.quant_type == "fp4", 0)
        self.module.decode_host(codes=codes, out=out.data_ptr(), out_dtype=DTYPES[out.dtype], total=out.numel())

    def encode(self, values, blocksize, quant_type, packed, absmax):
        self.module.encode_host(
            values=values.data_ptr(), total=values.numel(), log2_block=log2(blocksize), is_fp4=quant_type == "fp4",
            packed=packed.data_ptr(), absmax=absmax.data_ptr(),
        )  # fmt: skip

    def round_dithered(self, values, out):
        rows, cols = values.shape
        self.module.round_dithered_host(
            values=values.data_ptr(), out=out.data_ptr(), out_dtype=DTYPES[out.dtype], rows=rows, cols=cols
        )


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def log2(value):
    return value.bit_length() - 1


@pytest.fixture(params=[Header, Extension], ids=["header", "extension"])
def codec(request):
    return request.param(request.getfixturevalue({Header: "emulator", Extension: "extension"}[request.param]))


def weight_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_levels_are_bitsandbytes(quant_type, emulator):
    """Each code with absmax 1 decodes to its level."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[::2] << 4) | codes[1::2]
    state = bnb.QuantState(torch.ones(1), torch.Size([16]), blocksize=32, quant_type=quant_type)
    levels = torch.full((16,), math.nan)
    Header(emulator).decode(packed, state, levels)
    assert torch.equal(levels, bnb.get_4bit_type(quant_type, "cpu"))
    assert torch.equal(levels, codebook(quant_type, torch.device("cpu")))


@pytest.mark.parametrize(("quant_type", "blocksize", "nested"), CASES)
def test_decode_is_bit_for_bit_bitsandbytes(codec, quant_type, blocksize, nested):
    for shape in SHAPES:
        packed, state = bnb.quantize_4bit(
            weight_of(shape), blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        for dtype in DTYPES:
            state.dtype = dtype
            out = torch.full(shape, math.nan, dtype=dtype)
            codec.decode(packed, state, out)
            assert torch.equal(out, literal(packed, state)), (shape, dtype)
            if shape[1] % 2 == 0 and blocksize < 2048:  # elsewhere it runs `literal`, after compiling it
                assert torch.equal(out, bnb.dequantize_4bit(packed, state)), (shape, dtype)


def literal(packed, state):
    """bitsandbytes' decode in plain PyTorch."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    code = bnb.get_4bit_type(state.quant_type, "cpu")
    decode = _dequantize_4bit_compute.__wrapped__  # without torch.compile
    return decode(packed.reshape(-1), absmax, code, state.blocksize, state.shape, state.dtype)


@pytest.mark.parametrize(("quant_type", "blocksize", "nested"), [case for case in CASES if not case[2]])
def test_encode_is_bit_for_bit_bitsandbytes(codec, quant_type, blocksize, nested):
    for shape in SHAPES:
        weight = weight_of(shape, 1)
        weight[1, :40] = 0.0  # a block of zeros where blocks are short, values on a bound of FP4 elsewhere
        expected, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
        packed, absmax = torch.full_like(expected, 255), torch.full_like(state.absmax, math.nan)
        codec.encode(weight, blocksize, quant_type, packed, absmax)
        assert torch.equal(packed, expected)
        assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_torchs(emulator, dtype):
    """Every exponent, ties, subnormals, overflow, infinities; and back."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    ties = (torch.arange(1 << 16, dtype=torch.int64) << 16) - (1 << 31) + 0x1000
    halves = (torch.arange(1 << 16, dtype=torch.int64) << 16) - (1 << 31) + 0x8000
    values = torch.cat([bits, ties, halves]).to(torch.int32).view(torch.float32)
    values = values[~values.isnan()].view(1, -1)
    rounded, back = torch.empty(values.shape, dtype=dtype), torch.empty_like(values)
    sizes = ctypes.c_int64(1), ctypes.c_int64(values.numel())
    emulator.round16(pointer(values), *sizes, DTYPES[dtype], 0, pointer(rounded), pointer(back))
    assert torch.equal(rounded, values.to(dtype))
    assert torch.equal(back, rounded.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dither_is_the_references(codec, dtype):
    values = weight_of((37, 70), 2)
    values[0, 0], values[1, 1], values[2, 2] = math.inf, -math.inf, 1e-30
    out = torch.full(values.shape, math.nan, dtype=dtype)
    codec.round_dithered(values, out)
    assert torch.equal(out, round_dithered(values, dtype))
