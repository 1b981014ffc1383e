"""The launchers' checks, the configuration, what is said where the extension is missing; no launch."""

from __future__ import annotations

from dataclasses import replace

import csrc_cases as cases
import pytest
import torch

from glora_kernels.four_bit import cuda
from glora_kernels.four_bit.served import why_not
from glora_kernels.quant import QuantizedWeight, quantize_weight
from glora_kernels.runtime import extension as built_extension
from glora_kernels.runtime.planning import planning


def weight_of(n=8, k=64, blocksize=32, double_quant=False):
    return quantize_weight(
        torch.randn(n, k, generator=torch.Generator().manual_seed(0)), "nf4", blocksize, double_quant
    )


def x_of(m=2, k=64, dtype=torch.bfloat16):
    return torch.zeros(m, k, dtype=dtype)


def small(x=None, weight=None, y=None, **given):
    x, weight = x_of() if x is None else x, weight or weight_of()
    y = torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype) if y is None else y
    return cases.small_m_launch(x, weight, y, **given, arch="sm_90")


def test_serves_small_m_says_why_not():
    weight = weight_of()
    assert why_not("cuda", x_of(), weight, 64) is None
    assert why_not("cuda", x_of(64), weight) is None
    nested = weight_of(double_quant=True)
    odd = replace(nested.state, nested=replace(nested.state.nested, blocksize=300))
    off = torch.empty(257, dtype=torch.uint8)[1:]
    refused = {
        r"\(M, 64\)": (x_of(k=32), weight, 0),
        "1 to 64 tokens": (x_of(65), weight, 0),
        "got 0": (x_of(0), weight, 0),
        "float16 or bfloat16": (x_of(dtype=torch.float32), weight, 0),
        "ranks up to 64": (x_of(), weight, 65),
        "multiple of the block size": (x_of(k=96), weight_of(k=96, blocksize=64), 0),
        "power of two": (x_of(), QuantizedWeight(nested.packed, odd), 0),
        "packed weight": (x_of(), QuantizedWeight(off, weight.state), 0),
        "neighbours": (x_of(64, 2).T, weight_of(k=64), 0),
        "rows of x": (torch.zeros(2, 66, dtype=torch.float16)[:, :64], weight, 0),
    }
    for why, (x, w, rank) in refused.items():
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(why_not("cuda", x, w, rank))


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (ValueError, "does not serve", {"x": x_of(65)}),
        (TypeError, "y must be torch.bfloat16", {"y": torch.zeros(2, 8)}),
        (ValueError, "y must be 2x8", {"y": torch.zeros(2, 9, dtype=torch.bfloat16)}),
        (ValueError, r"a must be \(8,\) or \(1,\)", {"a": torch.zeros(7)}),
        (ValueError, r"bias must be \(8,\)", {"bias": torch.zeros(1)}),
        (TypeError, "wc must be float32", {"wc": torch.zeros(8, dtype=torch.float64)}),
        (ValueError, "d multiplies the bias", {"d": torch.zeros(8)}),
        (ValueError, "together", {"b_up": torch.zeros(8, 2)}),
        (ValueError, "b_up must be 8x2", {"b_up": torch.zeros(9, 2), "b_down": torch.zeros(2, 64)}),
        (ValueError, "b_down must be 2x64", {"b_up": torch.zeros(8, 2), "b_down": torch.zeros(3, 64)}),
        (ValueError, "at least 1", {"b_up": torch.zeros(8, 0), "b_down": torch.zeros(0, 64)}),
        (ValueError, "h must be contiguous", {"h": torch.zeros(2, 2)}),
        (TypeError, "sigma must be torch.float32", {"sigma": torch.zeros(2, dtype=torch.bfloat16)}),
        (ValueError, "on meta", {"a": torch.zeros(8, device="meta")}),
    ],
)
def test_small_m_names_the_argument(error, match, given):
    with pytest.raises(error, match=match):
        small(**given)


@pytest.mark.parametrize(
    ("error", "match", "given"),
    [
        (ValueError, "out must be contiguous and 8x64", {"out": torch.zeros(64, 8).T}),
        (TypeError, "out must be float32", {"out": torch.zeros(8, 64, dtype=torch.float64)}),
        (ValueError, "cannot both", {"a": torch.zeros(8), "a_up": torch.zeros(8, 2), "a_down": torch.zeros(2, 64)}),
        (ValueError, "b_down must be 2x64", {"b_up": torch.zeros(8, 2), "b_down": torch.zeros(2, 63)}),
        (ValueError, "from 1 to 256", {"b_up": torch.zeros(8, 257), "b_down": torch.zeros(257, 64)}),
        (ValueError, r"b must be \(8,\) or \(1,\)", {"b": torch.zeros(8, 1)}),
    ],
)
def test_dequantize_names_the_argument(error, match, given):
    out = given.get("out", torch.zeros(8, 64))
    with pytest.raises(error, match=match):
        cuda.dequantize_launch(weight_of(), out, **{k: v for k, v in given.items() if k != "out"}, arch="sm_90")


def test_launches_can_be_planned_and_printed_without_a_gpu():
    """On meta tensors, and without the extension."""
    weight = weight_of(4096, 1024, 64)
    state = weight.state.to("meta")
    meta = QuantizedWeight(weight.packed.to("meta"), state)
    x, y = (torch.empty(1, size, dtype=torch.bfloat16, device="meta") for size in (1024, 4096))
    out = torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta")
    with planning("sm_90") as steps:
        cases.small_m_launch(x, meta, y, arch="sm_90").run()
        cuda.dequantize_launch(meta, out, arch="sm_90").run()
    assert [step.kernel for step in steps] == ["small_m_gemv_kernel", "dequantize_kernel"]
    assert str(steps[0]).startswith("small_m_gemv_kernel[")
    assert "block=256" in str(steps[0])
    assert steps[1].grid == 4096 * 1024 // 8192


def test_tensors_on_no_gpu_are_refused():
    y = torch.full((2, 8), 7.0, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="GPU tensors"):
        small(y=y).run()
    assert bool((y == 7.0).all())


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
def test_the_configuration_fits_the_card_and_fills_it(arch):
    for m in (1, 4, 5, 16, 33, 64):
        for n, k in ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (7, 32)):
            config = cuda.small_m_config(m, n, k, 64, True, arch)
            assert config["warps_k"] in (1, 2, 4, 8)
            limit = 99 if arch in ("sm_86", "sm_120") else 163
            assert config["shared_bytes"] <= (227 if arch in ("sm_90", "sm_100") else limit) * 1024
            assert 1 <= config["slices"] <= 32
            assert config["slices"] <= max(1, k // 16)
            rows = 8 // config["warps_k"] * (4 if m <= 4 else 32)
            assert config["blocks"] <= -(-n // rows)


def test_machine_code_of_a_major_version_and_ptx_of_the_newest():
    built = ("80", "90", "100")
    assert all(
        built_extension.runs_on(arch, built) for arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    )
    assert not built_extension.runs_on("sm_75", built)
    assert not built_extension.runs_on("sm_80", ("90",))
    assert not built_extension.runs_on("sm_80", ("86",))
    assert not built_extension.runs_on("sm_100", ("90a",))
    assert built_extension.runs_on("sm_90", ("90a",))
    assert not built_extension.runs_on("gfx942", built)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    def missing(name, package):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(built_extension.importlib, "import_module", missing)
    monkeypatch.setattr(built_extension, "__file__", str(tmp_path / "launch" / "extension.py"))
    built_extension._load.cache_clear()
    try:
        assert not built_extension.available()
        assert "without building it" in built_extension.why_missing()
        built_extension._load.cache_clear()
        (tmp_path.parent / "setup.py").touch()
        assert f"this is the source tree {tmp_path.parent}" in built_extension.why_missing()
        built_extension._load.cache_clear()
        (tmp_path / built_extension._RECORD).write_text("nvcc was not found\n")
        assert "nvcc was not found" in built_extension.why_missing()
        with pytest.raises(RuntimeError, match="nvcc was not found"):
            built_extension.module()
    finally:
        built_extension._load.cache_clear()


def test_a_built_extension_tells_what_it_is(extension):
    info = built_extension.build_info()
    assert info["archs"]
    assert all(arch.rstrip("af").isdigit() for arch in info["archs"])
    assert info["nvcc"][0].isdigit()
    assert built_extension.available(f"sm_{info['archs'][0]}")
