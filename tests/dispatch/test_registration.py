"""The registered operators: schema, fake results, autograd, autocast, flops, and torch.compile."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import NAMES, close, compiled, interpreted, layer, ours, problem, truth
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from glora_kernels.ops import glora_linear, glora_wc
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig

OPS = torch.ops.glora_kernels
FORMS = [
    ("none", "none", "hadamard", 0.0),
    ("none", "lora", "hadamard", 0.25),
    ("vector", "lora", "hadamard", 0.0),
    ("constant", "vector", "hadamard", 0.0),
    ("lora", "constant", "hadamard", 0.0),
    ("lora", "lora", "matmul", 0.25),
]
forms = pytest.mark.parametrize(("a", "b", "variant", "dropout"), FORMS)
ROUTES = ["eager", "eager invariant", pytest.param("triton", marks=interpreted)]
routes = pytest.mark.parametrize("route", ROUTES)


def build(a, b, variant, dropout, lead=(5,), dtype=torch.float32, **more):
    config = GLoRAConfig(a, b, "lora", "vector", "constant", rank=3, variant=variant, dropout=dropout)
    return problem(config, lead, 20, 11, dtype=dtype, size=0.1, **more)


def forward_args(p, route, grad=True):
    """The arguments of torch.ops.glora_kernels.glora_linear."""
    of = {n: t.detach().requires_grad_(grad) for n, t in p.leaves().items()}
    if "C_up" in of:
        wc = glora_wc(p.weight, c_up=of["C_up"].detach(), c_down=of["C_down"].detach())
        of["wc"] = wc.requires_grad_(grad)
    drop = p.config.dropout if p.seed is not None else 0.0
    supports = (of.get(n) for n in NAMES)
    return (of["x"], p.weight, *supports, p.config.scale, drop, p.seed, p.config.variant == "matmul", route, 0)


def needs_of(args):
    """Every gradient there is, by the arguments of the forward operator."""
    return [True, *(t is not None for t in args[2:12])]


def backward_args(p, route):
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in forward_args(p, route, grad=False)]
    saved = (t if t.numel() else None for t in OPS.glora_linear(*args))  # as autograd hands them on
    return (p.dy, *saved, needs_of(args), *args)


def wc_args(p, route, grad, form="lora"):
    """The arguments of torch.ops.glora_kernels.glora_wc."""
    c = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=p.x.dtype).requires_grad_(grad)
    factors = (p.params[name].detach().requires_grad_(grad) for name in ("C_up", "C_down"))
    return (p.weight, *((None, *factors) if form == "lora" else (c, None, None)), route)


@routes
@forms
def test_opcheck_linear(a, b, variant, dropout, route):
    torch.library.opcheck(OPS.glora_linear.default, forward_args(build(a, b, variant, dropout), route))


@routes
@forms
def test_opcheck_linear_backward(a, b, variant, dropout, route):
    """Nothing aliases: neither an input nor another result."""
    torch.library.opcheck(OPS.glora_linear_backward.default, backward_args(build(a, b, variant, dropout), route))


@routes
@forms
def test_results_share_no_memory(a, b, variant, dropout, route):
    p = build(a, b, variant, dropout)
    args = backward_args(p, route)
    results = [t for t in OPS.glora_linear_backward(*args) if t.numel()]
    inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor) and t.numel()}
    storages = [t.untyped_storage().data_ptr() for t in results]
    assert len(set(storages)) == len(storages)
    assert not inputs & set(storages)


@routes
def test_results_of_rank_one_share_no_memory(route):
    """A transposed (1, N) is contiguous: `.contiguous()` copies nothing there."""
    config = GLoRAConfig("vector", "lora", E="vector", rank=1)
    p = problem(config, (5,), 20, 11, dtype=torch.float32)
    results = [t for t in OPS.glora_linear_backward(*backward_args(p, route)) if t.numel()]
    storages = [t.untyped_storage().data_ptr() for t in results]
    assert len(set(storages)) == len(storages)


@routes
@pytest.mark.parametrize("form", ["lora", "vector"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_wc(form, dtype, route):
    args = wc_args(build("none", "none", "hadamard", 0.0, dtype=dtype), route, True, form)
    torch.library.opcheck(OPS.glora_wc.default, args)
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    everything = [t is not None for t in args[1:4]]
    for needs in (everything, [False, False, everything[2]]):
        torch.library.opcheck(OPS.glora_wc_backward.default, (torch.randn(11), needs, *args))


@routes
@pytest.mark.parametrize(("d", "e"), [("none", "vector"), ("none", "constant"), ("constant", "none")])
def test_opcheck_of_bias_wc_d_and_e(d, e, route):
    """∂bias, ∂wc and ∂e may be one sum: each result has memory of its own."""
    p = problem(GLoRAConfig("none", "none", "lora", d, e, rank=3), (5,), 20, 11, dtype=torch.float32)
    torch.library.opcheck(OPS.glora_linear.default, forward_args(p, route))
    torch.library.opcheck(OPS.glora_linear_backward.default, backward_args(p, route))
    results = [t for t in OPS.glora_linear_backward(*backward_args(p, route)) if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results) == 4


@routes
@forms
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results_equal_real_ones(a, b, variant, dropout, lead, dtype, route):
    p = build(a, b, variant, dropout, lead, dtype)
    mode = FakeTensorMode()

    def fake(args):
        return [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args]

    for op, args in (
        (OPS.glora_linear, forward_args(p, route, False)),
        (OPS.glora_linear_backward, backward_args(p, route)),
    ):
        real = op(*args)
        with mode:
            pretended = op(*fake(args))
        for r, f in zip(real, pretended, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("trained", ["all", "adapters", "x", "none"])
@forms
def test_compiled(a, b, variant, dropout, trained):
    """fullgraph, forward and backward: what eager mode gives, of every set of gradients, dropout included."""
    torch._dynamo.reset()
    p = build(a, b, variant, dropout, dtype=torch.float64)
    chosen = {"all": p.trained, "adapters": frozenset(p.params), "x": frozenset(["x"]), "none": frozenset()}
    p.trained = chosen[trained]
    got = ours(p, "eager", through=compiled("aot_eager"))
    close(got, ours(p, "eager"), 1e-12)
    close(
        {n: v for n, v in got.items() if v is not None},
        {n: truth(p)[0][n] for n, v in got.items() if v is not None},
        1e-11,
    )


@interpreted
def test_compiled_with_the_triton_route():
    """The operator is opaque to the compiler: the kernels run as they do in eager mode."""
    torch._dynamo.reset()
    p = build("vector", "lora", "hadamard", 0.25)
    close(ours(p, "triton", through=compiled("aot_eager")), ours(p, "triton"), 1e-5)


def test_compiled_by_inductor():
    torch._dynamo.reset()
    p = build("vector", "lora", "hadamard", 0.25, dtype=torch.float64)
    try:
        got = ours(p, "eager", through=compiled("inductor"))
    except Exception as error:
        if "compiler" in str(error).lower() and "glora" not in str(error).lower():
            pytest.skip(f"inductor has no C++ compiler here: {type(error).__name__}")
        raise
    close(got, ours(p, "eager"), 1e-12)


def test_compiled_for_any_number_of_rows():
    torch._dynamo.reset()
    frames = []

    def counting(graph, inputs):
        frames.append(graph)
        return graph.forward

    function = None

    def through(call):
        nonlocal function
        function = function or torch.compile(
            lambda x, w, b, params, seed: call(x, w, b, params, seed), backend=counting, fullgraph=True, dynamic=True
        )
        return function

    for m in (5, 6, 9, 17):
        p = build("vector", "lora", "hadamard", 0.0, (m,), torch.float64)
        close(ours(p, "eager", through=through), ours(p, "eager"), 1e-12)
    assert len(frames) == 1


def test_compiled_under_autocast():
    torch._dynamo.reset()
    p = build("vector", "lora", "hadamard", 0.0)
    got = ours(p, "eager", torch.bfloat16, through=compiled("aot_eager"))
    assert got["y"].dtype == torch.bfloat16
    close(got, ours(p, "eager", torch.bfloat16), 1e-2)


def test_a_changed_backend_is_seen_by_compiled_code():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(x, w, up, down):
        return glora_linear(x, w, b_up=up, b_down=down)

    p = build("none", "lora", "hadamard", 0.0)
    args = (p.x, p.weight, p.params["B_up"], p.params["B_down"])
    with backend("eager"):
        function(*args)
    with backend("cuda"), pytest.raises(Exception, match="cuda"):
        function(*args)
    function(*args)


@forms
def test_the_registered_operator_has_the_autocast_rule_of_linear(a, b, variant, dropout):
    p = build(a, b, variant, dropout)
    with torch.autocast("cpu", torch.bfloat16):
        y = OPS.glora_linear(*forward_args(p, "eager"))[0]
        assert y.dtype == torch.nn.functional.linear(p.x, p.weight).dtype == torch.bfloat16
    y.float().sum().backward()
    p64 = build(a, b, variant, dropout, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y64 = OPS.glora_linear(*forward_args(p64, "eager", False))[0]
        assert y64.dtype == torch.nn.functional.linear(p64.x, p64.weight).dtype == torch.float64


M, K, N, R = 5, 20, 11, 3
BIG = 2 * M * K * N


@pytest.mark.parametrize(("a", "b", "variant", "forward", "backward"), [
    ("none", "none", "hadamard", BIG, BIG),
    ("vector", "none", "hadamard", BIG, BIG),
    ("none", "lora", "hadamard", BIG + 2 * M * R * (K + N), BIG + 4 * M * R * (K + N)),
    ("lora", "none", "hadamard", BIG + 2 * N * K * R, 2 * BIG + 6 * N * K * R),
])  # fmt: skip
def test_flops_are_counted(a, b, variant, forward, backward):
    """Products of the size of the weight: 2 in all, 3 where A is lora; the rest has a rank in it."""
    p = problem(GLoRAConfig(a, b, E="none", rank=R, variant=variant), (M,), K, N, False, torch.float32)
    args = forward_args(p, "eager", grad=False)
    with FlopCounterMode(display=False) as counter:
        y, h, sigma, u = OPS.glora_linear(*args)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        OPS.glora_linear_backward(p.dy, y, h, sigma, u, needs_of(args), *args)
    assert counter.get_total_flops() == backward


@pytest.mark.parametrize(("form", "pair"), [("vector", 0), ("lora", 2 * K * R)])
def test_flops_of_wc(form, pair):
    p = build("none", "none", "hadamard", 0.0)
    args = wc_args(p, "eager", False, form)
    with FlopCounterMode(display=False) as counter:
        OPS.glora_wc(*args)
    assert counter.get_total_flops() == 2 * math.prod(p.weight.shape) + pair
    needs = [t is not None for t in args[1:4]]
    with FlopCounterMode(display=False) as counter:
        OPS.glora_wc_backward(torch.randn(11), needs, *args)
    assert counter.get_total_flops() == 2 * math.prod(p.weight.shape) + 2 * pair


def test_a_compiled_layer_is_one_node_and_two_with_c():
    """Of the graph that torch.compile sees, forward and backward: nothing else of ours, and no decomposition."""
    from collections import Counter

    from torch._dynamo.backends.common import aot_autograd

    seen: list[Counter[str]] = []

    def record(module, inputs):
        seen.append(
            Counter(str(n.target) for n in module.graph.nodes if n.op == "call_function" and "glora" in str(n.target))
        )
        return module.forward

    for c, expected in (("none", 1), ("vector", 2)):
        torch._dynamo.reset()
        seen.clear()
        p = problem(GLoRAConfig("vector", "lora", c, "none", "vector", rank=3), (7,), 20, 11, dtype=torch.float32)
        leaves = {n: t.detach().requires_grad_() for n, t in p.leaves().items()}
        params = {n: leaves[n] for n in p.params}
        compiled = torch.compile(
            lambda x, b, params=params, p=p: layer(x, p.weight, b, params, p.config),
            backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True,
        )  # fmt: skip
        compiled(leaves["x"], leaves["bias"]).backward(p.dy)
        forward, backward = seen
        assert sum(forward.values()) == sum(backward.values()) == expected, (forward, backward)
        assert forward["glora_kernels.glora_linear.default"] == 1
        assert backward["glora_kernels.glora_linear_backward.default"] == 1
