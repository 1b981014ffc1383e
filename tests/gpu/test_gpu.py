"""What only a card can show: real launches, graphs, races, sizes beyond 32 bits. Run with `pytest -m gpu`.

The bodies of the operators' tests run on a card too (their `device` fixture); here is what the interpreter has no word
for.
"""

from __future__ import annotations

import itertools
import threading

import helpers
import pytest
import torch
from helpers import check, layer, ours, problem, same, train_only

from glora_kernels import reference
from glora_kernels.glora.op import dropout_seed, seeds_on_device
from glora_kernels.ops import glora_linear
from glora_kernels.reference.cases import FORMS
from glora_kernels.runtime import environment, routes
from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
forms = pytest.mark.parametrize(("a", "b", "variant"), FORMS)


def config(a, b, variant="hadamard", rank=16, **more):
    return helpers.config(a, b, variant, rank=rank, alpha=2.0 * rank, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@forms
def test_a_real_size(a, b, variant, dtype, poison):
    """More than one tile in every direction, in the configurations that are shipped."""
    p = problem(config(a, b, variant), (2, 517), 768, 520, True, dtype, device="cuda", size=0.05)
    assert routes.route("cuda", dtype) == "triton"
    check(p, ours(p), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "rank"), list(itertools.product((1, 16, 64, 65, 129), (1, 8, 64, 256))))
def test_rows_and_ranks(m, rank, dtype, poison):
    p = problem(config("vector", "lora", rank=rank, dropout=0.1), (m,), 264, 136, True, dtype, device="cuda", size=0.05)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@forms
def test_twenty_runs_give_the_same_bits(a, b, variant, dtype):
    p = problem(config(a, b, variant, dropout=0.1), (517,), 768, 520, True, dtype, device="cuda", size=0.05)
    first = ours(p, "triton")
    for _ in range(20):
        assert same(first, ours(p, "triton"))


@forms
def test_cuda_graph(a, b, variant):
    """Forward and backward captured once; a replay sees new inputs and new parameters."""
    p = problem(config(a, b, variant, dropout=0.1), (129,), 256, 136, True, torch.bfloat16, device="cuda", size=0.05)
    leaves = {n: t.detach().requires_grad_() for n, t in p.leaves().items()}

    def step():
        for t in leaves.values():
            t.grad = None
        params = {n: leaves[n] for n in p.params}
        y = layer(leaves["x"], p.weight, leaves["bias"], params, p.config, p.seed)
        y.backward(p.dy)
        return {"y": y.detach(), **{n: t.grad for n, t in leaves.items()}}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in (*leaves.values(), p.dy):
            t.mul_(0.5).add_(0.01)
    # A larger layer takes the workspace of this stream meanwhile: what the graph has captured must not move.
    big = problem(config("lora", "none"), (5,), 2048, 2048, True, torch.bfloat16, device="cuda")
    ours(big)
    graph.replay()
    torch.cuda.synchronize()
    replayed = {n: t.clone() for n, t in captured.items()}
    assert same(replayed, ours(p))


def test_a_replayed_graph_draws_a_new_mask():
    x, w = torch.ones(64, 64, device="cuda"), torch.zeros(64, 64, device="cuda")
    up = torch.eye(64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    assert dropout_seed(x.device).device.type == "cpu"
    with seeds_on_device():
        glora_linear(x, w, b_up=up, b_down=up, dropout_p=0.5, seed=dropout_seed(x.device))
    with torch.cuda.graph(graph):
        seed = dropout_seed(x.device)
        y = glora_linear(x, w, b_up=up, b_down=up, dropout_p=0.5, seed=seed)
    assert seed.is_cuda
    masks = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        masks.append(y != 0)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize(("a", "b", "variant"), [
    ("none", "lora", "hadamard"), ("vector", "lora", "hadamard"), ("lora", "lora", "hadamard"),
    ("constant", "constant", "hadamard"),
])  # fmt: skip
def test_the_profiler_counts_the_planned_launches(a, b, variant):
    """What a card is given is what the plan says, and no other GPU operation."""
    from glora.test_fused import plan

    c = GLoRAConfig(a, b, "none", "none", "none", 16, dropout=0.1 if b == "lora" else 0.0, variant=variant)
    p = problem(c, (2048,), 1024, 1024, False, torch.bfloat16, device="cuda", size=0.05)
    leaves = {n: t.detach().requires_grad_() for n, t in p.leaves().items()}

    def step():
        y = layer(leaves["x"], p.weight, None, {n: leaves[n] for n in p.params}, c, p.seed)
        torch.autograd.grad(y, list(leaves.values()), p.dy)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    seen = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    planned = sum(len(steps) for steps in plan(c, 2048, 1024, 1024, False, environment.arch(0)))
    assert len(seen) == planned, seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_of_the_kernels(p, dtype):
    """Read off a product with an identity: bit for bit the reference's mask."""
    x = torch.ones(1000, 256, device="cuda", dtype=dtype)
    up, seed = torch.eye(256, device="cuda", dtype=dtype), torch.tensor([2**40 + 17], device="cuda")
    y = glora_linear(x, torch.zeros_like(up), b_up=up, b_down=up, dropout_p=p, seed=seed)
    keep = reference.keep_mask(seed, 1000, 256, p)
    assert torch.equal(y != 0, keep)
    assert abs(keep.double().mean() - (1 - p)) < 5 * (p * (1 - p) / keep.numel()) ** 0.5


def test_a_seed_on_the_host_gives_the_mask_of_one_on_the_device():
    for route in ("triton", "eager"):
        p = problem(config("vector", "lora", dropout=0.5), (64,), 256, 136, True, torch.float32, device="cuda")
        on_device = ours(p, route)
        key = p.seed.cpu()
        leaves = {n: t.detach().requires_grad_() for n, t in p.leaves().items()}
        with routes.backend(route):
            y = layer(leaves["x"], p.weight, leaves["bias"], {n: leaves[n] for n in p.params}, p.config, key)
            y.backward(p.dy)
        assert same(on_device, {"y": y.detach(), **{n: t.grad for n, t in leaves.items()}})


def test_drawing_a_seed_leaves_the_device_alone():
    """Its generator is not even advanced, but under capture (`test_a_replayed_graph_draws_a_new_mask`)."""
    before = torch.cuda.get_rng_state()
    seed = dropout_seed(torch.device("cuda"))
    assert seed.device.type == "cpu"
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("a", ["none", "vector", "lora"])
def test_offsets_beyond_32_bits(a):
    """x has more than 2³¹ elements: its last rows must give what they give alone."""
    k, n = 2**13, 128
    m = 2**31 // k + 256
    if torch.cuda.mem_get_info()[0] < 3 * m * k * 2:
        pytest.skip("needs three times 4 GiB")
    small = problem(GLoRAConfig(a, "lora", rank=8), (256,), k, n, True, torch.bfloat16, device="cuda", size=0.05)
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-256:] = small.x
    x.requires_grad_()
    y = layer(x, small.weight, small.bias, small.params, small.config)
    dy = torch.zeros_like(y)
    dy[-256:] = small.dy
    y.backward(dy)
    alone = ours(train_only(small, ["x"]))
    eps = torch.finfo(torch.bfloat16).eps
    for got, expected in ((y[-256:].detach(), alone["y"]), (x.grad[-256:], alone["x"])):
        # The dither goes by the row: the two calls round by up to one unit in the last place differently.
        assert (got - expected).abs().max() <= 2 * eps * expected.abs().max()


@forms
def test_autocast(a, b, variant):
    p = problem(config(a, b, variant), (129,), 256, 136, True, torch.float32, device="cuda", size=0.05)
    got = ours(p, autocast=torch.bfloat16)
    assert got["y"].dtype == torch.bfloat16
    check(p, got, "triton", autocast=torch.bfloat16)


def test_streams_and_threads():
    """A=lora builds its weight in a workspace: calls of several threads, each in a stream of its own and all in one."""
    problems = [
        problem(config("lora", "none"), (64,), 512 + 64 * i, 256, True, torch.float16, device="cuda", seed=i)
        for i in range(4)
    ]
    alone = [ours(p) for p in problems]
    for shared in (False, True):
        wrong = []

        def work(i, own, wrong=wrong):
            with torch.cuda.stream(own):
                for _ in range(50):
                    if not same(ours(problems[i]), alone[i]):
                        wrong.append(i)

        streams = [torch.cuda.current_stream() if shared else torch.cuda.Stream() for _ in problems]
        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(i, s)) for i, s in enumerate(streams)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        torch.cuda.synchronize()
        assert not wrong, f"shared stream: {shared}"


@pytest.mark.parametrize("a", ["none", "vector", "lora"])
def test_no_dense_weight_stays(a):
    """After forward, memory has grown by what is saved, and by no weight."""
    p = problem(config(a, "lora"), (16,), 2048, 2048, True, torch.bfloat16, device="cuda", size=0.05)
    ours(p)
    torch.cuda.synchronize()
    leaves = {n: t.detach().requires_grad_() for n, t in p.leaves().items()}
    before = torch.cuda.memory_allocated()
    y = layer(leaves["x"], p.weight, leaves["bias"], {n: leaves[n] for n in p.params}, p.config)
    assert torch.cuda.memory_allocated() - before < p.weight.numel() * 2 / 8
    assert y.requires_grad


def test_no_synchronisation():
    """Neither forward nor backward waits for the card."""
    for a, b, variant in FORMS:
        p = problem(config(a, b, variant, dropout=0.1), (64,), 256, 136, True, torch.bfloat16, device="cuda", size=0.05)
        ours(p)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(p)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled():
    torch._dynamo.reset()
    p = problem(config("vector", "lora", dropout=0.1), (129,), 256, 136, True, torch.bfloat16, device="cuda", size=0.05)
    got = ours(p, through=lambda call: torch.compile(call, fullgraph=True))
    check(p, got, "triton")


def test_architecture_is_known():
    assert environment.arch(torch.cuda.current_device()).startswith(("sm_", "gfx"))
    assert not environment.interpreting()
