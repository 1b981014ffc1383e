"""Whose kernels serve a 4-bit weight: forced, measured, or by the count of bytes and operations."""

from __future__ import annotations

import pytest
import torch

from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.four_bit.kinds import kind, small_m, usable
from glora_kernels.four_bit.served import why_not
from glora_kernels.quant import QuantizedWeight, QuantState
from glora_kernels.runtime import tables
from glora_kernels.runtime.configs import Shape
from glora_kernels.runtime.cost import FEW_TOKENS
from glora_kernels.runtime.planning import planning
from glora_kernels.runtime.tables import DEQUANTIZE, SMALL_M, Row, Table

BF16, ARCH, N, K, RANK = torch.bfloat16, "sm_90", 4096, 1024, 16


@pytest.fixture(params=[True, False], ids=["built", "missing"])
def built(request, monkeypatch):
    """Whether the extension is there for sm_90; for other cards it never is. No table but what a test gives."""
    monkeypatch.setattr(four_bit, "_available", lambda arch: request.param and arch == ARCH)
    with tables.using(None):
        yield request.param


def codes(blocksize=64, n=N, k=K, dtype=BF16):
    packed = torch.empty(-(-n * k // 2), dtype=torch.uint8, device="meta")
    absmax = torch.empty(-(-n * k // blocksize), device="meta")
    return QuantizedWeight(packed, QuantState(absmax, "nf4", blocksize, (n, k), dtype))


def few(m, route="auto", weight=None, rank=RANK, dtype=BF16, arch=ARCH):
    weight = weight or codes(dtype=dtype)
    return small_m(
        torch.empty(m, weight.shape[1], dtype=dtype, device="meta"), weight, rank, route=route, arch=arch
    )  # fmt: skip


def measured(*rows):
    return tables.using(Table("Card", ARCH, "2", "3", "today", rows))


def row(m, choice, cuda_ms, triton_ms, workspace_ms):
    times = {"cuda": cuda_ms, "triton": triton_ms, "workspace": workspace_ms}
    ms = {name: time for name, time in times.items() if time is not None}
    return Row(SMALL_M, "bf16", Shape(m, N, K, RANK), choice, ms)


def test_who_is_asked(built):
    assert usable("auto", ARCH) == (("cuda", "triton") if built else ("triton",))
    assert usable("auto", "sm_80") == usable("auto", "cpu") == ("triton",), "not what it was built for"
    assert usable("triton", ARCH) == ("triton",)
    assert usable("cuda", "cpu") == ("cuda",), "forced: the launch says what is missing"


def test_unmeasured(built):
    first = "cuda" if built else "triton"
    assert kind(DEQUANTIZE, "auto", ARCH, BF16, Shape(0, N, K, 0)) == first
    assert few(1) == few(FEW_TOKENS) == first
    assert few(FEW_TOKENS + 1) is None
    assert few(0) is None
    assert few(1, "triton") == few(FEW_TOKENS, "triton") == "triton"
    assert few(FEW_TOKENS + 1, "triton") is None
    assert kind(DEQUANTIZE, "triton", ARCH, BF16, Shape(10**6, N, K, 0)) == "triton", "there is no other"


def test_a_call_that_is_not_served_takes_the_workspace(built):
    assert few(1, weight=codes(blocksize=4096)) is None
    assert few(1, rank=300) is None
    assert few(1, "triton", dtype=torch.float32) == "triton"
    assert few(1, "cuda", dtype=torch.float32) is None


def test_measured(built):
    rows = (
        row(1, "cuda", 0.1, 0.2, 0.3), row(8, "triton", 0.2, 0.1, 0.3), row(128, "workspace", 0.3, 0.2, 0.1),
        Row(DEQUANTIZE, "bf16", Shape(0, N, K, 0), "triton", {"cuda": 0.2, "triton": 0.1}),
    )  # fmt: skip
    with measured(*rows):
        assert few(1) == ("cuda" if built else "triton")
        assert few(8) == few(5) == "triton"
        assert few(48) is few(40) is few(64) is None
        assert few(20) == ("cuda" if built else "triton"), "no entry is near its class, 32: as unmeasured"
        assert few(8, dtype=torch.float16) == ("cuda" if built else "triton"), "another dtype"
        assert kind(DEQUANTIZE, "auto", ARCH, BF16, Shape(0, N, K, 0)) == "triton"
        assert few(8, "cuda") == few(1, "cuda") == kind(DEQUANTIZE, "cuda", ARCH, BF16, Shape(0, N, K, 0)) == "cuda"
        assert few(48, "cuda") is None, "a workspace is of every kind"


def test_what_is_measured_without_the_fastest_of_the_table(monkeypatch):
    """The table was made where the extension was, or by more kinds than are allowed now."""
    monkeypatch.setattr(four_bit, "_available", lambda arch: False)
    with measured(row(8, "cuda", 0.1, 0.3, 0.2), row(1, "cuda", 0.1, 0.2, 0.3), row(64, "cuda", 0.1, None, 0.3)):
        assert few(8) is None, "the workspace is the fastest of the rest"
        assert few(1) == "triton"
        assert few(64) is None
    only_cuda = Row(DEQUANTIZE, "bf16", Shape(0, N, K, 0), "cuda", {"cuda": 0.1})
    with measured(only_cuda):
        assert tables.choose(DEQUANTIZE, ARCH, BF16, Shape(0, N, K, 0), among=("cuda", "triton")) == "cuda"
        assert kind(DEQUANTIZE, "auto", ARCH, BF16, Shape(0, N, K, 0)) == "triton"


def test_launches_are_of_the_kind_that_is_named():
    weight, x = codes(), torch.empty(8, K, dtype=BF16, device="meta")
    out, y = torch.empty(N, K, dtype=BF16, device="meta"), torch.empty(8, N, dtype=BF16, device="meta")
    with planning(ARCH) as steps:
        for name in ("cuda", "triton"):
            four_bit.dequantize_launch(weight, out, route=name, arch=ARCH).run()
            four_bit.small_m_launch(name, x, weight, y, arch=ARCH).run()
    assert [str(step).split("[")[0] for step in steps] == [
        "dequantize_kernel", "small_m_mma_kernel", "_dequantize_kernel", "_small_m_kernel"
    ]  # fmt: skip


def test_no_kind_takes_more_tokens_than_it_serves():
    weight = codes()
    for name in ("cuda", "triton"):
        assert why_not(name, torch.empty(FEW_TOKENS, K, dtype=BF16, device="meta"), weight, RANK) is None
