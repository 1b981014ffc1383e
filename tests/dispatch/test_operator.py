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


def test_it_is_counted(operator):
    x, factor = tensors()
    with FlopCounterMode(display=False) as counter:
        torch.ops.glora_kernels.scaled_for_a_test(x, factor, 2.0, [1]).sum().backward()
    assert counter.get_total_flops() == 27
