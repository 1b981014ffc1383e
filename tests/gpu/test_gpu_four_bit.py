"""4-bit bases on a card, by the kernels of Triton and of csrc: values, bits, graphs, memory. Run with `pytest -m gpu`.

csrc's half is skipped, with the reason, where the extension is not built.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import helpers
import pytest
import torch
from helpers import Problem, check, layer, ours, problem, same

import glora_kernels as gk
from glora_kernels.four_bit import kinds as four_bit
from glora_kernels.glora.op import seeds_on_device
from glora_kernels.ops import glora_linear
from glora_kernels.quant import NestedState, QuantizedWeight, QuantState, dequantize, quantize_weight
from glora_kernels.quant.bnb import from_state
from glora_kernels.quant.codes import dynamic_map
from glora_kernels.reference.cases import FORMS
from glora_kernels.runtime import environment, extension, workspace
from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
forms = pytest.mark.parametrize(("a", "b", "variant"), FORMS)
few = pytest.mark.parametrize(("a", "b", "variant"), [
    ("none", "lora", "hadamard"), ("vector", "lora", "hadamard"), ("constant", "vector", "hadamard"),
    ("lora", "lora", "hadamard"), ("lora", "lora", "matmul"),
])  # fmt: skip


@pytest.fixture(params=["triton", "cuda"])
def route(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and (reason := extension.why_missing()) is not None:
        pytest.skip(f"no CUDA extension: {reason}")
    return request.param


def config(a, b, variant="hadamard", rank=16, **more):
    return helpers.config(a, b, variant, rank=rank, alpha=2.0 * rank, **more)


def build(cfg, lead, k, n, dtype=torch.bfloat16, bias=True, quant_type="nf4", blocksize=64, nested=True,
          stored=None, **more) -> tuple[Problem, Problem]:  # fmt: skip
    """A problem over the dense matrix that the codes stand for, and the same over the codes."""
    p = problem(cfg, lead, k, n, bias, dtype, device="cuda", **{"size": 0.05, **more})
    codes = quantize_weight(p.weight.to(stored or dtype), quant_type, blocksize, nested)
    return replace(p, weight=dequantize(codes, dtype)), replace(p, weight=codes)


def to_host(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.packed.cpu(), weight.state.to("cpu"))


def decoded(weight: QuantizedWeight, dtype: torch.dtype, route: str) -> torch.Tensor:
    """By the kernel, into memory poisoned with NaN and with a margin that nobody may touch."""
    memory = torch.full((weight.numel() + 64,), float("nan"), dtype=dtype, device="cuda")
    out = memory[:-64].view(weight.shape)
    four_bit.dequantize_launch(weight, out, route=route, arch=environment.arch(0)).run()
    assert memory[-64:].isnan().all()
    return out


# The codec.


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 129), (257, 96), (1024, 4096), (3, 4097)])
def test_the_decode_is_that_of_the_host(quant_type, nested, n, k, route):
    """Bit for bit the oracle's, for every block size and dtype; the card quantizes to the host's codes too."""
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05
    for stored in DTYPES:
        for blocksize in (32, 64, 256, 4096):
            host = quantize_weight(dense.to(stored), quant_type, blocksize, nested)
            weight = QuantizedWeight(host.packed.cuda(), host.state.to("cuda"))
            for dtype in DTYPES:
                assert torch.equal(decoded(weight, dtype, route).cpu(), dequantize(host, dtype)), (stored, blocksize)
            card = quantize_weight(dense.to(stored).cuda(), quant_type, blocksize)
            assert torch.equal(card.packed, quantize_weight(dense.to(stored), quant_type, blocksize).packed.cuda())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_decode_is_that_of_bitsandbytes_on_the_card(quant_type, nested, dtype, route):
    bnb = pytest.importorskip("bitsandbytes")
    for n, k in ((1024, 4096), (130, 100)):
        dense = torch.randn(n, k, device="cuda", dtype=dtype) * 0.05
        packed, state = bnb.functional.quantize_4bit(dense, compress_statistics=nested, quant_type=quant_type)
        weight = from_state(packed, state)
        assert weight.packed.data_ptr() == packed.data_ptr()
        assert torch.equal(decoded(weight, dtype, route), bnb.functional.dequantize_4bit(packed, state))


def test_a_linear4bit_on_the_card_goes_in_and_out():
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(512, 256, quant_type="nf4", compute_dtype=torch.bfloat16).cuda()
    fresh = gk.GLoRALinear.from_linear(linear, config("vector", "lora"))
    assert fresh.weight.data_ptr() == linear.weight.data_ptr()
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    y, expected = fresh(x), linear(x)
    assert (y - expected).norm() < 0.01 * expected.norm()
    frozen = gk.QuantizedLinear.from_linear4bit(linear)
    out = frozen.to_linear4bit()
    assert out.weight.data_ptr() == linear.weight.data_ptr()
    assert torch.equal(out(x), expected)


def test_moving_between_host_and_card_keeps_every_bit():
    layer_ = gk.GLoRALinear.from_linear(gk.quantize(torch.nn.Linear(96, 64), double_quant=True), config("none", "lora"))
    before = dequantize(layer_.base_weight(), torch.float32)
    layer_.cuda()
    assert all(t.is_cuda for t in (layer_.weight, *layer_.quant_state.tensors()))
    assert torch.equal(dequantize(layer_.base_weight(), torch.float32).cpu(), before)
    layer_.cpu().to(torch.bfloat16)
    assert torch.equal(dequantize(layer_.base_weight(), torch.float32), before)
    with pytest.raises(ValueError, match="one device"):
        layer_(torch.randn(2, 96, device="cuda"))


def test_offsets_beyond_32_bits(route):
    """2³¹ codes and some: the last rows of W are what the same codes are alone."""
    k, rows = 2**13, 64
    n = 2**31 // k + rows
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB")
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.randint(0, 256, (n * k // 64,), dtype=torch.uint8, device="cuda")
    inner = torch.rand(-(-len(absmax) // 256), device="cuda")
    code, offset = dynamic_map(torch.device("cuda", 0)), torch.tensor(0.7, device="cuda")

    def part(first, last, shape):
        nested = NestedState(inner[first // 64 // 256 : -(-last // 64 // 256)].clone(), code, 256, offset)
        state = QuantState(absmax[first // 64 : last // 64].clone(), "nf4", 64, shape, torch.bfloat16, nested)
        return QuantizedWeight(packed[first // 2 : last // 2].clone(), state)

    whole = part(0, n * k, (n, k))
    out = torch.empty(n, k, dtype=torch.bfloat16, device="cuda")
    four_bit.dequantize_launch(whole, out, route=route, arch=environment.arch(0)).run()
    end = part((n - rows) * k, n * k, (rows, k))
    assert torch.equal(out[-rows:], dequantize(end, torch.bfloat16))
    del out
    x = torch.randn(4, k, device="cuda", dtype=torch.bfloat16)
    with gk.backend(route):
        y, alone = glora_linear(x, whole)[:, -rows:], glora_linear(x, end)
    assert (y - alone).norm() <= 2**-7 * alone.norm()


# Values and gradients.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@forms
def test_a_real_size(a, b, variant, dtype, route, poison):
    dense, packed = build(config(a, b, variant), (2, 517), 768, 520, dtype)
    check(dense, ours(packed, route), "triton")


@pytest.mark.parametrize("m", [1, 2, 4, 5, 8, 16, 17, 32, 33, 64, 65])
@pytest.mark.parametrize(("rank", "k", "blocksize"), [(1, 512, 64), (16, 768, 128), (64, 4096, 64), (16, 1000, 64)])
def test_few_tokens(m, rank, k, blocksize, route, poison):
    """On both sides of every limit of the kernels that read the codes, and a K whose rows cut blocks."""
    for a, b in (("none", "lora"), ("vector", "lora"), ("constant", "constant")):
        dense, packed = build(config(a, b, rank=rank), (m,), k, 264, blocksize=blocksize)
        check(dense, ours(packed, route), "triton")


@pytest.mark.parametrize("a", ["none", "vector", "lora"])
def test_fp32(a, route, poison):
    dense, packed = build(config(a, "lora"), (129,), 264, 136, torch.float32)
    check(dense, ours(packed, route), "triton")


@pytest.mark.parametrize("m", [4, 129])
@few
def test_over_the_matrix_of_the_dtype_it_was_quantized_from(a, b, variant, m, route):
    """Quantized from fp16, computed in bf16: W is rounded twice, in every kernel."""
    dense, packed = build(config(a, b, variant), (m,), 512, 264, stored=torch.float16)
    check(dense, ours(packed, route), "triton")


@forms
def test_autocast(a, b, variant, route):
    dense, packed = build(config(a, b, variant), (129,), 256, 136, torch.float32, stored=torch.bfloat16)
    got = ours(packed, route, autocast=torch.bfloat16)
    assert got["y"].dtype == torch.bfloat16
    check(dense, got, "triton", autocast=torch.bfloat16)


@pytest.mark.parametrize("m", [16, 300])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
@pytest.mark.parametrize("form", ["lora", "vector", "constant"])
def test_a_small_a_survives(form, size, m, route):
    """The share of Δ that arrives in y and in dx, beside a base in bf16."""
    dense, packed = build(GLoRAConfig(form, "none", E="none", rank=8), (m,), 512, 384, adapters=torch.float32)
    if form == "lora":
        factor = size / (packed.params["A_up"] @ packed.params["A_down"]).square().mean().sqrt()
        packed.params["A_up"].mul_(factor)
    else:
        packed.params["A"].fill_(size)
    zero = {name: t if name.endswith("_down") else torch.zeros_like(t) for name, t in packed.params.items()}
    got, base = ours(packed, route), ours(replace(packed, params=zero), route)
    w = dense.weight.double()
    by = packed.params["A_up"].double() @ packed.params["A_down"].double() if form == "lora" else size
    deltas = {"y": dense.x.double() @ (w * by).t(), "x": dense.dy.double() @ (w * by)}
    for name, delta in deltas.items():
        share = ((got[name].double() - base[name].double()) * delta).sum() / delta.square().sum()
        assert 0.9 <= share <= 1.1, name


@pytest.mark.parametrize("m", [4, 517])
@forms
def test_zero_adapters_give_the_base(a, b, variant, m, route):
    """Whatever the dither: exactly the frozen layer's y, where the same kernel makes both."""
    _, packed = build(config(a, b, variant, cde="none"), (m,), 768, 520)
    zero = {name: t if name.endswith("_down") else torch.zeros_like(t) for name, t in packed.params.items()}
    got = ours(replace(packed, params=zero), route)
    with gk.backend(route):
        base = glora_linear(packed.x, packed.weight, packed.bias)
    eps = torch.finfo(torch.bfloat16).eps
    assert (got["y"] - base).abs().max() <= eps * base.abs().max()


# Runs, graphs, threads.


@pytest.mark.parametrize("m", [1, 16, 517])
@forms
def test_twenty_runs_give_the_same_bits(a, b, variant, m, route):
    _, packed = build(config(a, b, variant, dropout=0.1), (m,), 768, 520)
    first = ours(packed, route)
    for _ in range(20):
        assert same(first, ours(packed, route))


@pytest.mark.parametrize("m", [4, 129])
@few
def test_cuda_graph(a, b, variant, m, route):
    """Forward and backward captured once; a replay sees new inputs and new parameters, and a moved workspace."""
    _, p = build(config(a, b, variant), (m,), 256, 136)
    leaves = {n: t.detach().requires_grad_() for n, t in p.leaves().items()}

    def step():
        for t in leaves.values():
            t.grad = None
        with gk.backend(route):
            y = layer(leaves["x"], p.weight, leaves["bias"], {n: leaves[n] for n in p.params}, p.config)
        y.backward(p.dy)
        return {"y": y.detach(), **{n: t.grad for n, t in leaves.items()}}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), seeds_on_device():
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in (*leaves.values(), p.dy):
            t.mul_(0.5).add_(0.01)
    ours(build(config("lora", "none"), (5,), 2048, 2048)[1], route)  # takes the workspace of this stream meanwhile
    graph.replay()
    torch.cuda.synchronize()
    assert same({n: t.clone() for n, t in captured.items()}, ours(p, route))


def test_streams_and_threads(route):
    """Every call builds W in a workspace: several threads, each in a stream of its own and all in one."""
    problems = [build(config("vector", "lora"), (80,), 512 + 64 * i, 256, seed=i)[1] for i in range(4)]
    wrong = []

    def call(i):
        return glora_linear(problems[i].x, problems[i].weight, problems[i].bias)

    def work(i, stream):
        with torch.cuda.stream(stream):
            wrong.extend(i for _ in range(30) if not torch.equal(call(i), alone[i]))

    with gk.backend(route):
        alone = [call(i) for i in range(len(problems))]
        for streams in ([torch.cuda.Stream() for _ in problems], [torch.cuda.current_stream()] * len(problems)):
            torch.cuda.synchronize()
            threads = [threading.Thread(target=work, args=(i, s)) for i, s in enumerate(streams)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            torch.cuda.synchronize()
    assert not wrong


@pytest.mark.parametrize("m", [4, 129])
def test_no_synchronisation(m, route):
    for a, b, variant in FORMS:
        _, p = build(config(a, b, variant, dropout=0.1), (m,), 256, 136)
        ours(p, route)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(p, route)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@few
def test_compiled(a, b, variant):
    torch._dynamo.reset()
    dense, packed = build(config(a, b, variant, dropout=0.1), (129,), 256, 136)
    check(dense, ours(packed, through=lambda call: torch.compile(call, fullgraph=True)), "triton")


# Memory.


@pytest.mark.parametrize("m", [1, 128])
@few
def test_packed_weight_adapters_and_one_workspace(a, b, variant, m, route):
    """After forward nothing of a weight's size stays but the workspace; the peak of a step holds one dense weight."""
    layers = [build(config(a, b, variant, cde="none"), (m,), 4096, 4096, bias=False, seed=i)[1] for i in range(3)]
    dense = 4096 * 4096 * 2
    for p in layers:
        ours(p, route)
    torch.cuda.synchronize()
    workspace.release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = []
    with gk.backend(route):
        for p in layers:
            leaves = {n: t.detach().requires_grad_() for n, t in p.leaves().items()}
            kept.append((leaves, layer(leaves["x"], p.weight, None, {n: leaves[n] for n in p.params}, p.config)))
    held = torch.cuda.memory_allocated() - before
    assert held < dense + dense / 8
    for (_, y), p in zip(kept, layers, strict=True):
        y.backward(p.dy)
    torch.cuda.synchronize()
    slack = dense / 4 if a == "lora" else dense / 8  # partial sums of H = G∘W
    assert torch.cuda.max_memory_allocated() - before < dense + slack
