"""The fused kernels as a card would be given them: launch counts, the shipped configurations, both routes.

Nothing here needs a card. A plan (`runtime.planning`) holds the steps of a call on meta tensors, and the
configurations of a card run in the interpreter where `arch_of` is told that it is one.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from glora.test_golden import AB, GOLDEN, RANK, golden_gradient, golden_problem
from helpers import check, ours, problem, thinned

import glora_kernels
from glora_kernels.glora import triton as triton_path
from glora_kernels.glora.call import C, Call, Needs, Supports
from glora_kernels.reference.cases import FORMS
from glora_kernels.runtime import routes
from glora_kernels.runtime.launch import LibraryProduct
from glora_kernels.runtime.planning import planning
from glora_kernels.spec import GLoRAConfig, all_configs

ROUTES = ("fused", "library")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the card's own configurations run in tests/gpu")


def choose_route(monkeypatch, name: str) -> None:
    monkeypatch.setattr(routes, "product_route", lambda *args, **kwargs: name)


# Launch counts.


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def supports(config: GLoRAConfig, n: int, k: int, bias: bool, dtype: torch.dtype) -> Supports:
    shapes = config.parameter_shapes(k, n, bias)
    names = {"A": "a", "A_up": "a_up", "A_down": "a_down", "B": "b", "B_up": "b_up", "B_down": "b_down",
             "D": "d", "E": "e"}  # fmt: skip
    tensors = {names[name]: meta(*shape, dtype=dtype) for name, shape in shapes.items() if name in names}
    wc = meta(n, dtype=torch.float32) if config.C != "none" else None
    return Supports(**tensors, bias=meta(n, dtype=dtype) if bias else None, wc=wc)


def plan(
    config: GLoRAConfig, m: int, n: int, k: int, bias: bool, arch: str = "sm_90", dtype: torch.dtype = torch.bfloat16
):
    """The steps of forward and of backward; the bias is frozen, as it is in a layer."""
    s = supports(config, n, k, bias, dtype)
    seed = torch.tensor([2**62 + 1]) if config.dropout else None
    call = Call(config.scale, config.dropout, seed, config.variant == "matmul", "triton")
    needs = Needs(True, *(t is not None and name != "bias" for name, t in zip(Supports._fields, s, strict=True)))
    x, w, dy = meta(m, k, dtype=dtype), meta(n, k, dtype=dtype), meta(m, n, dtype=dtype)
    with planning(arch) as forward:
        results = triton_path.forward(x, w, s, call)
    with planning(arch) as backward:
        grads = triton_path.backward(dy, x, w, s, results, call, needs)
    for grad, tensor, need in zip(grads, (x, *s), needs, strict=True):
        assert (grad is not None) == need
        assert not need or (grad.shape == tensor.shape and grad.dtype == tensor.dtype)
    return forward, backward


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 1024), (512, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096)]
)
def test_every_configuration_takes_two_launches_forward_and_four_backward(m, n, k, bias):
    """On the routes that are chosen, a product of the library counted as one; W·c comes on top (`glora.wc`).

    Not held to: a weight that a vector or constant A scales before dx, where that costs less than scaling dy, is one
    more; and where the library's product takes dx the sum of a constant's gradient, which our own takes on the way.
    """
    for config in all_configs(rank=16):
        forward, backward = plan(config, m, n, k, bias)
        assert len(forward) <= 2, f"{config}: {list(map(str, forward))}"
        library = any(isinstance(step, LibraryProduct) for step in backward)
        scales = config.A in ("vector", "constant") and any("_prepare_kernel" in str(step) for step in backward)
        sums = "constant" in (config.A, config.B, config.E) or (config.D == "constant" and bias)
        assert len(backward) <= 4 + scales + library * sums, f"{config}: {list(map(str, backward))}"


@pytest.mark.parametrize("config", [
    GLoRAConfig.lora(rank=16), GLoRAConfig.lora(rank=16, dropout=0.1), GLoRAConfig("vector", "lora", E="none", rank=16),
    GLoRAConfig("vector", "vector", E="none", rank=16),
])  # fmt: skip
def test_the_library_route_takes_no_more(config, monkeypatch):
    choose_route(monkeypatch, "library")
    forward, backward = plan(config, 8192, 4096, 1024, False)
    assert len(forward) <= 2
    assert len(backward) <= (5 if config.A == "vector" else 4)  # the scaled weight of dx is a launch of its own
    for steps in (forward, backward):
        assert sum(isinstance(step, LibraryProduct) for step in steps) == 1


def test_dropout_adds_no_launch():
    for a in ("none", "vector", "lora"):
        plain = plan(GLoRAConfig(a, "lora", E="none", rank=16), 2048, 4096, 4096, False)
        dropped = plan(GLoRAConfig(a, "lora", E="none", rank=16, dropout=0.1), 2048, 4096, 4096, False)
        assert [len(steps) for steps in plain] == [len(steps) for steps in dropped]


def test_alpha_p_and_the_seed_do_not_change_what_is_compiled():
    """Between two calls only numbers differ that Triton does not specialise: floats, and what is marked so."""

    def arguments(alpha: float, p: float, key: int) -> list[dict[str, object]]:
        torch.manual_seed(key)
        steps = itertools.chain(*plan(GLoRAConfig.lora(rank=16, alpha=alpha, dropout=p), 2048, 4096, 4096, False))
        return [{n: v for n, v in step.args.items() if isinstance(v, (bool, int, float, str))} for step in steps]

    differing = set()
    for one, other in zip(arguments(16.0, 0.1, 1), arguments(3.0, 0.35, 2), strict=True):
        assert one.keys() == other.keys()
        differing |= {name for name in one if one[name] != other[name] and not isinstance(one[name], float)}
    assert differing <= {"seed", "threshold"}
    assert "threshold" in differing
    for path in Path(glora_kernels.__file__).parent.rglob("*.py"):
        for decorator, parameters in re.findall(r"(@triton\.jit.*)\ndef _\w+_kernel\(([^:]*):", path.read_text()):
            if re.search(r"\bseed\b", parameters):
                both = '"seed", "threshold"' if re.search(r"\bthreshold\b", parameters) else '"seed"'
                assert decorator.startswith(f"@triton.jit(do_not_specialize=[{both}"), path


def test_a_rank_over_the_limit_is_refused():
    with pytest.raises(RuntimeError, match=r"up to 256.*got 257"):
        plan(GLoRAConfig.lora(rank=257), 64, 512, 512, False)
    with planning("sm_90"), pytest.raises(RuntimeError, match=r"up to 256.*got 300"):
        triton_path.wc_forward(meta(64, 64), C(None, meta(64, 300), meta(300, 1)))


def test_a_strided_wc_is_read_as_it_is(device):
    """`glora.wc` makes a contiguous one; the public operator takes any."""
    from glora_kernels.ops import glora_linear

    x, w = torch.randn(5, 16, device=device), torch.randn(8, 16, device=device)
    wc = torch.randn(16, device=device)[::2]
    with routes.backend("triton"):
        y = glora_linear(x, w, wc=wc)
    assert torch.allclose(y, x @ w.t() + wc, atol=1e-4)


# The shipped configurations and the two routes, in the interpreter.


@interpreted
@pytest.mark.parametrize(("arch", "form"), thinned(3, itertools.product(["sm_90", "sm_80", "sm_100", "gfx942"], [
    ("lora", "lora", "hadamard"), ("constant", "vector", "hadamard"), ("vector", "lora", "hadamard"),
    ("none", "lora", "hadamard"), ("lora", "lora", "matmul"),
])))  # fmt: skip
def test_the_configurations_of_a_card(arch, form, monkeypatch, poison):
    """Descriptors, several tiles, ragged edges, several bands and splits: what a card runs, number by number."""
    a, b, variant = form
    monkeypatch.setattr(triton_path, "arch_of", lambda tensor: arch)
    config = GLoRAConfig(a, b, "vector", "vector", "vector", rank=20, variant=variant,
                         dropout=0.25 if b == "lora" else 0.0)  # fmt: skip
    p = problem(config, (150,), 200, 264, True, torch.float16, size=0.05)
    check(p, ours(p, "triton"), "triton")


@interpreted
@pytest.mark.parametrize(
    ("rest", "low_rank", "parts"), [("none", "none", 4), ("none", "lora", 8), ("vector", "lora", 8)]
)
def test_the_widest_tile(rest, low_rank, parts, monkeypatch, poison):
    """128x256, which only large outputs take: here by force. Beside what is added its parts are narrower."""
    from glora_kernels.runtime import configs

    monkeypatch.setattr(triton_path, "arch_of", lambda tensor: "sm_90")
    monkeypatch.setitem(configs.PROGRAMS, "sm_90", 1)
    config = GLoRAConfig(rest, low_rank, rest, rest, rest, rank=16, dropout=0.25 if low_rank == "lora" else 0.0)
    forward, _ = plan(config, 130, 264, 272, True)
    assert [step.args["PARTS"] for step in forward if "PARTS" in step.args] == [parts]
    p = problem(config, (130,), 264, 272, True, torch.float16, size=0.05)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("form", "dtype"), thinned(4, itertools.product(
    FORMS, [torch.float32, torch.float16, torch.bfloat16]
)))  # fmt: skip
def test_the_library_route(form, dtype, device, monkeypatch, poison):
    a, b, variant = form
    choose_route(monkeypatch, "library")
    config = GLoRAConfig(a, b, "vector", "vector", "vector", rank=4, variant=variant,
                         dropout=0.25 if b == "lora" else 0.0)  # fmt: skip
    p = problem(config, (37,), 70, 45, True, dtype, device=device, size=0.1)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("rank", "form"), thinned(3, itertools.product([33, 65, 128], [
    ("none", "lora", "hadamard"), ("vector", "lora", "hadamard"), ("lora", "lora", "hadamard"),
    ("lora", "lora", "matmul"),
])))  # fmt: skip
def test_large_ranks(rank, form, device, poison):
    """dyᵀh by a read of its own, dB_down beside dA by another, three sums at the end."""
    a, b, variant = form
    config = GLoRAConfig(a, b, "lora", "constant", "vector", rank=rank, variant=variant, dropout=0.25)
    p = problem(config, (37,), 72, 48, True, torch.float32, device=device, size=0.1)
    check(p, ours(p, "triton"), "triton")


def test_factors_of_two_dtypes(device):
    """A_up and A_down need not share one."""
    p = problem(
        GLoRAConfig("lora", "none", E="none", rank=4), (37,), 72, 48, True, torch.float16, device=device, size=0.1
    )
    p.params["A_up"] = p.params["A_up"].float()
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize("route", ROUTES)
def test_a_plain_layer(route, device, monkeypatch):
    """No support at all, with and without a bias: the frozen layer."""
    choose_route(monkeypatch, route)
    for bias in (True, False):
        p = problem(GLoRAConfig("none", "none", E="none"), (37,), 72, 48, bias, torch.float32, device=device)
        check(p, ours(p, "triton"), "triton")


# The golden file.


@pytest.mark.parametrize(("a", "b"), AB)
def test_golden_cases_through_the_kernels(a, b, device):
    """The original implementation's y and gradients, by the kernels in fp32."""
    of_this_form = [(i, row) for i, row in enumerate(GOLDEN["configs"]) if (row[0], row[1]) == (a, b)]
    assert len(of_this_form) == 27
    for i, row in thinned(10, of_this_form):
        config = GLoRAConfig(*map(str, row), rank=RANK)
        p = golden_problem(config, bias=True)
        p.x, p.weight, p.dy = (t.float().to(device) for t in (p.x, p.weight, p.dy))
        p.bias = p.bias.float().to(device)
        p.params = {name: t.float().to(device) for name, t in p.params.items()}
        got = ours(p, "triton")
        expected = {"y": GOLDEN["y"][0, i], "x": GOLDEN["dx"][0, i]}
        expected |= {name: golden_gradient(name, t.shape, (0, i)) for name, t in p.params.items()}
        for name, value in expected.items():
            value = torch.as_tensor(value)
            error = float((got[name].cpu().double() - value).norm() / value.norm())
            assert error < 2e-5, f"{config} {name}: {error}"
