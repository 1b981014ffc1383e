"""The arguments of an operator in three forms.

    structures  NamedTuples, as an operator's author writes them. A field is a tensor, an optional tensor, a list of
                tensors, or a number of any kind
    arguments   the flat list of PyTorch's schema
    row, values the tensors alone, which are cached and saved, and apart from them everything else

Schemas and conversions are derived from the annotations of the NamedTuples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from glora_kernels.runtime import routes

Row = Sequence[Tensor | None]
"""The tensors of a call in the order of its arguments; lists are concatenated."""

_KINDS = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", str: "str", bool: "bool", int: "int",
    float: "float", Sequence[float]: "float[]", Sequence[int]: "int[]", Sequence[bool]: "bool[]",
}  # fmt: skip
_DEFAULTS = {None: "None", (): "[]"}


class Values(NamedTuple):
    """The arguments of a call that are not tensors.

    numbers: in the order of the arguments. sizes: the length of each list of tensors; None where no argument is a list.
    """

    numbers: tuple[Any, ...]
    sizes: tuple[int, ...] | None = None

    @property
    def is_invariant(self) -> bool:
        """Whether the call was made inside `batch_invariant`: the only text among the numbers is the route."""
        return any(isinstance(number, str) and routes.is_invariant(number) for number in self.numbers)


def parts(values: Iterable[Any], sizes: Iterable[int]) -> list[list[Any]]:
    """Cut the leading values into lists of the given sizes."""
    iterator = iter(values)
    return [list(islice(iterator, size)) for size in sizes]


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """An itemgetter that returns a sequence also for a single position."""
    first, end = places[0], places[-1] + 1
    return itemgetter(slice(first, end)) if len(places) == end - first else itemgetter(*places)


class Signature:
    """The arguments of an operator: the fields of its structures. Either every tensor argument is a list, or none.

    Attributes:
        tensors: the names of the tensor arguments.
        has_lists: whether they are lists.
    """

    def __init__(self, *structures: type[Any]) -> None:
        self._kinds: dict[str, str] = {}
        self._defaults: list[Any] = []
        for structure in structures:
            hints = get_type_hints(structure)
            self._kinds |= {name: _KINDS[hints[name]] for name in structure._fields}
            known = structure._field_defaults
            # Only the last structures keep defaults: PyTorch allows no required argument after an optional one.
            self._defaults = [*self._defaults, *known.values()] if len(known) == len(structure._fields) else []
        names = list(self._kinds)
        self.tensors = [name for name in names if self._kinds[name].startswith("Tensor")]
        numbers = [name for name in names if name not in self.tensors]
        order = [*self.tensors, *numbers]
        self.has_lists = "Tensor[]" in self._kinds.values()
        # Lists of indices, not `itemgetter`s, since torch.compile traces a call by PyTorch's arguments.
        self._tensor_places = [names.index(name) for name in self.tensors]
        self._number_places = [names.index(name) for name in numbers]
        self._order = [order.index(name) for name in names]
        self._readers = [(each._make, _getter([order.index(name) for name in each._fields])) for each in structures]
        self._required = len(names) - len(self._defaults)

    def split(self, arguments: Sequence[Any]) -> tuple[list[Any], Values]:
        """The row and the values of a call, from PyTorch's arguments."""
        arguments = self._whole(arguments)
        tensors = [arguments[place] for place in self._tensor_places]
        numbers = [arguments[place] for place in self._number_places]
        values = tuple([tuple(number) if isinstance(number, (list, tuple)) else number for number in numbers])
        if not self.has_lists:
            return tensors, Values(values)
        return [tensor for own in tensors for tensor in own], Values(values, tuple(map(len, tensors)))

    def join(self, row: Sequence[Any], values: Values) -> list[Any]:
        """PyTorch's arguments of a call, from its row (which may be longer) and its values."""
        own = row[: len(self.tensors)] if values.sizes is None else parts(row, values.sizes)
        everything = (*own, *values.numbers)
        return [everything[place] for place in self._order]

    def read(self, row: Sequence[Any], values: Values) -> list[Any]:
        """The structures of a call, from its row (which may be longer) and its values."""
        own = row[: len(self.tensors)] if values.sizes is None else parts(row, values.sizes)
        everything = (*own, *values.numbers)
        return [make(fields_of(everything)) for make, fields_of in self._readers]

    def structures(self, arguments: Sequence[Any]) -> list[Any]:
        """The structures of a call, from PyTorch's arguments."""
        return self.read(*self.split(arguments))

    def _whole(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The arguments with their defaults: PyTorch omits trailing arguments that equal theirs."""
        return (*arguments, *self._defaults[len(arguments) - self._required :])

    def schema(self, optional: bool = False) -> str:
        """The declaration of the arguments for PyTorch; `optional`: any tensor may be absent, as in a backward."""
        kinds = [f"{kind}?" if optional and kind == "Tensor" else kind for kind in self._kinds.values()]
        defaults = [""] * self._required + [f"={_DEFAULTS[default]}" for default in self._defaults]
        declared = zip(kinds, self._kinds, defaults, strict=True)
        return ", ".join(f"{kind} {name}{default}" for kind, name, default in declared)
