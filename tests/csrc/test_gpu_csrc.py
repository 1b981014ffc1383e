"""The extension on a card: against the decode and float64, the same at every run, under graphs and on streams."""

from __future__ import annotations

import csrc_cases as cases
import pytest
import torch

from glora_kernels.four_bit import cuda
from glora_kernels.quant import dequantize, quantize_weight
from glora_kernels.runtime import environment

pytestmark = pytest.mark.gpu
BIG = [
    (1, 14336, 4096, 16, True, torch.bfloat16, "nf4", 64, True),
    (4, 4096, 14336, 16, True, torch.bfloat16, "nf4", 64, False),
    (8, 1024, 4096, 64, True, torch.float16, "fp4", 128, True),
    (32, 4096, 4096, 16, True, torch.bfloat16, "nf4", 4096, False),
    (64, 14336, 4096, 64, True, torch.bfloat16, "nf4", 64, True),
]


@pytest.fixture(autouse=True)
def arch(extension):
    arch = environment.arch(torch.cuda.current_device())
    if reason := extension.why_missing(arch):
        pytest.skip(reason)
    return arch


@pytest.mark.parametrize("case", cases.SMALL_M + BIG, ids=str)
def test_small_m(case, arch):
    """Twenty runs with the same bits, the counters of one serving the next."""
    x, weight, y, given, truth = cases.small_m_call(*case, "cuda")
    launch = cases.small_m_launch(x, weight, y, **given, arch=arch)
    launch.run()
    cases.check_small_m(y, given, truth, case[2])
    outputs = [y, *(given[name] for name in ("h", "sigma") if name in given)]
    first = [output.clone() for output in outputs]
    for _ in range(20):
        for output in outputs:
            output.fill_(float("nan"))
        launch.run()
        assert all(torch.equal(output, expected) for output, expected in zip(outputs, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*cases.DEQUANTIZE, (4096, 4096, 0, False, "nf4", 64, True)], ids=str)
def test_dequantize(case, dtype, arch):
    weight, out, given, truth = cases.dequantize_call(*case, dtype, "cuda")
    launch = cuda.dequantize_launch(weight, out, **given, arch=arch)
    launch.run()
    cases.check_dequantize(weight, out, given, truth)
    first = out.clone()
    for _ in range(20):
        out.fill_(float("nan"))
        launch.run()
        assert torch.equal(out, first)


def test_a_weight_of_more_than_2_31_elements(arch):
    """64-bit offsets: the last rows decode as they do alone."""
    n, k = (1 << 31) // 4096 + 8, 4096
    if torch.cuda.mem_get_info()[0] < 8 * n * k // 2:
        pytest.skip("needs 9 GiB of free memory")
    small = quantize_weight(torch.randn(8, k, device="cuda"), "nf4", 64)
    packed = small.packed.view(-1).repeat(n // 8)
    state = type(small.state)(small.state.absmax.repeat(n // 8), "nf4", 64, (n, k), torch.float32)
    out = torch.empty(n, k, dtype=torch.float16, device="cuda")
    cuda.dequantize_launch(type(small)(packed, state), out, arch=arch).run()
    assert torch.equal(out[-8:], dequantize(small, torch.float16))


@pytest.mark.parametrize("case", [cases.SMALL_M[1], cases.SMALL_M[5]], ids=str)
def test_a_graph_replays_beside_eager_launches(case, arch):
    x, weight, y, given, truth = cases.small_m_call(*case, "cuda")
    launch = cases.small_m_launch(x, weight, y, **given, arch=arch)
    launch.run()
    expected = y.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.run()
        launch.run()
    eager = torch.empty_like(y)
    other = cases.small_m_launch(
        x, weight, eager, **{k: v for k, v in given.items() if k not in ("h", "sigma")}, arch=arch
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        with torch.cuda.stream(stream):
            other.run()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
        assert torch.equal(eager, expected)
    cases.check_small_m(y, given, truth, case[2])


def test_streams_do_not_share_their_counters(arch):
    x, weight, y, given, _ = cases.small_m_call(*BIG[0], "cuda")
    given = {name: value for name, value in given.items() if name not in ("h", "sigma")}
    streams = [torch.cuda.Stream() for _ in range(4)]
    outputs = [torch.empty_like(y) for _ in streams]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, out in zip(streams, outputs, strict=True):
            with torch.cuda.stream(stream):
                cases.small_m_launch(x, weight, out, **given, arch=arch).run()
    torch.cuda.synchronize()
    assert all(torch.equal(out, outputs[0]) for out in outputs)
