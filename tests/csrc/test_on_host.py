"""The kernels and the bindings themselves, run on the host: barriers, shuffles and the matrix instruction included.

No card is needed: tests/csrc/host/cuda_runtime_api.h gives CUDA's names to a C++ compiler. What it cannot show is the
memory model and the speed of a card, which test_gpu_csrc.py is for.
"""

from __future__ import annotations

import ctypes

import csrc_cases as cases
import pytest
import torch

from glora_kernels.four_bit import cuda


class Host:
    """Runs launches; the counters must be zero after each, and the partial sums are never read unwritten."""

    def __init__(self, module) -> None:
        self.module = module
        self.buffer = torch.zeros(cuda._BARRIER_FLOATS + cuda.SCRATCH_FLOATS)

    def run(self, launch):
        args = cuda.addresses(launch.args)
        self.buffer[cuda._BARRIER_FLOATS :] = float("nan")
        if args.get("scratch"):
            start = self.buffer.data_ptr()
            args = args | {"barrier": start, "scratch": start + 4 * cuda._BARRIER_FLOATS}
        getattr(self.module, launch.entry)(device=0, stream=0, **args)
        assert bool((self.buffer[: cuda._BARRIER_FLOATS] == 0).all())
        overrun = ctypes.c_int.in_dll(ctypes.CDLL(self.module.__file__), "host_overrun")
        assert overrun.value == 0, "a block wrote past its shared memory"


@pytest.fixture
def host(host_module):
    return Host(host_module)


@pytest.mark.parametrize("case", cases.SMALL_M, ids=str)
def test_small_m(host, case):
    x, weight, y, given, truth = cases.small_m_call(*case, "cpu")
    host.run(cases.small_m_launch(x, weight, y, **given, arch="sm_90"))
    cases.check_small_m(y, given, truth, case[2])


def test_small_m_is_the_same_at_every_run_and_with_strided_rows(host):
    x, weight, y, given, _ = cases.small_m_call(*cases.SMALL_M[1], "cpu")
    wide = torch.zeros(3, 1, 2 * x.shape[1], dtype=x.dtype)[1, :, : x.shape[1]]
    wide.copy_(x)
    transposed = torch.empty(y.shape[1], y.shape[0], dtype=y.dtype).T
    host.run(cases.small_m_launch(x, weight, y, **given, arch="sm_90"))
    host.run(cases.small_m_launch(wide, weight, transposed, **given, arch="sm_80"))
    assert torch.equal(y, transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", cases.DEQUANTIZE, ids=str)
def test_dequantize(host, case, dtype):
    weight, out, given, truth = cases.dequantize_call(*case, dtype, "cpu")
    host.run(cuda.dequantize_launch(weight, out, **given, arch="sm_90"))
    cases.check_dequantize(weight, out, given, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [cases.DEQUANTIZE[1], cases.DEQUANTIZE[3]], ids=str)
def test_dequantize_of_a_bf16_weight(host, case, dtype):
    """W is the bf16 matrix that was quantized, whatever dtype it is wanted in."""
    weight, out, given, truth = cases.dequantize_call(*case, dtype, "cpu", torch.bfloat16)
    host.run(cuda.dequantize_launch(weight, out, **given, arch="sm_90"))
    cases.check_dequantize(weight, out, given, truth)
    if not given:
        assert torch.equal(out, out.bfloat16().to(dtype))


def test_dequantize_of_what_begins_anywhere(host):
    """Codes off a multiple of four bytes, results off one of sixteen."""
    weight, _, _, _ = cases.dequantize_call(*cases.DEQUANTIZE[2], torch.bfloat16, "cpu")
    shifted = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8)[1:]
    shifted.copy_(weight.packed.view(-1))
    moved = type(weight)(shifted, weight.state)
    out = torch.empty(weight.numel() + 1, dtype=torch.bfloat16)[1:].view(weight.shape)
    launch = cuda.dequantize_launch(moved, out, arch="sm_90")
    assert not launch.args["vectorized"]
    host.run(launch)
    cases.check_dequantize(weight, out, {}, None)


def test_a_failing_launch_is_an_error(host):
    x, weight, y, given, _ = cases.small_m_call(*cases.SMALL_M[0], "cpu")
    launch = cases.small_m_launch(x, weight, y, **given, arch="sm_90")
    with pytest.raises(RuntimeError, match="small_m: "):
        host.module.small_m(device=0, stream=0, **cuda.addresses(launch.args) | {"x_dtype": 7})
    assert bool(y.isnan().all())
