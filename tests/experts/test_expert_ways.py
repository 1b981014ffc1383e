"""However a call of `ops.expert_glora_linear` is looked at, it is the equation: torch.func, compilers, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from expert_problems import BIG, FORMS, problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from glora_kernels.ops import expert_glora_linear
from glora_kernels.spec import GLoRAConfig

pytestmark = pytest.mark.usefixtures("poison")
forms = pytest.mark.parametrize("form", FORMS)


@forms
def test_torch_func(form):
    p = problem(FORMS[form])
    truth, leaves = p.literal(), p.leaves()
    y, pull = torch.func.vjp(p.call, leaves)
    p.exact({"y": y, **pull(p.dy)[0]})
    found = torch.func.grad(lambda leaves: (p.call(leaves) * p.dy).sum())(leaves)
    p.exact({"y": truth["y"], **found})
    for name, own in leaves.items():
        call = lambda own, name=name: p.call({name: own})  # noqa: E731
        tangent = torch.randn_like(own)
        _, forward = torch.func.jvp(call, (own,), (tangent,))
        assert torch.allclose((forward * p.dy).sum(), (tangent * truth[name]).sum())
        if name != "x" or form != "base":
            pair = torch.stack([own, 2 * own])
            ys = torch.func.vmap(call)(pair)
            assert all(torch.allclose(y, call(one)) for y, one in zip(ys, pair, strict=True))
    functional = torch.autograd.functional
    jacobian = functional.jacobian(lambda x: p.call({"x": x}), p.x)
    of_x = lambda x: p.call({"x": x})  # noqa: E731
    for make in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(make(of_x)(p.x), jacobian)
    assert torch.allclose(functional.jacobian(of_x, p.x, vectorize=True), jacobian)
    with pytest.raises(ValueError, match=r"index must be one for the whole batch of torch\.func\.vmap"):
        torch.func.vmap(lambda index: replace(p, where={"index": index}).call())(p.where["index"].expand(2, 7, 2))


@forms
def test_derivatives_by_differences_and_no_second_one(form):
    p = problem(FORMS[form], n=3, k=4, index=[[0, 3], [1, -1], [3, 1]])
    names = [*p.leaves()]
    leaves = tuple(own.requires_grad_() for own in p.leaves().values())
    call = lambda *leaves: p.call(dict(zip(names, leaves, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, check_batched_grad=True, check_forward_ad=True, fast_mode=True)
    for leaf in leaves:
        (first,) = torch.autograd.grad(call(*leaves).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiated once.*torch\.func"):
            first.sum().backward()


@forms
def test_batches_of_gradients(form):
    """Also where forward has kept h and σ in the place of x."""
    p = problem(FORMS[form])
    truth = p.literal()
    for frozen in ((), ("x", "b_down", "a")):
        leaves = {name: own.detach().requires_grad_(name not in frozen) for name, own in p.leaves().items()}
        trained = {name: own for name, own in leaves.items() if own.requires_grad}
        both = torch.stack([p.dy, -2 * p.dy])
        found = torch.autograd.grad(p.call(leaves), [*trained.values()], both, is_grads_batched=True)
        for name, own in zip(trained, found, strict=True):
            assert torch.allclose(own, torch.stack([truth[name], -2 * truth[name]])), name


class Calls(TorchDispatchMode):
    """The calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "glora_kernels":
            self.seen.append((function, args))
        return function(*args, **(kwargs or {}))


WHOLE = [name for name, own in FORMS.items() if own.A != "lora" or own.variant == "matmul"]
"""What is one node of a graph; of a hadamard A=lora each expert is one."""


@pytest.mark.parametrize(
    ("form", "dtype"),
    zip(WHOLE, [torch.bfloat16, torch.float32, torch.bfloat16, torch.float64, torch.float32], strict=True),
)
def test_pytorch_has_no_complaint_of_the_operators(form, dtype):
    p = problem(FORMS[form], dtype=dtype, index=[[0, 3], [3, -1]], n=6, k=8)
    with Calls() as calls:
        found = p.ours()
    p.exact(found) if dtype == torch.float64 else p.check(found, dtype)
    names = [function.__name__ for function, _ in calls.seen]
    one = ["expert_glora_linear.default", "expert_glora_linear_backward.default"]
    assert [name for name in names if "wc" not in name] == one
    for function, args in calls.seen:
        forward = "backward" not in function.__name__
        frozen = 1 if "linear" in function.__name__ else 0  # W
        own = [
            arg.detach().requires_grad_(forward and arg.is_floating_point() and i != frozen)
            if isinstance(arg, Tensor) else arg
            for i, arg in enumerate(args)
        ]  # fmt: skip
        torch.library.opcheck(function, own)


@pytest.mark.parametrize("form", WHOLE)
def test_traced_pretended_and_exported(form):
    p = problem(FORMS[form])

    def call(x, index):
        return replace(p, where={"index": index}).call({"x": x})

    index, fewer = p.where["index"], (p.x[:4], p.where["index"][:4].flip(1))
    graph = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(p.x, index)
    assert sum("expert_glora_linear" in str(node.target) for node in graph.graph.nodes) == 1
    assert torch.allclose(graph(*fewer), call(*fewer))
    module = torch.nn.Module()
    module.forward = call
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(module, (p.x, index), dynamic_shapes=(rows, rows))
    assert torch.allclose(program.module()(*fewer), call(*fewer))
    mode = FakeTensorMode()
    fake = replace(p, where={"index": mode.from_tensor(index)}, weight=mode.from_tensor(p.weight))
    with mode:
        y = fake.call({name: mode.from_tensor(own) for name, own in p.leaves().items()})
    assert (y.shape, y.dtype) == (p.dy.shape, p.dy.dtype)


def test_a_trace_of_torch_jit_is_refused():
    """It would take the sizes of groups for constants, and answer wrongly for another index."""
    p = problem(FORMS["LoRA"])
    with pytest.raises(
        RuntimeError, match=r"torch\.jit\.trace would keep how many rows.*torch\.compile or torch\.export"
    ):
        torch.jit.trace(lambda x, index: replace(p, where={"index": index}).call({"x": x}), (p.x, p.where["index"]))


@pytest.mark.parametrize("form", [*BIG])
def test_compiled_into_one_graph_for_any_tokens(form):
    torch._dynamo.reset()
    p = problem(FORMS[form])
    counter = CompileCounterWithBackend("aot_eager")
    numbers = {"scale": p.config.scale, "variant": p.config.variant}

    @torch.compile(fullgraph=True, backend=counter)
    def run(x, bias, adapters, index):
        return expert_glora_linear(x, p.weight, bias, {**adapters, **numbers}, index=index)

    for index in ([[0, 3], [3, -1]] * 4, [[1, 1]] * 7, [[-1, -1]] * 13, [[2, 0]] * 17):  # no other size is like these
        q = replace(problem(FORMS[form], index=index), weight=p.weight)

        def call(leaves, index=q.where["index"]):
            for tensor in (leaves["x"], index):
                torch._dynamo.mark_dynamic(tensor, 0)
            return run(leaves["x"], leaves["bias"], {name: leaves[name] for name in q.adapters}, index)  # noqa: B023

        q.exact(q.ours(call))
    assert counter.frame_count == 1


M, K, N, E, R = 14, 20, 11, 4, 3


@pytest.mark.parametrize(("config", "forward", "backward"), [
    (GLoRAConfig("none", "none"), 2 * M * N * K, 2 * M * N * K),
    (GLoRAConfig.lora(R), 2 * M * (N * K + R * (N + K)), 2 * M * (N * K + 2 * R * (N + K))),
    (GLoRAConfig("none", "none", "vector"), 2 * M * N * K + 2 * E * N * K, 2 * M * N * K + 2 * E * N * K),
    (GLoRAConfig("lora", "none", rank=R, variant="matmul"), 2 * M * (N * K + R * (N + K)) + 2 * E * N * K * R,
     2 * M * (N * K + 2 * R * (N + K)) + 2 * E * N * K * R),
])  # fmt: skip
def test_flops_are_counted(config, forward, backward):
    p = problem(config)
    leaves = {name: own.requires_grad_() for name, own in p.leaves().items()}
    with FlopCounterMode(display=False) as counter:
        y = p.call(leaves)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.backward(p.dy)
    assert counter.get_total_flops() == backward


POLICIES = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_SAVE)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", BIG)
def test_selective_checkpointing(form, policy):
    p = problem(replace(FORMS[form], dropout=0.3) if FORMS[form].B == "lora" else FORMS[form])
    contexts = partial(create_selective_checkpoint_contexts, lambda *args, **kwargs: policy)

    def twice(leaves):
        return p.call(leaves).sinh().asinh()

    p.exact(p.ours(lambda leaves: checkpoint(twice, leaves, use_reentrant=False, context_fn=contexts)), 1e-9)
