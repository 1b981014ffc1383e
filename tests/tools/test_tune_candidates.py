"""What the tuner has to choose from, and what of it counts as equal."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreted
from tuning import BF16, LARGE, TINY

from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.runtime import configs, tables
from glora_kernels.runtime.configs import SHARED_LIMIT, Shape
from glora_kernels.runtime.tables import DEQUANTIZE, SMALL_M, Row
from glora_kernels.tools import candidates as trying
from glora_kernels.tools import tune
from glora_kernels.tools.aot import ARCHS
from glora_kernels.tools.candidates import candidates, compilations, options
from glora_kernels.tools.trials import Data, disagreement, forms


@pytest.mark.parametrize("shape", [LARGE, Shape(48, 4096, 4096, 16), Shape(8192, 1024, 4096, 128)])
@pytest.mark.parametrize("dtype", list(tables.DTYPES.values()))
@pytest.mark.parametrize("arch", [*ARCHS, "sm_86"])
def test_candidates(arch, dtype, shape):
    for kernel in configs.TUNED:
        found = candidates(kernel, arch, dtype, shape)
        assert found[0] == configs.default(kernel, arch, dtype, shape)
        assert 1 <= len(found) <= trying.MOST
        assert len({tuple(sorted(config.items())) for config in found}) == len(found)
        for config in found[1:]:
            assert tables.fault(kernel, arch, dtype, shape, config) is None
            limit = SHARED_LIMIT.get(arch, SHARED_LIMIT["sm_89"])
            assert trying.shared_bytes(kernel, config, dtype, shape) <= limit
    assert found == candidates(kernel, arch, dtype, shape)


@pytest.mark.parametrize("kernel", configs.TUNED)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_there_are_some_to_choose_from(kernel, arch):
    assert len(candidates(kernel, arch, BF16, LARGE)) >= 4


def test_the_default_is_tried_even_where_memory_is_short():
    assert len(candidates("fwd", "sm_90", BF16, LARGE)) > len(candidates("fwd", "gfx942", BF16, LARGE)) >= 2
    with pytest.raises(ValueError, match=r"'fwd', 'dx'.*got 'finish'"):
        candidates("finish", "sm_90", BF16, LARGE)


def test_compilations_are_counted_once_for_shapes_of_one_configuration():
    def count(*kernels, shapes=(LARGE,)):
        return compilations([(kernel, shape) for kernel in kernels for shape in shapes], "bf16", "sm_90")

    one = count("dx")
    assert one == len(candidates("dx", "sm_90", BF16, LARGE)) + 2 * (len(forms("dx")) - 1)
    assert count("dx", shapes=[LARGE, LARGE._replace(k=8192)]) == one
    assert count("dx", "x") > one


def test_what_there_is_to_choose_from(monkeypatch):
    """Of a kernel its configurations, the default of a real call first; else the names that can serve here."""
    monkeypatch.setattr(four_bit, "_available", lambda arch: arch == "sm_90")
    assert options("fwd", "sm_90", BF16, LARGE) == candidates("fwd", "sm_90", BF16, LARGE._replace(m=4096))
    assert options("route dx", "sm_90", BF16, LARGE) == ["fused", "library"]
    assert options(DEQUANTIZE, "sm_90", BF16, LARGE) == ["cuda", "triton"]
    assert options(SMALL_M, "sm_90", BF16, LARGE) == ["cuda", "triton", "workspace"]
    assert options(SMALL_M, "sm_80", BF16, LARGE) == ["triton", "workspace"]


@interpreted
@pytest.mark.parametrize("kernel", configs.TUNED)
def test_every_form_of_every_kernel_gives_the_same_with_two_configurations(kernel):
    default, *others = candidates(kernel, "sm_90", torch.float16, TINY)
    for form in forms(kernel):
        data = Data(kernel, form, TINY, torch.float16, "cpu", "sm_90")
        trial = data.trial(default)
        assert trial.timed, "the pass has the kernel"
        expected = trial.results()
        for name, value in expected.items():
            assert value.isfinite().all(), (form, name)
            assert value.abs().max() > 1e-3
        assert data.wrong(data.trial(others[-1]).results(), expected) == "", form


@pytest.mark.parametrize("m", [1, 16, 100, 8192, 12608, 10**6])
def test_a_row_is_near_what_launchers_ask_for(m):
    """By the class of M, however far from it the M that was measured."""
    asked = Shape(configs.m_class(m), 768, 3072, 16)
    for what in ("fwd", "route dx"):
        row = Row(what, "bf16", tune.kept_for(what, asked._replace(m=m)), "fused", {"fused": 1.0})
        assert tables.nearest([row], asked) is row
    assert tune.kept_for(SMALL_M, asked._replace(m=8)).m == 8
    few = Row("small_m", "bf16", tune.kept_for("small_m", asked._replace(m=8)), {}, {"default": 1.0})
    assert tables.nearest([few], asked._replace(m=configs.tokens(5))) is few


def test_what_counts_as_different():
    one = {"y": torch.ones(100), "h": torch.ones(4)}
    assert disagreement(one, one, BF16, 4) == ""
    for wrong in (0.0, 1.1, float("nan"), float("inf")):
        other = {"y": torch.ones(100), "h": torch.ones(4)}
        other["y"][17] = wrong
        assert disagreement(other, one, BF16, 4).startswith("y is off by")
    close = {"y": torch.ones(100) + 0.007, "h": torch.ones(4)}
    assert disagreement(close, one, BF16, 4) == ""
    assert disagreement(close, one, torch.float32, 4) != ""
