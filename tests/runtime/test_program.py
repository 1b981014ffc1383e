"""Programs of launches give what the passes give as they are written, whatever is done to tensors between calls."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from helpers import thinned
from torch import Tensor

import glora_kernels as gk
from glora_kernels.dispatch import prepared
from glora_kernels.glora.op import glora_linear
from glora_kernels.grouped.op import grouped_lora_linear
from glora_kernels.runtime import program
from glora_kernels.runtime.program import launching

K, N, R = 32, 48, 4


def filled(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def trained(*shape: int, seed: int = 0) -> Tensor:
    return filled(*shape, seed=seed).requires_grad_()


W, BIAS = filled(N, K), filled(N)


def lora() -> dict[str, Tensor]:
    return {"b_up": trained(N, R), "b_down": trained(R, K)}


def vectors() -> dict[str, Tensor]:
    names = {"a": N, "b": N, "bias": N, "d": N, "e": N, "c": K}
    return {name: trained(size, seed=i) for i, (name, size) in enumerate(names.items())}


def pairs() -> dict[str, Tensor]:
    return {"a_up": trained(N, R, seed=1), "a_down": trained(R, K, seed=1), **lora()}


FORMS = {"lora": lora, "vectors": vectors, "pairs": pairs}


@pytest.fixture(autouse=True)
def _kernels(device: str) -> Iterator[None]:
    if device != "cpu":
        pytest.skip("through the interpreter")
    prepared._prepared.clear()
    program._programs.clear()
    with gk.backend("triton"):
        yield


def called(x: Tensor, supports: dict[str, Tensor], weight: Tensor = W, **options: object) -> Tensor:
    return glora_linear(x, weight, **{"bias": BIAS, **supports}, **options)


def gradients(y: Tensor | Sequence[Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    ys = [y] if isinstance(y, Tensor) else list(y)
    return torch.autograd.grad(ys, leaves, [filled(*one.shape) for one in ys], materialize_grads=True)


def step(x: Tensor, supports: dict[str, Tensor], weight: Tensor = W, **options: object) -> tuple[Tensor, ...]:
    y = called(x, supports, weight, **options)
    return y.detach(), *gradients(y, x, *supports.values())


def both(run: Callable[[], Sequence[Tensor]]) -> None:
    """What `run` gives by programs is what it gives without them, in the same shapes, strides and dtypes."""
    found = run()
    with launching(cached=False):
        wanted = run()
    for one, other in zip(found, wanted, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        torch.testing.assert_close(one, other)


LAYOUTS = {
    "matrix": lambda: filled(6, K),
    "three dimensions": lambda: filled(2, 3, K),
    "transposed": lambda: filled(K, 6).t(),
    "expanded": lambda: filled(1, K).expand(6, K),
    "one element on": lambda: filled(6 * K + 1)[1:].view(6, K),
    "every other": lambda: filled(6, 2 * K)[:, ::2],
    "dimensions swapped": lambda: filled(3, 2, K).transpose(0, 1),
    "one row": lambda: filled(1, K),
    "a vector": lambda: filled(K),
    "no rows": lambda: filled(0, K),
    "no rows of three dimensions": lambda: filled(2, 0, K),
}


@pytest.mark.parametrize("form", FORMS)
def test_layouts_of_x(form):
    """One after the other: none is taken for another one."""
    supports = FORMS[form]()
    for make in (*LAYOUTS.values(), LAYOUTS["matrix"]):
        both(lambda make=make: step(make().requires_grad_(), supports))


@contextlib.contextmanager
def brought_back(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(change, lambda tensor: tensor):
        yield


@pytest.mark.parametrize(("layout", "form"), thinned(2, itertools.product(
    ["matrix", "three dimensions", "transposed", "expanded"], FORMS
)))  # fmt: skip
def test_saved_tensors_come_back_in_another_form(layout, form):
    """As hooks that offload activations bring them: contiguous, in another order, or anywhere in memory."""
    supports = FORMS[form]()

    def elsewhere(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    def run(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with brought_back(change):
            return step(LAYOUTS[layout]().requires_grad_(), supports, W.t().contiguous().t())

    def swapped(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    wanted = run(lambda t: t)
    for change in (lambda t: t, lambda t: t.contiguous().clone(), elsewhere, swapped):
        both(lambda change=change: run(change))
        torch.testing.assert_close(run(change), wanted)


@pytest.mark.parametrize("other", [lambda t: t.t().contiguous().t(), Tensor.double, Tensor.clone])
def test_data_swapped_between_forward_and_backward(other):
    supports = lora()
    step(filled(6, K).requires_grad_(), supports)

    def run() -> tuple[Tensor, ...]:
        x, up = trained(6, K), supports["b_up"]
        y, before = called(x, supports), up.data
        up.data = other(before)
        try:
            return gradients(y, x, supports["b_down"])
        finally:
            up.data = before

    both(run)


def test_the_switch_holds_for_what_is_prepared():
    """Inside `launching(cached=False)` no program runs, and none is lost by it."""
    x, supports = trained(6, K), lora()
    with launching(cached=False):
        y = called(x, supports)
        assert not program._programs
    gradients(y, x)  # outside again: backward has a program
    assert len(program._programs) == 1
    step(x, supports)
    assert all(program._programs.values())
    assert len(program._programs) == 2
    ran = []
    for one in program._programs.values():
        one.run = ran.append
    with launching(cached=False):
        step(x, supports)
    assert not ran


def test_no_rows_before_and_after():
    """Neither takes the program, or the lack of one, of the class that it is counted to."""
    x, supports = trained(6, K), lora()
    both(lambda: step(x[:0].detach().requires_grad_(), supports))
    step(x, supports)
    assert all(program._programs.values())
    assert len(program._programs) == 2
    both(lambda: step(x[:0].detach().requires_grad_(), supports))


def grouped(xs: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
    ups, downs = [trained(n, R, seed=n) for n in (N, N, 16)], [trained(R, K, seed=i) for i in range(3)]
    ys = grouped_lora_linear(xs, [W, W + 1, filled(16, K)], downs, ups, [None, BIAS, None], scales=0.5)
    leaves = [xs] if isinstance(xs, Tensor) else xs
    return *[y.detach() for y in ys], *gradients(ys, *leaves, *ups, *downs), *gradients_of_two(xs)


def gradients_of_two(xs: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
    """Of a group of which one member's y takes no part in the loss."""
    downs = [trained(R, K, seed=i) for i in range(3)]
    ys = grouped_lora_linear(xs, W, downs, filled(N, R))
    return gradients(ys[:2], *downs)


@pytest.mark.parametrize("layout", ["three dimensions", "dimensions swapped", "no rows"])
def test_groups(layout):
    make = LAYOUTS[layout]
    both(lambda: grouped(make().requires_grad_()))
    x = trained(2, 3, K)
    grouped([x, x + 1, x + 2])
    both(lambda: grouped([t.requires_grad_() for t in (make(), make() + 1, make() - 1)]))


def test_what_backward_keeps_of_an_x_of_three_dimensions(monkeypatch):
    """The registered operator returns h (M, R) and σ (M,), also where they are made as they are, in no bands."""
    from glora_kernels.glora import triton as path

    monkeypatch.setattr(path, "_route", lambda *a, **k: "library")
    values = 1.0, 0.0, None, False, "triton", 0, None, None, None, None, []
    none = [None] * 4
    for lead in ((2, 3), (3, 2), (6,)):
        x = filled(6, K).view(*lead, K)
        y, h, *_ = torch.ops.glora_kernels.glora_linear(x, W, *none, filled(N, R), filled(R, K), *none, *values)
        assert (y.shape, h.shape) == ((*lead, N), (6, R))
        y, _, sigma, _ = torch.ops.glora_kernels.glora_linear(x, W, *none[:3], filled(N), *none, None, None, *values)
        assert (y.shape, sigma.shape) == ((*lead, N), (6,))


class Wrapped(Tensor):
    pass


def test_other_classes_of_tensors():
    supports = lora()
    step(filled(6, K).requires_grad_(), supports)
    both(lambda: step(filled(6, K).as_subclass(Wrapped).requires_grad_(), supports))
    both(lambda: step(filled(6, K).requires_grad_(), supports, W.as_subclass(Wrapped)))


def test_what_requires_a_gradient_changes():
    x, supports = filled(6, K), {**lora(), "a": trained(N), "e": trained(N)}
    for i in range(2 * len(supports)):
        supports[list(supports)[i % len(supports)]].requires_grad_(i >= len(supports))

        def run() -> tuple[Tensor, ...]:
            y = called(x, supports)
            return y.detach(), *gradients(y, *[t for t in supports.values() if t.requires_grad])

        if any(t.requires_grad for t in supports.values()):
            both(run)
    with pytest.raises(ValueError, match="frozen"):
        called(x, supports, W.clone().requires_grad_())


def test_gradients_of_y_in_every_layout():
    """Expanded, as that of a sum; transposed; not contiguous in three dimensions; after a hook changed it."""
    supports, x = pairs(), trained(2, 3, K)

    def run(of: Callable[[Tensor], Tensor], hooked: bool) -> tuple[Tensor, ...]:
        y = called(x, supports)
        if hooked:
            y.register_hook(lambda dy: dy.transpose(0, 1).contiguous().transpose(0, 1) * 2)
        return torch.autograd.grad(of(y), (x, *supports.values()))

    for hooked in (False, True):
        both(lambda hooked=hooked: run(Tensor.sum, hooked))
        both(lambda hooked=hooked: run(lambda y: (y.transpose(0, 1) * filled(3, 2, N)).sum(), hooked))
        both(lambda hooked=hooked: run(lambda y: (y.view(6, N).t() @ filled(6, 2)).sum(), hooked))


@pytest.mark.parametrize("what", ["x", "b_up", "y", "weight"])
@pytest.mark.parametrize("cached", [True, False])
def test_changes_in_place_before_backward_are_errors(what, cached):
    supports, x, weight = {"a": trained(N), **lora()}, trained(6, K) * 1, W.clone()
    with launching(cached):
        y = called(x, supports, weight)
        with torch.no_grad():
            {"x": x, "y": y, "weight": weight, **supports}[what].add_(1)
        with pytest.raises(RuntimeError, match=r"overwritten in place|modified by an inplace"):
            y.sum().backward()


def test_transposed_gradients_of_many_lengths_are_not_kept_without_end():
    """Each has strides of its own, and so a program."""
    supports = lora()
    for m in range(33, 33 + prepared._KEPT_BACKWARDS + 4):
        y = called(trained(m, K), supports)
        torch.autograd.grad(y, list(supports.values()), filled(N, m).t())
    (found,) = prepared._prepared.values()
    assert len(found._backwards) <= prepared._KEPT_BACKWARDS


def test_nothing_is_kept_of_a_call():
    supports = lora()

    def run() -> list[weakref.ref]:
        x, weight = trained(6, K), W.clone()
        mine = {name: t.detach().clone().requires_grad_() for name, t in supports.items()}
        y = called(x, mine, weight)
        y.sum().backward()
        return [weakref.ref(t) for t in (x, weight, y, *mine.values())]

    gc.disable()
    try:
        for _ in range(2):
            assert not any(ref() is not None for ref in run())
    finally:
        gc.enable()


def test_backward_multiplies_as_is_allowed_when_it_runs(monkeypatch):
    """TF32 allowed between forward and backward serves that backward, and none after it."""
    supports, taken = lora(), []
    plain = program._planned

    def noted(name: str, *rest: object) -> object:
        found = plain(name, *rest)
        if name.endswith("backward"):
            taken.append(
                {value.precision for step in found.steps for value in step.args.values() if hasattr(value, "precision")}
            )
        return found

    monkeypatch.setattr(program, "_planned", noted)
    allowed = False
    monkeypatch.setattr("glora_kernels.runtime.environment.allow_tf32", lambda: allowed)
    for backward in (True, False, True, False):
        allowed = False
        y = called(trained(6, K), supports)
        allowed = backward
        torch.autograd.grad(y, list(supports.values()), filled(6, N))
    assert taken == [{"tf32"}, {"ieee"}]
