"""The launch configurations are pure functions, and what they return can be launched."""

from __future__ import annotations

import pytest
import torch
import triton

from glora_kernels.launch import configs, environment
from glora_kernels.launch.aot import ARCHS, SHARED_LIMIT
from glora_kernels.launch.plan import Launch, precision, strides, vector_stride

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY = [*ARCHS, "sm_86", "sm_120", "gfx90a", "cpu"]


def tables(arch, dtype):
    yield from (configs.large_product(arch, dtype, m) for m in (1, 16, 64, 65, 128, 8192))
    yield configs.project(arch, dtype)
    yield configs.factor_grad(arch, dtype)
    yield configs.hadamard_grad(arch, dtype)
    yield configs.elementwise(arch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", EVERY)
def test_blocks_can_be_launched(arch, dtype):
    for config in tables(arch, dtype):
        for name, value in config.items():
            assert isinstance(value, int)
            assert value >= 1
            if name != "num_stages":
                assert value & (value - 1) == 0, (name, value)
        for name in ("rows", "cols", "depth"):
            assert config.get(name, 16) >= 16, "the smallest side a matrix product takes"
        assert config["cols"] % 8 == 0, "a random counter serves eight columns"
        assert config["num_warps"] in (1, 2, 4, 8)
    assert list(tables(arch, dtype)) == list(tables(arch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_operand_tiles_fit_shared_memory(arch, dtype):
    for m in (1, 64, 8192):
        c = configs.large_product(arch, dtype, m)
        tiles = (c["rows"] + c["cols"]) * c["depth"] * dtype.itemsize
        assert tiles * max(1, c["num_stages"] - 1) <= SHARED_LIMIT[arch]


@pytest.mark.parametrize("rank", [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 100, 256, 1000])
def test_block_r(rank):
    block = configs.block_r(rank)
    assert block & (block - 1) == 0
    assert 16 <= block <= configs.MAX_BLOCK_R
    assert block >= min(rank, configs.MAX_BLOCK_R)
    assert block == 16 or block < 2 * rank


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 128, 129, 1000, 8192, 2**20])
@pytest.mark.parametrize("programs", [0, 1, 3, 64, 255, 256, 10_000])
@pytest.mark.parametrize("block", [32, 64])
def test_row_splits(rows, programs, block):
    splits = configs.row_splits(rows, programs, block)
    assert splits >= 1
    assert splits == 1 or splits * max(1, programs) <= 256
    assert splits == 1 or rows > (splits - 1) * 4 * block, "each with work to do"


def test_every_row_is_in_one_split():
    for rows in (1, 31, 33, 129, 300, 1000, 4096, 5000):
        for block in (32, 64):
            splits = configs.row_splits(rows, 1, block)
            part = triton.cdiv(triton.cdiv(rows, splits), block) * block
            assert sum(max(0, min((s + 1) * part, rows) - s * part) for s in range(splits)) == rows


def test_absent_tensors_and_constants():
    t = torch.zeros(6, 4)
    assert strides(t.t(), "a", "b") == {"a": 1, "b": 4}
    assert strides(None, "a", "b") == {"a": 0, "b": 0}
    assert vector_stride(None) == vector_stride(torch.zeros(1)) == 0
    assert vector_stride(torch.zeros(8)[::2]) == 2


def test_an_empty_grid_launches_nothing():
    class Kernel:
        def __getitem__(self, grid):
            raise AssertionError("launched")

    Launch(Kernel(), (0, 3), {"x": torch.zeros(0)}).run()
    with pytest.raises(AssertionError, match="launched"):
        Launch(Kernel(), (1, 3), {"x": torch.zeros(1)}).run()


@pytest.fixture
def tf32():
    """Both of PyTorch's switches restored."""
    new = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = new


def test_precision(tf32):
    torch.backends.cuda.matmul.allow_tf32 = False
    assert precision(torch.float32)["PRECISION"] == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert precision(torch.float32)["PRECISION"] == "tf32"
    assert precision(torch.bfloat16)["PRECISION"] == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(("value", "expected"), [("tf32", True), ("ieee", False)])
def test_the_newer_switch_for_tf32(value, expected, tf32):
    """PyTorch ≥ 2.9: after `fp32_precision` was set, reading `allow_tf32` is an error."""
    torch.backends.cuda.matmul.fp32_precision = value
    assert environment.allow_tf32() is expected
