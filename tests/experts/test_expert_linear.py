"""`expert_rows` and `Groups` against loops over rows in float64: sizes of groups, dtypes, ranks, strides, memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from glora_kernels.experts import eager
from glora_kernels.experts.groups import Groups
from glora_kernels.experts.op import expert_rows

E, N, K, TOKENS, EACH, SCALE = 5, 24, 16, 7, 2, 0.7
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOOR = 8.0
"""What is allowed beside twice the error of plain PyTorch, in units of eps of the dtype and of the largest value."""

CHOICES: dict[str, Callable[[], Tensor]] = {
    "ragged": lambda: torch.tensor([[0, 3], [3, 1], [3, 0], [1, 3], [0, 3], [3, 0], [1, 0]]),  # 2 and 4 have no row
    "one token": lambda: torch.tensor([[4, 2]]),
    "all on one expert": lambda: torch.full((TOKENS, 1), 3),
    "one row each": lambda: torch.arange(E).flip(0)[:, None],
    "an expert twice": lambda: torch.tensor([[1, 1], [0, 1], [4, 4]]),
    "none": lambda: torch.zeros(0, 2, dtype=torch.int64),
}


def expert_linear(x, weight, groups, up, down, scale, of_tokens):
    """The rows of LoRA experts, sorted."""
    adapters = None if up is None else {"b_up": up, "b_down": down, "scale": scale}
    return expert_rows(x, weight, None, adapters, groups, of_tokens)


def made(index: Tensor, dtype: torch.dtype, rank: int = 4, of_tokens: bool = True, k: int = K) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = len(index) if of_tokens else index.numel()
    return {
        "x": draw(rows, k), "weight": draw(E, N, k), "up": draw(E, N, rank), "down": draw(E, rank, k),
        "dy": draw(index.numel(), N),
    }  # fmt: skip


def ours(index: Tensor, given: dict[str, Tensor], of_tokens: bool = True) -> dict[str, Tensor]:
    """y and the gradients of x, U and D."""
    x, up, down = (given[name].detach().requires_grad_() for name in ("x", "up", "down"))
    y = expert_linear(x, given["weight"], Groups.of(index, E), up, down, SCALE, of_tokens)
    y.backward(given["dy"])
    return {"y": y.detach(), "x": x.grad, "up": up.grad, "down": down.grad}


def loops(index: Tensor, given: dict[str, Tensor], of_tokens: bool = True) -> dict[str, Tensor]:
    """The same by PyTorch in the dtype given, row by row: expert by expert, and in an expert in the order of tokens."""
    x, up, down = (given[name].detach().clone().requires_grad_() for name in ("x", "up", "down"))
    flat = index.flatten().tolist()
    places = [place for expert in range(E) for place in range(len(flat)) if flat[place] == expert]
    rows = []
    for i, place in enumerate(places):
        e, row = flat[place], x[place // index.shape[1]] if of_tokens else x[i]
        rows.append(given["weight"][e] @ row + SCALE * (up[e] @ (down[e] @ row)))
    y = torch.stack(rows) if rows else given["dy"] * 0
    (y * given["dy"]).sum().backward() if rows else None
    zeros = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x, up, down))
    return dict(zip(("y", "x", "up", "down"), (y.detach(), *zeros), strict=True))


def double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in given.items()}


def check(index: Tensor, given: dict[str, Tensor], of_tokens: bool = True) -> None:
    dtype = given["x"].dtype
    got, plain = ours(index, given, of_tokens), loops(index, given, of_tokens)
    truth = loops(index, double(given), of_tokens)
    for name, value in truth.items():
        assert (got[name].dtype, got[name].shape) == (dtype, value.shape), name
        if value.numel():
            error, its = (float((found[name].double() - value).abs().max()) for found in (got, plain))
            assert error <= 2 * its + FLOOR * torch.finfo(dtype).eps * float(value.abs().max()), f"{name}: {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("of_tokens", [True, False])
def test_groups_of_every_size(choice, dtype, of_tokens):
    index = CHOICES[choice]()
    check(index, made(index, dtype, of_tokens=of_tokens), of_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", range(1, 10))
def test_every_rank(rank, dtype):
    index = CHOICES["ragged"]()
    check(index, made(index, dtype, rank))


def columns(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def shifted(tensor: Tensor) -> Tensor:
    """Neither its address nor its strides are a multiple of 16 bytes."""
    return torch.nn.functional.pad(tensor, (1, 0))[..., 1:]


def late(tensor: Tensor) -> Tensor:
    """Its strides are a multiple of 16 bytes, and its address is not."""
    return torch.nn.functional.pad(tensor, (1, 15))[..., 1:-15]


STRIDES = [columns, transposed, shifted, late, lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", STRIDES)
@pytest.mark.parametrize("name", ["weight", "x", "up", "down", "dy"])
def test_tensors_of_any_strides(name, strided, dtype):
    index = CHOICES["ragged"]()
    given = made(index, dtype, of_tokens=False)
    given[name] = strided(given[name])
    check(index, given, of_tokens=False)


def test_an_expanded_weight_and_an_expanded_gradient():
    index = CHOICES["ragged"]()
    given = made(index, torch.float32)
    given["weight"], given["dy"] = given["weight"][:1].expand(E, N, K), given["dy"][:1, :1].expand(index.numel(), N)
    check(index, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(23, 15), (1, 16), (24, 1)])
def test_sizes_that_are_no_multiple_of_16_bytes(n, k, dtype):
    index = CHOICES["ragged"]()
    given = made(index, dtype, 3)
    given = {name: value[..., :k] if name in ("x", "weight", "down") else value for name, value in given.items()}
    given = {name: value[:, :n] if name in ("weight", "up", "dy") else value for name, value in given.items()}
    check(index, {name: value.contiguous() for name, value in given.items()})


@pytest.mark.parametrize("of_tokens", [True, False])
def test_gradients_by_differences(of_tokens):
    index = CHOICES["ragged"]()
    given, groups = made(index, torch.float64, 2, of_tokens), Groups.of(index, E)
    leaves = [given[name].requires_grad_() for name in ("x", "up", "down")]
    assert torch.autograd.gradcheck(
        lambda x, up, down: expert_linear(x, given["weight"], groups, up, down, SCALE, of_tokens), leaves
    )


class Made(TorchDispatchMode):
    """The shapes of what operations make inside a pass, and the largest tensor among it, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.shapes = 0, set[torch.Size]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, Tensor)}
        found = function(*arguments, **(kwargs or {}))
        for out in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, out.untyped_storage().nbytes() // out.element_size())
                self.shapes.add(out.shape)
        return found


@contextlib.contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """Watches both passes from inside: around a call, PyTorch would show a mode one operation."""
    watch = Made()
    for name in ("forward", "backward"):
        real = getattr(eager, name)

        def run(*arguments: Any, real: Any = real) -> Any:
            with watch:
                return real(*arguments)

        monkeypatch.setattr(eager, name, run)
    yield watch


@pytest.mark.parametrize("wanted", [w for w in itertools.product([True, False], repeat=3) if any(w)])
def test_only_the_gradients_that_are_wanted(wanted, monkeypatch):
    """Each is that of a call where all are wanted, and products for the others are not made."""
    index = CHOICES["ragged"]()
    given, groups = made(index, torch.float64), Groups.of(index, E)
    expected = ours(index, given)
    leaves = {name: given[name].requires_grad_(want) for name, want in zip(("x", "up", "down"), wanted, strict=True)}
    y = expert_linear(leaves["x"], given["weight"], groups, leaves["up"], leaves["down"], SCALE, True)
    with watching(monkeypatch) as watch:
        y.backward(given["dy"])
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-12, atol=1e-12)
    x, up, down = wanted
    shapes = {"up": given["up"].shape, "down": given["down"].shape}
    shapes["rows"] = torch.Size([index.numel(), K])  # for D the rows of x are gathered again
    there = {name: shape in watch.shapes for name, shape in shapes.items()}
    assert there == {"up": up, "down": down, "rows": x or down}


def test_a_base_without_an_adapter():
    index = CHOICES["ragged"]()
    given, groups = made(index, torch.float64), Groups.of(index, E)
    x = given["x"].requires_grad_()
    y = expert_linear(x, given["weight"], groups, None, None, 1.0, True)
    y.backward(given["dy"])
    expected = loops(index, {**given, "up": given["up"] * 0})
    torch.testing.assert_close((y.detach(), x.grad), (expected["y"], expected["x"]), rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_an_error():
    index = CHOICES["one token"]()
    given = made(index, torch.float64)
    x = given["x"].requires_grad_()
    y = expert_linear(x, given["weight"], Groups.of(index, E), given["up"], given["down"], SCALE, True)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        dx.sum().backward()


def test_groups_gather_and_sum_back():
    index = torch.tensor([[2, 0], [0, 4], [2, 4]])
    groups = Groups.of(index, E)
    assert groups.ends.tolist() == [2, 2, 4, 4, 6]
    tokens = torch.tensor([[1.0], [10.0], [100.0]])
    assert groups.gather(tokens).flatten().tolist() == [1, 10, 1, 100, 10, 100]
    assert groups.sum_back(torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]])).flatten().tolist() == [5, 18, 40]


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed, columns, shifted])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 63])
def test_nothing_as_large_as_the_experts_is_made(layout, dtype, k, monkeypatch):
    index = CHOICES["ragged"]()
    given = made(index, dtype, 1, k=k)
    given["weight"] = layout(given["weight"])
    with watching(monkeypatch) as watch:
        ours(index, given)
    assert 0 < watch.numel < given["weight"].numel() // 2


@pytest.mark.parametrize("of_tokens", [True, False])
def test_backward_keeps_x_as_it_is_and_h(of_tokens):
    """Of the size of rows only h is kept: x is the caller's own tensor, and the gathered rows are not there."""
    index = torch.arange(64).view(32, 2) % E
    given, groups = made(index, torch.float32, 2, of_tokens), Groups.of(index, E)
    x, up, down = (given[name].requires_grad_() for name in ("x", "up", "down"))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expert_linear(x, given["weight"], groups, up, down, SCALE, of_tokens)
    known = {t.untyped_storage().data_ptr() for t in (x, up, down, given["weight"], *groups[:2])}
    own = [t for t in kept if t.untyped_storage().data_ptr() not in known]
    assert {x.data_ptr(), up.data_ptr(), down.data_ptr()} <= {t.data_ptr() for t in kept}
    assert sum(t.untyped_storage().nbytes() for t in own) <= 2 * index.numel() * 16  # h, its rows padded to 16 bytes


def test_the_same_bits_every_time():
    index = torch.randint(E, (64, 3), generator=torch.Generator().manual_seed(0))
    given = made(index, torch.float32)
    first = ours(index, given)
    for _ in range(3):
        assert all(torch.equal(first[name], value) for name, value in ours(index, given).items())


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 4), (torch.float32, 3), (torch.float64, 3), (torch.float16, 1)]
)
def test_a_compiled_call_is_one_graph(dtype, rank):
    index = CHOICES["ragged"]()
    given = made(index, dtype, rank)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x, up, down, index: expert_linear(
            x, given["weight"], Groups.of(index, E), up, down, SCALE, True
        ),
        fullgraph=True, backend=counter,
    )  # fmt: skip
    expected = ours(index, given)
    for _ in range(2):
        x, up, down = (given[name].detach().requires_grad_() for name in ("x", "up", "down"))
        y = run(x, up, down, index)
        y.backward(given["dy"])
        for got, name in ((y, "y"), (x.grad, "x"), (up.grad, "up"), (down.grad, "down")):
            torch.testing.assert_close(got, expected[name], rtol=0, atol=0)
    assert counter.frame_count == 1
