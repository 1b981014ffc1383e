"""The launch configurations are pure functions, and what they return can be launched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton

from glora_kernels.operands import Constant
from glora_kernels.runtime import configs, environment
from glora_kernels.runtime.configs import SHARED_LIMIT
from glora_kernels.runtime.launch import (
    Launch,
    can_describe,
    descriptor,
    matrix,
    precision,
    sums_of,
    vector,
    vector_stride,
)
from glora_kernels.runtime.spills import RULES, Beside, fitted
from glora_kernels.tools.aot import ARCHS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY = [*ARCHS, "sm_86", "sm_120", "gfx90a", "cpu"]


SHAPES = [configs.Shape(m, n, k, r) for m in (1, 16, 64, 65, 2048, 8192)
          for n, k, r in ((4096, 4096, 16), (1024, 4096, 64), (4096, 14336, 256), (768, 3072, 8))]  # fmt: skip
FLAGS = ("tma", "persistent")


def every_config(arch, dtype):
    for kernel in configs.KERNELS:
        for shape in SHAPES:
            yield configs.default(kernel, arch, dtype, shape)
            if kernel in ("fwd", "dx"):
                yield configs.default(kernel, arch, dtype, shape, torch.float32)
    for rows, cols in ((1, 1), (8192, 4096)):
        yield configs.large_product(arch, dtype, rows, cols, tma=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", EVERY)
def test_blocks_can_be_launched(arch, dtype):
    for config in every_config(arch, dtype):
        for name, value in config.items():
            if name in FLAGS:
                assert value in (False, True)
                continue
            assert isinstance(value, int)
            assert value >= 1
            if name != "num_stages":
                assert value & (value - 1) == 0, (name, value)
        for name in ("rows", "cols", "depth"):
            assert config.get(name, 16) >= 16, "the smallest side a matrix product takes"
        assert config["cols"] // config.get("parts", 1) % 8 == 0, "a random counter serves eight columns"
        assert config["num_warps"] in (1, 2, 4, 8)
    assert list(every_config(arch, dtype)) == list(every_config(arch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_operand_tiles_fit_shared_memory(arch, dtype):
    for shape in SHAPES:
        for kernel in ("fwd", "dx"):
            c = configs.default(kernel, arch, dtype, shape)
            tiles = (c["rows"] + c["cols"]) * c["depth"] * dtype.itemsize
            assert tiles * max(1, c["num_stages"] - 1) <= SHARED_LIMIT[arch]


def test_descriptors_only_where_the_card_has_them():
    for arch in EVERY:
        for config in every_config(arch, torch.bfloat16):
            assert not config.get("tma") or arch in ("sm_90", "sm_100", "cpu")
    assert configs.default("fwd", "sm_90", torch.bfloat16, SHAPES[-1])["tma"]
    assert not configs.default("fwd", "sm_90", torch.bfloat16, SHAPES[-1], torch.float32)["tma"], "W wider than x"


@pytest.mark.parametrize("rows", [1, 48, 512, 2048, 8192, 100_000])
@pytest.mark.parametrize("depth", [1, 70, 768, 4096, 14336])
@pytest.mark.parametrize("step", [32, 128])
def test_bands_cover_the_reduction_once(rows, depth, step):
    number, width = configs.bands("sm_90", rows, 32, depth, step)
    assert 1 <= number <= configs.MAX_BANDS
    assert width % step == 0
    assert (number - 1) * width < depth <= number * width, "every band has something in it"
    assert number == 1 or number * -(-rows // 32) <= configs.programs("sm_90")


def test_a_few_rows_are_cut_into_bands_and_many_are_not():
    assert configs.bands("sm_90", 512, 32, 4096, 128)[0] > 1
    assert configs.bands("sm_90", 8192, 32, 4096, 128)[0] == 1


@pytest.mark.parametrize("rank", [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 100, 256, 1000])
def test_block_r(rank):
    block = configs.block_r(rank)
    assert block & (block - 1) == 0
    assert 16 <= block <= 256
    assert block >= min(rank, 256)
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
    assert matrix(None) is vector(None) is sums_of(None) is None
    assert matrix(torch.zeros(6, 4).t())[1:] == (1, 4)
    assert matrix(torch.zeros(2, 6, 4))[1:] == (4, 1)
    assert isinstance(vector(torch.zeros(1)), Constant)
    assert vector(torch.zeros(8)[::2]).step == 2
    assert vector_stride(None) == vector_stride(torch.zeros(1)) == 0
    assert vector_stride(torch.zeros(8)[::2]) == 2


def test_rules_are_of_kernels_that_there_are():
    source = "".join(path.read_text() for path in Path(configs.__file__).parents[1].rglob("*.py"))
    for kernel in RULES:
        assert f"def _{kernel}_kernel(" in source or f"def _glora_{kernel}_kernel(" in source, kernel
        assert f'fitted("{kernel}", ' in source or f'.config("{kernel}", ' in source, kernel


def test_what_a_rule_changes():
    config = {"rows": 128, "cols": 256, "depth": 64, "num_warps": 8, "num_stages": 4, "parts": 4, "tma": True}
    half, brain = torch.float16, torch.bfloat16
    assert fitted("fwd", config, Beside("sm_90", brain)) is config
    assert fitted("fwd", config, Beside("sm_90", brain, added=True)) == config | {"parts": 8}
    assert fitted("fwd", config, Beside("sm_100", brain)) == config | {"maxnreg": 255}
    pairs = Beside("sm_90", brain, pairs=True, banded=True)
    assert fitted("fwd", config, pairs) == config | {"rows": 64, "cols": 128, "parts": 4}
    assert fitted("fwd", config, pairs._replace(pointers=True)) is config
    small = {"rows": 32, "cols": 64, "num_warps": 4, "num_stages": 4}
    assert fitted("dy", small, Beside("sm_90", half, halves=True))["rows"] == 32
    assert fitted("dy", small | {"rows": 128}, Beside("sm_90", half, halves=True)) == small | {"rows": 64, "cols": 32}
    assert fitted("x", small, Beside("gfx942", torch.float32)) == small, "a cap of registers is NVIDIA's"


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
    assert precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert precision(torch.float32) == "tf32"
    assert precision(torch.bfloat16) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(("value", "expected"), [("tf32", True), ("ieee", False)])
def test_the_newer_switch_for_tf32(value, expected, tf32):
    """PyTorch ≥ 2.9: after `fp32_precision` was set, reading `allow_tf32` is an error."""
    torch.backends.cuda.matmul.fp32_precision = value
    assert environment.allow_tf32() is expected


def test_descriptors_of_what_tma_can_read():
    """16-byte aligned rows that follow each other; anything else is read by pointers."""
    whole = torch.zeros(6, 64, dtype=torch.float16)
    found = descriptor(whole, 2, 32)
    assert (found.shape, found.strides, found.block_shape) == ([6, 64], [64, 1], [2, 32])
    assert descriptor(whole[:, :40], 2, 32).shape == [6, 40]
    assert can_describe(whole)
    assert can_describe(whole[:, :40])
    for not_for_tma in (whole.t(), whole[:, 1:], whole[:, ::2], torch.zeros(6, 63, dtype=torch.float16),
                        torch.zeros(64, dtype=torch.float16).expand(6, 64), whole[:0]):  # fmt: skip
        assert not can_describe(not_for_tma)
