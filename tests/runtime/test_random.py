"""The two random streams: dropout masks against Philox written out anew, and rounding with a dither."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from glora_kernels import tile
from glora_kernels.reference import dither_bits, keep_mask, round_dithered
from glora_kernels.reference.random import dropout_threshold

SEEDS = [0, 1, 0xFFFFFFFF, 0x1_0000_0000, 0x1234_5678_9ABC_DEF0, 2**63 - 1, -1]


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox-4x32 as published (Salmon et al. 2011): multiply, split into high and low, bump the key."""
    for i in range(rounds):
        if i:
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
    return counter


def number(seed: int, row: int, col: int) -> int:
    """The 16 bits of one position."""
    words = philox([col // 8, row, 0, 0], [seed % 2**32, (seed >> 32) % 2**32], 7)
    return (words[(col % 8) // 2] >> (16 * (col % 2))) & 0xFFFF


def test_philox_here_gives_the_published_numbers():
    """Known answers of Random123 (kat_vectors, philox4x32, 10 and 7 rounds)."""
    assert philox([0] * 4, [0] * 2, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**32 - 1
    assert philox([ones] * 4, [ones] * 2, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox([0] * 4, [0] * 2, 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_is_philox(seed, p):
    mask = keep_mask(torch.tensor([seed]), 131, 77, p)
    assert mask.shape == (131, 77)
    for row in (0, 1, 7, 64, 130):
        for col in (0, 1, 2, 3, 4, 5, 6, 7, 8, 31, 76):
            assert bool(mask[row, col]) == (number(seed, row, col) >= round(p * 65536)), (row, col)


@pytest.mark.parametrize(
    ("p", "threshold"), [(0.0, 0), (0.5, 32768), (0.25, 16384), (1 / 65536, 1), (1 - 2**-16, 65535)]
)
def test_threshold(p, threshold):
    assert dropout_threshold(p) == threshold


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_mask_is_fair_and_uncorrelated(p):
    """Mean, neighbours in both directions, and other seeds: within five standard deviations of independent bits."""
    rows, cols = 512, 1024
    mask = keep_mask(torch.tensor([42]), rows, cols, p).double() - (1 - p)
    variance, five = p * (1 - p), 5 / (rows * cols) ** 0.5
    assert abs(mask.mean()) < five * variance**0.5
    other = keep_mask(torch.tensor([43]), rows, cols, p).double() - (1 - p)
    high = keep_mask(torch.tensor([42 + 2**32]), rows, cols, p).double() - (1 - p)
    pairs = [(mask[:, lag:], mask[:, :-lag]) for lag in (1, 2, 4, 7, 8, 16)]
    pairs += [(mask[lag:], mask[:-lag]) for lag in (1, 2, 8, 64)]
    pairs += [(mask, other), (mask, high), (mask[:, :512], mask.t()[:, :512][:512])]
    for i, (left, right) in enumerate(pairs):
        correlation = (left * right).mean() / variance
        assert abs(correlation) < 5 / left.numel() ** 0.5, i
    for dim, size in ((0, rows), (1, cols)):
        assert mask.mean(dim).abs().max() < 6 * (variance / size) ** 0.5


def test_a_mask_does_not_depend_on_the_size():
    big = keep_mask(torch.tensor([9]), 50, 99, 0.3)
    assert torch.equal(keep_mask(torch.tensor([9]), 20, 33, 0.3), big[:20, :33])


@pytest.mark.parametrize("before", [8, 40, 3, 29])
def test_a_mask_of_some_columns_is_that_part_of_the_whole(before):
    big = keep_mask(torch.tensor([9]), 50, 99, 0.3)
    assert torch.equal(keep_mask(torch.tensor([9]), 50, 41, 0.3, columns_before=before), big[:, before : before + 41])


@triton.jit
def _drop_kernel(x, out, seed, threshold, inv_keep, row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = row0 + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = tl.arange(0, ROWS)[:, None] * COLS + cols[None, :]
    value = tile.dropped(tl.load(x + at), tl.load(seed), rows, col0, threshold, inv_keep, ROWS, COLS)
    tl.store(out + at, value)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("row0", "col0"), [(0, 0), (37, 64), (100000, 8)])
def test_kernel_draws_the_same_mask(seed, row0, col0, device):
    rows, cols, p = 16, 32, 0.25
    x, out = torch.ones(rows, cols, device=device), torch.empty(rows, cols, device=device)
    key = torch.tensor([seed], device=device)
    _drop_kernel[(1,)](x, out, key, dropout_threshold(p), 1 / (1 - p), row0, col0, rows, cols)
    expected = [[number(seed, row0 + i, col0 + j) >= dropout_threshold(p) for j in range(cols)] for i in range(rows)]
    assert torch.equal(out.cpu(), torch.tensor(expected).float() / (1 - p))


@triton.jit
def _round_kernel(x, out, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    at = rows[:, None] * COLS + cols[None, :]
    tl.store(out + at, tile.rounded(tl.load(x + at), rows, cols, out.dtype.element_ty))


DTYPES = [torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def hostile(rows=64, cols=64):
    """Random bits: every exponent, subnormals, infinities, NaN payloads; and the corners by hand."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (rows, cols), generator=generator, dtype=torch.int64).to(torch.int32)
    corners = [0, -(2**31), 0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F7FFFFF, 1, 0x007FFFFF, 0x00800000,
               0x477FE000, 0x477FEFFF, 0x477FF000, 0x33800000, 0x38800000, 0x387FFFFF]  # fmt: skip
    corners = torch.tensor(corners, dtype=torch.int32)
    bits[0, : len(corners)] = corners
    bits[1, : len(corners)] = corners ^ -(2**31)
    bits[2:20] = torch.randn(18, cols, generator=generator).view(torch.int32)
    return bits.view(torch.float32)


@dtypes
def test_kernel_rounds_bit_for_bit(dtype, device):
    value = hostile().to(device)
    out = torch.empty_like(value, dtype=dtype)
    _round_kernel[(1,)](value, out, 64, 64)
    expected = round_dithered(value, dtype)
    same = (out == expected) | (out.isnan() & expected.isnan())
    if dtype == torch.bfloat16 and device == "cpu":
        same |= value.isnan() | (value.abs() < 2.0**-126)  # the interpreter's own cast is wrong for those
    assert same.all(), list(zip(value[~same].tolist(), out[~same].tolist(), expected[~same].tolist(), strict=True))[:5]


@dtypes
def test_rounding_gives_one_of_the_two_neighbours(dtype):
    value = hostile()
    got = round_dithered(value, dtype)
    special = value.isnan() | value.isinf()
    assert torch.equal(got.isnan(), value.isnan())
    assert torch.equal(got[value.isinf()].float(), value[value.isinf()])
    exact = value.double()[~special]
    nearest = value.to(dtype)
    steps = [torch.nextafter(nearest, torch.full_like(nearest, s * math.inf)) for s in (1, -1)]
    candidates = torch.stack([nearest, *steps]).double()[:, ~special]
    below = torch.where(candidates <= exact, candidates, -math.inf).amax(0)
    above = torch.where(candidates >= exact, candidates, math.inf).amin(0)
    rounded = got.double()[~special]
    assert ((rounded == below) | (rounded == above)).all()
    assert torch.equal(torch.signbit(got[~special]), torch.signbit(value[~special]))


@dtypes
def test_what_is_exact_stays(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    value = bits.view(dtype)
    got = round_dithered(value.float(), dtype)
    assert torch.equal(got[~value.isnan()], value[~value.isnan()])
    assert got[value.isnan()].isnan().all()


@dtypes
@pytest.mark.parametrize("fraction", [0.02, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_kept(dtype, fraction, sign):
    """A value a fraction of the way between two neighbours goes to the upper one that often, in every block too."""
    step = torch.finfo(dtype).eps
    value = torch.full((512, 512), sign * (1 + fraction * step))
    up = (round_dithered(value, dtype).double().abs() - 1) / step
    assert set(up.unique().tolist()) == {0.0, 1.0}
    assert abs(up.mean() - fraction) < 1e-3
    blocks = up.view(16, 32, 16, 32).mean((1, 3))
    assert (blocks - fraction).abs().max() < 0.02  # independent bits would be off by up to 0.06
    assert (up.mean(0) - fraction).abs().max() < 0.02
    assert (up.mean(1) - fraction).abs().max() < 0.02


def test_rounding_by_parts_is_rounding_the_whole():
    value = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    whole = round_dithered(value, torch.bfloat16)
    assert torch.equal(torch.cat([round_dithered(value[:17], torch.bfloat16),
                                  round_dithered(value[17:], torch.bfloat16, first_row=17)]), whole)  # fmt: skip
    assert not torch.equal(round_dithered(value[17:], torch.bfloat16), whole[17:])


@pytest.mark.parametrize("first_row", [0, 1, 10**6, 2**31 - 40])
def test_dither_bits_are_the_lattice(first_row):
    bits = dither_bits(4, 70000, "cpu", first_row)
    assert bits.dtype == torch.int32
    for i, j in ((0, 0), (1, 0), (0, 1), (3, 69999), (2, 12345)):
        lattice = ((first_row + i) * 0xC13FA9A9 + j * 0x91E10DA5) % 2**32
        assert bits[i, j] == lattice >> 16


def test_fp32_is_left_alone():
    value = torch.randn(4, 4)
    assert torch.equal(round_dithered(value, torch.float32), value)
