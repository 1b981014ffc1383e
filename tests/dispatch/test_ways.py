"""One computation, however it is looked at: selective checkpointing, torch.func, forward mode, tracing, batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import glora_kernels as gk
from glora_kernels.glora.op import dropout_seed, glora_linear
from glora_kernels.ops import grouped_lora_linear

ATEN = torch.ops.aten
K = 16
FORMS = [("none", "lora", "none"), ("vector", "lora", "vector"), ("vector", "none", "none"), ("lora", "lora", "lora"),
         ("constant", "vector", "none"), ("lora", "constant", "none"), ("none", "vector", "vector")]  # fmt: skip
forms = pytest.mark.parametrize("form", FORMS, ids=",".join)
four_bits = pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "4-bit"])
POLICIES = {
    "products": lambda ctx, op, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE if op in (ATEN.mm.default, ATEN.addmm.default) else CheckpointPolicy.PREFER_RECOMPUTE
    ),
    "everything": lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE,
    "nothing": lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE,
    "preferred": lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_SAVE,
}


def drawn(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def made(form, four_bit=False, dropout=0.0, variant="hadamard") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, K), nn.Tanh())
    if four_bit:
        model = gk.quantize(model, blocksize=32, target_modules=["0"])
    a, b, c = form
    drops = dropout if b == "lora" else 0.0
    return drawn(gk.inject(model, gk.GLoRAConfig(a, b, c, "vector", "none", rank=3, dropout=drops, variant=variant)))


class Attention(nn.Module):
    """q, k and v of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, K), nn.Linear(K, 8), nn.Linear(K, K)

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def siblings(dropout=0.0) -> nn.Module:
    torch.manual_seed(0)
    model = drawn(gk.inject(Attention(), gk.GLoRAConfig.lora(rank=3, alpha=6, dropout=dropout)))
    gk.fuse_siblings(model)
    return model


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model, x, call=None) -> dict[str, torch.Tensor]:
    """Gradients of one step, with the same dropout masks each time."""
    torch.manual_seed(3)
    model.zero_grad()
    x = x.clone().requires_grad_()
    (call or model)(x).square().sum().backward()
    return {name: p.grad for name, p in trained(model).items()} | {"x": x.grad}


def close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=0, atol=tolerance * float(value.abs().max())), name


MODELS = {
    "forms": [partial(made, form, q, 0.3) for form in FORMS for q in (False, True)],
    "product variant": [partial(made, ("lora", "lora", "vector"), False, 0.0, "matmul")],
    "siblings": [siblings, partial(siblings, 0.3)],
}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", MODELS)
def test_selective_checkpointing(kind, policy, allow):
    x = torch.randn(5, K)
    contexts = partial(create_selective_checkpoint_contexts, POLICIES[policy], allow_cache_entry_mutation=allow)
    for build in MODELS[kind]:
        model = build()
        expected = step(model, x)
        close(step(model, x, lambda x, m=model: checkpoint(m, x, use_reentrant=False, context_fn=contexts)), expected)


@forms
@four_bits
def test_shift_once_inside_a_selective_checkpoint(form, four_bit):
    model, x = made(form, four_bit), torch.randn(5, K)
    expected = step(model, x)

    def inside(x):
        with gk.shift_once(model):
            return model(x)

    contexts = partial(create_selective_checkpoint_contexts, POLICIES["everything"])
    close(step(model, x, lambda x: checkpoint(inside, x, use_reentrant=False, context_fn=contexts)), expected)


@forms
@four_bits
def test_torch_func(form, four_bit):
    model, x = made(form, four_bit), torch.randn(3, K)
    params = trained(model)
    assert torch.allclose(vmap(model)(x), model(x), atol=1e-5)
    expected = step(model, x)
    del expected["x"]

    def loss(params, x):
        return functional_call(model, params, (x,)).square().sum()

    close(grad(loss)(params, x), expected)
    close({n: g.sum(0) for n, g in vmap(grad(loss), (None, 0))(params, x).items()}, expected)
    jacobian = torch.autograd.functional.jacobian(model, x[0])
    for other in (jacrev(model)(x[0]), jacfwd(model)(x[0])):
        assert torch.allclose(other, jacobian, atol=1e-5)
    curvature = hessian(lambda x: model(x).square().sum())(x[0])
    assert torch.allclose(curvature, curvature.t(), atol=1e-4)
    assert curvature.abs().max() > 1e-3


@pytest.mark.parametrize("build", [*(partial(made, form) for form in FORMS), siblings])
def test_a_second_derivative_is_an_error_and_not_zero(build):
    """torch.autograd.functional takes zeros for what a gradient does not hang on."""
    model, x = build(), torch.randn(3, K)

    def loss(x):
        return model(x).square().sum()

    functional, ones = torch.autograd.functional, torch.ones(3, K)
    for call in (lambda: functional.hvp(loss, x, ones), lambda: functional.hessian(loss, x),
                 lambda: functional.jvp(model, x, ones)):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"differentiated once.*torch\.func"):
            call()
    assert functional.jacobian(model, x, create_graph=True).isfinite().all()


@forms
@four_bits
def test_forward_mode_and_tracing(form, four_bit):
    model, x, tangent = made(form, four_bit), torch.randn(3, K), torch.randn(3, K)
    expected = torch.autograd.functional.jacobian(model, x).flatten(2, 3).flatten(0, 1) @ tangent.flatten()
    assert torch.allclose(jvp(model, (x,), (tangent,))[1].flatten(), expected, atol=1e-5)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
    assert torch.allclose(y.tangent.flatten(), expected, atol=1e-5)
    traced = torch.jit.trace(model.eval(), x)
    assert torch.allclose(traced(2 * x), model(2 * x), atol=1e-5)


@forms
@four_bits
@pytest.mark.parametrize("frozen", [[], ["B_down", "A_down"]], ids=["all", "up only"])
def test_batched_gradients(form, four_bit, frozen):
    """`up only`: what forward keeps in the place of x serves a batch as well."""
    model, x = made(form, four_bit, 0.3), torch.randn(3, K)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in frozen:
            parameter.requires_grad_(False)
    for call in (model, lambda x: vmapped(model, x)):
        y, leaves, dys = call(x), list(trained(model).values()), torch.randn(4, 3, K)
        batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
        mapped = vmap(lambda dy, y=y, of=leaves: torch.autograd.grad(y, of, dy, retain_graph=True))(dys)
        for i, dy in enumerate(dys):
            alone = dict(enumerate(torch.autograd.grad(y, leaves, dy, retain_graph=True)))
            close({n: g[i] for n, g in enumerate(batched)}, alone)
            close({n: g[i] for n, g in enumerate(mapped)}, alone)
    model.eval()
    jacobian = partial(torch.autograd.functional.jacobian, model, x)
    assert torch.allclose(jacobian(vectorize=True), jacobian(), atol=1e-5)
    assert torch.allclose(jacobian(vectorize=True, strategy="forward-mode"), jacobian(), atol=1e-5)


def vmapped(model, x):
    """The registered operator's graph: forward runs while a mode watches."""
    with FlopCounterMode(display=False):
        return model(x)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_siblings(dropout):
    model, x = siblings(dropout), torch.randn(3, K)
    params = trained(model)
    expected = step(model, x)
    del expected["x"]

    def loss(params, x):
        torch.manual_seed(3)
        return functional_call(model, params, (x,)).square().sum()

    close(grad(loss)(params, x), expected)
    leaves, dys = list(params.values()), torch.randn(4, 3, 2 * K + 8)
    for call in (model, lambda x: vmapped(model, x)):
        y = call(x)
        batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
        mapped = vmap(lambda dy, y=y: torch.autograd.grad(y, leaves, dy, retain_graph=True))(dys)
        for i, dy in enumerate(dys):
            alone = dict(enumerate(torch.autograd.grad(y, leaves, dy, retain_graph=True)))
            close({n: g[i] for n, g in enumerate(batched)}, alone)
            close({n: g[i] for n, g in enumerate(mapped)}, alone)
    if not dropout:
        assert torch.allclose(vmap(model)(x), model(x), atol=1e-5)
        assert torch.allclose(torch.jit.trace(model.eval(), x)(2 * x), model(2 * x), atol=1e-5)


def test_shift_once_and_batched_gradients():
    for form in FORMS:
        model, x = made(form), torch.randn(3, K)
        with gk.shift_once(model):
            y = model(x)
            leaves, dys = list(trained(model).values()), torch.randn(4, 3, K)
            batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
            for i, dy in enumerate(dys):
                alone = dict(enumerate(torch.autograd.grad(y, leaves, dy, retain_graph=True)))
                close({n: g[i] for n, g in enumerate(batched)}, alone)


def test_make_fx_sees_one_node():
    model, x = made(("vector", "lora", "none")), torch.randn(3, K)
    graph = make_fx(model)(x)
    assert sum("glora_linear" in str(node.target) for node in graph.graph.nodes) == 1
    assert torch.allclose(graph(2 * x), model(2 * x), atol=1e-6)


@forms
def test_masks_of_torch_func(form):
    """One mask for the whole batch, or one for each entry, as `randomness` says."""
    model, x = made(form, dropout=0.5), torch.randn(1, K).expand(6, K)
    same, own = (vmap(model, randomness=kind)(x) for kind in ("same", "different"))
    assert torch.allclose(same, same[:1].expand_as(same))
    assert torch.allclose(own, own[:1].expand_as(own)) == (form[1] != "lora")


@forms
@four_bits
def test_nested_and_sparse_x(form, four_bit):
    layer = made(form, four_bit)[0]
    parts = [torch.randn(2, K), torch.randn(5, K)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        y = layer(x)
        assert y.is_nested
        assert y.layout == layout
        assert all(torch.allclose(piece, layer(part), atol=1e-6) for piece, part in zip(y.unbind(), parts, strict=True))
        sum(piece.square().sum() for piece in y.unbind()).backward()
        expected = step(layer, torch.cat(parts))["x"]
        assert torch.allclose(torch.cat(x.grad.unbind()), expected, atol=1e-4)
    for rows in (torch.randn(4, K).relu(), torch.randn(2, 4, K).relu()):
        x = rows.to_sparse().requires_grad_()
        layer(x).square().sum().backward()
        assert torch.allclose(layer(x), layer(rows), atol=1e-6)
        assert torch.allclose(x.grad.to_dense(), step(layer, rows)["x"], atol=1e-4)


def test_a_group_of_nested_inputs():
    weights, downs, ups = (
        [torch.randn(8, K), torch.randn(6, K)],
        torch.randn(2, K),
        [torch.randn(8, 2), torch.randn(6, 2)],
    )
    parts = [torch.randn(2, K), torch.randn(5, K)]
    ys = grouped_lora_linear(torch.nested.nested_tensor(parts), weights, downs, ups)
    for y, z in zip(ys, grouped_lora_linear(torch.cat(parts), weights, downs, ups), strict=True):
        assert torch.allclose(torch.cat(y.unbind()), z)


def test_a_seed_is_drawn_where_torch_func_asks_for_it():
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: x + dropout_seed(x.device))(torch.zeros(2))


def test_a_factor_that_outlived_its_transform():
    """What torch.func wrapped, used after it: the gradient is the tensor's inside."""
    up, down, kept = torch.randn(16, 4, requires_grad=True), torch.randn(4, 32, requires_grad=True), []
    torch.func.grad(lambda u: (kept.append(u), u.sum())[1])(up)
    x, weight = torch.randn(5, 32), torch.randn(16, 32)
    with gk.backend("eager"):
        found, wanted = (
            torch.autograd.grad(glora_linear(x, weight, b_up=u, b_down=down).square().sum(), up) for u in (kept[0], up)
        )
    torch.testing.assert_close(found, wanted)
