"""One description of an operator gives its schema, fake results, autograd, autocast, flops, and every way to call it.

A subclass of `Operator` names its arguments and results and does the mathematics on a row of tensors
(`dispatch.signature`). `register` defines two operators in torch.ops.glora_kernels, each one node of a graph:

    name           (arguments) → the outputs, then the results that backward may read
    name_backward  (dys, the results that backward may read, needs, arguments) → the gradients

In these, an absent result is a tensor of no elements. Eager mode calls the same functions (`dispatch.prepared`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from glora_kernels.dispatch import prepared
from glora_kernels.dispatch.common import autocast_dtype, cast, given, settled
from glora_kernels.dispatch.prepared import Operation, Prepared, read_saved
from glora_kernels.dispatch.signature import Row, Signature, Values
from glora_kernels.dispatch.ways import is_batched, is_elsewhere, is_plain, is_transformed, rows_of
from glora_kernels.runtime import routes
from glora_kernels.runtime.workspace import private_workspace

NAMESPACE = __name__.partition(".")[0]
"""The name of the package: glora_kernels, or another under which a copy of it is loaded beside it."""

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
"""Every operator of the package is defined in this one namespace: torch.ops.glora_kernels."""

OPS = getattr(torch.ops, NAMESPACE)

Shape = Sequence[int]


class Operator(Operation):
    """The description of an operator.

    Attributes:
        name: in torch.ops.glora_kernels.
        signature: its arguments. Inputs, which have one row per token, come first.
        has_inputs: whether it has such inputs.
        results: the names of what forward returns: the output, then results for backward.
        reads: the results that backward may read; where results are lists, not the outputs.
        trained: the arguments that have gradients; all tensors, where it takes lists.
    """

    signature: ClassVar[Signature]
    has_inputs: ClassVar[bool] = True
    results: ClassVar[Sequence[str]]
    reads: ClassVar[Sequence[str]] = ()
    trained: ClassVar[Sequence[str]] = ()

    def prepare(self, row: Row, values: Values, wanted: Sequence[bool], registered: bool = False) -> Prepared:
        """Describe the class of calls that this one belongs to; `registered`: forward must return every result."""
        raise NotImplementedError

    def composite(self, row: Row, values: Values) -> tuple[Tensor, ...]:
        """The outputs by differentiable operations of PyTorch. The results of a forward may follow in the row."""
        raise NotImplementedError

    def fake(self, *structures: Any) -> Any:
        """Empty results, of the shapes, dtypes and strides of the real ones; None where one is absent."""
        raise NotImplementedError

    def flops(self, *structures: Any) -> int:
        """Floating-point operations of forward: 2·rows·columns·depth per product. Shapes stand in for tensors."""
        raise NotImplementedError

    def backward_flops(self, dy: Any, needs: Sequence[bool], *structures: Any) -> int:
        """Floating-point operations of backward."""
        raise NotImplementedError

    def input_shapes(self, dys: Sequence[Tensor], *structures: Any) -> list[Shape]:
        """The shapes of the inputs, from the other tensors: forward need not have saved the inputs."""
        return []

    @property
    def _own(self) -> int:
        """How many arguments of backward come before those of forward: dys, the results it reads, needs."""
        return len(self.reads) + 2

    @property
    def count(self) -> int:
        """The number of tensor arguments (meaningless for an operator that takes lists)."""
        return len(self.signature.tensors)

    def inputs_of(self, values: Values) -> int:
        """How many leading entries of the row are inputs, with one row per token."""
        return int(self.has_inputs) if values.sizes is None else values.sizes[0]

    def call(
        self, row: Sequence[Any], key: Hashable, check: Callable[[Row], Values], inputs: int = 1,
        sources: Sequence[int] = (0,),
    ) -> Sequence[Tensor]:  # fmt: skip
        """The outputs of a call, by whichever of the `dispatch.ways` applies.

        Args:
            row: its tensors. First the inputs, with one row per token, in any layout, also nested or sparse; the
                operator gets them in autocast's dtype.
            key: what the values depend on besides the row and the modes of PyTorch and this package.
            check: returns the values of a call with this row, or raises its errors.
            inputs: how many inputs there are.
            sources: for each output, the index of the input whose rows it has.
        """
        xs = row[:inputs]
        for x in xs:
            if not is_plain(x):
                return self._by_rows(row, key, check, inputs, sources)
        target = autocast_dtype(row[0]) if xs else None
        if target is not None:
            xs = [cast(x, target) if x.is_floating_point() else x for x in xs]
            row = (*xs, *row[inputs:])
        if is_elsewhere(row[0]):
            return self.through_pytorch(row, check(row))
        for x in xs:
            if x.ndim != 2 and (x.ndim == 1 or not x.is_contiguous()):
                return self._by_rows(row, key, check, inputs, sources)
        if routes.invariant():
            row = (*map(settled, xs), *row[inputs:])
        wanted = prepared.wanted_of(row)
        whole = (key, target, routes.chosen(), routes.invariant(), wanted)
        found = prepared.find(self, row, inputs, whole, lambda: self.prepare(row, check(row), wanted))
        return prepared.call(found, row)

    def _by_rows(
        self, row: Sequence[Any], key: Hashable, check: Callable[[Row], Values], inputs: int, sources: Sequence[int]
    ) -> Sequence[Tensor]:
        """`call` on the inputs as matrices or contiguous tensors; the outputs get the dimensions of their inputs."""
        found = [rows_of(x) for x in row[:inputs]]
        ys = self.call((*(rows for rows, _ in found), *row[inputs:]), key, check, inputs, sources)
        return [found[source][1](y) for source, y in zip(sources, ys, strict=True)]

    def through_pytorch(self, row: Row, values: Values) -> Sequence[Tensor]:
        """The outputs where a call is watched or transformed (`dispatch.ways`)."""
        if is_transformed():
            self._check_composite(values)
            return self.composite(row, values)
        return self._parted(self._forward_operator(*self.signature.join(row, values)))[0]

    def _parted(self, results: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Split what the registered operator returns into (outputs, results for backward)."""
        if self.signature.has_lists:
            return results[0], results[1]
        y, *made = (results,) if isinstance(results, Tensor) else results
        return [y], made

    def elsewhere(
        self, dys: Sequence[Tensor], row: Row, values: Values, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        own, made = list(row[: len(wanted)]), list[Any](row[len(wanted) :])
        if any(map(is_batched, dys)):
            self._check_composite(values)
            # No wanted gradient depends on an input that was not saved, so that zeros (without a batch) will do.
            zeros = functools.partial(torch.zeros, dtype=dys[0].dtype, device=dys[0].device)
            own = self._with_inputs(own, dys, values, zeros)
            return gradients(lambda *tensors: self.composite((*tensors, *made), values), own, wanted, dys)
        dy: Any = dys[0]
        if self.signature.has_lists:
            own = self._with_inputs(own, dys, values, lambda _: dys[0].new_empty(0))
            dy, made = list(dys), [list(made[len(dys) :])]
        needs = [wanted[place] for place in self._places(len(wanted))]
        grads = self._backward_operator(dy, *made[: len(self.reads)], needs, *self.signature.join(own, values))
        grads = (grads,) if isinstance(grads, Tensor) else grads
        return [grad for grad, need in zip(grads, needs, strict=True) if need]

    def _check_composite(self, values: Values) -> None:
        if self.has_inputs and values.is_invariant:
            raise RuntimeError(
                "batch_invariant() holds for calls of layers and operators and for their backward; under torch.func, "
                "forward-mode differentiation, torch.jit.trace and batched gradients they run as PyTorch's own "
                "operations, whose rows depend on one another: leave batch_invariant() there"
            )

    def _with_inputs(
        self, row: list[Any], dys: Sequence[Tensor], values: Values, make: Callable[[Shape], Tensor]
    ) -> list[Any]:
        shapes = self.input_shapes(dys, *self.signature.read(row, values))
        inputs = [make(shape) if x is None else x for x, shape in zip(row, shapes, strict=False)]
        return [*inputs, *row[len(inputs) :]]

    def _places(self, count: int) -> Sequence[int]:
        """The indices in the row that the registered operator returns gradients for."""
        if self.signature.has_lists:
            return range(count)
        return [self.signature.tensors.index(name) for name in self.trained]

    def graded(self, wanted: Sequence[bool]) -> tuple[bool, ...]:
        """`wanted`, without what has no gradient: a seed, and the metadata of a 4-bit weight."""
        known = {*self._places(len(wanted)), *range(self.count, len(wanted))}
        return tuple([want and i in known for i, want in enumerate(wanted)])

    def register(self) -> None:
        """Define both operators, with everything that PyTorch wants to know of them."""
        kind = "Tensor[]" if self.signature.has_lists else "Tensor"
        results = ", ".join(kind for _ in self.results)
        made = "".join(f", {kind if self.signature.has_lists else 'Tensor?'} {name}" for name in self.reads)
        grads = "Tensor[]" if self.signature.has_lists else ", ".join("Tensor" for _ in self.trained)
        LIBRARY.define(f"{self.name}({self.signature.schema()}) -> ({results})")
        arguments = f"{kind} dy{made}, bool[] needs, {self.signature.schema(optional=True)}"
        LIBRARY.define(f"{self.name}_backward({arguments}) -> ({grads})")
        forward, backward = self.name, f"{self.name}_backward"
        self._forward_operator = getattr(OPS, forward)
        self._backward_operator = getattr(OPS, backward)
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(forward, self._run, device)
            LIBRARY.impl(backward, self._run_backward, device)
            if self.has_inputs:
                LIBRARY.impl(forward, self._run_in_autocast, f"Autocast{device}")
        space = f"{NAMESPACE}::"
        torch.library.register_fake(space + forward, self._fake, lib=LIBRARY)
        torch.library.register_fake(space + backward, self._fake_backward, lib=LIBRARY)
        torch.library.register_autograd(
            space + forward, self._differentiate, setup_context=self._keep, lib=LIBRARY
        )  # fmt: skip
        if type(self).flops is not Operator.flops:
            register_flop_formula(self._forward_operator)(self._count)
            register_flop_formula(self._backward_operator)(self._count_backward)

    def _run(self, *arguments: Any) -> Any:
        row, values = self.signature.split(arguments)
        count = self.inputs_of(values)
        row = [*(x if x.ndim == 2 or x.is_contiguous() else x.contiguous() for x in row[:count]), *row[count:]]
        if values.is_invariant:
            row[:count] = map(settled, row[:count])

        def make() -> Prepared:
            return self.prepare(row, values, (False,) * len(row), registered=True)

        with private_workspace():  # a graph that PyTorch captures must own all memory it writes
            found = prepared.find(self, row, count, values, make)
            results = found.forward(row)
        if self.signature.has_lists:
            return results[: found.outputs], results[found.outputs :]
        return self._filled(results, row[0])

    def _fake(self, *arguments: Any) -> Any:
        results = self.fake(*self.signature.structures(arguments))
        return results if self.signature.has_lists else self._filled(results, arguments[0])

    def _filled(self, results: Row, like: Tensor) -> Any:
        whole = tuple(like.new_empty(0) if t is None else t for t in results[: len(self.results)])
        return whole if len(whole) > 1 else whole[0]

    def _run_in_autocast(self, first: Any, *others: Any) -> Any:
        x = first[0] if self.signature.has_lists else first
        target = autocast_dtype(x)
        if target is not None:
            first = [each.to(target) for each in first] if self.signature.has_lists else first.to(target)
        with torch.autocast(x.device.type, enabled=False):
            return self._forward_operator(first, *others)

    def _of_backward(self, arguments: Sequence[Any]) -> tuple[list[Tensor], list[Any], Row, Values, Sequence[bool]]:
        """(dys, row, results of forward, values, needs) of a call of backward."""
        (dys, *made, needs), forward = arguments[: self._own], arguments[self._own :]
        row, values = self.signature.split(forward)
        if self.signature.has_lists:
            return dys, row, [*[None] * len(dys), *made[0]], values, needs
        return [dys], row, made, values, needs

    def _run_backward(self, *arguments: Any) -> Any:
        dys, row, made, values, needs = self._of_backward(arguments)
        wanted = [False] * len(row)
        for place, need in zip(self._places(len(row)), needs, strict=True):
            wanted[place] = need
        everything = (*row, *made)
        with private_workspace():
            row = self._with_inputs(row, dys, values, lambda _: dys[0])
            found = self.prepare(row, values, wanted, registered=True)
            found.has_kernels &= prepared.are_even(dys)
            grads = iter(found.backward(dys, [everything[i] for i in found.saved]))
        return self._as_declared(owned([(next(grads) if need else None) for need in needs], dys[0]))

    def _fake_backward(self, *arguments: Any) -> Any:
        dys, row, _, values, needs = self._of_backward(arguments)
        shapes = self.input_shapes(dys, *self.signature.read(row, values))
        shapes = [*shapes, *((0,) if t is None else t.shape for t in row[len(shapes) :])]
        dtypes = [dys[0].dtype if t is None else t.dtype for t in row]
        empty = dys[0].new_empty
        return self._as_declared([
            empty(shapes[place], dtype=dtypes[place]) if need else empty(0)
            for place, need in zip(self._places(len(row)), needs, strict=True)
        ])  # fmt: skip

    def _as_declared(self, grads: list[Tensor]) -> Any:
        """Gradients as the schema of backward has them: a single one is no list."""
        return grads if self.signature.has_lists or len(grads) != 1 else grads[0]

    def _keep(self, ctx: Any, inputs: Any, output: Any) -> None:
        row, values = self.signature.split(inputs)
        outputs, made = self._parted(output)
        ctx.mark_non_differentiable(*made)
        flags = ctx.needs_input_grad
        if not self.signature.has_lists:  # with lists, the flags are a flat list already
            flags, _ = self.signature.split(flags)
        wanted = [False] * len(row)
        for place in self._places(len(row)):
            wanted[place] = flags[place]
        prepared.save(ctx, self.prepare(row, values, wanted, registered=True), row, (*outputs, *made))

    def _differentiate(self, ctx: Any, dy: Any, *_: Any) -> Any:
        found: Prepared = ctx.prepared
        dys = dy if self.signature.has_lists else [dy]
        grads = iter(self.elsewhere(dys, found.placed(read_saved(ctx, found.reads_output)), found.values, found.wanted))
        row = [next(grads) if want else None for want in found.wanted]
        # Beside lists of tensors PyTorch takes an empty list of numbers for one of these.
        lists = self.signature.has_lists
        none: tuple[Any, ...] = tuple([] if lists and number == () else None for number in found.values.numbers)
        return tuple(self.signature.join(row, Values(none, found.values.sizes)))

    def _count(self, *shapes: Any, **_: Any) -> int:
        return self.flops(*self.signature.structures(shapes))

    def _count_backward(self, *shapes: Any, **_: Any) -> int:
        (dy, *_made, needs), forward = shapes[: self._own], shapes[self._own :]
        return self.backward_flops(dy, needs, *self.signature.structures(forward))


def gradients(
    function: Callable[..., Sequence[Tensor]], tensors: Row, wanted: Sequence[bool], dys: Sequence[Tensor]
) -> list[Tensor]:
    """The wanted gradients of function(*tensors), for dys that may be batched."""
    places = [i for i, want in enumerate(wanted) if want]

    def of(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(places, leaves, strict=True))
        return tuple(function(*(values.get(i, tensor) for i, tensor in enumerate(tensors))))

    leaves = [given(tensors[i]).detach() for i in places]
    if torch._C._are_functorch_transforms_active():  # requires_grad_ is an error there
        return list(torch.func.vjp(of, *leaves)[1](tuple(dys)))
    with torch.enable_grad():
        leaves = [leaf.requires_grad_() for leaf in leaves]
        return list(torch.autograd.grad(of(*leaves), leaves, tuple(dys), materialize_grads=True))


def owned(grads: list[Tensor | None], like: Tensor) -> Any:
    """Each gradient in memory of its own: results of an operator may not share memory, but two may be one tensor."""
    found: list[Tensor] = []
    taken = set()
    for grad in grads:
        own = like.new_empty(0) if grad is None else grad.contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.numel() * own.element_size() or storage.data_ptr() in taken:
            own = own.clone()
        found.append(own)
        taken.add(own.untyped_storage().data_ptr())
    return found
