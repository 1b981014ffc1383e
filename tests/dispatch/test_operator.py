"""An operator of a few lines, from its description alone: what `dispatch.operator` promises of any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from glora_kernels.dispatch import prepared
from glora_kernels.dispatch.operator import Operator
from glora_kernels.dispatch.prepared import Prepared
from glora_kernels.dispatch.signature import Row, Signature, Values


class _Inputs(NamedTuple):
    x: Tensor
    factor: Tensor | None


class _Numbers(NamedTuple):
    times: float
    sizes: Sequence[int]


class _More(NamedTuple):
    offset: Tensor | None = None
    form: Sequence[int] = ()


class _Scaled(Operator):
    """y = times·x∘factor + offset."""

    name = "scaled_for_a_test"
    signature = Signature(_Inputs, _Numbers, _More)
    results = ("y",)
    trained = ("x", "factor")

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        saved = [i for i, need in enumerate((wanted[1], wanted[0])) if need]
        return Prepared(
            self, values, wanted, saved, size=len(row) + 1, with_rows=(0, len(row)), has_kernels=False, keeps=registered
        )  # fmt: skip

    def forward(self, row: Row, values: Values) -> list[Tensor]:
        return [*self.composite(row, values)]

    def composite(self, row: Row, values: Values) -> tuple[Tensor]:
        (x, factor), (times, _), (offset, _) = self.signature.read(row, values)
        y = times * x * factor
        return (y if offset is None else y + offset,)

    def backward(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor]:
        (x, factor), (times, _), _ = self.signature.read(row, values)
        grads = []
        if wanted[0]:
            grads.append(times * dys[0] * factor)
        if wanted[1]:
            grads.append((times * dys[0] * x).flatten(0, -2).sum(0))
        return grads

    def fake(self, inputs: Any, numbers: Any, more: Any) -> list[Tensor]:
        return [torch.empty_like(inputs.x)]

    def input_shapes(self, dys: Sequence[Tensor], *structures: Any) -> list[Sequence[int]]:
        return [dys[0].shape]

    def flops(self, inputs: Any, numbers: Any, more: Any) -> int:
        return 7

    def backward_flops(self, dy: Any, needs: Sequence[bool], *structures: Any) -> int:
        return 10 * sum(needs)


@pytest.fixture(scope="module")
def operator() -> _Scaled:
    made = _Scaled()
    made.register()
    return made


class _Lists(NamedTuple):
    xs: list[Tensor]
    factors: list[Tensor]


class _Rows(NamedTuple):
    of: Sequence[int]


class _Chosen(Operator):
    """y[m] = x[m]∘factors[of[m]]: one x, whose rows belong to several factors."""

    name = "chosen_for_a_test"
    signature = Signature(_Lists, _Rows)
    results = ("ys", "made")
    reads = ("made",)

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        every, size = range(len(row)), len(row) + 1
        return Prepared(
            self, values, wanted, every, size=size, with_rows=(0, size - 1), has_kernels=False, keeps=registered
        )  # fmt: skip

    def forward(self, row: Row, values: Values) -> list[Tensor]:
        return [*self.composite(row, values)]

    def composite(self, row: Row, values: Values) -> tuple[Tensor]:
        ((x,), factors), (of,) = self.signature.read(row, values)
        return ((x.view(-1, x.shape[-1]) * torch.stack(factors)[list(of)]).view(x.shape),)

    def backward(self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]) -> list[Tensor]:
        ((x,), factors), (of,) = self.signature.read(row, values)
        dy, rows = dys[0].reshape(-1, x.shape[-1]), x.view(-1, x.shape[-1])
        places = torch.tensor(of)
        found = [(dy * torch.stack(factors)[list(of)]).view(x.shape)]
        found += [(dy * rows)[places == i].sum(0) for i in range(len(factors))]
        return [grad for grad, want in zip(found, wanted, strict=True) if want]

    def fake(self, lists: Any, rows: Any) -> tuple[list[Tensor], list[Tensor]]:
        return [torch.empty_like(lists.xs[0])], []

    def input_shapes(self, dys: Sequence[Tensor], *structures: Any) -> list[Sequence[int]]:
        return [dys[0].shape]


@pytest.fixture(scope="module")
def chosen() -> _Chosen:
    made = _Chosen()
    made.register()
    return made


def tensors() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)


def test_the_schemas_are_the_structures(operator):
    forward, backward = (getattr(torch.ops.glora_kernels, operator.name + end) for end in ("", "_backward"))
    more = "Tensor? offset=None, int[] form=[]"
    assert str(forward.default._schema).endswith(
        f"scaled_for_a_test(Tensor x, Tensor? factor, float times, int[] sizes, {more}) -> Tensor"
    )
    assert str(backward.default._schema).endswith(
        f"(Tensor dy, bool[] needs, Tensor? x, Tensor? factor, float times, int[] sizes, {more}) -> (Tensor, Tensor)"
    )


def test_a_call_in_its_three_forms(operator):
    x, factor = tensors()
    row, values = operator.signature.split((x, factor, 2.0, [1, 2]))
    assert row == [x, factor, None]
    assert values == Values((2.0, (1, 2), ()))
    assert operator.signature.join(row, values) == [x, factor, 2.0, (1, 2), None, ()]
    structures = [*operator.signature.read([*row, "what forward made"], values)]
    assert structures == [_Inputs(x, factor), _Numbers(2.0, (1, 2)), _More()]


def test_pytorch_has_no_complaint(operator):
    call = torch.ops.glora_kernels.scaled_for_a_test
    torch.library.opcheck(call.default, (*tensors(), 2.0, [1]))
    torch.library.opcheck(call.default, (*tensors(), 2.0, [1], torch.randn(3)))


def test_every_way_gives_the_same(operator):
    x, factor = tensors()
    dy, dys = torch.randn(4, 3), torch.randn(5, 4, 3)
    expected = torch.autograd.grad(2.0 * x * factor, (x, factor), dy)
    values = Values((2.0, (1,), ()))

    def eager(x: Tensor, factor: Tensor) -> Tensor:
        row = (x, factor, None)
        return prepared.call(operator.prepare(row, values, prepared.wanted_of(row)), row)[0]

    def registered(x: Tensor, factor: Tensor) -> Tensor:
        return operator.through_pytorch((x, factor, None), values)[0]

    for call in (eager, registered, torch.compile(registered, backend="aot_eager", fullgraph=True)):
        y = call(x, factor)
        for got, wanted in zip(torch.autograd.grad(y, (x, factor), dy, retain_graph=True), expected, strict=True):
            assert torch.allclose(got, wanted)
        if call is eager:
            batch = torch.autograd.grad(y, x, dys, is_grads_batched=True)[0]
            assert torch.allclose(batch, 2.0 * dys * factor)
    gradient = torch.func.grad(lambda x: (registered(x, factor) * dy).sum())(x)
    assert torch.allclose(gradient, expected[0])


def test_one_x_of_any_layout_and_many_factors(chosen):
    """What `Operator.call` does for every operator: the layouts of x, autocast, whoever watches, one check a class."""
    factors = [torch.randn(3, requires_grad=True) for _ in range(2)]
    checked = []

    def call(x: Tensor, of: tuple[int, ...]) -> Tensor:
        def check(row: Row) -> Values:
            checked.append(of)
            if not row[0].is_floating_point():
                raise TypeError("no number to multiply")
            return Values((of,), (1, 2))

        return chosen.call((x, *factors), of, check)[0]

    def expected(x: Tensor, of: tuple[int, ...]) -> Tensor:
        return (x.reshape(-1, 3) * torch.stack(factors)[list(of)]).view(x.shape)

    of = (0, 1, 1, 0)
    for x in (torch.randn(4, 3), torch.randn(2, 2, 3), torch.randn(2, 3, 2).mT, torch.randn(3, 4).t()):
        x.requires_grad_()
        for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
            y = function(x, of)
            assert torch.equal(y, expected(x, of))
            got, wanted = (torch.autograd.grad(one.square().sum(), (x, *factors)) for one in (y, expected(x, of)))
            assert all(torch.allclose(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(call(torch.ones(3), (1,)), factors[1])
    assert torch.equal(call(x.detach().to_sparse(), of), expected(x, of))
    parts = [torch.randn(1, 3), torch.randn(3, 3)]
    y = call(torch.nested.nested_tensor(parts), of)
    assert torch.equal(torch.cat(y.unbind()), expected(torch.cat(parts), of))
    with torch.autocast("cpu", torch.bfloat16):
        assert call(torch.randn(4, 3), of).dtype == torch.float32  # of a bf16 x and fp32 factors
        assert torch.equal(call(x, of), expected(x.bfloat16(), of))
    checked.clear()
    for _ in range(2):
        call(torch.ones(5, 3), (0,) * 5)
    assert len(checked) == 1
    with pytest.raises(TypeError, match="no number"):
        call(torch.ones(4, 3, dtype=torch.int64), of)


def test_it_is_counted(operator):
    x, factor = tensors()
    with FlopCounterMode(display=False) as counter:
        torch.ops.glora_kernels.scaled_for_a_test(x, factor, 2.0, [1]).sum().backward()
    assert counter.get_total_flops() == 27
