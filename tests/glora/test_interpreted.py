"""The Triton kernels against the truth, through the operators: interpreted on a CPU, for real on a GPU."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers import check, ours, problem, same, thinned, train_only, truth

from glora_kernels.ops import glora_linear
from glora_kernels.reference.cases import AWKWARD, FORMS
from glora_kernels.runtime import routes
from glora_kernels.runtime.routes import backend
from glora_kernels.spec import GLoRAConfig

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("poison")


def config(a: str, b: str, variant: str = "hadamard", rank: int = 4, dropout: float = 0.0, cde: bool = True):
    forms = ("vector", "vector", "vector") if cde else ("none", "none", "none")
    alpha = 0.6 * rank if b == "lora" else None
    return GLoRAConfig(a, b, *forms, rank=rank, alpha=alpha, dropout=dropout, variant=variant)


def covering():
    """Every form meets every dtype; shapes and layouts go round, so that each meets every dtype and form of A, B."""
    for i, ((a, b, variant), (j, dtype)) in enumerate(itertools.product(FORMS, enumerate(DTYPES))):
        shape = AWKWARD[(i + i // 15 + j) % len(AWKWARD)]
        yield a, b, variant, dtype, shape, ("contiguous", "strided")[(i // 2) % 2], (i // 3) % 4 != 0


def ids(case) -> str:
    a, b, variant, dtype, (lead, k, n, r), layout, bias = case
    m = "x".join(map(str, lead))
    return f"{variant}-{a}-{b}-{str(dtype)[6:]}-M{m}K{k}N{n}R{r}-{layout}{'' if bias else '-nobias'}"


@pytest.mark.parametrize("case", thinned(7, covering()), ids=ids)
def test_against_truth(case, device):
    a, b, variant, dtype, (lead, k, n, r), layout, bias = case
    p = problem(config(a, b, variant, r), lead, k, n, bias, dtype, device=device, layout=layout, size=0.1)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("a", "b", "variant"), FORMS)
def test_without_c_d_e_and_bias(a, b, variant, device):
    """β absent: the kernels must not read one."""
    p = problem(config(a, b, variant, cde=False), (9,), 20, 11, False, torch.float32, device=device)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a", "variant"), [(f, "hadamard") for f in ("lora", "vector", "constant", "none")] +
                         [("lora", "matmul")])  # fmt: skip
def test_dropout(a, variant, dtype, device):
    p = problem(config(a, "lora", variant, 5, dropout=0.25), (41,), 70, 45, True, dtype, device=device)
    assert 0.6 < p.keep().double().mean() < 0.9
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize("how", ["triton", "eager"])
@pytest.mark.parametrize(("a", "route"), [("lora", "fused"), ("none", "fused"), ("none", "library")])
def test_columns_of_a_wider_matrix_have_its_mask(a, route, how, device, monkeypatch):
    """y is a sum over parts of the columns of x and W, and what belongs to a column has the gradient of the whole."""
    monkeypatch.setattr(routes, "product_route", lambda *args, **kwargs: route)
    p = problem(config(a, "lora", rank=5, dropout=0.4, cde=False), (41,), 72, 45, False, torch.float32, device=device)
    names = {"A_up": "a_up", "A_down": "a_down", "B_up": "b_up", "B_down": "b_down"}

    def run(columns):
        def own(name, tensor):
            return (tensor[..., columns] if name.endswith("_down") else tensor).clone().requires_grad_()

        leaves = {"x": own("x_down", p.x), **{name: own(name, tensor) for name, tensor in p.params.items()}}
        given = {names[name]: tensor for name, tensor in leaves.items() if name != "x"}
        with backend(how):
            y = glora_linear(
                leaves["x"], p.weight[:, columns], **given, scale=p.config.scale, dropout_p=0.4, seed=p.seed,
                columns_before=columns.start,
            )  # fmt: skip
            y.backward(p.dy)
        return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}

    y, grads = run(slice(0, 72))
    (left, left_grads), (right, right_grads) = run(slice(0, 24)), run(slice(24, 72))
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=2e-5)  # sums of fp32 in another order
    close(left + right, y)
    for name, grad in grads.items():
        parts = left_grads[name], right_grads[name]
        whole = name == "x" or name.endswith("_down")
        close(torch.cat(parts, -1) if whole else sum(parts), grad)


def test_kernels_refuse_columns_that_split_a_group_of_the_mask(device):
    p = problem(config("none", "lora", dropout=0.4, cde=False), (8,), 16, 8, False, torch.float32, device=device)
    up, down = p.params["B_up"], p.params["B_down"]
    with backend("triton"), pytest.raises(RuntimeError, match="a multiple of 8 must come before it, got 12"):
        glora_linear(p.x, p.weight, b_up=up, b_down=down, dropout_p=0.4, seed=p.seed, columns_before=12)
    with pytest.raises(ValueError, match="columns_before must be a number of columns, 0 or more; got -8"):
        glora_linear(p.x, p.weight, b_up=up, b_down=down, dropout_p=0.4, seed=p.seed, columns_before=-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_in_fp32(dtype, device):
    """Adapters keep their fp32 over a 16-bit base, and so do their gradients."""
    for a, b, variant in (("vector", "lora", "hadamard"), ("lora", "lora", "hadamard"), ("lora", "lora", "matmul"),
                          ("constant", "vector", "hadamard"), ("none", "constant", "hadamard")):  # fmt: skip
        p = problem(config(a, b, variant), (19,), 48, 24, True, dtype, torch.float32, device)
        check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("a", "b", "variant"), [f for f in FORMS if "constant" not in f])
def test_autocast(a, b, variant, device):
    """fp32 x, W and adapters under bf16 autocast: y in bf16, every gradient in fp32."""
    p = problem(config(a, b, variant), (19,), 48, 24, True, torch.float32, device=device)
    got = ours(p, "triton", autocast=torch.bfloat16)
    assert got["y"].dtype == torch.bfloat16
    check(p, got, "triton", autocast=torch.bfloat16)


def _subsets(names):
    return itertools.chain.from_iterable(itertools.combinations(names, r) for r in range(len(names) + 1))


@pytest.mark.parametrize(("a", "b", "variant"), [
    ("vector", "lora", "hadamard"), ("lora", "vector", "hadamard"), ("lora", "none", "matmul"),
    ("constant", "constant", "hadamard"), ("none", "lora", "hadamard"),
])  # fmt: skip
def test_every_subset_of_gradients(a, b, variant, device):
    """Each subset of trained tensors gets what all of them together get, and the rest gets None."""
    dropout = 0.25 if b == "lora" else 0.0
    full = problem(GLoRAConfig(a, b, E="none", rank=3, variant=variant, dropout=dropout), (7,), 20, 11,
                   dtype=torch.float32, device=device)  # fmt: skip
    everything = ours(full, "triton")
    check(full, everything)
    names = ["x", *full.params]
    for subset in _subsets(names):
        got = ours(train_only(full, subset), "triton")
        for name in ("x", *full.params):
            assert (got[name] is None) == (name not in subset), (subset, name)
            if name in subset:
                assert torch.allclose(got[name], everything[name], rtol=1e-5, atol=1e-5), (subset, name)
        assert torch.equal(got["y"], everything["y"])


@pytest.mark.parametrize(("dtype", "form", "a"), thinned(5, itertools.product(
    DTYPES, ["vector", "constant"], [-1.0, -0.9999, -1.0001, -0.99, -0.97, -0.6]
)))  # fmt: skip
def test_gradient_of_a_where_one_plus_a_is_near_zero(dtype, form, a, device):
    """y no longer holds Z there; the gradient must not be recovered from it."""
    p = problem(config(form, "lora", rank=3), (29,), 40, 45, True, dtype, device=device)
    p.params["A"][::3] = a
    check(p, ours(p, "triton"), "triton")
    some = train_only(p, ["A"])
    check(some, ours(some, "triton"), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["vector", "constant"])
def test_gradient_of_a_beside_a_large_bias(form, dtype, device):
    """dA = Σ dy∘Z has no bias in it: a large one (Qwen's k_proj has entries above 100) must not cost it its digits."""
    p = problem(GLoRAConfig(form, "none", rank=3), (29,), 40, 45, True, dtype, device=device)
    p.bias.mul_(200)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize(("a", "b", "variant"), FORMS)
def test_no_rows(a, b, variant, device):
    """M = 0: an empty y, an empty dx and zero gradients."""
    p = problem(config(a, b, variant, rank=3), (0,), 20, 11, True, torch.float32, device=device)
    got = ours(p, "triton")
    assert got["y"].shape == (0, 11)
    assert got["x"].shape == (0, 20)
    for name, t in p.params.items():
        assert got[name] is not None, name
        assert torch.equal(got[name], torch.zeros_like(t)), name


@pytest.mark.parametrize(("a", "b", "variant"), [("vector", "lora", "hadamard"), ("lora", "vector", "hadamard"),
                                                 ("lora", "lora", "matmul")])  # fmt: skip
@pytest.mark.parametrize("lead", [(), (1,), (2, 3, 5)])
def test_any_number_of_leading_sizes_and_expanded_dy(a, b, variant, lead, device):
    p = problem(config(a, b, variant), lead, 20, 11, dtype=torch.float32, device=device)
    p.dy = torch.ones((), device=device).expand(p.dy.shape)
    got = ours(p, "triton")
    assert got["y"].shape == (*lead, 11)
    check(p, got, "triton")


@pytest.mark.parametrize(("a", "b", "variant"), thinned(3, FORMS))
def test_two_runs_give_the_same_bits(a, b, variant, device):
    """In the interpreter, which is one thread, only what reads memory that nobody wrote could differ: less will do."""
    m, k, n = (70, 70, 45) if device == "cuda" else (40, 36, 18)
    p = problem(config(a, b, variant, 17, 0.25 if b == "lora" else 0.0), (m,), k, n, dtype=torch.float16, device=device)
    assert same(ours(p, "triton"), ours(p, "triton"))


@pytest.mark.parametrize(("a", "b", "variant"), thinned(3, FORMS))
def test_many_rows_are_summed_in_parts(a, b, variant, device):
    """Enough rows for `row_splits` to give several partial sums, the last one ragged."""
    from glora_kernels.runtime.configs import row_splits

    assert row_splits(300, 1, 32) > 1
    p = problem(config(a, b, variant, 2), (300,), 16, 16, dtype=torch.float32, device=device)
    check(p, ours(p, "triton"), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("a", "b", "variant"), [("vector", "none", "hadamard"), ("constant", "none", "hadamard"),
                                                 ("lora", "none", "hadamard"), ("none", "lora", "hadamard"),
                                                 ("lora", "none", "matmul")])  # fmt: skip
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_small_adapters_survive_16_bits(a, b, variant, dtype, size, device):
    """y and dx change by what the adapter changes them by: noise of rounding is allowed, a lost mean is not.

    The measure is <got - base, Δ>/<Δ, Δ> with the exact change Δ. Rounding moves it by about
    sqrt(2)·eps/√12·|y|/|Δ|·(M·N)^-½ (Frobenius norms as rms); W_eff or dy∘(1+a) rounded with a dither as well:
    the bound is 10 times that, and must itself be below a half, or the test could not fail.
    """
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16: the mean it loses is its own")
    shape = {"lead": (256,), "k": 64, "n": 64, "bias": False, "dtype": dtype, "device": device}
    p = train_only(problem(GLoRAConfig(a, b, E="none", rank=4, variant=variant), **shape), ["x"])
    for name, t in p.params.items():
        t.copy_(t.sign() * ((size / 2) ** 0.5 if name.endswith(("up", "down")) else size))
    base = train_only(problem(GLoRAConfig("none", "none", E="none"), **shape), ["x"])
    exact, exact_base = truth(p)[0], truth(base)[0]
    got, got_base = ours(p, "triton"), ours(base, "triton")
    for name in ("y", "x"):
        change = exact[name] - exact_base[name]
        kept = float(((got[name].double() - got_base[name].double()) * change).sum() / change.square().sum())
        noise = (2 / 12) ** 0.5 * torch.finfo(dtype).eps * float(exact[name].norm() / change.norm())
        bound = 10 * noise / change.numel() ** 0.5
        assert bound < 0.5
        assert abs(kept - 1) < bound, f"{name}: kept {kept:.3f} of the change, expected within {bound:.3f} of 1"
