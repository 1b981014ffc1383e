"""The kernels' index arithmetic, walked on the host: every element written once, every product of the right numbers."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import pytest
import torch

from glora_kernels.four_bit import cuda
from glora_kernels.quant import QuantizedWeight, dequantize, quantize_weight
from glora_kernels.reference.random import round_dithered


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def codes_of(weight):
    state = weight.state
    log2 = state.blocksize.bit_length() - 1
    return pointer(weight.packed), pointer(state.absmax), log2, int(state.quant_type == "fp4")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (37, 70), (5, 4096), (9, 3641)])
@pytest.mark.parametrize("vectorized", [0, 1])
def test_dequantize_writes_every_element_once(emulator, shape, vectorized):
    weight = quantize_weight(random(*shape), "nf4", 32)
    out, written = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.int32)
    total = ctypes.c_int64(weight.numel())
    emulator.dequantize(*codes_of(weight), total, vectorized, pointer(out), pointer(written))
    assert torch.equal(out, dequantize(weight, torch.float32))
    assert bool((written == 1).all())


@pytest.mark.parametrize(
    ("shape", "blocksize", "rank", "vectorized"),
    [((33, 264), 32, 3, 1), ((5, 70), 32, 1, 0), ((70, 301), 64, 17, 0), ((2, 7), 64, 16, 0), ((64, 512), 128, 40, 1)],
)
def test_adapted_dequantize_places_the_factors(emulator, shape, blocksize, rank, vectorized):
    """Rows that begin anywhere in a word and a block; ranks over one chunk; the dither by row and column."""
    (n, k), weight = shape, quantize_weight(random(*shape), "fp4", blocksize)
    up, down = random(n, rank, seed=1) * 0.1, random(rank, k, seed=2) * 0.1
    out, written = torch.empty(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.int32)
    emulator.dequantize_adapted(
        *codes_of(weight), n, k, vectorized, pointer(up), pointer(down), rank, pointer(out), pointer(written)
    )
    w = dequantize(weight, torch.float32).double()
    assert torch.equal(out, round_dithered((w + w * (up.double() @ down.double())).float(), torch.bfloat16))
    assert bool((written == 1).all())


@pytest.mark.parametrize("warps_k", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("m", "n", "k", "blocksize"), [(1, 5, 32, 32), (5, 40, 96, 32), (17, 33, 320, 64), (64, 300, 1152, 128)]
)
def test_the_mma_product_reads_its_own_weights_and_tokens(emulator, m, n, k, blocksize, warps_k):
    weight = quantize_weight(random(n, k), "nf4", blocksize)
    x, y = random(m, k, seed=1, dtype=torch.float64), torch.full((m, n), math.nan, dtype=torch.float64)
    tiles = 1 << (-(-m // 8) - 1).bit_length()
    emulator.mma_product(*codes_of(weight), m, n, k, warps_k, tiles, pointer(x), pointer(y))
    truth = x @ dequantize(weight, torch.bfloat16).double().T
    assert float((y - truth).abs().max()) <= 1e-12 * k


@pytest.mark.parametrize("warps_k", [1, 4, 8])
@pytest.mark.parametrize(("m", "n", "k", "blocksize"), [(1, 5, 32, 32), (3, 33, 1056, 32), (4, 20, 4160, 64)])
def test_the_gemv_reads_its_own_weights_and_tokens(emulator, m, n, k, blocksize, warps_k):
    weight = quantize_weight(random(n, k), "fp4", blocksize)
    x, y = random(m, k, seed=1, dtype=torch.float64), torch.full((m, n), math.nan, dtype=torch.float64)
    emulator.gemv_product(*codes_of(weight), m, n, k, warps_k, pointer(x), pointer(y))
    ones = replace(weight.state, absmax=torch.ones_like(weight.state.absmax))
    levels = dequantize(QuantizedWeight(weight.packed, ones), torch.float64)
    absmax = weight.state.absmax.double().repeat_interleave(blocksize).view(n, k)
    truth = x @ (levels * absmax).T  # the product of level and absmax is not rounded here
    assert float((y - truth).abs().max()) <= 1e-12 * k


@pytest.mark.parametrize(
    ("m", "k", "rank", "sigma"), [(1, 32, 1, 0), (1, 4096, 16, 1), (5, 96, 0, 1), (17, 1024, 33, 1), (64, 544, 64, 1)]
)
def test_the_low_rank_items_cover_the_product_once(emulator, m, k, rank, sigma):
    slices = cuda.small_m_config(m, 4096, k, rank, bool(sigma), "sm_90")["slices"]
    x, down = random(m, k, dtype=torch.float64), random(max(1, rank), k, seed=1, dtype=torch.float64)
    pitch = -(-(rank + sigma) // 4) * 4
    out, items = torch.full((m, pitch), math.nan, dtype=torch.float64), ctypes.c_int()
    emulator.low_rank(m, k, rank, sigma, slices, pointer(x), pointer(down), pointer(out), ctypes.byref(items))
    truth = torch.cat([x @ down[:rank].T, x.sum(1, keepdim=True).expand(m, sigma)], 1)
    assert float((out[:, : rank + sigma] - truth).abs().max()) <= 1e-12 * k
    assert bool((out[:, rank + sigma :] == 0).all())
    assert 1 <= items.value <= 2 * 132
    assert slices * m * pitch <= cuda.SCRATCH_FLOATS


def test_the_chunks_of_x_spread_over_the_banks():
    """What a quarter of a warp reads at once lies in eight different groups of four banks."""
    chunk = lambda c: c ^ ((c >> 3) & 3)  # noqa: E731  maps.cuh: gemv_chunk, which the products above check
    for word in range(4):
        for quarter in range(4):
            assert len({chunk(4 * lane + word) % 8 for lane in range(8 * quarter, 8 * quarter + 8)}) == 8


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("rank", [0, 1, 16, 64])
def test_shared_memory_is_what_the_kernels_lay_out(emulator, m, rank):
    for n, k in ((1024, 4096), (4096, 14336), (14336, 4096), (7, 64)):
        config = cuda.small_m_config(m, n, k, rank, True, "sm_80")
        gemv = m <= cuda.GEMV_TOKENS
        padded = next(p for p in ((1, 2, 4) if gemv else (8, 16, 32, 64)) if p >= m)
        rows = 8 // config["warps_k"] * (4 if gemv else 32)
        expected = emulator.shared_bytes(int(gemv), padded, m, rows, rank, 1) + config["x_staged"] * 2 * m * k
        assert config["shared_bytes"] == expected <= 163 * 1024
