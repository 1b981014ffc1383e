"""The factored path: which gradients, which memory, which shapes, which errors. Float64 unless it is about dtypes."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import helpers
import pytest
import torch
from helpers import check, exact, layer, ours, problem, thinned, train_only, truth

from glora_kernels.glora import eager as eager_path
from glora_kernels.glora.call import Supports, shift
from glora_kernels.glora.op import dropout_seed
from glora_kernels.ops import glora_linear, glora_wc
from glora_kernels.reference.cases import FORMS
from glora_kernels.runtime import workspace
from glora_kernels.spec import GLoRAConfig

forms = pytest.mark.parametrize(("a", "b", "variant"), FORMS)
pytestmark = pytest.mark.usefixtures("poison")


def config(a, b, variant="hadamard", cde="none", **more):
    return helpers.config(a, b, variant, cde, **more)


@forms
def test_every_subset_of_gradients(a, b, variant):
    dropout = 0.25 if b == "lora" else 0.0
    p = problem(config(a, b, variant, dropout=dropout), (5,), 20, 11, bias=True)
    for size in range(len(p.trained) + 1):
        for subset in itertools.combinations(sorted(p.trained), size):
            some = train_only(p, subset)
            exact(some, ours(some))


@pytest.mark.parametrize("trained", [["A"], ["A", "B_down"], ["A", "x"], ["A", "B_up", "B_down", "x", "bias"]])
@pytest.mark.parametrize("form", ["vector", "constant"])
@pytest.mark.parametrize("a", [-1.0, -0.9999, -1.0001, -1 + 2.0**-7])
@pytest.mark.parametrize("bias", [True, False])
def test_gradient_of_a_where_one_plus_a_is_near_zero(form, a, trained, bias):
    p = problem(config(form, "lora"), (9,), 20, 11, bias)
    p.params["A"][::2] = a
    exact(train_only(p, trained), ours(train_only(p, trained)), 1e-9)


@pytest.mark.parametrize(("others", "a", "form", "adapters", "dtype"), thinned(3, itertools.product(
    [["B_down"], []], [-1.0, -0.99, -0.97, -0.9, -0.7, -0.55, -0.45], ["vector", "constant"], [torch.float32, None],
    [torch.float32, torch.bfloat16],
)))  # fmt: skip
def test_gradient_of_a_in_few_bits(form, a, others, dtype, adapters):
    """Whether anything else keeps x or not, dA is as good as from Z."""
    p = problem(config(form, "lora"), (29,), 40, 45, True, dtype, adapters, size=0.1)
    p = train_only(p, ["A", *others])
    p.params["A"][::3] = a
    check(p, ours(p), "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["vector", "constant"])
def test_gradient_of_a_beside_a_large_bias(form, dtype):
    """dA = Σ dy∘Z has no bias in it: a large one (Qwen's k_proj has entries above 100) must not cost it its digits."""
    p = problem(config(form, "none"), (29,), 40, 45, True, dtype)
    p.bias.mul_(200)
    check(p, ours(p), "eager")


@pytest.mark.parametrize(("form", "layout", "dtype"), thinned(3, itertools.product(
    FORMS, ["contiguous", "strided"], [torch.float32, torch.bfloat16]
)))  # fmt: skip
def test_in_few_bits(form, dtype, layout):
    a, b, variant = form
    p = problem(config(a, b, variant, "vector"), (3, 11), 70, 45, True, dtype, layout=layout, size=0.1)
    check(p, ours(p), "eager")


@pytest.mark.parametrize(("a", "c", "d", "e", "bias", "dtype"), thinned(5, itertools.product(
    ["none", "vector"], ["lora", "vector", "none"], ["vector", "constant", "none"], ["vector", "constant", "none"],
    [True, False], [torch.float64, torch.bfloat16],
)))  # fmt: skip
def test_every_form_of_c_d_and_e(a, c, d, e, bias, dtype):
    """Each of them alone and beside the others, with a gradient and without."""
    p = problem(GLoRAConfig(a, "none", c, d, e, rank=3), (29,), 40, 45, bias, dtype, size=0.1)
    for trained in (p.trained, p.trained - {"bias"}, frozenset({"x", "bias"}), p.trained - {"C", "C_up", "D"}):
        some = train_only(p, trained & p.leaves().keys())
        got = ours(some)
        if dtype == torch.float64:
            exact(some, got)
        else:
            check(some, got, "eager")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["lora", "vector"])
def test_wc_is_not_rounded_to_16_bits(form, dtype):
    """Neither W·c, nor c = C_up·C_down, nor a gradient of fp32 factors."""
    config = GLoRAConfig("none", "none", form, "none", "none", rank=3)
    p = problem(config, (5,), 70, 450, False, dtype, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in p.params.items()}
    double = {n: t.detach().double().requires_grad_() for n, t in p.params.items()}
    g = torch.randn(450, generator=torch.Generator().manual_seed(0))
    for weight in (p.weight, p.weight.t().contiguous().t()):
        got = glora_wc(weight, leaves.get("C"), c_up=leaves.get("C_up"), c_down=leaves.get("C_down"))
        c = double["C_up"] @ double["C_down"] if form == "lora" else double["C"][:, None]
        expected = (weight.double() @ c).squeeze(1)
        assert got.dtype == torch.float32
        values = torch.autograd.grad(got, list(leaves.values()), g)
        truths = torch.autograd.grad(expected, list(double.values()), g.double())
        for value, true in zip((got, *values), (expected, *truths), strict=True):
            assert (value - true).abs().max() < 1e-5 * true.abs().max()


def test_shift_is_the_bias_itself_where_nothing_changes_it():
    bias = torch.zeros(11)
    assert shift(Supports(bias=bias), torch.bfloat16) is bias
    assert shift(Supports(), torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shift_over_16_bits_keeps_a_small_e(dtype):
    beta = shift(Supports(bias=torch.ones(11, dtype=dtype), e=torch.full((11,), 2.0**-14).to(dtype)), dtype)
    assert beta.dtype == torch.float32
    assert torch.equal(beta, torch.full((11,), 1 + 2.0**-14))


@pytest.mark.parametrize(("form", "lead"), thinned(3, itertools.product(
    FORMS, [(), (1,), (4,), (2, 3), (2, 3, 2), (0,), (2, 0)]
)))  # fmt: skip
def test_leading_sizes(form, lead):
    a, b, variant = form
    p = problem(config(a, b, variant, "vector"), lead, 20, 11)
    exact(p, ours(p))


@forms
def test_strides(a, b, variant):
    p = problem(config(a, b, variant, "vector"), (3, 5), 20, 11, layout="strided")
    exact(p, ours(p))
    p.dy = torch.ones((), dtype=torch.float64).expand(p.dy.shape)
    exact(p, ours(p))


@forms
def test_sum_backward(a, b, variant):
    p = problem(config(a, b, variant, "vector"), (3, 5), 20, 11)
    leaves = {n: t.requires_grad_() for n, t in p.leaves().items()}
    layer(leaves["x"], p.weight, leaves["bias"], {n: leaves[n] for n in p.params}, p.config).sum().backward()
    p.dy = torch.ones_like(p.dy)
    for name, value in truth(p)[0].items():
        assert name == "y" or torch.allclose(leaves[name].grad, value), name


def saved(p):
    """Every tensor that autograd keeps of a forward, adapters and W left out."""
    kept = []
    leaves = {name: t.detach().requires_grad_(name in p.trained) for name, t in p.leaves().items()}
    known = {
        t.data_ptr() for t in (p.weight, *(leaves[n] for n in (*p.params, *(["bias"] if p.bias is not None else []))))
    }

    def pack(t):
        if t.data_ptr() not in known:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(leaves["x"], p.weight, leaves.get("bias"), {n: leaves[n] for n in p.params}, p.config, p.seed)
    return kept, leaves["x"], y


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_weight_is_saved(a, b, variant, dtype):
    p = problem(config(a, b, variant, "vector"), (2,), 40, 50, dtype=dtype, size=0.1)
    kept, _, _ = saved(p)
    assert kept or (a, b) == ("none", "none")
    assert all(t.numel() < p.weight.numel() // 4 for t in kept), [t.shape for t in kept]


@pytest.mark.parametrize("a", ["none", "vector", "constant"])
def test_lora_fa_keeps_x_for_a_alone(a):
    """B_down frozen: nothing multiplies x, and only a trained A keeps it, for rows where y holds little of Z."""
    p = problem(config(a, "lora"), (9,), 40, 50)
    p = train_only(p, p.trained - {"B_down"})
    kept, x, _ = saved(p)
    assert any(t.data_ptr() == x.data_ptr() for t in kept) == (a != "none")
    assert sum(t.numel() for t in kept) <= 9 * 3 + (9 * (40 + 50) if a != "none" else 0)
    exact(p, ours(p))


def test_lora_keeps_x_and_m_r_only():
    p = problem(config("none", "lora"), (9,), 40, 50)
    kept, x, _ = saved(p)
    assert sorted((t.data_ptr() == x.data_ptr(), tuple(t.shape)) for t in kept) == [(False, (9, 3)), (True, (9, 40))]


@pytest.mark.parametrize("is_down_trained", [True, False])
def test_the_mask_is_kept_where_x_is_and_else_made_again(is_down_trained, monkeypatch):
    made = []
    real = eager_path.keep_mask
    monkeypatch.setattr(eager_path, "keep_mask", lambda *args: made.append(args) or real(*args))
    p = problem(config("none", "lora", dropout=0.25), (9,), 40, 50)
    p = p if is_down_trained else train_only(p, p.trained - {"B_down"})
    kept, _, y = saved(p)
    assert [tuple(t.shape) for t in kept if t.dtype == torch.bool] == ([(9, 40)] if is_down_trained else [])
    y.sum().backward()
    assert len(made) == (1 if is_down_trained else 2)
    exact(p, ours(p))


def test_frozen_adapters_keep_no_activation():
    """Only dx is wanted: dropout's mask is made again, not stored."""
    p = train_only(problem(config("none", "lora", dropout=0.25), (9,), 40, 50), ["x"])
    kept, _, _ = saved(p)
    assert all(t.numel() <= 1 for t in kept), [t.shape for t in kept]
    exact(p, ours(p))


@forms
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradcheck(a, b, variant, dropout):
    if dropout and b != "lora":
        dropout = 0.1  # without a low-rank B it has no effect, and must have none
    p = problem(config(a, b, variant, dropout=dropout), (4,), 6, 5)
    names = sorted(p.leaves())
    leaves = [p.leaves()[n].requires_grad_() for n in names]

    def function(*values):
        of = dict(zip(names, values, strict=True))
        return layer(of["x"], p.weight, of["bias"], {n: of[n] for n in p.params}, p.config, p.seed)

    assert torch.autograd.gradcheck(function, leaves)


def test_y_overwritten_in_place():
    """A trained vector A reads y in backward; with A none nobody does, and y may be changed."""
    p = problem(config("vector", "none"), (9,), 20, 11)
    x, a = p.x.requires_grad_(), p.params["A"].requires_grad_()
    y = glora_linear(x, p.weight, p.bias, a=a)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="overwritten in place") as caught:
        y.sum().backward()
    assert "modified by an inplace operation" in str(caught.value.__cause__)
    for lead in ((9,), (3, 3)):  # of a batch of sequences too, as nn.Linear's own
        x.grad = None
        y = glora_linear(x.view(*lead, 20), p.weight, p.bias)
        y.mul_(2)
        y.sum().backward()
        assert torch.allclose(x.grad, (2 * p.weight.sum(0)).expand(9, 20))


def test_seed_overwritten_in_place():
    """The mask of backward is the mask of forward, or an error: never a third one (the seed is not copied)."""
    p = problem(config("none", "lora", dropout=0.5), (9,), 20, 11)
    x = p.x.detach().requires_grad_()
    y = layer(x, p.weight, p.bias, p.params, p.config, p.seed)
    expected = truth(p)[0]["x"]
    p.seed.add_(1)
    try:
        y.backward(p.dy)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert torch.allclose(x.grad, expected)


def test_the_seed_is_drawn_on_the_host():
    """Bit 62 is always set, whatever the device; a seed of CPU memory serves an x of any."""
    torch.manual_seed(1)
    seeds = [dropout_seed(torch.device(device)) for device in ("cpu", "meta", "cuda") for _ in range(50)]
    assert {(s.device.type, s.dtype, s.shape) for s in seeds} == {("cpu", torch.int64, (1,))}
    assert all(s.item() >> 62 == 1 for s in seeds)
    assert len({s.item() for s in seeds}) == len(seeds)
    torch.manual_seed(1)
    assert dropout_seed(torch.device("cuda")).equal(seeds[0]), "it follows torch.manual_seed"
    glora_linear(
        X.to("meta"), W.to("meta"), **{**LORA, "b_up": UP.to("meta"), "b_down": DOWN.to("meta")}, seed=seeds[0]
    )


def test_the_seed_of_traced_code_is_drawn_on_the_device():
    """Drawn while tracing on the host, it would be a constant of the graph: one mask for ever."""
    torch._dynamo.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    draw = torch.compile(lambda x: dropout_seed(x.device), backend=record, fullgraph=True)
    assert draw(torch.zeros(1, device="meta")).device.type == "meta"
    first, second = draw(X), draw(X)
    assert first >> 62 == second >> 62 == 1
    assert first != second
    assert len(graphs) == 2


def test_second_derivatives_are_refused():
    p = problem(config("vector", "lora"), (9,), 20, 11)
    x = p.x.requires_grad_()
    y = layer(x, p.weight, p.bias, {n: t.requires_grad_() for n, t in p.params.items()}, p.config)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


W, X = torch.zeros(11, 20), torch.zeros(4, 20)
UP, DOWN, SEED = torch.zeros(11, 3), torch.zeros(3, 20), torch.zeros(1, dtype=torch.int64)
LORA = {"b_up": UP, "b_down": DOWN, "dropout_p": 0.5}


@pytest.mark.parametrize(("error", "words", "args", "kwargs"), [
    (ValueError, ("20", "(4, 19)"), (torch.zeros(4, 19), W), {}),
    (ValueError, ("20", "()"), (torch.zeros(()), W), {}),
    (TypeError, ("float64", "float32"), (X.double(), W), {}),
    (TypeError, ("int64",), (X.long(), W), {}),
    (ValueError, ("frozen", "requires_grad_(False)"), (X, torch.zeros(11, 20, requires_grad=True)), {}),
    (ValueError, ("seed", "0.1"), (X, W), {"b_up": UP, "b_down": DOWN, "dropout_p": 0.1}),
    (ValueError, ("weight", "meta"), (X, W.to("meta")), {}),
    (ValueError, ("b_up", "meta"), (X, W), {"b_up": UP.to("meta"), "b_down": DOWN}),
    (ValueError, ("bias", "meta"), (X, W, torch.zeros(11, device="meta")), {}),
    (ValueError, ("e", "meta"), (X, W, torch.zeros(11)), {"e": torch.zeros(11, device="meta")}),
    (ValueError, ("matmul",), (X, W), {"a": torch.zeros(11), "variant": "matmul"}),
    (ValueError, ("variant", "product"), (X, W), {"a_up": UP, "a_down": DOWN, "variant": "product"}),
    (ValueError, ("dropout_p", "1.0"), (X, W), {"b_up": UP, "b_down": DOWN, "dropout_p": 1.0, "seed": SEED}),
    (ValueError, ("dropout_p", "-0.5"), (X, W), {"b_up": UP, "b_down": DOWN, "dropout_p": -0.5, "seed": SEED}),
    (ValueError, ("b_down",), (X, W), {"b_up": UP}),
    (ValueError, ("b_up",), (X, W), {"b_down": DOWN}),
    (ValueError, ("a_down",), (X, W), {"a_up": UP}),
    (ValueError, ("a_up",), (X, W), {"a": torch.zeros(11), "a_up": UP, "a_down": DOWN}),
    (ValueError, ("b_up",), (X, W), {"b": torch.zeros(11), "b_up": UP, "b_down": DOWN}),
    (ValueError, ("bias", "(5,)"), (X, W, torch.zeros(5)), {}),
    (ValueError, ("wc", "(1,)"), (X, W), {"wc": torch.zeros(1)}),
    (ValueError, ("d", "bias"), (X, W), {"d": torch.zeros(11)}),
    (ValueError, ("d", "(20,)"), (X, W, torch.zeros(11)), {"d": torch.zeros(20)}),
    (ValueError, ("e", "(20,)"), (X, W, torch.zeros(11)), {"e": torch.zeros(20)}),
    (ValueError, ("seed", "int32"), (X, W), {**LORA, "seed": SEED.int()}),
    (ValueError, ("seed", "(2,)"), (X, W), {**LORA, "seed": torch.zeros(2, dtype=torch.int64)}),
    (ValueError, ("seed", "meta", "cpu"), (X, W), {**LORA, "seed": SEED.to("meta")}),
    (ValueError, ("a", "(5,)"), (X, W), {"a": torch.zeros(5)}),
    (ValueError, ("b_up", "(5, 3)"), (X, W), {"b_up": torch.zeros(5, 3), "b_down": DOWN}),
    (ValueError, ("b_down", "(4, 20)"), (X, W), {"b_up": UP, "b_down": torch.zeros(4, 20)}),
    (ValueError, ("a_down", "(3, 11)"), (X, W), {"a_up": UP, "a_down": torch.zeros(3, 11)}),
    (ValueError, ("a_up", "(11, 3)"), (X, W), {"a_up": UP, "a_down": DOWN, "variant": "matmul"}),
])  # fmt: skip
@pytest.mark.parametrize("route", ["eager", "triton"])
def test_errors(error, words, args, kwargs, route):
    """Wrong arguments are refused before a kernel reads past the end of one."""
    from glora_kernels.runtime.routes import backend

    with backend(route), pytest.raises(error) as raised:
        glora_linear(*args, **kwargs)
    assert all(word in str(raised.value) for word in words), raised.value


C_UP, C_DOWN = torch.zeros(20, 3), torch.zeros(3, 1)


@pytest.mark.parametrize(("words", "args", "kwargs"), [
    (("c_up", "c_down"), (W,), {}),
    (("c", "(11,)"), (W, torch.zeros(11)), {}),
    (("c", "(1,)"), (W, torch.zeros(1)), {}),
    (("c", "meta"), (W, torch.zeros(20, device="meta")), {}),
    (("c_down", "meta"), (W,), {"c_up": C_UP, "c_down": C_DOWN.to("meta")}),
    (("c_down", "missing"), (W,), {"c_up": C_UP}),
    (("c_up", "two forms"), (W, torch.zeros(20)), {"c_up": C_UP, "c_down": C_DOWN}),
    (("(20, R)", "(11, 3)"), (W,), {"c_up": UP, "c_down": C_DOWN}),
    (("(R, 1)", "(3, 20)"), (W,), {"c_up": C_UP, "c_down": DOWN}),
])  # fmt: skip
def test_errors_of_wc(words, args, kwargs):
    with pytest.raises(ValueError) as raised:
        glora_wc(*args, **kwargs)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_frozen_weight_may_be_trained_elsewhere_under_no_grad():
    with torch.no_grad():
        glora_linear(X, torch.zeros(11, 20, requires_grad=True))


@forms
def test_autocast(a, b, variant):
    """fp32 x, W and adapters: y in bf16, gradients in fp32, and no bf16 copy of W is kept."""
    p = problem(config(a, b, variant, "vector"), (5,), 48, 40, dtype=torch.float32, size=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        kept, _, y = saved(p)
    assert y.dtype == torch.bfloat16
    assert all(t.numel() < p.weight.numel() for t in kept)
    check(p, ours(p, autocast=torch.bfloat16), "eager", autocast=torch.bfloat16)


def test_autocast_leaves_float64_alone():
    p = problem(config("vector", "lora"), (5,), 20, 11)
    exact(p, ours(p, autocast=torch.bfloat16))


def test_workspace_is_reused():
    p = problem(config("lora", "none"), (5,), 20, 11)
    ours(p)
    first = workspace.workspace_like(p.weight, torch.float64).data_ptr()
    ours(p)
    assert workspace.workspace_like(p.weight, torch.float64).data_ptr() == first
    assert workspace.workspace_like(p.weight[:5], torch.float32).data_ptr() == first


def test_workspace_is_each_threads_own():
    here = workspace.workspace_like(W, torch.float32)
    there = []
    thread = threading.Thread(target=lambda: there.append(workspace.workspace_like(W, torch.float32)))
    thread.start()
    thread.join()
    assert there[0].data_ptr() != here.data_ptr()


def test_inference_before_training():
    """A workspace made in inference mode must serve training afterwards."""
    p = problem(config("lora", "lora"), (5,), 20, 11)
    workspace.release()
    with torch.inference_mode():
        layer(p.x, p.weight, p.bias, p.params, p.config)
    exact(p, ours(p))


def test_fake_tensors_leave_no_trace():
    """A dry run under FakeTensorMode (memory estimators do it) must not leave a fake workspace to the next call."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    p = problem(config("lora", "lora"), (5,), 20, 11)
    workspace.release()
    try:
        with FakeTensorMode() as mode:
            fake = {n: mode.from_tensor(t) for n, t in p.leaves().items()}
            params = {n: fake[n] for n in p.params}
            y = layer(fake["x"], mode.from_tensor(p.weight), fake["bias"], params, p.config)
            assert y.shape == p.dy.shape
        exact(p, ours(p))
    finally:
        workspace.release()


def test_threads():
    problems = [problem(config(a, b, v, "vector"), (9,), 20 + i, 11 + i, seed=i) for i, (a, b, v) in enumerate(FORMS)]
    with ThreadPoolExecutor(4) as pool:
        for p, got in zip(problems * 5, pool.map(ours, problems * 5), strict=True):
            exact(p, got)


def test_sums_over_thousands_of_rows_lose_no_digit():
    """Of fp32 gradients that are one sum over all rows of x, or of W: a BLAS adds row after row to one number."""
    p = problem(config("none", "vector", cde="vector"), (4096,), 48, 4096, False, torch.float32)
    p = train_only(p, ["B", "C", "E"])
    p.x += 0.5
    p.dy += 0.5
    p.weight.abs_()
    got, (values, _) = ours(p), truth(p)
    for name in p.trained:
        error = (got[name].double() - values[name]).abs().max() / values[name].abs().max()
        assert error < 8 * torch.finfo(torch.float32).eps, name
