"""The operators over a 4-bit weight: values, every gradient, few bits, memory, registration, and the kernels.

The oracle is `helpers.literal` in float64 over the dequantized weight.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import (
    NAMES,
    Problem,
    check,
    close,
    compiled,
    config,
    exact,
    interpreted,
    layer,
    ours,
    problem,
    same,
    train_only,
    truth,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from glora_kernels.dispatch.common import codes_of
from glora_kernels.ops import glora_linear, glora_wc
from glora_kernels.quant import QuantizedWeight, codec, dequantize, quantize_weight
from glora_kernels.reference.cases import FORMS
from glora_kernels.runtime import workspace
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig

OPS = torch.ops.glora_kernels
ABC = ("lora", "vector", "constant", "none")
forms = pytest.mark.parametrize(("a", "b", "variant"), FORMS)
few = pytest.mark.parametrize(("a", "b", "variant"), [
    ("none", "lora", "hadamard"), ("vector", "lora", "hadamard"), ("constant", "vector", "hadamard"),
    ("lora", "constant", "hadamard"), ("lora", "lora", "matmul"),
])  # fmt: skip


def build(config, *args, quant_type="nf4", blocksize=32, nested=True, stored=None, **more) -> tuple[Problem, Problem]:
    """A problem over the dense matrix that the codes stand for, and the same problem over the codes."""
    p = problem(config, *args, **more)
    stored = stored or (torch.float32 if p.x.dtype == torch.float64 else p.x.dtype)
    codes = quantize_weight(p.weight.to(stored), quant_type, blocksize, nested)
    return replace(p, weight=dequantize(codes, p.x.dtype)), replace(p, weight=codes)


# Values and gradients.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("a", ABC)
def test_every_configuration(a, bias):
    """Forward and all gradients of the 108 configurations of one A; types, blocks and nesting change on the way."""
    ways = itertools.cycle(itertools.product(["nf4", "fp4"], [32, 64, 128], [True, False]))
    rest = list(itertools.product(ABC, ("lora", "vector", "none"), *[("vector", "constant", "none")] * 2))
    assert len(rest) == 108
    for i, (b, c, d, e) in enumerate(rest):
        quant_type, blocksize, nested = next(ways)
        cfg = GLoRAConfig(a, b, c, d, e, rank=2, alpha=5.0 if b == "lora" else None)
        dense, packed = build(
            cfg, (5,), 20, 11, bias, quant_type=quant_type, blocksize=blocksize, nested=nested, seed=i
        )
        assert isinstance(packed.weight, QuantizedWeight)
        exact(dense, ours(packed, "eager"))


@pytest.mark.parametrize("b", ABC)
@pytest.mark.parametrize("c", ["lora", "none"])
def test_the_product_variant(b, c):
    cfg = GLoRAConfig("lora", b, c, "vector", "constant", rank=3, variant="matmul")
    dense, packed = build(cfg, (5,), 21, 11)
    exact(dense, ours(packed, "eager"))


@few
def test_every_subset_of_gradients(a, b, variant):
    dense, packed = build(config(a, b, variant, "none", dropout=0.25), (5,), 20, 11, True)
    for size in range(len(dense.trained) + 1):
        for subset in itertools.combinations(sorted(dense.trained), size):
            exact(train_only(dense, subset), ours(train_only(packed, subset), "eager"))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0)])
@few
def test_leading_sizes_and_strides(a, b, variant, lead):
    dense, packed = build(config(a, b, variant), lead, 20, 11)
    exact(dense, ours(packed, "eager"))
    if len(lead) == 2 and lead[1]:
        dense, packed = build(config(a, b, variant), lead, 20, 11, layout="strided")
        exact(dense, ours(packed, "eager"))


@pytest.mark.parametrize("a", ["vector", "constant"])
@pytest.mark.parametrize("trained", [["A"], ["A", "B_down"]])
def test_gradient_of_a_where_one_plus_a_is_zero(a, trained):
    """Z of such rows is computed anew, from the dequantized weight."""
    dense, packed = build(config(a, "lora"), (9,), 20, 11)
    for p in (dense, packed):
        p.params["A"][::2] = -1.0
    exact(train_only(dense, trained), ours(train_only(packed, trained), "eager"), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@forms
def test_in_few_bits(a, b, variant, dtype):
    dense, packed = build(config(a, b, variant, dropout=0.1), (3, 11), 70, 45, True, dtype, size=0.1)
    check(dense, ours(packed, "eager"), "eager")


@few
def test_fp32_adapters_over_16_bits(a, b, variant):
    dense, packed = build(config(a, b, variant), (29,), 70, 45, True, torch.bfloat16, torch.float32, size=0.1)
    check(dense, ours(packed, "eager"), "eager")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@few
def test_the_matrix_is_that_of_the_dtype_it_was_quantized_from(a, b, variant, stored):
    """x in more bits than the weight that was quantized: forward, and all gradients, over one and the same W."""
    dense, packed = build(config(a, b, variant), (5,), 20, 11, stored=stored)
    assert torch.equal(dense.weight, dense.weight.to(stored).double())
    exact(dense, ours(packed, "eager"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
@pytest.mark.parametrize(("support", "form"), [
    ("A", "lora"), ("A", "vector"), ("A", "constant"), ("B", "lora"), ("B", "vector")
])  # fmt: skip
def test_a_small_adapter_survives_16_bits(support, form, size, dtype):
    """(y − y_base) holds Δ whole: its share along Δ, and what is beside Δ within twice that of exact arithmetic."""
    cfg = GLoRAConfig(*((form, "none") if support == "A" else ("none", form)), "none", "none", "none", rank=4)
    dense, packed = build(cfg, (128,), 256, 192, False, dtype, torch.float32)
    params = dict(packed.params)
    if form == "lora":
        scale = size / float((params[f"{support}_up"] @ params[f"{support}_down"]).square().mean().sqrt())
        params[f"{support}_up"] = params[f"{support}_up"] * scale
    else:
        params[support] = torch.full_like(params[support], size)
    if support == "B":  # relative to the weight, as A is
        name = "B_up" if form == "lora" else "B"
        params[name] = params[name] * dense.weight.float().square().mean().sqrt()
    zero = {name: torch.zeros_like(t) if not name.endswith("_down") else t for name, t in params.items()}
    got, base = (ours(replace(packed, params=p), "eager") for p in (params, zero))
    true, flat = (truth(replace(dense, params=p))[0] for p in (params, zero))
    for name in ("y", "x"):
        delta, arrived = true[name] - flat[name], got[name].double() - base[name].double()
        share = float((arrived * delta).sum() / delta.square().sum())
        assert 0.9 <= share <= 1.1, (name, share)
        rounded = true[name].to(dtype).double() - flat[name].to(dtype).double()
        error, least = ((value - delta).norm() / delta.norm() for value in (arrived, rounded))
        assert error <= 2 * least, (name, float(error), float(least))


def test_zero_adapters_give_the_base_bit_for_bit():
    for a, b, variant in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            _, packed = build(config(a, b, variant), (7,), 70, 45, True, dtype)
            params = {n: torch.zeros_like(t) if not n.endswith("_down") else t for n, t in packed.params.items()}
            with backend("eager"):
                base = glora_linear(packed.x, packed.weight, packed.bias)
            expected = torch.nn.functional.linear(packed.x, dequantize(packed.weight, dtype), packed.bias)
            assert torch.equal(base, expected)
            assert torch.equal(ours(replace(packed, params=params), "eager")["y"], expected), (a, b, variant, dtype)


# Around the operators.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@few
def test_autocast(a, b, variant, dtype):
    dense, packed = build(config(a, b, variant), (9,), 70, 45, True, torch.float32, size=0.1, stored=dtype)
    got = ours(packed, "eager", autocast=dtype)
    assert got["y"].dtype == dtype
    check(dense, got, "eager", autocast=dtype)


@pytest.mark.parametrize("reentrant", [True, False])
@few
def test_activation_checkpointing(a, b, variant, reentrant):
    """What is recomputed is what was computed, dropout included."""
    dense, packed = build(config(a, b, variant), (5,), 20, 11, size=0.2)
    direct = ours(packed, "eager")
    again = ours(packed, "eager", through=lambda call: lambda *args: checkpoint(call, *args, use_reentrant=reentrant))
    if not reentrant:
        assert same(direct, again)
        exact(dense, again)
    else:  # which sees the gradients of positional tensors only: the adapter's are inside a dictionary
        exact(train_only(dense, ["x", "bias"]), {n: t if n in ("y", "x", "bias") else None for n, t in again.items()})


@few
def test_gradient_accumulation(a, b, variant):
    """Two batches without zero_grad between them: the sum of their gradients, and no state of one in the other."""
    _, packed = build(config(a, b, variant, dropout=0.25), (5,), 20, 11)
    other = replace(packed, x=packed.x.flip(0) * 0.5, dy=packed.dy * 2)
    alone = [ours(p, "eager") for p in (packed, other)]
    leaves = {n: t.detach().requires_grad_() for n, t in packed.leaves().items() if n != "x"}
    with backend("eager"):
        outputs = [
            layer(p.x, p.weight, leaves["bias"], {n: leaves[n] for n in p.params}, p.config, p.seed)
            for p in (packed, other)
        ]
    for p, y in zip((packed, other), outputs, strict=True):  # both forwards before both backwards
        y.backward(p.dy)
    for name, leaf in leaves.items():
        assert torch.allclose(leaf.grad, alone[0][name] + alone[1][name], rtol=1e-12, atol=1e-12), name


def test_the_backend_of_forward_is_that_of_backward():
    _, packed = build(config("vector", "lora"), (5,), 20, 11)
    expected = ours(packed, "eager")
    leaves = {n: t.detach().requires_grad_() for n, t in packed.leaves().items()}
    with backend("eager"):
        y = layer(leaves["x"], packed.weight, leaves["bias"], {n: leaves[n] for n in packed.params}, packed.config)
    with backend("cuda"):
        y.backward(packed.dy)
    assert all(torch.equal(leaves[n].grad, expected[n]) for n in leaves)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_forced_backend_that_cannot_serve_says_so(name):
    _, packed = build(config("vector", "lora"), (5,), 20, 11)
    with backend(name), pytest.raises(RuntimeError, match=rf"backend\('{name}'\)"):
        layer(packed.x, packed.weight, packed.bias, packed.params, packed.config)


def test_bad_arguments():
    _, p = build(config("none", "none", cde="none"), (5,), 20, 11)
    up, down = torch.zeros(11, 2).double(), torch.zeros(2, 20).double()
    for x, more, error, words in (
        (p.x[:, :19], {}, ValueError, "20 features"),
        (p.x.long(), {}, TypeError, "floating"),
        (p.x.to("meta"), {}, ValueError, "one device"),
        (p.x, {"a": torch.zeros(12).double()}, ValueError, r"a must have shape \(11,\)"),
        (p.x, {"b_up": up}, ValueError, "b_down is missing"),
        (p.x, {"b_up": up, "b_down": down[:, :19]}, ValueError, r"\(R, 20\)"),
        (p.x, {"a_up": up, "a_down": down, "variant": "matmul"}, ValueError, r"\(20, R\)"),
        (p.x, {"bias": torch.zeros(20).double()}, ValueError, "bias"),
        (p.x, {"wc": torch.zeros(20)}, ValueError, "wc"),
    ):
        with pytest.raises(error, match=words):
            glora_linear(x, p.weight, **more)
    with pytest.raises(ValueError, match=r"c must have shape \(20,\)"):
        glora_wc(p.weight, torch.zeros(11))


# Memory.


def stored_bytes(p: Problem) -> dict[int, int]:
    """By address, what a forward saves for backward and did not have before; a reference counts nothing."""
    kept: dict[int, int] = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    leaves = {n: t.detach().requires_grad_(n in p.trained) for n, t in p.leaves().items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), backend("eager"):
        layer(leaves["x"], p.weight, leaves.get("bias"), {n: leaves[n] for n in p.params}, p.config, p.seed)
    codes = (p.weight.packed, *p.weight.state.tensors())
    had = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *codes, *([] if p.seed is None else [p.seed]))}
    return {address: size for address, size in kept.items() if address not in had}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@forms
def test_no_dense_weight_is_saved(a, b, variant, dtype):
    """What stays beside x, the codes and the adapter: y (for dA), h, the mask, σ, U of the product variant, W·c."""
    m, k, n, r = 6, 320, 256, 3
    _, p = build(config(a, b, variant, rank=r, dropout=0.1), (m,), k, n, True, dtype)
    rank = r * ((a == "lora" and variant == "matmul") + (b == "lora"))
    y = m * n * dtype.itemsize if a in ("vector", "constant") else 0
    u = n * r * dtype.itemsize if variant == "matmul" else 0
    sigma = 4 * m if b in ("vector", "constant") else 0
    mask = m * k if b == "lora" else 0  # a byte an element
    assert sum(stored_bytes(p).values()) <= y + m * rank * dtype.itemsize + mask + sigma + u + 4 * n


class Allocations(TorchDispatchMode):
    """The storages that operations return, by address and size, but for those that were there before."""

    def __init__(self, known):
        super().__init__()
        self.known, self.found = set(known), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "glora_kernels":  # what happens inside the registered operator
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize(("a", "b", "variant", "dtype"), [
    ("lora", "lora", "hadamard", torch.float32), ("lora", "none", "hadamard", torch.bfloat16),
    ("lora", "vector", "matmul", torch.float32), ("vector", "lora", "hadamard", torch.bfloat16),
    ("constant", "vector", "hadamard", torch.float32), ("none", "constant", "hadamard", torch.bfloat16),
])  # fmt: skip
def test_the_workspace_is_the_only_dense_weight(a, b, variant, dtype, monkeypatch):
    """During forward and backward nothing else of a weight's size exists; the chunks that are worked on are smaller."""
    monkeypatch.setattr(codec, "_native", lambda weight: None)
    _, p = build(config(a, b, variant), (4,), 1024, 640, True, dtype)
    dense = p.weight.numel() * dtype.itemsize
    workspace.release()
    ours(p, "eager")  # which leaves a workspace behind
    buffer = workspace._thread.buffer
    assert buffer.numel() == dense
    with Allocations([buffer.untyped_storage().data_ptr()]) as seen:
        ours(p, "eager")
    assert workspace._thread.buffer is buffer
    assert max(seen.found.values()) < dense


# Registration.


def forward_args(p: Problem, route="eager", grad=True):
    """The arguments of torch.ops.glora_kernels.glora_linear."""
    of = {n: t.detach().requires_grad_(grad) for n, t in p.leaves().items()}
    c = p.params.get("C")
    if c is not None:
        of["wc"] = glora_wc(p.weight, c).detach().requires_grad_(grad)
    drop, supports = p.config.dropout if p.seed is not None else 0.0, (of.get(n) for n in NAMES)
    values = (p.config.scale, drop, p.seed, p.config.variant == "matmul", route, 0)
    return (of["x"], p.weight.packed, *supports, *values, *codes_of(p.weight))


def backward_args(p: Problem, route="eager"):
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in forward_args(p, route, grad=False)]
    saved = (t if t.numel() else None for t in OPS.glora_linear(*args))
    needs = [True, *(t is not None for t in args[2:12])]
    return (p.dy, *saved, needs, *args)


@pytest.mark.parametrize(("a", "b", "variant", "nested"), [
    ("vector", "lora", "hadamard", True), ("lora", "constant", "hadamard", False)
])  # fmt: skip
def test_opcheck(a, b, variant, nested):
    _, p = build(config(a, b, variant, dropout=0.25), (5,), 20, 11, True, torch.float32, nested=nested)
    torch.library.opcheck(OPS.glora_linear.default, forward_args(p))
    torch.library.opcheck(OPS.glora_linear_backward.default, backward_args(p))


@pytest.mark.parametrize("form", ["vector", "lora"])
def test_opcheck_wc(form):
    _, p = build(GLoRAConfig("none", "none", form, rank=3), (5,), 20, 11, True, torch.float32)
    factors = [None if t is None else t.detach().requires_grad_() for t in map(p.params.get, ("C", "C_up", "C_down"))]
    quant = codes_of(p.weight)
    torch.library.opcheck(OPS.glora_wc.default, (p.weight.packed, *factors, "eager", *quant))
    tensors = [None if t is None else t.detach() for t in factors]
    needs = [t is not None for t in tensors]
    torch.library.opcheck(
        OPS.glora_wc_backward.default, (torch.randn(11), needs, p.weight.packed, *tensors, "eager", *quant)
    )


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@few
def test_fake_results_equal_real_ones(a, b, variant, lead, dtype):
    _, p = build(config(a, b, variant, dropout=0.25), lead, 20, 11, True, dtype)
    mode = FakeTensorMode()
    for op, args in ((OPS.glora_linear, forward_args(p, grad=False)), (OPS.glora_linear_backward, backward_args(p))):
        real = op(*args)
        with mode:
            pretended = op(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))
        for r, f in zip(real, pretended, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@few
def test_compiled(a, b, variant):
    torch._dynamo.reset()
    nested = b == "lora"
    dense, packed = build(config(a, b, variant, dropout=0.25), (5,), 20, 11, nested=nested)
    got = ours(packed, "eager", through=compiled("aot_eager"))
    close(got, ours(packed, "eager"))
    exact(dense, got)


def test_compiled_for_any_number_of_rows():
    torch._dynamo.reset()
    frames = []

    def counting(graph, inputs):
        frames.append(graph)
        return graph.forward

    codes = build(config("none", "none", cde="none"), (5,), 20, 11)[1].weight
    function = torch.compile(lambda x: glora_linear(x, codes), backend=counting, fullgraph=True, dynamic=True)
    for m in (5, 6, 9, 17):
        x = torch.randn(m, 20, dtype=torch.float64)
        assert torch.allclose(function(x), x @ dequantize(codes, torch.float64).t(), rtol=1e-12, atol=1e-12)
    assert len(frames) == 1


def test_compiled_by_inductor():
    torch._dynamo.reset()
    _, packed = build(config("lora", "lora", dropout=0.25), (5,), 20, 11)
    try:
        got = ours(packed, "eager", through=compiled("inductor"))
    except Exception as error:
        if "compiler" in str(error).lower() and "glora" not in str(error).lower():
            pytest.skip(f"inductor has no C++ compiler here: {type(error).__name__}")
        raise
    close(got, ours(packed, "eager"))


M, K, N, R = 5, 20, 11, 3
BIG = 2 * M * K * N


@pytest.mark.parametrize(("a", "b", "forward", "backward"), [
    ("none", "none", BIG, BIG),
    ("none", "lora", BIG + 2 * M * R * (K + N), BIG + 4 * M * R * (K + N)),
    ("lora", "none", BIG + 2 * N * K * R, 2 * BIG + 6 * N * K * R),
])  # fmt: skip
def test_flops_are_those_of_the_dense_weight(a, b, forward, backward):
    _, p = build(GLoRAConfig(a, b, E="none", rank=R), (M,), K, N, False, torch.float32)
    for op, args, expected in (
        (OPS.glora_linear, forward_args(p, grad=False), forward),
        (OPS.glora_linear_backward, backward_args(p), backward),
        (OPS.glora_wc, (p.weight.packed, torch.randn(K), None, None, "eager", *codes_of(p.weight)), 2 * N * K),
    ):
        with FlopCounterMode(display=False) as counter:
            op(*args)
        assert counter.get_total_flops() == expected


# The kernels, interpreted.


@interpreted
@pytest.mark.parametrize(("dtype", "stored", "a", "b", "variant", "m", "n", "k", "rank", "nested"), [
    (torch.float32, "bfloat16", "none", "lora", "hadamard", 5, 24, 64, 3, True),
    (torch.float32, "float32", "vector", "lora", "hadamard", 1, 24, 64, 16, False),
    (torch.float32, "bfloat16", "lora", "lora", "hadamard", 37, 24, 40, 3, True),
    (torch.float32, "float32", "lora", "constant", "hadamard", 5, 17, 35, 1, True),
    (torch.float32, "bfloat16", "constant", "vector", "hadamard", 37, 17, 35, 1, False),
    (torch.float32, "float32", "lora", "vector", "matmul", 5, 24, 64, 3, False),
    (torch.float16, "float16", "vector", "lora", "hadamard", 5, 24, 64, 16, True),
    (torch.float16, "bfloat16", "lora", "none", "hadamard", 40, 17, 35, 3, False),
    (torch.float16, "float32", "none", "lora", "hadamard", 1, 24, 64, 1, True),
    (torch.float16, "bfloat16", "constant", "lora", "hadamard", 5, 24, 64, 3, True),
    (torch.float16, "float16", "lora", "lora", "matmul", 37, 24, 40, 3, True),
])  # fmt: skip
def test_through_the_kernels(dtype, stored, a, b, variant, m, n, k, rank, nested, poison):
    """backend("triton"): few tokens, whose kernel reads the codes, and more, through the workspace."""
    cfg = config(a, b, variant, rank=rank, dropout=0.25 if m > 5 else 0.0)
    stored = getattr(torch, stored)
    dense, packed = build(cfg, (m,), k, n, m != 5, dtype, size=0.1, nested=nested, stored=stored)
    check(dense, ours(packed, "triton"), "triton")


def test_what_decodes_a_weight_gets_no_gradient():
    """As somebody leaves it who lets every floating-point tensor of a model require one."""
    weight = quantize_weight(torch.randn(12, 64), "nf4")
    weight = QuantizedWeight(weight.packed, replace(weight.state, absmax=weight.state.absmax.requires_grad_()))
    x, c = torch.randn(3, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    glora_linear(x, weight, c=c).sum().backward()
    glora_wc(weight, c).sum().backward()
    assert torch.allclose(x.grad, dequantize(weight, torch.float32).sum(0).expand(3, 64), atol=1e-5)
    assert torch.allclose(c.grad, 4 * dequantize(weight, torch.float32).sum(0), atol=1e-5)
    assert weight.state.absmax.grad is None
